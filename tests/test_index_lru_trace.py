"""Exact LRU on a real trace: the index agrees block for block with an OrderedDict, and with known totals.

Trace: Mooncake's conversation trace (Qin et al., FAST '25), 512 tokens a block; blocks that are complete count.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_examples import INDEXES

from flexkv_core.index import NO_SLOT, GroupRule

TRACE = Path(__file__).parents[1] / "data" / "conversation_trace.jsonl.gz"
ROOT = hashlib.sha256(b"trace").digest()
BLOCK = 512


@pytest.fixture(scope="module")
def requests() -> list[list[int]]:
    with gzip.open(TRACE, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return [row["hash_ids"][: row["input_length"] // BLOCK] for row in rows]


def ordered_dict_hits(requests: list[list[int]], capacity: int | None) -> list[int]:
    """The independent count: leading run of present ids are hits; ids move to the end deepest first."""
    present: OrderedDict[int, None] = OrderedDict()
    hits = []
    for ids in requests:
        run = 0
        while run < len(ids) and ids[run] in present:
            run += 1
        hits.append(run)
        for block in reversed(ids):
            present[block] = None
            present.move_to_end(block)
        while capacity is not None and len(present) > capacity:
            present.popitem(last=False)
    return hits


def chained_keys(requests: list[list[int]]) -> list[np.ndarray]:
    """An id stands for one prefix, so it determines its chain: a digest for each id, all ids under one parent."""
    parents: dict[int, int] = {}
    keys: dict[int, bytes] = {}
    arrays = []
    for ids in requests:
        parent, key = -1, ROOT
        for block in ids:
            assert parents.setdefault(block, parent) == parent, "the trace's ids are not chained"
            if block not in keys:
                keys[block] = hashlib.sha256(block.to_bytes(8, "little") + key).digest()
            parent, key = block, keys[block]
        arrays.append(np.frombuffer(b"".join(keys[b] for b in ids), np.uint8).reshape(-1, 32))
    return arrays


def index_hits(made: Any, arrays: list[np.ndarray], capacity: int | None) -> tuple[list[int], int]:
    index = made(1, ["lru"])
    index.add_namespace(ROOT, [GroupRule()])
    hits, evicted, next_slot = [], 0, 0
    free: list[int] = []
    for keys in arrays:
        match = index.match(ROOT, keys)
        hits.append(match.blocks)
        # as the count does: whatever of the request is held moves up, then its blocks come in, then the oldest go
        slots = np.full(len(keys), NO_SLOT, np.int64)
        held = np.zeros(len(keys), bool)
        held[: match.slots.shape[1]] = match.slots[0] != NO_SLOT
        for i in np.flatnonzero(~held).tolist():
            if free:
                slots[i] = free.pop()
            else:
                slots[i], next_slot = next_slot, next_slot + 1
        index.touch(ROOT, keys[: match.blocks])
        room = 0 if capacity is None else index.count(0) + int((~held).sum()) - capacity
        if room > 0:
            gone = index.evict(0, room)
            assert gone is not None
            evicted += room
            free.extend(gone.slots.tolist())
        index.insert(ROOT, keys, 0, 0, slots)
        assert capacity is None or index.count(0) <= capacity
    return hits, evicted


@pytest.mark.parametrize("made", INDEXES)
def test_unbounded_totals(made: Any, requests: list[list[int]]) -> None:
    hits, _ = index_hits(made, chained_keys(requests), None)
    assert sum(len(ids) for ids in requests) == 276_491
    assert sum(hits) == 105_592
    assert hits == ordered_dict_hits(requests, None)


@pytest.mark.parametrize("made", INDEXES)
@pytest.mark.parametrize("capacity", [10_000, 30_000])
def test_bounded_is_exactly_lru(made: Any, requests: list[list[int]], capacity: int) -> None:
    hits, evicted = index_hits(made, chained_keys(requests), capacity)
    print(f"capacity {capacity}: {sum(hits)} hits, {evicted} evicted")
    expected = ordered_dict_hits(requests, capacity)
    assert evicted > 100_000
    assert hits == expected
