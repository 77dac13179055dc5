"""Fetches: prefixes on their way into host memory, and their pins, from the call to the release.

Owns when a fetch is done, cancelled, expired or released. Does not own what it finds (`planner.py`) or how bytes come
(`scheduler.py`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from flexkv_core.errors import UnknownNamespaceError
from flexkv_core.handles import Fetch
from flexkv_core.index import Keys
from flexkv_core.planner import Planner
from flexkv_core.plans import HOST, Move
from flexkv_core.scheduler import Scheduler

logger = logging.getLogger("flexkv.fetch")


class Fetches:
    """Methods without a note are for the owner thread only.

    Args:
        lock: held around calls of the planner.
        pin_limit_s: a fetch that is not released this long after it began is released all the same.

    Attributes:
        expired: how many were.
    """

    def __init__(self, planner: Planner, scheduler: Scheduler, lock: threading.RLock, pin_limit_s: float) -> None:
        self._planner = planner
        self._scheduler = scheduler
        self._lock = lock
        self._pin_limit_s = pin_limit_s
        self._waiting: set[Fetch] = set()
        self._pinned: set[Fetch] = set()
        self.expired = 0
        scheduler.reading.on_read = self._refresh

    @property
    def waiting(self) -> int:
        """How many are not done. Any thread."""
        return len(self._waiting)

    @property
    def pinned(self) -> int:
        """How many are not released. Any thread."""
        return len(self._pinned)

    def start(
        self, root: bytes, keys: Keys, deadline_s: float, *, keep: bool, owner: int, avoid: Sequence[str] = ()
    ) -> Fetch:
        """Begin a fetch; `keep`: somebody waits for it and will release it; `owner`: see `Move`; `avoid`: tiers that
        are not to be read. Any thread."""
        fetch = Fetch(lambda fetch: self._scheduler.call(self.release, fetch, "released"), keep=keep)
        self._waiting.add(fetch)
        self._scheduler.call(self._begin, fetch, root, keys, deadline_s, owner, avoid)
        return fetch

    def _begin(
        self, fetch: Fetch, root: bytes, keys: Keys, deadline_s: float, owner: int, avoid: Sequence[str]
    ) -> None:
        avoided = [tier.number for tier in self._planner.tiers if tier.name in avoid]
        try:
            with self._lock:
                fetch.plan = self._planner.begin_fetch(root, keys, avoided)
                if fetch.plan.blocks < len(keys) and not fetch.plan.truncated:
                    self._scheduler.probing.want(root, keys, fetch.plan.blocks)  # for whoever comes next
        except Exception as error:
            known = isinstance(error, UnknownNamespaceError)
            logger.log(
                logging.WARNING if known else logging.ERROR, "a fetch finds nothing: %s", error, exc_info=not known
            )
            fetch.released, fetch.why = True, "reset" if known else "refused"
            self._waiting.discard(fetch)
            fetch.settle()
            return
        fetch.plan.counted = fetch.keep
        for move in fetch.plan.reads:
            move.owner = owner
        self._pinned.add(fetch)
        loop = self._scheduler.loop
        fetch.timers = [
            loop.call_later(deadline_s, self._finish, fetch),
            loop.call_later(max(deadline_s, self._pin_limit_s), self._expire, fetch),
        ]
        fetch.held = [
            ("" if number == HOST else self._planner.tiers[number].name, blocks) for number, blocks in fetch.plan.found
        ]
        self._update(fetch)
        if not fetch.done:
            if not fetch.ready:
                fetch.changed()  # who waits for it learns where its blocks are
            self._scheduler.reading.submit(fetch.plan, urgent=fetch.keep)

    def _refresh(self, move: Move) -> None:
        """A read has been settled: some fetches may have more in hand."""
        for fetch in list(self._waiting):
            if fetch.plan is not None and fetch.plan.root == move.root:
                self._update(fetch)

    def _update(self, fetch: Fetch) -> None:
        if fetch.done or fetch.plan is None:
            return
        before = fetch.ready
        with self._lock:
            fetch.ready = self._planner.ready(fetch.plan)
        if not fetch.plan.awaited.any():
            self._finish(fetch)
        elif fetch.ready != before:
            fetch.changed()

    def _finish(self, fetch: Fetch) -> None:
        """Complete, or its time is up."""
        if fetch.done or fetch.plan is None:
            return
        waited = bool(fetch.plan.awaited.any())
        with self._lock:
            served = self._planner.close_fetch(fetch.plan)
            fetch.ready = self._planner.ready(fetch.plan)
            writes = self._planner.sink_hits(fetch.plan)
        fetch.sources = {self._planner.tiers[number].name: blocks for number, blocks in served.items()}
        self._waiting.discard(fetch)
        fetch.timers[0].cancel()
        fetch.settle()
        self._scheduler.writing.submit(writes)
        if waited:  # else a tier that is slow or hangs would book host memory for reads that nobody wants any more
            self._scheduler.reading.withdraw()
        if not fetch.keep:
            self.release(fetch, "released")

    def _expire(self, fetch: Fetch) -> None:
        if fetch.released:
            return
        self.expired += 1
        logger.warning("a fetch of %d blocks was not released within %g s", fetch.ready, self._pin_limit_s)
        self.release(fetch, "expired")

    def cancel(self, fetch: Fetch) -> None:
        """End a fetch: what it waits for is not read, unless others wait for it too; its pins go."""
        self.release(fetch, "cancelled")

    def release(self, fetch: Fetch, why: str) -> None:
        """Take back its pins, when its last load has ended."""
        if not fetch.released:
            fetch.released, fetch.why = True, why
            fetch.changed()
        self.unpin(fetch)

    def unpin(self, fetch: Fetch) -> None:
        """Take back the pins of a fetch that was released, unless it is being loaded."""
        if fetch.plan is None or fetch.loads or not fetch.released:
            return
        self._finish(fetch)
        for timer in fetch.timers:
            timer.cancel()
        if fetch in self._pinned:
            self._pinned.discard(fetch)
            with self._lock:
                self._planner.release(fetch.plan)

    def reset(self, root: bytes) -> None:
        """A namespace was reset: nothing of it may be loaded any more, and nobody waits for it."""
        for fetch in [fetch for fetch in self._pinned if fetch.plan is not None and fetch.plan.root == root]:
            self._finish(fetch)
            self.release(fetch, "reset")

    def settle_all(self) -> None:
        """The manager is closed: nobody shall wait for what will not come. Any thread."""
        for fetch in list(self._waiting):
            fetch.settle()
        self._waiting.clear()
