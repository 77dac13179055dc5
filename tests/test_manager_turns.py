"""Owners who share a manager take turns: one that asks for much delays another by a call, and leaves it room."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gates import GATES, PATIENCE_S, until
from rig import PLAIN_SLOT, Rig, gate_stack, gate_tier, nothing_left, own, settled, wait_ready

from flexkv_core.manager import KVCacheManager
from flexkv_core.plans import Move
from flexkv_core.turns import Turns

pytestmark = pytest.mark.usefixtures("gates")
GREEDY, MODEST = 1, 2


@pytest.fixture
def manager(gates: None) -> Iterator[KVCacheManager]:
    """A tier that takes one call of two blocks at a time, and twelve blocks of writes."""
    tier = gate_tier(concurrency=1, max_batch_blocks=2, write_queue=f"{12 * PLAIN_SLOT}B")
    with KVCacheManager.open(gate_stack(64, tier)) as manager:
        wait_ready(manager)
        yield manager
        GATES["gate"].open("read")
        GATES["gate"].open("write")
        nothing_left(manager)


@pytest.mark.parametrize("keep", [True, False], ids=["fetch", "prefetch"])
def test_reads_of_owners_take_turns(manager: KVCacheManager, keep: bool) -> None:
    rig, gate = Rig(manager), GATES["gate"]
    begin = manager.fetch if keep else manager.prefetch
    much, little = rig.keys(1, 8), rig.keys(2, 2)
    rig.store(much)
    rig.store(little)
    rig.evict_host(64)
    gate.shut("read")
    first = begin(rig.namespace, much, owner=GREEDY)
    until(lambda: gate.count("read") == 1)
    second = begin(rig.namespace, little, owner=MODEST)
    settled(manager)
    gate.open("read")
    assert second.wait(PATIENCE_S)
    assert first.wait(PATIENCE_S)
    assert (first.ready, second.ready) == (8, 2)
    order = [key in own(little) for key in gate.blocks("read")]
    assert order.index(True) <= 4, "after the call under way and at most one more"
    first.release()
    second.release()


def test_writes_of_owners_take_turns_and_share_the_queue(manager: KVCacheManager) -> None:
    rig, gate = Rig(manager), GATES["gate"]
    gate.shut("write")
    much, more, little = rig.keys(1, 6), rig.keys(3, 8), rig.keys(2, 2)

    def store(keys: np.ndarray, owner: int) -> None:
        rig.fill(keys)
        transfer = manager.store(rig.namespace, keys, np.arange(len(keys), dtype=np.int64), owner=owner)
        assert transfer.wait(PATIENCE_S)
        settled(manager)

    store(much, GREEDY)
    until(lambda: gate.count("write") == 1)
    store(little, MODEST)
    before = manager.stats()["tiers"]["gate"]["dropped_blocks"]
    store(more, GREEDY)
    assert manager.stats()["tiers"]["gate"]["dropped_blocks"] - before == 8, "half of the queue is the other's"
    gate.open("write")
    assert manager.drain(PATIENCE_S)
    order = [key in own(little) for key in gate.blocks("write")]
    assert (sum(order), len(order)) == (2, 8)
    assert order.index(True) <= 4


def test_one_owner_alone_may_have_the_whole_queue(manager: KVCacheManager) -> None:
    rig, gate = Rig(manager), GATES["gate"]
    gate.shut("write")
    rig.begin_store(rig.keys(1, 12)).wait(PATIENCE_S)
    settled(manager)
    assert manager.stats()["tiers"]["gate"]["dropped_blocks"] == 0
    gate.open("write")


def move(owner: int, blocks: int = 1) -> Move:
    count = np.ones(blocks, np.int64)
    keys, groups = np.zeros((blocks, 32), np.uint8), np.zeros(blocks, np.uint8)
    return Move(b"", keys, 1, np.arange(blocks), groups, count, None, count, count, 1, owner=owner)


def test_turns_go_round_and_order_within_an_owner_stays() -> None:
    turns = Turns()
    for owner, blocks in ((1, 5), (1, 1), (2, 1), (3, 2), (2, 2)):
        turns.append(move(owner, blocks))
    taken = []
    while turns:
        assert turns.blocks == sum(map(len, turns))
        taken.append((turns.head().owner, len(turns.take(2))))
    assert taken == [(1, 2), (2, 1), (3, 2), (1, 2), (2, 2), (1, 1), (1, 1)]
    assert turns.blocks == 0
    with pytest.raises(IndexError):
        turns.take(1)


def test_turns_count_blocks_whatever_becomes_of_them() -> None:
    turns = Turns()
    for owner, blocks in ((1, 5), (2, 1), (1, 3)):
        turns.append(move(owner, blocks))
    assert turns.blocks == 9
    turns.sift(lambda each: None if len(each) == 5 else each.part(slice(0, 1)))
    assert turns.blocks == len(turns) == 2
    turns.clear()
    assert turns.blocks == 0
