"""A backend in its own process, with calls that wait: what the suite drives backends through.

Owns the loop that links live on, and turns every death and every missed deadline into `DiedError`. The link and the
process are the core's own (`tier_link`, `tier_process`). Knows no duties.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flexkv_core.backend import Batch, Capabilities, Listing
from flexkv_core.region import HostRegion
from flexkv_core.tier_link import LinkSettings, Operation, Statuses, TierLink

T = TypeVar("T")
NEVER_S = 1e6
GRACE_S = 10.0
"""How much longer than a link's own deadline its caller waits: for the kill and the reaping."""


class DiedError(Exception):
    """The process ended, or was killed because a call missed its deadline; the text says which."""


class RefusedError(Exception):
    """The backend could not be opened; the text is its error."""


class Owner:
    """An event loop on a thread of its own, and the log records of the tiers on it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="conformance", daemon=True)
        self._thread.start()
        self.records: deque[str] = deque(maxlen=400)
        self._handler = _Records(self.records)
        logging.getLogger("flexkv.tier").addHandler(self._handler)

    def on_loop(self, act: Callable[[], T]) -> T:
        async def run() -> T:
            return act()

        return self.wait(run(), GRACE_S)

    def wait(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def close(self) -> None:
        logging.getLogger("flexkv.tier").removeHandler(self._handler)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(GRACE_S)
        self.loop.close()


class _Records(logging.Handler):
    def __init__(self, records: deque[str]) -> None:
        super().__init__()
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record.getMessage())


class Tier:
    """One life of a backend in a process of its own. Methods may be called from several threads."""

    def __init__(self, owner: Owner, settings: LinkSettings, region: HostRegion) -> None:
        """Start the process and wait until the backend is open. Raises RefusedError if it cannot be."""
        self.settings = settings
        self._owner = owner
        settled = threading.Event()
        self._link: TierLink = owner.on_loop(
            lambda: TierLink(settings, owner.loop, region.fd, region.size, lambda _: settled.set())
        )
        owner.on_loop(self._link.start)
        self.pid: int = self._link.pid or 0
        self._popen = self._link._process.popen if self._link._process else None
        if not settled.wait(settings.open_deadline_s + GRACE_S) or self._link.state != "ready":
            reason = self._link.last_error or "its process did not say that it is ready"
            self.kill()
            raise RefusedError(reason)

    @property
    def capabilities(self) -> Capabilities:
        found = self._link.capabilities
        if found is None:
            raise DiedError("it is not open")
        return found

    @property
    def powers(self) -> frozenset[str]:
        return self._link.powers

    @property
    def unexpected_answers(self) -> int:
        """Answers to calls that had been answered."""
        return self._link.unexpected_answers

    @property
    def alive(self) -> bool:
        return self._link.state == "ready"

    @property
    def last_error(self) -> str | None:
        return self._link.last_error

    def begin(self, operation: Operation, batch: Batch) -> concurrent.futures.Future[Statuses]:
        """Start a call; the future gets its statuses, all FAILED if the process dies."""
        answer: concurrent.futures.Future[Statuses] = concurrent.futures.Future()
        self._owner.loop.call_soon_threadsafe(self._link.submit, operation, batch, answer.set_result)
        return answer

    def call(self, operation: Operation, batch: Batch) -> Statuses:
        """One call. Raises DiedError if the process is gone afterwards."""
        return self._settled(self.begin(operation, batch))

    def probe(self, batch: Batch) -> int:
        """How many leading blocks it says that it holds; 0 if it raised."""
        answer: concurrent.futures.Future[int | None] = concurrent.futures.Future()
        self._owner.loop.call_soon_threadsafe(self._link.probe, batch, answer.set_result)
        return self._settled(answer) or 0

    def listing(self) -> Listing:
        """All pieces as one. Raises ListingFailedError if the backend raised."""
        pieces: list[Listing] = []
        answer: concurrent.futures.Future[bool] = concurrent.futures.Future()
        self._owner.loop.call_soon_threadsafe(self._link.list, pieces.append, answer.set_result)
        if not self._settled(answer, self.settings.open_deadline_s):
            raise ListingFailedError
        empty = Listing(np.zeros((0, 32), np.uint8), np.zeros(0, np.uint8), np.zeros(0, np.int64))
        pieces = [empty, *pieces]
        return Listing(
            np.concatenate([piece.keys for piece in pieces]),
            np.concatenate([piece.groups for piece in pieces]),
            np.concatenate([piece.lengths for piece in pieces]),
        )

    def _settled(self, answer: concurrent.futures.Future[T], deadline_s: float | None = None) -> T:
        result = answer.result((deadline_s or self.settings.deadline_s) + GRACE_S)
        if not self.alive:
            raise DiedError(self._link.last_error or "its process ended")
        return result

    def close(self, deadline_s: float) -> int:
        """Close in order. Returns the exit status of the process, -9 if it had to be killed at the deadline."""
        self._owner.wait(self._link.close(deadline_s), deadline_s + GRACE_S)
        return self._exit_status()

    def kill(self) -> None:
        """kill -9; returns when the process has been reaped."""
        with contextlib.suppress(ProcessLookupError):
            if self._link.pid is not None:
                os.kill(self._link.pid, signal.SIGKILL)
        self._owner.wait(self._link.close(0.0), GRACE_S)

    def _exit_status(self) -> int:
        if self._popen is None:
            return -1
        return self._popen.returncode if self._popen.returncode is not None else -signal.SIGKILL

    def settle(self, answers: list[concurrent.futures.Future[Statuses]]) -> list[Statuses]:
        """What came of calls, also of those that died with the process."""
        return [answer.result(self.settings.deadline_s + GRACE_S) for answer in answers]


class ListingFailedError(Exception):
    """The backend raised while it listed."""


def within(deadline_s: float, act: Callable[[], T]) -> T:
    """Run `act` on a daemon thread. Raises DiedError if it takes longer; what it raises is raised."""
    box: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            box.append(act())
        except BaseException as error:  # the backend is a stranger's
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if errors:
        raise errors[0]
    if not box:
        raise DiedError(f"it was not done within {deadline_s:g} s")
    return box[0]


def descriptors(pid: int) -> list[str]:
    """What the open file descriptors of a process lead to."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(entry))
    return found


def threads(pid: int) -> int:
    """How many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def session_members(pid: int) -> list[int]:
    """Processes of the session that `pid` leads, itself and zombies left out."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == pid:
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == pid and state != "Z":
                members.append(int(entry.name))
    return members


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    with contextlib.suppress(OSError):
        return set(os.listdir("/dev/shm"))
    return set()
