"""KV groups of different block bytes through the whole path: host memory, lower tier, eviction, back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gates import GATES, PATIENCE_S
from rig import Group, Rig, gate_stack, gate_tier, nothing_left, wait_ready

from flexkv_core.manager import KVCacheManager
from flexkv_core.plans import HOST

pytestmark = pytest.mark.usefixtures("gates")

FULL, WINDOW, STATE = Group((20_000,)), Group((3000,), window=2), Group((9000,), state=True)
HYBRID = (FULL, WINDOW, STATE)
"""Slots of 24, 8 and 16 KiB: 48 KiB a block in all; without the state 32 KiB."""


@pytest.fixture
def manager(gates: None) -> Iterator[KVCacheManager]:
    """Host memory of 2 MiB: 8 extents of 256 KiB for three slot classes."""
    with KVCacheManager.open(gate_stack(256, gate_tier())) as manager:
        wait_ready(manager)
        yield manager
        nothing_left(manager)


def store(rig: Rig, keys: np.ndarray, offered: list[list[int]]) -> int:
    """Store, of each group, the blocks at the given positions."""
    rig.fill(keys)
    tables = []
    for positions in offered:
        table = np.full(len(keys), -1, np.int64)
        table[positions] = positions
        tables.append(table)
    transfer = rig.manager.store(rig.namespace, keys, tables)
    assert transfer.wait(PATIENCE_S)
    assert transfer.error is None, transfer.error
    assert rig.manager.drain(PATIENCE_S)
    return transfer.blocks


def held(rig: Rig, keys: np.ndarray, group: int) -> list[int]:
    """Positions that a group has in host memory."""
    return np.flatnonzero(
        rig.manager._planner._ledger.holds(rig.manager._planner.tiers[HOST], rig.namespace.root, keys, group)
    ).tolist()


def test_full_window_and_state_go_down_and_come_back(manager: KVCacheManager) -> None:
    rig = Rig(manager, HYBRID)
    prompts = [rig.keys(seed, 4) for seed in range(20)]  # 128 KiB each, more than host memory in all
    for keys in prompts:
        assert store(rig, keys, [[0, 1, 2, 3], [2, 3], [3]]) == 7
    assert rig.found(prompts[0]) == (4, 0)
    for keys in prompts:
        assert rig.found(keys)[0] == 4
        assert rig.load(keys) == (4, 0)
    stored = {(key, group): len(data) for (key, group), data in GATES["gate"].medium.items()}
    assert {size for (_, group), size in stored.items() if group == 0} == {24 * 1024}
    assert {size for (_, group), size in stored.items() if group == 1} == {8 * 1024}
    assert {size for (_, group), size in stored.items() if group == 2} == {16 * 1024}
    assert len(stored) == 20 * 7


def test_a_hit_needs_only_the_last_blocks_of_a_window_and_the_state_at_its_end(manager: KVCacheManager) -> None:
    rig = Rig(manager, HYBRID)
    keys = rig.keys(1, 6)
    store(rig, keys, [[0, 1, 2, 3, 4, 5], [1, 2, 4], [2]])
    assert rig.found(keys) == (3, 3), "to 3: window 1, 2 and state 2; to 6: the state is missing"
    assert rig.load(keys) == (3, 0)
    assert store(rig, keys, [[], [5], [5]]) == 2
    assert rig.load(keys) == (6, 0)
    fetch = rig.fetch(keys)
    assert fetch.wait(PATIENCE_S)
    assert fetch.plan is not None
    assert [np.flatnonzero(row).tolist() for row in fetch.plan.pinned] == [[0, 1, 2, 3, 4, 5], [4, 5], [5]]
    assert manager.stats()["pinned_bytes"] == (6 * 24 + 2 * 8 + 16) * 1024
    fetch.release()


def test_only_what_is_needed_comes_up_from_the_lower_tier(manager: KVCacheManager) -> None:
    rig, gate = Rig(manager, HYBRID), GATES["gate"]
    keys = rig.keys(1, 6)
    store(rig, keys, [list(range(6)), list(range(6)), list(range(6))])
    for seed in range(2, 14):
        store(rig, rig.keys(seed, 5), [list(range(5))] * 3)
    assert rig.found(keys) == (6, 0)
    gate.calls.clear()
    assert rig.load(keys) == (6, 0)
    read = {(key, group) for operation, names in gate.calls if operation == "read" for key, group in names}
    need = [range(6), range(4, 6), range(5, 6)]
    assert read == {(keys[at].tobytes(), group) for group, positions in enumerate(need) for at in positions}


def test_one_groups_blocks_are_evicted_without_the_others(gates: None) -> None:
    """Two models share the window's slot class: pressure of the other evicts windows, and no full block."""
    with KVCacheManager.open(gate_stack(256)) as manager:
        rig, other = Rig(manager, (FULL, WINDOW)), Rig(manager, (Group((3000,)),), model="other", pages=300)
        keys = rig.keys(1, 4)
        store(rig, keys, [[0, 1, 2, 3], [0, 1, 2, 3]])
        assert rig.found(keys) == (4, 4)
        room = manager._planner.tiers[HOST].pool
        assert room is not None
        free = room.available(1)
        other.store(other.keys(2, free + 2))
        assert held(rig, keys, 0) == [0, 1, 2, 3]
        assert held(rig, keys, 1) == [0, 1], "leaves first"
        assert rig.found(keys) == (2, 2)
        assert rig.load(keys) == (2, 0)
        assert store(rig, keys, [[], [2, 3]]) == 2
        assert rig.load(keys) == (4, 0)
        nothing_left(manager)


def test_a_missing_arrays_of_blocks_is_refused(manager: KVCacheManager) -> None:
    rig = Rig(manager, HYBRID)
    keys = rig.keys(1, 4)
    with pytest.raises(ValueError, match="arrays for 1 KV groups: this model has 3"):
        manager.store(rig.namespace, keys, np.arange(4, dtype=np.int64))
