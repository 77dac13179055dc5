"""What the manager's state machine has found, each as small as it gets."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Install
from machine_gates import BACKENDS, PLUGINS, Current, GatedDevice, Gates, Kept, KillableLink, content, gated_verify
from machine_world import SLOT

from flexkv_core import manager as manager_module
from flexkv_core import reading, tier_inline
from flexkv_core.blocks import block_keys
from flexkv_core.layout import KVGroup, ModelSpec
from flexkv_core.manager import KVCacheManager
from flexkv_core.plans import Outcome

PATIENCE_S = 30.0


@pytest.fixture
def gates(install_plugin: Install, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gates]:
    for name, (made, addressing) in BACKENDS.items():
        install_plugin(name, PLUGINS.format(name=name, made=made, addressing=addressing))
    monkeypatch.setattr(reading, "verify_blocks", gated_verify)
    monkeypatch.setattr(manager_module, "InlineLink", KillableLink)
    Current.gates = Gates()
    yield Current.gates
    Current.gates.open_all()


class Small:
    """A manager over 24 host slots and a gated tier, with one model of 4 KiB blocks."""

    def __init__(self, gates: Gates, backend: str = "gate-kept", **options: Any) -> None:
        tier = {"backend": backend, "name": "low", "tier": "low", "isolation": "none", **options}
        cpu = {"backend": "cpu", "capacity": 24 * SLOT}
        self.gates = gates
        self.manager = KVCacheManager.open({"tiers": [cpu, tier]})
        self.array = np.zeros((32, 4096), np.uint8)
        self.spec = ModelSpec("small", 1, (KVGroup(4096),))
        self.namespace = self.manager.register(self.spec, GatedDevice([[self.array]]))

    def keys(self, seed: int, blocks: int) -> Any:
        tokens = np.arange(blocks, dtype=np.int32) + 1000 * seed
        keys = block_keys(tokens, 1, self.namespace.root)
        self.gates.sizes |= {(key.tobytes(), 0): 4096 for key in keys}
        return keys

    def store(self, keys: Any) -> Any:
        for page, key in enumerate(keys):
            self.array[page] = content(key.tobytes(), 0, 4096)
        return self.manager.store(self.namespace, keys, np.arange(len(keys), dtype=np.int64))

    def sunk(self, blocks: int) -> Any:
        """Keys that only the lower tier holds."""
        first = self.keys(0, blocks)
        for keys in (first, self.keys(1, 24)):
            assert self.store(keys).wait(PATIENCE_S)
            assert self.manager.drain(PATIENCE_S)
        assert self.manager.lookup(self.namespace, first).host_blocks == 0
        return first


def until(true: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_store_that_a_reset_overtakes_is_no_error_of_ours(gates: Gates, caplog: pytest.LogCaptureFixture) -> None:
    """It was logged with a traceback, as a store that could not be planned."""
    small = Small(gates)
    owner, planner = small.manager._scheduler, small.manager._planner
    keys = small.keys(0, 2)
    held = threading.Event()
    owner.call(held.wait, PATIENCE_S)
    transfer = small.store(keys)
    planner.retire(small.namespace.root)
    held.set()
    assert transfer.wait(PATIENCE_S)
    assert transfer.error == "the namespace was reset"
    assert not caplog.records
    small.manager.close()


def test_a_read_that_is_verified_when_its_tier_has_died_leaves_no_pin(gates: Gates) -> None:
    """The record of a key-addressed tier kept its pin for ever: the block was never evicted again."""
    small = Small(gates, persistent=False)
    keys = small.sunk(2)
    gates.shut.add("verify")
    fetch = small.manager.fetch(small.namespace, keys)
    until(lambda: gates.waiting("verify"))
    owner = small.manager._scheduler
    link = owner.queues()[1].link
    owner.ask(link.die)
    owner.ask(link.died)
    gates.open("verify")
    assert fetch.wait(PATIENCE_S)
    assert fetch.ready == 2
    fetch.release()
    assert not small.manager._planner.tiers[1].presence.pinned
    small.manager.close()


def test_corrupt_copies_of_a_tier_that_has_died_take_no_room_of_the_next_one(gates: Gates) -> None:
    """They were counted as debris of the new, empty medium."""
    small = Small(gates, persistent=False, capacity=64 * SLOT)
    keys = small.sunk(2)
    planner = small.manager._planner
    with small.manager._lock:
        plan = planner.begin_fetch(small.namespace.root, keys)
        planner.lose_tier(1)
        for move in plan.reads:
            assert planner.finish_read(move, np.full(len(move), Outcome.CORRUPT, np.uint8)) is None
        planner.release(plan)
    assert planner.tiers[1].debris_bytes == 0
    small.manager.close()


def test_close_does_not_wait_for_a_copy_beyond_its_deadline(gates: Gates) -> None:
    """It waited for the device however long that took."""
    small = Small(gates)
    gates.shut.add("gather")
    transfer = small.store(small.keys(0, 2))
    until(lambda: gates.waiting("gather"))
    began = time.monotonic()
    closer = threading.Thread(target=small.manager.close, args=(0.2,))
    closer.start()
    closer.join(10.0)
    took = time.monotonic() - began
    gates.open_all()
    closer.join()
    assert took < 5.0
    assert transfer.error == "the manager was closed"


def test_a_store_between_copy_and_seal_when_the_manager_closes_ends(
    gates: Gates, caplog: pytest.LogCaptureFixture
) -> None:
    """Its seal could not be submitted any more: an exception on the owner thread, and its slots never came back."""
    small = Small(gates)
    halves = [GatedDevice([[np.zeros((8, 2048), np.uint8)]]) for _ in range(2)]
    spec = ModelSpec("halves", 1, (KVGroup(4096),), tensor_parallel=2)
    namespace = small.manager.register(spec, halves)
    gates.shut.add("gather")
    keys = block_keys(np.arange(2, dtype=np.int32), 1, namespace.root)
    small.manager.store(namespace, keys, np.arange(2, dtype=np.int64))
    until(lambda: len(gates.waiting("gather")) == 2)
    scheduler_ = small.manager._scheduler
    scheduler_._copiers.shutdown(wait=False)  # what close does when its time is up
    gates.open_all()
    until(lambda: not small.manager._copies.pending_stores)
    scheduler_.ask(lambda: None)
    assert not [record for record in caplog.records if record.name == "asyncio"]
    assert small.manager._planner.tiers[0].used_bytes == 0
    small.manager.close()


def test_a_backend_that_opens_after_close_is_closed(
    gates: Gates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `isolation: none` it stayed open: the directory stayed locked as long as the process lived."""
    may_open = threading.Event()
    worker = tier_inline.TierWorker
    made: list[Any] = []

    def slow(*arguments: Any, **options: Any) -> Any:
        assert may_open.wait(PATIENCE_S)
        made.append(worker(*arguments, **options))
        return made[0]

    monkeypatch.setattr(tier_inline, "TierWorker", slow)
    tier = {"backend": "directory", "root": str(tmp_path / "kv"), "isolation": "none"}
    stack = {"tiers": [{"backend": "cpu", "capacity": 24 * SLOT}, tier]}
    KVCacheManager.open(stack).close(0.1)
    may_open.set()
    until(lambda: made)
    monkeypatch.setattr(tier_inline, "TierWorker", worker)
    until(lambda: threading.active_count() == 1 or not made)
    again = KVCacheManager.open(stack)
    until(lambda: again.stats()["tiers"]["directory"]["state"] != "starting")
    assert again.stats()["tiers"]["directory"]["state"] == "ready"
    again.close()


