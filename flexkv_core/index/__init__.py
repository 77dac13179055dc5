"""The index: what is where. This file fixes the interface that the reference and the native index share.

An index holds one radix tree a namespace root. A tree's positions are blocks of a prefix, named by their
chained keys; for each position it keeps, by (tier, group), the slot of the copy that this slot-addressed tier
holds, if any. It knows slots as numbers: allocation is `pool.py`, bytes are nobody's business here.

Words: a *copy* is the residency of one block (position and group) in one tier. A *hole* is a position of an
`all`-coverage group that no tier of this index holds. A copy is *stranded* when a hole lies before it, or when it
belongs to an *orphan*: a subtree that was recovered without the position before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from flexkv_core.layout import Coverage
from flexkv_core.policies import Eviction

NO_TIER = 255
NO_SLOT = -1
MAX_SLOT = (1 << 40) - 2
"""Slots are 40-bit: in pages of 4 KiB, 4 PiB a tier."""
MAX_DEPTH = (1 << 31) - 2
"""The deepest position."""

Keys = npt.NDArray[np.uint8]
"""(n, 32) uint8, C-contiguous: chained block keys."""
Slots = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GroupRule:
    """What the index needs to know of a KV group: its coverage and the slot class of its blocks by tier.

    Attributes:
        slot_class: the class in every tier, or one number a tier of the index.
    """

    coverage: Coverage = Coverage()  # noqa: RUF009 - frozen, no default_factory needed
    slot_class: int | tuple[int, ...] = 0

    def class_in(self, tier: int) -> int:
        """The slot class of this group's blocks in a tier."""
        return self.slot_class if isinstance(self.slot_class, int) else self.slot_class[tier]


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
    """Copies that have left the index, in order of eviction; arrays of length n.

    Attributes:
        roots: (n, 32) uint8: the namespace of each.
        keys: (n, 32) uint8.
        groups: (n,) uint8.
        slots: (n,) int64.
    """

    roots: Keys
    keys: Keys
    groups: npt.NDArray[np.uint8]
    slots: Slots


class Removed(NamedTuple):
    """Copies that were removed with a subtree, in no particular order; arrays of length n."""

    tiers: npt.NDArray[np.uint8]
    keys: Keys
    groups: npt.NDArray[np.uint8]
    slots: Slots


class Copies(NamedTuple):
    """The copies of one column, orphans included, in no particular order; arrays of length n.

    Attributes:
        keys, parents: (n, 32) uint8; the parent of a first block is the namespace's root.
        depths: (n,) int64: positions, 0 for a first block.
        slots: (n,) int64.
    """

    keys: Keys
    parents: Keys
    depths: npt.NDArray[np.int64]
    slots: Slots


