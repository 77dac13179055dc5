"""Small words for tests of an index by example: a path is a text, one letter a block.

`INDEXES` are the implementations that these tests are run for, by the fixtures `make_index` and `index` of conftest.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flexkv_core.blocks import block_keys
from flexkv_core.index import NO_SLOT, Evicted, GroupRule, Index
from flexkv_core.index.native import NativeIndex
from flexkv_core.index.reference import ReferenceIndex
from flexkv_core.layout import Coverage

INDEXES: list[Any] = [ReferenceIndex, NativeIndex]

MakeIndex = Callable[..., Index]
ALL, WINDOW2, STATE = Coverage(), Coverage.window(2), Coverage("state")
ROOT = hashlib.sha256(b"a namespace").digest()
OTHER = hashlib.sha256(b"another namespace").digest()
NONE = NO_SLOT


def keys(path: str, root: bytes = ROOT) -> np.ndarray:
    """(len(path), 32) uint8: chained keys."""
    return block_keys(np.array([ord(letter) for letter in path], np.int32), 1, root)


def key(path: str, root: bytes = ROOT) -> bytes:
    """The key of a path's last block; of no path, the root."""
    return keys(path, root)[-1].tobytes() if path else root


def slots_of(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def put(index: Index, path: str, *numbers: int, tier: int = 0, group: int = 0, root: bytes = ROOT) -> list[bool]:
    """Insert slots for a path's last blocks; nothing for those before."""
    slots = [NONE] * (len(path) - len(numbers)) + list(numbers)
    taken = index.insert(root, keys(path, root), tier, group, slots_of(*slots))
    assert taken.dtype == np.bool_
    assert taken.shape == (len(path),)
    return taken.tolist()


def held(index: Index, path: str, tier: int = 0, group: int = 0, root: bytes = ROOT) -> list[int]:
    return index.residency(root, keys(path, root), tier, group).tolist()


def blocks(index: Index, path: str, root: bytes = ROOT) -> int:
    return index.match(root, keys(path, root)).blocks


def recover(index: Index, *records: tuple[str, int], tier: int = 0, group: int = 0, root: bytes = ROOT) -> list[bool]:
    """Recover (path, slot) records: each stands for the path's last block."""
    paths = [path for path, _ in records]
    rows = [
        np.frombuffer(b"".join(part), np.uint8).reshape(-1, 32)
        for part in (
            [key(path, root) for path in paths],
            [key(path[:-1], root) for path in paths],
        )
    ]
    depths = slots_of(*(len(path) - 1 for path in paths))
    return index.recover(root, tier, group, *rows, depths, slots_of(*(slot for _, slot in records))).tolist()


def evicted(index: Index, count: int, tier: int = 0, slot_class: int = 0) -> list[int] | None:
    """Slots in order of eviction, or None."""
    gone = index.evict(tier, count, slot_class)
    if gone is None:
        return None
    check(gone, count)
    return gone.slots.tolist()


def all_evicted(index: Index, tier: int = 0, slot_class: int = 0) -> list[int]:
    """Evict one by one until nothing is left that can go."""
    gone: list[int] = []
    while (one := evicted(index, 1, tier, slot_class)) is not None:
        gone += one
    return gone


def three(index: Index, hits: str) -> list[int]:
    """Put a, b, c in slots 1, 2, 3; touch one after another; evict all."""
    for slot, path in enumerate("abc", 1):
        put(index, path, slot)
    for path in hits:
        index.touch(ROOT, keys(path))
    return all_evicted(index)


def check(gone: Evicted, count: int) -> None:
    assert gone.roots.shape == gone.keys.shape == (count, 32)
    assert gone.groups.shape == gone.slots.shape == (count,)
    assert (gone.roots.dtype, gone.keys.dtype, gone.groups.dtype) == (np.uint8, np.uint8, np.uint8)
    assert gone.slots.dtype == np.int64


def add(index: Index, *rules: GroupRule, root: bytes = ROOT) -> None:
    index.add_namespace(root, rules or [GroupRule()])


def figures(index: Index, *names: str) -> Sequence[int]:
    statistics = index.statistics()
    return [statistics[name] for name in names]


def snapshot(index: Index, root: bytes = ROOT, groups: int = 1) -> Any:
    """All that can be read without knowing keys; `visited` may change with a call that fails."""
    columns = [index.copies(root, tier, group) for tier in range(2) for group in range(groups)]
    rows = [
        sorted(zip(c.slots.tolist(), c.depths.tolist(), map(bytes, c.keys), map(bytes, c.parents), strict=True))
        for c in columns
    ]
    return rows, figures(index, "namespaces", "positions", "orphans", "copies", "pinned")
