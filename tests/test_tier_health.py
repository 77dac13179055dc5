"""A tier that fails is left alone, promises nothing, and comes back by itself. Real managers and tier processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import SLOT_BYTES, Engine, prompt, stack
from leaks import nothing_held
from test_planner import GROUPS, ROOTS, chain, make_planner

from flexkv_core.breaker import BreakerConfig
from flexkv_core.index.reference import ReferenceIndex
from flexkv_core.layout import KVGroup
from flexkv_core.manager import KVCacheManager
from flexkv_core.planner import Planner
from flexkv_core.plans import Outcome
from flexkv_core.pool import SlotPool
from flexkv_core.tier_book import TierBook
from flexkv_core.tier_health import TierHealth

pytestmark = pytest.mark.usefixtures("leak_check")
FOR_EVER = {"failures": 2, "backoff_s": 3600.0, "backoff_max_s": 3600.0}
SHORTLY = {"failures": 2, "backoff_s": 0.05, "backoff_max_s": 0.2}
GOOD, MISSING, FAILED, CORRUPT = (int(o) for o in (Outcome.GOOD, Outcome.MISSING, Outcome.FAILED, Outcome.CORRUPT))


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def figures(manager: KVCacheManager, tier: str = "directory") -> dict[str, Any]:
    found: dict[str, Any] = manager.stats()["tiers"][tier]
    return found


def sunk(manager: KVCacheManager, prompts: int = 6) -> tuple[Engine, list[Any]]:
    """Store prompts of 8 blocks where host memory has room for two; the tiers are up before."""
    tiers = manager.stats()["tiers"]
    until(lambda: all(figures(manager, name)["state"] == "ready" for name in tiers))
    engine = Engine(manager)
    keys = [engine.keys(prompt(seed, 8)) for seed in range(prompts)]
    for one in keys:
        engine.store(one)
        assert manager.drain(10)
    return engine, keys


# ---------------------------------------------------------------- what the judge says


class Link:
    state = "ready"
    last_error: str | None = None


class Handle:
    def cancel(self) -> None:
        pass


def judge(**config: Any) -> tuple[TierHealth, Link, TierBook, list[float]]:
    book, link, waits = TierBook("t", "t", 1, "key", None), Link(), []

    def later(delay_s: float, act: Callable[[], None]) -> Handle:
        waits.append(delay_s)
        return Handle()

    options = BreakerConfig(**{"failures": 1, "backoff_s": 10.0, **config})
    return TierHealth(book, link, options, 5.0, later, threading.RLock()), link, book, waits


@pytest.mark.parametrize(
    ("outcome", "took_s", "health"),
    [
        ([GOOD, GOOD], 0.1, "ok"),
        ([MISSING, MISSING], 0.1, "ok"),
        ([FAILED, GOOD, GOOD], 0.1, "ok"),
        ([FAILED, FAILED], 0.1, "away"),
        ([FAILED, CORRUPT, GOOD, GOOD], 0.1, "away"),
        ([CORRUPT, CORRUPT, GOOD], 0.1, "away"),
        ([GOOD, GOOD], 5.1, "away"),
        ([], 0.1, "ok"),
    ],
)
def test_what_makes_a_call_a_bad_one(outcome: list[int], took_s: float, health: str) -> None:
    made, _, book, waits = judge()
    call = made.begin("read", len(outcome))
    assert call is not None
    call.took_s = took_s
    made.end(call, np.array(outcome, np.uint8))
    assert (made.health, book.available) == (health, health == "ok")
    assert (len(waits) == 1 and 5 <= waits[0] <= 10) == (health == "away"), "it comes again when the wait is over"
    refused = made.begin("read", 7)
    assert (refused is None) == (health == "away")
    assert made.rejected_blocks == (7 if health == "away" else 0)


def test_writes_that_fail_leave_the_reads_alone_but_not_the_other_way_round() -> None:
    made, _, book, _ = judge()
    call = made.begin("write", 1)
    assert call is not None
    made.end(call, np.array([FAILED], np.uint8))
    assert (made.health, book.available, made.takes("read"), made.takes("write")) == ("degraded", True, True, False)
    made, _, book, _ = judge()
    call = made.begin("read", 1)
    assert call is not None
    made.end(call, np.array([FAILED], np.uint8))
    assert (made.health, book.available, made.takes("read"), made.takes("write")) == ("away", False, False, False)
    assert made.figures()["breaker"]["write"] == "closed"


def test_a_death_counts_once_however_many_calls_it_takes_along() -> None:
    made, link, book, _ = judge(failures=2)
    calls = [made.begin("read", 1) for _ in range(4)]
    link.state, link.last_error = "backoff", "its process ended with SIGKILL"
    for call in calls:
        assert call is not None
        made.end(call, np.array([FAILED], np.uint8))
    made.link_changed()
    assert (made.health, book.available, made.figures()["breaker"]["opened"]) == ("away", False, 0)
    assert made.begin("read", 1) is None
    link.state = "ready"
    made.link_changed()
    assert (made.health, book.available) == ("degraded", True)
    link.state = "backoff"
    made.link_changed()
    link.state = "ready"
    made.link_changed()
    found = made.figures()
    assert (found["health"], found["breaker"]["read"], found["breaker"]["opened"]) == ("away", "open", 2)
    assert found["breaker"]["last_trouble"] == "its process ended with SIGKILL"


# ---------------------------------------------------------------- lookups


def test_lookup_and_fetch_pass_over_a_tier_that_is_away() -> None:
    planner, root = make_planner(), ROOTS[0]
    keys = chain(root, (0, 1, 0, 1))
    for move in planner.commit_store(planner.begin_store(root, keys, np.ones((len(GROUPS), 4), np.bool_))):
        write, _ = planner.down.start_write(move)
        if write is not None:
            planner.down.finish_write(write, np.ones(len(write), np.bool_))
    host, ssd, keyed = planner.tiers
    # Fill host memory with something else.
    for step in range(3):
        other = chain(ROOTS[1], (step, 7, 7, step))
        planner.abort_store(planner.begin_store(ROOTS[1], other, np.ones((len(GROUPS), 4), np.bool_)))
    found = {}
    for name, tiers in {"both": (ssd, keyed), "keyed": (keyed,), "ssd": (ssd,), "none": ()}.items():
        for tier in (ssd, keyed):
            tier.available = tier in tiers
        fetch = planner.begin_fetch(root, keys)
        found[name] = planner.lookup(root, keys)[0], {move.tier for move in fetch.reads}
        for move in fetch.reads:
            if move.tier == ssd.number:
                assert move.tier_slots is not None
                assert (move.tier_slots >= 0).all()
            planner.finish_read(move, np.full(len(move), Outcome.FAILED, np.uint8))
        planner.release(fetch)
    assert host.counters.evicted_blocks > 0
    assert found == {
        "both": (4, {ssd.number}),
        "keyed": (4, {keyed.number}),
        "ssd": (4, {ssd.number}),
        "none": (0, set()),
    }


def test_of_two_slot_addressed_tiers_the_other_one_gives_its_own_slot() -> None:
    size = 8 * (4096 + 4096)
    books = [TierBook(f"t{n}", "x", n, "slot", size, SlotPool(size, size // 2), column=n) for n in range(3)]
    planner, root = Planner(books, ReferenceIndex(3)), ROOTS[0]
    planner.add_model(root, (KVGroup(4096),))
    keys = chain(root, (0, 1))
    assert books[2].pool is not None
    books[2].pool.allocate(0, 3)  # so that the two tiers have different slots
    slots: dict[int, list[int]] = {}
    for move in planner.commit_store(planner.begin_store(root, keys, np.ones((1, 2), np.bool_))):
        write, _ = planner.down.start_write(move)
        assert write is not None
        assert write.tier_slots is not None
        slots[write.tier] = write.tier_slots.tolist()
        planner.down.finish_write(write, np.ones(2, np.bool_))
    for seed in range(4):  # fills host memory
        other = planner.begin_store(root, chain(root, (5 + seed, 7)), np.ones((1, 2), np.bool_))
        for move in planner.commit_store(other):
            planner.down.drop_write(move)
    assert slots[1] != slots[2]
    books[1].available = False
    (read,) = planner.begin_fetch(root, keys).reads
    assert read.tier_slots is not None
    assert (read.tier, read.tier_slots.tolist()) == (2, slots[2])


# ---------------------------------------------------------------- in a manager


def test_an_open_breaker_promises_nothing_calls_nothing_and_drops_writes(tmp_path: Path) -> None:
    faults = {"error": 1.0, "operations": ["read"]}
    with KVCacheManager.open(stack(tmp_path, host_blocks=16, faults=faults, breaker=FOR_EVER)) as manager:
        engine, keys = sunk(manager)
        assert figures(manager)["health"] == "ok"
        assert manager.lookup(engine.namespace, keys[0]).blocks == 8
        for one in keys[:2]:
            assert engine.load(one)[:2] == (0, 0)
        found = figures(manager)
        assert (found["health"], found["breaker"]["read"], found["breaker"]["opened"]) == ("away", "open", 1)
        assert found["breaker"]["last_trouble"] == "a read failed for 8 of 8 blocks"
        assert [manager.lookup(engine.namespace, one).blocks for one in keys[:4]] == [0] * 4
        assert manager.lookup(engine.namespace, keys[5]).blocks == 8, "in host memory"
        failed, stored = found["failed_blocks"], found["stored_blocks"]
        assert engine.load(keys[2])[:2] == (0, 0)
        new = engine.keys(prompt(99, 8))
        assert engine.store(new) == 8
        assert manager.drain(10)
        found = figures(manager)
        assert (found["failed_blocks"], found["stored_blocks"]) == (failed, stored), "it was not called"
        assert (found["dropped_blocks"], found["breaker"]["rejected_blocks"]) == (8, 8)
        assert engine.load(new)[:2] == (8, 0)
        nothing_held(manager)


def test_reads_that_wait_when_the_breaker_opens_are_misses_at_once(tmp_path: Path) -> None:
    """40 reads are planned before the first has failed: the first few are asked, the others never."""
    faults = {"error": 1.0, "delay": 1.0, "delay_s": 0.1, "operations": ["read"]}
    unbound = {"pin_budget": 1.0}
    with KVCacheManager.open(stack(tmp_path, host_blocks=48, faults=faults, breaker=FOR_EVER) | unbound) as manager:
        engine, keys = sunk(manager, prompts=46)
        fetches = [manager.fetch(engine.namespace, one) for one in keys[:6]]
        assert all(fetch.wait(20) for fetch in fetches)
        assert [fetch.ready for fetch in fetches] == [0] * 6
        found = figures(manager)
        assert found["failed_blocks"] == 48
        assert 8 <= found["breaker"]["rejected_blocks"] < 48
        for fetch in fetches:
            fetch.release()
        nothing_held(manager)


def test_a_tier_comes_back_by_itself_when_its_errors_end(tmp_path: Path) -> None:
    """The faults end after a number of calls, so that only probes of the open breaker can get there."""
    faults = {"error": 1.0, "operations": ["read"], "before": 14}
    with KVCacheManager.open(stack(tmp_path, host_blocks=16, faults=faults, breaker=SHORTLY)) as manager:
        engine, keys = sunk(manager)
        states = set()

        def served() -> bool:
            ready, wrong, _ = engine.load(keys[0])
            assert wrong == 0
            states.add(figures(manager)["breaker"]["read"])
            return ready == 8

        until(served)
        found = figures(manager)
        assert "open" in states
        assert (found["breaker"]["read"], found["health"]) == ("closed", "degraded"), "closed, and not long ago"
        assert found["breaker"]["opened"] > 3
        nothing_held(manager)


def test_a_tier_that_takes_no_writes_still_serves_its_hits(tmp_path: Path) -> None:
    """As a full disk does."""
    faults = {"error": 1.0, "operations": ["write"], "after": 7}  # open, list, five of six writes
    with KVCacheManager.open(stack(tmp_path, host_blocks=16, faults=faults, breaker=FOR_EVER)) as manager:
        engine, keys = sunk(manager, prompts=10)
        found = figures(manager)
        assert (found["health"], found["breaker"]["write"], found["breaker"]["read"]) == ("degraded", "open", "closed")
        assert found["stored_blocks"] == 8 * 5
        assert (found["failed_blocks"], found["dropped_blocks"]) == (16, 24), "two calls, then none"
        for one in keys[:5]:
            assert engine.load(one) == (8, 0, {"cpu": 0, "directory": 8})
        nothing_held(manager)


def test_a_tier_that_returns_garbage_is_left_alone(tmp_path: Path) -> None:
    faults = {"corrupt": 1.0, "operations": ["read"]}
    with KVCacheManager.open(stack(tmp_path, host_blocks=16, faults=faults, breaker=FOR_EVER)) as manager:
        engine, keys = sunk(manager)
        for one in keys[:4]:
            assert engine.load(one)[:2] == (0, 0)
        found = figures(manager)
        assert found["health"] == "away"
        assert found["corrupt_blocks"] == 16, "two calls, then none"


def test_a_lower_tier_serves_for_the_one_that_is_away(tmp_path: Path) -> None:
    config = stack(tmp_path / "a", host_blocks=16, faults={"error": 1.0, "operations": ["read"]}, breaker=FOR_EVER)
    config["tiers"].append({"backend": "directory", "root": str(tmp_path / "b"), "write_queue": 16 * SLOT_BYTES})
    with KVCacheManager.open(config) as manager:
        engine, keys = sunk(manager)
        for one in keys[:2]:
            assert engine.load(one)[0] == 0
        assert manager.lookup(engine.namespace, keys[2]).blocks == 8
        assert engine.load(keys[2]) == (8, 0, {"cpu": 0, "directory": 0, "directory-2": 8})


def test_a_stopped_process_is_killed_and_its_blocks_come_back(tmp_path: Path) -> None:
    breaker = {**SHORTLY, "failures": 1}
    with KVCacheManager.open(stack(tmp_path, host_blocks=16, deadline_s=0.5, breaker=breaker)) as manager:
        engine, keys = sunk(manager)
        pid = figures(manager)["pid"]
        os.kill(pid, signal.SIGSTOP)
        ready, wrong, _ = engine.load(keys[0])
        assert (ready, wrong) == (0, 0)
        until(lambda: figures(manager)["restarts"] == 1)
        assert not Path(f"/proc/{pid}").exists()
        assert figures(manager)["breaker"]["opened"] >= 1
        assert figures(manager)["breaker"]["last_trouble"] == "a read was not answered within 0.5 s"
        until(lambda: engine.load(keys[0])[:2] == (8, 0))
        nothing_held(manager)


def test_a_flapping_tier_is_left_alone_longer_and_longer(tmp_path: Path) -> None:
    """It opens well and dies at its third call, in each of its lives."""
    faults = {"crash": 1.0, "after": 4}
    breaker = {"failures": 2, "backoff_s": 0.3, "backoff_max_s": 3600.0}
    with KVCacheManager.open(stack(tmp_path, host_blocks=16, faults=faults, breaker=breaker)) as manager:
        engine = Engine(manager)
        keys = [engine.keys(prompt(seed, 8)) for seed in range(6)]

        def worn() -> bool:
            for one, other in zip(keys, keys[3:] + keys[:3], strict=True):
                engine.store(one)
                assert engine.load(other)[1] == 0
            return bool(figures(manager)["breaker"]["opened"] >= 4)

        until(worn, 60)
        assert figures(manager)["health"] == "away"
        nothing_held(manager)


def test_a_store_ends_also_when_its_commit_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with KVCacheManager.open(stack(tmp_path)) as manager:
        engine = Engine(manager)

        def broken(plan: Any) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(manager._planner, "commit_store", broken)
        keys = engine.keys(prompt(1, 4))
        engine.fill(keys)
        transfer = manager.store(engine.namespace, keys, np.arange(4, dtype=np.int64))
        assert manager.wait(transfer, 10)
        assert (transfer.blocks, transfer.error) == (0, "a bug")
        assert manager.drain(10)
        assert manager.stats()["pending_stores"] == 0
        monkeypatch.undo()
        assert engine.store(engine.keys(prompt(2, 4))) == 4
