"""What watchers are told of copies that come and go where the books change by neither a store nor an eviction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gates import GATES
from rig import PLAIN_SLOT, Rig, gate_stack, gate_tier, wait_ready
from test_hints import ROOT, Medium, path, planner_of

from flexkv_core.layout import Coverage
from flexkv_core.manager import KVCacheManager


class Told:
    """A watcher: which blocks it believes each tier to hold."""

    def __init__(self) -> None:
        self.held: set[tuple[int, bytes, int]] = set()

    @staticmethod
    def _blocks(tier: int, keys: Any, groups: Any) -> set[tuple[int, bytes, int]]:
        return {(tier, bytes(key), int(group)) for key, group in zip(keys, groups, strict=True)}

    def committed(self, tier: int, root: bytes | None, keys: Any, groups: Any) -> None:
        self.held |= self._blocks(tier, keys, groups)

    def dropped(self, tier: int, root: bytes | None, keys: Any, groups: Any) -> None:
        self.held -= self._blocks(tier, keys, groups)

    def cleared(self, tier: int) -> None:
        self.held = {block for block in self.held if block[0] != tier}


def test_what_a_deletion_could_not_delete_is_there_again(gates: None) -> None:
    tier = gate_tier(capacity=f"{8 * PLAIN_SLOT}B")
    with KVCacheManager.open(gate_stack(8, tier)) as manager:
        wait_ready(manager)
        rig, told, record = Rig(manager), Told(), manager._planner.tiers[1].presence
        assert record is not None
        manager.watch(told)
        rig.store(rig.keys(1, 8))
        GATES["gate"].failing.add("delete")
        rig.store(rig.keys(2, 4))
        assert GATES["gate"].count("delete")
        for keys in (rig.keys(1, 8), rig.keys(2, 4)):
            there = [(1, bytes(key), 0) in told.held for key in keys]
            assert there == record.held(keys, 0).tolist()
        assert {each for each in told.held if each[0] == 1} == {(1, bytes(key), 0) for key in rig.keys(1, 8)}
        manager.unwatch(told)


@pytest.mark.parametrize("capacity", [8 * PLAIN_SLOT, None])
def test_what_a_record_learns_otherwise_is_told_where_it_is_exact(capacity: int | None) -> None:
    """A probe's answer, and what a listing pushes out."""
    planner, told = planner_of((Coverage(),), capacity), Told()
    planner.watch(told)
    keys = path(4)
    Medium(keys, np.ones((1, 4), np.bool_)).probe(planner, planner.hints.begin(ROOT, keys, 0, 1), 128)
    assert told.held == ({(1, bytes(key), 0) for key in keys} if capacity else set())
    foreign = np.arange(8 * 32, dtype=np.uint8).reshape(8, 32)
    planner.down.add_listing(1, foreign, np.zeros(8, np.uint8), np.full(8, PLAIN_SLOT, np.int64))
    assert planner.tiers[1].presence is not None
    kept = planner.tiers[1].presence.held(keys, 0)
    assert told.held == ({(1, bytes(key), 0) for key in keys[kept]} if capacity else set())
    assert kept.sum() == (0 if capacity else 4)
