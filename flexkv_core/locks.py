"""One server a directory: an advisory lock that dies with its process and names its holder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from flexkv_core.errors import DirectoryInUseError


class DirectoryLock:
    """Takes `directory`/lock for this process, making the directory (0700) if it is not there.

    Raises:
        DirectoryInUseError: another process holds it; the text names the process.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        self._fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise DirectoryInUseError(
                f"{directory} is in use by process {holder}: give each server a directory of its own"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the directory back. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
