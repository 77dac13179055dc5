"""The client's end of one connection: sending, receiving, and coming back after the server went away.

Owns the socket, who reads it and what it had no room for. There is no thread and no polling: whoever waits reads on
behalf of all, up to its own deadline, and every call first takes in what has come. Sending never waits. An open
connection is given up only when the server has closed it or breaks the protocol: one that hangs may still do what it
was told, so nothing that it was told can be called over. Does not own what messages mean (`client.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Literal

from flexkv_core.errors import ServerRefusedError, StateError
from flexkv_core.framing import Reader, WireError
from flexkv_core.server import messages as m
from flexkv_core.server.peers import credentials

logger = logging.getLogger("flexkv.client")

RECEIVE_BYTES = 1 << 18
SEND_BUFFER_BYTES = 1 << 20
"""Asked of the system, which may give less: a prompt's keys should go out in one piece."""
MAX_UNSENT_BYTES = 4 << 20
"""What the server may leave unread here before further requests are not taken."""
BACKOFF_S = 0.05
BACKOFF_MAX_S = 1.0
"""First and longest wait between two attempts to connect; attempts are made by calls, and delay none."""
WELCOME_S = 5.0
"""A server that has not answered the handshake by then is tried anew."""

LONGEST_WAIT_S = 3600.0
"""What poll() and locks can be told; a longer wait is several."""

CLOSED = "closed"
PASSING = ("stopping", "full")
"""Refusals that the next attempt may not meet: as if no server were there."""
State = Literal["away", "greeting", "open", "closed"]


class Channel:
    """See the module's docstring. Any thread of the process that made it.

    Args:
        path: of the server's socket.
        introduce: makes the first message of a connection.
        received: called with each message but the welcome, with the channel's condition held.
        welcomed, lost: called likewise, when a connection is open, and when one that was is not any more.

    Attributes:
        changed: held around all changes of state; notified after them.
        refused: why the server would not have us, the last time it said so.
        connections: how many were opened so far.

    Raises StateError from every method but `close` in a process that was forked from its own: two readers of one
    stream would tear it apart.
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
        self._pid = os.getpid()
        self._socket: socket.socket | None = None
        self._reader = Reader(m.MAX_MESSAGE_BYTES)
        self._unsent = bytearray()
        self._state: State = "away"
        self._reading = False
        self._polling = 0
        self._given_up: list[socket.socket] = []  # not closed while a thread may poll them: numbers are used again
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

    @property
    def unsent(self) -> int:
        """Bytes that the socket had no room for so far."""
        return len(self._unsent)

    def check_process(self) -> None:
        """Raises StateError in another process than the one that made this."""
        if os.getpid() != self._pid:
            raise StateError("this client was made in another process: connect() in this one")

    # ---------------------------------------------------------------- connecting

    def connect(self) -> None:
        """Begin to connect, if it is time to try. Never waits."""
        self.check_process()
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
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
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
        self._unsent.clear()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes whoever polls it
            self._given_up.append(self._socket)
            self._socket = None
            self._close_given_up()
        if was == "open":
            if reason != CLOSED:
                logger.warning("the server at %s is away: %s", self._path, reason)
            self._lost(reason)
        self.changed.notify_all()

    def _close_given_up(self) -> None:
        if not self._polling:
            for connected in self._given_up:
                connected.close()
            self._given_up.clear()

    def close(self) -> None:
        """End for good. Safe to call twice, and in a process that was forked, which gives up its copy only."""
        if os.getpid() != self._pid:
            if self._socket is not None:
                self._socket.close()
            return
        with self.changed:
            if self._state == "closed":
                return
            self._drop(CLOSED)
            self._state = "closed"

    # ---------------------------------------------------------------- sending

    def send(self, message: m.Message, *, request: bool = True) -> bool:
        """Send, or keep what the socket has no room for, which later calls send. Never waits.

        Args:
            request: False for what says that something is over, which is small and always taken.

        Returns False if it was not taken: there is no connection, the message is too long, or the server has left
        much unread.
        """
        self.check_process()
        try:
            data = m.encode(message)
        except WireError as error:
            logger.error("not sent: %s", error)
            return False
        with self.changed:
            if self._socket is None or self._state != "open" or (request and len(self._unsent) > MAX_UNSENT_BYTES):
                return False
            if self._unsent:
                self._unsent += data
                self._flush(self._socket)
            else:
                sent = self._send_some(self._socket, data)
                if sent < len(data) and self._state == "open":
                    self._unsent += memoryview(data)[sent:]
            return self._state == "open"

    def _flush(self, connected: socket.socket) -> None:
        """Send of what was kept what there is room for (condition held)."""
        while self._unsent:
            sent = self._send_some(connected, self._unsent)
            if not sent:
                return
            del self._unsent[:sent]

    def _send_some(self, connected: socket.socket, data: bytes | bytearray) -> int:
        """How much went out; 0 too if that was the end of the connection."""
        try:
            return connected.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._drop(f"sending failed: {error}")
            return 0

    # ---------------------------------------------------------------- receiving

    def pump(self) -> None:
        """Send what was kept, and take in what has come unless somebody is reading anyway. Never waits."""
        self.check_process()
        with self.changed:
            if self._socket is not None and self._unsent:
                self._flush(self._socket)
            if self._socket is not None and not self._reading:
                self._take(self._socket)

    def wait(self, until: Callable[[], bool], deadline: float) -> bool:
        """Read and send until `until()` is true, the deadline (of the monotonic clock) has come, or there is no
        connection; returns `until()`."""
        self.check_process()
        while True:
            with self.changed:
                left = min(deadline - time.monotonic(), LONGEST_WAIT_S)
                connected = self._socket
                if until() or left <= 0 or connected is None:
                    return until()
                events = select.POLLOUT if self._unsent else 0
                reading = not self._reading
                if reading:
                    self._reading = True
                    events |= select.POLLIN
                elif not events:
                    self.changed.wait(left)
                    continue
                self._polling += 1
            try:
                poller = select.poll()
                poller.register(connected, events)
                poller.poll(left * 1000)
            finally:
                with self.changed:
                    self._polling -= 1
                    self._close_given_up()
                    if self._socket is connected:
                        self._flush(connected)
                    if reading:
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
        elif isinstance(message, m.Refused) and message.kind in PASSING:
            self._drop(message.reason)
        elif isinstance(message, m.Refused):
            if self.refused is None:
                logger.error("the server at %s does not take this client: %s", self._path, message.reason)
            self.refused = ServerRefusedError(message.reason)
            self._drop(message.reason)
        else:
            raise WireError(f"{type(message).__name__} before a welcome")


def _check_owner(connected: socket.socket) -> None:
    """Whoever made the socket file is this user: nobody else is told our keys. Raises OSError."""
    _, user = credentials(connected)
    if user != os.geteuid():
        raise PermissionError(f"the server is of user {user}, this process of user {os.geteuid()}")
