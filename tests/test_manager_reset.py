"""Reset: a fresh epoch in O(1). Nothing old is found, fetched, loaded or committed, and nothing is left behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gates import GATES, PATIENCE_S, until
from rig import PLAIN_SLOT, Rig, gate_stack, gate_tier, nothing_left, own, settled, wait_ready

from flexkv_core.errors import UnknownNamespaceError
from flexkv_core.manager import KVCacheManager

pytestmark = pytest.mark.usefixtures("gates")
HOST = 16


@pytest.fixture
def manager(gates: None) -> Iterator[KVCacheManager]:
    with KVCacheManager.open(gate_stack(HOST, gate_tier(max_batch_blocks=4))) as manager:
        wait_ready(manager)
        yield manager
        GATES["gate"].open("read")
        GATES["gate"].open("write")
        nothing_left(manager)


def reset(rig: Rig) -> None:
    rig.namespace = rig.manager.reset(rig.namespace)


def test_nothing_of_the_old_epoch_is_found_in_any_tier(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    old = rig.namespace
    here, below = rig.keys(1, 4), rig.keys(2, 4)
    rig.store(below)
    rig.evict_host(HOST)
    rig.store(here)
    reset(rig)
    for keys in (here, below):
        with pytest.raises(UnknownNamespaceError):
            manager.lookup(old, keys)
        with pytest.raises(UnknownNamespaceError):
            manager.store(old, keys, np.arange(4, dtype=np.int64))
        assert rig.found(keys)[1] == 0, "not under the old keys either"
        assert rig.load(keys) == (0, 0)
    for seed in (1, 2):  # the same tokens: other keys
        keys = rig.keys(seed, 4)
        assert rig.found(keys) == (0, 0)
        assert rig.load(keys) == (0, 0)
        assert rig.store(keys) == 4
        assert rig.load(keys) == (4, 0)
    assert not set(own(rig.keys(1, 4))) & set(own(here))


def test_the_old_namespace_is_unknown_and_so_is_a_stranger(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    old = rig.namespace
    reset(rig)
    with pytest.raises(UnknownNamespaceError):
        manager.reset(old)
    with KVCacheManager.open(gate_stack(HOST)) as other, pytest.raises(UnknownNamespaceError):
        other.reset(rig.namespace)


def test_a_model_registered_after_a_reset_gets_the_new_epoch(manager: KVCacheManager) -> None:
    """Regression: it got the old one, which was retired, so that every call was refused until its blocks were gone."""
    rig = Rig(manager)
    rig.store(rig.keys(1, 4))
    for _ in range(2):
        reset(rig)
        keys = rig.keys(1, 4)
        rig.store(keys)
        again = Rig(manager)
        assert again.namespace == rig.namespace
        assert again.load(keys) == (4, 0)
        rig = again


def test_a_reset_costs_the_same_whatever_is_cached(manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(manager)
    index = manager._planner.index
    calls: Counter[str] = Counter()

    class Counting:
        def __getattr__(self, name: str) -> Any:
            calls[name] += 1
            return getattr(index, name)

    counts = []
    for blocks in (0, 1, 12):
        if blocks:
            rig.store(rig.keys(1, blocks))
        with monkeypatch.context() as patch:
            patch.setattr(manager._planner._ledger, "index", Counting())
            patch.setattr(manager._planner, "index", Counting())
            calls.clear()
            reset(rig)
            settled(manager)
        counts.append(dict(calls))
    assert counts[0] == counts[1] == counts[2]
    assert sum(counts[0].values()) <= 4


# ---------------------------------------------------------------- what is under way


@pytest.mark.parametrize("held", [0, 2])
def test_a_store_under_way_commits_nothing(manager: KVCacheManager, held: int) -> None:
    rig = Rig(manager)
    keys = rig.keys(1, 4)
    if held:
        rig.store(keys[:held])
    before = rig.device.gathers
    rig.device.free.clear()
    transfer = rig.begin_store(keys)
    until(lambda: rig.device.gathers == before + 1)
    reset(rig)
    rig.device.free.set()
    assert transfer.wait(PATIENCE_S)
    assert (transfer.blocks, transfer.error) == (0, "the namespace was reset")
    assert manager.drain(PATIENCE_S)
    assert GATES["gate"].count("write") == (1 if held else 0)
    assert settled(manager)["tiers"]["cpu"]["used_bytes"] == held * PLAIN_SLOT
    assert rig.found(rig.keys(1, 4)) == (0, 0)


def test_a_fetch_under_way_ends_and_its_load_fails_politely(manager: KVCacheManager) -> None:
    rig, gate = Rig(manager), GATES["gate"]
    keys = rig.keys(1, 8)
    rig.store(keys)
    rig.evict_host(HOST)
    gate.calls.clear()
    gate.shut("read")
    fetch = rig.fetch(keys)
    until(lambda: gate.count("read") == 1)
    reset(rig)
    assert fetch.wait(PATIENCE_S)
    until(lambda: fetch.released)
    assert (fetch.ready, fetch.why) == (0, "reset")
    transfer = manager.load(fetch, np.zeros(0, np.int64))
    assert transfer.done
    assert transfer.error == "the fetch was reset"
    gate.open("read")
    assert manager.drain(PATIENCE_S)
    assert gate.count("read") == 1, "the rest was not read"
    assert settled(manager)["pinned_bytes"] == 0


def test_a_load_right_after_a_reset_fails_politely(manager: KVCacheManager) -> None:
    """Regression: it raised while the owner thread had not yet ended the fetch."""
    rig = Rig(manager)
    keys = rig.keys(1, 4)
    rig.store(keys)
    fetch, queued = rig.fetch(keys), None
    assert fetch.wait(PATIENCE_S)
    with manager._lock:
        manager._scheduler.call(manager.stats)  # which waits for the lock: the owner thread is busy
        queued = rig.begin_load(fetch)
        queue_fetch = rig.fetch(keys)
        reset(rig)
        late = rig.begin_load(fetch)
        assert late.done
    assert late.error == "the fetch was reset"
    assert queued.wait(PATIENCE_S), "it was asked for before the reset, and may end either way"
    assert queue_fetch.wait(PATIENCE_S)
    assert (queue_fetch.ready, queue_fetch.why) == (0, "reset")
    assert manager.load(queue_fetch, np.zeros(0, np.int64)).error == "the fetch was reset"
    fetch.release()
    queue_fetch.release()


def test_a_load_under_way_ends_with_the_old_bytes(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    keys = rig.keys(1, 4)
    rig.store(keys)
    fetch = rig.fetch(keys)
    assert fetch.wait(PATIENCE_S)
    rig.device.free.clear()
    transfer = rig.begin_load(fetch)
    until(lambda: rig.device.scatters == 1)
    reset(rig)
    fresh = rig.begin_store(rig.keys(7, HOST - 4))
    until(lambda: rig.device.gathers == 2)
    rig.device.free.set()
    for one in (transfer, fresh):
        assert one.wait(PATIENCE_S)
        assert one.error is None
    assert transfer.blocks == 4
    assert settled(manager)["pinned_bytes"] == 0


def test_writes_queued_before_a_reset_are_not_carried_out(manager: KVCacheManager) -> None:
    rig, gate = Rig(manager), GATES["gate"]
    keys = rig.keys(1, 8)
    gate.shut("write")
    assert rig.begin_store(keys).wait(PATIENCE_S)
    until(lambda: gate.count("write") == 1)
    reset(rig)
    gate.open("write")
    assert manager.drain(PATIENCE_S)
    assert gate.count("write") == 1
    assert manager.stats()["tiers"]["gate"]["dropped_blocks"] == 4


# ---------------------------------------------------------------- afterwards


def test_old_blocks_are_evicted_first(manager: KVCacheManager) -> None:
    rig, other = Rig(manager), Rig(manager, model="other")
    older = other.keys(1, 6)
    other.store(older)
    old = rig.namespace
    rig.store(rig.keys(2, 8))  # used later than the other model's
    reset(rig)
    assert rig.store(rig.keys(3, 10)) == 10
    assert other.found(older) == (6, 6)
    assert manager._planner.namespaces == 2, "the old epoch is forgotten with its last copy"
    with pytest.raises(UnknownNamespaceError):
        manager.reset(old)


def test_a_thousand_resets_leave_nothing_behind(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    for number in range(1000):
        keys = rig.keys(number, 1 + number % 3)
        assert rig.begin_store(keys).wait(PATIENCE_S)
        fetch = rig.fetch(keys)
        if number % 2:
            assert fetch.wait(PATIENCE_S)
        reset(rig)
    assert manager.drain(PATIENCE_S)
    stats = settled(manager)
    assert (stats["pinned_fetches"], stats["fetches"], stats["pinned_bytes"]) == (0, 0, 0)
    assert manager._planner.namespaces <= 1 + HOST, "one a block that is still there"
    assert len(manager._namespaces._ranks) == len(manager._namespaces._live) == 1
    keys = rig.keys(1, HOST)
    assert rig.store(keys) == HOST
    assert manager._planner.namespaces == 1
    assert manager._planner.index.statistics()["namespaces"] == 1
    assert rig.load(keys)[1] == 0


def test_old_keys_under_the_new_namespace_are_not_served_by_a_key_addressed_tier(manager: KVCacheManager) -> None:
    """Regression: a request that is under way at a reset may go on with the keys that it has. Only the seal knows."""
    rig = Rig(manager)
    keys = rig.keys(1, 4)
    rig.store(keys)
    rig.evict_host(HOST)
    assert rig.found(keys) == (4, 0)
    reset(rig)
    assert rig.load(keys) == (0, 0)
    assert manager.stats()["tiers"]["gate"]["corrupt_blocks"] == 4
    assert rig.found(keys) == (0, 0), "the copies were dropped"
    assert manager.drain(PATIENCE_S)
    until(lambda: not any(name[0] in own(keys) for name in GATES["gate"].medium))
