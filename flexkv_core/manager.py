"""The manager: what engines, libraries, the CLI and the server call.

`KVCacheManager` ties the planner (what moves where) to the scheduler (moving it) and to devices. It owns their
lives and the handles that callers hold. Errors of storage never come out of it: they are misses and counters.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flexkv_core.backend import PAGE
from flexkv_core.blocks import Namespace
from flexkv_core.books import make_planner, open_books
from flexkv_core.config import StackConfig, TierConfig, load_stack
from flexkv_core.device import Device
from flexkv_core.errors import KeyInputError, KeyTypeError, LayoutError, ManagerClosedError, StateError
from flexkv_core.handles import Fetch, Lookup, Transfer
from flexkv_core.index import Keys
from flexkv_core.layout import ModelSpec
from flexkv_core.plans import HOST, Move, StorePlan
from flexkv_core.region import HostRegion
from flexkv_core.scheduler import Link, Scheduler
from flexkv_core.seal import seal_blocks
from flexkv_core.tier_book import TierBook
from flexkv_core.tier_inline import InlineLink
from flexkv_core.tier_link import LinkSettings, TierLink

logger = logging.getLogger("flexkv.manager")

DEFAULT_FETCH_DEADLINE_S = 10.0
CLOSE_DEADLINE_S = 5.0
CLOSE_SHARE = 0.8
"""Of the time that is left to close a tier; what remains of it is for killing and reaping one that hangs."""
SEAL_THREADS = 4
"""At most so many threads seal one store's blocks, and no more than this process may use."""
MAX_PENDING_STORES = 1024
"""Stores whose copy has not ended; more are refused, so that a caller who never waits stays bounded."""

DeviceBlocks = npt.NDArray[np.int64] | Sequence[npt.NDArray[np.int64]]


