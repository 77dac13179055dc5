"""Where a server's socket lies, and the lock that makes it the only one there.

Owns the default path, what a path may be, and the lock, which dies with its process and names it. Does not own the
socket itself (`daemon.py`) or starting servers (`launch.py`).
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from flexkv_core.errors import DirectoryInUseError, SocketPathError

LONGEST_PATH = 107
"""Bytes that a Unix socket's path may have (sun_path, less its end)."""


def socket_path(setting: str | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """The path of the server's socket.

    Args:
        setting: "ipc:///path" or a path; None: a private place of this user's, which is made if it is not there:
            $XDG_RUNTIME_DIR/flexkv/server.sock, else /tmp/flexkv-UID/server.sock.

    Raises SocketPathError for what cannot be one, or a default place that is not private.
    """
    if setting is not None:
        text = setting.removeprefix("ipc://")
        if "://" in text or not text:
            raise SocketPathError(f"socket {setting!r}: give a path, or ipc:///path: only local sockets are served")
        path = Path(os.path.abspath(text))
    else:
        variables = os.environ if environ is None else environ
        runtime = variables.get("XDG_RUNTIME_DIR", "")
        base = Path(runtime) / "flexkv" if runtime and _is_own(Path(runtime)) else Path(f"/tmp/flexkv-{os.geteuid()}")
        base.mkdir(mode=0o700, exist_ok=True)
        if not _is_own(base):
            raise SocketPathError(f"{base} is not a directory of this user's alone (0700): remove it, or name a socket")
        path = base / "server.sock"
    length = len(os.fsencode(path))
    if length > LONGEST_PATH:
        raise SocketPathError(
            f"socket {path}: {length} bytes, and a socket's path has at most {LONGEST_PATH}: shorten it"
        )
    return path


def _is_own(directory: Path) -> bool:
    """Whether it is a directory, no link, of this user, that nobody else may enter."""
    try:
        status = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


class PathLock:
    """An exclusive lock on a file, held until `release` or the end of the process.

    Args:
        path: of the lock file; made (0600) if it is not there. Links are not followed, others' files not touched.

    Raises:
        DirectoryInUseError: another process holds it; the text names the process.
        SocketPathError: the file is a link, or not this user's.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SocketPathError(f"{path}: cannot be opened as a lock: {error.strerror}") from error
        try:
            if os.fstat(self._fd).st_uid != os.geteuid():
                raise SocketPathError(f"{path}: is another user's: name another socket")
            fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise DirectoryInUseError(f"{path.with_suffix('')} is served by process {holder}: use that one") from None
        except BaseException:
            os.close(self._fd)
            raise
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give it back. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> PathLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def server_lock(path: Path) -> PathLock:
    """The lock of the one server at this socket; beside it, and left there, so that all lock the same file."""
    return PathLock(path.with_name(path.name + ".lock"))


def start_lock(path: Path) -> PathLock:
    """Waits for whoever is starting a server at this socket."""
    return PathLock(path.with_name(path.name + ".start"), wait=True)
