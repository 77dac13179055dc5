"""Cancel at any point, and prefetch: what is read, in which order, what stays pinned. The backend waits at a gate."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from gates import GATES, PATIENCE_S, Gate, until
from rig import Group, Rig, gate_stack, gate_tier, nothing_left, own, settled, wait_ready

from flexkv_core.errors import StateError
from flexkv_core.manager import KVCacheManager

pytestmark = pytest.mark.usefixtures("gates")
HOST = 16


@pytest.fixture
def manager(gates: None) -> Iterator[KVCacheManager]:
    """Room for 16 blocks, over one tier that takes one call of at most 4 blocks at a time."""
    with KVCacheManager.open(gate_stack(HOST, gate_tier(max_batch_blocks=4))) as manager:
        wait_ready(manager)
        yield manager
        GATES["gate"].open("read")
        GATES["gate"].open("write")
        nothing_left(manager)


def sunk(manager: KVCacheManager, *prompts: tuple[int, int]) -> tuple[Rig, Gate, list[np.ndarray]]:
    """Prompts (seed, blocks) that only the lower tier holds; the gate is shut for reads."""
    rig, gate = Rig(manager), GATES["gate"]
    keys = [rig.keys(*prompt) for prompt in prompts]
    for one in keys:
        rig.store(one)
    rig.evict_host(HOST)
    assert [rig.found(one) for one in keys] == [(len(one), 0) for one in keys]
    gate.shut("read")
    gate.calls.clear()
    return rig, gate, keys


# ---------------------------------------------------------------- fetches


def test_a_fetch_cancelled_while_queued_is_never_read(manager: KVCacheManager) -> None:
    rig, gate, (first, second) = sunk(manager, (1, 4), (2, 8))
    one, two = rig.fetch(first), rig.fetch(second)
    until(lambda: gate.count("read") == 1)
    manager.cancel(two)
    assert two.wait(PATIENCE_S)
    assert (two.ready, two.why) == (0, "cancelled")
    gate.open("read")
    assert one.wait(PATIENCE_S)
    assert one.ready == 4
    one.release()
    assert manager.drain(PATIENCE_S)
    assert gate.blocks("read") == own(first)
    assert rig.found(second) == (8, 0)
    assert rig.load(second) == (8, 0)


def test_a_fetch_cancelled_under_way_ends_at_once_and_its_reads_are_kept(manager: KVCacheManager) -> None:
    rig, gate, (keys,) = sunk(manager, (1, 8))
    fetch = rig.fetch(keys)
    until(lambda: gate.count("read") == 1)
    manager.cancel(fetch)
    assert fetch.wait(PATIENCE_S)
    assert fetch.ready == 0
    gate.open("read")
    assert manager.drain(PATIENCE_S)
    assert gate.blocks("read") == own(keys[:4]), "the second call was not sent"
    assert rig.found(keys) == (8, 4)
    with pytest.raises(StateError):
        manager.load(fetch, np.arange(0, dtype=np.int64))


def test_cancelling_one_of_two_fetches_leaves_the_other_its_reads(manager: KVCacheManager) -> None:
    rig, gate, (blocker, keys) = sunk(manager, (1, 4), (2, 8))
    first = rig.fetch(blocker)
    until(lambda: gate.count("read") == 1)
    one, two = rig.fetch(keys), rig.fetch(keys[:6])
    manager.cancel(one)
    manager.cancel(one)
    assert one.wait(PATIENCE_S)
    assert not two.done
    gate.open("read")
    assert two.wait(PATIENCE_S)
    assert two.ready == 6
    transfer = rig.begin_load(two)
    assert transfer.wait(PATIENCE_S)
    assert rig.wrong(keys, 6) == 0
    assert gate.blocks("read") == own(blocker) + own(keys[:6]), "what only the cancelled one wanted was not read"
    two.release()
    first.release()


def test_cancel_when_done_and_after_release_takes_the_pins_once(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    keys = rig.keys(1, 4)
    rig.store(keys)
    kept, done, released = rig.fetch(keys), rig.fetch(keys), rig.fetch(keys)
    for fetch in (kept, done, released):
        assert fetch.wait(PATIENCE_S)
    manager.cancel(done)
    released.release()
    manager.cancel(released)
    manager.cancel(released)
    assert settled(manager)["pinned_fetches"] == 1
    assert (done.why, released.why) == ("cancelled", "released")
    assert done.ready == 4
    for seed in range(20, 20 + HOST):  # pressure: what is pinned twice over must not go, nor be unpinned too often
        rig.store(rig.keys(seed, 2))
    assert rig.found(keys) == (4, 4)
    kept.release()


def test_a_fetch_cancelled_while_it_is_loaded_keeps_its_pins_until_the_load_has_ended(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    keys = rig.keys(1, 4)
    rig.store(keys)
    fetch = rig.fetch(keys)
    assert fetch.wait(PATIENCE_S)
    rig.device.free.clear()
    transfer = rig.begin_load(fetch)
    until(lambda: rig.device.scatters == 1)
    manager.cancel(fetch)
    assert settled(manager)["pinned_bytes"] == 4 * 8192
    rig.device.free.set()
    assert transfer.wait(PATIENCE_S)
    assert (transfer.blocks, transfer.error) == (4, None)
    assert rig.wrong(keys, 4) == 0
    until(lambda: settled(manager)["pinned_bytes"] == 0)


def test_reads_that_nobody_waits_for_after_a_deadline_are_not_made_and_hold_no_memory(manager: KVCacheManager) -> None:
    """Regression: a tier that hung had all of host memory booked, and stores were refused."""
    rig, gate, prompts = sunk(manager, *((seed, 6) for seed in range(1, 5)))
    for keys in prompts:
        fetch = rig.fetch(keys, deadline_s=0.0)
        assert fetch.wait(PATIENCE_S)
        fetch.release()
    assert settled(manager)["fetches"] == 0
    assert rig.begin_store(rig.keys(9, HOST - 4)).wait(PATIENCE_S)
    assert rig.found(rig.keys(9, HOST - 4))[1] == HOST - 4, "but for the one call that is under way"
    gate.open("read")
    assert manager.drain(PATIENCE_S)
    assert gate.blocks("read") == own(prompts[0][:4])


# ---------------------------------------------------------------- stores and loads


def test_a_store_cancelled_before_its_copy_commits_nothing(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    busy, keys = [rig.keys(seed, 1) for seed in (1, 2)], rig.keys(3, 4)
    rig.device.free.clear()
    transfers = [rig.begin_store(one) for one in busy]  # as many as there are copy threads
    until(lambda: rig.device.gathers == 2)
    doomed = rig.begin_store(keys)
    settled(manager)
    manager.cancel(doomed)
    manager.cancel(doomed)
    rig.device.free.set()
    for transfer in [*transfers, doomed]:
        assert transfer.wait(PATIENCE_S)
    assert (doomed.blocks, doomed.error) == (0, "cancelled")
    assert rig.device.gathers == 2, "nothing was copied for it"
    assert rig.found(keys) == (0, 0)
    assert manager.stats()["tiers"]["cpu"]["used_bytes"] == 2 * 8192


def test_a_store_cancelled_before_it_was_planned_ends_too(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    keys = rig.keys(1, 4)
    with manager._lock:  # the owner thread cannot plan
        transfer = rig.begin_store(keys)
        manager.cancel(transfer)
    assert transfer.wait(PATIENCE_S)
    assert rig.found(keys) == (0, 0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_store_cancelled_during_its_copy_commits_nothing_and_frees_its_slots(
    manager: KVCacheManager, ranks: int
) -> None:
    rig = Rig(manager, (Group((1500,) * ranks),))
    keys = rig.keys(1, 4)
    rig.device.free.clear()
    transfer = rig.begin_store(keys)
    until(lambda: rig.device.gathers == 1)
    manager.cancel(transfer)
    settled(manager)
    assert not transfer.done, "the device's blocks are still being read"
    assert manager.stats()["tiers"]["cpu"]["used_bytes"] == 4 * 8192
    rig.device.free.set()
    assert transfer.wait(PATIENCE_S)
    assert transfer.error == "cancelled"
    assert rig.found(keys) == (0, 0)
    assert manager.stats()["tiers"]["cpu"]["used_bytes"] == 0
    assert rig.store(keys) == 4
    assert rig.load(keys) == (4, 0)


def test_a_store_cancelled_after_its_commit_stays(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    keys = rig.keys(1, 4)
    transfer = rig.begin_store(keys)
    assert transfer.wait(PATIENCE_S)
    manager.cancel(transfer)
    assert (transfer.blocks, transfer.error, transfer.cancelled) == (4, None, False)
    assert rig.load(keys) == (4, 0)


def test_a_store_whose_blocks_are_held_lets_them_go_when_it_is_cancelled(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    keys = rig.keys(1, 4)
    rig.store(keys[:2])
    rig.device.free.clear()
    transfer = rig.begin_store(keys)
    until(lambda: rig.device.gathers == 2)
    manager.cancel(transfer)
    rig.device.free.set()
    assert transfer.wait(PATIENCE_S)
    assert rig.found(keys) == (2, 2)
    rig.evict_host(HOST)
    assert rig.found(keys) == (2, 0), "nothing holds them in host memory any more"


def test_a_load_cancelled_before_it_began_copies_nothing_and_one_under_way_ends(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    keys = rig.keys(1, 4)
    rig.store(keys)
    fetch = rig.fetch(keys)
    assert fetch.wait(PATIENCE_S)
    with manager._lock:
        manager._scheduler.call(manager.stats)  # which waits for the lock, and the load behind it
        early = rig.begin_load(fetch)
        manager.cancel(early)
    assert early.wait(PATIENCE_S)
    assert (early.blocks, early.error, rig.device.scatters) == (0, "cancelled", 0)
    rig.device.free.clear()
    late = rig.begin_load(fetch)
    until(lambda: rig.device.scatters == 1)
    manager.cancel(late)
    rig.device.free.set()
    assert late.wait(PATIENCE_S)
    assert (late.blocks, late.error) == (4, None)
    assert rig.wrong(keys, 4) == 0
    fetch.release()


# ---------------------------------------------------------------- prefetch


def test_a_prefetch_fills_host_memory_and_pins_nothing(manager: KVCacheManager) -> None:
    rig, gate, (keys,) = sunk(manager, (1, 8))
    gate.open("read")
    prefetch = manager.prefetch(rig.namespace, keys)
    assert prefetch.wait(PATIENCE_S)
    assert prefetch.ready == 8
    assert settled(manager)["pinned_bytes"] == 0
    assert rig.found(keys) == (8, 8)
    assert manager.stats()["tiers"]["gate"]["hit_blocks"] == 0, "nobody has used them yet"
    assert rig.load(keys) == (8, 0)
    assert manager.stats()["tiers"]["cpu"]["hit_blocks"] == 8
    rig.evict_host(HOST)
    assert rig.found(keys) == (8, 0)
    with pytest.raises(StateError):
        manager.load(prefetch, np.arange(8, dtype=np.int64))


def test_fetches_pass_prefetches_and_promote_those_that_they_want(manager: KVCacheManager) -> None:
    rig, gate, (blocker, idle, wanted, urgent) = sunk(manager, (1, 2), (2, 3), (3, 3), (4, 3))
    first = rig.fetch(blocker)
    until(lambda: gate.count("read") == 1)
    for keys in (idle, wanted):
        manager.prefetch(rig.namespace, keys)
    fetches = [rig.fetch(urgent), rig.fetch(wanted)]
    settled(manager)
    gate.open("read")
    for fetch in fetches:
        assert fetch.wait(PATIENCE_S)
        assert fetch.ready == 3
        fetch.release()
    assert manager.drain(PATIENCE_S)
    assert gate.blocks("read") == own(blocker) + own(urgent) + own(wanted) + own(idle)
    first.release()


def test_a_prefetch_of_a_model_with_more_groups_waits_beside_a_fetch(manager: KVCacheManager) -> None:
    """Regression: the fetch looked for groups that its model does not have, and the prefetch was lost."""
    gate = GATES["gate"]
    two = Rig(manager, (Group((3000,)), Group((3000,), window=1)), model="two")
    one = Rig(manager)
    prefix, keys = two.keys(1, 3), one.keys(1, 4)
    two.store(prefix)
    one.store(keys)
    one.evict_host(HOST)
    gate.shut("read")
    blocker = manager.prefetch(two.namespace, prefix[:1])
    until(lambda: gate.count("read") == 1)
    prefetch = manager.prefetch(two.namespace, prefix)
    fetch = one.fetch(keys)
    settled(manager)
    gate.open("read")
    for waiting in (blocker, fetch, prefetch):
        assert waiting.wait(PATIENCE_S)
    assert (fetch.ready, prefetch.ready) == (4, 3)
    fetch.release()


def test_a_cancelled_prefetch_is_not_read_unless_a_fetch_wants_it(manager: KVCacheManager) -> None:
    rig, gate, (blocker, idle, wanted) = sunk(manager, (1, 2), (2, 3), (3, 3))
    first = rig.fetch(blocker)
    until(lambda: gate.count("read") == 1)
    prefetches = [manager.prefetch(rig.namespace, keys) for keys in (idle, wanted)]
    fetch = rig.fetch(wanted)
    for prefetch in prefetches:
        manager.cancel(prefetch)
        assert prefetch.wait(PATIENCE_S)
    gate.open("read")
    assert fetch.wait(PATIENCE_S)
    assert fetch.ready == 3
    assert manager.drain(PATIENCE_S)
    assert gate.blocks("read") == own(blocker) + own(wanted)
    for one in (fetch, first):
        one.release()


# ---------------------------------------------------------------- close with work open


def test_close_answers_whoever_waits_and_later_calls_do_no_harm(gates: None) -> None:
    manager = KVCacheManager.open(gate_stack(HOST, gate_tier()))
    wait_ready(manager)
    rig, gate, (keys,) = sunk(manager, (1, 4))
    fetch = rig.fetch(keys)
    until(lambda: gate.count("read") == 1)
    rig.device.free.clear()
    stores = [rig.begin_store(rig.keys(seed, 1)) for seed in range(30, 34)]
    until(lambda: rig.device.gathers == 2 + HOST + 1)
    manager.close(deadline_s=0.2)
    for waiting in (fetch, *stores):
        assert waiting.wait(PATIENCE_S)
    assert {store.error for store in stores} == {"the manager was closed"}
    fetch.release()
    manager.cancel(fetch)
    manager.cancel(stores[0])
    rig.device.free.set()
    gate.open("read")


def test_close_does_not_wait_for_a_device_that_hangs(gates: None) -> None:
    """Regression: it waited for the copy threads, whatever its deadline was."""
    manager = KVCacheManager.open(gate_stack(HOST))
    rig = Rig(manager)
    rig.device.free.clear()
    transfer = rig.begin_store(rig.keys(1, 2))
    until(lambda: rig.device.gathers == 1)
    closing = threading.Thread(target=manager.close, args=(0.2,))
    closing.start()
    closing.join(PATIENCE_S / 2)
    hung = closing.is_alive()
    rig.device.free.set()
    closing.join()
    assert not hung
    assert transfer.wait(PATIENCE_S)
    assert transfer.error == "the manager was closed"
