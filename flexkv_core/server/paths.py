"""Where a server's socket lies, and the lock that makes it the only one there.

Owns the default path, what a path may be, and the lock, which dies with its process and names it. Does not own the
socket itself (`daemon.py`) or starting servers (`launch.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
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
        if "://" in text or not text or "\0" in text:
            raise SocketPathError(f"socket {setting!r}: give a path, or ipc:///path: only local sockets are served")
        path = Path(os.path.abspath(text))
    else:
        variables = os.environ if environ is None else environ
        runtime = variables.get("XDG_RUNTIME_DIR", "")
        base = Path(runtime) / "flexkv" if runtime and _is_own(Path(runtime)) else Path(f"/tmp/flexkv-{os.geteuid()}")
        with contextlib.suppress(OSError):  # it is looked at next
            base.mkdir(mode=0o700)
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


def open_own(path: Path, flags: int) -> int:
    """Open a plain file of this user's (0600), made if it is not there; the descriptor. No link is followed.

    Raises SocketPathError for anything else that lies there.
    """
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise SocketPathError(f"{path}: cannot be opened: {error.strerror}") from error
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise SocketPathError(f"{path}: is no file, or another user's: name another socket")
    return fd


class PathLock:
    """An exclusive lock on a file, held until `release` or the end of all processes that were given it.

    Args:
        path: of the lock file; made (0600) if it is not there. Links are not followed, others' files not touched.
        fd: of a lock that another process has taken and handed over.

    Raises:
        DirectoryInUseError: another process holds it; the text names the process.
        SocketPathError: the file is a link, or not this user's.
    """

    def __init__(self, path: Path, fd: int | None = None) -> None:
        self._fd = open_own(path, os.O_RDWR) if fd is None else fd
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # one that was handed over is held already
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise DirectoryInUseError(f"{path.with_suffix('')} is served by process {holder}: use that one") from None
        except BaseException:
            os.close(self._fd)
            raise
        os.set_inheritable(self._fd, False)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    @property
    def fd(self) -> int:
        """To hand over."""
        return self._fd

    def release(self) -> None:
        """Give it back, unless another process was given it too. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> PathLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def server_lock(path: Path, fd: int | None = None) -> PathLock:
    """The lock of the one server at this socket; beside it, and left there, so that all lock the same file.

    Raises DirectoryInUseError also where a server listens although somebody has removed its lock file.
    """
    lock = PathLock(path.with_name(path.name + ".lock"), fd)
    listener = _listener(path)
    if listener is not None:
        lock.release()
        raise DirectoryInUseError(f"{path} is served by process {listener or 'unknown'}: use that one")
    return lock


def _listener(path: Path) -> int | None:
    """The process that listens at a socket, if one does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:  # its line is full
            return 0
        except OSError:
            return None
        (pid,) = struct.unpack_from("i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(pid)
