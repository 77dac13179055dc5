"""What the index promises, sentence by sentence: pins, removal, eviction."""

from __future__ import annotations

import numpy as np
import pytest
from index_examples import (
    ALL,
    NONE,
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
    key,
    keys,
    put,
    recover,
    snapshot,
)

from flexkv_core.index import GroupRule, Index

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


def test_a_hole_right_before_another(index: Index) -> None:
    put(index, "abcde", 1, 2, NONE, 4, 5)
    index.remove(ROOT, keys("ab"), 0, 0, 1, 2)
    assert blocks(index, "abcde") == 1
    put(index, "abc", 2, 3)
    assert blocks(index, "abcde") == 5


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


def test_evict_that_fails_keeps_recency_within_a_path_and_what_holds_back(index: Index) -> None:
    put(index, "ab", 1, 2)
    put(index, "abcx", 3, 4)
    put(index, "abcy", 5)
    put(index, "q", 9)
    index.touch(ROOT, keys("abc"))  # x and y are older than q
    index.pin(ROOT, keys("q"), 0, 0, 0, 1)
    assert evicted(index, 6) is None
    index.unpin(ROOT, keys("q"), 0, 0, 0, 1)
    assert evicted(index, 1) == [4]
    put(index, "pr", 6, 7)
    index.touch(ROOT, keys("p"))  # r is older than p
    index.pin(ROOT, keys("q"), 0, 0, 0, 1)
    assert evicted(index, 7) is None
    index.unpin(ROOT, keys("q"), 0, 0, 0, 1)
    put(index, "z", 8)
    index.touch(ROOT, keys("abc"))
    assert evicted(index, 7) == [5, 9, 7, 6, 8, 3, 2]


def test_evict_that_fails_closes_the_holes_that_it_made(index: Index) -> None:
    put(index, "abc", 1, 2, 3)
    put(index, "x", 9)
    index.pin(ROOT, keys("x"), 0, 0, 0, 1)
    assert evicted(index, 4) is None
    assert blocks(index, "abc") == 3
    index.unpin(ROOT, keys("x"), 0, 0, 0, 1)
    index.touch(ROOT, keys("abc"))
    assert evicted(index, 1) == [9]  # nothing is stranded


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
