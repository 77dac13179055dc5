"""Loads and stores: copies between the devices of all ranks and host memory, seals, commits.

Owns transfers from the call until no byte of them moves any more. Does not own slots and pins (`planner.py`), threads
(`scheduler.py`) or how a device copies (`device/`).

A block of a model with several ranks is one slot; each rank copies its part of the payload. A store is sealed and
committed when all ranks have copied, and given up when one fails. Replicated blocks are written by the first rank.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core.backend import PAGE
from flexkv_core.device import Device
from flexkv_core.errors import KeyInputError, KeyTypeError, LayoutError, UnknownNamespaceError
from flexkv_core.fetching import Fetches
from flexkv_core.handles import Fetch, Transfer
from flexkv_core.index import Keys
from flexkv_core.layout import ModelSpec
from flexkv_core.ledger import distinct, mask_of
from flexkv_core.planner import Planner
from flexkv_core.plans import FetchPlan, Move, StorePlan
from flexkv_core.region import HostRegion
from flexkv_core.scheduler import Scheduler
from flexkv_core.seal import seal_blocks

logger = logging.getLogger("flexkv.copy")

SEAL_THREADS = 4
"""At most so many threads seal one store's blocks, and no more than this process may use."""
MAX_PENDING_STORES = 1024
"""Stores whose copy has not ended; more are refused, so that a caller who never waits stays bounded."""
WAS_RESET = "the namespace was reset"