class Index(Protocol):
    """One owner calls everything; `match` may be called by any thread. The native index raises StateError for a call
    from within another (a policy's, a finalizer's), and for any call after a change that MemoryError broke off.

    Arrays of keys always start at the namespace's first block: `keys[i]` is position i. `start` and `stop`
    select positions. All methods raise `UnknownNamespaceError` for a root that was not added, or that was retired
    and whose last copy is gone.

    Time is a counter of *ticks*: each call of touch and insert is one tick later than the last. So is the first call of
    recover; the others until end_recovery have its tick.
    """

    def __init__(self, tiers: int, policies: Sequence[str | Eviction] | None = None) -> None:
        """Make columns for `tiers` slot-addressed tiers, 0 the fastest; one policy a tier, default lru."""

    def advance(self, tick: int) -> None:
        """Let the clock be at least `tick`. A caller whose ticks shall mean microseconds (`hit_reward_seconds`) calls
        this with the time before it touches or inserts."""

    def add_namespace(self, root: bytes, groups: Sequence[GroupRule]) -> None:
        """Make a tree. Adding it again with the same groups does nothing; with others raises LayoutError."""

    def retire_namespace(self, root: bytes) -> None:
        """Of an old epoch, in O(1): nothing matches any more, inserts raise, its copies are evicted first. When its
        last copy is gone (at once if it has none) the namespace is forgotten. Retiring it again does nothing."""

    def has_namespace(self, root: bytes) -> bool:
        """Whether the namespace was added and not yet forgotten."""

    def has_copies(self, root: bytes) -> bool:
        """Whether any tier holds a copy of the namespace. If none does, retiring it forgets it."""

    def match(self, root: bytes, keys: Keys) -> Match:
        """Walk the keys. Changes nothing: no recency, no pins. A retired namespace matches nothing."""

    def residency(self, root: bytes, keys: Keys, tier: int, group: int) -> Slots:
        """The slots of one column along the keys: (len(keys),) int64, `NO_SLOT` where it holds no copy."""

    def touch(self, root: bytes, keys: Keys) -> None:
        """Count a hit of every copy at these positions, in all tiers and groups."""

    def insert(self, root: bytes, keys: Keys, tier: int, group: int, slots: Slots) -> npt.NDArray[np.bool_]:
        """Commit copies: `slots` has len(keys) entries, `NO_SLOT` where there is nothing to insert; places in the
        tree are made for all keys up to the last inserted one. A position that already has a copy in that column
        keeps it, and its recency. Orphans whose parent appears join the tree. Returns a mask of the positions
        whose slot was taken over. ValueError for a slot outside 0..MAX_SLOT; nothing changes then."""

    def remove(self, root: bytes, keys: Keys, tier: int, group: int, start: int, stop: int) -> Slots:
        """Drop the copies in [start, stop) (corrupt, say), leaving holes. Returns (stop - start) slots, `NO_SLOT`
        where there was none. Pinned copies raise ValueError and nothing changes."""

    def remove_subtree(self, root: bytes, keys: Keys) -> Removed:
        """Drop every copy, in all tiers and groups, of the position that `keys` ends at and of all below it; with no
        keys, of the whole namespace, orphans included. Nothing if the position does not exist. Pinned copies raise
        ValueError and nothing changes."""

    def pin(self, root: bytes, keys: Keys, tier: int, group: int, start: int, stop: int) -> None:
        """Keep the copies in [start, stop) from eviction; pins count. All of them must exist: else ValueError,
        and nothing changes."""

    def unpin(self, root: bytes, keys: Keys, tier: int, group: int, start: int, stop: int) -> None:
        """Take back one pin of each copy in [start, stop); ValueError if one has none, and nothing changes."""

    def evict(self, tier: int, count: int, slot_class: int = 0) -> Evicted | None:
        """Evict exactly `count` copies of one slot class from a tier, or none (returns None, nothing changed).

        A copy can go if it is not pinned and no deeper position of its subtree has a copy in the same (tier,
        group). Order among those: copies of retired namespaces, then (and among those) stranded ones, then by the
        tier's policy; of equals the deeper one first, then by group, key and root. Eviction of one may make its
        parent the next candidate. Positions without copies and without descendants leave the tree.
        """

    def evict_range(self, tier: int, start: int, stop: int, count: int) -> Evicted | None:
        """Evict every copy of a tier whose slot is in [start, stop), wherever in its tree it lies, so that the room
        becomes one piece. All or nothing: None, and nothing changed, if one of them is pinned, or if there are not
        exactly `count` (the others are being written). In no particular order. Leaves holes where deeper copies stay.
        Looks at every copy of the tier: for the rare moment in which one slot class gives room to another.
        """

    def recover(
        self,
        root: bytes,
        tier: int,
        group: int,
        keys: Keys,
        parents: Keys,
        depths: npt.NDArray[np.int64],
        slots: Slots,
    ) -> npt.NDArray[np.bool_]:
        """Insert what survived in a tier: n copies in any order, each with its parent's key and its position.

        A copy whose parent has no place in the tree is kept as an orphan: it matches nothing, is evicted first, and
        joins the tree when its parent appears. Not taken over, and False in the mask that is returned: a position that
        already has a copy in that column, or whose depth contradicts its parent's. May be called piece by piece; call
        `end_recovery` after the last one. ValueError for arrays of other shapes, depths outside 0..MAX_DEPTH, or a slot
        outside 0..MAX_SLOT; nothing changes then.
        """

    def end_recovery(self) -> None:
        """Drop the look-up tables that `recover` keeps between pieces."""

    def drop_tier(self, tier: int) -> None:
        """Forget all copies of a tier, pinned or not (its process died and its medium is gone)."""

    def count(self, tier: int) -> int:
        """How many copies a tier holds."""

    def copies(self, root: bytes, tier: int, group: int) -> Copies:
        """All copies of one column."""

    def statistics(self) -> dict[str, int]:
        """Figures: `namespaces`, `positions` (in all trees, orphans included), `orphans` (subtrees without a parent),
        `copies` (in all tiers), `pinned` (copies with a pin), `visited` (nodes that evictions have looked at), `nodes`
        and `memory_bytes` (0 where it is not known)."""
