"""S3-FIFO by example: the small queue and main, second chances, the ghost, evictions that fail."""

from __future__ import annotations

import pytest
from conftest import Make
from index_examples import OTHER, ROOT, MakeIndex, add, all_evicted, evicted, keys, put, recover, three

from flexkv_core.index import GroupRule, Index
from flexkv_core.policies import Eviction


def into_main(index: Index, paths: str, first_slot: int) -> None:
    """Put one block a letter, twice, with an eviction between: the ghost sends them to the main queue."""
    for path in paths:
        put(index, path, 999)
    assert evicted(index, len(paths)) == [999] * len(paths)
    for slot, path in enumerate(paths, first_slot):
        put(index, path, slot)


def test_s3fifo_two_hits_lead_from_small_to_main(make: Make) -> None:
    for hits, order in (("a", [1, 2, 3]), ("aa", [2, 3, 1]), ("aabb", [3, 1, 2])):
        assert three(make("s3fifo"), hits) == order, hits


def test_s3fifo_uses_begin_anew_in_main(make: Make) -> None:
    index = make("s3fifo")
    put(index, "a", 1)
    for _ in range(3):
        index.touch(ROOT, keys("a"))
    put(index, "b", 2)
    assert evicted(index, 1) == [2]  # a is in main now, without uses
    into_main(index, "m", 3)
    assert evicted(index, 1) == [1]


def test_s3fifo_the_ghost_sends_to_main_once(make: Make) -> None:
    index = make("s3fifo")
    put(index, "a", 1)
    put(index, "b", 2)
    assert evicted(index, 1) == [1]
    put(index, "a", 3)  # main
    put(index, "c", 4)
    assert evicted(index, 3) == [2, 4, 3]
    put(index, "a", 5)  # small: it has left the ghost, and main's evictions are not learnt
    put(index, "d", 6)
    assert all_evicted(index) == [5, 6]


def test_s3fifo_the_ghost_knows_groups(make_index: MakeIndex) -> None:
    index = make_index(1, ["s3fifo"])
    add(index, GroupRule(), GroupRule())
    put(index, "a", 1)
    assert evicted(index, 1) == [1]
    put(index, "a", 2, group=1)  # small
    put(index, "a", 3)  # main
    put(index, "b", 4)
    assert all_evicted(index) == [2, 4, 3]


def test_s3fifo_a_recovered_block_leaves_the_ghost_too(make: Make) -> None:
    index = make("s3fifo")
    put(index, "a", 1)
    put(index, "b", 2)
    assert evicted(index, 1) == [1]
    recover(index, ("a", 3))  # main
    put(index, "c", 4)
    assert all_evicted(index) == [2, 4, 3]


@pytest.mark.parametrize(("main", "first"), [(8, 0), (9, 0), (10, 1)])
def test_s3fifo_small_goes_while_it_holds_a_tenth(make: Make, main: int, first: int) -> None:
    index = make("s3fifo")
    into_main(index, "abcdefghij"[:main], 1)
    put(index, "z", 0)
    assert evicted(index, 1) == [first]


def test_s3fifo_a_tenth_is_counted_by_slot_class(make_index: MakeIndex) -> None:
    index = make_index(1, ["s3fifo"])
    add(index, GroupRule(slot_class=0), GroupRule(slot_class=1))
    into_main(index, "abcdefghijkl", 1)
    put(index, "z", 0)
    for path in "uvwxy":
        put(index, path, 50, group=1)
    assert evicted(index, 1) == [1]


def test_s3fifo_what_moves_to_main_is_small_no_more(make: Make) -> None:
    index = make("s3fifo")
    into_main(index, "abcdefghij", 1)
    put(index, "p", 20)
    index.touch(ROOT, keys("p"))
    index.touch(ROOT, keys("p"))
    put(index, "q", 21)
    assert evicted(index, 1) == [1]  # p has moved: small holds one of twelve


def test_s3fifo_takes_from_small_if_main_has_no_candidate(make: Make) -> None:
    index = make("s3fifo")
    into_main(index, "abcdefghijkl", 1)
    for path in "abcdefghijkl":
        index.pin(ROOT, keys(path), 0, 0, 0, 1)
    put(index, "z", 0)
    assert evicted(index, 1) == [0]
    put(index, "y", 20)
    index.pin(ROOT, keys("y"), 0, 0, 0, 1)
    index.unpin(ROOT, keys("d"), 0, 0, 0, 1)
    assert evicted(index, 1) == [4]  # and from main if small has none


