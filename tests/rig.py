"""An engine with any KV groups on any number of ranks, for the manager's tests. Content derives from key and group.

Shares nothing with the path under test: bytes come from hashlib, each rank's part is cut by the sizes that the test
gives, and which positions a group needs is written out here once more.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gates import GATES, PATIENCE_S, Gate, GatedDevice, until

from flexkv_core.blocks import block_keys
from flexkv_core.handles import Fetch, Transfer
from flexkv_core.layout import Coverage, KVGroup, ModelSpec
from flexkv_core.manager import KVCacheManager

BLOCK_SIZE = 4
Keys = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Group:
    """Bytes of a block on each rank; `window` blocks are needed, 0 for all, 1 for a state; `same` on every rank."""

    sizes: tuple[int, ...]
    window: int = 0
    same: bool = False
    state: bool = False

    @property
    def spec(self) -> KVGroup:
        coverage = Coverage("state") if self.state else Coverage.window(self.window) if self.window else Coverage()
        if self.same:
            return KVGroup(self.sizes[0], coverage, replicated=True)
        equal = len(set(self.sizes)) == 1
        return KVGroup(sum(self.sizes), coverage, shard_bytes=() if equal else self.sizes)

    def part(self, content: bytes, rank: int) -> bytes:
        if self.same:
            return content
        start = sum(self.sizes[:rank])
        return content[start : start + self.sizes[rank]]


PLAIN = (Group((3000,)),)
PLAIN_SLOT = 8192
"""A block of the plain model with its seal: 3,000 bytes take a page, the seal another."""


class Rig:
    def __init__(
        self, manager: KVCacheManager, groups: Sequence[Group] = PLAIN, *, pages: int = 64, model: str = "rig"
    ) -> None:
        self.manager = manager
        self.groups = groups
        self.ranks = len(groups[0].sizes)
        self.tensors = [
            [np.zeros((pages, group.sizes[rank]), np.uint8) if group.sizes[rank] else None for group in groups]
            for rank in range(self.ranks)
        ]
        self.devices = [
            GatedDevice([[tensor] if tensor is not None else [] for tensor in tensors], threads=1)
            for tensors in self.tensors
        ]
        self.spec = ModelSpec(model, BLOCK_SIZE, tuple(group.spec for group in groups), tensor_parallel=self.ranks)
        self.namespace = manager.register(self.spec, self.devices)

    @property
    def device(self) -> GatedDevice:
        return self.devices[0]

    def keys(self, seed: int, blocks: int) -> Keys:
        tokens = np.random.default_rng(seed).integers(0, 1 << 31, blocks * BLOCK_SIZE, dtype=np.int32)
        return block_keys(tokens, BLOCK_SIZE, self.namespace.root)

    def _places(self, keys: Keys) -> Iterator[tuple[int, int, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        """(position, group, the device's bytes, what they should be) of every rank."""
        for at, key in enumerate(keys):
            for number, group in enumerate(self.groups):
                size = group.sizes[0] if group.same else sum(group.sizes)
                content = hashlib.shake_128(bytes([number]) + key.tobytes()).digest(size)
                for rank in range(self.ranks):
                    tensor = self.tensors[rank][number]
                    if tensor is not None:
                        yield at, number, tensor[at], np.frombuffer(group.part(content, rank), np.uint8)

    def fill(self, keys: Keys) -> None:
        """Compute a prefix into device blocks 0.."""
        for _, _, place, content in self._places(keys):
            place[:] = content

    def wrong(self, keys: Keys, blocks: int) -> int:
        """How many blocks that the engine needs to go on after `blocks` are not what they should be."""
        wrong = 0
        for at, number, place, content in self._places(keys[:blocks]):
            group = self.groups[number]
            span = 1 if group.state else group.window or blocks
            wrong += at >= blocks - span and not np.array_equal(place, content)
        return wrong

    def begin_store(self, keys: Keys) -> Transfer:
        self.fill(keys)
        blocks = np.arange(len(keys), dtype=np.int64)
        return self.manager.store(self.namespace, keys, [blocks] * len(self.groups))

    def store(self, keys: Keys) -> int:
        """Store and wait until it has sunk as far as it goes."""
        transfer = self.begin_store(keys)
        assert transfer.wait(PATIENCE_S)
        assert transfer.error is None, transfer.error
        assert self.manager.drain(PATIENCE_S)
        return transfer.blocks

    def fetch(self, keys: Keys, deadline_s: float = PATIENCE_S) -> Fetch:
        return self.manager.fetch(self.namespace, keys, deadline_s)

    def begin_load(self, fetch: Fetch) -> Transfer:
        for tensor in itertools.chain(*self.tensors):
            if tensor is not None:
                tensor[:] = 0xDD
        return self.manager.load(fetch, [np.arange(fetch.ready, dtype=np.int64)] * len(self.groups))

    def load(self, keys: Keys) -> tuple[int, int]:
        """Fetch and load; returns (blocks ready, blocks wrong)."""
        fetch = self.fetch(keys)
        assert fetch.wait(PATIENCE_S)
        transfer = self.begin_load(fetch)
        assert transfer.wait(PATIENCE_S)
        assert transfer.error is None, transfer.error
        fetch.release()
        return fetch.ready, self.wrong(keys, fetch.ready)

    def found(self, keys: Keys) -> tuple[int, int]:
        """(blocks in some tier, blocks in host memory)."""
        found = self.manager.lookup(self.namespace, keys)
        return found.blocks, found.host_blocks

    def evict_host(self, blocks: int) -> None:
        """Push everything that is not pinned out of host memory, with other prompts."""
        for seed in range(10_000, 10_000 + blocks):
            self.store(self.keys(seed, 1))


def settled(manager: KVCacheManager) -> dict[str, Any]:
    """Stats once the owner thread has done all that callers have asked for so far."""
    manager._scheduler.ask(lambda: None)
    return manager.stats()


def nothing_left(manager: KVCacheManager) -> None:
    """No pins, no fetches, no transfers; and all host memory is that of copies."""
    assert manager.drain(PATIENCE_S)
    stats = settled(manager)
    assert (stats["fetches"], stats["pinned_fetches"], stats["pinned_bytes"], stats["pending_stores"]) == (0, 0, 0, 0)
    planner = manager._planner
    with manager._lock:
        assert planner.index.statistics()["pinned"] == 0
        assert planner._pins.coming == 0
        assert not any(tier.queued or tier.reserved_bytes for tier in planner.tiers)
        for tier in planner.tiers:
            assert tier.presence is None or not tier.presence.pinned
            if tier.pool is not None and tier.column is not None:
                allocated = sum(tier.pool.allocated(number) for number in tier.pool.classes)
                assert allocated == planner.index.count(tier.column)


def gate_stack(host_blocks: int, *tiers: dict[str, Any], **top: Any) -> dict[str, Any]:
    """A cpu tier with room for some blocks of the plain model, over tiers at gates."""
    cpu = {"backend": "cpu", "capacity": host_blocks * PLAIN_SLOT, "prefault": False}
    return {"block_size": BLOCK_SIZE, **top, "tiers": [cpu, *tiers]}


def gate_tier(name: str = "gate", **keys: Any) -> dict[str, Any]:
    """A key-addressed tier at the gate of that name, whose write queue takes all of host memory."""
    GATES[name] = Gate()
    queue = {"write_queue": "1GiB", "in_flight": "1GiB"}
    return {"backend": "gate", "name": name, "gate": name, "isolation": "none", **queue, **keys}


def wait_ready(manager: KVCacheManager) -> None:
    """Wait until all tiers are up."""
    until(lambda: all(tier["state"] == "ready" for tier in manager.stats()["tiers"].values()))


def own(keys: Keys) -> list[bytes]:
    return [key.tobytes() for key in keys]
