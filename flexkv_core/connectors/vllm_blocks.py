"""vLLM's block tables, as the server wants them; and the blocks that vLLM lets go before their request ends.

Of a group that needs a window or a state only, vLLM frees blocks while their request runs: those of a prompt that is
longer than its window are free in the step after they were computed. Owns that such a block is still stored if vLLM
retains it for its own cache (`prefix_cache_retention_interval` says which: by default those that end a prompt, or a
part that prompts share), and that none is given to another request while a copy of it may run. Does not own what is
stored when.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flexkv_core.layout import KVGroup
from flexkv_core.server import ClientTransfer

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

NULL_BLOCK = 0
"""vLLM's block that stands for none, as before a sliding window."""

DeviceTables = Sequence[Sequence[int]]
"""A request's device blocks, by KV group."""


class DeviceBlocks:
    """See the module's docstring. The scheduler's thread only.

    Args:
        groups: of the model. hold_s: no block is kept from vLLM for longer than this.
    """

    def __init__(self, groups: Sequence[KVGroup], *, hold_s: float) -> None:
        self._early = [number for number, group in enumerate(groups) if group.coverage.kind != "all"]
        self._hold_s = hold_s
        self._manager: KVCacheManager | None = None
        self._noted: dict[str, dict[int, list[Any]]] = {}
        self._held: dict[str, tuple[ClientTransfer, list[Any], float]] = {}

    def bind(self, manager: KVCacheManager) -> None:
        """vLLM's own tables."""
        self._manager = manager

    def of(self, request_id: str) -> DeviceTables | None:
        """vLLM's tables of a request, if it has shown them."""
        return None if self._manager is None else self._manager.get_block_ids(request_id)

    def note(self, request_id: str) -> None:
        """The request computes in this step: note which of its blocks may be freed before they are stored."""
        if not self._early or self._manager is None:
            return
        noted = self._noted.setdefault(request_id, {})
        blocks = self._manager.get_blocks(request_id).blocks
        for group in self._early:
            before = noted.get(group, [])
            noted[group] = [
                before[at] if block.is_null and at < len(before) else (block, block.block_hash)
                for at, block in enumerate(blocks[group])
            ]

    def forget(self, request_id: str) -> None:
        """Its blocks are no longer what was noted."""
        self._noted.pop(request_id, None)

    def stored(self, request_id: str, tables: DeviceTables, first: int, last: int) -> list[npt.NDArray[np.int64]]:
        """As `rows`, with blocks that vLLM has freed since they were noted, if it retains them still."""
        made = rows(tables, first, last)
        for group, noted in self._noted.get(request_id, {}).items():
            row = made[group]
            for at in np.flatnonzero(row[first : len(noted)] < 0) + first:
                block, digest = noted[at]
                # vLLM takes the digest away when it gives the block to another.
                if digest is not None and block.ref_cnt == 0 and block.block_hash == digest:
                    row[at] = block.block_id
        return made

    def hold(self, tag: str, store: ClientTransfer, tables: Sequence[npt.NDArray[np.int64]]) -> None:
        """Keep the blocks that vLLM may free from being given to others until their store has ended."""
        if not self._early or self._manager is None:
            return
        pool = self._manager.block_pool
        blocks = [pool.blocks[block] for group in self._early for block in tables[group] if block >= 0]
        if blocks:
            pool.touch(blocks)
            self._held[tag] = (store, blocks, time.monotonic() + self._hold_s)

    def release(self) -> list[tuple[str, ClientTransfer]]:
        """Let go what is stored; the stores whose time is up are returned: no copy of theirs may run any more."""
        late = []
        for tag, (store, blocks, until) in list(self._held.items()):
            if not store.ended:
                if time.monotonic() < until:
                    continue
                late.append((tag, store))
            del self._held[tag]
            if self._manager is not None:
                self._manager.block_pool.free_blocks(reversed(blocks))
        return late

    @property
    def holding(self) -> bool:
        return bool(self._held)


def rows(tables: DeviceTables, first: int, last: int) -> list[npt.NDArray[np.int64]]:
    """A row a KV group: device blocks of positions 0 to `last`; -1 before `first` and where vLLM has its null block."""
    made = []
    for ids in tables:
        row = np.full(last, -1, np.int64)
        part = np.asarray(ids[first:last], np.int64)
        row[first : first + len(part)] = np.where(part == NULL_BLOCK, -1, part)
        made.append(row)
    return made
