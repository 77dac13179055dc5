"""Which blocks a lower tier fails to read again and again while it reads others: copies that are lost for good.

Owns that memory of one tier, bounded. Does not own whether the tier as a whole is well (`tier_health.py`), nor what
becomes of a copy that is given up (`ledger.py`).

A failure counts if the same call has read another block, or both the call before and the call after it have: so an
outage of more than one call gives nothing up, however long it is and whoever asks.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from flexkv_core._native import BlockSet

Keys = npt.NDArray[np.uint8]
Groups = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

FAILURES = 3
"""So many that count, with no other answer between, and the copy is given up."""
MOST_BLOCKS = 4096
"""Blocks that are remembered; those that failed longest ago give way, and are counted anew."""


class RepeatedFailures:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._failures: OrderedDict[tuple[bytes, int], int] = OrderedDict()  # that counted; the latest last
        self._known = BlockSet()  # its keys, asked by the batch
        self._suspects: set[tuple[bytes, int]] = set()  # of the last call, which read nothing; the one before did
        self._well = False  # the last call has read something

    def __len__(self) -> int:
        """Blocks that are remembered."""
        return len(self._failures)

    def note(self, keys: Keys, groups: Groups, good: Mask, failed: Mask) -> Mask:
        """Take note of one call of the tier; returns which of its blocks are given up, and forgets these.

        Args:
            keys, groups: (n, 32) and (n,) uint8: its blocks.
            good, failed: (n,) bool: which were read, which the tier failed to read though it was well. Others, such as
                those that it does not hold, are neither; their failures are forgotten too.
        """
        well = bool(good.any())
        given_up = np.zeros(len(groups), np.bool_)
        if (self._failures or self._suspects) and not failed.all():
            self._forget(keys[~failed], groups[~failed])
        for block in self._suspects if well else ():
            self._count(block)
        suspects = set()
        for at in np.flatnonzero(failed).tolist():
            block = keys[at].tobytes(), int(groups[at])
            if well:
                self._count(block)
            elif self._well:
                suspects.add(block)
            given_up[at] = self._failures.get(block, 0) >= FAILURES
        if given_up.any():
            self._forget(keys[given_up], groups[given_up])
            suspects -= {(keys[at].tobytes(), int(groups[at])) for at in np.flatnonzero(given_up).tolist()}
        self._suspects, self._well = suspects, well
        return given_up

    def clear(self) -> None:
        """The tier has lost all that it held."""
        self._failures.clear()
        self._known.clear()
        self._suspects.clear()
        self._well = False

    def _count(self, block: tuple[bytes, int]) -> None:
        self._failures[block] = self._failures.get(block, 0) + 1
        self._failures.move_to_end(block)
        self._known.add_new(_row(block), block[1])
        if len(self._failures) > MOST_BLOCKS:
            oldest, _ = self._failures.popitem(last=False)
            self._known.discard(_row(oldest), oldest[1])

    def _forget(self, keys: Keys, groups: Groups) -> None:
        if self._suspects:
            self._suspects -= set(zip((key.tobytes() for key in keys), groups.tolist(), strict=True))
        if self._failures:
            known = self._known.contains(keys, groups)
            for key, group in zip(keys[known], groups[known].tolist(), strict=True):
                del self._failures[key.tobytes(), group]
            self._known.discard(keys[known], groups[known])


def _row(block: tuple[bytes, int]) -> Keys:
    return np.frombuffer(block[0], np.uint8).reshape(1, 32)
