"""What the manager's tests share: a small model, a device made of NumPy arrays, content that derives from keys."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core.blocks import Namespace, block_keys
from flexkv_core.device.cpu import CpuDevice
from flexkv_core.layout import KVGroup, ModelSpec
from flexkv_core.manager import KVCacheManager

LAYERS, HEADS, DIM, BLOCK_SIZE = 2, 2, 32, 16
BLOCK_BYTES = LAYERS * 2 * BLOCK_SIZE * HEADS * DIM * 2
SLOT_BYTES = -(-BLOCK_BYTES // 4096) * 4096 + 4096


class Engine:
    """The engine's side: paged KV in NumPy arrays (K and V separate, a tensor a layer), filled from keys."""

    def __init__(self, manager: KVCacheManager, pages: int = 64, model: str = "test") -> None:
        self.manager = manager
        self.tensors = [np.zeros((2, pages, BLOCK_SIZE, HEADS, DIM), np.uint16) for _ in range(LAYERS)]
        self.spec = ModelSpec(model, BLOCK_SIZE, (KVGroup(BLOCK_BYTES),))
        self.namespace: Namespace = manager.register(self.spec, CpuDevice([self.tensors], block_axis=1))

    def keys(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        return block_keys(tokens, BLOCK_SIZE, self.namespace.root)

    def fill(self, keys: npt.NDArray[np.uint8]) -> None:
        """Compute the KV of a prefix into pages 0.. (what its keys demand)."""
        for page, key in enumerate(keys):
            content = expected(key)
            for layer, tensor in enumerate(self.tensors):
                tensor[:, page] = content[layer]

    def poison(self) -> None:
        for tensor in self.tensors:
            tensor[:] = 0xDEAD

    def wrong(self, keys: npt.NDArray[np.uint8], blocks: int) -> int:
        """How many of the first pages differ from what their keys demand."""
        return sum(
            any(not np.array_equal(t[:, page], expected(keys[page])[layer]) for layer, t in enumerate(self.tensors))
            for page in range(blocks)
        )

    def store(self, keys: npt.NDArray[np.uint8], timeout_s: float = 10.0) -> int:
        self.fill(keys)
        transfer = self.manager.store(self.namespace, keys, np.arange(len(keys), dtype=np.int64))
        assert self.manager.wait(transfer, timeout_s)
        assert transfer.error is None
        return transfer.blocks

    def load(self, keys: npt.NDArray[np.uint8], deadline_s: float = 10.0) -> tuple[int, int, dict[str, int]]:
        """Fetch and load; returns (blocks ready, blocks wrong, sources)."""
        self.poison()
        fetch = self.manager.fetch(self.namespace, keys, deadline_s=deadline_s)
        assert fetch.wait(deadline_s + 5)
        ready = fetch.ready
        transfer = self.manager.load(fetch, np.arange(ready, dtype=np.int64))
        assert self.manager.wait(transfer, 10)
        fetch.release()
        return ready, self.wrong(keys, ready), fetch.sources


def expected(key: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """(layers, 2, tokens, heads, dim): the content that a key demands, by hashlib alone."""
    raw = hashlib.shake_128(key.tobytes()).digest(BLOCK_BYTES)
    return np.frombuffer(raw, np.uint16).reshape(LAYERS, 2, BLOCK_SIZE, HEADS, DIM)


def prompt(seed: int, blocks: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 1 << 31, blocks * BLOCK_SIZE, dtype=np.int32)


def stack(root: Path, host_blocks: int = 64, directory: str = "64MiB", **tier: Any) -> dict[str, Any]:
    """A cpu tier with room for some blocks over a directory tier; the write queue never overflows."""
    queue = {"write_queue": host_blocks * SLOT_BYTES}
    return {
        "block_size": BLOCK_SIZE,
        "tiers": [
            {"backend": "cpu", "capacity": host_blocks * SLOT_BYTES},
            {"backend": "directory", "capacity": directory, "root": str(root), **queue, **tier},
        ],
    }
