"""What the index promises, sentence by sentence: recovery, orphans, copies, figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from index_examples import (
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
    key,
    keys,
    put,
    recover,
    slots_of,
    snapshot,
)

from flexkv_core.index import MAX_SLOT, GroupRule, Index
from flexkv_core.layout import Coverage

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


def test_orphans_join_in_the_midst_of_an_insert(index: Index) -> None:
    recover(index, ("abc", 3), ("abxyzq", 7), ("nope", 8))
    index.end_recovery()
    assert figures(index, "orphans") == [3]
    assert put(index, "abxyzq", 11, 12, 13, 14, 15, 16) == [True] * 5 + [False]  # one is there and joins
    assert figures(index, "positions", "orphans") == [8, 1]
    assert (held(index, "abc"), held(index, "abxyzq")) == ([11, 12, 3], [11, 12, 13, 14, 15, 7])
    assert (blocks(index, "abc"), blocks(index, "abxyzq")) == (3, 6)


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


def test_orphans_join_though_they_branched(index: Index) -> None:
    recover(index, ("abcd", 4), ("abcde", 5), ("abcdef", 6))
    recover(index, ("abcdx", 7))
    assert figures(index, "orphans") == [1]
    put(index, "abc", 1, 2, 3)
    assert figures(index, "orphans") == [0]
    assert held(index, "abcdef") == [1, 2, 3, 4, 5, 6]


def test_orphans_join_though_a_branch_left(index: Index) -> None:
    recover(index, ("abcd", 4), ("abcde", 5), ("abcdx", 6))
    index.end_recovery()
    assert evicted(index, 1) in ([5], [6])
    put(index, "abc", 1, 2, 3)
    assert figures(index, "orphans") == [0]
    assert held(index, "abcd") == [1, 2, 3, 4]


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


def recover_raw(index: Index, *records: tuple[str, bytes, int, int]) -> list[bool]:
    """Recover (path, key of the parent, depth, slot) records."""
    rows = [
        np.frombuffer(b"".join(part), np.uint8).reshape(-1, 32)
        for part in ([key(path) for path, _, _, _ in records], [parent for _, parent, _, _ in records])
    ]
    numbers = [slots_of(*(record[at] for record in records)) for at in (2, 3)]
    return index.recover(ROOT, 0, 0, *rows, *numbers).tolist()


def test_records_of_one_call_are_taken_by_depth(index: Index) -> None:
    records = [("abx", key("ab"), 3, 5), ("ab", key("a"), 1, 6), ("a", ROOT, 0, 7), ("a", ROOT, 0, 8)]
    assert recover_raw(index, *records) == [False, True, True, False]
    assert held(index, "ab") == [7, 6]
    assert figures(index, "orphans") == [0]


def test_records_of_great_depth_are_taken_by_depth_too(index: Index) -> None:
    records = [("abx", key("ab"), 1_000_003, 5), ("ab", key("a"), 1_000_001, 6), ("ab", key("a"), 1_000_001, 7)]
    assert recover_raw(index, *records) == [False, True, False]
    assert figures(index, "orphans", "copies") == [1, 1]


def test_an_orphan_joins_a_parent_of_its_depth_only(index: Index) -> None:
    recover_raw(index, ("abc", key("ab"), 7, 3))
    put(index, "ab", 1, 2)
    assert figures(index, "orphans", "positions") == [1, 3]
    assert blocks(index, "abc") == 2


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
