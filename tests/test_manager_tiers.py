"""Stacks of every shape: two tiers of one backend, no cpu tier, three and four tiers; models that come and go."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gates import GATES, PATIENCE_S, until
from rig import BLOCK_SIZE, PLAIN_SLOT, Group, Rig, gate_stack, gate_tier, nothing_left, settled, wait_ready

from flexkv_core.layout import KVGroup, ModelSpec
from flexkv_core.manager import KVCacheManager

pytestmark = pytest.mark.usefixtures("gates")


def directory(root: Path, blocks: int, **keys: Any) -> dict[str, Any]:
    return {
        "backend": "directory",
        "root": str(root),
        "capacity": f"{blocks * PLAIN_SLOT}B",
        "write_queue": "1GiB",
        **keys,
    }


def memory(blocks: int, **keys: Any) -> dict[str, Any]:
    return {"backend": "cpu", "capacity": f"{blocks * PLAIN_SLOT}B", "write_queue": "1GiB", **keys}


def files(root: Path) -> int:
    return len(list(root.rglob("*.kv")))


def fill(rig: Rig, prompts: int, blocks: int = 4) -> list[np.ndarray]:
    keys = [rig.keys(seed, blocks) for seed in range(prompts)]
    for one in keys:
        rig.store(one)
    return keys


def sources(rig: Rig, keys: np.ndarray) -> dict[str, int]:
    """Fetch and load with every byte checked; which tiers served how much."""
    fetch = rig.fetch(keys)
    assert fetch.wait(PATIENCE_S)
    transfer = rig.begin_load(fetch)
    assert transfer.wait(PATIENCE_S)
    assert (transfer.error, rig.wrong(keys, fetch.ready)) == (None, 0)
    fetch.release()
    return {name: blocks for name, blocks in fetch.sources.items() if blocks}


def test_two_directories(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    with KVCacheManager.open(gate_stack(8, directory(small, 16), directory(large, 64))) as manager:
        wait_ready(manager)
        assert list(manager.stats()["tiers"]) == ["cpu", "directory", "directory-2"]
        rig = Rig(manager)
        keys = fill(rig, 10)
        assert (files(small), files(large)) == (16, 40)
        assert [sources(rig, keys[at]) for at in (9, 7, 0)] == [{"cpu": 4}, {"directory": 4}, {"directory-2": 4}]
        nothing_left(manager)
    assert (files(small), files(large)) == (16, 40)


def test_a_stack_without_a_cpu_tier_passes_blocks_through_staging_memory(tmp_path: Path) -> None:
    stack = {"block_size": BLOCK_SIZE, "tiers": [directory(tmp_path, 64)]}
    with KVCacheManager.open(stack) as manager:
        wait_ready(manager)
        assert list(manager.stats()["tiers"]) == ["host", "directory"]
        keys = fill(Rig(manager), 4)
        assert files(tmp_path) == 16
    with KVCacheManager.open(stack) as manager:
        wait_ready(manager)
        rig = Rig(manager)
        assert manager.drain(PATIENCE_S)
        until(lambda: rig.found(keys[2]) == (4, 0))
        assert sources(rig, keys[2]) == {"directory": 4}
        nothing_left(manager)


def test_staging_memory_gives_way_to_a_tier_of_its_name(tmp_path: Path) -> None:
    """Regression: two tiers of one name in the figures."""
    stack = {"block_size": BLOCK_SIZE, "tiers": [directory(tmp_path, 64, name="host")]}
    with KVCacheManager.open(stack) as manager:
        assert len(manager.stats()["tiers"]) == 2


def test_four_tiers_each_serve_what_the_faster_ones_have_lost(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    tiers = [memory(16, name="far"), directory(one, 32), directory(two, 64)]
    with KVCacheManager.open(gate_stack(8, *tiers)) as manager:
        wait_ready(manager)
        rig = Rig(manager)
        keys = fill(rig, 14)
        assert [sources(rig, keys[at]) for at in (13, 11, 7, 0)] == [
            {"cpu": 4},
            {"far": 4},
            {"directory": 4},
            {"directory-2": 4},
        ]
        assert sources(rig, keys[0]) == {"cpu": 4}, "promoted to host memory"
        rig.store(keys[0])
        rig.evict_host(8)
        assert rig.found(keys[0])[1] == 0
        assert set(sources(rig, keys[0])) < {"far", "directory", "directory-2"}
        figures = manager.stats()["tiers"]
        assert figures["far"]["used_bytes"] <= 16 * PLAIN_SLOT
        assert figures["far"]["evicted_blocks"] > 0
        assert files(one) <= 32
        nothing_left(manager)


def test_a_slot_addressed_tier_writes_promotes_and_evicts(tmp_path: Path) -> None:
    with KVCacheManager.open(gate_stack(8, memory(16, name="far"))) as manager:
        wait_ready(manager)
        rig = Rig(manager)
        keys = fill(rig, 5)
        assert [rig.found(one) for one in keys] == [(0, 0), (4, 0), (4, 0), (4, 4), (4, 4)]
        assert sources(rig, keys[1]) == {"far": 4}
        assert rig.found(keys[1]) == (4, 4)
        figures = settled(manager)["tiers"]["far"]
        assert (figures["stored_blocks"], figures["evicted_blocks"]) == (20, 4)
        assert figures["bytes_read"] == 4 * PLAIN_SLOT
        nothing_left(manager)


def test_a_tier_in_memory_loses_its_blocks_with_its_process(tmp_path: Path) -> None:
    with KVCacheManager.open(gate_stack(8, memory(64, name="far"))) as manager:
        wait_ready(manager)
        rig = Rig(manager)
        keys = fill(rig, 6)
        assert rig.found(keys[0]) == (4, 0)
        os.kill(manager.stats()["tiers"]["far"]["pid"], signal.SIGKILL)
        until(lambda: manager.stats()["tiers"]["far"]["restarts"] == 1)
        wait_ready(manager)
        assert rig.found(keys[0]) == (0, 0)
        assert rig.found(keys[5]) == (4, 4), "host memory has nothing to do with it"
        assert settled(manager)["tiers"]["far"]["used_bytes"] == 0
        assert rig.load(keys[0]) == (0, 0)
        rig.store(keys[0])
        rig.evict_host(8)
        assert sources(rig, keys[0]) == {"far": 4}
        nothing_left(manager)


def test_a_slot_is_not_given_away_while_it_is_read(gates: None) -> None:
    """A lower tier's copies that a fetch reads stay, whatever is written down meanwhile."""
    tier = gate_tier(concurrency=2, capacity=f"{8 * PLAIN_SLOT}B") | {"backend": "slotgate"}
    with KVCacheManager.open(gate_stack(16, tier)) as manager:
        wait_ready(manager)
        rig, gate = Rig(manager), GATES["gate"]
        keys = rig.keys(1, 4)
        rig.store(keys)
        gate.failing.add("write")
        rig.evict_host(16)
        gate.failing.clear()
        assert rig.found(keys) == (4, 0)
        gate.shut("read")
        fetch = rig.fetch(keys)
        until(lambda: gate.count("read") == 1)
        for seed in range(50, 54):
            transfer = rig.begin_store(rig.keys(seed, 2))
            assert transfer.wait(PATIENCE_S)
        until(lambda: settled(manager)["tiers"]["gate"]["queued_blocks"]["write"] == 0)
        gate.open("read")
        assert fetch.wait(PATIENCE_S)
        assert fetch.ready == 4
        load = rig.begin_load(fetch)
        assert load.wait(PATIENCE_S)
        assert rig.wrong(keys, 4) == 0
        fetch.release()
        nothing_left(manager)


