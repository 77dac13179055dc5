"""What a key-addressed tier holds, as far as we know: a bounded record in order of use.

Owns the record only: a hint for lookups and the choice of what to delete. Does not own the objects; the read decides
whether one is there. Slot-addressed tiers have columns in the index instead.

An entry is a block (32-byte key, group) with its length. Of several blocks in one call, the last counts as used
first, so that with keys in prefix order a block is never older than its descendants, and leaves go before them.

The record is native (`native/presence.cpp`): about 64 bytes an entry, no object a block, and an operation takes as long
a block however many there are. Only pinned entries that `overflow` and `evict_for` pass over cost extra.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flexkv_core import _native

Keys = npt.NDArray[np.uint8]
Groups = npt.NDArray[np.uint8]
Lengths = npt.NDArray[np.int64]
Entries = tuple[Keys, Groups, Lengths]
"""(n, 32) uint8 keys, (n,) uint8 groups, (n,) int64 bytes; least recently used first."""

_MOST = 2**63 - 1


class Presence:
    """One owner changes it; `held` may be called by any thread.

    Args:
        capacity_bytes: what the tier may hold, bounded by us through `overflow` and `evict_for`; None for a tier that
            bounds itself: then the record forgets its least recently used entries beyond `max_entries`, which is
            harmless, and nothing is ever to be deleted.
        max_entries: bound on the record. With a capacity, entries beyond it are deleted, not forgotten: a forgotten
            object would never leave the tier.

    Raises ValueError if either is negative, or max_entries is 0.
    """

    def __init__(self, capacity_bytes: int | None, max_entries: int = 2**20) -> None:
        if capacity_bytes is not None and capacity_bytes < 0:
            raise ValueError(f"capacity_bytes {capacity_bytes}: must be 0 or more, or None")
        if max_entries < 1:
            raise ValueError(f"max_entries {max_entries}: must be at least 1")
        self.capacity_bytes = capacity_bytes
        self.max_entries = max_entries
        self._record = _native.Presence(
            None if capacity_bytes is None else min(capacity_bytes, _MOST), min(max_entries, _MOST)
        )

    @property
    def used_bytes(self) -> int:
        """Sum of the lengths of all entries."""
        return self._record.used_bytes

    @property
    def pinned(self) -> int:
        """How many blocks have a pin."""
        return self._record.pinned

    @property
    def memory_bytes(self) -> int:
        """What the record itself takes in this process."""
        return self._record.memory_bytes

    def __len__(self) -> int:
        return len(self._record)

    def add(self, keys: Keys, groups: Groups, lengths: Lengths) -> None:
        """The tier holds these blocks: keys (n, 32) uint8, groups (n,) uint8, lengths (n,) int64 bytes, 0 or more.

        Known ones take the new length; all become the most recently used. May exceed the capacity until the
        next `overflow`. Raises KeyTypeError, KeyInputError or ValueError (also for a length of 2^56 or more, or 2^63
        in all); nothing changes then.
        """
        self._record.add(keys, groups, np.asarray(lengths))

    def discard(self, keys: Keys, groups: Groups) -> None:
        """The tier does not hold these blocks (any more). Unknown ones are passed over; pins stay."""
        self._record.discard(keys, groups)

    def clear(self) -> None:
        """The tier holds nothing any more. Pins stay: reads in flight still end and unpin."""
        self._record.clear()

    def held(self, keys: Keys, group: int) -> npt.NDArray[np.bool_]:
        """(n,) bool: which of the blocks have an entry. Changes nothing."""
        return self._record.held(keys, group)

    def touch(self, keys: Keys, group: int) -> None:
        """Count a use of those blocks that have an entry."""
        self._record.touch(keys, group)

    def pin(self, keys: Keys, groups: Groups) -> None:
        """Being read: keep these out of `overflow` and `evict_for`. Pins count; a block needs no entry to be pinned."""
        self._record.pin(keys, groups)

    def unpin(self, keys: Keys, groups: Groups) -> None:
        """Take back one pin of each. Raises ValueError if one has too few, and nothing changes."""
        self._record.unpin(keys, groups)

    def overflow(self) -> Entries:
        """Take out the least recently used entries until capacity and max_entries are kept, passing over pinned ones.

        The caller deletes them in the tier and adds back those whose deletion failed (they count as used then, so that
        others are tried first). May be too few while much is pinned. Empty for a tier that bounds itself.
        """
        return self._record.overflow()

    def evict_for(self, nbytes: int) -> Entries:
        """Take out the least recently used entries until `nbytes` more fit; the caller deletes them as for `overflow`.

        As far as pins and capacity allow: compare `used_bytes` afterwards. Empty for a tier that bounds itself.
        Raises ValueError if nbytes is negative.
        """
        if nbytes < 0:
            raise ValueError(f"nbytes {nbytes}: must be 0 or more")
        return self._record.evict_for(min(nbytes, _MOST))