class KVCacheManager:
    """A tiered KV cache. Use `open`; a context manager; every method may be called from any thread."""

    def __init__(
        self,
        stack: StackConfig,
        *,
        verify: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._stack = stack
        self._lock = threading.RLock()
        self._closed = False
        self._devices: dict[bytes, Device] = {}
        self._fetches: set[Fetch] = set()
        self._pending_stores = 0
        self._refused_stores = 0
        self._seal_threads = min(SEAL_THREADS, len(os.sched_getaffinity(0)))
        opened = open_books(stack)
        self._region = HostRegion.create(
            opened.host_bytes,
            huge_pages="try" if opened.huge_pages else "off",
            prefault=opened.prefault,
            progress=progress,
            threads=opened.threads,
        )
        self._books = opened.books
        self._planner = make_planner(opened.books)
        self._scheduler = Scheduler(self._planner, self._lock, self._region, verify=verify)
        self._scheduler.on_read = self._refresh
        self._verify = verify
        self._scheduler.start()
        for book, tier in zip(opened.books[HOST + 1 :], opened.lower, strict=True):
            self._scheduler.ask(self._add_tier, book, tier)

    @classmethod
    def open(
        cls,
        stack: str | Path | Mapping[str, Any] | StackConfig,
        *,
        verify: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> KVCacheManager:
        """Open a stack.

        Args:
            stack: a path to a YAML file, the same as a mapping, or a `StackConfig`.
            verify: check seals of what lower tiers return. Off only to prove that the check matters.
            progress: called with (bytes done, bytes in all) while host memory is pre-faulted.

        Raises:
            StackConfigError: the stack is not usable; the text names the place and the fix.
            HostMemoryError: the cpu tier does not fit in this machine's memory.
            BackendNotFoundError, BackendLoadError: a tier's plug-in is missing or broken.
        """
        config = stack if isinstance(stack, StackConfig) else load_stack(stack)
        return cls(config, verify=verify, progress=progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add_tier(self, book: TierBook, tier: TierConfig) -> None:
        settings = LinkSettings(
            name=book.name,
            backend=tier.backend,
            config=tier.options.model_dump(mode="json"),
            isolation=tier.isolation,
            capacity=tier.capacity.bytes if tier.capacity else None,
            state_directory=tier.state_directory,
            faults=tier.faults.model_dump(mode="json") if tier.faults else None,
            deadline_s=tier.deadline_s,
        )
        loop = self._scheduler.loop

        def changed(link: Link) -> None:
            self._scheduler.on_link_state(book.number, link)

        link: Link = (
            TierLink(settings, loop, self._region.fd, self._region.size, changed)
            if tier.isolation == "process"
            else InlineLink(settings, loop, self._region.buffer, changed)
        )
        limit = tier.write_queue or self._region.size // 4
        self._scheduler.add_tier(book.number, link, limit, tier.breaker)

    # ---------------------------------------------------------------- models

    def register(self, model: ModelSpec, device: Device | None = None) -> Namespace:
        """Make a model known: its namespace, its slot classes, and the device that holds its paged KV.

        Args:
            model: groups and block bytes.
            device: needed for `load` and `store`; its blocks must have the model's bytes.

        Raises:
            LayoutError: a block does not fit in a tier, the device's blocks have other sizes, or the stack names
                another block size.
        """
        self._check_open()
        if self._stack.block_size not in (None, model.block_size):
            raise LayoutError(
                f"model {model.model!r}: block_size {model.block_size}, but the stack says {self._stack.block_size}: "
                "make them equal, or leave it out of the stack"
            )
        namespace = Namespace.of(model)
        if device is not None:
            _check_device(device, model)
        with self._lock:
            self._planner.add_model(namespace.root, model.groups)
            if device is not None:
                self._devices[namespace.root] = device
        return namespace

    # ---------------------------------------------------------------- lookups and fetches

    def lookup(self, namespace: Namespace, keys: Keys) -> Lookup:
        """Say how much of a prefix the cache has. Runs in the caller's thread; asks no backend.

        Args:
            keys: (n, 32) uint8, from the namespace's first block on, as `block_keys` makes them.
        """
        self._check_open()
        keys = _checked_keys(keys)
        with self._lock:
            blocks, host_blocks = self._planner.lookup(namespace.root, keys)
            pending = any(queue.link.state == "starting" for queue in self._scheduler.queues().values())
        return Lookup(blocks, host_blocks, pending and blocks < len(keys))

    def fetch(self, namespace: Namespace, keys: Keys, deadline_s: float = DEFAULT_FETCH_DEADLINE_S) -> Fetch:
        """Bring the longest held prefix into host memory, verified, and pin it there until `Fetch.release`.

        Returns at once. At the deadline, seconds from now (less than 0 counts as 0), the fetch is done with what is
        ready; later blocks are kept for others. A prefix longer than host memory can hold beside other pins is
        truncated.
        """
        self._check_open()
        keys = _checked_keys(keys)
        deadline_s = max(0.0, float(deadline_s))  # in this order, so that NaN is 0: it would confuse the loop's timers
        fetch = Fetch(self._release)
        self._scheduler.call(self._begin_fetch, fetch, namespace.root, keys, deadline_s)
        return fetch

    def _begin_fetch(self, fetch: Fetch, root: bytes, keys: Keys, deadline_s: float) -> None:
        try:
            with self._lock:
                fetch.plan = self._planner.begin_fetch(root, keys)
        except Exception:
            logger.exception("a fetch could not be planned")
            fetch.settle()
            return
        self._fetches.add(fetch)
        self._update(fetch)
        if not fetch.done:
            self._scheduler.submit_reads(fetch.plan)
            self._scheduler.loop.call_later(deadline_s, self._finish_fetch, fetch)
        if fetch.released:
            self._unpin(fetch)

    def _refresh(self, move: Move) -> None:
        """A read has been settled: some fetches may have more in hand."""
        for fetch in list(self._fetches):
            if fetch.plan is not None and fetch.plan.root == move.root:
                self._update(fetch)

    def _update(self, fetch: Fetch) -> None:
        if fetch.done or fetch.plan is None:
            return
        with self._lock:
            fetch.ready = self._planner.ready(fetch.plan)
            complete = not fetch.plan.awaited.any()
        if complete:
            self._finish_fetch(fetch)

    def _finish_fetch(self, fetch: Fetch) -> None:
        """Complete, or the deadline has passed."""
        if fetch.done or fetch.plan is None:
            return
        with self._lock:
            served = self._planner.close_fetch(fetch.plan)
            fetch.ready = self._planner.ready(fetch.plan)
        fetch.sources = {self._books[number].name: blocks for number, blocks in served.items()}
        self._fetches.discard(fetch)
        fetch.settle()

    def _release(self, fetch: Fetch) -> None:
        if not self._closed:
            self._scheduler.call(self._release_now, fetch)

    def _release_now(self, fetch: Fetch) -> None:
        fetch.released = True
        self._unpin(fetch)

    def _unpin(self, fetch: Fetch) -> None:
        if fetch.plan is None or fetch.loads:
            return
        self._finish_fetch(fetch)
        with self._lock:
            self._planner.release(fetch.plan)

    # ---------------------------------------------------------------- copies

    def load(self, fetch: Fetch, device_blocks: DeviceBlocks) -> Transfer:
        """Copy a fetch's ready blocks into device blocks.

        Args:
            device_blocks: (m,) int64, the device block for each of the first m <= fetch.ready blocks, -1 to skip
                one; with several KV groups a sequence of such arrays, one a group.

        Raises:
            KeyInputError: more device blocks than ready blocks, or no blocks for a group.
            StateError: the fetch was released, or the model has no device.
        """
        self._check_open()
        plan = fetch.plan
        if plan is None or fetch.released or not fetch.done:
            raise StateError("load needs a fetch that is done and not released: call fetch.wait() first")
        device = self._device(plan.root)
        wanted = _by_group(device_blocks, len(plan.pinned), fetch.ready, "device_blocks")
        jobs = []
        for group, blocks in enumerate(wanted):
            slots = plan.slots[group, : len(blocks)]
            chosen = (blocks >= 0) & plan.pinned[group, : len(blocks)]
            jobs.append((group, slots[chosen] * PAGE, blocks[chosen]))
            _check_blocks(device, group, blocks)
        transfer = Transfer()
        count = sum(len(blocks) for _, _, blocks in jobs)

        def copy() -> None:
            for group, offsets, blocks in jobs:
                device.scatter(self._region.buffer, offsets, blocks, group)
            transfer.settle(count)  # from the copy thread: the caller need not wait for the books below

        def done(_: Any, error: BaseException | None) -> None:
            fetch.loads -= 1
            if fetch.released:
                self._unpin(fetch)
            if error is not None:
                logger.error("a load failed", exc_info=error)
                transfer.settle(0, str(error))

        def start() -> None:
            if fetch.released:
                transfer.settle(0, "the fetch was released before its load began")
                return
            fetch.loads += 1
            self._scheduler.run_copy(copy, done)

        self._scheduler.call(start)
        return transfer

    def store(self, namespace: Namespace, keys: Keys, device_blocks: DeviceBlocks) -> Transfer:
        """Copy device blocks to host memory, commit them, and let them sink to the lower tiers behind the call.

        Args:
            keys: (n, 32) uint8, from the namespace's first block on.
            device_blocks: (n,) int64, -1 where the caller offers none; with several KV groups one array a group.
                Blocks that host memory holds already are not copied again.

        The transfer is done when the blocks are committed in host memory. The device blocks must not change
        before that.
        """
        self._check_open()
        keys = _checked_keys(keys)
        device = self._device(namespace.root)
        with self._lock:
            groups = self._planner.groups(namespace.root)
        offered = _by_group(device_blocks, len(groups), len(keys), "device_blocks")
        table = np.full((len(groups), len(keys)), -1, np.int64)
        for group, blocks in enumerate(offered):
            _check_blocks(device, group, blocks)
            table[group, : len(blocks)] = blocks
        transfer = Transfer()
        self._scheduler.call(self._begin_store, transfer, namespace.root, keys, table, device)
        return transfer

    def _begin_store(
        self, transfer: Transfer, root: bytes, keys: Keys, table: npt.NDArray[np.int64], device: Device
    ) -> None:
        if self._pending_stores >= MAX_PENDING_STORES:
            self._refused_stores += 1
            transfer.settle(0, "too many stores under way")
            return
        try:
            with self._lock:
                plan = self._planner.begin_store(root, keys, table >= 0)
        except Exception as error:
            logger.exception("a store could not be planned")
            transfer.settle(0, str(error))
            return
        self._pending_stores += 1

        def copy() -> None:
            self._gather(plan, table, device)

        def done(_: Any, error: BaseException | None) -> None:
            self._pending_stores -= 1
            writes: list[Move] = []
            with self._lock:
                if error is not None:
                    self._planner.abort_store(plan)
                else:
                    try:
                        writes = self._planner.commit_store(plan)
                    except Exception as caught:  # a bug of ours must not let the caller wait for ever
                        error = caught
            if error is not None:
                logger.error("a store failed", exc_info=error)
            # First, because the blocks are committed: that they also sink is nobody's wait.
            transfer.settle(0 if error else len(plan.positions), str(error) if error else None)
            self._scheduler.submit_writes(writes)

        if len(plan.positions):
            self._scheduler.run_copy(copy, done)
        else:
            done(None, None)

    def _gather(self, plan: StorePlan, table: npt.NDArray[np.int64], device: Device) -> None:
        """Copy a store's blocks from the device and seal them (copy thread)."""
        for group in np.unique(plan.groups):
            chosen = plan.groups == group
            offsets = plan.slots[chosen] * PAGE
            device.gather(self._region.buffer, offsets, table[group, plan.positions[chosen]], int(group))
        seal_blocks(
            self._region.buffer,
            plan.slots * PAGE,
            plan.payload_bytes,
            plan.keys[plan.positions],
            plan.groups,
            threads=self._seal_threads,
        )

    def _device(self, root: bytes) -> Device:
        device = self._devices.get(root)
        if device is None:
            raise StateError("this namespace has no device: pass device=... to register()")
        return device

    # ---------------------------------------------------------------- waiting, figures, end

    def wait(self, transfer: Transfer | Fetch, timeout_s: float | None = None) -> bool:
        """Wait until a transfer or fetch is done; False if the time is up first."""
        return transfer.wait(timeout_s)

    def drain(self, timeout_s: float) -> bool:
        """Wait until copies have ended and the write queues are empty; False if the time is up first."""
        self._check_open()
        return self._scheduler.drain(timeout_s)

    def stats(self) -> dict[str, Any]:
        """Figures since the manager was opened, as plain data.

        Returns a mapping with
            tiers: by tier name, in the stack's order, the counters of `TierBook.figures` (blocks and bytes
                read, written, stored, evicted, hit, corrupt, failed, dropped) and of its process: `state`
                ("starting", "ready", "backoff", "closed"), `queued_blocks`, `restarts`, `pid` and `last_error`
                (None where there is none), `unexpected_answers`; of a lower tier also `health` ("ok", "degraded",
                "away") and `breaker`: state of `read` and `write`, `opened`, `rejected_blocks`, `last_trouble`.
            fetches, pending_stores: under way now.
            refused_blocks: blocks of stores for which host memory had no room that is not pinned.
            refused_stores: stores refused because `MAX_PENDING_STORES` were under way.
            verify: whether seals are checked.
        """
        with self._lock:
            queues = self._scheduler.queues()
            tiers = {}
            for book in self._books:
                figures = book.figures()
                queue = queues.get(book.number)
                figures["state"] = queue.link.state if queue else "ready"
                figures["queued_blocks"] = queue.queued_blocks if queue else 0
                figures["restarts"] = queue.link.restarts if queue else 0
                figures["pid"] = queue.link.pid if queue else None
                figures["last_error"] = queue.link.last_error if queue else None
                figures["unexpected_answers"] = queue.link.unexpected_answers if queue else 0
                figures.update(queue.health.figures() if queue else {"health": "ok"})
                tiers[book.name] = figures
            return {
                "tiers": tiers,
                "fetches": len(self._fetches),
                "pending_stores": self._pending_stores,
                "refused_blocks": self._planner.refused_blocks,
                "refused_stores": self._refused_stores,
                "verify": self._verify,
            }

    def close(self, deadline_s: float = CLOSE_DEADLINE_S) -> None:
        """Write down what is queued for half of the deadline at most, then stop. Returns within the deadline, for
        which a tier that does not end by itself is killed before it is over.

        What a tier had not yet taken is lost; what it had committed stays, if it is persistent. Safe to call twice.
        """
        if self._closed:
            return
        self._closed = True
        started = time.monotonic()
        self._scheduler.drain(deadline_s / 2)
        rest = deadline_s - (time.monotonic() - started)
        clean = self._scheduler.close(CLOSE_SHARE * max(rest, 0.0))
        for fetch in list(self._fetches):
            fetch.settle()
        self._fetches.clear()
        if clean:
            self._region.close()
        else:
            logger.warning("a tier did not stop in time: its host memory is kept until this process ends")

    def _check_open(self) -> None:
        if self._closed:
            raise ManagerClosedError("this manager was closed: open another one")


def _check_device(device: Device, model: ModelSpec) -> None:
    for number, group in enumerate(model.groups):
        found = device.fragments(number).block_bytes
        if found != group.block_bytes:
            raise LayoutError(
                f"group {number}: the device's blocks have {found} bytes, the model's {group.block_bytes}: "
                "describe the same tensors in both"
            )


def _check_blocks(device: Device, group: int, blocks: npt.NDArray[np.int64]) -> None:
    pages = device.fragments(group).pages
    if len(blocks) and (blocks.max() >= pages or blocks.min() < -1):
        worst = int(blocks.max()) if blocks.max() >= pages else int(blocks.min())
        raise KeyInputError(f"device block {worst} of group {group}: the device has blocks 0 to {pages - 1}")


def _checked_keys(keys: Keys) -> Keys:
    if not isinstance(keys, np.ndarray) or keys.dtype != np.uint8:
        kind = f"{keys.dtype} array" if isinstance(keys, np.ndarray) else type(keys).__name__
        raise KeyTypeError(f"keys is a {kind}: pass the (n, 32) uint8 array that block_keys() returns")
    if keys.ndim != 2 or keys.shape[1] != 32:
        raise KeyInputError(f"keys has shape {keys.shape}: pass an array of shape (n, 32)")
    return np.ascontiguousarray(keys)


def _by_group(blocks: DeviceBlocks, groups: int, limit: int, name: str) -> Sequence[npt.NDArray[np.int64]]:
    """Return one int64 array a group, each at most `limit` long."""
    listed = [blocks] if isinstance(blocks, np.ndarray) else list(blocks)
    if len(listed) != groups:
        raise KeyInputError(f"{name} has arrays for {len(listed)} KV groups: this model has {groups}")
    for array in listed:
        if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.ndim != 1:
            raise KeyTypeError(f"{name} must be one-dimensional int64 arrays")
        if len(array) > limit:
            raise KeyInputError(f"{name} names {len(array)} blocks: at most {limit} can be given here")
    return listed
