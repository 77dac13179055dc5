"""The transfer scheduler: carries out the planner's plans, on one owner thread that runs an event loop.

Owns the loop, the queues of each lower tier, their links, and the threads that copy, seal and verify. Every call
of the planner happens under `lock`, because lookups take it in their callers' threads. It decides nothing about
what is where (`planner.py`) and offers nothing to engines (`manager.py`).

Reads pass queued writes. A tier's write queue is bounded in bytes: what does not fit is dropped with its
descendants, because a block without its ancestors would never be found. While a tier is away its queue is dropped
too, so that a dead tier holds no host memory.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core.backend import PAGE, Batch, Listing, Recovered, Status
from flexkv_core.breaker import BreakerConfig
from flexkv_core.errors import ManagerClosedError
from flexkv_core.planner import Planner
from flexkv_core.plans import Deletion, FetchPlan, Move, Outcome
from flexkv_core.region import HostRegion
from flexkv_core.seal import SealFault, verify_blocks
from flexkv_core.tier_health import TierHealth
from flexkv_core.tier_inline import InlineLink
from flexkv_core.tier_link import TierLink

logger = logging.getLogger("flexkv.scheduler")

DEFAULT_BATCH_BLOCKS = 128
COPY_THREADS = 2

Link = TierLink | InlineLink


@dataclass(slots=True)
class TierQueue:
    """One lower tier's traffic.

    Attributes:
        health: whether it may be called, from how it has answered.
        reads, prefetches, writes: moves not yet started; in this order they are.
        write_limit: bytes that may be queued or being written: all of it is pinned in host memory.
        queued_bytes: how many are.
        in_flight: calls that the tier has not answered; in_flight_bytes: what they move.
        most_in_flight: bytes that calls under way may move; only a single block may exceed it.
        recovering: the tier is saying what survived a restart; nothing else is asked of it. recovered: it has.
        settling: reads that came back and are being verified.
        listings: under way, of a tier whose capacity we keep: writes wait until it is known what it holds.
    """

    number: int
    link: Link
    health: TierHealth
    write_limit: int
    most_in_flight: int
    reads: deque[Move] = field(default_factory=deque)
    prefetches: deque[Move] = field(default_factory=deque)
    writes: deque[Move] = field(default_factory=deque)
    queued_bytes: int = 0
    in_flight: int = 0
    in_flight_bytes: int = 0
    recovering: bool = False
    recovered: bool = False
    settling: int = 0
    listings: int = 0

    @property
    def idle(self) -> bool:
        return not (self.reads or self.prefetches or self.writes or self.in_flight or self.settling)

    @property
    def queued_blocks(self) -> int:
        return sum(len(move) for move in self.writes)


FORWARD, DEEPEST_FIRST = slice(None), slice(None, None, -1)
"""Order of blocks within a batch. Writes go deepest first, so that a medium that remembers only when a block was
written makes leaves older than their ancestors after a restart."""


def _batch(move: Move, order: slice) -> Batch:
    slots = None if move.tier_slots is None else move.tier_slots[order]
    offsets = move.host_slots[order] * PAGE
    return Batch(move.block_keys[order], move.groups[order], offsets, move.slot_bytes[order], slots)


def _deletion_batch(deletion: Deletion, chosen: slice) -> Batch:
    lengths = deletion.lengths[chosen]
    return Batch(deletion.keys[chosen], deletion.groups[chosen], np.zeros_like(lengths), lengths)


class Scheduler:
    """See the module's docstring. Methods without a note are for the owner thread only."""

    def __init__(self, planner: Planner, lock: threading.RLock, region: HostRegion, *, verify: bool) -> None:
        self._planner = planner
        self._lock = lock
        self._region = region
        self._verify = verify
        self._queues: dict[int, TierQueue] = {}
        self._copiers = concurrent.futures.ThreadPoolExecutor(COPY_THREADS, "flexkv-copy")
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._jobs = 0
        self.on_read: Callable[[Move], None] = lambda move: None
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="flexkv-owner", daemon=True)

    # ---------------------------------------------------------------- life (any thread)

    def start(self) -> None:
        """Start the owner thread."""
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
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self.loop.close()
        return bool(clean)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    # ---------------------------------------------------------------- tiers

    def add_tier(self, number: int, link: Link, write_limit: int, most_in_flight: int, breaker: BreakerConfig) -> None:
        """Take over a lower tier's link and start it; limits in bytes, see `TierQueue`."""
        slow_s = breaker.slow_s or link.settings.deadline_s / 2
        book = self._planner.tiers[number]
        health = TierHealth(book, link, breaker, slow_s, self.loop.call_later, self._lock)
        self._queues[number] = TierQueue(number, link, health, write_limit, most_in_flight)
        link.start()

    def queues(self) -> dict[int, TierQueue]:
        """The lower tiers' queues by number; for figures only."""
        return self._queues

    def on_link_state(self, number: int, link: Link) -> None:
        """A link came up or went away (called by the link)."""
        queue = self._queues.get(number)
        if queue is None:
            return
        queue.health.link_changed()
        if link.state == "ready":
            self._list(queue)
            self._recover(queue)
            self._pump(queue)
        elif link.state == "backoff":
            logger.warning("tier %s is away: %s", self._planner.tiers[number].name, link.last_error)
            self._abandon(queue)
            if link.capabilities is not None and not link.capabilities.persistent:
                with self._lock:
                    self._planner.lose_tier(number)
        self._wake_idle()

    def _list(self, queue: TierQueue) -> None:
        presence = self._planner.tiers[queue.number].presence
        if "list" not in queue.link.powers or presence is None:
            return
        holds_up = presence.capacity_bytes is not None
        queue.listings += holds_up

        def ended(complete: bool) -> None:
            queue.listings -= holds_up
            self._pump(queue)
            self._wake_idle()

        def piece(listing: Listing) -> None:
            with self._lock:
                excess = self._planner.down.add_listing(queue.number, listing.keys, listing.groups, listing.lengths)
            if excess is not None:
                self._delete(queue, excess, lambda ok: None)

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
            self._pump(queue)
            self._wake_idle()

        queue.recovering = True
        queue.link.recover(piece, end)

    def _abandon(self, queue: TierQueue) -> None:
        """Give up all that is queued and not started."""
        with self._lock:
            while queue.writes:
                move = queue.writes.popleft()
                queue.queued_bytes -= move.nbytes
                self._planner.down.drop_write(move)
        while queue.reads or queue.prefetches:
            move = (queue.reads or queue.prefetches).popleft()
            self._settle(queue, move, np.full(len(move), Outcome.FAILED, np.uint8))

    # ---------------------------------------------------------------- traffic

    def submit_reads(self, fetch: FetchPlan, *, urgent: bool) -> None:
        """Start the reads that a fetch has planned. Urgent: somebody waits. Then they pass prefetches, and so do
        prefetches of what it waits for too."""
        for move in fetch.reads:
            queue = self._queues[move.tier]
            (queue.reads if urgent else queue.prefetches).append(move)
            self._pump(queue)
        if urgent and fetch.awaited.any():
            for queue in self._queues.values():
                waiting, queue.prefetches = queue.prefetches, deque()
                for move in waiting:
                    wanted = move.root == fetch.root and self._planner.awaits(fetch, move).any()
                    (queue.reads if wanted else queue.prefetches).append(move)

    def withdraw_reads(self) -> None:
        """Drop the reads that have not been started and that no fetch waits for any more."""
        for queue in self._queues.values():
            with self._lock:
                queue.reads = self._wanted(queue.reads)
                queue.prefetches = self._wanted(queue.prefetches)
        self._wake_idle()

    def _wanted(self, line: deque[Move]) -> deque[Move]:
        kept: deque[Move] = deque()
        for move in line:
            unwanted = self._planner.unwanted(move)
            if unwanted.any():
                self._planner.drop_read(move.part(unwanted))
            if not unwanted.all():
                kept.append(move.part(~unwanted))
        return kept

    def submit_writes(self, writes: list[Move]) -> None:
        """Queue the writes of one path; what a full queue or an absent tier cannot take is dropped, with what continues
        it in the groups after it."""
        cut: dict[int, int] = {}  # tier -> the first position that was dropped
        for move in writes:
            queue = self._queues[move.tier]
            if move.tier in cut and (beyond := move.positions > cut[move.tier]).any():
                with self._lock:
                    self._planner.down.drop_write(move.part(beyond))
                move = move.part(~beyond)  # noqa: PLW2901
                if not len(move):
                    continue
            if queue.link.state not in ("ready", "starting") or not queue.health.takes("write"):
                queue.health.rejected_blocks += len(move)
                with self._lock:
                    self._planner.down.drop_write(move)
                continue
            room = queue.write_limit - queue.queued_bytes
            if move.nbytes > room:
                fits = np.cumsum(move.slot_bytes) <= room
                dropped = move.part(~fits)
                cut[move.tier] = int(dropped.positions[0])
                with self._lock:
                    self._planner.down.drop_write(dropped)
                move = move.part(fits)  # noqa: PLW2901
            if len(move):
                queue.writes.append(move)
                queue.queued_bytes += move.nbytes
                self._pump(queue)

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

    def _pump(self, queue: TierQueue) -> None:
        """Start as many calls as the tier takes: reads first, then prefetches, then writes."""
        if queue.recovering:
            return
        capabilities = queue.link.capabilities
        concurrency = capabilities.concurrency if capabilities else 1
        size = capabilities.max_batch_blocks if capabilities else DEFAULT_BATCH_BLOCKS
        while queue.in_flight < concurrency:
            line = queue.reads or queue.prefetches
            if not line and queue.link.state == "ready" and not queue.listings:
                line = queue.writes
            room = queue.most_in_flight - queue.in_flight_bytes
            if not line or (queue.in_flight and line[0].slot_bytes[0] > room):
                return
            move = self._take(line, size, room)
            (self._start_write if line is queue.writes else self._start_read)(queue, move)

    @staticmethod
    def _take(line: deque[Move], size: int, room: int) -> Move:
        """Take from the head of a queue at most `size` blocks and `room` bytes, but one block at least."""
        move = line.popleft()
        if move.nbytes > room:
            size = min(size, max(1, int(np.searchsorted(np.cumsum(move.slot_bytes), room, side="right"))))
        if len(move) > size:
            line.appendleft(move.part(slice(size, None)))
            move = move.part(slice(0, size))
        return move

    def _start_read(self, queue: TierQueue, move: Move) -> None:
        call = queue.health.begin("read", len(move))
        if call is None:
            self._settle(queue, move, np.full(len(move), Outcome.FAILED, np.uint8))
            return
        queue.in_flight += 1
        queue.in_flight_bytes += move.nbytes

        def done(statuses: npt.NDArray[np.uint8]) -> None:
            call.answered()
            queue.in_flight -= 1
            queue.in_flight_bytes -= move.nbytes
            queue.settling += 1
            if self._verify and (statuses == Status.OK).any():
                self.run_copy(lambda: self._verified(move, statuses), settle)
            else:
                settle(statuses.astype(np.uint8), None)
            self._pump(queue)

        def settle(outcome: npt.NDArray[np.uint8] | None, error: BaseException | None) -> None:
            queue.settling -= 1
            if outcome is None:
                if not isinstance(error, ManagerClosedError):
                    logger.error("verifying blocks failed", exc_info=error)
                outcome = np.full(len(move), Outcome.FAILED, np.uint8)
            queue.health.end(call, outcome)
            self._settle(queue, move, outcome)
            self._wake_idle()

        queue.link.submit("read", _batch(move, FORWARD), done)

    def _verified(self, move: Move, statuses: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Turn statuses into outcomes: OK only counts where the seal holds."""
        outcome = statuses.astype(np.uint8)
        came = statuses == Status.OK
        part = move.part(came)
        faults = verify_blocks(
            self._region.buffer,
            part.host_slots * PAGE,
            part.payload_bytes,
            part.block_keys,
            part.groups,
            root=part.root,
        )
        outcome[came] = np.where(faults == SealFault.GOOD, Outcome.GOOD, Outcome.CORRUPT)
        return outcome

    def _settle(self, queue: TierQueue, move: Move, outcome: npt.NDArray[np.uint8]) -> None:
        with self._lock:
            corrupt = self._planner.finish_read(move, outcome)
        if corrupt is not None:
            logger.warning(
                "tier %s: %d corrupt blocks dropped",
                self._planner.tiers[queue.number].name,
                len(corrupt.groups),
            )
            self._remove(queue, corrupt)
        self.on_read(move)

    def _start_write(self, queue: TierQueue, move: Move) -> None:
        if not queue.health.takes("write"):
            self._reject_write(queue, move)
            return
        with self._lock:
            started, deletion = self._planner.down.start_write(move)
        queue.queued_bytes -= move.nbytes - (started.nbytes if started is not None else 0)
        if started is not None and len(started) < len(move):
            self._drop_descendants(queue, move.part(slice(len(started), None)))
        if started is None:
            self._drop_descendants(queue, move)
            if deletion is not None:
                self._delete(queue, deletion, lambda ok: None)
            return
        write: Move = started
        call = queue.health.begin("write", len(write))
        queue.in_flight += 1
        queue.in_flight_bytes += write.nbytes

        def room_made(ok: bool) -> None:
            if ok:
                queue.link.submit("write", _batch(write, DEEPEST_FIRST), done)
            else:
                done(np.full(len(write), Status.FAILED, np.uint8))

        def done(statuses: npt.NDArray[np.uint8]) -> None:
            if call is not None:
                call.answered()
                queue.health.end(call, statuses)
            queue.in_flight -= 1
            queue.in_flight_bytes -= write.nbytes
            queue.queued_bytes -= write.nbytes
            written = statuses[DEEPEST_FIRST] == Status.OK.value
            with self._lock:
                self._planner.down.finish_write(write, written)
            if not written.all():
                self._drop_descendants(queue, write.part(~written))
            self._pump(queue)
            self._wake_idle()

        if deletion is None:
            room_made(True)
        else:
            self._delete(queue, deletion, room_made)

    def _reject_write(self, queue: TierQueue, move: Move) -> None:
        """Drop a queued write that the tier must not be asked for, with its descendants."""
        queue.health.rejected_blocks += len(move)
        queue.queued_bytes -= move.nbytes
        with self._lock:
            self._planner.down.drop_write(move)
        self._drop_descendants(queue, move)

    def _drop_descendants(self, queue: TierQueue, failed: Move) -> None:
        """Drop queued writes that continue a prefix whose block did not reach the tier."""
        if not queue.writes or not len(failed):
            return
        at = int(failed.positions.min())
        key = failed.keys[at]
        kept: deque[Move] = deque()
        with self._lock:
            for move in queue.writes:
                if move.root == failed.root and len(move.keys) > at and (move.keys[at] == key).all():
                    after = move.positions > at
                    dropped, rest = move.part(after), move.part(~after)
                    if len(dropped):
                        queue.queued_bytes -= dropped.nbytes
                        self._planner.down.drop_write(dropped)
                    if len(rest):
                        kept.append(rest)
                else:
                    kept.append(move)
        queue.writes = kept

    def _delete(self, queue: TierQueue, deletion: Deletion, then: Callable[[bool], None]) -> None:
        """Delete in the tier so that it stays within its capacity; `then(True)` if everything went."""
        size = queue.link.capabilities.max_batch_blocks if queue.link.capabilities else DEFAULT_BATCH_BLOCKS
        total = len(deletion.groups)
        pieces = [slice(at, min(at + size, total)) for at in range(0, total, size)]
        answers: dict[int, npt.NDArray[np.bool_]] = {}

        def answered(number: int, statuses: npt.NDArray[np.uint8]) -> None:
            answers[number] = statuses != Status.FAILED
            if len(answers) == len(pieces):
                ok = np.concatenate([answers[i] for i in range(len(pieces))])
                with self._lock:
                    self._planner.down.finish_deletion(deletion, ok)
                then(bool(ok.all()))

        for number, piece in enumerate(pieces):
            batch = _deletion_batch(deletion, piece)
            queue.link.submit("delete", batch, lambda statuses, n=number: answered(n, statuses))  # type: ignore[misc]

    def _remove(self, queue: TierQueue, corrupt: Deletion) -> None:
        """Have the tier delete corrupt copies; they are out of its record already."""
        if "delete" not in queue.link.powers or not queue.health.takes("write"):
            return

        def removed(statuses: npt.NDArray[np.uint8]) -> None:
            with self._lock:
                self._planner.down.finish_removal(corrupt, statuses != Status.FAILED)

        queue.link.submit("delete", _deletion_batch(corrupt, slice(None)), removed)

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