def test_s3fifo_main_gives_three_chances_at_most(make: Make) -> None:
    for hits, order in (("aaaaabbb", [3, 1, 2]), ("aaabb", [3, 2, 1]), ("aab", [3, 2, 1]), ("ab", [3, 1, 2])):
        index = make("s3fifo")
        into_main(index, "abc", 1)
        for path in hits:
            index.touch(ROOT, keys(path))
        assert all_evicted(index) == order, hits


def test_s3fifo_stranded_and_retired_go_first_by_tick(make: Make) -> None:
    index = make("s3fifo")
    add(index, root=OTHER)
    into_main(index, "p", 9)
    put(index, "ab", 1, 2)
    put(index, "q", 3, root=OTHER)
    put(index, "cd", 4, 5)
    for path in ("ab", "cd"):
        for _ in range(3):
            index.touch(ROOT, keys(path))
        index.remove(ROOT, keys(path), 0, 0, 0, 1)
    index.touch(OTHER, keys("q", OTHER))
    index.retire_namespace(OTHER)
    assert evicted(index, 3) == [3, 2, 5]
    put(index, "abcd"[:2], 1, 2)  # not learnt: small again
    put(index, "z", 6)
    assert evicted(index, 2) == [2, 1]


def test_s3fifo_a_stranded_copy_goes_first_from_main_too(make: Make) -> None:
    index = make("s3fifo")
    put(index, "ab", 1, 2)
    assert evicted(index, 2) == [2, 1]
    put(index, "ab", 3, 4)  # main
    put(index, "z", 5)
    index.touch(ROOT, keys("ab"))
    index.remove(ROOT, keys("ab"), 0, 0, 0, 1)
    assert evicted(index, 1) == [4]


def test_s3fifo_the_ghost_is_no_larger_than_the_tier_was(make: Make) -> None:
    index = make("s3fifo")
    for slot, path in enumerate("abc"):
        put(index, path, slot)
    assert evicted(index, 3) == [0, 1, 2]  # knows three
    for slot, path in enumerate("xy"):
        put(index, path, slot)
    assert evicted(index, 1) == [0]  # knows two: c, x
    assert evicted(index, 1) == [1]  # knows one: y
    put(index, "c", 4)
    put(index, "y", 5)  # main
    put(index, "x", 6)
    assert all_evicted(index) == [4, 6, 5]


def test_s3fifo_an_eviction_that_fails_changes_nothing(make: Make) -> None:
    index = make("s3fifo")
    put(index, "a", 1)
    index.touch(ROOT, keys("a"))
    index.touch(ROOT, keys("a"))
    put(index, "b", 2)
    put(index, "c", 3)
    index.pin(ROOT, keys("c"), 0, 0, 0, 1)
    assert evicted(index, 3) is None
    index.unpin(ROOT, keys("c"), 0, 0, 0, 1)
    index.remove(ROOT, keys("b"), 0, 0, 0, 1)
    put(index, "b", 4)  # small: the ghost has not learnt it
    put(index, "d", 5)
    index.touch(ROOT, keys("a"))  # still in small; in main it would have one use
    assert evicted(index, 3) == [3, 4, 5]
    put(index, "b", 6)  # main, after a
    assert all_evicted(index) == [1, 6]


def test_s3fifo_an_eviction_that_fails_takes_no_time(make_index: MakeIndex) -> None:
    index = make_index(2, ["s3fifo", Eviction("lru", hit_reward_seconds=4e-6)])
    add(index)
    put(index, "x", 1)  # tick 1
    index.touch(ROOT, keys("x"))
    index.touch(ROOT, keys("x"))
    put(index, "y", 2)  # tick 4
    index.pin(ROOT, keys("y"), 0, 0, 0, 1)
    put(index, "a", 11, tier=1)  # tick 5
    index.touch(ROOT, keys("a"))  # tick 6: a stands at 10
    for _ in range(9):
        assert evicted(index, 2) is None  # x had its second chance, in vain
    put(index, "b", 12, tier=1)  # tick 7
    assert all_evicted(index, 1) == [12, 11]


def test_s3fifo_the_ghost_knows_the_others_when_many_have_come_back(make: Make) -> None:
    index = make("s3fifo")
    paths = [chr(200 + number) for number in range(300)]
    for slot, path in enumerate(paths):
        put(index, path, slot)
    assert evicted(index, 300) == list(range(300))
    for slot, path in enumerate(paths[1:201]):
        put(index, path, slot)  # main
    assert evicted(index, 200) == list(range(200))
    for slot, path in enumerate(paths[201:206]):
        put(index, path, slot)  # main, too
    put(index, "z", 99)
    assert all_evicted(index) == [99, 0, 1, 2, 3, 4]
