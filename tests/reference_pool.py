"""Which slots of a tier are free, as plainly as it can be said: the oracle of `native/slot_pool.hpp`.

A dict of runs, a set of slots for each; everything else is counted again whenever it is asked for. The interface is
that of `flexkv_core._native.SlotPool`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int64]


@dataclass
class Shape:
    """Of a class: pages of a slot, extents and slots of a full run."""

    pages: int
    run_extents: int
    run_slots: int


@dataclass
class Run:
    """Of a class, with so many slots; `used`: the numbers of those that are allocated."""

    number: int
    slots: int
    extents: range
    used: set[int] = field(default_factory=set)


class ReferenceSlots:
    """See `flexkv_core.pool.SlotPool`; sizes are in pages here."""

    def __init__(self, pages: int, extent_pages: int) -> None:
        self._pages = pages
        self._extent_pages = extent_pages
        self._count = -(-pages // extent_pages)
        self._shapes: list[Shape] = []
        self._runs: dict[int, Run] = {}  # by first extent

    def add_class(self, pages: int, run_extents: int, run_slots: int) -> int:
        self._shapes.append(Shape(pages, run_extents, run_slots))
        return len(self._shapes) - 1

    def clear(self) -> None:
        self._runs.clear()

    @property
    def used_pages(self) -> int:
        return sum(len(run.used) * self._shapes[run.number].pages for run in self._runs.values())

    @property
    def used_classes(self) -> list[int]:
        return sorted({run.number for run in self._runs.values()})

    def allocated(self, slot_class: int) -> int:
        return sum(len(run.used) for run in self._runs.values() if run.number == slot_class)

    def extents(self, slot_class: int) -> int:
        return sum(len(run.extents) for run in self._runs.values() if run.number == slot_class)

    def available(self, slot_class: int) -> int:
        mine = sum(run.slots for run in self._runs.values() if run.number == slot_class)
        return mine - self.allocated(slot_class) + sum(slots for _, slots in self._free_runs(slot_class))

    def allocate(self, slot_class: int, count: int) -> Slots | None:
        if count > self.available(slot_class):
            return None
        for first, slots in sorted(
            self._free_runs(slot_class), key=lambda run: run[1] < self._shapes[slot_class].run_slots
        ):
            if len(self._free(slot_class)) >= count:
                break
            self._assign(slot_class, first, slots)
        taken = self._free(slot_class)[:count]
        for slot in taken:
            run, place = self._place(slot)
            run.used.add(place)
        return np.array(taken, np.int64)

    def free(self, slots: Slots) -> None:
        if slots.ndim != 1 or (slots.size and slots.dtype != np.int64):
            raise ValueError(f"slots are {slots.dtype} {slots.shape}: pass a 1-D int64 array")
        named = slots.tolist()
        wrong = [slot for slot in named if not self._is_allocated(slot)]
        if len(set(named)) < len(named):
            raise ValueError("slots name a slot twice: free each once")
        if wrong:
            raise ValueError(f"slots {wrong[:8]} are not allocated: free what allocate gave, once")
        for slot in named:
            run, place = self._place(slot)
            run.used.remove(place)
        self._reclaim()

    def adopt(self, slots: Slots, slot_class: int) -> npt.NDArray[np.bool_]:
        shape = self._shapes[slot_class]
        taken = np.zeros(len(slots), np.bool_)
        for at, slot in enumerate(slots.tolist()):
            if not 0 <= slot <= self._pages - shape.pages:
                continue
            first = slot // self._extent_pages // shape.run_extents * shape.run_extents
            room = dict(self._free_runs(slot_class)).get(first)
            if room is not None:
                self._assign(slot_class, first, room)
            run = self._runs.get(first)
            place, beside = divmod(slot - first * self._extent_pages, shape.pages)
            if run is None or run.number != slot_class or beside or place >= run.slots or place in run.used:
                continue
            run.used.add(place)
            taken[at] = True
        self._reclaim()
        return taken

    def room_of_others(self, slot_class: int, most: int) -> list[tuple[int, int, int]]:
        shape = self._shapes[slot_class]
        found = []
        for start in range(0, self._count, shape.run_extents):
            stop = min(start + shape.run_extents, self._count)
            if min(stop * self._extent_pages, self._pages) - start * self._extent_pages < shape.pages:
                continue
            met = [run for run in self._runs.values() if set(run.extents) & set(range(start, stop))]
            used = sum(len(run.used) for run in met)
            if used and all(run.number != slot_class for run in met):
                first = min([start, *(run.extents.start for run in met)])
                last = max([stop, *(run.extents.stop for run in met)])
                found.append((first * self._extent_pages, min(last * self._extent_pages, self._pages), used))
        return sorted(found, key=lambda room: room[2])[:most]

    def _owners(self) -> dict[int, Run]:
        return {extent: run for run in self._runs.values() for extent in run.extents}

    def _free_runs(self, number: int) -> Iterator[tuple[int, int]]:
        """Where runs could begin, and how many slots each would have."""
        shape, owners = self._shapes[number], self._owners()
        for start in range(0, self._count, shape.run_extents):
            stop = start
            while stop < min(start + shape.run_extents, self._count) and stop not in owners:
                stop += 1
            pages = min(stop * self._extent_pages, self._pages) - start * self._extent_pages
            if min(pages // shape.pages, shape.run_slots) > 0:
                yield start, min(pages // shape.pages, shape.run_slots)

    def _assign(self, number: int, first: int, slots: int) -> None:
        length = -(-slots * self._shapes[number].pages // self._extent_pages)
        self._runs[first] = Run(number, slots, range(first, first + length))

    def _free(self, number: int) -> list[int]:
        """The free slots of a class's runs, ascending."""
        return [
            first * self._extent_pages + place * self._shapes[number].pages
            for first, run in sorted(self._runs.items())
            if run.number == number
            for place in range(run.slots)
            if place not in run.used
        ]

    def _place(self, slot: int) -> tuple[Run, int]:
        run = self._owners()[slot // self._extent_pages]
        return run, (slot - run.extents.start * self._extent_pages) // self._shapes[run.number].pages

    def _is_allocated(self, slot: int) -> bool:
        return any(
            slot == first * self._extent_pages + place * self._shapes[run.number].pages
            for first, run in self._runs.items()
            for place in run.used
        )

    def _reclaim(self) -> None:
        self._runs = {first: run for first, run in self._runs.items() if run.used}
