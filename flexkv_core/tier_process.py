"""The tier process: one backend, run for the core at the other end of a socket.

Started by `tier_link.py` as ``python -m flexkv_core.tier_process SOCKET_FD REGION_FD PARENT_PID``. Maps the host
region, opens the backend, runs calls on as many threads as the backend allows (or submits them), and dies with its
parent. Its stdout is its stderr: what a backend prints does not get into an engine's output.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import logging
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_core.framing import Reader, WireError
from flexkv_core.tier_wire import (
    MAX_MESSAGE_BYTES,
    Call,
    Close,
    Done,
    Failed,
    Log,
    Piece,
    Ready,
    Start,
    ToCore,
    ToTier,
    batch_of,
    frame,
    parse_to_tier,
    pieces_of,
)
from flexkv_core.tier_worker import TierWorker

PR_SET_PDEATHSIG = 1
RECEIVE_BYTES = 1 << 18


class _Channel(logging.Handler):
    """The socket: messages in, messages and log records out."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._socket = connection
        self._sending = threading.Lock()
        self._reader = Reader(MAX_MESSAGE_BYTES)

    def send(self, message: ToCore) -> None:
        data = frame(message)
        with self._sending:
            self._socket.sendall(data)

    def messages(self) -> Iterator[ToTier]:
        """What the core sends, until it is gone."""
        while data := self._socket.recv(RECEIVE_BYTES):
            for body in self._reader.feed(data):
                yield parse_to_tier(body)

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, WireError):
            self.send(Log(record.levelno, self.format(record)[:8192]))


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _open(start: Start, region_fd: int, logger: logging.Logger) -> TierWorker:
    host = memoryview(mmap.mmap(region_fd, start.region_bytes, mmap.MAP_SHARED))
    os.close(region_fd)
    return TierWorker(
        start.backend,
        start.config,
        start.faults,
        host=host,
        slot_bytes=start.slot_bytes,
        capacity=start.capacity,
        state_directory=Path(start.state_directory) if start.state_directory else None,
        logger=logger,
    )


def _serve(worker: TierWorker, channel: _Channel, messages: Iterator[ToTier]) -> None:
    """Run calls until the core says close or is gone."""

    def run(call: Call) -> None:
        if call.operation in ("list", "recover"):
            _enumerate(worker, channel, call)
            return
        batch = batch_of(call)
        if call.operation == "probe":
            answer = np.array([worker.probe(batch)], np.int32).tobytes()
        else:
            answer = worker.run(call.operation, batch).tobytes()
        for _ in range(worker.answers()):
            channel.send(Done(call.number, answer))

    def submit(call: Call) -> None:
        def answer(statuses: npt.NDArray[np.uint8], first: bool) -> None:  # the core counts an answer too many
            with contextlib.suppress(OSError):  # it is gone, and so is this process soon
                channel.send(Done(call.number, statuses.tobytes()))

        worker.submit("read" if call.operation == "read" else "write", batch_of(call), answer)

    pool = concurrent.futures.ThreadPoolExecutor(worker.capabilities.concurrency, "flexkv-backend")
    for message in messages:
        if isinstance(message, Close):
            break
        if isinstance(message, Call):
            if worker.submits(message.operation):
                submit(message)
            else:
                pool.submit(run, message)
    worker.close()


def _enumerate(worker: TierWorker, channel: _Channel, call: Call) -> None:
    """Answer a listing or a recovery, piece by piece."""
    complete = False
    try:
        for part in worker.listing() if call.operation == "list" else worker.recovered():
            for piece in pieces_of(call.number, part):
                channel.send(piece)
        complete = True
    except Exception:
        logging.getLogger("flexkv.tier").exception("%s failed", call.operation)
    channel.send(Piece(call.number, b"", b"", b"", last=True, complete=complete))


def main(socket_fd: int, region_fd: int, parent: int) -> None:
    """Serve until told to close; never returns."""
    _die_with_parent(parent)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = _Channel(socket.socket(fileno=socket_fd))
    try:
        messages = channel.messages()
        start = next(messages, None)
        if not isinstance(start, Start):
            os._exit(1)
        sys.path[:] = start.path
        logger = logging.getLogger("flexkv.tier")
        logger.setLevel(start.log_level)
        logger.addHandler(channel)
        logger.propagate = False
        try:
            worker = _open(start, region_fd, logger)
        except BaseException as error:  # the backend is a stranger's: whatever it raises is its failure
            channel.send(Failed(f"{type(error).__name__}: {error}"))
            os._exit(1)
        found = worker.capabilities
        channel.send(
            Ready(
                found.addressing,
                found.persistent,
                found.shared,
                found.alignment,
                found.concurrency,
                found.max_batch_blocks,
                worker.powers,
            )
        )
        _serve(worker, channel, messages)
    except (OSError, WireError):
        os._exit(1)
    # Threads may still be in the backend: they end with the process.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
