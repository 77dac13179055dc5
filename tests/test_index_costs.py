"""What the native index costs, in counts: nodes looked at, bytes kept. Times are benchmarks/index.py's."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path

import numpy as np
import pytest
from index_examples import ROOT, add, figures

from flexkv_core.index import GroupRule
from flexkv_core.index.native import NativeIndex
from flexkv_core.policies import BUILT_IN

TIERS = 3
MOST_VISITED = 4
"""Nodes looked at a block evicted."""


def random_keys(dice: np.random.Generator, count: int) -> np.ndarray:
    """Keys are digests: random bytes are as good, and the index does not hash."""
    return dice.integers(0, 256, (count, 32), dtype=np.uint8)


def fill(index: NativeIndex, sequences: int, length: int, tiers: int = TIERS, seed: int = 0) -> np.ndarray:
    """Sequences of blocks, each in all tiers; their keys."""
    keys = random_keys(np.random.default_rng(seed), sequences * length).reshape(sequences, length, 32)
    slots = np.arange(length)
    for tier in range(tiers):
        for sequence in keys:
            index.insert(ROOT, sequence, tier, 0, slots)
    return keys


def new_index(policy: str = "lru") -> NativeIndex:
    index = NativeIndex(TIERS, [policy] * TIERS)
    add(index)
    return index


def drain(index: NativeIndex, tiers: int = TIERS, piece: int = 64) -> None:
    for tier in range(tiers):
        while (left := index.count(tier)) != 0:
            assert index.evict(tier, min(left, piece)) is not None


@pytest.mark.parametrize(("policy", "leaves"), [*((policy, 10_000) for policy in BUILT_IN), ("lru", 100_000)], ids=str)
def test_evictions_look_at_few_nodes(policy: str, leaves: int) -> None:
    """Leaves of one block, touched in shuffled order, some more than once: no eviction scans."""
    index = new_index(policy)
    keys = fill(index, leaves, 1, tiers=1)
    dice = np.random.default_rng(1)
    for number in np.concatenate([dice.permutation(leaves), dice.integers(0, leaves, leaves // 2)]):
        index.touch(ROOT, keys[number])
    fresh = random_keys(dice, leaves // 4)
    for part in range(leaves // 4 // 64):  # as it runs: what leaves makes room for what comes
        before = figures(index, "visited")[0]
        assert index.evict(0, 64) is not None
        assert 64 <= figures(index, "visited")[0] - before <= 64 * MOST_VISITED * 4  # S3-FIFO's are uneven
        for row in range(part * 64, part * 64 + 64):
            index.insert(ROOT, fresh[row : row + 1], 0, 0, np.array([row]))
    drain(index, tiers=1)
    evicted = leaves + leaves // 4 // 64 * 64
    assert evicted <= figures(index, "visited")[0] <= MOST_VISITED * evicted


@pytest.mark.parametrize(("length", "most"), [(4, 110), (64, 60), (1000, 50)])
def test_bytes_a_block(length: int, most: int) -> None:
    index, blocks = new_index(), 1_000_000
    fill(index, blocks // length, length)
    memory, positions = figures(index, "memory_bytes", "positions")
    assert positions == blocks
    assert (32 + 5 * TIERS) * positions <= memory <= most * positions  # keys, and 40-bit slots in three columns


def test_the_process_has_no_more_than_memory_bytes_says() -> None:
    index = new_index()
    keys = random_keys(np.random.default_rng(0), 300_000).reshape(-1, 100, 32)
    slots = np.arange(100)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what earlier tests have freed is used again
    before, said = resident_bytes(), figures(index, "memory_bytes")[0]
    for sequence in keys:
        index.insert(ROOT, sequence, 0, 0, slots)
    grown, told = resident_bytes() - before, figures(index, "memory_bytes")[0] - said
    assert grown <= 1.3 * told + (4 << 20)


@pytest.mark.parametrize("policy", BUILT_IN)
def test_memory_goes_when_everything_is_evicted(policy: str) -> None:
    index = new_index(policy)
    empty = figures(index, "memory_bytes")[0]
    keys = fill(index, 5_000, 4)
    for sequence in keys[::3]:
        index.touch(ROOT, sequence[:2])  # runs of recency
    full = figures(index, "memory_bytes")[0]
    drain(index)
    memory, positions, nodes = figures(index, "memory_bytes", "positions", "nodes")
    assert (positions, nodes) == (0, 0)
    assert full > 2_000_000
    assert memory <= empty + (200_000 if policy == "s3fifo" else 1_000)  # ghosts remember


def test_memory_goes_by_other_ways_too() -> None:
    for way in ("remove_subtree", "drop_tier", "recover and drop"):
        index = new_index()
        empty = figures(index, "memory_bytes")[0]
        keys = fill(index, 5_000, 4)
        if way == "remove_subtree":
            assert len(index.remove_subtree(ROOT, keys[0][:0]).slots) == 60_000
        else:
            if way == "recover and drop":
                rows = random_keys(np.random.default_rng(3), 20_000)  # orphans, and some that contradict them
                index.recover(ROOT, 0, 0, rows, rows[::-1], np.full(20_000, 5), np.arange(20_000))
                index.end_recovery()
            for tier in range(TIERS):
                index.drop_tier(tier)
        assert figures(index, "positions", "orphans") == [0, 0]
        assert figures(index, "memory_bytes")[0] <= empty + 1_000, way


def test_what_is_left_of_a_long_sequence_keeps_no_long_list() -> None:
    index = new_index()
    length = 100_000
    fill(index, 1, length, tiers=1)
    full = figures(index, "memory_bytes")[0]
    for _ in range(length // 1000 - 1):
        assert index.evict(0, 1000) is not None
    assert index.evict(0, 999) is not None
    assert figures(index, "positions") == [1]
    assert figures(index, "memory_bytes")[0] <= full - length // 4 * 4  # four bytes a tile of four blocks


def test_namespaces_that_come_and_go_leave_nothing() -> None:
    index = NativeIndex(2, ["lru", "s3fifo"])
    dice = np.random.default_rng(0)
    memory = []
    for number in range(1000):
        root = dice.bytes(32)
        rules = [GroupRule()] * (1 + number % 3)
        index.add_namespace(root, rules)
        keys = random_keys(dice, 9)
        for tier in range(2):
            for group in range(len(rules)):
                index.insert(root, keys, tier, group, np.arange(9))
        index.touch(root, keys[:5])
        index.pin(root, keys, 0, 0, 2, 7)
        index.unpin(root, keys, 0, 0, 2, 7)
        index.retire_namespace(root)
        for tier in range(2):
            assert index.evict(tier, 9 * len(rules)) is not None
        assert not index.has_namespace(root)
        memory.append(figures(index, "memory_bytes")[0])
    assert figures(index, "namespaces", "positions", "copies", "pinned", "nodes") == [0] * 5
    assert max(memory[100:]) <= max(memory[:100])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux's way to ask for the resident set")
def test_the_process_does_not_grow() -> None:
    index, sizes = new_index(), []
    for number in range(200):
        fill(index, 300, 8, seed=number)
        drain(index, piece=600)
        sizes.append(resident_bytes())
    assert max(sizes[100:]) - max(sizes[:100]) <= 2 << 20
