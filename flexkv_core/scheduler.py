"""The transfer scheduler: carries out the planner's plans, on one owner thread that runs an event loop.

Owns the loop, the links of the lower tiers, the threads that copy, seal and verify, and when a tier gets its next
call: whenever it has room for one. Every call of the planner happens under `lock`, because lookups take it in their
callers' threads. It decides nothing about what is where (`planner.py`) and offers nothing to engines (`manager.py`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable
from typing import Any

from flexkv_core.backend import Listing, Recovered
from flexkv_core.breaker import BreakerConfig
from flexkv_core.errors import ManagerClosedError
from flexkv_core.index import Keys
from flexkv_core.planner import Planner
from flexkv_core.plans import Probe
from flexkv_core.probing import Probing
from flexkv_core.reading import Reading
from flexkv_core.region import HostRegion
from flexkv_core.tier_health import TierHealth
from flexkv_core.tier_queue import Link, TierQueue
from flexkv_core.writing import Writing

logger = logging.getLogger("flexkv.scheduler")

COPY_THREADS = 2


class Scheduler:
    """See the module's docstring. Methods without a note are for the owner thread only.

    Attributes:
        writing, reading: the moves between host memory and the lower tiers. probing: what asks them what they hold.
    """

    def __init__(
        self,
        planner: Planner,
        lock: threading.RLock,
        region: HostRegion,
        *,
        verify: bool,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """`loop`: runs already, in a thread that is the owner from now on and does not end here; default: one of our
        own."""
        self._planner = planner
        self._lock = lock
        self._queues: dict[int, TierQueue] = {}
        self._copiers = concurrent.futures.ThreadPoolExecutor(COPY_THREADS, "flexkv-copy")
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._jobs = 0
        self.writing = Writing(planner.down, self._queues, lock, self._progress)
        self.probing = Probing(planner, self._queues, lock, self.call, self._progress)
        self.reading = Reading(
            planner,
            self._queues,
            self.writing,
            self.probing,
            lock,
            region,
            verify=verify,
            run_copy=self.run_copy,
            progress=self._progress,
        )
        self.loop = loop or asyncio.new_event_loop()
        own = threading.Thread(target=self._run, name="flexkv-owner", daemon=True)
        self._thread = own if loop is None else None

    # ---------------------------------------------------------------- life (any thread)

    def start(self) -> None:
        """Start the owner thread, unless another runs the loop."""
        if self._thread is not None:
            self._thread.start()

    def call(self, act: Callable[..., Any], *args: Any) -> None:
        """Have the owner thread call `act`; after `close` nothing happens. Any thread."""
        try:
            self.loop.call_soon_threadsafe(act, *args)
        except RuntimeError:  # raised by a loop that is closed
            if not self.loop.is_closed():
                raise

    def ask(self, act: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> Any:
        """Have the owner thread call `act` and return its result or raise its exception. Any other thread."""
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            try:
                answer.set_result(act(*args))
            except BaseException as error:
                answer.set_exception(error)

        self.call(run)
        return answer.result(timeout_s)

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or under way in any tier that is up. Any other thread."""
        waiting = asyncio.run_coroutine_threadsafe(self._idle(), self.loop)
        try:
            waiting.result(timeout_s)
        except concurrent.futures.TimeoutError:
            waiting.cancel()
            return False
        return True

    def close(self, deadline_s: float) -> bool:
        """Stop tiers and threads. Returns False if a tier or a copy could not be stopped in time."""

        async def stop() -> bool:
            links = [queue.link for queue in self._queues.values()]
            for queue in self._queues.values():
                self._abandon(queue)
            end = self.loop.time() + deadline_s
            await asyncio.gather(*(link.close(deadline_s) for link in links), return_exceptions=True)
            while self._jobs and self.loop.time() < end:
                await asyncio.sleep(0.002)
            return not self._jobs and all(queue.in_flight == 0 for queue in self._queues.values())

        try:
            clean = asyncio.run_coroutine_threadsafe(stop(), self.loop).result(deadline_s + 1.0)
        except concurrent.futures.TimeoutError:
            clean = False
        self._copiers.shutdown(wait=clean, cancel_futures=True)
        if self._thread is not None:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(1.0)
            if not self._thread.is_alive():
                self.loop.close()
        return bool(clean)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    # ---------------------------------------------------------------- tiers

    def add_tier(
        self,
        number: int,
        link: Link,
        write_limit: int,
        most_in_flight: int,
        breaker: BreakerConfig,
        probe_ttl_s: float,
    ) -> None:
        """Take over a lower tier's link and start it; limits in bytes, see `TierQueue`, `Probing.add_tier`."""
        slow_s = breaker.slow_s or link.settings.deadline_s / 2
        book = self._planner.tiers[number]
        health = TierHealth(book, link, breaker, slow_s, self.loop.call_later, self._lock)
        self.probing.add_tier(number, probe_ttl_s)
        self._queues[number] = TierQueue(number, link, health, write_limit, most_in_flight)
        link.start()

    def queues(self) -> dict[int, TierQueue]:
        """The lower tiers' queues by number; for figures only."""
        return self._queues

    def may_know_more(self, root: bytes, keys: Keys, known: int) -> bool:
        """Whether more than the `known` blocks of a path may be known soon: a tier is starting, or is asked now.

        Any thread, under the lock.
        """
        starting = any(queue.link.state == "starting" for queue in self._queues.values())
        return self.probing.want(root, keys, known) or starting

    def on_link_state(self, number: int, link: Link) -> None:
        """A link came up or went away (called by the link)."""
        queue = self._queues.get(number)
        if queue is None:
            return
        queue.health.link_changed()
        if link.state == "ready":
            self._list(queue)
            self._recover(queue)
            self._progress(queue)
        elif link.state == "backoff":
            logger.warning("tier %s is away: %s", self._planner.tiers[number].name, link.last_error)
            self._abandon(queue)
            if link.capabilities is not None and not link.capabilities.persistent:
                with self._lock:
                    self._planner.lose_tier(number)
        self._wake_idle()

    def _list(self, queue: TierQueue) -> None:
        queue.listed = False
        presence = self._planner.tiers[queue.number].presence
        if "list" not in queue.link.powers or presence is None:
            return
        holds_up = presence.capacity_bytes is not None
        queue.listings += holds_up

        def ended(complete: bool) -> None:
            queue.listings -= holds_up
            queue.listed = complete
            self._progress(queue)

        def piece(listing: Listing) -> None:
            with self._lock:
                excess = self._planner.down.add_listing(queue.number, listing.keys, listing.groups, listing.lengths)
            if excess is not None:
                self.writing.delete(queue, excess)

        with self._lock:
            self._planner.down.begin_listing(queue.number)
        queue.link.list(piece, ended)

    def _recover(self, queue: TierQueue) -> None:
        """Ask a slot-addressed tier, once, for what it holds; its slots cannot be given out before."""
        if "recover" not in queue.link.powers or self._planner.tiers[queue.number].pool is None or queue.recovered:
            return

        def piece(found: Recovered) -> None:
            with self._lock:
                self._planner.recovery.add(queue.number, found)

        def end(complete: bool) -> None:
            queue.recovering = False
            queue.recovered = complete
            self._progress(queue)

        queue.recovering = True
        queue.link.recover(piece, end)

    def _abandon(self, queue: TierQueue) -> None:
        """Give up all that is queued and not started."""
        self.writing.abandon(queue)
        self.reading.abandon(queue)
        self.probing.abandon(queue)

    # ---------------------------------------------------------------- traffic

    def run_copy(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """Run `work` on a copy thread, then `done(result, error)` on the owner thread."""
        self._jobs += 1

        def finish(result: Any, error: BaseException | None) -> None:
            self._jobs -= 1
            done(result, error)
            self._wake_idle()

        def run() -> None:
            try:
                result, error = work(), None
            except BaseException as caught:
                result, error = None, caught
            self.call(finish, result, error)

        try:
            self._copiers.submit(run)
        except RuntimeError:  # raised after `close`, which waits no longer
            self.loop.call_soon(finish, None, ManagerClosedError("the manager was closed"))

    def job(self, done: Callable[[BaseException | None], None]) -> Callable[[BaseException | None], None]:
        """Count a copy that runs in another process as under way until the returned function is called."""
        self._jobs += 1

        def finish(error: BaseException | None) -> None:
            self._jobs -= 1
            done(error)
            self._wake_idle()

        return finish

    def _progress(self, queue: TierQueue) -> None:
        """Start as many calls as the tier takes; tell whoever waits for idleness."""
        while (taken := queue.take()) is not None:
            if isinstance(taken, Probe):
                self.probing.start(queue, taken)
            elif taken[0] == "write":
                self.writing.start(queue, taken[1])
            else:
                self.reading.start(queue, taken[1])
        self._wake_idle()

    # ---------------------------------------------------------------- idleness

    def _busy(self) -> bool:
        return self._jobs > 0 or any(not queue.idle for queue in self._queues.values())

    async def _idle(self) -> None:
        while self._busy():
            waiter: asyncio.Future[None] = self.loop.create_future()
            self._idle_waiters.append(waiter)
            await waiter

    def _wake_idle(self) -> None:
        if self._idle_waiters and not self._busy():
            for waiter in self._idle_waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle_waiters.clear()