DeviceBlocks = npt.NDArray[np.int64] | Sequence[npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Ranks:
    """The devices that hold a model's paged KV, one a rank, and which part of a block each has.

    Attributes:
        shards: by rank and group: (first byte of the payload, bytes); no bytes: nothing to copy there.
        writes: by rank and group: whether the rank stores its part.
        pages: by group: how many device blocks all ranks have.
    """

    devices: tuple[Device, ...]
    shards: tuple[tuple[tuple[int, int], ...], ...]
    writes: tuple[tuple[bool, ...], ...]
    pages: tuple[int, ...]

    @classmethod
    def of(cls, devices: Sequence[Device], model: ModelSpec) -> Ranks:
        """Match devices with a model. Raises LayoutError where their blocks have other sizes than it says."""
        layout = model.tensor_parallel * model.pipeline_parallel
        if not devices or len(devices) not in (1, layout):
            # The order of a block's bytes is that of the ranks, so the namespace must tell one layout from another.
            raise LayoutError(
                f"{len(devices)} devices for tensor_parallel {model.tensor_parallel} and pipeline_parallel "
                f"{model.pipeline_parallel}: give one device a rank, and say so in the ModelSpec"
            )
        by_group = [group.shards(len(devices)) for group in model.groups]
        pages = []
        for number, shards in enumerate(by_group):
            counts = []
            for rank, (device, (_, size)) in enumerate(zip(devices, shards, strict=True)):
                if not size:
                    continue
                where = f"group {number}, rank {rank}" if len(devices) > 1 else f"group {number}"
                try:
                    fragments = device.fragments(number)
                except LayoutError as error:
                    raise LayoutError(f"{where}: the model has {size} bytes there, but {error}") from error
                if fragments.block_bytes != size:
                    raise LayoutError(
                        f"{where}: the device's blocks have {fragments.block_bytes} bytes, the model's {size}: "
                        "describe the same tensors in both"
                    )
                counts.append(fragments.pages)
            pages.append(min(counts))
        writes = tuple(
            tuple(
                bool(shards[rank][1]) and (rank == 0 or not group.replicated)
                for group, shards in zip(model.groups, by_group, strict=True)
            )
            for rank in range(len(devices))
        )
        by_rank = tuple(tuple(shards[rank] for shards in by_group) for rank in range(len(devices)))
        return cls(tuple(devices), by_rank, writes, tuple(pages))


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

    def _open(self) -> Transfer:
        """A new transfer. Any thread."""
        transfer = Transfer()
        self._transfers.add(transfer)
        return transfer

    def _end(self, transfer: Transfer, blocks: int, error: str | None) -> None:
        transfer.settle(blocks, error)
        self._transfers.discard(transfer)

    def settle_all(self) -> None:
        """The manager is closed: nobody shall wait for what will not come. Any thread."""
        for transfer in list(self._transfers):
            self._end(transfer, 0, "the manager was closed")

    def _on_all_ranks(self, works: Sequence[Callable[[], None]], done: Callable[[BaseException | None], None]) -> None:
        """Run one piece of work a rank on copy threads, then `done` with the first error."""
        errors: list[BaseException] = []
        left = len(works)

        def one_done(_: Any, error: BaseException | None) -> None:
            nonlocal left
            left -= 1
            if error is not None:
                errors.append(error)
            if not left:
                done(errors[0] if errors else None)

        for work in works:
            self._scheduler.run_copy(work, one_done)

    # ---------------------------------------------------------------- load

    def load(self, fetch: Fetch, plan: FetchPlan, ranks: Ranks, device_blocks: DeviceBlocks) -> Transfer:
        """Copy a fetch's ready blocks into device blocks of all ranks. Any thread; see `KVCacheManager.load`."""
        wanted = by_group(device_blocks, len(plan.pinned), fetch.ready, "device_blocks")
        jobs: list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
        for group, blocks in enumerate(wanted):
            check_blocks(ranks, group, blocks)
            chosen = (blocks >= 0) & plan.pinned[group, : len(blocks)]
            jobs.append((group, plan.slots[group, : len(blocks)][chosen] * PAGE, blocks[chosen]))
        transfer = self._open()
        count = sum(len(blocks) for _, _, blocks in jobs)
        alone = len(ranks.devices) == 1

        def scatter(rank: int) -> None:
            for group, offsets, blocks in jobs:
                first, size = ranks.shards[rank][group]
                if size and len(blocks):
                    ranks.devices[rank].scatter(self._region.buffer, offsets + first, blocks, group)
            if alone:
                transfer.settle(count)  # from the copy thread: the caller need not wait for the books below

        def done(error: BaseException | None) -> None:
            fetch.loads -= 1
            self._fetches.unpin(fetch)
            if error is not None:
                logger.error("a load failed", exc_info=error)
            self._end(transfer, 0 if error else count, spelled(error) if error else None)

        def start() -> None:
            if fetch.released or transfer.cancelled:
                self._end(transfer, 0, "cancelled" if transfer.cancelled else f"the fetch was {fetch.why}")
                return
            fetch.loads += 1
            works = [functools.partial(scatter, rank) for rank in range(len(ranks.devices))]
            self._on_all_ranks(works, done)

        self._scheduler.call(start)
        return transfer

    # ---------------------------------------------------------------- store

    def store(self, root: bytes, keys: Keys, table: npt.NDArray[np.int64], ranks: Ranks) -> Transfer:
        """Copy device blocks to host memory and commit them. Any thread; see `KVCacheManager.store`.

        Args:
            table: (groups, n) int64: device blocks, -1 where there is none.
        """
        transfer = self._open()
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
        alone = len(ranks.devices) == 1

        def gather(rank: int) -> None:
            if transfer.cancelled:
                return
            device = ranks.devices[rank]
            for group in distinct(plan.groups):
                first, _ = ranks.shards[rank][group]
                if ranks.writes[rank][group]:
                    chosen = mask_of(plan.groups, group)
                    offsets = plan.slots[chosen] * PAGE + first
                    device.gather(self._region.buffer, offsets, table[group, plan.positions[chosen]], group)
            if alone:
                self._seal(plan)

        def gathered(error: BaseException | None) -> None:
            if error is not None or alone or transfer.cancelled:
                self._end_store(transfer, plan, error)
            else:
                self._scheduler.run_copy(
                    lambda: self._seal(plan), lambda _, error: self._end_store(transfer, plan, error)
                )

        if not len(plan.positions):
            self._end_store(transfer, plan, None)
            return
        works = [functools.partial(gather, rank) for rank, writes in enumerate(ranks.writes) if any(writes)]
        self._on_all_ranks(works, gathered)

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
            logger.error("a store failed", exc_info=error)
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
        self._scheduler.submit_writes(writes)


# ---------------------------------------------------------------- what callers pass and get


def spelled(error: BaseException) -> str:
    """What a transfer says of an exception, never nothing."""
    return str(error) or type(error).__name__


def check_blocks(ranks: Ranks, group: int, blocks: npt.NDArray[np.int64]) -> None:
    """Raises KeyInputError for a device block that there is not; -1 means none."""
    pages = ranks.pages[group]
    if len(blocks) and (blocks.max() >= pages or blocks.min() < -1):
        worst = int(blocks.max()) if blocks.max() >= pages else int(blocks.min())
        raise KeyInputError(f"device block {worst} of group {group}: the device has blocks 0 to {pages - 1}")


def by_group(blocks: DeviceBlocks, groups: int, limit: int, name: str) -> Sequence[npt.NDArray[np.int64]]:
    """Return one int64 array a group, each at most `limit` long. Raises KeyInputError or KeyTypeError."""
    listed = [blocks] if isinstance(blocks, np.ndarray) else list(blocks)
    if len(listed) != groups:
        raise KeyInputError(f"{name} has arrays for {len(listed)} KV groups: this model has {groups}")
    for array in listed:
        if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.ndim != 1:
            raise KeyTypeError(f"{name} must be one-dimensional int64 arrays")
        if len(array) > limit:
            raise KeyInputError(f"{name} names {len(array)} blocks: at most {limit} can be given here")
    return listed
