"""What the index promises, sentence by sentence: namespaces, match, insert, time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from index_examples import (
    ALL,
    NONE,
    OTHER,
    ROOT,
    STATE,
    WINDOW2,
    MakeIndex,
    add,
    all_evicted,
    blocks,
    evicted,
    figures,
    held,
    keys,
    put,
    recover,
    slots_of,
    snapshot,
)

from flexkv_core.errors import KeyInputError, KeyTypeError, LayoutError, PolicyError, UnknownNamespaceError
from flexkv_core.index import MAX_SLOT, NO_TIER, GroupRule, Index
from flexkv_core.policies import Eviction

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
        ("has_copies", ()),
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
    assert not index.has_copies(ROOT)
    if last != "nothing":
        put(index, "a", 1)
    assert index.has_copies(ROOT) == (last != "nothing")
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


def test_match_names_the_fastest_tier_whichever_came_first(index: Index) -> None:
    put(index, "ab", 1, 2)
    put(index, "ab", 11, 12, tier=1)
    assert index.match(ROOT, keys("ab")).slots.tolist() == [[1, 2]]


def test_match_may_know_more_places_than_the_prefix_it_supplies(index: Index) -> None:
    put(index, "abcd", 1, 2, NONE, 4)
    found = index.match(ROOT, keys("abcde"))
    assert found.blocks == 2
    assert found.tiers.tolist() == [[0, 0, NO_TIER, 0]]
    assert found.slots.tolist() == [[1, 2, NONE, 4]]


def test_match_ends_at_a_hole_wherever_paths_branch(index: Index) -> None:
    put(index, "abcdef", 1, 2, 3, NONE, 5, 6)
    assert [blocks(index, path) for path in ("abc", "abcd", "abcde", "abcdef")] == [3, 3, 3, 3]
    put(index, "abxy", 7, 8)
    assert [blocks(index, path) for path in ("ab", "abc", "abcd", "abcdef", "abxy")] == [2, 3, 3, 3, 4]
    index.remove_subtree(ROOT, keys("abx"))
    assert [blocks(index, path) for path in ("abc", "abcd", "abcdef")] == [3, 3, 3]


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


def test_rows_and_elements_need_not_lie_side_by_side(index: Index) -> None:
    path, slots = np.repeat(keys("abc"), 2, axis=0)[::2], np.repeat(slots_of(1, 2, 3), 2)[::2]
    assert index.insert(ROOT, path, 0, 0, slots).all()
    assert held(index, "abc") == [1, 2, 3]
    assert index.match(ROOT, path).slots.tolist() == [[1, 2, 3]]


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
        "recover of nothing": recover,
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
            index.end_recovery()
        put(index, "b", 2)  # 4 or 6
        assert all_evicted(index) == order, calls


def test_the_pieces_of_a_recovery_are_of_one_tick(make_index: MakeIndex) -> None:
    index = make_index(2, [Eviction("lru", hit_reward_seconds=3e-6), "lru"])
    add(index)
    put(index, "a", 1)  # tick 1
    index.touch(ROOT, keys("a"))  # tick 2: a stands at 5
    for _ in range(9):
        recover(index, ("xyz", 7), tier=1)
    put(index, "b", 2)  # 4
    assert all_evicted(index) == [2, 1]


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
