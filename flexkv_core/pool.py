"""Slots: which places of a slot-addressed tier are free. Knows sizes and numbers, not blocks.

Capacity is divided into extents. A slot class (the slots of one size) takes *runs* of contiguous extents, one extent
unless that would waste more than an eighth of it. A run whose slots are all free goes back when another class needs
it. A slot is named by its byte offset in the tier divided by `PAGE`.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import LayoutError
from flexkv_core.layout import PAGE

MIB = 1 << 20
MAX_SPAN = 64
MAX_WASTE = 1 / 8

SlotNumbers = npt.NDArray[np.int64]


class _Run:
    """Contiguous extents cut into slots of one class."""

    __slots__ = ("extents", "first_page", "in_use", "used")

    def __init__(self, first_page: int, extents: range, slots: int) -> None:
        self.first_page = first_page
        self.extents = extents
        self.used = np.zeros(slots, np.bool_)
        self.in_use = 0


class _SlotClass:
    """The slots of one size."""

    __slots__ = ("free", "pages", "runs", "slot_bytes", "span")

    def __init__(self, slot_bytes: int, span: int) -> None:
        self.slot_bytes = slot_bytes
        self.pages = slot_bytes // PAGE
        self.span = span
        self.runs: dict[int, _Run] = {}  # by number of the first extent
        self.free = np.zeros(0, np.int64)  # a stack: the last is given out first


class SlotPool:
    """Slots of several sizes within one capacity.

    Args:
        capacity_bytes: all of the tier; a last partial extent is used as far as it goes.
        extent_bytes: a multiple of `PAGE`.
    """

    def __init__(self, capacity_bytes: int, extent_bytes: int = 32 * MIB) -> None:
        if capacity_bytes <= 0 or extent_bytes <= 0 or extent_bytes % PAGE:
            raise LayoutError(
                f"capacity {capacity_bytes} in extents of {extent_bytes} bytes: both must be positive, "
                f"extents a multiple of {PAGE}"
            )
        self.capacity_bytes = capacity_bytes
        self.extent_bytes = extent_bytes
        self._classes: list[_SlotClass] = []
        self.clear()

    def clear(self) -> None:
        """Forget all allocations; classes stay."""
        self._extents = -(-self.capacity_bytes // self.extent_bytes)
        self._fresh = 0  # extents from here on were never given out
        self._returned: list[int] = []  # heap of extents given back
        self._owner: dict[int, tuple[int, int]] = {}  # extent -> (class, first extent of its run)
        for known in self._classes:
            known.runs.clear()
            known.free = np.zeros(0, np.int64)

    def slot_class(self, slot_bytes: int) -> int:
        """The class of slots of that size, made if it is new.

        Raises:
            LayoutError: not a multiple of `PAGE`, or more than the capacity.
        """
        for number, known in enumerate(self._classes):
            if known.slot_bytes == slot_bytes:
                return number
        if slot_bytes <= 0 or slot_bytes % PAGE:
            raise LayoutError(f"slot_bytes {slot_bytes}: must be a positive multiple of {PAGE}")
        if slot_bytes > self.capacity_bytes:
            raise LayoutError(
                f"a block takes {slot_bytes} bytes with its seal, the tier's capacity is {self.capacity_bytes}: "
                f"raise the capacity to at least {slot_bytes}"
            )
        self._classes.append(_SlotClass(slot_bytes, self._span(slot_bytes)))
        return len(self._classes) - 1

    def _span(self, slot_bytes: int) -> int:
        """Extents a run: the fewest that waste at most an eighth, else those that waste least."""
        smallest = -(-slot_bytes // self.extent_bytes)
        best, least = smallest, 1.0
        for span in range(smallest, max(smallest, min(MAX_SPAN, self._extents)) + 1):
            size = span * self.extent_bytes
            waste = (size % slot_bytes) / size
            if waste <= MAX_WASTE:
                return span
            if waste < least:
                best, least = span, waste
        return best

    def allocate(self, slot_class: int, count: int) -> SlotNumbers | None:
        """Give out `count` slots, or None (and nothing changes for the caller) if there are not as many."""
        known = self._classes[slot_class]
        while len(known.free) < count:
            if not self._grow(slot_class):
                return None
        cut = len(known.free) - count
        slots = known.free[cut:][::-1].copy()
        known.free = known.free[:cut]
        for run, index in self._locate(slots):
            run.used[index] = True
            run.in_use += len(index)
        return slots

    def free(self, slots: SlotNumbers) -> None:
        """Take slots back. Raises ValueError, and nothing changes, if one is not allocated or is named twice."""
        if not len(slots):
            return
        if len(np.unique(slots)) != len(slots):
            raise ValueError("a slot is freed twice in one call")
        located = self._locate(slots)
        if not all(run.used[index].all() for run, index in located):
            raise ValueError("a slot that is not allocated is freed")
        for run, index in located:
            run.used[index] = False
            run.in_use -= len(index)
        owners = np.array([self._owner[int(e)][0] for e in slots * PAGE // self.extent_bytes])
        for number in np.unique(owners):
            known = self._classes[int(number)]
            known.free = np.concatenate([known.free, slots[owners == number][::-1]])

    def available(self, slot_class: int) -> int:
        """Slots of a class that could be given out now."""
        known = self._classes[slot_class]
        self._reclaim(slot_class)
        per_run = known.span * self.extent_bytes // known.slot_bytes
        if known.span == 1:
            more = len(self._returned) * per_run
            whole = max(0, min(self._extents, self.capacity_bytes // self.extent_bytes) - self._fresh)
            more += whole * per_run
            if self._fresh < self._extents:
                more += (self.capacity_bytes % self.extent_bytes) // known.slot_bytes
            if self._returned and self._extents - 1 in self._returned and self.capacity_bytes % self.extent_bytes:
                more += (self.capacity_bytes % self.extent_bytes) // known.slot_bytes - per_run
            return len(known.free) + more
        return len(known.free) + sum(self._slots_in(run, known) for run in self._free_runs(known.span))

    def capacity(self, slot_class: int) -> int:
        """Slots of a class if it had all extents."""
        known = self._classes[slot_class]
        whole, rest = divmod(self.capacity_bytes, known.span * self.extent_bytes)
        return whole * (known.span * self.extent_bytes // known.slot_bytes) + rest // known.slot_bytes

    def extents(self, slot_class: int) -> int:
        """Extents that a class has taken."""
        return sum(len(run.extents) for run in self._classes[slot_class].runs.values())

    @property
    def used_bytes(self) -> int:
        """Bytes of all allocated slots."""
        return sum(sum(run.in_use for run in known.runs.values()) * known.slot_bytes for known in self._classes)

    # ---------------------------------------------------------------- extents

    def _free_runs(self, span: int) -> list[range]:
        """Disjoint runs of `span` contiguous free extents, lowest first; the last one may be cut by the capacity."""
        runs: list[range] = []
        start = length = -1
        for extent in [*sorted(self._returned), *range(self._fresh, self._extents)]:
            if start >= 0 and extent == start + length:
                length += 1
            else:
                start, length = extent, 1
            if length == span:
                runs.append(range(start, extent + 1))
                start = -1
        if start >= 0 and start + length == self._extents:
            runs.append(range(start, self._extents))
        return runs

    def _slots_in(self, extents: range, known: _SlotClass) -> int:
        end = min(extents.stop * self.extent_bytes, self.capacity_bytes)
        return (end - extents.start * self.extent_bytes) // known.slot_bytes

    def _grow(self, slot_class: int) -> bool:
        """Give a class one more run."""
        known = self._classes[slot_class]
        self._reclaim(slot_class)
        if known.span == 1 and self._returned:
            candidates = [range(self._returned[0], self._returned[0] + 1)]
        elif known.span == 1:
            candidates = [range(self._fresh, self._fresh + 1)] if self._fresh < self._extents else []
        else:
            candidates = self._free_runs(known.span)
        run = next((r for r in candidates if self._slots_in(r, known)), None)
        if run is None:
            return False
        for extent in run:
            if extent >= self._fresh:
                self._fresh = extent + 1
            else:
                self._returned.remove(extent)
            self._owner[extent] = (slot_class, run.start)
        heapq.heapify(self._returned)
        slots = self._slots_in(run, known)
        first = run.start * self.extent_bytes // PAGE
        known.runs[run.start] = _Run(first, run, slots)
        fresh = first + np.arange(slots - 1, -1, -1, dtype=np.int64) * known.pages
        known.free = np.concatenate([known.free, fresh])
        return True

    def _reclaim(self, wanting: int) -> None:
        """Take back the empty runs of all other classes."""
        for number, known in enumerate(self._classes):
            if number == wanting:
                continue
            for start in [s for s, run in known.runs.items() if not run.in_use]:
                run = known.runs.pop(start)
                end = run.first_page + len(run.used) * known.pages
                known.free = known.free[(known.free < run.first_page) | (known.free >= end)]
                for extent in run.extents:
                    del self._owner[extent]
                    heapq.heappush(self._returned, extent)

    def _locate(self, slots: SlotNumbers) -> list[tuple[_Run, npt.NDArray[np.int64]]]:
        """The runs that slots lie in, with their indices there. Raises ValueError for what is no slot."""
        found = []
        extents = slots * PAGE // self.extent_bytes
        starts = {int(e): self._owner.get(int(e)) for e in np.unique(extents)}
        if any(owner is None for owner in starts.values()):
            raise ValueError("a slot lies in no extent that was given out")
        run_of = np.array([starts[int(e)][1] for e in extents], np.int64)  # type: ignore[index]
        for start in np.unique(run_of):
            known = self._classes[self._owner[int(start)][0]]
            run = known.runs[int(start)]
            index, rest = np.divmod(slots[run_of == start] - run.first_page, known.pages)
            if rest.any() or (index >= len(run.used)).any():
                raise ValueError("a number is not that of a slot")
            found.append((run, index))
        return found