# ---------------------------------------------------------------- models that come and go


def test_a_thousand_models_of_different_sizes_leave_no_room_behind(gates: None) -> None:
    tier = gate_tier(capacity="4MiB") | {"backend": "slotgate"}
    with KVCacheManager.open(gate_stack(512, tier)) as manager:  # 4 MiB
        wait_ready(manager)
        for number in range(1000):
            size = 1000 + 4096 * (number * 7 % 200)
            rig = Rig(manager, (Group((size,)),), pages=2, model=f"model {number}")
            keys = rig.keys(number, 2)
            rig.store(keys)
            assert rig.found(keys) == (2, 2), f"model {number} of {size} bytes found no room"
            if number % 100 == 0:
                assert rig.load(keys) == (2, 0)
            manager.reset(rig.namespace)
        assert settled(manager)["refused_blocks"] == 0
        nothing_left(manager)
        last = Rig(manager, pages=512, model="last")
        keys = last.keys(1, 256)
        assert last.store(keys) == 256, "half of host memory, which was in other slot classes, can be had"
        assert last.load(keys) == (256, 0)
        nothing_left(manager)


def test_two_models_of_different_sizes_share_host_memory_and_the_tier_below(gates: None) -> None:
    with KVCacheManager.open(gate_stack(256, memory(512, name="far"))) as manager:
        wait_ready(manager)
        small, large = Rig(manager), Rig(manager, (Group((120_000,)),), model="large")
        for turn in range(6):
            for rig, blocks in ((small, 40), (large, 6)):
                keys = rig.keys(turn, blocks)
                assert rig.store(keys) == blocks
                assert rig.load(keys) == (blocks, 0)
        for rig, blocks in ((small, 40), (large, 6)):
            assert rig.load(rig.keys(5, blocks)) == (blocks, 0)
            assert rig.load(rig.keys(2, blocks))[1] == 0
        nothing_left(manager)


def test_a_block_that_no_tier_has_room_for_is_refused_at_registration(gates: None) -> None:
    with KVCacheManager.open(gate_stack(8)) as manager, pytest.raises(ValueError, match="cannot hold one slot"):
        manager.register(ModelSpec("huge", BLOCK_SIZE, (KVGroup(1 << 20),)))
