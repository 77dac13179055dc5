"""Bounds: the budget and the time limit of pins, the bytes in flight, the write queue."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gates import GATES, PATIENCE_S, until
from rig import PLAIN_SLOT, Group, Rig, gate_stack, gate_tier, nothing_left, own, settled, wait_ready

from flexkv_core.manager import KVCacheManager

pytestmark = pytest.mark.usefixtures("gates")
HOST = 16


@pytest.fixture
def manager(gates: None) -> Iterator[KVCacheManager]:
    """Host memory for 16 blocks, of which 8 may be pinned, over a gate that takes 2 calls at a time."""
    with KVCacheManager.open(gate_stack(HOST, gate_tier(concurrency=2), pin_budget=0.5)) as manager:
        wait_ready(manager)
        yield manager
        GATES["gate"].open("read")
        nothing_left(manager)


# ---------------------------------------------------------------- the budget


def test_a_prefix_is_truncated_to_the_budget_and_the_rest_is_free_again(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    long, other = rig.keys(1, 12), rig.keys(2, 2)
    rig.store(long)
    rig.store(other)
    fetch, late = rig.fetch(long), rig.fetch(other)
    for one in (fetch, late):
        assert one.wait(PATIENCE_S)
    assert (fetch.ready, late.ready) == (8, 0)
    assert fetch.plan is not None
    assert fetch.plan.truncated
    stats = settled(manager)
    assert stats["pinned_bytes"] == 8 * PLAIN_SLOT
    assert stats["truncated_fetches"] == 2
    transfer = rig.begin_load(fetch)
    assert transfer.wait(PATIENCE_S)
    assert rig.wrong(long, 8) == 0
    late.release()
    fetch.release()
    assert settled(manager)["pinned_bytes"] == 0
    assert rig.load(other) == (2, 0)
    assert manager.stats()["truncated_fetches"] == 2
    assert rig.found(long) == (12, 12), "a lookup tells what is held, not what may be pinned"


def test_a_block_that_several_fetches_pin_counts_once(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    keys = rig.keys(1, 8)
    rig.store(keys)
    fetches = [rig.fetch(keys) for _ in range(4)]
    assert all(fetch.wait(PATIENCE_S) and fetch.ready == 8 for fetch in fetches)
    assert settled(manager)["pinned_bytes"] == 8 * PLAIN_SLOT
    for fetch in fetches[1:]:
        fetch.release()
    assert settled(manager)["pinned_bytes"] == 8 * PLAIN_SLOT
    fetches[0].release()
    assert settled(manager)["pinned_bytes"] == 0


def test_reads_under_way_count_so_that_fetches_together_keep_the_budget(manager: KVCacheManager) -> None:
    """Regression: fetches whose reads were under way had nothing pinned yet, and together they passed the budget."""
    rig, gate = Rig(manager), GATES["gate"]
    first, second = rig.keys(1, 6), rig.keys(2, 6)
    for keys in (first, second):
        rig.store(keys)
    rig.evict_host(HOST)
    gate.shut("read")
    one, two, same = rig.fetch(first), rig.fetch(second), rig.fetch(first)
    settled(manager)
    gate.open("read")
    for fetch in (one, two, same):
        assert fetch.wait(PATIENCE_S)
    assert (one.ready, two.ready, same.ready) == (6, 2, 6), "what is on its way already costs nothing"
    assert settled(manager)["pinned_bytes"] == 8 * PLAIN_SLOT
    for fetch in (one, two, same):
        fetch.release()


def test_reads_that_fail_or_are_cancelled_give_their_share_back(manager: KVCacheManager) -> None:
    rig, gate = Rig(manager), GATES["gate"]
    keys, other = rig.keys(1, 8), rig.keys(2, 8)
    for one in (keys, other):
        rig.store(one)
    rig.evict_host(HOST)
    gate.failing.add("read")
    for _ in range(3):
        fetch = rig.fetch(keys)
        assert fetch.wait(PATIENCE_S)
        assert fetch.ready == 0
        fetch.release()
    gate.failing.clear()
    gate.shut("read")
    for _ in range(3):
        fetch = rig.fetch(keys)
        manager.cancel(fetch)
        assert fetch.wait(PATIENCE_S)
    gate.open("read")
    assert manager.drain(PATIENCE_S)
    assert rig.load(other) == (8, 0)


def test_windows_and_states_are_truncated_where_a_prefix_can_go_on(manager: KVCacheManager) -> None:
    """Full 4 KiB + window of 2 + state: 8 KiB a block and group; 16 slots are pinnable, 8 of them free here."""
    rig = Rig(manager, (Group((3000,)), Group((3000,), window=2), Group((3000,), state=True)), model="groups")
    keys = rig.keys(1, 6)
    blocks = np.arange(6, dtype=np.int64)
    state = np.array([-1, -1, -1, 3, -1, 5], np.int64)  # the state exists at two boundaries only
    rig.fill(keys)
    transfer = manager.store(rig.namespace, keys, [blocks, blocks, state])
    assert transfer.wait(PATIENCE_S)
    assert transfer.error is None
    fetch = rig.fetch(keys)  # 6 + 2 + 1 slots are more than 8; the state before that is at the fourth block
    assert fetch.wait(PATIENCE_S)
    assert fetch.ready == 4
    assert settled(manager)["pinned_bytes"] == (4 + 2 + 1) * PLAIN_SLOT
    again = rig.fetch(keys)  # 4 and 1 of them are pinned; the rest needs 2 + 2 + 1 more than 1 slot
    assert again.wait(PATIENCE_S)
    assert again.ready == 4
    load = rig.begin_load(again)
    assert load.wait(PATIENCE_S)
    assert rig.wrong(keys, 4) == 0
    for one in (fetch, again):
        one.release()


# ---------------------------------------------------------------- the time limit


def test_a_fetch_that_is_never_released_loses_its_pins(gates: None) -> None:
    with KVCacheManager.open(gate_stack(HOST, pin_limit_s=0.05)) as manager:
        rig = Rig(manager)
        keys = rig.keys(1, 4)
        rig.store(keys)
        forgotten = rig.fetch(keys, deadline_s=0.01)
        released = rig.fetch(keys, deadline_s=0.01)
        assert released.wait(PATIENCE_S)
        released.release()
        until(lambda: forgotten.released)
        assert (forgotten.why, released.why) == ("expired", "released")
        transfer = rig.begin_load(forgotten)
        assert transfer.wait(PATIENCE_S)
        assert (transfer.blocks, transfer.error) == (0, "the fetch was expired")
        assert rig.device.scatters == 0
        stats = settled(manager)
        assert (stats["expired_fetches"], stats["pinned_bytes"], stats["pinned_fetches"]) == (1, 0, 0)
        forgotten.release()
        assert rig.store(rig.keys(2, HOST)) == HOST, "all of host memory can be had"
        nothing_left(manager)


def test_a_fetch_that_expires_while_it_is_loaded_is_loaded_whole(gates: None) -> None:
    with KVCacheManager.open(gate_stack(HOST, pin_limit_s=0.05)) as manager:
        rig = Rig(manager)
        keys = rig.keys(1, 4)
        rig.store(keys)
        fetch = rig.fetch(keys, deadline_s=0.01)
        assert fetch.wait(PATIENCE_S)
        rig.device.free.clear()
        transfer = rig.begin_load(fetch)
        until(lambda: rig.device.scatters == 1)
        until(lambda: fetch.released)
        assert settled(manager)["pinned_bytes"] == 4 * PLAIN_SLOT
        rig.device.free.set()
        assert transfer.wait(PATIENCE_S)
        assert (transfer.blocks, rig.wrong(keys, 4)) == (4, 0)
        until(lambda: settled(manager)["pinned_bytes"] == 0)
        nothing_left(manager)


# ---------------------------------------------------------------- bytes in flight


@pytest.mark.parametrize(("blocks", "most"), [(3, 3), (1, 1), (0.5, 1), (100, 14)])
def test_calls_under_way_move_no_more_than_in_flight(gates: None, blocks: float, most: int) -> None:
    tier = gate_tier(concurrency=8, max_batch_blocks=2, in_flight=f"{int(blocks * PLAIN_SLOT)}B")
    with KVCacheManager.open(gate_stack(32, tier)) as manager:
        rig, gate = Rig(manager), GATES["gate"]
        keys = [rig.keys(seed, 7) for seed in range(2)]
        for one in keys:
            rig.store(one)
        rig.evict_host(32)
        gate.most_bytes = 0
        gate.shut("read")
        fetches = [rig.fetch(one) for one in keys]
        settled(manager)
        until(lambda: len(gate.blocks("read")) >= min(most, 14))
        gate.open("read")
        for one, fetch in zip(keys, fetches, strict=True):
            assert fetch.wait(PATIENCE_S)
            assert fetch.ready == 7
            load = rig.begin_load(fetch)
            assert load.wait(PATIENCE_S)
            assert rig.wrong(one, 7) == 0
            fetch.release()
        assert gate.most_bytes == most * PLAIN_SLOT
        assert max(len(names) for _, names in gate.calls) <= 2
        nothing_left(manager)


# ---------------------------------------------------------------- the write queue


def test_a_full_write_queue_drops_the_tail_and_counts_it(gates: None) -> None:
    tier = gate_tier(write_queue=f"{4 * PLAIN_SLOT}B")
    with KVCacheManager.open(gate_stack(32, tier)) as manager:
        wait_ready(manager)
        rig, gate = Rig(manager), GATES["gate"]
        gate.shut("write")
        keys, more = rig.keys(1, 6), rig.keys(2, 3)
        for one in (keys, more):
            transfer = rig.begin_store(one)
            assert transfer.wait(PATIENCE_S), "the caller does not wait for the tier"
            assert transfer.error is None
        assert settled(manager)["tiers"]["gate"]["dropped_blocks"] == 2 + 3
        gate.open("write")
        assert manager.drain(PATIENCE_S)
        assert sorted(gate.blocks("write")) == sorted(own(keys[:4]))
        assert rig.store(keys) == 0
        assert sorted(gate.blocks("write")) == sorted(own(keys)), "a later store of the path heals it"
        nothing_left(manager)


def test_what_continues_a_dropped_block_is_dropped_in_all_groups(gates: None) -> None:
    tier = gate_tier(write_queue=f"{3 * 8192 + 5 * 8192 // 2}B")
    with KVCacheManager.open(gate_stack(64, tier)) as manager:
        wait_ready(manager)
        rig, gate = Rig(manager, (Group((20_000,)), Group((100,), state=True))), GATES["gate"]
        keys = rig.keys(1, 4)
        rig.fill(keys)
        blocks = np.arange(4, dtype=np.int64)
        transfer = manager.store(rig.namespace, keys, [blocks, np.array([-1, -1, -1, 3], np.int64)])
        assert transfer.wait(PATIENCE_S)
        assert transfer.error is None
        assert manager.drain(PATIENCE_S)
        assert gate.blocks("write") == own(keys[:1]), "one block of 24 KiB fits, and a state of 8 KiB would"
        assert manager.stats()["tiers"]["gate"]["dropped_blocks"] == 3 + 1
        nothing_left(manager)


def test_a_failed_write_takes_its_queued_descendants_with_it(gates: None) -> None:
    with KVCacheManager.open(gate_stack(32, gate_tier(max_batch_blocks=2))) as manager:
        wait_ready(manager)
        rig, gate = Rig(manager), GATES["gate"]
        gate.shut("write")
        keys, other = rig.keys(1, 6), rig.keys(2, 2)
        for one in (keys, other):
            assert rig.begin_store(one).wait(PATIENCE_S)
        until(lambda: gate.count("write") == 1)
        gate.failing_once.add("write")
        gate.open("write")
        until(lambda: settled(manager)["tiers"]["gate"]["failed_blocks"] == 2)
        assert manager.drain(PATIENCE_S)
        written = gate.blocks("write")
        assert not set(own(keys[2:])) & set(written)
        figures = manager.stats()["tiers"]["gate"]
        assert figures["dropped_blocks"] == 4
        nothing_left(manager)


def test_reads_pass_queued_writes(gates: None) -> None:
    with KVCacheManager.open(gate_stack(HOST, gate_tier(max_batch_blocks=2))) as manager:
        wait_ready(manager)
        rig, gate = Rig(manager), GATES["gate"]
        keys = rig.keys(1, 2)
        rig.store(keys)
        rig.evict_host(HOST)
        gate.calls.clear()
        gate.shut("write")
        for seed in (2, 3, 4):
            assert rig.begin_store(rig.keys(seed, 2)).wait(PATIENCE_S)
        until(lambda: gate.count("write") == 1)
        fetch = rig.fetch(keys)
        settled(manager)
        gate.open("write")
        assert fetch.wait(PATIENCE_S)
        assert fetch.ready == 2
        fetch.release()
        assert manager.drain(PATIENCE_S)
        assert [operation for operation, _ in gate.calls] == ["write", "read", "write", "write"]
        nothing_left(manager)


def test_stores_of_one_prefix_at_a_time_keep_one_copy_and_write_it_once(gates: None) -> None:
    with KVCacheManager.open(gate_stack(HOST, gate_tier(max_batch_blocks=2))) as manager:
        wait_ready(manager)
        rig, gate = Rig(manager), GATES["gate"]
        keys = rig.keys(1, 4)
        gate.shut("write")
        rig.device.free.clear()
        transfers = [rig.begin_store(keys) for _ in range(2)]
        until(lambda: rig.device.gathers == 2)
        rig.device.free.set()
        for transfer in transfers:
            assert transfer.wait(PATIENCE_S)
            assert transfer.error is None
        assert rig.begin_store(keys).wait(PATIENCE_S)
        assert settled(manager)["tiers"]["cpu"]["used_bytes"] == 4 * PLAIN_SLOT
        gate.open("write")
        assert manager.drain(PATIENCE_S)
        assert sorted(gate.blocks("write")) == sorted(own(keys))
        assert rig.load(keys) == (4, 0)
        nothing_left(manager)


def test_nothing_behind_a_hole_is_written_down(gates: None) -> None:
    with KVCacheManager.open(gate_stack(HOST, gate_tier())) as manager:
        wait_ready(manager)
        rig, gate = Rig(manager), GATES["gate"]
        keys = rig.keys(1, 5)
        rig.fill(keys)
        transfer = manager.store(rig.namespace, keys, np.array([0, 1, -1, 3, 4], np.int64))
        assert transfer.wait(PATIENCE_S)
        assert manager.drain(PATIENCE_S)
        assert sorted(gate.blocks("write")) == sorted(own(keys[:2]))
        assert rig.store(keys) == 1
        assert sorted(gate.blocks("write")) == sorted(own(keys))
        nothing_left(manager)
