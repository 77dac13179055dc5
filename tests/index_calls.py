"""Parts of the pair of indexes: weights, namespaces, calls that must raise, how answers are compared and told."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from flexkv_core.blocks import block_keys
from flexkv_core.index import MAX_SLOT, NO_SLOT, GroupRule, Index

Path = tuple[int, ...]
UNORDERED = ("copies", "evict_range", "remove_subtree")
WEIGHTS = {
    "insert": 16,
    "insert_with_gaps": 8,
    "insert_deeper_part": 6,
    "match": 6,
    "residency": 3,
    "touch": 14,
    "hits_for_all": 0.5,
    "copies": 2,
    "advance": 2,
    "pin": 6,
    "unpin": 7,
    "remove": 5,
    "remove_subtree": 1.5,
    "evict": 12,
    "drop_tier": 0.3,
    "new_namespace": 2,
    "retire_namespace": 0.7,
    "recover": 9,
    "recover_contradictions": 1,
    "end_recovery": 1,
    "bad_arguments": 2,
}
"""How often each transition is chosen, by name of the method."""


@dataclass(eq=False)
class Space:
    """A namespace, and the paths that were used in it."""

    root: bytes
    rules: list[GroupRule]
    retired: bool = False
    paths: deque[Path] = field(default_factory=deque)

    def keys(self, path: Path) -> np.ndarray:
        return block_keys(np.array(path, np.int32), 1, self.root)


Pinned = tuple[Space, Path, int, int]
"""A position by the path that ends there, tier and group."""


@dataclass(frozen=True, eq=False)
class Range:
    """Positions [start, stop) of a path in a column."""

    space: Space
    path: Path
    tier: int
    group: int
    start: int
    stop: int

    def positions(self, start: int, stop: int) -> list[Pinned]:
        """Names of some positions of this path and column."""
        return [(self.space, self.path[: at + 1], self.tier, self.group) for at in range(start, stop)]


@dataclass
class Piece:
    """Arguments of one call of recover."""

    space: Space
    tier: int
    group: int
    keys: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    slots: np.ndarray
    refused: np.ndarray
    """(n,) bool: contradicts the tree whatever has happened in between."""


def bad_calls(dice: Random, space: Space, keys: np.ndarray, tiers: int) -> list[tuple[Any, ...]]:
    """(method, *arguments): calls that must raise, with one thing wrong in each."""
    n, tier = len(keys), dice.randrange(tiers)
    slots = np.arange(n, dtype=np.int64) + (1 << 39)
    depths = np.arange(n, dtype=np.int64)
    high, low = slots.copy(), slots.copy()
    high[-1], low[0] = MAX_SLOT + 1, -2
    column = dice.choice([(tiers, 0), (-1, 0), (tier, len(space.rules)), (tier, -1)])
    start, stop = dice.choice([(-1, n), (n, n - 1), (0, n + 1), (n + 1, n + 1)])
    bad_keys = dice.choice([keys.astype(np.int8), keys[:, :31], keys.reshape(-1), keys.tobytes()])
    root, stranger = space.root, bytes(32)
    calls: list[tuple[Any, ...]] = [(name, root, bad_keys) for name in ("match", "touch", "remove_subtree")]
    calls += [(name, stranger, keys) for name in ("match", "touch", "remove_subtree")]
    calls += [(name, root, bad_keys, tier, 0, 0, 0) for name in ("pin", "unpin", "remove")]
    calls += [(name, stranger, keys, tier, 0, 0, n) for name in ("pin", "unpin", "remove")]
    calls += [(name, root, keys, *column, 0, n) for name in ("pin", "unpin", "remove")]
    calls += [(name, root, keys, tier, 0, start, stop) for name in ("pin", "unpin", "remove")]
    calls += [
        ("residency", root, bad_keys, tier, 0),
        ("residency", root, keys, *column),
        ("residency", stranger, keys, tier, 0),
        ("copies", root, *column),
        ("copies", stranger, tier, 0),
        ("retire_namespace", stranger),
        ("evict", tiers, 1),
        ("evict", -1, 1),
        ("evict", tier, -1),
        ("count", tiers),
        ("count", -1),
        ("drop_tier", tiers),
        ("drop_tier", -1),
        ("add_namespace", root[:31], [GroupRule()]),
    ]
    if not space.retired:
        calls += [("insert", root, bad_keys, tier, 0, slots), ("insert", root, keys, *column, slots)]
        calls += [("insert", root, keys, tier, 0, bad) for bad in (high, low, slots[1:], slots.astype(np.int32))]
        calls += [
            ("recover", root, tier, 0, bad_keys, keys, depths, slots),
            ("recover", root, tier, 0, keys, bad_keys, depths, slots),
            ("recover", root, *column, keys, keys, depths, slots),
            ("recover", root, tier, 0, keys, keys, depths - 1, slots),
            ("recover", root, tier, 0, keys, keys, depths[1:], slots),
            ("recover", root, tier, 0, keys, keys, depths.astype(np.int32), slots),
            ("recover", root, tier, 0, keys, keys, depths, high),
            ("recover", root, tier, 0, keys, keys, depths, low),
            ("recover", root, tier, 0, keys, keys, depths, np.full(n, NO_SLOT, np.int64)),
            ("recover", root, tier, 0, keys, keys, depths, slots[1:]),
        ]
    return calls


def outcome(side: Index, method: str, arguments: tuple[Any, ...]) -> Any:
    try:
        return getattr(side, method)(*arguments)
    except Exception as error:
        return error


def normal(method: str, answer: Any) -> list[Any]:
    """The answer as a list of arrays and plain values; of unordered ones the rows are sorted by slot."""
    parts = list(answer) if isinstance(answer, tuple) else [answer]
    if method in UNORDERED and answer is not None:
        order = np.argsort(answer.slots, kind="stable")
        parts = [part[order] for part in parts]
    return parts


def same(method: str, left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right), method
    for one, other in zip(left, right, strict=True):
        assert type(one) is type(other), (method, one, other)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, (method, one.dtype, other.dtype)
            assert one.shape == other.shape, (method, one.shape, other.shape)
            assert (one == other).all(), (method, one, other)
        else:
            assert one == other, (method, one, other)


def runs_of(positions: list[int]) -> list[tuple[int, int]]:
    """Ascending positions as ranges [start, stop)."""
    runs: list[tuple[int, int]] = []
    for at in positions:
        if runs and runs[-1][1] == at:
            runs[-1] = (runs[-1][0], at + 1)
        else:
            runs.append((at, at + 1))
    return runs


def rows_of(keys: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)


def brief(arguments: tuple[Any, ...]) -> str:
    """Arguments for the log: arrays of keys by length and last key."""
    shown = []
    for each in arguments:
        if isinstance(each, np.ndarray) and each.ndim == 2:
            shown.append(f"<{len(each)} keys{' ..' + each[-1, :3].tobytes().hex() if len(each) else ''}>")
        elif isinstance(each, bytes):
            shown.append(each.hex()[:6])
        else:
            shown.append(repr(each)[:80].replace("\n", ""))
    return f"({', '.join(shown)})"
