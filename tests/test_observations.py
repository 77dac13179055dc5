"""What connectors have done: told once, as plain data that adds up, of the tier that had the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from test_load_or_compute import HELD, Rig

from flexkv_core.connectors.arrivals import Arrival
from flexkv_core.connectors.load_or_compute import Decisions
from flexkv_core.connectors.observations import MOST_SAMPLES, Data, Observations, add, summary


def test_what_came_is_told_once() -> None:
    decisions = Decisions(whole=7)
    seen = Observations(decisions)
    assert seen.take() is None, "what was before is not told"
    seen.fetched(0.5, failed=False)
    seen.loaded(0.25, {"cpu": 32, "ssd": 64})
    seen.loaded(0.75, {"cpu": 16})
    seen.counts.stores += 2
    decisions.cut += 1
    decisions.left_tokens += 48
    told = seen.take()
    assert told == {
        "counts": {"stores": 2, "left_tokens": 48},
        "decisions": {"cut": 1},
        "hit_tokens": {"cpu": 48, "ssd": 64},
        "seconds": {"fetch": [0.5], "load": [0.25, 0.75]},
    }
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(told)) == told
    assert seen.counts.hit_tokens == 112
    assert seen.take() is None
    seen.fetched(0.1, failed=True)
    assert seen.take() == {"counts": {"failed_fetches": 1}, "seconds": {"fetch": [0.1]}}


def test_what_nobody_asks_for_does_not_pile_up() -> None:
    seen = Observations(Decisions())
    for _ in range(MOST_SAMPLES + 5):
        seen.loaded(0.1, {"cpu": 1})
    told = seen.take()
    assert told is not None
    assert len(told["seconds"]["load"]) == MOST_SAMPLES
    assert told["hit_tokens"] == {"cpu": MOST_SAMPLES + 5}


def test_they_add_up_and_share_nothing() -> None:
    one: Data = {"counts": {"stores": 1}, "hit_tokens": {"cpu": 16}, "seconds": {"load": [1.0]}}
    two: Data = {"counts": {"stores": 2, "failed_loads": 1}, "hit_tokens": {"ssd": 32}, "seconds": {"load": [2.0]}}
    total: Data = {}
    add(total, one)
    add(total, two)
    assert total == {
        "counts": {"stores": 3, "failed_loads": 1},
        "hit_tokens": {"cpu": 16, "ssd": 32},
        "seconds": {"load": [1.0, 2.0]},
    }
    assert one == {"counts": {"stores": 1}, "hit_tokens": {"cpu": 16}, "seconds": {"load": [1.0]}}
    assert summary(total) == {
        "hit tokens of cpu": 16,
        "hit tokens of ssd": 32,
        "loads": 2,
        "mean load s": 1.5,
        "stores": 3,
        "failed loads": 1,
    }


@pytest.mark.parametrize(
    ("first", "last", "tokens"),
    [
        (0, 80, {"fast": 32, "ssd": 48}),
        (16, 48, {"fast": 16, "ssd": 16}),
        (40, 80, {"ssd": 40}),
        (0, 32, {"fast": 32}),
        (64, 96, {"ssd": 16, "fast": 16}),
    ],
)
def test_tokens_are_of_the_tier_that_had_them(first: int, last: int, tokens: dict[str, int]) -> None:
    held, nothing = [("", 2), ("ssd", 3)], cast(Any, None)
    fetch = cast(Any, SimpleNamespace(held=held, sources={"fast": 2, "ssd": 3}))
    assert Arrival(nothing, nothing, fetch, 0.0, 0.0).tokens(first, last, 16) == tokens
    brought = cast(Any, SimpleNamespace(held=[], sources={"fast": 5, "ssd": 0}))
    cut = Arrival(nothing, nothing, brought, 0.0, 0.0, held=held, cut=True)
    assert cut.tokens(first, last, 16) == tokens, "a fetch of its own has them in host memory, another brought them"
    silent = cast(Any, SimpleNamespace(held=[], sources={}))
    assert Arrival(nothing, nothing, silent, 0.0, 0.0).tokens(0, 16, 16) == {"cpu": 16}


def fetches(rig: Rig) -> tuple[int, int, Sequence[float]]:
    told = rig.seen.take() or {}
    return rig.seen.counts.fetches, rig.seen.counts.failed_fetches, told.get("seconds", {}).get("fetch", [])


def test_fetches_are_seen_when_they_are_over() -> None:
    rig = Rig()
    arrival, fetch = rig.arrive(20, HELD)
    assert rig.arrivals.found(arrival, 0) is None
    assert fetches(rig) == (0, 0, [])
    rig.clock.now += 0.002
    fetch.tell(20, 0.0015, done=True)
    for _ in range(2):
        assert rig.arrivals.found(arrival, 0) == 20
    assert fetches(rig) == (1, 0, [0.0015]), "once, on the server's clock"


@pytest.mark.parametrize(("ready", "why", "failed"), [(20, "", 0), (19, "", 1), (0, "", 1), (20, "expired", 1)])
def test_a_fetch_fails_that_does_not_bring_what_was_there(ready: int, why: str, failed: int) -> None:
    rig = Rig()
    arrival, fetch = rig.arrive(20, HELD)
    fetch.tell(ready, 0.001, done=True)
    fetch.why = why
    rig.arrivals.found(arrival, 0)
    assert fetches(rig) == (1, failed, [0.001])


def test_what_is_not_there_or_not_to_be_read_is_no_failure() -> None:
    rig = Rig(here=0)
    arrival, fetch = rig.arrive(20, [])
    fetch.tell(0, 0.001, [], done=True)
    rig.arrivals.found(arrival, 0)
    assert fetches(rig) == (0, 0, [])

    rig = Rig()
    for _ in range(2):
        rig.judge.came("ssd", 16, 1000.0)
    arrival, fetch = rig.arrive(20, HELD)
    assert fetch.avoid == ["ssd"]
    assert rig.arrivals.found(arrival, 0) == 4
    assert fetches(rig) == (1, 0, [0.0])
