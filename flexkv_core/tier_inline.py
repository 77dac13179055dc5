"""A lower tier in the core's own process (`isolation: none`), for debugging and tests.

The same interface as `tier_link.TierLink`, without its protection: a crash of the backend is the core's, and a hang
cannot be ended. A call that exceeds its deadline is answered only when it returns (its thread may still write into
host memory), and the tier stays away from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from flexkv_core.backend import Batch, Capabilities, Listing, Recovered, Status, SubmitOperation
from flexkv_core.tier_link import LinkSettings, Operation, State, Statuses
from flexkv_core.tier_worker import PROBE_FAILED, TierWorker

logger = logging.getLogger("flexkv.tier")


class InlineLink:
    """See the module's docstring."""

    pid = None
    restarts = 0

    def __init__(
        self,
        settings: LinkSettings,
        loop: asyncio.AbstractEventLoop,
        host: memoryview,
        on_state: Callable[[Any], None],
    ) -> None:
        self.settings = settings
        self.state: State = "starting"
        self.capabilities: Capabilities | None = None
        self.powers: frozenset[str] = frozenset()
        self.last_error: str | None = None
        self.unexpected_answers = 0
        self._loop = loop
        self._host = host
        self._on_state = on_state
        self._worker: TierWorker | None = None
        self._changing = threading.Lock()  # whoever comes second, the end of opening or `close`, closes the backend

    def start(self) -> None:
        """Open the backend on a thread of its own."""

        def open_backend() -> TierWorker:
            settings = self.settings
            worker = TierWorker(
                settings.backend,
                settings.config,
                settings.faults,
                host=self._host,
                slot_bytes=settings.slot_bytes,
                capacity=settings.capacity,
                state_directory=settings.state_directory,
                logger=logger.getChild(settings.name),
            )
            with self._changing:
                closed = self.state == "closed"
                self._worker = None if closed else worker
            if closed:
                worker.close()
            return worker

        self._run(open_backend, self._opened, self.settings.open_deadline_s, "its backend took too long to open")

    def _opened(self, worker: TierWorker | None, error: BaseException | None) -> None:
        if worker is None:
            self._away(f"its backend could not be opened: {error}")
            return
        self.capabilities, self.powers = worker.capabilities, frozenset(worker.powers)
        if self.state == "starting":
            self.state = "ready"
            self._on_state(self)

    def submit(self, operation: Operation, batch: Batch, on_done: Callable[[Statuses], None]) -> None:
        """As `TierLink.submit`."""
        worker = self._worker
        failed = np.full(len(batch), Status.FAILED, np.uint8)
        if worker is None or self.state != "ready" or (operation == "delete" and "delete" not in self.powers):
            self._loop.call_soon(on_done, failed)
            return
        if operation != "delete" and worker.submits(operation):
            self._submit(worker, operation, batch, on_done)
            return
        self._run(
            lambda: worker.run(operation, batch),
            lambda statuses, error: on_done(failed if statuses is None else statuses),
            self.settings.deadline_s,
            f"a {operation} was not answered in time",
        )

    def _submit(
        self, worker: TierWorker, operation: SubmitOperation, batch: Batch, on_done: Callable[[Statuses], None]
    ) -> None:
        timer = self._loop.call_later(self.settings.deadline_s, self._away, f"a {operation} was not answered in time")

        def settle(statuses: Statuses, first: bool) -> None:
            timer.cancel()
            if first:
                on_done(statuses)
            else:
                self.unexpected_answers += 1

        def answer(statuses: Statuses, first: bool) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(settle, statuses, first)

        worker.submit(operation, batch, answer)

    def probe(self, batch: Batch, on_done: Callable[[int | None], None]) -> None:
        """As `TierLink.probe`."""
        worker = self._worker
        if worker is None or self.state != "ready":
            self._loop.call_soon(on_done, None)
            return
        self._run(
            lambda: worker.probe(batch),
            lambda count, error: on_done(None if count == PROBE_FAILED else count),
            self.settings.deadline_s,
            "a probe was not answered in time",
        )

    def list(self, on_piece: Callable[[Listing], None], on_end: Callable[[bool], None]) -> None:
        """As `TierLink.list`."""
        self._enumerate(lambda worker: worker.listing(), on_piece, on_end, "a list")

    def recover(self, on_piece: Callable[[Recovered], None], on_end: Callable[[bool], None]) -> None:
        """As `TierLink.recover`."""
        self._enumerate(lambda worker: worker.recovered(), on_piece, on_end, "a recovery")

    def _enumerate(
        self,
        of: Callable[[TierWorker], Iterable[Any]],
        on_piece: Callable[[Any], None],
        on_end: Callable[[bool], None],
        what: str,
    ) -> None:
        worker = self._worker
        if worker is None or self.state != "ready":
            self._loop.call_soon(on_end, False)
            return

        def finished(pieces: list[Any] | None, error: BaseException | None) -> None:
            for piece in pieces or []:
                on_piece(piece)
            on_end(error is None)

        self._run(lambda: list(of(worker)), finished, self.settings.open_deadline_s, f"{what} was not answered in time")

    async def close(self, deadline_s: float) -> None:
        """Close the backend; returns at the deadline if it does not return before."""
        with self._changing:
            self.state = "closed"
            worker, self._worker = self._worker, None
        self._host = memoryview(b"")  # the region is unmapped when nobody shows it any more
        if worker is None:
            return
        closed = asyncio.Event()

        def close() -> None:
            worker.close()
            worker.give_up()

        self._run(close, lambda _, error: closed.set(), deadline_s, "")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(closed.wait(), deadline_s)

    def _away(self, reason: str) -> None:
        if self.state != "closed":
            self.state, self.last_error = "backoff", reason
            self._on_state(self)

    def _run(
        self,
        work: Callable[[], Any],
        done: Callable[[Any, BaseException | None], None],
        deadline_s: float,
        late: str,
    ) -> None:
        """Run `work` on a daemon thread, then `done` on the loop, unless the deadline has passed."""
        timer = self._loop.call_later(deadline_s, self._away, late)

        def settle(result: Any, error: BaseException | None) -> None:
            timer.cancel()
            done(result, error)

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as caught:  # the backend is a stranger's: whatever it raises is its failure
                error = caught
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(settle, result, error)

        threading.Thread(target=run, name=f"flexkv-{self.settings.name}", daemon=True).start()
