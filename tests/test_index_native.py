"""What the native index promises beyond the interface: how many nodes a tree has."""

from __future__ import annotations

import pytest
from index_examples import ROOT, add, evicted, figures, keys, put, recover

from flexkv_core.index.native import NativeIndex


@pytest.fixture
def index() -> NativeIndex:
    made = NativeIndex(2)
    add(made)
    return made


def test_a_path_without_branches_is_one_node(index: NativeIndex) -> None:
    put(index, "abcd", 1, 2, 3, 4)
    assert figures(index, "nodes") == [1]
    put(index, "abcdef", 5, 6, 7, 8, 9, 10, tier=1)
    assert figures(index, "nodes") == [1]
    put(index, "abxy", 11, 12)
    assert figures(index, "nodes") == [3]


def test_a_node_and_its_only_child_become_one(index: NativeIndex) -> None:
    put(index, "abxy", 11, 12)
    put(index, "abcd", 1, 2, 3, 4)
    assert evicted(index, 2) == [12, 11]
    assert figures(index, "nodes") == [1]
    put(index, "abxy", 11, 12)
    index.remove_subtree(ROOT, keys("abc"))
    assert figures(index, "nodes") == [1]


def test_what_was_recovered_becomes_one_node_at_the_end(index: NativeIndex) -> None:
    for path, slot in (("abcd", 4), ("abc", 3), ("ab", 2), ("a", 1)):
        recover(index, (path, slot))
    index.end_recovery()
    assert figures(index, "nodes", "positions") == [1, 4]
