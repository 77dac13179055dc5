"""What `stats()` counts: hits and misses by tier, room, and the lines before a tier."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gates import GATES, PATIENCE_S, until
from rig import PLAIN_SLOT, Group, Rig, gate_stack, gate_tier, nothing_left, settled, wait_ready

from flexkv_core.manager import KVCacheManager

pytestmark = pytest.mark.usefixtures("gates")
HOST = 16


@pytest.fixture
def manager(gates: None) -> Iterator[KVCacheManager]:
    """Sixteen blocks of host memory over a tier that takes one call of two blocks at a time."""
    with KVCacheManager.open(gate_stack(HOST, gate_tier(concurrency=1, max_batch_blocks=2))) as manager:
        wait_ready(manager)
        yield manager
        nothing_left(manager)


def counts(manager: KVCacheManager) -> dict[str, tuple[int, int]]:
    """(hits, misses) by tier; for all of them, (asked for, not got)."""
    stats = manager.stats()
    tiers = {name: (tier["hit_blocks"], tier["miss_blocks"]) for name, tier in stats["tiers"].items()}
    return {**tiers, "all": (stats["asked_blocks"], stats["miss_blocks"])}


def test_a_block_is_a_hit_of_one_tier_and_a_miss_of_the_faster_ones(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    keys = rig.keys(1, 10)
    assert rig.load(keys) == (0, 0)
    assert counts(manager) == {"cpu": (0, 10), "gate": (0, 10), "all": (10, 10)}
    rig.store(keys[:8])
    rig.evict_host(HOST)
    assert rig.load(keys) == (8, 0)
    assert counts(manager) == {"cpu": (0, 20), "gate": (8, 12), "all": (20, 12)}
    assert rig.load(keys) == (8, 0)
    assert counts(manager) == {"cpu": (8, 22), "gate": (8, 14), "all": (30, 14)}


def test_a_prefetch_is_neither(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    assert manager.prefetch(rig.namespace, rig.keys(1, 4)).wait(PATIENCE_S)
    assert counts(manager) == {"cpu": (0, 0), "gate": (0, 0), "all": (0, 0)}


def test_what_the_deadline_cuts_off_is_a_miss(manager: KVCacheManager) -> None:
    rig, gate = Rig(manager), GATES["gate"]
    keys = rig.keys(1, 8)
    rig.store(keys)
    rig.evict_host(HOST)
    gate.shut("read")
    fetch = rig.fetch(keys, deadline_s=0.05)
    assert fetch.wait(PATIENCE_S)
    assert fetch.ready == 0
    fetch.release()
    gate.open("read")
    assert counts(manager) == {"cpu": (0, 8), "gate": (0, 8), "all": (8, 8)}


def test_what_the_budget_of_pins_cuts_off_is_a_miss(gates: None) -> None:
    stack = {**gate_stack(HOST, gate_tier()), "pin_budget": 0.25}
    with KVCacheManager.open(stack) as manager:
        wait_ready(manager)
        rig = Rig(manager)
        keys = rig.keys(1, 8)
        rig.store(keys)
        ready, wrong = rig.load(keys)
        assert 0 < ready < 8
        assert not wrong
        assert counts(manager) == {"cpu": (ready, 8 - ready), "gate": (0, 8 - ready), "all": (8, 8 - ready)}
        nothing_left(manager)


def test_what_no_group_needs_is_neither(manager: KVCacheManager) -> None:
    rig = Rig(manager, (Group((3000,), state=True),))
    keys = rig.keys(1, 4)
    rig.store(keys)
    assert rig.load(keys) == (4, 0)
    assert counts(manager) == {"cpu": (1, 0), "gate": (0, 0), "all": (4, 0)}, "only the last block's state was wanted"


def test_room_is_what_the_capacity_leaves(manager: KVCacheManager) -> None:
    rig = Rig(manager)
    assert manager.stats()["tiers"]["cpu"]["free_blocks"] == {}, "no slot class has extents"
    for blocks, seed in ((3, 1), (5, 2)):
        rig.store(rig.keys(seed, blocks))
    cpu, gate = manager.stats()["tiers"]["cpu"], manager.stats()["tiers"]["gate"]
    assert (cpu["used_blocks"], cpu["used_bytes"]) == (8, 8 * PLAIN_SLOT)
    assert cpu["free_blocks"] == {PLAIN_SLOT: HOST - 8}
    assert (gate["used_blocks"], gate["free_blocks"]) == (8, {})


def test_lines_before_a_tier_are_counted_in_blocks(manager: KVCacheManager) -> None:
    rig, gate = Rig(manager), GATES["gate"]
    first, second, third = rig.keys(1, 5), rig.keys(2, 4), rig.keys(3, 3)
    for keys in (first, second):
        rig.store(keys)
    rig.evict_host(HOST)
    gate.shut("read")
    fetch = rig.fetch(first)
    until(lambda: gate.count("read") == 1)
    prefetch = manager.prefetch(rig.namespace, second)
    assert rig.begin_store(third).wait(PATIENCE_S)
    assert settled(manager)["tiers"]["gate"]["queued_blocks"] == {"read": 3, "prefetch": 4, "write": 3}
    assert manager.stats()["tiers"]["cpu"]["queued_blocks"] == {}
    gate.open("read")
    assert fetch.wait(PATIENCE_S)
    assert prefetch.wait(PATIENCE_S)
    assert manager.drain(PATIENCE_S)
    fetch.release()
    assert manager.stats()["tiers"]["gate"]["queued_blocks"] == {"read": 0, "prefetch": 0, "write": 0}
