"""The index: what is where. This file fixes the interface that the reference and the native index share.

An index holds one radix tree a namespace root. A tree's positions are blocks of a prefix, named by their
chained keys; for each position it keeps, by (tier, group), the slot of the copy that this slot-addressed tier
holds, if any. It knows slots as numbers: allocation is `pool.py`, bytes are nobody's business here.

Words: a *copy* is the residency of one block (position and group) in one tier. A *hole* is a position of an
`all`-coverage group that no tier of this index holds. A copy is *stranded* when a hole lies before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from flexkv_core.layout import Coverage

NO_TIER = 255
NO_SLOT = -1

Keys = npt.NDArray[np.uint8]
"""(n, 32) uint8, C-contiguous: chained block keys."""
Slots = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GroupRule:
    """What the index needs to know of a KV group: its coverage and the slot class of its blocks."""

    coverage: Coverage = Coverage()  # noqa: RUF009 - frozen, no default_factory needed
    slot_class: int = 0


class Match(NamedTuple):
    """What the index knows of a prefix.

    Attributes:
        blocks: length of the longest prefix that every group's coverage rule can be supplied for.
        tiers: (groups, n) uint8: the fastest tier that holds each block, `NO_TIER` for none; n is the number of
            leading keys that have a place in the tree, which may exceed `blocks`.
        slots: (groups, n) int64: the slot there, `NO_SLOT` for none.
    """

    blocks: int
    tiers: npt.NDArray[np.uint8]
    slots: Slots


class Evicted(NamedTuple):
    """Copies that were evicted, in order of eviction; arrays of length n."""

    roots: list[bytes]
    keys: Keys
    groups: npt.NDArray[np.uint8]
    slots: Slots


class Index(Protocol):
    """One owner calls everything; `match` may be called by any thread.

    Arrays of keys always start at the namespace's first block: `keys[i]` is position i. `start` and `stop`
    select positions. All methods raise `UnknownNamespaceError` for a root that was not added.
    """

    def __init__(self, tiers: int, policies: Sequence[str] | None = None) -> None:
        """Make columns for `tiers` slot-addressed tiers, 0 the fastest; one policy name a tier, default lru."""

    def add_namespace(self, root: bytes, groups: Sequence[GroupRule]) -> None:
        """Make a tree. Adding it again with the same groups does nothing; with others raises LayoutError."""

    def retire_namespace(self, root: bytes) -> None:
        """Of an old epoch: nothing matches any more, inserts raise, its copies are evicted first."""

    def match(self, root: bytes, keys: Keys) -> Match:
        """Walk the keys. Changes nothing: no recency, no pins."""

    def residency(self, root: bytes, keys: Keys, tier: int, group: int) -> Slots:
        """The slots of one column along the keys: (len(keys),) int64, `NO_SLOT` where it holds no copy."""

    def touch(self, root: bytes, keys: Keys) -> None:
        """Count a hit of every copy at these positions, in all tiers and groups. The deepest position counts as
        touched first, so that under LRU a block is never older than its descendants in the same request."""

    def insert(self, root: bytes, keys: Keys, tier: int, group: int, slots: Slots) -> npt.NDArray[np.bool_]:
        """Commit copies: `slots` has len(keys) entries, `NO_SLOT` where there is nothing to insert; places in the
        tree are made for all keys up to the last inserted one. A position that already has a copy in that column
        keeps it. Recency is that of a touch. Returns a mask of the positions whose slot was taken over."""

    def remove(self, root: bytes, keys: Keys, tier: int, group: int, start: int, stop: int) -> Slots:
        """Drop the copies in [start, stop) (corrupt, say), leaving holes. Returns (stop - start) slots, `NO_SLOT`
        where there was none. Pinned copies raise ValueError and nothing changes."""

    def pin(self, root: bytes, keys: Keys, tier: int, group: int, start: int, stop: int) -> None:
        """Keep the copies in [start, stop) from eviction; pins count. All of them must exist: else ValueError,
        and nothing changes."""

    def unpin(self, root: bytes, keys: Keys, tier: int, group: int, start: int, stop: int) -> None:
        """Take back one pin of each copy in [start, stop); ValueError if one has none, and nothing changes."""

    def evict(self, tier: int, count: int, slot_class: int = 0) -> Evicted | None:
        """Evict exactly `count` copies of one slot class from a tier, or none (returns None, nothing changed).

        A copy can go if it is not pinned and no deeper position of its subtree has a copy in the same (tier,
        group). Order among those: copies of retired namespaces, then stranded ones, then by the tier's policy;
        eviction of one may make its parent the next candidate. Positions without copies and without descendants
        leave the tree.
        """

    def drop_tier(self, tier: int) -> None:
        """Forget all copies of a tier, pinned or not (its process died and its medium is gone)."""

    def count(self, tier: int) -> int:
        """How many copies a tier holds."""
