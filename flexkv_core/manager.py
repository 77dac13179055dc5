"""The manager: what engines, libraries, the CLI and the server call.

`KVCacheManager` ties the planner (what moves where) to the scheduler (moving it) and to devices. It owns their
lives and the handles that callers hold. Errors of storage never come out of it: they are misses and counters.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from flexkv_core.blocks import Namespace
from flexkv_core.books import make_planner, open_books, open_epochs
from flexkv_core.config import StackConfig, TierConfig, dump_with_secrets, load_to_open
from flexkv_core.copying import Copies, DeviceBlocks, Ranks, by_group, check_blocks
from flexkv_core.device import Device
from flexkv_core.errors import (
    KeyInputError,
    KeyTypeError,
    LayoutError,
    ManagerClosedError,
    StateError,
    UnknownNamespaceError,
)
from flexkv_core.fetching import Fetches
from flexkv_core.handles import Fetch, Lookup, Transfer
from flexkv_core.index import Keys
from flexkv_core.layout import ModelSpec
from flexkv_core.plans import HOST
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
MOST_IDLE_NAMESPACES = 1024
"""Registered without a device: beyond that many, the one that was not used for longest is unregistered."""
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
    ) -> None:
        self._stack = stack
        self._lock = threading.RLock()
        self._closed = False
        self._ranks: dict[bytes, Ranks] = {}
        self._naming = threading.Lock()  # taken before `_lock`: registrations and resets, which wait for a disk
        self._registered: dict[bytes, Namespace] = {}  # root without an epoch -> its namespace now
        self._idle: OrderedDict[bytes, Namespace] = OrderedDict()  # root -> one without a device; the latest used last
        opened = open_books(stack)
        self._region = HostRegion.create(
            opened.host_bytes,
            huge_pages="try" if opened.huge_pages else "off",
            prefault=opened.prefault,
            progress=progress,
            threads=opened.threads,
        )
        try:
            self._epochs, self._forgetful = open_epochs(stack.state_directory, opened)
        except BaseException:
            self._region.close()
            raise
        self._books = opened.books
        self._planner = make_planner(
            opened.books, pin_budget_bytes=int(stack.pin_budget * self._region.size), index=stack.index
        )
        self._scheduler = Scheduler(self._planner, self._lock, self._region, verify=verify)
        self._fetches = Fetches(self._planner, self._scheduler, self._lock, stack.pin_limit_s)
        self._copies = Copies(self._planner, self._scheduler, self._fetches, self._lock, self._region)
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
        self._scheduler.add_tier(book.number, link, limit, in_flight, tier.breaker)

    # ---------------------------------------------------------------- models

    def register(self, model: ModelSpec, device: Device | Sequence[Device] | None = None) -> Namespace:
        """Make a model known: its namespace, its slot classes, and the devices that hold its paged KV.

        Args:
            model: groups and block bytes.
            device: needed for `load` and `store`: one, or one a rank in the order of the ranks; their blocks must have
                the bytes that the model's groups say (`KVGroup.shards`). Namespaces without one are unregistered, the
                least recently used first, when there are more than `MOST_IDLE_NAMESPACES`.

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
        name = Namespace.of(model).root
        ranks = None
        if device is not None:
            ranks = Ranks.of(device if isinstance(device, Sequence) else [device], model)
        with self._naming:
            namespace = self._registered.get(name) or Namespace.of(model, self._epochs.of(name))
            with self._lock:
                self._planner.add_model(namespace.root, model.groups)
                self._registered[name] = namespace
                if ranks is not None:
                    self._ranks[namespace.root] = ranks
                self._note_idle(namespace)
        return namespace

    def unregister(self, namespace: Namespace) -> None:
        """Say that a model or an adapter is not used any more: its devices are let go.

        Its blocks stay cached until they are evicted, and `register` finds them again; until then the namespace may
        be unknown. Transfers under way end as if nothing had been said: wait for them before device memory goes.

        Raises UnknownNamespaceError for a namespace that is not registered, or was reset.
        """
        self._check_open()
        name = _name_of(namespace)
        with self._naming, self._lock:
            if self._registered.get(name) != namespace:
                raise UnknownNamespaceError("this namespace is not registered or was reset: nothing to unregister")
            self._forget(name, namespace)

    def _note_idle(self, namespace: Namespace) -> None:
        """A namespace was registered or reset (under both locks): keep those without a device bounded."""
        if namespace.root in self._ranks:
            self._idle.pop(namespace.root, None)
            return
        self._idle[namespace.root] = namespace
        self._idle.move_to_end(namespace.root)
        if len(self._idle) > MOST_IDLE_NAMESPACES:
            oldest = next(iter(self._idle.values()))
            self._forget(_name_of(oldest), oldest)

    def _forget(self, name: bytes, namespace: Namespace) -> None:
        """Unregister, under both locks. What was called before goes first: the owner thread may not have begun it."""
        root = namespace.root
        del self._registered[name]
        self._ranks.pop(root, None)
        self._idle.pop(root, None)

        def leave() -> None:
            with self._lock:
                if self._registered.get(name) != namespace:
                    self._planner.leave(root)

        self._scheduler.call(leave)

    def _used(self, root: bytes) -> None:
        """Under the lock."""
        if root in self._idle:
            self._idle.move_to_end(root)

    def reset(self, namespace: Namespace) -> Namespace:
        """Move to a fresh epoch: from now on nothing that was cached under the old one is found or loaded.

        Deletes nothing: the old epoch's blocks are evicted first. What was stored, fetched or planned under the old one
        and is still under way commits to nothing. Returns the namespace to use from now on, with the same devices, when
        the new epoch is on disk, so that it outlives this process (`epochs.py`; if that fails, the reset counts all the
        same, and `stats()["epochs"]["error"]` says why).

        Raises:
            UnknownNamespaceError: the namespace is not registered, or was reset already.
            StateError: nothing was reset, because a tier would serve the old blocks after a restart: it is persistent
                (or has not said yet), and neither it nor the stack has a place to remember a reset.
        """
        self._check_open()
        name = _name_of(namespace)
        with self._naming:
            with self._lock:
                groups = self._planner.groups(namespace.root)
            self._check_remembered()
            fresh = dataclasses.replace(namespace, epoch=self._epochs.renew(name))
            with self._lock:
                self._planner.retire(namespace.root)
                self._planner.add_model(fresh.root, groups)
                ranks = self._ranks.pop(namespace.root, None)
                if ranks is not None:
                    self._ranks[fresh.root] = ranks
                self._registered[name] = fresh
                self._idle.pop(namespace.root, None)
                self._note_idle(fresh)
        self._scheduler.call(self._fetches.reset, namespace.root)
        return fresh

    def _check_remembered(self) -> None:
        queues = self._scheduler.queues()
        for number in self._forgetful:
            said = queues[number].link.capabilities
            if said is None or said.persistent:
                raise StateError(
                    f"tier {self._books[number].name} would serve the old blocks after a restart, as nothing would "
                    "remember the reset: name a state_directory in the stack"
                )

    # ---------------------------------------------------------------- lookups and fetches

    def lookup(self, namespace: Namespace, keys: Keys) -> Lookup:
        """Say how much of a prefix the cache has. Runs in the caller's thread; asks no backend.

        Args:
            keys: (n, 32) uint8, from the namespace's first block on, as `block_keys` makes them.
        """
        self._check_open()
        keys = _checked_keys(keys)
        with self._lock:
            self._used(namespace.root)
            blocks, host_blocks = self._planner.lookup(namespace.root, keys)
            pending = any(queue.link.state == "starting" for queue in self._scheduler.queues().values())
        return Lookup(blocks, host_blocks, pending and blocks < len(keys))

    def fetch(self, namespace: Namespace, keys: Keys, deadline_s: float = DEFAULT_FETCH_DEADLINE_S) -> Fetch:
        """Bring the longest held prefix into host memory, verified, and pin it there until `Fetch.release`.

        Returns at once. At the deadline, seconds from now (less than 0 counts as 0), the fetch is done with what is
        ready; reads under way are kept for others, those that have not begun are not made. A prefix longer than host
        memory can hold beside other pins, or than the stack's `pin_budget` leaves, is truncated. A fetch that is not
        released within `pin_limit_s` loses its pins, and can no longer be loaded.
        """
        return self._fetch(namespace.root, keys, deadline_s, keep=True)

    def prefetch(self, namespace: Namespace, keys: Keys, deadline_s: float = DEFAULT_FETCH_DEADLINE_S) -> Fetch:
        """A fetch that nobody waits for: it gives way to others and pins nothing once it is done.

        The handle may be dropped, or cancelled.
        """
        return self._fetch(namespace.root, keys, deadline_s, keep=False)

    def _fetch(self, root: bytes, keys: Keys, deadline_s: float, *, keep: bool) -> Fetch:
        self._check_open()
        keys = _checked_keys(keys)
        with self._lock:
            self._used(root)
            return self._fetches.start(root, keys, _seconds(deadline_s), keep=keep)

    # ---------------------------------------------------------------- copies

    def load(self, fetch: Fetch, device_blocks: DeviceBlocks) -> Transfer:
        """Copy a fetch's ready blocks into device blocks, on all ranks.

        Args:
            device_blocks: (m,) int64, the device block for each of the first m <= fetch.ready blocks, -1 to skip
                one; with several KV groups a sequence of such arrays, one a group.

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
            transfer = Transfer()
            transfer.settle(0, f"the fetch was {fetch.why or 'reset'}")
            return transfer
        return self._copies.load(fetch, plan, self._ranks_of(plan.root), device_blocks)

    def store(self, namespace: Namespace, keys: Keys, device_blocks: DeviceBlocks) -> Transfer:
        """Copy device blocks to host memory, commit them, and let them sink to the lower tiers behind the call.

        Args:
            keys: (n, 32) uint8, from the namespace's first block on.
            device_blocks: (n,) int64, -1 where the caller offers none; with several KV groups one array a group.
                Blocks that host memory holds already are not copied again.

        The transfer is done when the blocks are committed in host memory. The device blocks must not change
        before that. With several ranks a block is committed when all have copied; if one fails, none is.
        """
        self._check_open()
        keys = _checked_keys(keys)
        ranks = self._ranks_of(namespace.root)
        with self._lock:
            groups = self._planner.groups(namespace.root)
        table = np.full((len(groups), len(keys)), -1, np.int64)
        for group, blocks in enumerate(by_group(device_blocks, len(groups), len(keys), "device_blocks")):
            check_blocks(ranks, group, blocks)
            table[group, : len(blocks)] = blocks
        return self._copies.store(namespace.root, keys, table, ranks)

    def cancel(self, transfer: Transfer | Fetch) -> None:
        """Give up a fetch or a transfer, at any point. It will be done soon; if it is done, nothing happens.

        A fetch loses its pins, and what only it waits for is not read. A store commits nothing unless it has; its
        device blocks may be used again when it is done. A load that has begun ends as if nothing had been said.
        """
        if isinstance(transfer, Fetch):
            self._scheduler.call(self._fetches.cancel, transfer)
        elif not transfer.done:
            transfer.cancelled = True

    def _ranks_of(self, root: bytes) -> Ranks:
        ranks = self._ranks.get(root)
        if ranks is None:
            with self._lock:
                self._planner.groups(root)  # raises for a namespace that is not registered, or was reset
            raise StateError("this namespace has no device: pass device=... to register()")
        return ranks

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
                figures["queued_blocks"] = queue.queued_blocks if queue else 0
                figures["restarts"] = queue.link.restarts if queue else 0
                figures["pid"] = queue.link.pid if queue else None
                figures["last_error"] = queue.link.last_error if queue else None
                figures["unexpected_answers"] = queue.link.unexpected_answers if queue else 0
                figures.update(queue.health.figures() if queue else {"health": "ok"})
                tiers[book.name] = figures
            return {
                "tiers": tiers,
                "fetches": self._fetches.waiting,
                "pinned_fetches": self._fetches.pinned,
                "pinned_bytes": self._planner.pinned_bytes,
                "truncated_fetches": self._planner.truncated_fetches,
                "expired_fetches": self._fetches.expired,
                "pending_stores": self._copies.pending_stores,
                "refused_blocks": self._planner.refused_blocks,
                "refused_stores": self._copies.refused_stores,
                "epochs": {"error": self._epochs.error},
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
        self._epochs.close()
        if clean:
            self._region.close()
        else:
            logger.warning("a tier did not stop in time: its host memory is kept until this process ends")

    def _check_open(self) -> None:
        if self._closed:
            raise ManagerClosedError("this manager was closed: open another one")


def _name_of(namespace: Namespace) -> bytes:
    """What names it in all epochs: its root without one."""
    return dataclasses.replace(namespace, epoch=b"").root


def _checked_keys(keys: Keys) -> Keys:
    if not isinstance(keys, np.ndarray) or keys.dtype != np.uint8:
        kind = f"{keys.dtype} array" if isinstance(keys, np.ndarray) else type(keys).__name__
        raise KeyTypeError(f"keys is a {kind}: pass the (n, 32) uint8 array that block_keys() returns")
    if keys.ndim != 2 or keys.shape[1] != 32:
        raise KeyInputError(f"keys has shape {keys.shape}: pass an array of shape (n, 32)")
    return np.ascontiguousarray(keys)


def _seconds(deadline_s: float) -> float:
    return max(0.0, float(deadline_s))  # in this order, so that NaN is 0: it would confuse the loop's timers
