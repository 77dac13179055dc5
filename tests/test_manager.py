"""The manager end to end: real devices, a real tier process, a real directory."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import SLOT_BYTES, Engine, prompt, stack
from leaks import nothing_held

from flexkv_core.errors import (
    KeyInputError,
    KeyTypeError,
    LayoutError,
    ManagerClosedError,
    StateError,
    UnknownNamespaceError,
)
from flexkv_core.layout import KVGroup, ModelSpec
from flexkv_core.manager import KVCacheManager

pytestmark = pytest.mark.usefixtures("leak_check")


def wait_ready(manager: KVCacheManager, tier: str = "directory", timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while manager.stats()["tiers"][tier]["state"] != "ready":
        assert time.monotonic() < deadline, manager.stats()
        time.sleep(0.01)


def test_a_stored_prefix_comes_back_from_host_memory(tmp_path: Path) -> None:
    with KVCacheManager.open(stack(tmp_path)) as manager:
        engine = Engine(manager)
        keys = engine.keys(prompt(1, 8))
        assert manager.lookup(engine.namespace, keys).blocks == 0
        assert engine.store(keys) == 8
        found = manager.lookup(engine.namespace, keys)
        assert (found.blocks, found.host_blocks) == (8, 8)
        assert engine.load(keys) == (8, 0, {"cpu": 8, "directory": 0})
        longer = engine.keys(np.concatenate([prompt(1, 8), prompt(2, 3)]))
        assert manager.lookup(engine.namespace, longer).blocks == 8


def test_what_host_memory_evicted_comes_back_from_the_directory(tmp_path: Path) -> None:
    with KVCacheManager.open(stack(tmp_path, host_blocks=16)) as manager:
        engine = Engine(manager)
        prompts = [engine.keys(prompt(seed, 8)) for seed in range(6)]
        for keys in prompts:
            engine.store(keys)
            assert manager.drain(10)
        found = manager.lookup(engine.namespace, prompts[0])
        assert (found.blocks, found.host_blocks) == (8, 0)
        assert engine.load(prompts[0]) == (8, 0, {"cpu": 0, "directory": 8})
        assert manager.lookup(engine.namespace, prompts[0]).host_blocks == 8  # promoted
        figures = manager.stats()["tiers"]
        assert figures["directory"]["stored_blocks"] == 48
        assert figures["cpu"]["evicted_blocks"] == 40
        assert figures["directory"]["bytes_read"] == 8 * SLOT_BYTES


def test_the_directory_survives_a_restart_and_its_capacity_holds(tmp_path: Path) -> None:
    capacity = 20 * SLOT_BYTES
    with KVCacheManager.open(stack(tmp_path, directory=str(capacity))) as manager:
        engine = Engine(manager)
        for seed in range(4):
            engine.store(engine.keys(prompt(seed, 8)))
            assert manager.drain(10)
    size = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file() and f.stat().st_size >= 4096)
    assert size <= capacity
    smaller = 8 * SLOT_BYTES
    with KVCacheManager.open(stack(tmp_path, directory=str(smaller))) as manager:
        engine = Engine(manager)
        wait_ready(manager)
        assert manager.drain(10)
        keys = engine.keys(prompt(3, 8))
        deadline = time.monotonic() + 10
        while manager.lookup(engine.namespace, keys).blocks < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.load(keys)[:2] == (8, 0)
    size = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file() and f.stat().st_size >= 4096)
    assert size <= smaller


def test_corrupt_copies_are_misses_are_counted_and_are_dropped(tmp_path: Path) -> None:
    faults = {"corrupt": 1.0, "seed": 5}
    with KVCacheManager.open(stack(tmp_path, host_blocks=16, faults=faults)) as manager:
        engine = Engine(manager)
        first = engine.keys(prompt(0, 8))
        for seed in range(4):
            engine.store(engine.keys(prompt(seed, 8)))
            assert manager.drain(10)
        assert manager.lookup(engine.namespace, first).blocks == 8
        assert engine.load(first)[:2] == (0, 0)
        figures = manager.stats()["tiers"]["directory"]
        assert figures["corrupt_blocks"] == 8
        assert figures["hit_blocks"] == 0
        assert manager.lookup(engine.namespace, first).blocks == 0


def test_without_verification_wrong_bytes_get_through(tmp_path: Path) -> None:
    """Negative control: the check of this file can fail, so the seal is what keeps wrong bytes out."""
    faults = {"corrupt": 1.0, "seed": 5}
    with KVCacheManager.open(stack(tmp_path, host_blocks=16, faults=faults), verify=False) as manager:
        engine = Engine(manager)
        first = engine.keys(prompt(0, 8))
        for seed in range(4):
            engine.store(engine.keys(prompt(seed, 8)))
            assert manager.drain(10)
        ready, wrong, _ = engine.load(first)
        assert ready == 8
        assert wrong > 0


def test_a_hanging_tier_slows_nothing_and_close_keeps_its_deadline(tmp_path: Path) -> None:
    faults = {"hang": 1.0, "seed": 5, "operations": ["read", "write"]}
    options = {"faults": faults, "deadline_s": 3600.0, "write_queue": 4 * SLOT_BYTES}
    manager = KVCacheManager.open(stack(tmp_path, host_blocks=16, **options))
    engine = Engine(manager)
    for seed in range(12):
        engine.store(engine.keys(prompt(seed, 2)), timeout_s=5.0)
    assert not manager.drain(0.2)
    assert engine.load(engine.keys(prompt(11, 2))) == (2, 0, {"cpu": 2, "directory": 0})
    start = time.monotonic()
    manager.close(deadline_s=1.0)
    assert time.monotonic() - start < 5.0


def test_a_full_queue_drops_and_never_waits(tmp_path: Path) -> None:
    faults = {"hang": 1.0, "seed": 5, "operations": ["write"]}
    limit = 4 * SLOT_BYTES
    options = {"faults": faults, "deadline_s": 3600.0, "write_queue": limit}
    with KVCacheManager.open(stack(tmp_path, host_blocks=600, **options)) as manager:
        engine = Engine(manager)
        wait_ready(manager)
        for seed in range(200):
            engine.store(engine.keys(prompt(seed, 4)))
        figures = manager.stats()["tiers"]["directory"]
        assert figures["queued_blocks"]["write"] <= 4
        assert figures["dropped_blocks"] > 0
        manager.close(1.0)


def test_killing_the_tier_process_loses_no_committed_block_and_it_comes_back(tmp_path: Path) -> None:
    with KVCacheManager.open(stack(tmp_path, host_blocks=16)) as manager:
        engine = Engine(manager)
        for seed in range(4):
            engine.store(engine.keys(prompt(seed, 8)))
            assert manager.drain(10)
        before = manager.stats()["tiers"]["directory"]["pid"]
        os.kill(before, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while manager.stats()["tiers"]["directory"]["restarts"] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        wait_ready(manager)
        assert manager.stats()["tiers"]["directory"]["pid"] != before
        assert engine.load(engine.keys(prompt(0, 8))) == (8, 0, {"cpu": 0, "directory": 8})
        nothing_held(manager)


def test_a_fetch_past_its_deadline_is_done_with_what_is_in_hand(tmp_path: Path) -> None:
    faults = {"hang": 1.0, "seed": 5, "operations": ["read"]}
    with KVCacheManager.open(stack(tmp_path, host_blocks=16, faults=faults, deadline_s=3600.0)) as manager:
        engine = Engine(manager)
        for seed in range(4):
            engine.store(engine.keys(prompt(seed, 8)))
            assert manager.drain(10)
        assert manager.lookup(engine.namespace, engine.keys(prompt(0, 8))).blocks == 8
        assert engine.load(engine.keys(prompt(0, 8)), deadline_s=0.2)[0] == 0
        for deadline_s in (float("nan"), -1.0):
            fetch = manager.fetch(engine.namespace, engine.keys(prompt(1, 8)), deadline_s=deadline_s)
            assert fetch.wait(20), deadline_s
            fetch.release()
        manager.close(1.0)


def test_two_fetches_of_one_block_share_one_read(tmp_path: Path) -> None:
    faults = {"delay": 1.0, "delay_s": 0.3, "seed": 5, "operations": ["read"]}
    with KVCacheManager.open(stack(tmp_path, host_blocks=16, faults=faults)) as manager:
        engine = Engine(manager)
        for seed in range(4):
            engine.store(engine.keys(prompt(seed, 8)))
            assert manager.drain(10)
        keys = engine.keys(prompt(0, 8))
        fetches = [manager.fetch(engine.namespace, keys) for _ in range(3)]
        assert all(fetch.wait(10) and fetch.ready == 8 for fetch in fetches)
        for fetch in fetches:
            fetch.release()
        assert manager.stats()["tiers"]["directory"]["bytes_read"] == 8 * SLOT_BYTES


def test_pinned_blocks_are_not_evicted_and_a_store_without_room_is_cut(tmp_path: Path) -> None:
    with KVCacheManager.open(stack(tmp_path, host_blocks=16)) as manager:
        engine = Engine(manager)
        keys = engine.keys(prompt(0, 12))
        engine.store(keys)
        assert manager.drain(10)
        fetch = manager.fetch(engine.namespace, keys)
        assert fetch.wait(10)
        assert fetch.ready == 12
        assert engine.store(engine.keys(prompt(1, 8))) == 4
        assert manager.stats()["refused_blocks"] == 4
        fetch.release()
        assert engine.load(keys)[:2] == (12, 0)
        assert engine.store(engine.keys(prompt(2, 8))) == 8
        nothing_held(manager)


def test_namespaces_do_not_mix(tmp_path: Path) -> None:
    with KVCacheManager.open(stack(tmp_path)) as manager:
        one, two = Engine(manager, model="one"), Engine(manager, model="two")
        tokens = prompt(1, 4)
        one.store(one.keys(tokens))
        assert manager.lookup(two.namespace, two.keys(tokens)).blocks == 0
        assert manager.lookup(one.namespace, one.keys(tokens)).blocks == 4


def test_bad_calls_say_what_is_wrong(tmp_path: Path) -> None:
    with KVCacheManager.open(stack(tmp_path)) as manager:
        engine = Engine(manager)
        keys = engine.keys(prompt(1, 4))
        with pytest.raises(KeyTypeError, match="uint8"):
            manager.lookup(engine.namespace, keys.astype(np.int32))
        with pytest.raises(KeyInputError, match=r"\(n, 32\)"):
            manager.lookup(engine.namespace, keys[:, :16])
        with pytest.raises(KeyInputError, match="at most 4"):
            manager.store(engine.namespace, keys, np.arange(5, dtype=np.int64))
        with pytest.raises(ValueError, match="64"):
            manager.store(engine.namespace, keys, np.arange(61, 65, dtype=np.int64))
        stranger = manager.register(ModelSpec("stranger", 16, (KVGroup(4096),)))
        with pytest.raises(StateError, match="device"):
            manager.store(stranger, keys, np.arange(4, dtype=np.int64))
        with pytest.raises(LayoutError, match="block_size 32, but the stack says 16"):
            manager.register(ModelSpec("other", 32, (KVGroup(4096),)))
        engine.store(keys)
        with pytest.raises(ValueError, match="soon"):
            manager.fetch(engine.namespace, keys, deadline_s="soon")  # type: ignore[arg-type]
        fetch = manager.fetch(engine.namespace, keys)
        assert fetch.wait(5)
        with pytest.raises(KeyInputError, match="device block -2"):
            manager.load(fetch, np.array([0, -2], np.int64))
        fetch.release()
    with pytest.raises(ManagerClosedError):
        manager.lookup(engine.namespace, keys)
    with KVCacheManager.open(stack(tmp_path / "other")) as manager, pytest.raises(UnknownNamespaceError):
        manager.lookup(engine.namespace, keys)
    manager.close()