def test_nothing_is_written_before_a_bounded_tier_has_said_what_it_holds(
    gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the record did not know yet took no room, so a tier that came back held more than its capacity."""
    small = Small(gates, capacity=32 * SLOT, write_queue=24 * SLOT)
    keys = small.keys(0, 24)
    assert small.store(keys).wait(PATIENCE_S)
    assert small.manager.drain(PATIENCE_S)
    small.manager.close()
    listed = threading.Event()
    whole = Kept.list

    def slow(kept: Kept) -> Any:
        assert listed.wait(PATIENCE_S)
        yield from whole(kept)

    monkeypatch.setattr(Kept, "list", slow)
    small = Small(gates, capacity=32 * SLOT, write_queue=24 * SLOT)
    until(lambda: small.manager.stats()["tiers"]["low"]["state"] == "ready")
    assert small.store(small.keys(1, 20)).wait(PATIENCE_S)
    assert not small.manager.drain(0.2)
    assert len(gates.media["low"]) == 24
    listed.set()
    assert small.manager.drain(PATIENCE_S)
    assert len(gates.media["low"]) <= 32
    assert not gates.broken
    assert small.manager.lookup(small.namespace, small.keys(1, 20)).blocks == 20
    small.manager.close()


def test_room_that_is_being_made_is_nobodys_yet(gates: Gates) -> None:
    """Blocks that are being deleted took no room any more: another write came before they were gone."""
    small = Small(gates, capacity=8 * SLOT, evict_ratio=0.5, concurrency=2, max_batch_blocks=1, write_queue=24 * SLOT)
    assert small.store(small.keys(0, 8)).wait(PATIENCE_S)
    assert small.manager.drain(PATIENCE_S)
    assert len(gates.media["low"]) == 8
    gates.shut.add("delete")
    assert small.store(small.keys(1, 2)).wait(PATIENCE_S)
    until(lambda: gates.waiting("delete"))
    assert not small.manager.drain(0.1)
    gates.open("delete")
    assert small.manager.drain(PATIENCE_S)
    assert not gates.broken
    assert small.manager._planner.tiers[1].debris_bytes == 0
    small.manager.close()
