"""The client's end of one connection: sending, receiving, and coming back after the server went away.

Owns the socket and who reads it. There is no thread and no polling: whoever waits reads on behalf of all, up to its own
deadline, and every call first takes in what has come. Does not own what messages mean (`client.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Literal

from flexkv_core.errors import ServerRefusedError
from flexkv_core.framing import Reader, WireError
from flexkv_core.server import messages as m

logger = logging.getLogger("flexkv.client")

RECEIVE_BYTES = 1 << 18
BACKOFF_S = 0.05
BACKOFF_MAX_S = 1.0
"""First and longest wait between two attempts to connect; attempts are made by calls, and delay none."""
WELCOME_S = 5.0
"""A server that has not answered the handshake by then is tried anew."""

LONGEST_POLL_S = 3600.0
"""What poll() can be told; a longer wait is several."""

CLOSED = "closed"
State = Literal["away", "greeting", "open", "closed"]


class Channel:
    """See the module's docstring. Any thread.

    Args:
        path: of the server's socket.
        introduce: makes the first message of a connection.
        received: called with each message but the welcome, with the channel's condition held.
        welcomed, lost: called likewise, when a connection is open, and when one that was is not any more.

    Attributes:
        changed: held around all changes of state; notified after them.
        refused: why the server would not have us, the last time it said so.
        connections: how many were opened so far.
    """

    def __init__(
        self,
        path: str,
        introduce: Callable[[], m.Hello],
        received: Callable[[m.FromServer], None],
        welcomed: Callable[[m.Welcome], None],
        lost: Callable[[str], None],
    ) -> None:
        self._path = path
        self._introduce = introduce
        self._received = received
        self._welcomed = welcomed
        self._lost = lost
        self._socket: socket.socket | None = None
        self._reader = Reader(m.MAX_MESSAGE_BYTES)
        self._state: State = "away"
        self._reading = False
        self._sending = threading.Lock()
        self._retry_at = 0.0
        self._backoff_s = BACKOFF_S
        self._greeted_at = 0.0
        self.changed = threading.Condition(threading.RLock())
        self.refused: ServerRefusedError | None = None
        self.connections = 0

    @property
    def state(self) -> State:
        """ "away": no connection; "greeting": one without a welcome so far; "open"; "closed": for good."""
        return self._state

    # ---------------------------------------------------------------- connecting

    def connect(self) -> None:
        """Begin to connect, if it is time to try. Never waits."""
        with self.changed:
            now = time.monotonic()
            if self._state == "greeting" and now > self._greeted_at + WELCOME_S:
                self._drop("it did not answer the handshake")
            if self._state != "away" or now < self._retry_at:
                return
            self._retry_at = now + self._backoff_s * random.uniform(0.8, 1.2)
            self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                connected.setblocking(False)
                connected.connect(self._path)
                _check_owner(connected)
                connected.sendall(m.encode(self._introduce()))  # into an empty buffer: it fits
            except OSError as error:
                logger.debug("cannot reach the server at %s: %s", self._path, error)
                connected.close()
                return
            self._socket, self._reader = connected, Reader(m.MAX_MESSAGE_BYTES)
            self._state, self._greeted_at = "greeting", now

    def _drop(self, reason: str) -> None:
        """The connection is no more (condition held)."""
        was, self._state = self._state, "away"
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if was == "open":
            if reason != CLOSED:
                logger.warning("the server at %s is away: %s", self._path, reason)
            self._lost(reason)
        self.changed.notify_all()

    def close(self) -> None:
        """End for good. Safe to call twice."""
        with self.changed:
            if self._state == "closed":
                return
            self._drop(CLOSED)
            self._state = "closed"

    # ---------------------------------------------------------------- sending

    def send(self, message: m.Message, deadline: float) -> bool:
        """Send, waiting for room until the deadline (of the monotonic clock); False: it did not go out, and a
        connection that took part of it is dropped."""
        data = m.encode(message)
        with self._sending:
            connected = self._socket
            if connected is None:
                return False
            view, sent = memoryview(data), 0
            try:
                while True:
                    with contextlib.suppress(BlockingIOError, InterruptedError):
                        sent += connected.send(view[sent:])
                    if sent == len(data):
                        return True
                    left = deadline - time.monotonic()
                    if left <= 0:
                        break
                    poller = select.poll()
                    poller.register(connected, select.POLLOUT)
                    poller.poll(left * 1000)
            except (OSError, ValueError) as error:  # ValueError: closed meanwhile
                self._fail(connected, f"sending failed: {error}")
                return False
            if sent:
                self._fail(connected, "it takes no more messages")
        return False

    def _fail(self, connected: socket.socket, reason: str) -> None:
        with self.changed:
            if self._socket is connected:
                self._drop(reason)

    # ---------------------------------------------------------------- receiving

    def pump(self) -> None:
        """Take in what has come, unless somebody is reading anyway. Never waits."""
        with self.changed:
            if self._reading or self._socket is None:
                return
            self._take(self._socket)

    def wait(self, until: Callable[[], bool], deadline: float) -> bool:
        """Read until `until()` is true, the deadline has come, or there is no connection; returns `until()`."""
        while True:
            with self.changed:
                left = deadline - time.monotonic()
                connected = self._socket
                if until() or left <= 0 or connected is None:
                    return until()
                if self._reading:
                    self.changed.wait(left)
                    continue
                self._reading = True
            try:
                poller = select.poll()
                poller.register(connected, select.POLLIN)
                poller.poll(min(left, LONGEST_POLL_S) * 1000)
            except (OSError, ValueError):  # closed by another thread
                pass
            finally:
                with self.changed:
                    self._reading = False
                    if self._socket is connected:
                        self._take(connected)
                    self.changed.notify_all()

    def _take(self, connected: socket.socket) -> None:
        """Receive once and hand on every message that is complete (condition held)."""
        try:
            data = connected.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._drop(f"the connection broke: {error}")
            return
        if not data:
            self._drop("it hung up")
            return
        try:
            for body in self._reader.feed(data):
                self._hand_on(m.parse_from_server(body))
                if self._socket is not connected:
                    return
        except WireError as error:
            self._drop(str(error))
        self.changed.notify_all()

    def _hand_on(self, message: m.FromServer) -> None:
        if self._state == "open":
            self._received(message)
        elif isinstance(message, m.Welcome):
            self._state, self._backoff_s, self.refused = "open", BACKOFF_S, None
            self.connections += 1
            self._welcomed(message)
        elif isinstance(message, m.Refused):
            if self.refused is None:
                logger.error("the server at %s does not take this client: %s", self._path, message.reason)
            self.refused = ServerRefusedError(message.reason)
            self._drop(message.reason)
        else:
            raise WireError(f"{type(message).__name__} before a welcome")


def _check_owner(connected: socket.socket) -> None:
    """Whoever made the socket file is this user: nobody else is told our keys. Raises OSError."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.geteuid():
        raise PermissionError(f"the server is of user {user}, this process of user {os.geteuid()}")
