"""How much is evicted and when, slot classes that differ by tier, and rewards in seconds: the planner by example."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import GROUPS, ROOTS, SLOT, chain, put

from flexkv_core.errors import LayoutError, UnknownNamespaceError
from flexkv_core.index.reference import ReferenceIndex
from flexkv_core.layout import KVGroup
from flexkv_core.ledger import Clock
from flexkv_core.planner import Planner
from flexkv_core.policies import Eviction
from flexkv_core.pool import SlotPool
from flexkv_core.presence import Presence
from flexkv_core.tier_book import TierBook

# ---------------------------------------------------------------- how much is evicted, and when


def one_tier(slots: int, *, keyed: int | None = None, clock: Clock = lambda: 0, **options: Any) -> Planner:
    """Host memory with one model of one group; `options` of the host's book, or of the key-addressed tier's."""
    size = slots * SLOT
    own = options if keyed is None else {}
    books = [TierBook("cpu", "cpu", 0, "slot", size, SlotPool(size, 4 * SLOT), column=0, **own)]
    if keyed is not None:
        books.append(TierBook("dir", "dir", 1, "key", keyed * SLOT, presence=Presence(keyed * SLOT), **options))
    policies = [book.eviction for book in books if book.column is not None]
    planner = Planner(books, ReferenceIndex(len(policies), policies), clock)
    planner.add_model(ROOTS[0], GROUPS[:1])
    return planner


def blocks(planner: Planner, tier: int = 0) -> int:
    return planner.tiers[tier].used_bytes // SLOT


@pytest.mark.parametrize(("ratio", "evicted"), [(0.0, 1), (0.05, 1), (0.07, 2), (0.5, 10), (0.55, 11), (1.0, 20)])
def test_at_least_the_ratio_goes_at_a_time(ratio: float, evicted: int) -> None:
    planner = one_tier(20, evict_ratio=ratio)
    for number in range(20):
        put(planner, number)
    assert planner.tiers[0].counters.evicted_blocks == 0
    put(planner, 20)
    assert planner.tiers[0].counters.evicted_blocks == evicted
    put(planner, *range(30, 45))  # more than the ratio asks for: all that is needed
    assert blocks(planner) <= 20
    assert planner.lookup(ROOTS[0], chain(ROOTS[0], tuple(range(30, 45))))[1] == 15


def test_a_share_is_rounded_up_but_for_what_floating_point_adds() -> None:
    planner = one_tier(100, evict_ratio=0.07)  # 0.07 * 100 = 7.000000000000001
    put(planner, *range(100))
    put(planner, 200)
    assert planner.tiers[0].counters.evicted_blocks == 7


def test_where_the_ratio_cannot_go_what_is_needed_does() -> None:
    planner = one_tier(20, evict_ratio=0.5)
    for number in range(20):
        put(planner, number)
    fetches = [planner.begin_fetch(ROOTS[0], chain(ROOTS[0], (number,))) for number in range(18)]
    put(planner, 20)
    assert planner.tiers[0].counters.evicted_blocks == 1
    assert blocks(planner) == 20
    for fetch in fetches:
        assert planner.ready(fetch) == 1
        planner.release(fetch)


@pytest.mark.parametrize(
    ("threshold", "ratio", "left"), [(0.5, 0.0, 10), (0.5, 0.25, 6), (0.75, 0.0, 15), (0.99, 0.0, 19), (0.01, 0.0, 1)]
)
def test_eviction_starts_at_the_threshold(threshold: float, ratio: float, left: int) -> None:
    planner = one_tier(20, evict_start_threshold=threshold, evict_ratio=ratio)
    room = int(20 * threshold)
    for number in range(room):
        put(planner, number)
    assert planner.tiers[0].counters.evicted_blocks == 0
    put(planner, 20)
    assert blocks(planner) == left
    assert planner.lookup(ROOTS[0], chain(ROOTS[0], (20,)))[1] == 1


def test_more_than_the_threshold_is_stored_if_it_fits() -> None:
    """The threshold says when to evict; it takes no room away from one long prefix."""
    planner = one_tier(20, evict_start_threshold=0.5)
    put(planner, *range(18))
    assert planner.lookup(ROOTS[0], chain(ROOTS[0], tuple(range(18))))[1] == 18
    put(planner, *range(100, 118))  # as much goes as there is
    assert blocks(planner) == 18
    put(planner, 20)
    assert blocks(planner) == 10


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=7).map(tuple), max_size=25))
@settings(max_examples=100, deadline=None)
def test_by_default_exactly_what_is_short_goes(stores: list[tuple[int, ...]]) -> None:
    planner = one_tier(9)
    for path in stores:
        used, gone = blocks(planner), planner.tiers[0].counters.evicted_blocks
        new = len(path) - sum(planner.index.residency(ROOTS[0], chain(ROOTS[0], path), 0, 0) >= 0)
        put(planner, *path)
        assert planner.tiers[0].counters.evicted_blocks - gone == max(0, used + new - 9)
        assert planner.refused_blocks == 0


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=7).map(tuple), max_size=25),
    st.floats(0, 1),
    st.integers(1, 100),
)
@settings(max_examples=200, deadline=None)
def test_whatever_the_options_a_path_is_stored_and_the_threshold_kept(
    stores: list[tuple[int, ...]], ratio: float, percent: int
) -> None:
    planner = one_tier(9, evict_ratio=ratio, evict_start_threshold=percent / 100)
    for path in stores:
        new = len(path) - sum(planner.index.residency(ROOTS[0], chain(ROOTS[0], path), 0, 0) >= 0)
        put(planner, *path)
        assert planner.lookup(ROOTS[0], chain(ROOTS[0], path))[1] == len(path)
        limit = 9 * percent // 100
        if new and len(path) <= limit:  # else pins of the path itself are in the way
            assert blocks(planner) <= limit


@pytest.mark.parametrize(
    ("ratio", "threshold", "before", "left"),
    [(0.0, 1.0, 20, 20), (0.25, 1.0, 20, 16), (0.0, 0.5, 10, 10), (0.25, 0.5, 10, 6), (1.0, 1.0, 20, 1)],
)
def test_a_key_addressed_tier_has_the_same_options(ratio: float, threshold: float, before: int, left: int) -> None:
    planner = one_tier(64, keyed=20, evict_ratio=ratio, evict_start_threshold=threshold)
    for number in range(before):
        put(planner, number)
    assert planner.tiers[1].counters.evicted_blocks == 0
    put(planner, 20)
    assert blocks(planner, 1) == left
    assert planner.tiers[1].counters.evicted_blocks == before + 1 - left


# ---------------------------------------------------------------- slot classes, time


def test_tiers_may_number_their_slot_classes_differently() -> None:
    """A model that fits in host memory alone is refused, and has made a class there: the next model's is 1 in host
    memory and 0 below. Eviction in the lower tier must go by the tier's own number."""
    books = [
        TierBook("cpu", "cpu", 0, "slot", 40 * SLOT, SlotPool(40 * SLOT, 4 * SLOT), column=0),
        TierBook("ssd", "ssd", 1, "slot", 8 * SLOT, SlotPool(8 * SLOT, 4 * SLOT), column=1),
    ]
    planner = Planner(books, ReferenceIndex(2))
    with pytest.raises(LayoutError, match="cannot hold one slot"):
        planner.add_model(ROOTS[1], (KVGroup(20 * SLOT),))
    planner.add_model(ROOTS[0], GROUPS[:1])
    for number in range(12):
        put(planner, number)
    assert planner.tiers[1].counters.dropped_blocks == 0
    assert planner.tiers[1].counters.evicted_blocks == 4
    assert blocks(planner, 1) == 8
    with pytest.raises(UnknownNamespaceError):
        planner.lookup(ROOTS[1], chain(ROOTS[1], (0,)))


def test_a_hit_is_rewarded_in_seconds_of_the_clock() -> None:
    now = [0]
    planner = one_tier(2, clock=lambda: now[0], eviction=Eviction("lru", hit_reward_seconds=100))
    put(planner, 1)
    planner.release(planner.begin_fetch(ROOTS[0], chain(ROOTS[0], (1,))))  # counts as used at 100 s
    for second, held in ((50, 1), (99, 1), (101, 1), (102, 0)):
        now[0] = second * 1_000_000
        put(planner, second)
        assert planner.lookup(ROOTS[0], chain(ROOTS[0], (1,)))[1] == held, second


def test_the_clock_is_asked_only_where_a_policy_counts_in_seconds() -> None:
    def clock() -> int:
        raise AssertionError("nobody needs the time")

    planner = one_tier(2, clock=clock)
    put(planner, 1)
    planner.release(planner.begin_fetch(ROOTS[0], chain(ROOTS[0], (1,))))
