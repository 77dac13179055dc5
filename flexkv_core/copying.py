"""Loads and stores: copies between the devices of all ranks and host memory, seals, commits.

Owns transfers from the call until no byte of them moves any more. Does not own slots and pins (`planner.py`), threads
(`scheduler.py`) or how a device copies (`device/`).

A block of a model with several ranks is one slot; each rank copies its part of the payload. A store is sealed and
committed when all ranks have copied, and given up when one fails. Replicated blocks are written by the first rank.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from flexkv_core.arguments import DeviceBlocks, by_group
from flexkv_core.backend import PAGE
from flexkv_core.errors import KeyInputError, UnknownNamespaceError
from flexkv_core.fetching import Fetches
from flexkv_core.handles import Fetch, Transfer
from flexkv_core.index import Keys
from flexkv_core.ledger import distinct, mask_of
from flexkv_core.planner import Planner
from flexkv_core.plans import FetchPlan, Move, StorePlan
from flexkv_core.ranks import CopyPart, Direction, LocalWorker, Ranks, WorkerLostError
from flexkv_core.region import HostRegion
from flexkv_core.scheduler import Scheduler
from flexkv_core.seal import seal_blocks

logger = logging.getLogger("flexkv.copy")

SEAL_THREADS = 4
"""At most so many threads seal one store's blocks, and no more than this process may use."""
MAX_PENDING_STORES = 1024
"""Stores whose copy has not ended; more are refused, so that a caller who never waits stays bounded."""
WAS_RESET = "the namespace was reset"


