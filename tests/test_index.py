"""What the index promises, sentence by sentence; for every implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from index_examples import (
    NONE,
    OTHER,
    ROOT,
    add,
    all_evicted,
    blocks,
    evicted,
    figures,
    held,
    key,
    keys,
    put,
    recover,
    slots_of,
)

from flexkv_core.errors import KeyInputError, KeyTypeError, LayoutError, PolicyError, UnknownNamespaceError
from flexkv_core.index import MAX_SLOT, NO_TIER, GroupRule, Index
from flexkv_core.index.reference import ReferenceIndex
from flexkv_core.layout import Coverage
from flexkv_core.policies import Eviction

INDEXES: list[Any] = [ReferenceIndex]

MakeIndex = Callable[..., Index]
ALL, WINDOW2, STATE = Coverage(), Coverage.window(2), Coverage("state")


@pytest.fixture(params=INDEXES, ids=lambda made: made.__name__)
def make_index(request: pytest.FixtureRequest) -> MakeIndex:
    made: MakeIndex = request.param
    return made


@pytest.fixture
def index(make_index: MakeIndex) -> Index:
    """Two tiers, lru; one namespace with one group."""
    made = make_index(2)
    add(made)
    return made


def snapshot(index: Index, root: bytes = ROOT, groups: int = 1) -> Any:
    """All that can be read without knowing keys; `visited` may change with a call that fails."""
    columns = [index.copies(root, tier, group) for tier in range(2) for group in range(groups)]
    rows = [
        sorted(zip(c.slots.tolist(), c.depths.tolist(), map(bytes, c.keys), map(bytes, c.parents), strict=True))
        for c in columns
    ]
    return rows, figures(index, "namespaces", "positions", "orphans", "copies", "pinned")


# ---------------------------------------------------------------- making one


def test_policies_are_one_a_tier_and_lru_by_default(make_index: MakeIndex) -> None:
    for policies in (None, ["lru", "lfu"], [Eviction("slru"), "s3fifo"]):
        assert make_index(2, policies).count(1) == 0
    for tiers, given in ((2, ["lru"]), (1, ["lru", "lru"]), (0, []), (NO_TIER, None)):
        with pytest.raises(ValueError, match="tiers"):
            make_index(tiers, given)
    with pytest.raises(PolicyError, match="lru"):
        make_index(1, ["lur"])


def test_a_new_index_is_empty(make_index: MakeIndex) -> None:
    index = make_index(3)
    names = {"namespaces", "positions", "orphans", "copies", "pinned", "visited", "nodes", "memory_bytes"}
    assert names <= set(index.statistics())
    assert figures(index, "namespaces", "positions", "orphans", "copies", "pinned", "visited") == [0] * 6
    assert all(isinstance(value, int) for value in index.statistics().values())
    assert [index.count(tier) for tier in range(3)] == [0, 0, 0]
    assert evicted(index, 1) is None


# ---------------------------------------------------------------- namespaces


def test_adding_again_with_the_same_groups_does_nothing(index: Index) -> None:
    put(index, "ab", 1, 2)
    add(index, GroupRule())
    add(index, GroupRule(slot_class=(0, 0)))
    assert held(index, "ab") == [1, 2]
    for rules in ([GroupRule(), GroupRule()], [GroupRule(WINDOW2)], [GroupRule(slot_class=1)]):
        with pytest.raises(LayoutError):
            add(index, *rules)
    assert held(index, "ab") == [1, 2]


@pytest.mark.parametrize("rules", [[], [GroupRule(slot_class=(0, 1, 2))], [GroupRule(slot_class=-1)]])
def test_groups_that_cannot_be(index: Index, rules: list[GroupRule]) -> None:
    with pytest.raises(LayoutError):
        index.add_namespace(OTHER, rules)
    assert not index.has_namespace(OTHER)


@pytest.mark.parametrize("root", [b"", b"short", bytes(33)])
def test_a_root_has_32_bytes(index: Index, root: bytes) -> None:
    with pytest.raises(KeyInputError):
        add(index, root=root)


def test_unknown_namespaces(index: Index) -> None:
    path, slots = keys("ab", OTHER), slots_of(1, 2)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("retire_namespace", ()),
        ("match", (path,)),
        ("residency", (path, 0, 0)),
        ("touch", (path,)),
        ("insert", (path, 0, 0, slots)),
        ("remove", (path, 0, 0, 0, 2)),
        ("remove_subtree", (path,)),
        ("pin", (path, 0, 0, 0, 2)),
        ("unpin", (path, 0, 0, 0, 2)),
        ("recover", (0, 0, path, path, slots, slots)),
        ("copies", (0, 0)),
    ]
    for name, arguments in calls:
        with pytest.raises(UnknownNamespaceError):
            getattr(index, name)(OTHER, *arguments)
    assert not index.has_namespace(OTHER)
    assert index.has_namespace(ROOT)


def test_namespaces_do_not_mix(index: Index) -> None:
    add(index, root=OTHER)
    put(index, "abc", 1, 2, 3)
    assert index.match(OTHER, keys("abc")).blocks == 0
    put(index, "abc", 4, 5, 6, root=OTHER)
    assert (held(index, "abc"), held(index, "abc", root=OTHER)) == ([1, 2, 3], [4, 5, 6])
    assert index.count(0) == 6
    gone = index.evict(0, 6)
    assert gone is not None
    assert {(root.tobytes(), slot) for root, slot in zip(gone.roots, gone.slots.tolist(), strict=True)} == {
        (ROOT, 1), (ROOT, 2), (ROOT, 3), (OTHER, 4), (OTHER, 5), (OTHER, 6)
    }  # fmt: skip


def test_a_retired_namespace_matches_nothing_and_goes_first(index: Index) -> None:
    add(index, root=OTHER)
    put(index, "ab", 1, 2, root=OTHER)
    put(index, "ab", 3, 4)
    put(index, "abc", 5, tier=1)
    index.touch(OTHER, keys("ab", OTHER))
    put(index, "xyz", 6)  # stranded, and still later than retired ones
    index.retire_namespace(OTHER)
    index.retire_namespace(OTHER)
    found = index.match(OTHER, keys("ab", OTHER))
    assert (found.blocks, found.tiers.shape, found.slots.shape) == (0, (1, 0), (1, 0))
    assert held(index, "ab", root=OTHER) == [1, 2]
    for raises in (
        lambda: put(index, "c", 9, root=OTHER),
        lambda: index.insert(OTHER, keys("", OTHER), 0, 0, slots_of()),
        lambda: recover(index, ("c", 9), root=OTHER),
        lambda: add(index, root=OTHER),
    ):
        with pytest.raises(UnknownNamespaceError, match="reset"):
            raises()
    assert evicted(index, 1) == [2]
    assert index.has_namespace(OTHER)
    assert evicted(index, 2) == [1, 6]
    assert not index.has_namespace(OTHER)
    with pytest.raises(UnknownNamespaceError):
        index.retire_namespace(OTHER)
    with pytest.raises(UnknownNamespaceError):
        index.match(OTHER, keys("ab", OTHER))
    add(index, root=OTHER)  # forgotten is forgotten
    assert blocks(index, "ab", OTHER) == 0


def test_a_retired_namespace_can_still_be_read_pinned_and_cleared(index: Index) -> None:
    put(index, "abc", 1, 2, 3)
    index.pin(ROOT, keys("abc"), 0, 0, 2, 3)
    index.retire_namespace(ROOT)
    index.touch(ROOT, keys("abc"))
    index.pin(ROOT, keys("abc"), 0, 0, 0, 1)
    assert evicted(index, 1) is None
    index.unpin(ROOT, keys("abc"), 0, 0, 0, 1)
    index.unpin(ROOT, keys("abc"), 0, 0, 2, 3)
    assert sorted(index.copies(ROOT, 0, 0).slots.tolist()) == [1, 2, 3]
    assert index.remove(ROOT, keys("abc"), 0, 0, 1, 3).tolist() == [2, 3]
    assert index.has_namespace(ROOT)
    assert index.remove_subtree(ROOT, keys("a")).slots.tolist() == [1]
    assert not index.has_namespace(ROOT)


@pytest.mark.parametrize("last", ["nothing", "evict", "remove", "remove_subtree", "drop_tier"])
def test_a_retired_namespace_is_forgotten_with_its_last_copy(index: Index, last: str) -> None:
    if last != "nothing":
        put(index, "a", 1)
    index.retire_namespace(ROOT)
    assert index.has_namespace(ROOT) == (last != "nothing")
    if last == "evict":
        assert evicted(index, 1) == [1]
    elif last == "remove":
        index.remove(ROOT, keys("a"), 0, 0, 0, 1)
    elif last == "remove_subtree":
        index.remove_subtree(ROOT, keys(""))
    elif last == "drop_tier":
        index.drop_tier(1)
        assert index.has_namespace(ROOT)
        index.drop_tier(0)
    assert not index.has_namespace(ROOT)
    assert figures(index, "namespaces", "positions", "copies") == [0, 0, 0]


def test_an_empty_namespace_that_is_not_retired_stays(index: Index) -> None:
    put(index, "a", 1)
    assert evicted(index, 1) == [1]
    index.drop_tier(0)
    assert index.has_namespace(ROOT)


# ---------------------------------------------------------------- match and residency


def test_match_names_the_fastest_tier(index: Index) -> None:
    put(index, "abcd", 10, 11, 12, 13, tier=1)
    put(index, "ab", 1, 2)
    found = index.match(ROOT, keys("abcde"))
    assert found.blocks == 4
    assert (found.tiers.dtype, found.slots.dtype) == (np.uint8, np.int64)
    assert found.tiers.tolist() == [[0, 0, 1, 1]]
    assert found.slots.tolist() == [[1, 2, 12, 13]]
    assert held(index, "abcde", tier=1) == [10, 11, 12, 13, NONE]
    assert held(index, "abx", tier=1) == [10, 11, NONE]


def test_match_may_know_more_places_than_the_prefix_it_supplies(index: Index) -> None:
    put(index, "abcd", 1, 2, NONE, 4)
    found = index.match(ROOT, keys("abcde"))
    assert found.blocks == 2
    assert found.tiers.tolist() == [[0, 0, NO_TIER, 0]]
    assert found.slots.tolist() == [[1, 2, NONE, 4]]


def test_match_of_no_keys_and_of_strange_keys(index: Index) -> None:
    put(index, "ab", 1, 2)
    for path in ("", "x", "ba"):
        found = index.match(ROOT, keys(path))
        assert (found.blocks, found.tiers.shape) == (0, (1, 0))
    assert held(index, "") == []


def test_match_satisfies_every_group(make_index: MakeIndex) -> None:
    index = make_index(1)
    add(index, GroupRule(ALL), GroupRule(WINDOW2, 1), GroupRule(STATE, 2))
    put(index, "abcdef", 1, 2, 3, 4, 5, 6)
    put(index, "abcde", NONE, 12, 13, NONE, 15, group=1)
    put(index, "abcdef", NONE, 22, 23, NONE, 25, 26, group=2)
    found = index.match(ROOT, keys("abcdef"))
    assert found.blocks == 3  # 6 and 5 lack the window, 4 lacks the state
    assert found.tiers[1].tolist() == [NO_TIER, 0, 0, NO_TIER, 0, NO_TIER]
    index.remove(ROOT, keys("abcdef"), 0, 0, 0, 1)
    assert blocks(index, "abcdef") == 0


def test_match_changes_no_recency(index: Index) -> None:
    put(index, "a", 1)
    put(index, "b", 2)
    index.match(ROOT, keys("a"))
    held(index, "a")
    index.copies(ROOT, 0, 0)
    assert evicted(index, 1) == [1]


# ---------------------------------------------------------------- insert


def test_insert_with_gaps_makes_places_up_to_the_last_inserted(index: Index) -> None:
    assert put(index, "abcde", 1, NONE, 3, NONE, NONE) == [True, False, True, False, False]
    assert figures(index, "positions", "copies") == [3, 2]
    assert index.match(ROOT, keys("abcde")).tiers.shape == (1, 3)


def test_insert_of_nothing_makes_no_places(index: Index) -> None:
    assert put(index, "ab", NONE, NONE) == [False, False]
    assert put(index, "") == []
    assert figures(index, "positions") == [0]


def test_a_position_keeps_the_copy_that_it_has(index: Index) -> None:
    put(index, "ab", 1, 2)
    put(index, "x", 9)
    assert put(index, "abc", 5, 6, 7) == [False, False, True]
    assert held(index, "abc") == [1, 2, 7]
    assert put(index, "abc", 5, 6, 8, tier=1) == [True] * 3
    # and its recency: a and b are older than x, c is younger
    assert all_evicted(index) == [9, 7, 2, 1]


def test_slots_are_forty_bits(index: Index) -> None:
    assert put(index, "abc", 0, MAX_SLOT, 1 << 33) == [True] * 3
    assert held(index, "abc") == [0, MAX_SLOT, 1 << 33]
    before = snapshot(index)
    for bad in (slots_of(5, MAX_SLOT + 1), slots_of(-2, 5), slots_of(5), slots_of(5, 6, 7), np.array([5, 6], np.int32)):
        with pytest.raises(ValueError, match="slots"):
            index.insert(ROOT, keys("xy"), 0, 0, bad)
    assert snapshot(index) == before


@pytest.mark.parametrize(("tier", "group"), [(2, 0), (-1, 0), (0, 1), (0, -1)])
def test_columns_that_there_are_not(index: Index, tier: int, group: int) -> None:
    put(index, "ab", 1, 2)
    before = snapshot(index)
    path, slots = keys("ab"), slots_of(3, 4)
    calls: list[Callable[[], object]] = [
        lambda: index.insert(ROOT, path, tier, group, slots),
        lambda: index.residency(ROOT, path, tier, group),
        lambda: index.remove(ROOT, path, tier, group, 0, 1),
        lambda: index.pin(ROOT, path, tier, group, 0, 1),
        lambda: index.unpin(ROOT, path, tier, group, 0, 1),
        lambda: index.recover(ROOT, tier, group, path, path, slots, slots),
        lambda: index.copies(ROOT, tier, group),
    ]
    if group == 0:
        calls += [lambda: index.evict(tier, 0), lambda: index.count(tier), lambda: index.drop_tier(tier)]
    for call in calls:
        with pytest.raises(ValueError, match="tier" if group == 0 else "group"):
            call()
    assert snapshot(index) == before


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (keys("ab").astype(np.int64), KeyTypeError),
        (keys("ab").tobytes(), KeyTypeError),
        (keys("ab")[:, :31], KeyInputError),
        (keys("ab").reshape(-1), KeyInputError),
    ],
)
def test_keys_are_arrays_of_32_bytes_a_row(index: Index, bad: Any, error: type[Exception]) -> None:
    put(index, "ab", 1, 2)
    before = snapshot(index)
    good, slots = keys("ab"), slots_of(3, 4)
    calls: list[Callable[[], object]] = [
        lambda: index.match(ROOT, bad),
        lambda: index.residency(ROOT, bad, 0, 0),
        lambda: index.touch(ROOT, bad),
        lambda: index.insert(ROOT, bad, 0, 0, slots),
        lambda: index.remove(ROOT, bad, 0, 0, 0, 1),
        lambda: index.remove_subtree(ROOT, bad),
        lambda: index.pin(ROOT, bad, 0, 0, 0, 1),
        lambda: index.unpin(ROOT, bad, 0, 0, 0, 1),
        lambda: index.recover(ROOT, 0, 0, bad, good, slots, slots),
        lambda: index.recover(ROOT, 0, 0, good, bad, slots, slots),
    ]
    for call in calls:
        with pytest.raises(error):
            call()
    assert snapshot(index) == before


# ---------------------------------------------------------------- time


def test_touch_counts_for_all_tiers_and_groups(make_index: MakeIndex) -> None:
    index = make_index(2)
    add(index, GroupRule(), GroupRule(WINDOW2))
    for tier in range(2):
        for group in range(2):
            put(index, "a", 10 * tier + group, tier=tier, group=group)
            put(index, "b", 10 * tier + group + 100, tier=tier, group=group)
    index.touch(ROOT, keys("a"))
    assert all_evicted(index) == [100, 101, 0, 1]
    assert all_evicted(index, 1) == [110, 111, 10, 11]


def test_touch_of_a_part_and_of_more_than_there_is(index: Index) -> None:
    put(index, "abc", 1, 2, 3)
    put(index, "xyz", 4, 5, 6)
    index.touch(ROOT, keys("abcdefgh"))
    index.touch(ROOT, keys("x"))
    assert all_evicted(index) == [6, 5, 3, 2, 1, 4]


def _calls_that_count() -> dict[str, Callable[[Index], object]]:
    return {
        "touch": lambda index: index.touch(ROOT, keys("a")[:0]),
        "touch of nothing": lambda index: index.touch(ROOT, keys("nothing")),
        "insert": lambda index: put(index, "zz", 8, 9, tier=1),
        "insert of nothing": lambda index: put(index, "zz", NONE, NONE),
        "insert without keys": lambda index: put(index, ""),
        "recover": lambda index: recover(index, ("xyz", 7), tier=1),
        "recover of nothing": lambda index: recover(index),
    }


@pytest.mark.parametrize("call", _calls_that_count())
def test_each_call_is_one_tick_later(make_index: MakeIndex, call: str) -> None:
    for calls, order in ((1, [2, 1]), (3, [1, 2])):
        index = make_index(2, [Eviction("lru", hit_reward_seconds=3e-6), "lru"])
        add(index)
        put(index, "a", 1)  # tick 1
        index.touch(ROOT, keys("a"))  # tick 2: a stands at 5
        for _ in range(calls):
            _calls_that_count()[call](index)
        put(index, "b", 2)  # 4 or 6
        assert all_evicted(index) == order, calls


def test_other_calls_and_errors_take_no_time(make_index: MakeIndex) -> None:
    index = make_index(2, [Eviction("lru", hit_reward_seconds=3e-6), "lru"])
    add(index)
    put(index, "a", 1)  # tick 1
    index.touch(ROOT, keys("a"))  # tick 2: a stands at 5
    for _ in range(9):
        index.match(ROOT, keys("a"))
        index.pin(ROOT, keys("a"), 0, 0, 0, 1)
        index.unpin(ROOT, keys("a"), 0, 0, 0, 1)
        index.remove(ROOT, keys("a"), 1, 0, 0, 1)
        index.remove_subtree(ROOT, keys("x"))
        index.end_recovery()
        index.drop_tier(1)
        add(index)
        assert index.evict(0, 5) is None
        with pytest.raises(ValueError, match="slots"):
            index.insert(ROOT, keys("b"), 0, 0, slots_of())
        with pytest.raises(ValueError, match="slots"):
            index.recover(ROOT, 0, 0, keys("b"), keys("b"), slots_of(0), slots_of(NONE))
        with pytest.raises(UnknownNamespaceError):
            index.touch(OTHER, keys("a"))
    put(index, "b", 2)  # tick 3
    assert all_evicted(index) == [2, 1]


def test_advance_only_goes_forward(make_index: MakeIndex) -> None:
    index = make_index(1, [Eviction("lru", hit_reward_seconds=10e-6)])
    add(index)
    put(index, "a", 1)  # 1
    index.advance(100)
    index.touch(ROOT, keys("a"))  # 101: a at 111
    index.advance(50)
    put(index, "b", 2)  # 102
    index.advance(111)
    put(index, "c", 3)  # 112
    assert all_evicted(index) == [2, 1, 3]


# ---------------------------------------------------------------- pins


def test_pins_count(index: Index) -> None:
    put(index, "ab", 1, 2)
    for _ in range(2):
        index.pin(ROOT, keys("ab"), 0, 0, 1, 2)
    index.unpin(ROOT, keys("ab"), 0, 0, 1, 2)
    assert evicted(index, 1) is None
    assert figures(index, "pinned") == [1]
    index.unpin(ROOT, keys("ab"), 0, 0, 1, 2)
    assert figures(index, "pinned") == [0]
    assert evicted(index, 2) == [2, 1]


def test_only_copies_that_exist_can_be_pinned(index: Index) -> None:
    put(index, "abcd", 1, NONE, 3, 4)
    before = snapshot(index)
    for start, stop in ((0, 2), (0, 4), (3, 5), (1, 2)):
        with pytest.raises(ValueError, match="held"):
            index.pin(ROOT, keys("abcde"), 0, 0, start, stop)
    with pytest.raises(ValueError, match="held"):
        index.pin(ROOT, keys("abcd"), 1, 0, 0, 1)
    for start, stop in ((-1, 1), (2, 1), (0, 6), (6, 6)):
        for method in (index.pin, index.unpin, index.remove):
            with pytest.raises(ValueError):  # noqa: PT011 - either of two texts
                method(ROOT, keys("abcde"), 0, 0, start, stop)
    assert snapshot(index) == before
    index.pin(ROOT, keys("abcde"), 0, 0, 5, 5)
    index.pin(ROOT, keys("abcd"), 0, 0, 2, 4)
    assert figures(index, "pinned") == [2]


def test_unpin_needs_a_pin_of_each(index: Index) -> None:
    put(index, "abc", 1, 2, 3)
    index.pin(ROOT, keys("abc"), 0, 0, 0, 2)
    for start, stop in ((0, 3), (2, 3)):
        with pytest.raises(ValueError, match="pin"):
            index.unpin(ROOT, keys("abc"), 0, 0, start, stop)
    assert figures(index, "pinned") == [2]
    index.unpin(ROOT, keys("abc"), 0, 0, 0, 2)
    assert figures(index, "pinned") == [0]


def test_pins_survive_that_paths_split_and_leave(index: Index) -> None:
    put(index, "abcdef", 1, 2, 3, 4, 5, 6)
    index.pin(ROOT, keys("abcdef"), 0, 0, 0, 4)
    put(index, "abxy", 7, 8)
    put(index, "abcz", 9)
    assert evicted(index, 5) == [6, 5, 8, 7, 9]
    assert evicted(index, 1) is None
    index.unpin(ROOT, keys("abcd"), 0, 0, 0, 4)
    assert evicted(index, 4) == [4, 3, 2, 1]


def test_a_pin_is_of_one_column(index: Index) -> None:
    put(index, "a", 1)
    put(index, "a", 2, tier=1)
    index.pin(ROOT, keys("a"), 0, 0, 0, 1)
    assert evicted(index, 1) is None
    assert evicted(index, 1, tier=1) == [2]


# ---------------------------------------------------------------- removal


def test_remove_leaves_holes_and_strands_what_is_behind(index: Index) -> None:
    put(index, "abcd", 1, 2, 3, 4)
    put(index, "x", 9)
    index.touch(ROOT, keys("abcd"))
    assert index.remove(ROOT, keys("abcde"), 0, 0, 1, 5).tolist() == [2, 3, 4, NONE]
    assert blocks(index, "abcd") == 1
    assert figures(index, "positions", "copies") == [2, 2]
    put(index, "abcd", 3, 4)
    assert blocks(index, "abcd") == 1
    index.touch(ROOT, keys("abcd"))
    assert evicted(index, 2) == [4, 3]  # before x, which is older
    put(index, "abcd", 3, 4)
    put(index, "abcd", 2, NONE, NONE)  # the hole closes
    assert blocks(index, "abcd") == 4
    assert all_evicted(index)[0] == 9


def test_a_copy_in_another_tier_closes_a_hole(index: Index) -> None:
    put(index, "abc", 1, 2, 3)
    put(index, "x", 9)
    index.touch(ROOT, keys("abc"))
    put(index, "ab", 5, tier=1)
    index.remove(ROOT, keys("abc"), 0, 0, 1, 2)
    assert blocks(index, "abc") == 3
    assert evicted(index, 1) == [9]
    assert evicted(index, 1, tier=1) == [5]
    put(index, "y", 8)
    index.touch(ROOT, keys("abc"))
    assert all_evicted(index) == [3, 8, 1]


def test_holes_are_of_their_group_and_only_of_all_coverage(make_index: MakeIndex) -> None:
    index = make_index(1)
    add(index, GroupRule(ALL), GroupRule(ALL), GroupRule(WINDOW2), GroupRule(STATE))
    for group in range(4):
        put(index, "ab", 10 * group + 2, group=group)
        put(index, "x", 10 * group + 9, group=group)
    put(index, "a", 11, group=1)
    index.touch(ROOT, keys("ab"))
    # group 0 has a hole at a; group 1 has none; groups 2 and 3 cannot have any
    assert evicted(index, 1) == [2]
    assert evicted(index, 4) == [9, 19, 29, 39]


def test_remove_refuses_pinned_copies(index: Index) -> None:
    put(index, "abc", 1, 2, 3)
    index.pin(ROOT, keys("abc"), 0, 0, 1, 2)
    before = snapshot(index)
    with pytest.raises(ValueError, match="pinned"):
        index.remove(ROOT, keys("abc"), 0, 0, 0, 3)
    for path in ("", "a", "ab"):
        with pytest.raises(ValueError, match="pinned"):
            index.remove_subtree(ROOT, keys(path))
    assert snapshot(index) == before
    assert index.remove_subtree(ROOT, keys("abc")).slots.tolist() == [3]


def test_remove_subtree_takes_all_columns_below(make_index: MakeIndex) -> None:
    index = make_index(2)
    add(index, GroupRule(), GroupRule(STATE))
    put(index, "abcd", 1, 2, 3, 4)
    put(index, "abxy", 13, 14, tier=1, group=1)
    put(index, "abxy", 7)
    gone = index.remove_subtree(ROOT, keys("ab"))
    rows = zip(gone.tiers.tolist(), gone.groups.tolist(), gone.slots.tolist(), map(bytes, gone.keys), strict=True)
    assert sorted(rows) == [
        (0, 0, 2, key("ab")),
        (0, 0, 3, key("abc")),
        (0, 0, 4, key("abcd")),
        (0, 0, 7, key("abxy")),
        (1, 1, 13, key("abx")),
        (1, 1, 14, key("abxy")),
    ]
    assert (gone.tiers.dtype, gone.groups.dtype, gone.slots.dtype) == (np.uint8, np.uint8, np.int64)
    assert held(index, "abcd") == [1, NONE, NONE, NONE]
    assert figures(index, "positions", "copies") == [1, 1]


def test_remove_subtree_of_what_there_is_not(index: Index) -> None:
    put(index, "ab", 1, 2)
    for path in ("x", "abc", "ax"):
        gone = index.remove_subtree(ROOT, keys(path))
        assert gone.keys.shape == (0, 32)
        assert gone.tiers.shape == gone.groups.shape == gone.slots.shape == (0,)
    assert index.count(0) == 2


def test_remove_subtree_without_keys_takes_orphans_too(index: Index) -> None:
    put(index, "ab", 1, 2)
    recover(index, ("xyz", 3), ("xyzz", 4))
    assert sorted(index.remove_subtree(ROOT, keys("")).slots.tolist()) == [1, 2, 3, 4]
    assert figures(index, "positions", "orphans", "copies", "namespaces") == [0, 0, 0, 1]


def test_drop_tier_forgets_pinned_copies_too(index: Index) -> None:
    put(index, "abc", 1, 2, 3)
    put(index, "ab", 11, 12, tier=1)
    index.pin(ROOT, keys("abc"), 0, 0, 0, 3)
    index.drop_tier(0)
    assert (index.count(0), index.count(1)) == (0, 2)
    assert figures(index, "pinned", "positions", "copies") == [0, 2, 2]
    with pytest.raises(ValueError, match="held"):
        index.unpin(ROOT, keys("abc"), 0, 0, 0, 3)
    assert blocks(index, "abc") == 2
    put(index, "abc", 1, 2, 3)
    assert evicted(index, 3) == [3, 2, 1]


# ---------------------------------------------------------------- eviction


def test_evict_is_leaf_first_in_a_column(index: Index) -> None:
    put(index, "abcd", 1, 2, 3, 4)
    put(index, "abx", 5)
    put(index, "abcd", 11, 12, 13, 14, tier=1)
    index.touch(ROOT, keys("abcd"))
    assert evicted(index, 3) == [5, 4, 3]
    assert evicted(index, 1, tier=1) == [14]  # what tier 0 lacks does not matter to tier 1
    assert evicted(index, 2) == [2, 1]


def test_a_deeper_copy_behind_a_gap_holds_back(index: Index) -> None:
    put(index, "abcd", 1, NONE, NONE, 4)
    put(index, "abcd", 11, 12, 13, 14, tier=1)
    index.pin(ROOT, keys("abcd"), 0, 0, 3, 4)
    assert evicted(index, 1) is None
    index.unpin(ROOT, keys("abcd"), 0, 0, 3, 4)
    assert evicted(index, 2) == [4, 1]


def test_evict_gives_exactly_so_many_or_none(index: Index) -> None:
    put(index, "abc", 1, 2, 3)
    put(index, "abx", 4)
    index.pin(ROOT, keys("abx"), 0, 0, 2, 3)
    before = snapshot(index)
    assert evicted(index, 2) is None  # c could go, b holds x
    assert snapshot(index) == before
    assert evicted(index, 0) == []
    assert evicted(index, 1) == [3]
    with pytest.raises(ValueError, match="count"):
        index.evict(0, -1)


def test_evict_that_fails_keeps_the_order(index: Index) -> None:
    for slot, path in enumerate(("a", "b", "c", "d")):
        put(index, path, slot)
    index.pin(ROOT, keys("b"), 0, 0, 0, 1)
    assert evicted(index, 4) is None
    index.unpin(ROOT, keys("b"), 0, 0, 0, 1)
    assert evicted(index, 4) == [0, 1, 2, 3]


def test_equals_go_deeper_first_then_by_group_and_key(make_index: MakeIndex) -> None:
    index = make_index(1, ["fifo"])
    add(index)
    paths = ["a", "b", "c", "d", "bx", "cx", "cxy"]
    recover(index, *((path, slot) for slot, path in enumerate(paths)))  # one tick for all
    order = sorted(range(len(paths)), key=lambda slot: (-len(paths[slot]), key(paths[slot])))
    assert all_evicted(index) == order
    index = make_index(1)
    add(index, GroupRule(), GroupRule(), GroupRule())
    for group in (1, 0, 2):
        put(index, "ab", 10 * group, 10 * group + 1, group=group)
    index.touch(ROOT, keys("ab"))  # one tick for all groups
    assert all_evicted(index) == [1, 11, 21, 0, 10, 20]


def test_evict_is_of_one_slot_class(make_index: MakeIndex) -> None:
    index = make_index(2)
    add(index, GroupRule(ALL, 0), GroupRule(STATE, (1, 0)))
    for tier in range(2):
        put(index, "ab", 1, 2, tier=tier, group=0)
        put(index, "ab", 3, 4, tier=tier, group=1)
    assert evicted(index, 3, slot_class=0) is None
    assert evicted(index, 1, slot_class=2) is None
    gone = index.evict(0, 2, 1)
    assert gone is not None
    assert (gone.slots.tolist(), gone.groups.tolist()) == ([4, 3], [1, 1])
    assert gone.keys.tolist() == keys("ab")[::-1].tolist()
    assert gone.roots.tolist() == [list(ROOT)] * 2
    assert evicted(index, 4, tier=1) == [2, 1, 4, 3]


def test_positions_without_copies_and_descendants_leave(index: Index) -> None:
    put(index, "abcd", 1, NONE, NONE, 4)
    put(index, "abxy", 6)
    assert figures(index, "positions", "copies") == [6, 3]
    assert evicted(index, 1) == [4]
    assert figures(index, "positions") == [4]
    assert evicted(index, 2) == [6, 1]
    assert figures(index, "positions", "nodes") == [0, 0]


def test_visited_counts_what_evictions_look_at(index: Index) -> None:
    put(index, "abc", 1, 2, 3)
    before = figures(index, "visited")[0]
    assert evicted(index, 3) is not None
    assert 0 < figures(index, "visited")[0] - before < 30


# ---------------------------------------------------------------- recovery


def test_recover_rebuilds_the_tree_in_any_order(index: Index) -> None:
    assert recover(index, ("abc", 3), ("ab", 2), ("a", 1), ("abx", 4)) == [True] * 4
    index.end_recovery()
    assert held(index, "abc") == [1, 2, 3]
    assert blocks(index, "abx") == 3
    assert figures(index, "positions", "orphans") == [4, 0]


def test_orphans_match_nothing_go_first_and_join(index: Index) -> None:
    put(index, "q", 9)
    assert recover(index, ("abcd", 4), ("abc", 3)) == [True, True]
    assert figures(index, "positions", "orphans", "copies") == [3, 1, 3]
    assert blocks(index, "abcd") == 0
    assert held(index, "abcd") == [NONE] * 4
    index.touch(ROOT, keys("abcd"))  # reaches none of them
    with pytest.raises(ValueError, match="held"):
        index.pin(ROOT, keys("abcd"), 0, 0, 2, 4)
    assert evicted(index, 1) == [4]
    put(index, "ab", 1, 2)
    assert figures(index, "positions", "orphans") == [4, 0]
    assert blocks(index, "abcd") == 3
    assert all_evicted(index) == [9, 3, 2, 1]


def test_orphans_join_when_recovery_brings_their_parent(index: Index) -> None:
    recover(index, ("abcd", 4))
    recover(index, ("ab", 2))
    assert figures(index, "orphans") == [2]
    recover(index, ("abc", 3))
    assert figures(index, "orphans") == [1]
    recover(index, ("a", 1))
    assert figures(index, "orphans") == [0]
    assert held(index, "abcd") == [1, 2, 3, 4]


def test_orphans_join_as_before_after_the_end_of_recovery(index: Index) -> None:
    recover(index, ("abc", 3))
    index.end_recovery()
    put(index, "ab", 1, 2)
    assert blocks(index, "abc") == 3
    recover(index, ("abcd", 4))
    assert blocks(index, "abcd") == 4


def test_two_orphans_of_one_parent(index: Index) -> None:
    recover(index, ("abx", 3), ("aby", 4), ("abyz", 5))
    assert figures(index, "orphans") == [2]
    put(index, "ab", 2)
    assert figures(index, "orphans") == [0]
    assert held(index, "abx") == [NONE, 2, 3]
    assert held(index, "abyz") == [NONE, 2, 4, 5]
    assert all_evicted(index)[-1] == 2


def test_joined_orphans_hold_their_ancestors_back(index: Index) -> None:
    recover(index, ("abc", 3))
    put(index, "ab", 1, 2)
    put(index, "x", 9)
    index.touch(ROOT, keys("abc"))
    index.pin(ROOT, keys("abc"), 0, 0, 2, 3)
    assert evicted(index, 1) == [9]
    assert evicted(index, 1) is None


def test_a_join_over_a_hole_stays_stranded(index: Index) -> None:
    recover(index, ("abcd", 4))
    put(index, "abc", 1, NONE, 3)
    assert figures(index, "orphans") == [0]
    put(index, "x", 9)
    index.touch(ROOT, keys("abcd"))
    assert evicted(index, 3) == [4, 3, 9]


@pytest.mark.parametrize("coverage", [WINDOW2, STATE])
def test_orphans_are_stranded_whatever_their_coverage(make_index: MakeIndex, coverage: Coverage) -> None:
    index = make_index(1)
    add(index, GroupRule(coverage))
    put(index, "x", 9)
    recover(index, ("abc", 3))
    assert evicted(index, 1) == [3]
    recover(index, ("abc", 3))
    put(index, "ab", 2)
    assert evicted(index, 1) == [9]  # joined, and no hole can be


def test_recover_tells_what_it_did_not_take(index: Index) -> None:
    put(index, "ab", 1, 2)
    assert recover(index, ("ab", 5), ("abc", 6), ("abc", 7)) == [False, True, False]
    assert held(index, "abc") == [1, 2, 6]
    assert recover(index, ("ab", 8), tier=1) == [True]

    def one(path: str, parent: bytes, depth: int, tier: int = 1) -> bool:
        rows = [np.frombuffer(each, np.uint8).reshape(1, 32) for each in (key(path), parent)]
        (taken,) = index.recover(ROOT, tier, 0, *rows, slots_of(depth), slots_of(77)).tolist()
        return bool(taken)

    before = snapshot(index)
    assert not one("abc", key("ab"), 3)  # another depth than it has
    assert not one("abc", key("a"), 2)  # another parent than it has
    assert not one("abx", key("ab"), 3)  # another depth than its parent's + 1
    assert not one("abx", key("ab"), 1)
    assert not one("x", key("ab"), 0)  # a first block's parent is the root
    assert not one("x", key("nowhere"), 0)
    assert not one("x", ROOT, 1)  # and the root's child is a first block
    assert snapshot(index) == before
    assert one("abc", key("ab"), 2)
    assert recover(index, ("wxyz", 20)) == [True]  # an orphan
    assert not one("wxyzz", key("wxyz"), 5)  # contradicts the orphan
    assert not one("wxyz", key("wxy"), 4)
    assert one("wxyzz", key("wxyz"), 4)
    assert one("wxyz", key("wxy"), 3)
    assert figures(index, "orphans") == [1]


def test_recovered_slots_and_arrays_are_checked(index: Index) -> None:
    put(index, "ab", 1, 2)
    before = snapshot(index)
    path, parents, depths, slots = keys("xy"), keys("xy"), slots_of(0, 1), slots_of(5, 6)
    bad: list[tuple[Any, ...]] = [
        (path, parents[1:], depths, slots),
        (path, parents, depths[1:], slots),
        (path, parents, slots_of(0, -1), slots),
        (path, parents, depths.astype(np.int32), slots),
        (path, parents, depths, slots[1:]),
        (path, parents, depths, slots_of(5, NONE)),
        (path, parents, depths, slots_of(5, MAX_SLOT + 1)),
        (path, parents, depths, slots.astype(np.uint64)),
    ]
    for arguments in bad:
        with pytest.raises(ValueError):  # noqa: PT011 - one of several texts
            index.recover(ROOT, 0, 0, *arguments)
    assert snapshot(index) == before


def test_an_orphan_that_loses_its_copies_leaves(index: Index) -> None:
    recover(index, ("abc", 3), ("abcd", 4))
    recover(index, ("abcd", 14), tier=1)
    assert evicted(index, 2) == [4, 3]
    assert figures(index, "positions", "orphans") == [2, 1]  # c has a descendant with a copy
    index.drop_tier(1)
    assert figures(index, "positions", "orphans") == [0, 0]
    put(index, "ab", 1, 2)
    assert figures(index, "positions") == [2]


def test_a_retired_namespace_keeps_its_orphans_until_they_go(index: Index) -> None:
    recover(index, ("abc", 3))
    index.retire_namespace(ROOT)
    assert index.has_namespace(ROOT)
    assert evicted(index, 1) == [3]
    assert not index.has_namespace(ROOT)


# ---------------------------------------------------------------- copies and figures


def test_copies_have_parents_and_depths(index: Index) -> None:
    put(index, "abc", 1, NONE, 3)
    put(index, "abc", 7, tier=1)
    recover(index, ("wxyz", 4))
    found = index.copies(ROOT, 0, 0)
    assert (found.keys.dtype, found.parents.dtype) == (np.uint8, np.uint8)
    assert (found.depths.dtype, found.slots.dtype) == (np.int64, np.int64)
    rows = zip(
        found.slots.tolist(), found.depths.tolist(), map(bytes, found.keys), map(bytes, found.parents), strict=True
    )
    assert sorted(rows) == [
        (1, 0, key("a"), ROOT),
        (3, 2, key("abc"), key("ab")),
        (4, 3, key("wxyz"), key("wxy")),
    ]
    assert index.copies(ROOT, 1, 0).slots.tolist() == [7]
    index.drop_tier(1)
    assert index.copies(ROOT, 1, 0).keys.shape == (0, 32)


def test_copies_can_be_recovered_into_another_index(index: Index, make_index: MakeIndex) -> None:
    put(index, "abcdef", 1, 2, 3, 4, 5, 6)
    put(index, "abcxyz", 7, 8, 9)
    other = make_index(1)
    add(other)
    saved = index.copies(ROOT, 0, 0)
    assert other.recover(ROOT, 0, 0, saved.keys, saved.parents, saved.depths, saved.slots).all()
    assert held(other, "abcdef") == [1, 2, 3, 4, 5, 6]
    assert held(other, "abcxyz") == [1, 2, 3, 7, 8, 9]


def test_statistics(index: Index) -> None:
    add(index, root=OTHER)
    put(index, "abc", 1, NONE, 3)
    put(index, "ab", 4, 5, tier=1)
    recover(index, ("wxyz", 6), root=OTHER)
    index.pin(ROOT, keys("ab"), 1, 0, 0, 2)
    assert figures(index, "namespaces", "positions", "orphans", "copies", "pinned") == [2, 4, 1, 5, 2]
    assert [index.count(0), index.count(1)] == [3, 2]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 64, 65, 1000])
def test_long_paths(index: Index, length: int) -> None:
    path = "".join(chr(97 + i % 26) for i in range(length))
    put(index, path, *range(length))
    other = path[: length // 2] + "!" + path
    put(index, other, *range(length, length + 1 + len(path)))
    assert blocks(index, path) == length
    assert blocks(index, other) == len(other)
    assert figures(index, "positions") == [len(path) + 1 + length]
    index.touch(ROOT, keys(path[: length // 2]))
    assert sorted(all_evicted(index)) == list(range(2 * length + 1))
