"""Several slot classes in one capacity: none starves, nothing leaks, exact accounts."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv_core.books import extent_bytes, make_planner, open_books
from flexkv_core.config import load_stack
from flexkv_core.layout import PAGE, Coverage, KVGroup
from flexkv_core.planner import Planner
from flexkv_core.pool import SlotPool

MIB = 1 << 20


def planner_of(capacity: str) -> Planner:
    return make_planner(open_books(load_stack({"tiers": [{"backend": "cpu", "capacity": capacity}]})).books)


def root(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def keys(name: str, blocks: int) -> np.ndarray:
    chain, key = [], name.encode()
    for _ in range(blocks):
        key = hashlib.sha256(key).digest()
        chain.append(key)
    return np.frombuffer(b"".join(chain), np.uint8).reshape(blocks, 32)


def store(planner: Planner, name: str, path: np.ndarray, groups: int = 1) -> int:
    """Store a path; returns the blocks that were refused."""
    plan = planner.begin_store(root(name), path, np.ones((groups, len(path)), bool))
    planner.commit_store(plan)
    return plan.refused


def held(planner: Planner, name: str, path: np.ndarray) -> int:
    return planner.lookup(root(name), path)[1]


@pytest.mark.parametrize(("first", "second"), [(64, 32), (32, 64), (4, 1024), (1024, 4), (3 * 1024, 8)])
def test_another_block_size_gets_room_of_one_that_had_it_all(first: int, second: int) -> None:
    planner = planner_of("128MiB")
    planner.add_model(root("a"), [KVGroup(first * 1024)])
    planner.add_model(root("b"), [KVGroup(second * 1024)])
    many = 128 * 1024 // first + 10
    for number in range(0, many, 8):
        store(planner, "a", keys(f"a{number}", 8))
    refused = sum(store(planner, "b", keys(f"b{number}", 8)) for number in range(40))
    assert refused == 0
    assert held(planner, "b", keys("b39", 8)) == 8


def test_a_two_group_model_fits_in_a_small_host_tier() -> None:
    planner = planner_of("8MiB")
    planner.add_model(root("m"), [KVGroup(64 * 1024), KVGroup(8 * 1024, Coverage.window(2))])
    for number in range(50):
        path = keys(f"m{number}", 6)
        assert store(planner, "m", path, groups=2) == 0
        assert held(planner, "m", path) == 6


def test_a_class_that_turns_over_takes_room_of_one_that_stands_still() -> None:
    planner = planner_of("64MiB")
    planner.add_model(root("idle"), [KVGroup(64 * 1024)])
    planner.add_model(root("busy"), [KVGroup(32 * 1024)])
    for number in range(250):
        store(planner, "idle", keys(f"idle{number}", 4))
    for number in range(3000):
        store(planner, "busy", keys(f"busy{number}", 4))
    pool = planner.tiers[0].pool
    assert pool is not None
    busy = pool.allocated(1) * 36 * 1024
    assert busy > 32 * MIB, "three thousand stores later the busy model has most of it"


def test_pinned_and_unfinished_blocks_are_not_moved_away() -> None:
    planner = planner_of("8MiB")
    planner.add_model(root("a"), [KVGroup(64 * 1024)])
    planner.add_model(root("b"), [KVGroup(32 * 1024)])
    path = keys("a", 100)
    store(planner, "a", path)
    fetch = planner.begin_fetch(root("a"), path)
    waiting = planner.begin_store(root("a"), keys("other", 60), np.ones((1, 60), bool))
    before = fetch.slots.copy()
    for number in range(20):
        store(planner, "b", keys(f"b{number}", 8))
    assert (fetch.slots == before).all()
    assert (
        planner.begin_fetch(root("a"), path).slots[0, : planner.ready(fetch)] == before[0, : planner.ready(fetch)]
    ).all()
    planner.release(fetch)
    planner.abort_store(waiting)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 30), st.integers(1, 40)), max_size=60), st.data())
def test_whatever_models_do_the_accounts_agree(steps: list[tuple[str, int, int]], data: Any) -> None:
    """Copies in the index and slots in the pool are the same set after every step."""
    planner = planner_of("4MiB")
    sizes = {"a": 4096, "b": 60 * 1024, "c": 300 * 1024, "d": 12 * 1024}
    for name, size in sizes.items():
        planner.add_model(root(name), [KVGroup(size)])
    pool = planner.tiers[0].pool
    assert pool is not None
    for name, number, blocks in steps:
        store(planner, name, keys(f"{name}{number}", blocks))
        used = 0
        for other, size in sizes.items():
            slots = planner.index.copies(root(other), 0, 0).slots
            assert len(np.unique(slots)) == len(slots)
            used += len(slots) * (KVGroup(size).slot_bytes)
        assert used == pool.used_bytes <= 4 * MIB


def test_ranges_of_other_classes_cover_whole_runs() -> None:
    pool = SlotPool(16 * MIB, MIB // 4)
    small, large = pool.slot_class(64 * 1024), pool.slot_class(MIB + PAGE)
    taken = pool.allocate(small, 256)
    assert taken is not None
    assert pool.available(large) == 0
    pool.free(taken[::2])
    ranges = pool.room_of_others(large)
    assert ranges
    start, stop, used = ranges[0]
    assert (stop - start) * PAGE >= MIB + PAGE
    within = taken[1::2][(taken[1::2] >= start) & (taken[1::2] < stop)]
    assert used == len(within)
    pool.free(within)
    assert pool.allocate(large, 1) is not None
    assert len(pool.room_of_others(large, most=1)) == 1


@pytest.mark.parametrize(
    ("capacity", "extent"),
    [(1 << 20, 1 << 16), (8 << 20, 1 << 19), (128 << 20, 8 << 20), (1 << 29, 32 << 20), (1 << 40, 32 << 20)],
)
def test_extents_are_a_share_of_small_capacities(capacity: int, extent: int) -> None:
    assert extent_bytes(capacity) == extent


def test_models_that_are_gone_cost_nothing() -> None:
    """Regression: each size that had ever been seen was looked at when room was made."""
    pool = SlotPool(16 * MIB, MIB // 4)
    for pages in range(1, 200):
        taken = pool.allocate(pool.slot_class(pages * PAGE), 1)
        assert taken is not None
        assert pool.used_classes == [pages - 1]
        pool.free(taken)
    assert pool.used_classes == []
    assert pool.available(0) == 16 * MIB // PAGE
