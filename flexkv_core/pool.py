"""Slots of several sizes in one capacity, divided into extents.

Owns which slots of a tier are free. Does not own bytes, copies (`index/`), or the choice of what to evict.

A class of slots takes extents from the common pool when it needs them, as *runs* of contiguous extents, and gives a run
back when all its slots are free. Slots lie one behind another in a run; what is left at its end is waste. The
run's length is the smallest that wastes at most 1/64 of itself, or the least wasteful of 16 lengths: one extent for
slots up to 1/64 of it, several for larger ones, at least one slot always. A run begins at a multiple of that length,
so that from a slot and its class alone its run can be found again (`adopt`). Where a whole one does not fit (the end of
the capacity, before another class's run), a shorter one is used as far as it goes.

All work is per batch, in NumPy. Per class there is one byte for each slot it could have, touched only when used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import LayoutError
from flexkv_core.layout import PAGE

Slots = npt.NDArray[np.int64]
_Counts = npt.NDArray[np.int64]

_COMMON = -1
_MOST_WASTE = 1 / 64
_RUN_LENGTHS = 16


@dataclass(frozen=True, slots=True)
class _SlotClass:
    """One size. Arrays are indexed by the first extent of a run; zero elsewhere.

    Attributes:
        pages: of a slot.
        run_extents, run_slots: shape of a run of full length.
        used: (extents, run_slots) bool.
        slots: (extents,) slots of the run that begins there.
        free: (extents,) how many of them are free.
    """

    pages: int
    run_extents: int
    run_slots: int
    used: npt.NDArray[np.bool_]
    slots: _Counts
    free: _Counts


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
        count = -(-self._pages // self._extent_pages)
        self._owner = np.full(count, _COMMON, dtype=np.int64)
        self._first = np.zeros(count, dtype=np.int64)
        self._classes: list[_SlotClass] = []
        self._by_pages: dict[int, int] = {}
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of all allocated slots, without the waste in runs."""
        return self._used_bytes

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
        numbers: list[int] = np.unique(self._owner[self._owner != _COMMON]).tolist()
        return numbers

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
            count = self._owner.size
            zeros = np.zeros(count, dtype=np.int64)
            used = np.zeros((count, run_slots), dtype=bool)
            self._by_pages[pages] = len(self._classes)
            self._classes.append(_SlotClass(pages, run_extents, run_slots, used, zeros, zeros.copy()))
        return self._by_pages[pages]

    def clear(self) -> None:
        """Forget all allocations; classes stay."""
        self._owner[:] = _COMMON
        self._used_bytes = 0
        for kind in self._classes:
            kind.used[np.flatnonzero(kind.slots)] = False
            kind.slots[:] = kind.free[:] = 0

    def available(self, slot_class: int) -> int:
        """How many slots could be allocated now, in the class's own runs and in unassigned extents."""
        kind = self._class(slot_class)
        if not (self._owner == _COMMON).any():
            return int(kind.free.sum())
        return int(kind.free.sum() + self._free_runs(kind)[1].sum())

    def allocated(self, slot_class: int) -> int:
        """How many slots of the class are allocated."""
        kind = self._class(slot_class)
        return int(kind.slots.sum() - kind.free.sum())

    def room_of_others(self, slot_class: int, most: int = 4) -> list[tuple[int, int, int]]:
        """Where emptying runs of other classes would make room for a full run of this one.

        Returns at most `most` ranges as (first page, page behind the last, slots in use there), those with the least in
        use first. Each covers whole runs; none has a run of this class.
        """
        kind = self._class(slot_class)
        count = self._owner.size
        length = kind.run_extents
        # by extent: where its run begins and ends, and how many slots are in use in runs that begin there
        extents = np.arange(count)
        begins = np.where(self._owner == _COMMON, extents, self._first)
        ends, used = extents + 1, np.zeros(count, np.int64)
        for number in self.used_classes:
            other = self._classes[number]
            first = np.flatnonzero(other.slots)
            reach = first + -(-other.slots[first] * other.pages // self._extent_pages)
            mine = self._owner == number
            spread = np.zeros(count, np.int64)
            spread[first] = reach
            ends = np.where(mine, spread[begins], ends)
            used[first] += other.slots[first] - other.free[first]
        own = np.concatenate(([0], np.cumsum(self._owner == slot_class)))
        total = np.concatenate(([0], np.cumsum(used)))
        start = np.arange(0, count, length)
        first, last = begins[start], ends[np.minimum(start + length, count) - 1]
        cost = total[last] - total[first]
        wide = np.minimum((start + length) * self._extent_pages, self._pages) - start * self._extent_pages >= kind.pages
        good = np.flatnonzero((own[last] == own[first]) & (cost > 0) & wide)
        best = good[np.argsort(cost[good], kind="stable")][:most]
        pages = self._extent_pages
        return [(int(first[i]) * pages, min(int(last[i]) * pages, self._pages), int(cost[i])) for i in best]

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
        return int(np.count_nonzero(self._owner == slot_class))

    def allocate(self, slot_class: int, count: int) -> Slots | None:
        """Take `count` slots: (count,) int64, ascending; the lowest ones of the class's runs, then of new runs.

        Returns None, and changes nothing, when they do not fit. Raises ValueError for a negative count or an
        unknown class.
        """
        kind = self._class(slot_class)
        if count < 0:
            raise ValueError(f"count {count}: allocate 0 or more slots")
        missing = count - int(kind.free.sum())
        if missing > 0 and not self._grow(slot_class, missing):
            return None
        runs = np.flatnonzero(kind.free)
        runs = runs[: int(np.searchsorted(np.cumsum(kind.free[runs]), count)) + 1]
        free = ~kind.used[runs] & (np.arange(kind.run_slots) < kind.slots[runs, None])
        rows, places = np.divmod(free.ravel().nonzero()[0][:count], kind.run_slots)
        kind.used[runs[rows], places] = True
        kind.free[runs] -= np.bincount(rows, minlength=runs.size)
        self._used_bytes += count * kind.pages * PAGE
        slots: Slots = runs[rows] * self._extent_pages + places * kind.pages
        return slots

    def free(self, slots: Slots) -> None:
        """Give slots back, of any classes, in any order. Runs whose slots are all free return to the common pool.

        Raises ValueError, and changes nothing, if one is not an allocated slot or is named twice.
        """
        slots = np.asarray(slots)
        if slots.ndim != 1 or (slots.size and slots.dtype != np.int64):
            raise ValueError(f"slots are {slots.dtype} {slots.shape}: pass a 1-D int64 array")
        if not slots.size:
            return
        ordered = np.sort(slots)
        if (ordered[1:] == ordered[:-1]).any():
            raise ValueError("slots name a slot twice: free each once")
        inside = ordered[0] >= 0 and ordered[-1] < self._pages
        near = slots if inside else slots.clip(0, self._pages - 1)
        extents = near // self._extent_pages
        owners = self._owner[extents]
        if not inside:
            owners[near != slots] = _COMMON
        if (owners == _COMMON).any():
            raise ValueError(
                f"slots {slots[owners == _COMMON][:8].tolist()} are not allocated: free what allocate gave"
            )
        parts = []
        for number in [int(owners[0])] if (owners == owners[0]).all() else np.unique(owners).tolist():
            kind = self._classes[number]
            mine = slots[owners == number]
            runs = self._first[extents[owners == number]]
            places, beside = np.divmod(mine - runs * self._extent_pages, kind.pages)
            wrong = (beside != 0) | (places >= kind.slots[runs])
            wrong |= ~kind.used[runs, np.where(wrong, 0, places)]
            if wrong.any():
                raise ValueError(f"slots {mine[wrong][:8].tolist()} are not allocated: free what allocate gave, once")
            parts.append((number, runs, places))
        for number, runs, places in parts:
            kind = self._classes[number]
            kind.used[runs, places] = False
            np.add.at(kind.free, runs, 1)
            self._used_bytes -= runs.size * kind.pages * PAGE
            self._reclaim(number, runs)

    def _class(self, slot_class: int) -> _SlotClass:
        if not 0 <= slot_class < len(self._classes):
            raise ValueError(f"slot class {slot_class}: there are {len(self._classes)}; use what slot_class() gave")
        return self._classes[slot_class]

    def _free_runs(self, kind: _SlotClass) -> tuple[_Counts, _Counts]:
        """Where runs could begin now: first extents, and how many slots each run would have; full ones first."""
        count, length = self._owner.size, kind.run_extents
        starts = np.arange(0, count, length)
        within = np.minimum(starts[:, None] + np.arange(length), count - 1)
        taken = (self._owner[within] != _COMMON) | (starts[:, None] + np.arange(length) >= count)
        lead = np.where(taken.any(axis=1), taken.argmax(axis=1), length)  # unassigned extents from the start on
        pages = np.minimum((starts + lead) * self._extent_pages, self._pages) - starts * self._extent_pages
        slots = np.minimum(np.maximum(pages, 0) // kind.pages, kind.run_slots)
        order = np.concatenate(
            [np.flatnonzero(slots == kind.run_slots), np.flatnonzero((slots > 0) & (slots < kind.run_slots))]
        )
        return starts[order], slots[order]

    def _grow(self, number: int, missing: int) -> bool:
        """Take runs for at least `missing` more slots; all or nothing."""
        starts, slots = self._free_runs(self._classes[number])
        total = np.cumsum(slots)
        if not total.size or total[-1] < missing:
            return False
        take = int(np.searchsorted(total, missing)) + 1
        self._assign(number, starts[:take], slots[:take])
        return True

    def _assign(self, number: int, starts: _Counts, slots: _Counts) -> None:
        """Make runs of a class, with so many slots each, all free."""
        kind = self._classes[number]
        kind.slots[starts] = kind.free[starts] = slots
        lengths = -(-slots * kind.pages // self._extent_pages)
        offsets = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        extents = np.repeat(starts, lengths) + offsets
        self._owner[extents] = number
        self._first[extents] = np.repeat(starts, lengths)

    def adopt(self, slots: Slots, slot_class: int) -> npt.NDArray[np.bool_]:
        """Take exactly these slots of a class, as they were allocated before a restart.

        Returns which were taken: (len(slots),) bool; not one that lies where the class can have no slot, where
        another class has a run now, or that is taken already. Classes with shorter runs should come first.
        """
        kind = self._class(slot_class)
        taken = np.zeros(len(slots), np.bool_)
        inside = (slots >= 0) & (slots + kind.pages <= self._pages)
        starts = np.where(inside, slots, 0) // self._extent_pages // kind.run_extents * kind.run_extents
        places, beside = np.divmod(slots - starts * self._extent_pages, kind.pages)
        fits = inside & (beside == 0) & (places < kind.run_slots)
        fresh = np.unique(starts[fits & (self._owner[starts] == _COMMON)])
        free_starts, free_slots = self._free_runs(kind)
        chosen = np.isin(free_starts, fresh)
        self._assign(slot_class, free_starts[chosen], free_slots[chosen])
        at = np.flatnonzero(fits & (self._owner[starts] == slot_class) & (self._first[starts] == starts))
        at = at[places[at] < kind.slots[starts[at]]]
        at = at[np.sort(np.unique(slots[at], return_index=True)[1])]  # each once
        at = at[~kind.used[starts[at], places[at]]]
        kind.used[starts[at], places[at]] = True
        np.subtract.at(kind.free, starts[at], 1)
        self._used_bytes += len(at) * kind.pages * PAGE
        taken[at] = True
        self._reclaim(slot_class, fresh[self._owner[fresh] == slot_class])
        return taken

    def _reclaim(self, number: int, runs: _Counts) -> None:
        """Give back those of these runs that are empty; one may be named several times."""
        kind = self._classes[number]
        empty = runs[kind.free[runs] == kind.slots[runs]]
        if empty.size:
            self._owner[(self._owner == number) & np.isin(self._first, empty)] = _COMMON
            kind.slots[empty] = kind.free[empty] = 0


def _run_extents(slot_pages: int, extent_pages: int) -> int:
    """Extents of a full run: see the module's docstring."""
    fewest = -(-slot_pages // extent_pages)
    lengths = range(fewest, fewest + _RUN_LENGTHS)
    waste = [length * extent_pages % slot_pages / (length * extent_pages) for length in lengths]
    return next((n for n, w in zip(lengths, waste, strict=True) if w <= _MOST_WASTE), lengths[waste.index(min(waste))])
