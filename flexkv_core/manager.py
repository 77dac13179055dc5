"""The manager: what engines, libraries, the CLI and the server call.

`KVCacheManager` ties the planner (what moves where) to the scheduler (moving it) and to devices. It owns their
lives and the handles that callers hold. Errors of storage never come out of it: they are misses and counters.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from flexkv_core.arguments import DeviceBlocks, by_group, checked_keys, seconds
from flexkv_core.blocks import Namespace
from flexkv_core.books import make_planner, open_books, open_epochs
from flexkv_core.changes import Watcher
from flexkv_core.config import StackConfig, TierConfig, dump_with_secrets, load_to_open
from flexkv_core.copying import Copies, check_blocks
from flexkv_core.device import Device
from flexkv_core.errors import LayoutError, ManagerClosedError, StateError
from flexkv_core.fetching import Fetches
from flexkv_core.handles import Fetch, Lookup, Transfer
from flexkv_core.index import Keys
from flexkv_core.layout import ModelSpec
from flexkv_core.namespaces import Namespaces
from flexkv_core.plans import HOST
from flexkv_core.ranks import LocalWorker, Ranks
from flexkv_core.region import HostRegion
from flexkv_core.scheduler import Scheduler
from flexkv_core.tier_book import TierBook
from flexkv_core.tier_inline import InlineLink
from flexkv_core.tier_link import LinkSettings, TierLink
from flexkv_core.tier_queue import Link

logger = logging.getLogger("flexkv.manager")

DEFAULT_FETCH_DEADLINE_S = 10.0
CLOSE_DEADLINE_S = 5.0
IN_FLIGHT_BYTES = 64 << 20
"""What calls of one tier under way may move, or a quarter of host memory where that is more."""
CLOSE_SHARE = 0.8
"""Of the time that is left to close a tier; what remains of it is for killing and reaping one that hangs."""


class KVCacheManager:
    """A tiered KV cache. Use `open`; a context manager; every method may be called from any thread."""

    def __init__(
        self,
        stack: StackConfig,
        *,
        verify: bool = True,
        progress: Callable[[int, int], None] | None = None,
        region: HostRegion | None = None,
        region_label: str = "flexkv",
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Use `open`, unless:

        Args:
            region: host memory of an earlier manager that nothing touches any more, of at least the size that the
                stack asks for; the manager closes it.
            region_label: the name of new host memory in /proc.
            loop: a running event loop whose thread shall own the manager's state; it must outlive the manager.
        """
        self._stack = stack
        self._lock = threading.RLock()
        self._closed = False
        opened = open_books(stack)
        self._region = region or HostRegion.create(
            opened.host_bytes,
            huge_pages="try" if opened.huge_pages else "off",
            prefault=opened.prefault,
            progress=progress,
            threads=opened.threads,
            label=region_label,
        )
        try:
            epochs, self._forgetful = open_epochs(stack.state_directory, opened)
        except BaseException:
            self._region.close()
            raise
        self._books = opened.books
        self._planner = make_planner(
            opened.books, pin_budget_bytes=int(stack.pin_budget * self._region.size), index=stack.index
        )
        self._scheduler = Scheduler(self._planner, self._lock, self._region, verify=verify, loop=loop)
        self._fetches = Fetches(self._planner, self._scheduler, self._lock, stack.pin_limit_s)
        self._copies = Copies(self._planner, self._scheduler, self._fetches, self._lock, self._region)
        self._namespaces = Namespaces(self._planner, self._lock, epochs, self._scheduler.call, self._unsafe)
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
            stack: a path to a YAML or JSON file, the same as a mapping, or a `StackConfig`. The file may be a flat one,
                which means what it means to FlexKV's users: variables set what it does not.
            verify: check seals of what lower tiers return. Off only to prove that the check matters.
            progress: called with (bytes done, bytes in all) while host memory is pre-faulted.

        Raises:
            StackConfigError: the stack is not usable; the text names the place and the fix.
            HostMemoryError: the cpu tier does not fit in this machine's memory.
            DirectoryInUseError: another process holds the stack's `state_directory`.
            BackendNotFoundError, BackendLoadError: a tier's plug-in is missing or broken.
        """
        if isinstance(stack, StackConfig):
            return cls(stack, verify=verify, progress=progress)
        loaded = load_to_open(stack)
        for warning in loaded.warnings:
            logger.warning("%s", warning)
        return cls(loaded.stack, verify=verify, progress=progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def region(self) -> HostRegion:
        """The host memory."""
        return self._region

    def _add_tier(self, book: TierBook, tier: TierConfig) -> None:
        settings = LinkSettings(
            name=book.name,
            backend=tier.backend,
            config=dump_with_secrets(tier.options),
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
        in_flight = tier.in_flight or max(self._region.size // 4, IN_FLIGHT_BYTES)
        self._scheduler.add_tier(book.number, link, limit, in_flight, tier.breaker, tier.probe_ttl_s)

    # ---------------------------------------------------------------- models

    def register(
        self, model: ModelSpec, device: Device | Sequence[Device] | None = None, *, epoch: bytes | None = None
    ) -> Namespace:
        """Make a model known: its namespace, its slot classes, and the devices that hold its paged KV.

        Args:
            model: groups and block bytes.
            device: needed for `load` and `store`: one, or one a rank in the order of the ranks; their blocks must have
                the bytes that the model's groups say (`KVGroup.shards`). Namespaces without one are unregistered, the
                least recently used first, when there are more than `namespaces.MOST_IDLE_NAMESPACES`.
            epoch: go on in this one, which a `reset` began; default: the present one.

        Returns the namespace, in the epoch that its last reset began, which may have been before a restart.

        Raises:
            LayoutError: a block does not fit in a tier, a device's blocks have other sizes, or the stack names
                another block size.
        """
        self._check_open()
        if self._stack.block_size not in (None, model.block_size):
            raise LayoutError(
                f"model {model.model!r}: block_size {model.block_size}, but the stack says {self._stack.block_size}: "
                "make them equal, or leave it out of the stack"
            )
        ranks = None
        if device is not None:
            devices = device if isinstance(device, Sequence) else [device]
            ranks = Ranks.of([LocalWorker(each, self._region) for each in devices], model)
        return self._namespaces.register(model, ranks, epoch)

    def unregister(self, namespace: Namespace) -> None:
        """Say that a model or an adapter is not used any more: its devices are let go.

        Its blocks stay cached until they are evicted, and `register` finds them again; until then the namespace may
        be unknown. Transfers under way end as if nothing had been said: wait for them before device memory goes.

        Raises UnknownNamespaceError for a namespace that is not registered, or was reset.
        """
        self._check_open()
        self._namespaces.unregister(namespace)

    def reset(self, namespace: Namespace, *, retire: bool = True) -> Namespace:
        """Move to a fresh epoch: from now on nothing that was cached under the old one is found or loaded.

        Deletes nothing: the old epoch's blocks are evicted first. What was stored, fetched or planned under the old one
        and is still under way commits to nothing. Returns the namespace to use from now on, with the same devices, when
        the new epoch is on disk, so that it outlives this process (`epochs.py`; if that fails, the reset counts all the
        same, and `stats()["epochs"]["error"]` says why).

        Args:
            retire: False where others go on in the old epoch: they, and what is under way in it, see no change.

        Raises:
            UnknownNamespaceError: the namespace is not registered, or was reset already.
            StateError: nothing was reset, because a tier would serve the old blocks after a restart: it is persistent
                (or has not said yet), and neither it nor the stack has a place to remember a reset.
        """
        self._check_open()
        fresh = self._namespaces.reset(namespace, retire=retire)
        if retire:
            self._scheduler.call(self._fetches.reset, namespace.root)
        return fresh

    def _unsafe(self) -> list[str]:
        """Tiers that would serve the old blocks after a restart."""
        queues = self._scheduler.queues()
        capabilities = {number: queues[number].link.capabilities for number in self._forgetful}
        return [self._books[number].name for number, said in capabilities.items() if said is None or said.persistent]

    # ---------------------------------------------------------------- lookups and fetches

    def lookup(self, namespace: Namespace, keys: Keys) -> Lookup:
        """Say how much of a prefix the cache has. Runs in the caller's thread; waits for no backend.

        Where a key-addressed tier may hold more than is known of it, it is asked behind this call, and `Lookup.pending`
        is True until its answer is there.

        Args:
            keys: (n, 32) uint8, from the namespace's first block on, as `block_keys` makes them.
        """
        self._check_open()
        keys = checked_keys(keys)
        with self._lock:
            self._namespaces.used(namespace.root)
            blocks, host_blocks = self._planner.lookup(namespace.root, keys)
            pending = blocks < len(keys) and self._scheduler.may_know_more(namespace.root, keys, blocks)
        return Lookup(blocks, host_blocks, pending)

    def fetch(
        self,
        namespace: Namespace,
        keys: Keys,
        deadline_s: float = DEFAULT_FETCH_DEADLINE_S,
        *,
        owner: int = 0,
        avoid: Sequence[str] = (),
    ) -> Fetch:
        """Bring the longest held prefix into host memory, verified, and pin it there until `Fetch.release`.

        Returns at once. At the deadline, seconds from now (less than 0 counts as 0), the fetch is done with what is
        ready; reads under way are kept for others, those that have not begun are not made. A prefix longer than host
        memory can hold beside other pins, or than the stack's `pin_budget` leaves, is truncated. A fetch that is not
        released within `pin_limit_s` loses its pins, and can no longer be loaded.

        It brings what is known to be held when it begins, and waits for no probe: look up first, while `pending`.

        `owner`: a number for whoever asks, where several share this manager: reads and writes of owners take turns.
        `avoid`: names of tiers that are not to be read, because computing is faster, say.
        """
        return self._fetch(namespace.root, keys, deadline_s, keep=True, owner=owner, avoid=avoid)

    def prefetch(
        self, namespace: Namespace, keys: Keys, deadline_s: float = DEFAULT_FETCH_DEADLINE_S, *, owner: int = 0
    ) -> Fetch:
        """A fetch that nobody waits for: it gives way to others and pins nothing once it is done.

        The handle may be dropped, or cancelled.
        """
        return self._fetch(namespace.root, keys, deadline_s, keep=False, owner=owner)

    def _fetch(
        self, root: bytes, keys: Keys, deadline_s: float, *, keep: bool, owner: int, avoid: Sequence[str] = ()
    ) -> Fetch:
        self._check_open()
        keys = checked_keys(keys)
        with self._lock:
            self._namespaces.used(root)
            return self._fetches.start(root, keys, seconds(deadline_s), keep=keep, owner=owner, avoid=avoid)

    # ---------------------------------------------------------------- copies

    def load(self, fetch: Fetch, device_blocks: DeviceBlocks, *, ranks: Ranks | None = None, tag: str = "") -> Transfer:
        """Copy a fetch's ready blocks into device blocks, on all ranks.

        Args:
            device_blocks: (m,) int64, the device block for each of the first m <= fetch.ready blocks, -1 to skip
                one; with several KV groups a sequence of such arrays, one a group.
            ranks: whose device blocks they are, where it is not the devices of `register`.
            tag: the caller's name for the transfer.

        The transfer fails, and nothing is copied, if the fetch has lost its pins before the copy began.

        Raises:
            KeyInputError: more device blocks than ready blocks, or no blocks for a group.
            StateError: the fetch is not done or was released, or the model has no device.
        """
        self._check_open()
        plan = fetch.plan
        if not fetch.done or fetch.why in ("released", "cancelled"):
            raise StateError("load needs a fetch that is done and not released: call fetch.wait() first")
        with self._lock:
            reset = plan is None or not self._planner.is_live(plan.root)
        if plan is None or reset or fetch.released:
            transfer = Transfer(tag)
            transfer.settle(0, f"the fetch was {fetch.why or 'reset'}")
            return transfer
        return self._copies.load(fetch, plan, ranks or self._namespaces.ranks_of(plan.root), device_blocks, tag)

    def store(
        self,
        namespace: Namespace,
        keys: Keys,
        device_blocks: DeviceBlocks,
        *,
        ranks: Ranks | None = None,
        tag: str = "",
        owner: int = 0,
    ) -> Transfer:
        """Copy device blocks to host memory, commit them, and let them sink to the lower tiers behind the call.

        Args:
            keys: (n, 32) uint8, from the namespace's first block on.
            device_blocks: (n,) int64, -1 where the caller offers none; with several KV groups one array a group.
                Blocks that host memory holds already are not copied again.
            ranks, tag: as for `load`. owner: as for `fetch`.

        The transfer is done when the blocks are committed in host memory. The device blocks must not change
        before that. With several ranks a block is committed when all have copied; if one fails, none is.
        """
        self._check_open()
        keys = checked_keys(keys)
        ranks = ranks or self._namespaces.ranks_of(namespace.root)
        with self._lock:
            groups = self._planner.groups(namespace.root)
        table = np.full((len(groups), len(keys)), -1, np.int64)
        for group, blocks in enumerate(by_group(device_blocks, len(groups), len(keys), "device_blocks")):
            check_blocks(ranks, group, blocks)
            table[group, : len(blocks)] = blocks
        return self._copies.store(namespace.root, keys, table, ranks, tag, owner)

    def cancel(self, transfer: Transfer | Fetch) -> None:
        """Give up a fetch or a transfer, at any point. It will be done soon; if it is done, nothing happens.

        A fetch loses its pins, and what only it waits for is not read. A store commits nothing unless it has; its
        device blocks may be used again when it is done. A load that has begun ends as if nothing had been said.
        """
        if isinstance(transfer, Fetch):
            self._scheduler.call(self._fetches.cancel, transfer)
        elif not transfer.done:
            transfer.cancelled = True

    # ---------------------------------------------------------------- what comes and goes

    def watch(self, watcher: Watcher) -> None:
        """Tell it which copies come and go, from now on: in host memory, and in the lower tiers whose capacity is kept
        here; one that bounds itself says nothing of what it forgets. What is held already is not told."""
        self._check_open()
        with self._lock:
            self._planner.watch(watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """Tell it no more. Safe to call twice."""
        with self._lock:
            self._planner.unwatch(watcher)

    def tell_held(self, namespace: Namespace, keys: Keys, first: int, watcher: Watcher) -> None:
        """Tell a watcher, before this returns, which blocks of a path those tiers hold, from position `first` on.

        None of a namespace that is not registered, or was reset.
        """
        with self._lock:
            self._planner.tell_held(namespace.root, keys, first, watcher)

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
            tiers: by tier name, in the stack's order, the figures of `TierBook.figures` (what it holds and has room
                for: `free_blocks` by bytes of a slot; blocks and bytes read, written, stored, evicted, hit, missed,
                corrupt, failed, dropped, found by probes; `probes` that were answered, `dropped_probes` for which there
                was no room) and of its process: `state` ("starting", "ready", "backoff", "closed"), `queued_blocks` by
                "read", "prefetch" and "write", `restarts`, `pid` and `last_error`
                (None where there is none), `unexpected_answers`; of a lower tier also `health` ("ok", "degraded",
                "away") and `breaker`: state of `read` and `write`, `opened`, `rejected_blocks`, `last_trouble`.
            asked_blocks: that fetches asked for; miss_blocks: of these, what they did not get. Prefetches count in
                neither.
            fetches, pending_stores: under way now. pinned_fetches: not released yet; pinned_bytes: of host memory,
                that they keep.
            truncated_fetches: cut to the budget of pins. expired_fetches: released because their time was up.
            refused_blocks: blocks of stores for which host memory had no room that is not pinned.
            refused_stores: stores refused because `MAX_PENDING_STORES` were under way.
            epochs: `error`: why the last reset is not on disk everywhere it should be, or None.
            verify: whether seals are checked.
        """
        with self._lock:
            queues = self._scheduler.queues()
            tiers = {}
            for book in self._books:
                figures = book.figures()
                queue = queues.get(book.number)
                figures["state"] = queue.link.state if queue else "ready"
                figures["queued_blocks"] = queue.queued_blocks if queue else {}
                figures["restarts"] = queue.link.restarts if queue else 0
                figures["pid"] = queue.link.pid if queue else None
                figures["last_error"] = queue.link.last_error if queue else None
                figures["unexpected_answers"] = queue.link.unexpected_answers if queue else 0
                figures.update(queue.health.figures() if queue else {"health": "ok"})
                tiers[book.name] = figures
            return {
                "tiers": tiers,
                "asked_blocks": self._planner.asked_blocks,
                "miss_blocks": self._planner.miss_blocks,
                "fetches": self._fetches.waiting,
                "pinned_fetches": self._fetches.pinned,
                "pinned_bytes": self._planner.pinned_bytes,
                "truncated_fetches": self._planner.truncated_fetches,
                "expired_fetches": self._fetches.expired,
                "pending_stores": self._copies.pending_stores,
                "refused_blocks": self._planner.refused_blocks,
                "refused_stores": self._copies.refused_stores,
                "epochs": {"error": self._namespaces.error},
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
        self._fetches.settle_all()
        self._copies.settle_all()
        self._namespaces.close()
        if clean:
            self._region.close()
        else:
            logger.warning("a tier did not stop in time: its host memory is kept until this process ends")

    def _check_open(self) -> None:
        if self._closed:
            raise ManagerClosedError("this manager was closed: open another one")
