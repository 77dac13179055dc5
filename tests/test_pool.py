"""Slot pools: sizes and errors by example, everything else against a model of byte ranges."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from flexkv_core.errors import LayoutError
from flexkv_core.layout import PAGE
from flexkv_core.pool import SlotPool

EXTENT = 8 * PAGE


def take(pool: SlotPool, slot_class: int, count: int) -> np.ndarray:
    slots = pool.allocate(slot_class, count)
    assert slots is not None
    return slots


def test_slots_are_page_numbers_lowest_first_and_whole_extents_come_back() -> None:
    pool = SlotPool(4 * EXTENT, EXTENT)
    small = pool.slot_class(2 * PAGE)
    assert pool.slot_class(2 * PAGE) == small
    slots = take(pool, small, 6)
    assert slots.dtype == np.int64
    assert slots.tolist() == [0, 2, 4, 6, 8, 10]
    assert (pool.used_bytes, pool.extents(small), pool.available(small), pool.capacity(small)) == (12 * PAGE, 2, 10, 16)
    pool.free(slots[[1, 4, 5]])
    assert pool.extents(small) == 1
    assert take(pool, small, 1).tolist() == [2]
    pool.clear()
    assert (pool.used_bytes, pool.extents(small), pool.available(small)) == (0, 0, 16)
    assert take(pool, small, 16).tolist() == list(range(0, 32, 2))


def test_all_or_nothing() -> None:
    pool = SlotPool(2 * EXTENT, EXTENT)
    number = pool.slot_class(PAGE)
    take(pool, number, 3)
    assert pool.allocate(number, 14) is None
    assert (pool.extents(number), pool.used_bytes, pool.available(number)) == (1, 3 * PAGE, 13)
    assert take(pool, number, 13).size == 13
    assert take(pool, number, 0).tolist() == []


def test_classes_share_what_is_unassigned() -> None:
    pool = SlotPool(3 * EXTENT, EXTENT)
    small, large = pool.slot_class(PAGE), pool.slot_class(EXTENT)
    a = take(pool, small, 1)
    assert pool.available(large) == 2
    b = take(pool, large, 2)
    assert pool.available(small) == 7
    pool.free(np.concatenate([b[:1], a]))
    assert pool.available(large) == 2
    assert take(pool, large, 2).tolist() == [0, 8]


@pytest.mark.parametrize(
    ("slot_pages", "extents", "slots"),
    [(1, 1, 8), (7, 7, 8), (3, 3, 8), (5, 5, 8), (9, 8, 7), (8, 1, 1), (16, 2, 1), (17, 15, 7)],
)
def test_runs_waste_little(slot_pages: int, extents: int, slots: int) -> None:
    pool = SlotPool(100 * EXTENT, EXTENT)
    number = pool.slot_class(slot_pages * PAGE)
    assert take(pool, number, slots).tolist() == [i * slot_pages for i in range(slots)]
    assert pool.extents(number) == extents
    assert take(pool, number, 1).tolist() == [extents * 8]
    assert 1 - slots * slot_pages / (extents * 8) <= 1 / 64


def test_a_partial_extent_and_short_gaps_are_used_as_far_as_they_go() -> None:
    pool = SlotPool(2 * EXTENT + 5 * PAGE + 17, EXTENT)
    number = pool.slot_class(2 * PAGE)
    assert pool.available(number) == pool.capacity(number) == 10
    assert take(pool, number, 10).tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert pool.available(number) == 0
    whole = SlotPool(2 * EXTENT + 5 * PAGE, EXTENT)
    assert take(whole, whole.slot_class(21 * PAGE), 1).tolist() == [0]


def test_bad_sizes() -> None:
    pool = SlotPool(2 * EXTENT, EXTENT)
    for size in (0, -PAGE, 100, PAGE + 1):
        with pytest.raises(LayoutError, match=f"slot_bytes {size}"):
            pool.slot_class(size)
    with pytest.raises(LayoutError, match=f"needs at least {3 * EXTENT}"):
        pool.slot_class(3 * EXTENT)
    with pytest.raises(LayoutError, match="capacity 100"):
        SlotPool(100)
    with pytest.raises(LayoutError, match="extent_bytes 5000"):
        SlotPool(EXTENT, 5000)
    with pytest.raises(ValueError, match="slot class 0"):
        pool.allocate(0, 1)
    number = pool.slot_class(PAGE)
    with pytest.raises(ValueError, match="count -1"):
        pool.allocate(number, -1)


@pytest.mark.parametrize("bad", [[0, 0], [1], [6], [-2], [10**9], [16], [2, 4]])
def test_a_bad_free_changes_nothing(bad: list[int]) -> None:
    pool = SlotPool(4 * EXTENT, EXTENT)
    pool.slot_class(PAGE)
    number = pool.slot_class(2 * PAGE)
    slots = take(pool, number, 4)
    pool.free(slots[[2, 3]])  # 4 and 6 are free now
    with pytest.raises(ValueError, match="slots"):
        pool.free(np.array([0, *bad], np.int64))
    with pytest.raises(ValueError, match="1-D int64"):
        pool.free(np.array([0.0]))
    assert pool.used_bytes == 4 * PAGE
    assert take(pool, number, 2).tolist() == [4, 6]
    pool.free(slots)
    assert pool.used_bytes == 0


def machine(counts: Counter[str]) -> type[RuleBasedStateMachine]:
    class Machine(RuleBasedStateMachine):
        @initialize(
            pages=st.integers(3, 60),
            sizes=st.lists(st.integers(1, 13), min_size=1, max_size=4),
            extent=st.integers(1, 6),
        )
        def make(self, pages: int, sizes: list[int], extent: int) -> None:
            self.pages, self.extent_pages = pages, extent
            self.pool = SlotPool(pages * PAGE + 5, extent * PAGE)
            self.sizes = {}
            for size in sizes:
                if size <= pages:
                    self.sizes[self.pool.slot_class(size * PAGE)] = size
            self.live: dict[int, int] = {}  # slot -> class
            self.order: list[int] = []

        @rule(pick=st.integers(0, 3), count=st.integers(0, 12))
        def allocate(self, pick: int, count: int) -> None:
            if not self.sizes:
                return
            number = list(self.sizes)[pick % len(self.sizes)]
            available = self.pool.available(number)
            slots = self.pool.allocate(number, count)
            assert (slots is None) == (count > available)
            counts["allocated" if slots is not None else "refused"] += 1
            if slots is not None:
                assert slots.tolist() == sorted(set(slots.tolist()))
                assert len(slots) == count
                assert not self.live.keys() & set(slots.tolist())
                assert self.pool.available(number) == available - count
                self.live.update(dict.fromkeys(slots.tolist(), number))

        @rule(data=st.data())
        def free(self, data: st.DataObject) -> None:
            if self.live:
                slots = data.draw(st.lists(st.sampled_from(sorted(self.live)), unique=True))
                self.pool.free(np.array(slots, np.int64))
                counts["freed"] += len(slots)
                for slot in slots:
                    del self.live[slot]

        @rule(slot=st.integers(-1, 70), data=st.data())
        def free_a_stranger(self, slot: int, data: st.DataObject) -> None:
            if slot not in self.live:
                others = [min(self.live)] if self.live else []
                with pytest.raises(ValueError, match="slots"):
                    self.pool.free(np.array([*others, slot], np.int64))
                counts["free refused"] += 1

        @invariant()
        def sound(self) -> None:
            counts["steps"] += 1
            taken = np.zeros(self.pages, np.int64)
            for slot, number in self.live.items():
                assert slot + self.sizes[number] <= self.pages
                taken[slot : slot + self.sizes[number]] += 1
            assert not (taken > 1).any(), "two slots overlap"
            assert self.pool.used_bytes == int(taken.sum()) * PAGE
            owned = 0
            for number, size in self.sizes.items():
                mine = [slot for slot, owner in self.live.items() if owner == number]
                extents = self.pool.extents(number)
                owned += extents
                assert extents >= len({p // self.extent_pages for s in mine for p in (s, s + size - 1)})
                assert bool(extents) == bool(mine), "an empty class keeps extents"
                assert len(mine) + self.pool.available(number) <= self.pages // size
            assert owned <= -(-self.pages // self.extent_pages)

        def teardown(self) -> None:
            self.pool.free(np.array(sorted(self.live), np.int64))
            for number, size in self.sizes.items():
                assert self.pool.available(number) == self.pool.capacity(number) >= 1
                everything = take(self.pool, number, self.pool.available(number))
                assert everything.max() + size <= self.pages
                self.pool.free(everything)
            counts["emptied"] += 1

    return Machine


def test_against_byte_ranges() -> None:
    counts: Counter[str] = Counter()
    run_state_machine_as_test(
        machine(counts),
        settings=settings(
            max_examples=80,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(sorted(counts.items())))
    for transition in ("allocated", "refused", "freed", "free refused", "emptied"):
        assert counts[transition], f"{transition} never happened"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=25), st.randoms(use_true_random=False))
def test_what_was_allocated_is_adopted_after_a_restart(steps: list[tuple[int, int]], dice: Random) -> None:
    """Slots given to a new pool in any order are taken again; only where classes met in one run may some be lost."""
    sizes = [4096, 12 * 1024, 100 * 1024, 700 * 1024]
    old, new = SlotPool(8 << 20, 256 << 10), SlotPool(8 << 20, 256 << 10)
    held: dict[int, list[int]] = {number: [] for number in range(4)}
    for pool in (old, new):
        for size in sizes:
            pool.slot_class(size)
    for number, count in steps:
        slots = old.allocate(number, count)
        if slots is not None:
            held[number] += slots.tolist()
            gone = dice.sample(held[number], len(held[number]) // 3)
            old.free(np.array(gone, np.int64))
            held[number] = [slot for slot in held[number] if slot not in gone]
    lost = 0
    kept: list[int] = []
    for number in sorted(range(4), key=new.run_extents):
        slots = np.array(dice.sample(held[number], len(held[number])), np.int64)
        taken = new.adopt(slots, number)
        lost += int((~taken).sum())
        kept += slots[taken].tolist()
        assert new.allocated(number) == taken.sum()
        assert not new.adopt(slots[taken], number).any(), "once only"
    if sum(bool(slots) for slots in held.values()) <= 1:
        assert not lost
        assert new.used_bytes == old.used_bytes
    new.free(np.array(kept, np.int64))
    assert new.used_bytes == 0
    assert [new.available(number) for number in range(4)] == [new.capacity(number) for number in range(4)]


def test_adopt_refuses_what_cannot_be() -> None:
    pool = SlotPool(4 << 20, 256 << 10)
    small, large = pool.slot_class(8192), pool.slot_class(100 * 1024)
    assert pool.adopt(np.array([0, 2, 1, -2, 1 << 40, 1022, 1024, 0]), small).tolist() == [
        True,
        True,
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    assert not pool.adopt(np.array([0, 25]), large).any(), "another class's run"
    assert pool.extents(large) == 0
    assert len(pool.adopt(np.zeros(0, np.int64), small)) == 0
