"""What waits in a tier's lines: descendants of dropped writes are never written, awaited reads are never withdrawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gates import GATES, PATIENCE_S, Gate, until
from rig import PLAIN_SLOT, Keys, Rig, gate_stack, gate_tier, nothing_left, own, settled, wait_ready

from flexkv_core.manager import KVCacheManager

pytestmark = pytest.mark.usefixtures("gates")


def opened(host_blocks: int, **tier: Any) -> KVCacheManager:
    manager = KVCacheManager.open(gate_stack(host_blocks, gate_tier(**tier)))
    wait_ready(manager)
    return manager


def dropped(manager: KVCacheManager) -> int:
    found: int = settled(manager)["tiers"]["gate"]["dropped_blocks"]
    return found


def push_out(manager: KVCacheManager, rig: Rig, keys: Keys) -> None:
    """Out of host memory, without the help of the tier below."""
    with manager._lock:
        host = manager._books[0]
        assert manager._planner._ledger._evict(host, manager._planner.index.count(0), 0)
    assert rig.found(keys) == (len(keys), 0)


# ---------------------------------------------------------------- writes


def test_what_continues_a_write_that_the_tier_has_no_room_for_is_not_written() -> None:
    """Of six blocks the first batch of four does not fit; the rest would."""
    with opened(32, max_batch_blocks=4, capacity=3 * PLAIN_SLOT) as manager:
        rig, gate = Rig(manager), GATES["gate"]
        keys, other = rig.keys(1, 6), rig.keys(2, 2)
        gate.shut("write")
        for one in (keys, other):
            assert rig.begin_store(one).wait(PATIENCE_S)
        gate.open("write")
        assert manager.drain(PATIENCE_S)
        assert gate.blocks("write") == own(other)[::-1], "another path goes on"
        assert dropped(manager) == 6
        nothing_left(manager)


def test_what_continues_a_write_that_the_tier_has_room_for_in_part_is_not_written() -> None:
    """All but two slots are being read. Later the two could be taken from the first blocks of the same path."""
    tier = {"backend": "slotgate", "max_batch_blocks": 8, "concurrency": 3, "capacity": 16 * PLAIN_SLOT}
    with opened(64, **tier) as manager:
        rig, gate = Rig(manager), GATES["gate"]
        rig.store(read := rig.keys(1, 14))
        push_out(manager, rig, read)
        gate.calls.clear()
        gate.shut("read")
        fetch = rig.fetch(read)
        until(lambda: gate.count("read") == 2)
        keys = rig.keys(3, 24)
        assert rig.begin_store(keys).wait(PATIENCE_S)
        until(lambda: dropped(manager) == 22)
        gate.open("read")
        assert fetch.wait(PATIENCE_S)
        fetch.release()
        assert manager.drain(PATIENCE_S)
        assert gate.blocks("write") == own(keys[:2])[::-1]
        nothing_left(manager)


def test_what_continues_a_write_that_was_refused_at_its_turn_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The breaker opened while it waited, and has closed again."""
    with opened(32, max_batch_blocks=2) as manager:
        rig, gate = Rig(manager), GATES["gate"]
        first, keys = rig.keys(1, 2), rig.keys(2, 6)
        gate.shut("write")
        for one in (first, keys):
            assert rig.begin_store(one).wait(PATIENCE_S)
        until(lambda: gate.count("write") == 1)
        settled(manager)
        health = manager._scheduler.queues()[1].health
        answers = iter([False])
        takes = health.takes
        monkeypatch.setattr(health, "takes", lambda lane: next(answers, takes(lane)))
        gate.open("write")
        assert manager.drain(PATIENCE_S)
        assert set(gate.blocks("write")) == set(own(first))
        assert dropped(manager) == 6
        nothing_left(manager)


@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_what_continues_what_a_full_queue_dropped_is_not_written(room: int) -> None:
    """Stores of a growing prefix: each offers what the line has not taken; the medium never has a hole."""
    with opened(32, max_batch_blocks=1, write_queue=f"{room * PLAIN_SLOT}B") as manager:
        rig, gate = Rig(manager), GATES["gate"]
        keys = rig.keys(1, 12)
        gate.shut("write")
        for blocks in (2, 5, 8):
            assert rig.begin_store(keys[:blocks]).wait(PATIENCE_S)
        settled(manager)
        gate.open("write")
        assert manager.drain(PATIENCE_S)
        assert gate.blocks("write") == own(keys[:room])
        for blocks in range(1, 13):
            rig.begin_store(keys[:blocks])
            written = gate.blocks("write")
            assert written == own(keys[: len(written)]), "in order, without a hole"
        for _ in range(12):
            rig.store(keys)
        assert gate.blocks("write") == own(keys), "and heals"
        nothing_left(manager)


