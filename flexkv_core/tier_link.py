"""The core's end of a lower tier: its process, its calls in flight, its deaths and returns.

Everything here runs on the owner thread's event loop and never blocks it; every callback is called there. Owns the
process and the socket, not queues or decisions (`scheduler.py`).

A call is answered exactly once. When the process dies, hangs past a deadline or breaks the protocol, it is killed,
and its calls are answered FAILED only after it has been reaped: until then it might still write into host memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flexkv_core import tier_wire as wire
from flexkv_core.backend import Batch, Capabilities, Listing, Recovered, Status
from flexkv_core.framing import Reader, WireError
from flexkv_core.tier_worker import PROBE_FAILED

logger = logging.getLogger("flexkv.tier")

RECEIVE_BYTES = 1 << 18
HUNG_UP = "its process closed the socket"
STEADY_S = 30.0
"""A process that was ready this long has recovered: the next failure starts at the shortest back-off."""

Statuses = npt.NDArray[np.uint8]
State = Literal["starting", "ready", "backoff", "closed"]
Operation = Literal["read", "write", "delete"]


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """What a link needs to know of its tier.

    Attributes:
        config: the backend's own config, as plain data, secrets in the clear: not in the repr.
        deadline_s: a call unanswered for this long gets the process killed; open_deadline_s: the same for opening.
        backoff_s, backoff_max_s: first and longest wait before a restart; it doubles in between.
        seed: of the jitter on that wait.
    """

    name: str
    backend: str
    config: Mapping[str, Any] = field(repr=False)
    isolation: Literal["process", "none"] = "process"
    capacity: int | None = None
    slot_bytes: tuple[int, ...] = ()
    state_directory: Path | None = None
    faults: Mapping[str, Any] | None = None
    deadline_s: float = 10.0
    open_deadline_s: float = 60.0
    backoff_s: float = 0.1
    backoff_max_s: float = 30.0
    seed: int | None = None


@dataclass(slots=True)
class _Pending:
    """A call in flight: how to answer it, and until when the tier may take."""

    blocks: int
    answer: Callable[[bytes | None], None]
    piece: Callable[[wire.Piece], None] | None
    deadline: asyncio.TimerHandle


@dataclass(slots=True)
class _Process:
    """One life of the tier process."""

    popen: subprocess.Popen[bytes]
    pidfd: int
    socket: socket.socket
    reader: Reader = field(default_factory=lambda: Reader(wire.MAX_MESSAGE_BYTES))
    outgoing: bytearray = field(default_factory=bytearray)
    killed: bool = False
    reaped: bool = False


class TierLink:
    """A tier in a process of its own. `start` once, `close` once."""

    def __init__(
        self,
        settings: LinkSettings,
        loop: asyncio.AbstractEventLoop,
        region_fd: int,
        region_bytes: int,
        on_state: Callable[[TierLink], None],
    ) -> None:
        self.settings = settings
        self.state: State = "starting"
        self.capabilities: Capabilities | None = None
        self.powers: frozenset[str] = frozenset()
        self.restarts = 0
        self.last_error: str | None = None
        self.unexpected_answers = 0
        self._loop = loop
        self._region_fd = region_fd
        self._region_bytes = region_bytes
        self._on_state = on_state
        self._process: _Process | None = None
        self._calls: dict[int, _Pending] = {}
        self._next_call = 0
        self._failures = 0
        self._jitter = random.Random(settings.seed)
        self._timer: asyncio.TimerHandle | None = None
        self._gone: asyncio.Future[None] | None = None

    @property
    def pid(self) -> int | None:
        """The tier process, None while there is none."""
        return self._process.popen.pid if self._process is not None else None

    def start(self) -> None:
        """Start the process; `state` turns to ready when the backend is open."""
        if self.state == "closed":
            return
        self.state = "starting"
        try:
            self._process = _spawn(self._region_fd)
        except OSError as error:  # no descriptor, process or memory to be had now
            self._failed(f"its process could not be started: {error}")
            return
        self._loop.add_reader(self._process.pidfd, self._reap, self._process)
        self._loop.add_reader(self._process.socket.fileno(), self._receive, self._process)
        settings = self.settings
        self._send(
            wire.Start(
                settings.name,
                settings.backend,
                dict(settings.config),
                list(sys.path),
                self._region_bytes,
                list(settings.slot_bytes),
                settings.capacity,
                str(settings.state_directory) if settings.state_directory else None,
                dict(settings.faults) if settings.faults is not None else None,
                logger.getEffectiveLevel(),
            )
        )
        self._set_timer(settings.open_deadline_s, lambda: self._kill("its backend took too long to open"))

    # ---------------------------------------------------------------- calls

    def submit(self, operation: Operation, batch: Batch, on_done: Callable[[Statuses], None]) -> None:
        """Have the tier read, write or delete; `on_done` gets one `Status` a block, exactly once, later."""

        def answer(statuses: bytes | None) -> None:
            if statuses is None:
                on_done(np.full(len(batch), Status.FAILED, np.uint8))
            else:
                on_done(np.frombuffer(statuses, np.uint8))

        if operation == "delete" and self.state == "ready" and "delete" not in self.powers:
            self._loop.call_soon(answer, None)
            return
        self._call(operation, batch, answer, len(batch))

    def probe(self, batch: Batch, on_done: Callable[[int | None], None]) -> None:
        """Ask how many leading blocks the tier holds; None if it could not say."""

        def answer(count: bytes | None) -> None:
            held = PROBE_FAILED if count is None else int(np.frombuffer(count, np.int32)[0])
            on_done(held if 0 <= held <= len(batch) else None)

        if "probe" not in self.powers:
            self._loop.call_soon(answer, None)
            return
        self._call("probe", batch, answer, 4)

    def list(self, on_piece: Callable[[Listing], None], on_end: Callable[[bool], None]) -> None:
        """Have the tier list what it holds; `on_end` says whether the list was complete."""
        self._enumerate("list", lambda piece: on_piece(wire.listing_of(piece)), on_end)

    def recover(self, on_piece: Callable[[Recovered], None], on_end: Callable[[bool], None]) -> None:
        """Have the tier say what survived, and where; `on_end` says whether that was all."""
        self._enumerate("recover", lambda piece: on_piece(wire.recovered_of(piece)), on_end)

    def _enumerate(
        self, operation: str, on_piece: Callable[[wire.Piece], None], on_end: Callable[[bool], None]
    ) -> None:
        nothing = np.zeros(0, np.int64)
        empty = Batch(np.zeros((0, 32), np.uint8), np.zeros(0, np.uint8), nothing, nothing)

        def answer(complete: bytes | None) -> None:
            on_end(complete == b"\x01")

        self._call(operation, empty, answer, 1, on_piece)

    def _call(
        self,
        operation: str,
        batch: Batch,
        answer: Callable[[bytes | None], None],
        answer_bytes: int,
        piece: Callable[[wire.Piece], None] | None = None,
    ) -> None:
        if self.state != "ready":
            self._loop.call_soon(answer, None)
            return
        number = self._next_call = self._next_call + 1
        limit = self.settings.deadline_s if piece is None else self.settings.open_deadline_s
        reason = f"a {operation} was not answered within {limit:g} s"
        deadline = self._loop.call_later(limit, self._kill, reason)
        self._calls[number] = _Pending(answer_bytes, answer, piece, deadline)
        self._send(wire.call(number, operation, batch))

    def _finish(self, number: int, answer: bytes | None) -> None:
        pending = self._calls.pop(number)
        pending.deadline.cancel()
        try:
            pending.answer(answer)
        except Exception:  # a bug of the caller's must not keep other calls, or the tier's return, from happening
            logger.exception("%s: taking an answer failed", self.settings.name)

    # ---------------------------------------------------------------- the socket

    def _send(self, message: wire.ToTier) -> None:
        process = self._process
        if process is None or process.killed:
            return
        process.outgoing += wire.frame(message)
        self._flush(process)

    def _flush(self, process: _Process) -> None:
        """Write what the socket takes now; the rest when it takes more. A tier that reads nothing stops nobody."""
        try:
            while process.outgoing:
                sent = process.socket.send(process.outgoing)
                del process.outgoing[:sent]
        except BlockingIOError:
            self._loop.add_writer(process.socket.fileno(), self._flush, process)
            return
        except OSError:
            self._kill(HUNG_UP)
            return
        self._loop.remove_writer(process.socket.fileno())

    def _receive(self, process: _Process) -> None:
        try:
            data = process.socket.recv(RECEIVE_BYTES)
            if not data:
                self._loop.remove_reader(process.socket.fileno())
                self._kill(HUNG_UP)
                return
            for body in process.reader.feed(data):
                self._handle(wire.parse_to_core(body))
        except BlockingIOError:
            return
        except OSError:  # reset: it died with something of ours unread
            self._kill(HUNG_UP)
        except WireError as error:
            self._kill(f"it broke the protocol: {error}")

    def _handle(self, message: wire.ToCore) -> None:
        if isinstance(message, wire.Log):
            logger.log(message.level, "%s: %s", self.settings.name, message.text)
        elif isinstance(message, wire.Failed):
            self._kill(f"its backend could not be opened: {message.reason}")
        elif isinstance(message, wire.Ready):
            self._opened(message)
        elif isinstance(message, wire.Piece):
            pending = self._calls.get(message.number)
            if pending is None or pending.piece is None:
                self.unexpected_answers += 1
            elif message.last:
                self._finish(message.number, b"\x01" if message.complete else b"\x00")
            else:
                pending.piece(message)
        else:
            pending = self._calls.get(message.number)
            if pending is None:
                self.unexpected_answers += 1
            elif len(message.statuses) != pending.blocks:
                raise WireError(f"{len(message.statuses)} bytes of answers where {pending.blocks} are due")
            else:
                self._finish(message.number, message.statuses)

    def _opened(self, message: wire.Ready) -> None:
        if self.state != "starting":
            raise WireError("ready a second time")
        self.capabilities = Capabilities(
            "slot" if message.addressing == "slot" else "key",
            message.persistent,
            message.shared,
            message.alignment,
            max(1, message.concurrency),
            max(1, message.max_batch_blocks),
        )
        self.powers = frozenset(message.powers)
        self.state = "ready"
        self._set_timer(STEADY_S, self._steady)
        self._on_state(self)

    def _steady(self) -> None:
        self._failures = 0

    # ---------------------------------------------------------------- death and return

    def _kill(self, reason: str) -> None:
        """Kill the process; what follows happens when it has been reaped."""
        process = self._process
        if process is None or process.killed:
            return
        process.killed = True
        if self.state != "closed":
            self.last_error = reason
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)

    def _reap(self, process: _Process) -> None:
        """The process is gone (its pidfd says so): nothing of it can touch host memory any more."""
        code = process.popen.wait()
        process.reaped = True
        self._loop.remove_reader(process.pidfd)
        self._loop.remove_reader(process.socket.fileno())
        self._loop.remove_writer(process.socket.fileno())
        os.close(process.pidfd)
        process.socket.close()
        self._process = None
        if self._timer is not None:
            self._timer.cancel()
        if self.state != "closed" and (not process.killed or (self.last_error == HUNG_UP and code != -signal.SIGKILL)):
            self.last_error = f"its process ended with {_spelled(code)}"
        if self.state != "closed":
            self.state = "backoff"  # before the answers: whoever gets one may call again at once
        for number in list(self._calls):
            self._finish(number, None)
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)
        if self.state != "closed":
            self._failed(self.last_error or "its process ended")

    def _failed(self, reason: str) -> None:
        """Wait, then start again."""
        self.last_error = reason
        wait = min(self.settings.backoff_max_s, self.settings.backoff_s * 2**self._failures)
        self._failures = min(self._failures + 1, 30)
        self.state = "backoff"
        self._set_timer(wait * self._jitter.uniform(0.5, 1.0), self._restart)
        self._on_state(self)

    def _restart(self) -> None:
        self.restarts += 1
        self.start()

    def _set_timer(self, delay_s: float, act: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, act)

    async def close(self, deadline_s: float) -> None:
        """Ask the process to end, kill it at the deadline, reap it. Returns soon after the deadline at the latest.

        Calls in flight are answered once the process is reaped; if it cannot be reaped, never.
        """
        self.state = "closed"
        if self._timer is not None:
            self._timer.cancel()
        process = self._process
        if process is None:
            return
        self._gone = self._loop.create_future()
        self._send(wire.Close())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._gone), max(0.0, deadline_s))
        if process.reaped:
            return
        self._kill("closing")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._gone), 1.0)


def _spawn(region_fd: int) -> _Process:
    """Start a tier process that inherits the region and its end of a socket. Raises OSError and leaves nothing."""
    ours, theirs = socket.socketpair()
    try:
        ours.setblocking(False)
        argv = [sys.executable, "-m", "flexkv_core.tier_process", str(theirs.fileno()), str(region_fd)]
        popen = subprocess.Popen(
            [*argv, str(os.getpid())],
            pass_fds=(theirs.fileno(), region_fd),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return _Process(popen, os.pidfd_open(popen.pid), ours)
        except OSError:
            popen.kill()
            popen.wait()
            raise
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()


def _spelled(code: int) -> str:
    """An exit status for people: `subprocess` gives signals as negative numbers."""
    if code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
