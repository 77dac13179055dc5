"""What a key-addressed tier is believed to hold: a bounded, LRU-ordered record. A hint: the read decides.

Filled by our own writes, by listing and by probes. Where the tier is exclusive (`capacity_bytes` is set) the
record is also the ledger that bounds it: `evict_for` says what has to be deleted before more may be written.
Where the tier bounds itself only the number of entries is bounded, and forgetting one is harmless.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from flexkv_core.index import Keys

MAX_ENTRIES = 1 << 22
KEY_BYTES = 32

Groups = npt.NDArray[np.uint8]
Lengths = npt.NDArray[np.int64]
Entries = tuple[Keys, Groups, Lengths]


class Presence:
    """See the module's docstring. All arrays are parallel; keys are (n, 32) uint8.

    Attributes:
        capacity_bytes: bytes that the tier may hold, None where it bounds itself.
        used_bytes: bytes of all entries.
    """

    def __init__(self, capacity_bytes: int | None, max_entries: int = MAX_ENTRIES) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._max_entries = max_entries
        self._lengths: OrderedDict[tuple[bytes, int], int] = OrderedDict()  # least recently used first
        self._pins: dict[tuple[bytes, int], int] = {}

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, keys: Keys, groups: Groups, lengths: Lengths) -> None:
        """Record blocks as held and most recently used, the last of the arrays the oldest among them."""
        self._add(list(reversed(_entries(keys, groups))), list(reversed(lengths.tolist())))

    def add_oldest_first(self, keys: Keys, groups: Groups, lengths: Lengths) -> None:
        """Record blocks as held, as a listing gives them: the first of the arrays the least recently used."""
        self._add(_entries(keys, groups), lengths.tolist())

    def _add(self, entries: list[tuple[bytes, int]], lengths: list[int]) -> None:
        for entry, length in zip(entries, lengths, strict=True):
            self.used_bytes += length - self._lengths.get(entry, 0)
            self._lengths[entry] = length
            self._lengths.move_to_end(entry)
        if self.capacity_bytes is None:
            while len(self._lengths) > self._max_entries:
                self.used_bytes -= self._lengths.popitem(last=False)[1]

    def discard(self, keys: Keys, groups: Groups) -> None:
        """Record blocks as not held; unknown ones are ignored."""
        for entry in _entries(keys, groups):
            self.used_bytes -= self._lengths.pop(entry, 0)

    def clear(self) -> None:
        """Forget everything."""
        self._lengths.clear()
        self._pins.clear()
        self.used_bytes = 0

    def held(self, keys: Keys, group: int) -> npt.NDArray[np.bool_]:
        """(n,) bool: which blocks of one group are believed held."""
        return np.fromiter((entry in self._lengths for entry in _of_group(keys, group)), np.bool_, len(keys))

    def touch(self, keys: Keys, group: int) -> None:
        """Make held blocks of one group the most recently used; the last of the keys is the oldest of them."""
        for entry in reversed(_of_group(keys, group)):
            if entry in self._lengths:
                self._lengths.move_to_end(entry)

    def pin(self, keys: Keys, groups: Groups) -> None:
        """Keep blocks from `evict_for` and `overflow`; pins count."""
        for entry in _entries(keys, groups):
            self._pins[entry] = self._pins.get(entry, 0) + 1

    def unpin(self, keys: Keys, groups: Groups) -> None:
        """Take back one pin of each block; those without one are ignored."""
        for entry in _entries(keys, groups):
            left = self._pins.get(entry, 0) - 1
            if left > 0:
                self._pins[entry] = left
            else:
                self._pins.pop(entry, None)

    def overflow(self) -> Entries:
        """Forget and return the least recently used blocks that exceed the capacity."""
        return self.evict_for(0)

    def evict_for(self, nbytes: int) -> Entries:
        """Forget and return the least recently used blocks so that `nbytes` more fit, as far as pins allow.

        The caller deletes them in the tier, and adds again what could not be deleted.
        """
        gone: list[tuple[tuple[bytes, int], int]] = []
        if self.capacity_bytes is not None:
            excess = self.used_bytes + nbytes - self.capacity_bytes
            for entry, length in self._lengths.items():
                if excess <= 0:
                    break
                if entry not in self._pins:
                    gone.append((entry, length))
                    excess -= length
        for entry, length in gone:
            del self._lengths[entry]
            self.used_bytes -= length
        keys = np.frombuffer(b"".join(entry[0] for entry, _ in gone), np.uint8).reshape(len(gone), KEY_BYTES)
        groups = np.array([entry[1] for entry, _ in gone], np.uint8)
        return keys, groups, np.array([length for _, length in gone], np.int64)


def _of_group(keys: Keys, group: int) -> list[tuple[bytes, int]]:
    raw = np.ascontiguousarray(keys).tobytes()
    return [(raw[at : at + KEY_BYTES], group) for at in range(0, len(raw), KEY_BYTES)]


def _entries(keys: Keys, groups: Groups) -> list[tuple[bytes, int]]:
    raw = np.ascontiguousarray(keys).tobytes()
    return [(raw[i * KEY_BYTES : (i + 1) * KEY_BYTES], group) for i, group in enumerate(groups.tolist())]
