"""The budget of pins: what fetches may keep in host memory, where nothing can evict it. Knows slots as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flexkv_core.layout import Coverage

Slots = npt.NDArray[np.int64]


class PinBudget:
    """Counts pins by host slot, so that a block that many fetches have pinned counts once.

    Args:
        budget: bytes; None: no bound.

    Attributes:
        used: bytes pinned now.
        coming: bytes on their way from lower tiers, which the fetches that wait for them will pin.
    """

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.used = 0
        self.coming = 0
        self._pins: Counter[int] = Counter()  # host slot -> pins

    @property
    def left(self) -> int:
        """Bytes that may still be pinned."""
        return max(0, (self.budget if self.budget is not None else 1 << 62) - self.used - self.coming)

    def counted(self, slots: Slots) -> npt.NDArray[np.bool_]:
        """Which of these host slots are pinned already; any shape."""
        pins = self._pins
        return np.array([slot in pins for slot in slots.ravel().tolist()], np.bool_).reshape(slots.shape)

    def add(self, slots: Slots, slot_bytes: int) -> None:
        """A pin of each of these slots, all of one size."""
        before = len(self._pins)
        self._pins.update(slots.tolist())
        self.used += (len(self._pins) - before) * slot_bytes

    def take(self, slots: Slots, slot_bytes: int) -> None:
        """Take back a pin of each. Raises KeyError for a slot that has none."""
        pins, gone = self._pins, 0
        for slot in slots.tolist():
            if pins[slot] > 1:
                pins[slot] -= 1
            else:
                pins.pop(slot)
                gone += 1
        self.used -= gone * slot_bytes


def pin_costs(new_bytes: npt.NDArray[np.int64], coverages: Sequence[Coverage]) -> npt.NDArray[np.int64]:
    """What pinning a prefix of b blocks adds, for every b.

    Args:
        new_bytes: (groups, n) int64: what pinning each block would add; 0 where it is pinned already.
        coverages: one rule a group: a window or a state needs only the last positions.

    Returns (n + 1,) int64.
    """
    blocks = new_bytes.shape[1]
    cost = np.zeros(blocks + 1, np.int64)
    boundary = np.arange(blocks + 1)
    for row, coverage in zip(new_bytes, coverages, strict=True):
        total = np.concatenate(([0], np.cumsum(row)))
        span = {"all": blocks, "window": coverage.blocks, "state": 1}[coverage.kind]
        cost += total - total[np.maximum(boundary - span, 0)]
    return cost
