"""Slots of several sizes in one capacity, divided into extents.

Owns which slots of a tier are free. Does not own bytes, copies (`index/`), or the choice of what to evict.

A class of slots takes extents from the common pool when it needs them, as *runs* of contiguous extents, and gives a run
back when all its slots are free. Slots lie one behind another in a run; what is left at its end is waste. The
run's length is the smallest that wastes at most 1/64 of itself, or the least wasteful of 16 lengths: one extent for
slots up to 1/64 of it, several for larger ones, at least one slot always. A run begins at a multiple of that length,
so that from a slot and its class alone its run can be found again (`adopt`). Where a whole one does not fit (the end of
the capacity, before another class's run), a shorter one is used as far as it goes.

All work is per batch and native (`native/slot_pool.hpp`): a bit a slot of the runs that there are, and 32 bytes an
extent. Here is what concerns shapes alone: of slots, of runs, and how many would fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexkv_core import _native
from flexkv_core.errors import LayoutError
from flexkv_core.layout import PAGE

Slots = npt.NDArray[np.int64]

_MOST_WASTE = 1 / 64
_RUN_LENGTHS = 16


@dataclass(frozen=True, slots=True)
class _SlotClass:
    """One size: pages of a slot, and the shape of a run of full length."""

    pages: int
    run_extents: int
    run_slots: int


class SlotPool:
    """Slots named by byte offset / 4096 (int64), which is unique over all classes.

    Args:
        capacity_bytes: what all slots together may take; a partial page at the end is not used.
        extent_bytes: the unit of division, a multiple of 4096. The last extent may be partial.
        tier: the tier's name, for errors.

    Raises LayoutError for a capacity below one page, or extents that are not whole pages.
    """

    def __init__(self, capacity_bytes: int, extent_bytes: int = 32 << 20, tier: str = "") -> None:
        self._tier = f"tier {tier}: " if tier else ""
        if capacity_bytes < PAGE:
            raise LayoutError(f"{self._tier}capacity {capacity_bytes} bytes: must be at least one page of {PAGE}")
        if extent_bytes < PAGE or extent_bytes % PAGE:
            raise LayoutError(f"extent_bytes {extent_bytes}: must be a positive multiple of {PAGE}")
        self.capacity_bytes = capacity_bytes
        self.extent_bytes = extent_bytes
        self._pages = capacity_bytes // PAGE
        self._extent_pages = extent_bytes // PAGE
        self._slots = _native.SlotPool(self._pages, self._extent_pages)
        self._classes: list[_SlotClass] = []
        self._by_pages: dict[int, int] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes of all allocated slots, without the waste in runs."""
        return self._slots.used_pages * PAGE

    @property
    def used_slots(self) -> int:
        """How many slots of all classes are allocated."""
        return sum(self.allocated(number) for number in self.used_classes)

    def free_slots(self) -> dict[int, int]:
        """Bytes of a slot -> how many more could be allocated now, of the classes that have extents."""
        return {self._classes[number].pages * PAGE: self.available(number) for number in self.used_classes}

    @property
    def classes(self) -> range:
        """Numbers of the slot classes."""
        return range(len(self._classes))

    @property
    def used_classes(self) -> list[int]:
        """Those that have extents now: a tier may have seen many models."""
        return self._slots.used_classes

    def slot_class(self, slot_bytes: int) -> int:
        """The number of the class with slots of this size, made on first use.

        Raises LayoutError if the size is not a positive multiple of 4096, or exceeds the capacity.
        """
        if slot_bytes < PAGE or slot_bytes % PAGE:
            raise LayoutError(f"slot_bytes {slot_bytes}: must be a positive multiple of {PAGE}")
        pages = slot_bytes // PAGE
        if pages > self._pages:
            raise LayoutError(
                f"{self._tier}capacity {self.capacity_bytes} bytes cannot hold one slot of {slot_bytes} bytes: "
                f"it needs at least {slot_bytes}"
            )
        if pages not in self._by_pages:
            run_extents = _run_extents(pages, self._extent_pages)
            run_slots = run_extents * self._extent_pages // pages
            self._by_pages[pages] = self._slots.add_class(pages, run_extents, run_slots)
            self._classes.append(_SlotClass(pages, run_extents, run_slots))
        return self._by_pages[pages]

    def clear(self) -> None:
        """Forget all allocations; classes stay."""
        self._slots.clear()

    def available(self, slot_class: int) -> int:
        """How many slots could be allocated now, in the class's own runs and in unassigned extents."""
        self._class(slot_class)
        return self._slots.available(slot_class)

    def allocated(self, slot_class: int) -> int:
        """How many slots of the class are allocated."""
        self._class(slot_class)
        return self._slots.allocated(slot_class)

    def room_of_others(self, slot_class: int, most: int = 4) -> list[tuple[int, int, int]]:
        """Where emptying runs of other classes would make room for a full run of this one.

        Returns at most `most` ranges as (first page, page behind the last, slots in use there), those with the least in
        use first. Each covers whole runs; none has a run of this class.
        """
        self._class(slot_class)
        return self._slots.room_of_others(slot_class, most)

    def capacity(self, slot_class: int) -> int:
        """How many slots the class would have if all extents were its own."""
        kind = self._class(slot_class)
        runs, rest = divmod(self._pages, kind.run_extents * self._extent_pages)
        return runs * kind.run_slots + rest // kind.pages

    def capacity_together(self, slot_classes: Sequence[int]) -> int:
        """How many slots each of these classes would have, all as many, laid out one class after another.

        A class may be named twice. Classes do not share extents, so this is less than what the bytes alone allow. With
        one class it is `capacity`.
        """
        kinds = [(self._class(number), times) for number, times in Counter(slot_classes).items()]
        kinds.sort(
            key=lambda kind: -kind[0].run_extents
        )  # a shorter run begins wherever a longer one has ended, almost

        def fits(count: int) -> bool:
            extent = 0  # the first that is not taken
            for kind, times in kinds:
                wanted, length = count * times, kind.run_extents
                start = -(-extent // length) * length
                pages = self._pages - start * self._extent_pages
                if pages < 0:
                    return wanted == 0
                runs, rest = divmod(pages, length * self._extent_pages)
                if wanted > runs * kind.run_slots + rest // kind.pages:
                    return False
                taken = -(-wanted // kind.run_slots)  # the last one may be the shorter run at the end
                extent = start + taken * length
            return True

        low, high = 0, self._pages  # fits(0); no class has more slots than there are pages
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def run_extents(self, slot_class: int) -> int:
        """How many extents a full run of the class has."""
        return self._class(slot_class).run_extents

    def extents(self, slot_class: int) -> int:
        """How many extents the class has now."""
        self._class(slot_class)
        return self._slots.extents(slot_class)

    def allocate(self, slot_class: int, count: int) -> Slots | None:
        """Take `count` slots: (count,) int64, ascending; the lowest ones of the class's runs, then of new runs.

        Returns None, and changes nothing, when they do not fit. Raises ValueError for a negative count or an
        unknown class.
        """
        self._class(slot_class)
        if count < 0:
            raise ValueError(f"count {count}: allocate 0 or more slots")
        return self._slots.allocate(slot_class, count)

    def free(self, slots: Slots) -> None:
        """Give slots back, of any classes, in any order. Runs whose slots are all free return to the common pool.

        Raises ValueError, and changes nothing, if one is not an allocated slot or is named twice.
        """
        self._slots.free(np.asarray(slots))

    def adopt(self, slots: Slots, slot_class: int) -> npt.NDArray[np.bool_]:
        """Take exactly these slots of a class, as they were allocated before a restart.

        Returns which were taken: (len(slots),) bool; not one that lies where the class can have no slot, where
        another class has a run now, or that is taken already. Classes with shorter runs should come first.
        """
        self._class(slot_class)
        return self._slots.adopt(np.asarray(slots), slot_class)

    def _class(self, slot_class: int) -> _SlotClass:
        if not 0 <= slot_class < len(self._classes):
            raise ValueError(f"slot class {slot_class}: there are {len(self._classes)}; use what slot_class() gave")
        return self._classes[slot_class]


def _run_extents(slot_pages: int, extent_pages: int) -> int:
    """Extents of a full run: see the module's docstring."""
    fewest = -(-slot_pages // extent_pages)
    lengths = range(fewest, fewest + _RUN_LENGTHS)
    waste = [length * extent_pages % slot_pages / (length * extent_pages) for length in lengths]
    return next((n for n, w in zip(lengths, waste, strict=True) if w <= _MOST_WASTE), lengths[waste.index(min(waste))])
