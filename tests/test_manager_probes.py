"""Probes: what another node has stored is found, nobody waits for it, and a tier is asked no more than it must."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gates import GATES, PATIENCE_S, Gate, until
from rig import PLAIN, Group, Keys, Rig, gate_stack, nothing_left, own, settled, wait_ready

from flexkv_core.manager import KVCacheManager
from flexkv_core.probing import MOST_PROBES

pytestmark = pytest.mark.usefixtures("gates")

FOR_EVER = 3600.0


def shared(**keys: Any) -> dict[str, Any]:
    """A tier of the medium that all managers of a test share."""
    tier = {"backend": "sharedgate", "name": "shared", "gate": "shared", "isolation": "none", "probe_ttl_s": FOR_EVER}
    return {**tier, "write_queue": "1GiB", "concurrency": 2, **keys}


@pytest.fixture
def gate() -> Iterator[Gate]:
    GATES["shared"] = Gate()
    yield GATES["shared"]
    GATES["shared"].open("probe")


@pytest.fixture
def opened(gate: Gate, tmp_path: Path) -> Iterator[Any]:
    """Makes nodes: a manager each, over one medium."""
    managers = []

    def node(groups: Any = PLAIN, blocks: int = 64, **keys: Any) -> Rig:
        state = str(tmp_path / f"state-{len(managers)}")
        manager = KVCacheManager.open(gate_stack(blocks, shared(**keys), state_directory=state))
        managers.append(manager)
        wait_ready(manager)
        return Rig(manager, groups)

    yield node
    for name in ("probe", "read"):
        gate.open(name)
    for manager in managers:
        manager.close()


def asked(rig: Rig, keys: Keys) -> int:
    """Look up until nothing is pending."""
    until(lambda: not rig.manager.lookup(rig.namespace, keys).pending)
    return rig.manager.lookup(rig.namespace, keys).blocks


def figures(rig: Rig) -> dict[str, Any]:
    tier: dict[str, Any] = settled(rig.manager)["tiers"]["shared"]
    return tier


def test_what_one_node_stores_another_finds(gate: Gate, opened: Any) -> None:
    a, b = opened(), opened()
    keys = a.keys(1, 6)
    a.store(keys[:4])
    first = b.manager.lookup(b.namespace, keys)
    assert (first.blocks, first.pending) == (0, True)
    assert asked(b, keys) == 4
    assert b.load(keys) == (4, 0)
    assert gate.blocks("probe") == [*own(keys)[:4], *own(keys)[4:]]
    assert (figures(b)["probes"], figures(b)["probed_blocks"]) == (1, 4)
    assert not b.manager.lookup(b.namespace, keys[:4]).pending
    nothing_left(b.manager)


@pytest.mark.parametrize("groups", [(Group((3000,)), Group((900,), window=2), Group((700,), state=True))])
def test_windows_and_states_are_found_too(groups: Any, gate: Gate, opened: Any) -> None:
    a, b = opened(groups), opened(groups)
    keys = a.keys(1, 8)
    a.store(keys)
    for at in (7, 6):
        del gate.medium[(keys[at].tobytes(), 2)]
    assert asked(b, keys) == 6
    assert b.load(keys) == (6, 0)
    assert figures(b)["probes"] <= 4


def test_a_path_longer_than_a_call_takes_several(gate: Gate, opened: Any) -> None:
    a, b = opened(), opened(max_batch_blocks=4)
    keys = a.keys(1, 14)
    a.store(keys)
    assert asked(b, keys) == 14
    assert [len(names) for operation, names in gate.calls if operation == "probe"] == [4, 4, 4, 2]


def test_lookups_of_one_path_are_one_probe_and_never_wait(gate: Gate, opened: Any) -> None:
    b = opened()
    keys = b.keys(1, 4)
    gate.shut("probe")
    for _ in range(50):
        found = b.manager.lookup(b.namespace, keys)
        assert (found.blocks, found.pending) == (0, True)
    until(lambda: gate.count("probe"))
    assert not b.manager.lookup(b.namespace, keys[:0]).pending
    gate.open("probe")
    assert asked(b, keys) == 0
    assert gate.count("probe") == 1


def test_what_was_not_there_is_not_asked_for_again_for_a_while(gate: Gate, opened: Any) -> None:
    b = opened()
    keys = b.keys(1, 4)
    assert asked(b, keys) == 0
    for length in (4, 3, 1):
        assert asked(b, keys[:length]) == 0
    assert gate.count("probe") == 1
    eager = opened(probe_ttl_s=0)
    assert eager.manager.lookup(eager.namespace, keys).pending
    until(lambda: gate.count("probe") == 2)
    until(lambda: eager.manager.lookup(eager.namespace, keys).pending and gate.count("probe") > 2)


def test_our_own_stores_are_believed_at_once(gate: Gate, opened: Any) -> None:
    b = opened(blocks=4)
    keys = b.keys(1, 3)
    assert asked(b, keys) == 0
    b.store(keys)
    b.evict_host(4)
    found = b.manager.lookup(b.namespace, keys)
    assert (found.blocks, found.host_blocks, found.pending) == (3, 0, False)


def test_reads_pass_a_probe_that_hangs(gate: Gate, opened: Any) -> None:
    b = opened(blocks=4, concurrency=2)
    keys, other = b.keys(1, 3), b.keys(2, 3)
    b.store(keys)
    b.evict_host(4)
    gate.shut("probe")
    assert b.manager.lookup(b.namespace, other).pending
    until(lambda: gate.count("probe"))
    assert b.manager.lookup(b.namespace, b.keys(3, 3)).pending
    assert b.load(keys) == (3, 0)
    assert b.manager.drain(PATIENCE_S)
    assert gate.count("probe") == 1, "at most half of the places are for probes"


def test_a_fetch_asks_for_those_that_come_next_and_does_not_wait(gate: Gate, opened: Any) -> None:
    a, b = opened(), opened()
    keys = a.keys(1, 4)
    a.store(keys)
    gate.shut("probe")
    fetch = b.fetch(keys)
    assert fetch.wait(PATIENCE_S)
    assert fetch.ready == 0
    fetch.release()
    gate.open("probe")
    assert asked(b, keys) == 4
    assert b.load(keys) == (4, 0)


def test_a_probe_that_lies_costs_a_read_and_is_not_believed_again(gate: Gate, opened: Any) -> None:
    b = opened()
    keys = b.keys(1, 4)
    gate.lies = True
    assert asked(b, keys) == 4
    assert b.load(keys) == (0, 0)
    assert figures(b)["missing_blocks"] == 4
    for _ in range(5):
        found = b.manager.lookup(b.namespace, keys)
        assert (found.blocks, found.pending) == (0, False)
    assert (gate.count("probe"), gate.count("read")) == (1, 1)
    nothing_left(b.manager)


def test_probes_that_fail_open_the_breaker(gate: Gate, opened: Any) -> None:
    b = opened(breaker={"failures": 3, "backoff_s": FOR_EVER, "backoff_max_s": FOR_EVER})
    gate.failing.add("probe")
    for seed in range(3):
        assert asked(b, b.keys(seed, 2)) == 0
        assert asked(b, b.keys(seed, 2)) == 0
    assert gate.count("probe") == 3
    assert figures(b)["breaker"]["read"] == "open"
    assert not b.manager.lookup(b.namespace, b.keys(9, 2)).pending
    assert figures(b)["probes"] == 0


def test_the_number_of_probes_is_bounded(gate: Gate, opened: Any) -> None:
    b = opened()
    gate.shut("probe")
    pending = [b.manager.lookup(b.namespace, b.keys(seed, 2)).pending for seed in range(MOST_PROBES + 5)]
    assert pending == [True] * MOST_PROBES + [False] * 5
    assert figures(b)["dropped_probes"] == 5
    gate.open("probe")
    until(lambda: not b.manager._scheduler.probing._asked[1].under_way)
    assert gate.count("probe") == MOST_PROBES
    assert asked(b, b.keys(MOST_PROBES, 2)) == 0
    assert gate.count("probe") == MOST_PROBES + 1


def test_an_answer_that_a_reset_has_overtaken_goes_nowhere(gate: Gate, opened: Any) -> None:
    a, b = opened(), opened()
    keys = a.keys(1, 4)
    a.store(keys)
    gate.shut("probe")
    assert b.manager.lookup(b.namespace, keys).pending
    until(lambda: gate.count("probe"))
    fresh = b.manager.reset(b.namespace)
    gate.open("probe")
    until(lambda: not b.manager._scheduler.probing._asked[1].under_way)
    assert len(b.manager._planner.tiers[1].presence or ()) == 0
    assert figures(b)["probed_blocks"] == 0
    assert not b.manager.lookup(fresh, keys[:0]).pending


def test_close_with_a_probe_under_way(gate: Gate) -> None:
    manager = KVCacheManager.open(gate_stack(8, shared()))
    wait_ready(manager)
    b = Rig(manager)
    gate.shut("probe")
    for seed in range(3):
        assert manager.lookup(b.namespace, b.keys(seed, 2)).pending
    until(lambda: gate.count("probe"))
    manager.close(deadline_s=0.5)
    gate.open("probe")


def test_a_tier_that_is_ours_and_was_listed_is_never_asked(tmp_path: Path) -> None:
    tier = {"backend": "directory", "root": str(tmp_path), "capacity": "1MiB", "write_queue": "1GiB"}
    with KVCacheManager.open(gate_stack(8, tier)) as manager:
        wait_ready(manager)
        rig = Rig(manager)
        keys = rig.keys(1, 4)
        until(lambda: manager._scheduler.queues()[1].listed)
        assert not manager.lookup(rig.namespace, keys).pending
        assert settled(manager)["tiers"]["directory"]["probes"] == 0


def test_a_tier_that_has_not_been_listed_is_asked_through_its_process(tmp_path: Path) -> None:
    """The `directory` backend in a process, as if its listing had not ended."""
    tier = {"backend": "directory", "root": str(tmp_path), "capacity": "1MiB", "write_queue": "1GiB"}
    with KVCacheManager.open(gate_stack(8, tier)) as manager:
        wait_ready(manager)
        rig = Rig(manager)
        keys = rig.keys(1, 4)
        rig.store(keys[:3])
        queue = manager._scheduler.queues()[1]
        until(lambda: queue.listed)
        rig.evict_host(8)
        with manager._lock:
            queue.listed = False
            presence = manager._planner.tiers[1].presence
            assert presence is not None
            presence.discard(keys, np.zeros(4, np.uint8))
        assert asked(rig, keys) == 3
        assert rig.load(keys) == (3, 0)
