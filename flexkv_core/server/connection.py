"""One socket of the server, on the owner's loop: frames in, frames out, never blocking.

Owns the bytes and their bounds, and who is at the other end (`peers.py` watches whether it lives). Does not own what
messages mean (`client_session.py`, `agent_session.py`).

A client that sends much is served a few messages a turn, and is not read from while some of its messages wait; one that
does not read its answers is cut off. So no client delays another by more than a few of its messages.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence

from flexkv_core.framing import Reader, WireError
from flexkv_core.server.messages import MAX_HELLO_BYTES, MAX_MESSAGE_BYTES, FromServer, encode

RECEIVE_BYTES = 1 << 18
MESSAGES_A_TURN = 8
MAX_OUTGOING_BYTES = 32 << 20
"""Answers that a client has not read; beyond it is cut off."""


class Connection:
    """See the module's docstring. Methods are for the loop's thread.

    Args:
        on_message: called with the body of each frame. It may raise WireError, which ends the connection.
        on_closed: called once, with the reason, when nothing will be sent or received any more.

    Attributes:
        on_drained: called when all that the other side had left unread has gone out.
    """

    def __init__(
        self,
        connected: socket.socket,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[Connection, bytes], None],
        on_closed: Callable[[Connection, str], None],
    ) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._loop = loop
        self._reader = Reader(MAX_HELLO_BYTES)
        self._waiting: deque[bytes] = deque()
        self._outgoing = bytearray()
        self._on_message = on_message
        self._on_closed = on_closed
        self._ending = False
        self.on_drained: Callable[[], None] = lambda: None
        self.open = True
        loop.add_reader(connected, self._receive)

    @property
    def socket(self) -> socket.socket:
        """For its options."""
        return self._socket

    @property
    def unsent(self) -> int:
        """Bytes that wait for the other side to read."""
        return len(self._outgoing)

    def trust(
        self, on_message: Callable[[Connection, bytes], None], on_closed: Callable[[Connection, str], None]
    ) -> None:
        """The other side is known: long messages are taken from now on, by these."""
        self._reader.limit = MAX_MESSAGE_BYTES
        self._on_message, self._on_closed = on_message, on_closed

    # ---------------------------------------------------------------- in

    def _receive(self) -> None:
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"the connection broke: {error}")
            return
        if not data:
            self.close("the other side hung up")
            return
        try:
            self._waiting.extend(self._reader.feed(data))
        except WireError as error:
            self.close(str(error))
            return
        self._serve()

    def _serve(self) -> None:
        """Handle a few messages; when more wait, others get their turn first."""
        for _ in range(min(MESSAGES_A_TURN, len(self._waiting))):
            if not self.open or self._ending:
                return
            try:
                self._on_message(self, self._waiting.popleft())
            except WireError as error:
                self.close(str(error))
                return
        if self._waiting and self.open:
            self._loop.remove_reader(self._socket)
            self._loop.call_soon(self._continue)

    def _continue(self) -> None:
        if self.open and not self._ending:
            self._loop.add_reader(self._socket, self._receive)
            self._serve()

    # ---------------------------------------------------------------- out

    def send(self, message: FromServer, fds: Sequence[int] = ()) -> None:
        """Send, or keep until the other side reads. Once closed, nothing happens."""
        if not self.open or self._ending:
            return
        data = encode(message)
        if not self._outgoing:
            try:
                sent = socket.send_fds(self._socket, [data], fds) if fds else self._socket.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                # Not at once: the caller may be in the middle of something that closing ends.
                self._loop.call_soon(self.close, f"the connection broke: {error}")
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self._socket, self._flush)
        self._outgoing += data
        if len(self._outgoing) > MAX_OUTGOING_BYTES:
            self._loop.call_soon(self.close, f"{len(self._outgoing)} bytes of answers were not read")

    def _flush(self) -> None:
        try:
            sent = self._socket.send(self._outgoing)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"the connection broke: {error}")
            return
        del self._outgoing[:sent]
        if not self._outgoing:
            self._loop.remove_writer(self._socket)
            if self._ending:
                self.close("refused")
            else:
                self.on_drained()

    def end(self) -> None:
        """Take no more messages; close when what was sent has gone out."""
        self._ending = True
        if not self._outgoing:
            self.close("refused")

    def close(self, reason: str) -> None:
        """Close now. Safe to call twice."""
        if not self.open:
            return
        self.open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._waiting.clear()
        self._outgoing.clear()
        self._on_closed(self, reason)
