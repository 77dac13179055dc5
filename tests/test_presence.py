"""Presence: sentences of its docstrings, which the oracle in Python obeys too, and a state machine against a plain list
in order of use. `test_presence_pair.py` drives both with larger batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from reference_presence import ReferencePresence

from flexkv_core.errors import KeyInputError, KeyTypeError
from flexkv_core.presence import Entries, Presence

Kind = type[Presence] | type[ReferencePresence]
BOTH = pytest.mark.parametrize("kind", [Presence, ReferencePresence])


def keys(*names: int) -> np.ndarray:
    return np.array([[name] * 32 for name in names], np.uint8).reshape(-1, 32)


def u8(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def plain(entries: Entries) -> list[tuple[int, int, int]]:
    return [(int(k[0]), int(g), int(n)) for k, g, n in zip(*entries, strict=True)]


@BOTH
def test_overflow_takes_the_least_recent_first_and_leaves_before_parents(kind: Kind) -> None:
    presence = kind(100)
    presence.add(keys(1, 2, 3), u8(0, 0, 0), i64(40, 40, 40))
    presence.add(keys(9), u8(0), i64(30))
    assert presence.used_bytes == 150
    presence.touch(keys(1, 2, 3, 4), 0)
    over = presence.overflow()
    assert plain(over) == [(9, 0, 30), (3, 0, 40)]
    assert (over[0].dtype, over[1].dtype, over[2].dtype) == (np.uint8, np.uint8, np.int64)
    assert (presence.used_bytes, len(presence)) == (80, 2)
    assert presence.held(keys(1, 2, 3, 9), 0).tolist() == [True, True, False, False]
    assert plain(presence.overflow()) == []
    presence.add(*over)  # the deletion failed: others are tried first
    assert plain(presence.overflow())[0] == (2, 0, 40)


@BOTH
def test_groups_are_apart_and_lengths_are_replaced(kind: Kind) -> None:
    presence = kind(1000)
    presence.add(keys(1, 1), u8(0, 3), i64(10, 20))
    presence.add(keys(1), u8(3), i64(5))
    assert (presence.used_bytes, len(presence)) == (15, 2)
    presence.discard(keys(1, 7), u8(0, 0))
    assert (presence.held(keys(1), 0).tolist(), presence.held(keys(1), 3).tolist()) == ([False], [True])
    presence.clear()
    assert (presence.used_bytes, len(presence)) == (0, 0)


@BOTH
def test_evict_for_makes_room_as_far_as_pins_allow(kind: Kind) -> None:
    presence = kind(100)
    presence.add(keys(1, 2, 3), u8(0, 0, 0), i64(30, 30, 30))
    assert plain(presence.evict_for(10)) == []
    presence.pin(keys(3, 2), u8(0, 0))
    assert plain(presence.evict_for(50)) == [(1, 0, 30)]
    presence.unpin(keys(3), u8(0))
    assert plain(presence.evict_for(70)) == [(3, 0, 30)]
    assert plain(presence.evict_for(1000)) == []
    with pytest.raises(ValueError, match="nbytes -1"):
        presence.evict_for(-1)


@BOTH
def test_pins_count_and_outlive_entries(kind: Kind) -> None:
    presence = kind(0)
    presence.add(keys(1), u8(0), i64(10))
    presence.pin(keys(1, 1), u8(0, 0))
    presence.discard(keys(1), u8(0))
    presence.add(keys(1), u8(0), i64(10))
    presence.unpin(keys(1), u8(0))
    assert plain(presence.overflow()) == []
    with pytest.raises(ValueError, match="no such pin"):
        presence.unpin(keys(1, 1), u8(0, 0))
    presence.clear()
    presence.unpin(keys(1), u8(0))
    presence.add(keys(1), u8(0), i64(10))
    assert plain(presence.overflow()) == [(1, 0, 10)]


@BOTH
def test_a_tier_that_bounds_itself_is_forgotten_never_deleted(kind: Kind) -> None:
    presence = kind(None, max_entries=2)
    presence.add(keys(1, 2, 3), u8(0, 0, 0), i64(2**40, 2**40, 2**40))
    assert presence.held(keys(1, 2, 3), 0).tolist() == [True, True, False]
    assert plain(presence.overflow()) == plain(presence.evict_for(2**50)) == []


@BOTH
def test_too_many_entries_are_deleted_where_there_is_a_capacity(kind: Kind) -> None:
    presence = kind(100, max_entries=2)
    presence.add(keys(1, 2, 3), u8(0, 0, 0), i64(0, 0, 1))
    assert plain(presence.overflow()) == [(3, 0, 1)]


@BOTH
def test_bad_arguments_change_nothing(kind: Kind) -> None:
    presence = kind(100)
    with pytest.raises(KeyTypeError, match="uint8"):
        presence.held(keys(1).astype(np.int64), 0)
    with pytest.raises(KeyInputError, match="shape"):
        presence.held(keys(1)[:, :3], 0)
    with pytest.raises(KeyInputError, match="groups are"):
        presence.add(keys(1, 2), u8(0), i64(1, 1))
    with pytest.raises(KeyInputError, match="group 255"):
        presence.held(keys(1), 255)
    for lengths in (i64(1, -1), i64(1), np.ones(2)):
        with pytest.raises(ValueError, match="lengths are"):
            presence.add(keys(1, 2), u8(0, 0), lengths)
    for capacity, entries in ((-1, 1), (None, 0)):
        with pytest.raises(ValueError, match="must be"):
            kind(capacity, entries)
    assert (len(presence), presence.used_bytes) == (0, 0)


def test_lengths_are_bounded_so_that_their_sum_is() -> None:
    presence = Presence(None)
    most = 2**56 - 1
    with pytest.raises(ValueError, match="lengths are int64"):
        presence.add(keys(1), u8(0), i64(most + 1))
    names = np.arange(128 * 32).reshape(128, 32).astype(np.uint8)
    names[:, 0] = np.arange(128)
    presence.add(names, np.zeros(128, np.uint8), np.full(128, most))
    assert presence.used_bytes == 128 * most
    with pytest.raises(ValueError, match="lengths are int64"):
        presence.add(keys(200), u8(0), i64(most))
    assert (len(presence), presence.used_bytes) == (128, 128 * most)


def test_arrays_may_lie_in_memory_as_they_like() -> None:
    presence = Presence(None)
    names, groups, lengths = keys(1, 2, 3, 4), u8(0, 1, 0, 1), i64(1, 2, 3, 4)
    presence.add(names[::-2], groups[::-2], lengths[::-2])
    assert presence.held(np.asfortranarray(names), 1).tolist() == [False, True, False, True]
    assert presence.used_bytes == 6


def test_the_record_takes_about_64_bytes_an_entry() -> None:
    presence = Presence(None, 2**17)
    names = np.random.default_rng(0).integers(0, 256, (2**17, 32), np.uint8)
    presence.add(names, np.zeros(2**17, np.uint8), np.ones(2**17, np.int64))
    assert len(presence) == 2**17
    assert 48 < presence.memory_bytes / 2**17 <= 68


BATCH = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 1), st.integers(0, 30)), max_size=6)


def machine(counts: Counter[str]) -> type[RuleBasedStateMachine]:
    class Machine(RuleBasedStateMachine):
        @initialize(capacity=st.one_of(st.none(), st.integers(0, 120)), most=st.integers(1, 8))
        def make(self, capacity: int | None, most: int) -> None:
            self.presence, self.capacity, self.most = Presence(capacity, most), capacity, most
            self.order: list[tuple[int, int]] = []  # least recent first
            self.lengths: dict[tuple[int, int], int] = {}
            self.pins: Counter[tuple[int, int]] = Counter()

        def _use(self, entry: tuple[int, int]) -> None:
            self.order = [other for other in self.order if other != entry] + [entry]

        def _take(self, nbytes: int, capacity: float) -> list[tuple[int, int, int]]:
            taken = []
            for entry in list(self.order):
                used = sum(self.lengths.values())
                if used + nbytes <= capacity and len(self.order) <= self.most:
                    break
                if not self.pins[entry]:
                    self.order.remove(entry)
                    taken.append((*entry, self.lengths.pop(entry)))
            return taken

        @rule(batch=BATCH)
        def add(self, batch: list[tuple[int, int, int]]) -> None:
            self.presence.add(keys(*[b[0] for b in batch]), u8(*[b[1] for b in batch]), i64(*[b[2] for b in batch]))
            for name, group, length in reversed(batch):
                self._use((name, group))
                self.lengths[name, group] = length
            counts["added"] += len(batch)
            if self.capacity is None:
                counts["forgotten"] += len(self._take(0, float("inf")))

        @rule(batch=BATCH)
        def discard(self, batch: list[tuple[int, int, int]]) -> None:
            self.presence.discard(keys(*[b[0] for b in batch]), u8(*[b[1] for b in batch]))
            for entry in {(b[0], b[1]) for b in batch} & self.lengths.keys():
                self.order.remove(entry)
                del self.lengths[entry]
                counts["discarded"] += 1

        @rule(names=st.lists(st.integers(0, 7), max_size=5), group=st.integers(0, 1))
        def touch(self, names: list[int], group: int) -> None:
            self.presence.touch(keys(*names), group)
            for name in reversed(names):
                if (name, group) in self.lengths:
                    self._use((name, group))
                    counts["touched"] += 1

        @rule(batch=BATCH)
        def pin(self, batch: list[tuple[int, int, int]]) -> None:
            self.presence.pin(keys(*[b[0] for b in batch]), u8(*[b[1] for b in batch]))
            self.pins.update((b[0], b[1]) for b in batch)
            counts["pinned"] += len(batch)

        @rule(batch=BATCH)
        def unpin(self, batch: list[tuple[int, int, int]]) -> None:
            wanted = Counter((b[0], b[1]) for b in batch)
            names, groups = keys(*[b[0] for b in batch]), u8(*[b[1] for b in batch])
            if wanted <= self.pins:
                self.presence.unpin(names, groups)
                self.pins -= wanted
                counts["unpinned"] += len(batch)
            else:
                counts["unpin refused"] += 1
                with pytest.raises(ValueError, match="no such pin"):
                    self.presence.unpin(names, groups)

        @rule()
        def unpin_all(self) -> None:
            batch = list(self.pins.elements())
            self.presence.unpin(keys(*[b[0] for b in batch]), u8(*[b[1] for b in batch]))
            self.pins.clear()

        @rule()
        def overflow(self) -> None:
            expected = [] if self.capacity is None else self._take(0, self.capacity)
            assert plain(self.presence.overflow()) == expected
            counts["overflowed"] += len(expected)

        @rule(nbytes=st.integers(0, 60))
        def evict_for(self, nbytes: int) -> None:
            expected = [] if self.capacity is None else self._take(nbytes, self.capacity)
            assert plain(self.presence.evict_for(nbytes)) == expected
            counts["evicted"] += len(expected)

        @invariant()
        def agrees(self) -> None:
            counts["steps"] += 1
            assert (len(self.presence), self.presence.used_bytes) == (len(self.order), sum(self.lengths.values()))
            for group in (0, 1):
                expected = [(name, group) in self.lengths for name in range(8)]
                assert self.presence.held(keys(*range(8)), group).tolist() == expected

    return Machine


def test_against_a_list() -> None:
    counts: Counter[str] = Counter()
    run_state_machine_as_test(
        machine(counts),
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(sorted(counts.items())))
    for transition in (
        "added",
        "forgotten",
        "discarded",
        "touched",
        "unpinned",
        "unpin refused",
        "overflowed",
        "evicted",
    ):
        assert counts[transition], f"{transition} never happened"