# ---------------------------------------------------------------- reads


def behind_a_blocker(manager: KVCacheManager, blocks: int) -> tuple[Rig, Gate, Any, Keys]:
    """A read is under way, and the tier takes one call at a time; what is fetched now waits in its line."""
    rig, gate = Rig(manager), GATES["gate"]
    blocker, keys = rig.keys(1, 2), rig.keys(2, blocks)
    for one in (blocker, keys):
        rig.store(one)
    push_out(manager, rig, keys)
    gate.calls.clear()
    gate.shut("read")
    first = rig.fetch(blocker)
    until(lambda: gate.count("read") == 1)
    return rig, gate, first, keys


def test_a_read_that_several_fetches_wait_for_stays_until_the_last_is_gone() -> None:
    with opened(32, max_batch_blocks=4) as manager:
        rig, gate, first, keys = behind_a_blocker(manager, 12)
        lengths = [12, 3, 9, 1, 2, 3, 1, 2, 3, 1, 2]  # whichever of the others is looked at last
        fetches = [rig.fetch(keys[:length]) for length in lengths]
        queue = manager._scheduler.queues()[1]

        def waiting() -> int:
            settled(manager)
            return sum(len(move) for move in queue.reads)

        assert waiting() == 12
        manager.cancel(fetches[0])
        assert waiting() == 9
        for fetch in fetches[3:7]:
            manager.cancel(fetch)
            assert waiting() == 9
        gate.open("read")
        for fetch, length in zip(fetches, lengths, strict=True):
            assert fetch.wait(PATIENCE_S)
            assert fetch.ready == (0 if fetch.why == "cancelled" else length)
        for fetch in (first, *fetches):
            assert fetch.wait(PATIENCE_S)
            fetch.release()
        assert gate.blocks("read")[2:] == own(keys[:9])
        nothing_left(manager)


def test_a_deadline_withdraws_only_what_nobody_else_waits_for() -> None:
    with opened(32, max_batch_blocks=4) as manager:
        rig, gate, first, keys = behind_a_blocker(manager, 8)
        patient, other = rig.fetch(keys[:6]), rig.fetch(keys[:2])
        hasty = rig.fetch(keys, deadline_s=0.0)
        assert hasty.wait(PATIENCE_S)
        assert hasty.ready == 0
        settled(manager)
        gate.open("read")
        for fetch, ready in ((first, 2), (patient, 6), (other, 2), (hasty, 0)):
            assert fetch.wait(PATIENCE_S)
            assert fetch.ready == ready
            fetch.release()
        assert gate.blocks("read")[2:] == own(keys[:6])
        nothing_left(manager)


def test_fetches_of_other_namespaces_decide_nothing() -> None:
    """Two models with the same tokens; a fetch of one ends while the other waits."""
    with opened(32, max_batch_blocks=4) as manager:
        rig, gate, first, keys = behind_a_blocker(manager, 4)
        gate.open("read")
        assert first.wait(PATIENCE_S)
        first.release()
        other = Rig(manager, model="other")
        theirs = other.keys(2, 4)
        other.store(theirs)
        push_out(manager, other, theirs)
        gate.calls.clear()
        gate.shut("read")
        blocker = other.fetch(other.keys(2, 4)[:1])
        until(lambda: gate.count("read") == 1)
        mine, also = rig.fetch(keys), other.fetch(theirs)
        manager.cancel(also)
        assert also.wait(PATIENCE_S)
        settled(manager)
        gate.open("read")
        assert mine.wait(PATIENCE_S)
        assert mine.ready == 4
        for fetch in (mine, blocker):
            fetch.release()
        assert np.isin(own(keys), gate.blocks("read")).all()
        nothing_left(manager)


def test_a_new_write_of_a_block_waits_until_its_corrupt_copy_is_deleted() -> None:
    """Regression: both were under way at a time, so that the deletion could take the new copy."""
    with opened(16, concurrency=4) as manager:
        rig, gate = Rig(manager), GATES["gate"]
        keys = rig.keys(1, 2)
        rig.store(keys)
        push_out(manager, rig, keys)
        for name, content in gate.medium.items():
            gate.medium[name] = bytes(len(content))
        gate.shut("delete")
        fetch = rig.fetch(keys)
        assert fetch.wait(PATIENCE_S)
        assert fetch.ready == 0
        fetch.release()
        until(lambda: gate.count("delete") == 1)
        written = gate.count("write")
        assert rig.begin_store(keys).wait(PATIENCE_S)
        settled(manager)
        assert gate.count("write") == written
        gate.open("delete")
        assert manager.drain(PATIENCE_S)
        assert gate.count("write") > written
        push_out(manager, rig, keys)
        assert rig.load(keys) == (2, 0)
        nothing_left(manager)
