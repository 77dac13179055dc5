"""Who is at the other end of a Unix socket, and whether that process still lives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable

SO_PEERPIDFD = 77
"""Of <asm-generic/socket.h>; not in Python's socket module yet."""


def credentials(connected: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, as this one sees them: of the one that connected, or listened."""
    pid, uid, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


class Peer:
    """The process at the other end of a connection, by its pidfd, which no other process can take over.

    Attributes:
        pid, uid: as this process sees them; pid 0: of another pid namespace.
    """

    def __init__(self, connected: socket.socket) -> None:
        """Raises OSError if the process is gone already."""
        self.pid, self.uid = credentials(connected)
        self._pidfd = -1
        if self.pid > 0:
            try:
                self._pidfd = connected.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
                os.set_inheritable(self._pidfd, False)
            except OSError:  # Linux before 6.5
                self._pidfd = os.pidfd_open(self.pid)

    def watch(self, loop: asyncio.AbstractEventLoop, gone: Callable[[], None]) -> None:
        """Have `gone` called once when the process has ended."""

        def ended() -> None:
            self.forget(loop)
            gone()

        loop.add_reader(self._pidfd, ended)

    def forget(self, loop: asyncio.AbstractEventLoop) -> None:
        """Stop watching. Safe to call twice."""
        if self._pidfd >= 0:
            loop.remove_reader(self._pidfd)
            with contextlib.suppress(OSError):
                os.close(self._pidfd)
            self._pidfd = -1
