"""Namespaces that come and go: what nobody uses and of which nothing is left is forgotten, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gates import GATES, PATIENCE_S, until
from helpers import Engine, prompt, stack
from rig import PLAIN, Rig, gate_stack, gate_tier, nothing_left, settled, wait_ready

from flexkv_core import namespaces as namespaces_module
from flexkv_core.blocks import Namespace
from flexkv_core.errors import StateError, UnknownNamespaceError
from flexkv_core.layout import ModelSpec
from flexkv_core.manager import KVCacheManager
from flexkv_core.namespaces import MOST_IDLE_NAMESPACES

pytestmark = pytest.mark.usefixtures("gates")
HOST = 16


@pytest.fixture(params=["gate", "slotgate"])
def manager(request: pytest.FixtureRequest, gates: None) -> Iterator[KVCacheManager]:
    capacity = {"capacity": "1MiB"} if request.param == "slotgate" else {}
    with KVCacheManager.open(gate_stack(HOST, gate_tier(**capacity) | {"backend": request.param})) as manager:
        wait_ready(manager)
        yield manager
        nothing_left(manager)


def known(manager: KVCacheManager) -> int:
    """Namespaces that any part of the manager knows."""
    settled(manager)
    index = manager._planner.index.statistics()["namespaces"]
    assert index == manager._planner.namespaces
    ledger = manager._planner._ledger
    assert len(ledger._leaving) + len(ledger._retired) <= index
    names = manager._namespaces
    return max(index, len(names._present), len(names._live), len(names._ranks), len(names._idle))


def test_what_was_stored_is_found_again(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    keys, below = rig.keys(1, 4), rig.keys(2, 4)
    rig.store(below)
    rig.evict_host(HOST)
    rig.store(keys)
    manager.unregister(rig.namespace)
    with pytest.raises(StateError, match="no device"):
        manager.store(rig.namespace, keys, np.arange(4, dtype=np.int64))
    with pytest.raises(UnknownNamespaceError, match="nothing to unregister"):
        manager.unregister(rig.namespace)
    again = Rig(manager)
    assert again.namespace == rig.namespace
    assert again.load(keys) == again.load(below) == (4, 0)


def test_it_is_forgotten_with_its_last_copy(gates: None) -> None:
    with KVCacheManager.open(gate_stack(HOST)) as manager:
        rig, other = Rig(manager), Rig(manager, model="other")
        keys = rig.keys(1, 4)
        rig.store(keys)
        manager.unregister(rig.namespace)
        assert rig.found(keys) == (4, 4)
        assert known(manager) == 2
        other.evict_host(HOST)
        assert known(manager) == 1
        for call in (rig.found, rig.store):
            with pytest.raises(UnknownNamespaceError):
                call(keys)
        assert rig.fetch(keys).wait(PATIENCE_S)
        again = Rig(manager)
        assert again.store(keys) == 4
        assert again.load(keys) == (4, 0)


def test_one_of_which_nothing_is_left_is_forgotten_at_once(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    manager.unregister(rig.namespace)
    assert known(manager) == 0


def test_a_store_under_way_ends_as_if_nothing_had_been_said(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    keys = rig.keys(1, 4)
    rig.device.free.clear()
    transfer = rig.begin_store(keys)
    manager.unregister(rig.namespace)
    until(lambda: rig.device.gathers == 1)
    assert known(manager) == 1
    rig.device.free.set()
    assert transfer.wait(PATIENCE_S)
    assert (transfer.blocks, transfer.error) == (4, None)
    assert Rig(manager).load(keys) == (4, 0)


def test_a_store_that_is_given_up_takes_it_along(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    rig.device.free.clear()
    transfer = rig.begin_store(rig.keys(1, 4))
    until(lambda: rig.device.gathers == 1)
    manager.unregister(rig.namespace)
    manager.cancel(transfer)
    assert known(manager) == 1
    rig.device.free.set()
    assert transfer.wait(PATIENCE_S)
    until(lambda: known(manager) == 0)


def test_a_fetch_under_way_brings_its_blocks(manager: KVCacheManager) -> None:
    rig, gate = Rig(manager), GATES["gate"]
    keys = rig.keys(1, 4)
    rig.store(keys)
    rig.evict_host(HOST)
    filler = Rig(manager, model="filler")  # so that host memory has nothing of the first
    filler.evict_host(HOST)
    gate.shut("read")
    fetch = rig.fetch(keys)
    until(lambda: gate.count("read") == 1)
    manager.unregister(rig.namespace)
    settled(manager)
    gate.open("read")
    assert fetch.wait(PATIENCE_S)
    assert fetch.ready == 4
    fetch.release()


def test_one_that_was_registered_again_at_once_stays(manager: KVCacheManager) -> None:
    for number in range(100):
        rig = Rig(manager)
        if number % 2:
            rig.begin_store(rig.keys(number, 2))
        manager.unregister(rig.namespace)
        again = Rig(manager)
        assert again.found(again.keys(1000, 1)) == (0, 0)
    assert known(manager) == 1
    assert manager.drain(PATIENCE_S)


def test_ten_thousand_adapters_leave_a_bounded_number_behind(manager: KVCacheManager) -> None:
    """They store, fetch and go; some are reset."""
    rig = Rig(manager)
    largest = 0
    for number in range(10_000):
        spec = dataclasses.replace(rig.spec, lora=f"adapter {number}")
        rig.namespace = manager.register(spec, rig.devices)
        keys = rig.keys(number, 1)
        if number % 4 == 0:
            transfer = rig.begin_store(keys)
            if number % 8 == 0:
                assert transfer.wait(PATIENCE_S)
                manager.prefetch(rig.namespace, keys)
        if number % 16 == 0:
            rig.namespace = manager.reset(rig.namespace)
        manager.unregister(rig.namespace)
        if number % 500 == 0:
            largest = max(largest, known(manager))
    assert manager.drain(PATIENCE_S)
    lower = 128 if manager._books[1].column is not None else 0  # 1 MiB of blocks with their seals
    assert max(largest, known(manager)) <= 1 + HOST + lower + 4
    assert len(manager._namespaces._live) == len(manager._namespaces._ranks) == 1


def test_ten_thousand_without_a_device_leave_a_bounded_number_behind(manager: KVCacheManager) -> None:
    """Of callers that only look, and never unregister."""
    first = Rig(manager)
    for number in range(10_000):
        manager.register(dataclasses.replace(first.spec, salt=str(number)))
    assert known(manager) <= MOST_IDLE_NAMESPACES + 1
    assert first.store(first.keys(1, 4)) == 4, "one with a device is never forgotten"


def test_the_least_recently_used_goes_first(manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces_module, "MOST_IDLE_NAMESPACES", 4)
    spec = ModelSpec("idle", 4, (PLAIN[0].spec,))
    names: list[Namespace] = [manager.register(dataclasses.replace(spec, salt=str(n))) for n in range(4)]
    none = np.zeros((0, 32), np.uint8)
    manager.lookup(names[0], none)
    fetch = manager.fetch(names[1], none)
    assert fetch.wait(PATIENCE_S)
    fetch.release()
    manager.register(dataclasses.replace(spec, salt="2"))
    names[0] = manager.reset(names[0])
    names += [manager.register(dataclasses.replace(spec, salt=str(n))) for n in (4, 5)]
    settled(manager)
    for number, name in enumerate(names):
        if number in (1, 3):
            with pytest.raises(UnknownNamespaceError):
                manager.lookup(name, none)
        else:
            manager.lookup(name, none)
    for name in names:
        if name in manager._namespaces._live.values():
            manager.unregister(name)
    assert known(manager) == 0


def test_a_device_that_comes_later_keeps_it(manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces_module, "MOST_IDLE_NAMESPACES", 2)
    rig = Rig(manager)
    manager.unregister(rig.namespace)
    manager.register(rig.spec)
    assert manager.register(rig.spec, rig.devices) == rig.namespace
    for number in range(5):
        manager.register(dataclasses.replace(rig.spec, salt=str(number)))
    assert rig.store(rig.keys(1, 2)) == 2


def test_blocks_in_a_persistent_tier_are_found_again(tmp_path: Path) -> None:
    with KVCacheManager.open(stack(tmp_path, isolation="none", host_blocks=8)) as manager:
        wait_ready(manager)
        engine = Engine(manager)
        keys = engine.keys(prompt(1, 4))
        engine.store(keys)
        assert manager.drain(10)
        other = Engine(manager, model="other")
        other.store(other.keys(prompt(2, 8)))
        assert manager.drain(10)
        manager.unregister(engine.namespace)
        assert known(manager) == 1, "of a key-addressed tier nothing is kept by namespace"
        assert Engine(manager).load(keys)[:2] == (4, 0)