class Copies:
    """Methods without a note are for the owner thread only.

    Attributes:
        pending_stores: under way.
        refused_stores: because `MAX_PENDING_STORES` were.
    """

    def __init__(
        self, planner: Planner, scheduler: Scheduler, fetches: Fetches, lock: threading.RLock, region: HostRegion
    ) -> None:
        self._planner = planner
        self._scheduler = scheduler
        self._fetches = fetches
        self._lock = lock
        self._region = region
        self._seal_threads = min(SEAL_THREADS, len(os.sched_getaffinity(0)))
        self._transfers: set[Transfer] = set()  # not ended
        self.pending_stores = 0
        self.refused_stores = 0

    def _open(self, tag: str, owner: int = 0) -> Transfer:
        """A new transfer. Any thread."""
        transfer = Transfer(tag, owner)
        self._transfers.add(transfer)
        return transfer

    def _end(self, transfer: Transfer, blocks: int, error: str | None) -> None:
        transfer.settle(blocks, error)
        self._transfers.discard(transfer)

    def settle_all(self) -> None:
        """The manager is closed: nobody shall wait for what will not come. Any thread."""
        for transfer in list(self._transfers):
            self._end(transfer, 0, "the manager was closed")

    def _on_all_ranks(
        self,
        ranks: Ranks,
        direction: Direction,
        parts: Sequence[Sequence[CopyPart]],
        transfer: Transfer,
        then: Callable[[], None] | None,
        done: Callable[[BaseException | None], None],
    ) -> None:
        """Copy `parts[rank]` on each rank that has some; when all have, run `then` off the owner thread; at last
        `done` with the first error, when nothing of it moves any more."""
        busy = [(worker, mine) for worker, mine in zip(ranks.workers, parts, strict=True) if mine]
        first = busy[0][0] if busy else None

        def copy(worker: LocalWorker, mine: Sequence[CopyPart]) -> None:
            if direction == "scatter" or not transfer.cancelled:
                worker.run(direction, mine)

        if len(busy) == 1 and isinstance(first, LocalWorker):  # one thread does it all
            alone, mine = first, busy[0][1]

            def run() -> None:
                copy(alone, mine)
                if then is not None:
                    then()

            self._scheduler.run_copy(run, lambda _, error: done(error))
            return
        errors: list[BaseException] = []
        left = len(busy)

        def all_done() -> None:
            if errors or then is None:
                done(errors[0] if errors else None)
            else:
                self._scheduler.run_copy(then, lambda _, error: done(error))

        def one_done(error: BaseException | None) -> None:
            nonlocal left
            left -= 1
            if error is not None:
                errors.append(error)
            if not left:
                all_done()

        for worker, mine in busy:
            if isinstance(worker, LocalWorker):
                self._scheduler.run_copy(
                    lambda worker=worker, mine=mine: copy(worker, mine),  # type: ignore[misc]
                    lambda _, error: one_done(error),
                )
            else:
                worker.start(direction, mine, transfer.tag, self._scheduler.job(one_done))
        if not busy:
            all_done()

    # ---------------------------------------------------------------- load

    def load(self, fetch: Fetch, plan: FetchPlan, ranks: Ranks, device_blocks: DeviceBlocks, tag: str) -> Transfer:
        """Copy a fetch's ready blocks into device blocks of all ranks. Any thread; see `KVCacheManager.load`."""
        wanted = by_group(device_blocks, len(plan.pinned), fetch.ready, "device_blocks")
        jobs: list[CopyPart] = []
        for group, blocks in enumerate(wanted):
            check_blocks(ranks, group, blocks)
            chosen = (blocks >= 0) & plan.pinned[group, : len(blocks)]
            if chosen.any():
                jobs.append(CopyPart(group, plan.slots[group, : len(blocks)][chosen] * PAGE, blocks[chosen]))
        transfer = self._open(tag)
        count = sum(len(job.device_blocks) for job in jobs)
        parts = [
            [
                CopyPart(job.group, job.offsets + shards[job.group][0], job.device_blocks)
                for job in jobs
                if shards[job.group][1]
            ]
            for shards in ranks.shards
        ]
        # From the copy thread: the caller need not wait for the books below.
        early = (lambda: transfer.settle(count)) if isinstance(ranks.workers[0], LocalWorker) else None

        def done(error: BaseException | None) -> None:
            fetch.loads -= 1
            self._fetches.unpin(fetch)
            if error is not None:
                _log("load", error)
            self._end(transfer, 0 if error else count, spelled(error) if error else None)

        def start() -> None:
            if fetch.released or transfer.cancelled:
                self._end(transfer, 0, "cancelled" if transfer.cancelled else f"the fetch was {fetch.why}")
                return
            fetch.loads += 1
            self._on_all_ranks(ranks, "scatter", parts, transfer, early if len(parts) == 1 else None, done)

        self._scheduler.call(start)
        return transfer

    # ---------------------------------------------------------------- store

    def store(
        self, root: bytes, keys: Keys, table: npt.NDArray[np.int64], ranks: Ranks, tag: str, owner: int
    ) -> Transfer:
        """Copy device blocks to host memory and commit them. Any thread; see `KVCacheManager.store`.

        Args:
            table: (groups, n) int64: device blocks, -1 where there is none.
        """
        transfer = self._open(tag, owner)
        self._scheduler.call(self._begin_store, transfer, root, keys, table, ranks)
        return transfer

    def _begin_store(
        self, transfer: Transfer, root: bytes, keys: Keys, table: npt.NDArray[np.int64], ranks: Ranks
    ) -> None:
        if transfer.cancelled:
            self._end(transfer, 0, "cancelled")
            return
        if self.pending_stores >= MAX_PENDING_STORES:
            self.refused_stores += 1
            self._end(transfer, 0, "too many stores under way")
            return
        try:
            with self._lock:
                plan = self._planner.begin_store(root, keys, table >= 0)
        except UnknownNamespaceError:
            self._end(transfer, 0, WAS_RESET)
            return
        except Exception as error:
            logger.exception("a store could not be planned")
            self._end(transfer, 0, spelled(error))
            return
        self.pending_stores += 1
        if not len(plan.positions):
            self._end_store(transfer, plan, None)
            return
        parts: list[list[CopyPart]] = [[] for _ in ranks.workers]
        for group in distinct(plan.groups):
            chosen = mask_of(plan.groups, group)
            offsets, blocks = plan.slots[chosen] * PAGE, table[group, plan.positions[chosen]]
            for rank, mine in enumerate(parts):
                if ranks.writes[rank][group]:
                    mine.append(CopyPart(group, offsets + ranks.shards[rank][group][0], blocks))

        def seal() -> None:
            if not transfer.cancelled:
                self._seal(plan)

        self._on_all_ranks(ranks, "gather", parts, transfer, seal, lambda error: self._end_store(transfer, plan, error))

    def _seal(self, plan: StorePlan) -> None:
        """Seal a store's blocks (copy thread)."""
        seal_blocks(
            self._region.buffer,
            plan.slots * PAGE,
            plan.payload_bytes,
            plan.keys[plan.positions],
            plan.groups,
            root=plan.root,
            parents=plan.parents,
            depths=plan.positions,
            threads=self._seal_threads,
        )

    def _end_store(self, transfer: Transfer, plan: StorePlan, error: BaseException | None) -> None:
        """Commit, or give up: nothing of the store touches memory any more."""
        self.pending_stores -= 1
        writes: list[Move] = []
        failure = spelled(error) if error is not None else None
        if error is not None:
            _log("store", error)
        elif transfer.cancelled:
            failure = "cancelled"
        try:
            with self._lock:
                if failure is None and not self._planner.is_live(plan.root, plan.epoch):
                    failure = WAS_RESET
                if failure is not None:
                    self._planner.abort_store(plan)
                else:
                    writes = self._planner.commit_store(plan)
        except Exception as caught:
            logger.exception("a store could not be committed")
            failure = spelled(caught)
        # First, because the blocks are committed: that they also sink is nobody's wait.
        self._end(transfer, 0 if failure else len(plan.positions), failure)
        for move in writes:
            move.owner = transfer.owner
        self._scheduler.writing.submit(writes)


# ---------------------------------------------------------------- what callers pass and get


def _log(what: str, error: BaseException) -> None:
    if isinstance(error, WorkerLostError):
        logger.warning("a %s is given up: %s", what, error)
    else:
        logger.error("a %s failed", what, exc_info=error)


def spelled(error: BaseException) -> str:
    """What a transfer says of an exception, never nothing."""
    return str(error) or type(error).__name__


def check_blocks(ranks: Ranks, group: int, blocks: npt.NDArray[np.int64]) -> None:
    """Raises KeyInputError for a device block that there is not; -1 means none."""
    pages = ranks.pages[group]
    if len(blocks) and (blocks.max() >= pages or blocks.min() < -1):
        worst = int(blocks.max()) if blocks.max() >= pages else int(blocks.min())
        raise KeyInputError(f"device block {worst} of group {group}: the device has blocks 0 to {pages - 1}")
