"""Presence in plain Python, the oracle of the native one: an `OrderedDict` in order of use.

See `flexkv_core.presence.Presence` for what every method promises.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import KeyInputError, KeyTypeError

Keys = npt.NDArray[np.uint8]
Groups = npt.NDArray[np.uint8]
Lengths = npt.NDArray[np.int64]
Entries = tuple[Keys, Groups, Lengths]
"""(n, 32) uint8 keys, (n,) uint8 groups, (n,) int64 bytes; least recently used first."""

_KEY_BYTES = 32


class ReferencePresence:
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
        self._lengths: OrderedDict[bytes, int] = OrderedDict()
        self._pins: dict[bytes, int] = {}
        self._used = 0

    @property
    def used_bytes(self) -> int:
        """Sum of the lengths of all entries."""
        return self._used

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, keys: Keys, groups: Groups, lengths: Lengths) -> None:
        """The tier holds these blocks: keys (n, 32) uint8, groups (n,) uint8, lengths (n,) int64 bytes, 0 or more.

        Known ones take the new length; all become the most recently used. May exceed the capacity until the
        next `overflow`. Raises KeyTypeError, KeyInputError or ValueError; nothing changes then.
        """
        names = _names(keys, groups)
        sizes = np.asarray(lengths)
        if sizes.dtype != np.int64 or sizes.shape != (len(names),) or (sizes < 0).any():
            raise ValueError(f"lengths are {sizes.dtype} {sizes.shape}: pass int64 ({len(names)},) of 0 or more bytes")
        for name, size in zip(reversed(names), reversed(sizes.tolist()), strict=True):
            self._used += size - self._lengths.get(name, 0)
            self._lengths[name] = size
            self._lengths.move_to_end(name)
        if self.capacity_bytes is None:
            self._take(0, None)

    def discard(self, keys: Keys, groups: Groups) -> None:
        """The tier does not hold these blocks (any more). Unknown ones are passed over; pins stay."""
        for name in _names(keys, groups):
            self._used -= self._lengths.pop(name, 0)

    def clear(self) -> None:
        """The tier holds nothing any more. Pins stay: reads in flight still end and unpin."""
        self._lengths.clear()
        self._used = 0

    def held(self, keys: Keys, group: int) -> npt.NDArray[np.bool_]:
        """(n,) bool: which of the blocks have an entry. Changes nothing."""
        names = _names(keys, group)
        return np.fromiter((name in self._lengths for name in names), dtype=bool, count=len(names))

    def touch(self, keys: Keys, group: int) -> None:
        """Count a use of those blocks that have an entry."""
        for name in reversed(_names(keys, group)):
            if name in self._lengths:
                self._lengths.move_to_end(name)

    def pin(self, keys: Keys, groups: Groups) -> None:
        """Being read: keep these out of `overflow` and `evict_for`. Pins count; a block needs no entry to be pinned."""
        for name in _names(keys, groups):
            self._pins[name] = self._pins.get(name, 0) + 1

    def unpin(self, keys: Keys, groups: Groups) -> None:
        """Take back one pin of each. Raises ValueError if one has too few, and nothing changes."""
        left: dict[bytes, int] = {}
        for name in _names(keys, groups):
            left[name] = left.get(name, self._pins.get(name, 0)) - 1
            if left[name] < 0:
                raise ValueError(
                    f"key {name[:_KEY_BYTES].hex()} group {name[_KEY_BYTES]} has no such pin: unpin once a pin"
                )
        for name, pins in left.items():
            if pins:
                self._pins[name] = pins
            else:
                del self._pins[name]

    def overflow(self) -> Entries:
        """Take out the least recently used entries until capacity and max_entries are kept, passing over pinned ones.

        The caller deletes them in the tier and adds back those whose deletion failed (they count as used then, so that
        others are tried first). May be too few while much is pinned. Empty for a tier that bounds itself.
        """
        if self.capacity_bytes is None:
            return _entries([])
        return _entries(self._take(0, self.capacity_bytes))

    def evict_for(self, nbytes: int) -> Entries:
        """Take out the least recently used entries until `nbytes` more fit; the caller deletes them as for `overflow`.

        As far as pins and capacity allow: compare `used_bytes` afterwards. Empty for a tier that bounds itself.
        Raises ValueError if nbytes is negative.
        """
        if nbytes < 0:
            raise ValueError(f"nbytes {nbytes}: must be 0 or more")
        if self.capacity_bytes is None:
            return _entries([])
        return _entries(self._take(nbytes, self.capacity_bytes))

    def _take(self, nbytes: int, capacity: int | None) -> list[tuple[bytes, int]]:
        taken: list[tuple[bytes, int]] = []
        used, count = self._used + nbytes, len(self._lengths)
        for name, size in self._oldest():
            if (capacity is None or used <= capacity) and count <= self.max_entries:
                break
            taken.append((name, size))
            used, count = used - size, count - 1
        for name, size in taken:
            del self._lengths[name]
            self._used -= size
        return taken

    def _oldest(self) -> Iterator[tuple[bytes, int]]:
        return ((name, size) for name, size in self._lengths.items() if name not in self._pins)


def _names(keys: Keys, groups: Groups | int) -> list[bytes]:
    """Key and group number of each block, as one string of bytes."""
    if not isinstance(keys, np.ndarray) or keys.dtype != np.uint8:
        raise KeyTypeError(f"keys are {getattr(keys, 'dtype', type(keys).__name__)}: pass a uint8 array (n, 32)")
    if keys.ndim != 2 or keys.shape[1] != _KEY_BYTES:
        raise KeyInputError(f"keys have shape {keys.shape}: pass (n, {_KEY_BYTES})")
    if isinstance(groups, np.ndarray):
        if groups.dtype != np.uint8 or groups.shape != (len(keys),):
            raise KeyInputError(f"groups are {groups.dtype} {groups.shape}: pass uint8 ({len(keys)},)")
    elif not 0 <= groups <= 254:
        raise KeyInputError(f"group {groups}: must be 0 to 254")
    named = np.empty((len(keys), _KEY_BYTES + 1), dtype=np.uint8)
    named[:, :_KEY_BYTES] = keys
    named[:, _KEY_BYTES] = groups
    data = named.tobytes()
    return [data[i : i + _KEY_BYTES + 1] for i in range(0, len(data), _KEY_BYTES + 1)]


def _entries(taken: list[tuple[bytes, int]]) -> Entries:
    named = np.frombuffer(b"".join(name for name, _ in taken), dtype=np.uint8).reshape(-1, _KEY_BYTES + 1)
    lengths = np.array([size for _, size in taken], dtype=np.int64)
    return named[:, :_KEY_BYTES].copy(), named[:, _KEY_BYTES].copy(), lengths
