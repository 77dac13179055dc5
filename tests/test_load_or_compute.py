"""Load or compute: no more is taken than was found, what a slow tier has is computed, and what changes is noticed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_rig import BLOCK_SIZE, SPEC, agent, serving

from flexkv_core.blocks import Namespace, block_keys
from flexkv_core.connectors.arrivals import PROBE_AFTER_S, Arrival, Arrivals
from flexkv_core.connectors.estimates import FAR, Line, PrefillSpeed
from flexkv_core.connectors.load_or_compute import HERE, UNKNOWN_SHARE, LoadOrCompute
from flexkv_core.connectors.observations import Observations
from flexkv_core.server import Client, connect

TOKENS, BYTES = 16, 1 << 20
TOKEN_S = 0.001
BLOCK_S = TOKENS * TOKEN_S
"""What computing a block takes here."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def judge(clock: Clock | None = None, *, token_s: float | None = TOKEN_S, enabled: bool = True) -> LoadOrCompute:
    """One that knows what a token of a prompt takes, and nothing else."""
    clock = clock or Clock()
    made = LoadOrCompute(TOKENS, BYTES, longest_s=5.0, clock=clock, enabled=enabled)
    if token_s is not None:
        made.prefill.began(1000, computes=True)
        clock.now += 1000 * token_s
        made.prefill.ended()
    return made


# ---------------------------------------------------------------- estimates


def test_a_latency_and_a_rate_are_told_apart() -> None:
    line = Line()
    assert line.predict(1) is None
    line.observe(10, 2.0)
    assert (line.predict(5), line.predict(10), line.predict(30)) == (2.0, 2.0, 6.0), "nothing is known but the worst"
    for size in (10, 100, 20, 200):
        line.observe(size, 1 + size / 10)
    assert line.predict(100) == pytest.approx(11)
    assert line.predict(1000) == pytest.approx(101)


def test_one_outlier_is_one_and_two_are_a_change() -> None:
    line = Line()
    for _ in range(20):
        line.observe(10, 1.0)
    line.observe(10, 1000.0)
    assert (line.predict(10) or 0) <= FAR
    line.observe(10, 1.0)
    for _ in range(2):
        line.observe(10, 100.0)
    assert line.predict(10) == pytest.approx(100), "slow from now on"
    for _ in range(2):
        line.observe(10, 1.0)
    assert line.predict(10) == pytest.approx(1), "and fast again"


@given(
    st.lists(st.tuples(st.floats(1, 1e12), st.floats(0, 1e6)), min_size=1, max_size=40),
    st.tuples(st.floats(0, 1e13), st.floats(0, 1e13)),
)
def test_more_never_takes_less(samples: list[tuple[float, float]], sizes: tuple[float, float]) -> None:
    line = Line()
    for size, seconds in samples:
        line.observe(size, seconds)
    less, more = (line.predict(size) for size in sorted(sizes))
    assert less is not None
    assert more is not None
    assert 0 < less <= more < math.inf


def test_prefill_is_what_a_step_takes_beyond_the_rest() -> None:
    clock = Clock()
    speed = PrefillSpeed(clock)

    def step(tokens: int, seconds: float, *, computes: bool = True) -> None:
        speed.began(tokens, computes=computes)
        clock.now += seconds
        speed.ended()

    step(0, 0.25, computes=False)
    assert speed.token_s is None, "an empty step says nothing"
    for _ in range(9):
        step(0, 0.02)
    assert speed.token_s is None
    step(100, 0.12)
    assert speed.token_s == pytest.approx(0.001)
    step(2, 0.03)
    assert speed.token_s == pytest.approx(0.001), "lost in the noise"
    clock.now += 1000.0
    step(200, 0.22)
    assert speed.token_s == pytest.approx(0.001), "idle time does not count"
    # The next step is scheduled before the last one has ended.
    speed.began(100, computes=True)
    speed.began(100, computes=True)
    for _ in range(2):
        clock.now += 0.12
        speed.ended()
    assert speed.token_s == pytest.approx(0.001)
    speed.ended()


# ---------------------------------------------------------------- the decision

helds = st.lists(st.tuples(st.sampled_from([HERE, "ssd", "s3"]), st.integers(1, 50)), min_size=1, max_size=6)
paces = st.floats(0, 1e3)


def with_paces(ssd: float, s3: float, *, token_s: float = TOKEN_S, copy_s: float = 0.0) -> LoadOrCompute:
    """`ssd`, `s3`, `copy_s`: seconds a block."""
    made = judge(token_s=token_s)
    for tier, pace in (("ssd", ssd), ("s3", s3)):
        for blocks in (1, 10, 100):
            made.came(tier, blocks, blocks * pace)
    if copy_s:
        for blocks in (1, 10, 100):
            made.copied(blocks, blocks * copy_s)
    return made


@given(helds, st.integers(0, 100), paces, paces, st.floats(0, 1))
def test_no_more_is_taken_than_was_found(
    held: list[tuple[str, int]], local: int, ssd: float, s3: float, copy_s: float
) -> None:
    choice = with_paces(ssd, s3, copy_s=copy_s).choose(held, local)
    whole = sum(blocks for _, blocks in held)
    assert min(local, whole) <= choice.blocks <= max(local, whole)
    assert 0 <= choice.limit_s <= max(choice.compute_s, 0)
    assert choice.load_s <= choice.compute_s, "never slower than computing, as far as is known"


@given(helds, st.integers(0, 20), paces, paces, st.floats(1, 100))
def test_of_a_slower_tier_no_more_is_taken(
    held: list[tuple[str, int]], local: int, ssd: float, s3: float, factor: float
) -> None:
    fast, slow = with_paces(ssd, s3), with_paces(ssd * factor, s3 * factor)
    assert slow.choose(held, local).blocks <= fast.choose(held, local).blocks


@given(helds, st.integers(0, 20), paces, paces, st.floats(1, 100))
def test_by_a_slower_engine_no_less_is_taken(
    held: list[tuple[str, int]], local: int, ssd: float, s3: float, factor: float
) -> None:
    fast, slow = with_paces(ssd, s3, token_s=TOKEN_S), with_paces(ssd, s3, token_s=TOKEN_S * factor)
    assert slow.choose(held, local).blocks >= fast.choose(held, local).blocks


@given(helds, st.floats(1e4, 1e6))
def test_of_a_tier_that_stands_still_only_what_comes_before_is_taken(held: list[tuple[str, int]], pace: float) -> None:
    here = 0
    for tier, blocks in held:
        if tier != HERE:
            break
        here += blocks
    assert with_paces(pace, pace).choose(held, 0).blocks == here


def test_what_was_asked_before_counts() -> None:
    made = with_paces(BLOCK_S / 2, 0)
    held = [("ssd", 10)]
    assert made.choose(held, 0).blocks == 10
    assert made.choose(held, 0, ahead={"ssd": 4}).blocks == 10
    assert made.choose(held, 0, ahead={"ssd": 20}).blocks == 0
    assert made.choose(held, 0, ahead={"ssd": 20}, waited_s=15 * BLOCK_S).blocks == 10


def test_what_the_engine_has_itself_is_fetched_all_the_same() -> None:
    """A prefix comes from its first block on: a slow tier in front keeps what is behind it."""
    made = with_paces(2 * BLOCK_S, 0)
    assert made.choose([("ssd", 10), (HERE, 30)], 10).blocks == 40
    assert made.choose([("ssd", 10), (HERE, 10)], 10).blocks == 10


def test_a_copy_that_is_slower_than_computing_is_not_made() -> None:
    made = judge()
    assert made.choose([(HERE, 4)], 0).blocks == 4
    for _ in range(2):
        made.copied(4, 5 * BLOCK_S)
    assert made.choose([(HERE, 4)], 0).blocks == 0
    assert made.choose([(HERE, 4)], 4).blocks == 4


def test_what_is_not_known_is_tried_for_a_share_of_what_it_saves() -> None:
    choice = judge().choose([(HERE, 2), ("new", 10)], 0)
    assert (choice.blocks, choice.known) == (12, False)
    assert choice.limit_s == pytest.approx(UNKNOWN_SHARE * 10 * BLOCK_S)
    choice = judge(token_s=None).choose([(HERE, 2), ("new", 10)], 0)
    assert (choice.blocks, choice.limit_s) == (12, 5.0), "an engine that has computed nothing yet"
    off = judge(enabled=False)
    for _ in range(2):
        off.came("slow", 10, 1000.0)
    assert off.compute_s(10) is None, "no wait is bounded by it"
    assert (off.choose([("slow", 10)], 0).blocks, off.choose([("slow", 10)], 0).limit_s) == (10, 5.0)


# ---------------------------------------------------------------- arrivals


class FakeFetch:
    """What the test says of it; nothing comes by itself."""

    def __init__(self, keys: np.ndarray, *, keep: bool) -> None:
        self.blocks, self.keep = len(keys), keep
        self.avoid: list[str] = []
        self.ready, self.done, self.why = 0, False, ""
        self.held: list[tuple[str, int]] = []
        self.steps: list[tuple[int, float]] = []
        self.sources: dict[str, int] = {}

    def tell(
        self, ready: int, seconds: float, held: list[tuple[str, int]] | None = None, *, done: bool = False
    ) -> None:
        self.ready, self.done = ready, done
        self.held = self.held if held is None else held
        self.steps.append((ready, seconds))

    def wait(self, timeout_s: float) -> bool:
        return self.done

    def release(self) -> None:
        self.why = self.why or "released"


class FakeClient:
    """Answers fetches of no more than the `here` leading blocks at once."""

    def __init__(self, here: int = 0) -> None:
        self.here = here
        self.fetches: list[FakeFetch] = []

    def fetch(
        self, namespace: Namespace, keys: np.ndarray, deadline_s: float, *, keep: bool = True, avoid: Sequence[str] = ()
    ) -> FakeFetch:
        self.fetches.append(FakeFetch(keys, keep=keep))
        self.fetches[-1].avoid = list(avoid)
        if keep and len(keys) <= self.here:
            self.fetches[-1].tell(len(keys), 0.0, done=True)
        return self.fetches[-1]

    def prefetch(self, namespace: Namespace, keys: np.ndarray, deadline_s: float) -> FakeFetch:
        return self.fetch(namespace, keys, deadline_s, keep=False)

    def cancel(self, fetch: FakeFetch) -> None:
        fetch.done, fetch.why = True, "cancelled"


class Rig:
    def __init__(self, here: int = 4) -> None:
        self.clock = Clock()
        self.client = FakeClient(here)
        self.judge = judge(self.clock)
        self.seen = Observations(self.judge.decisions)
        self.arrivals = Arrivals(cast(Client, self.client), self.judge, self.seen, fetch_s=5.0, clock=self.clock)
        self.namespace = Namespace.of(SPEC)

    def arrive(self, blocks: int, held: list[tuple[str, int]]) -> tuple[Arrival, FakeFetch]:
        """A request whose fetch has said where its blocks are."""
        arrival = self.arrivals.begin(self.namespace, np.zeros((blocks, 32), np.uint8))
        fetch = self.client.fetches[-1]
        fetch.tell(self.client.here, 0.0, held, done="ssd" in fetch.avoid)
        return arrival, fetch

    def probe(self, seconds: float, held: list[tuple[str, int]]) -> None:
        """The prefetch that runs has ended."""
        fetch = self.client.fetches[-1]
        assert not fetch.keep
        fetch.tell(fetch.blocks, seconds, held, done=True)
        self.arrivals.step()


HELD = [(HERE, 4), ("ssd", 16)]


def test_a_hit_in_host_memory_is_taken_at_once() -> None:
    rig = Rig(here=8)
    arrival = rig.arrivals.begin(rig.namespace, np.zeros((8, 32), np.uint8))
    assert rig.arrivals.found(arrival, 0) == 8
    assert rig.arrivals.found(arrival, 0) == 8, "asked again, for want of room"
    assert (rig.judge.decisions.whole, rig.judge.decisions.taken_tokens) == (1, 8 * TOKENS)
    rig.arrivals.end(arrival)
    assert rig.client.fetches[0].why == "released"


def test_a_fast_tier_is_waited_for_and_measured() -> None:
    rig = Rig()
    arrival, fetch = rig.arrive(20, HELD)
    assert rig.arrivals.found(arrival, 0) is None
    fetch.tell(20, 0.002, done=True)
    assert rig.arrivals.found(arrival, 0) == 20
    assert rig.judge.wait_s("ssd", 16) == pytest.approx(0.002)
    assert (rig.judge.decisions.whole, rig.judge.decisions.cut, rig.judge.decisions.probes) == (1, 0, 0)


def test_the_wait_for_a_tier_that_nothing_is_known_of_is_bounded() -> None:
    rig = Rig()
    arrival, fetch = rig.arrive(20, HELD)
    assert rig.arrivals.found(arrival, 0) is None
    rig.clock.now += 0.99 * UNKNOWN_SHARE * 16 * BLOCK_S
    assert rig.arrivals.found(arrival, 0) is None
    rig.clock.now += 0.02 * UNKNOWN_SHARE * 16 * BLOCK_S
    assert rig.arrivals.found(arrival, 0) == 4, "the part that is in host memory"
    assert fetch.why == "cancelled"
    assert [each.keep for each in rig.client.fetches] == [True, True, False]
    rig.judge.prefill.began(1000, computes=True)
    rig.clock.now += 1100 * TOKEN_S  # as the machine happens to be
    rig.judge.prefill.ended()
    assert rig.judge.too_slow(16) == ["ssd"], "once is enough"
    decisions = rig.judge.decisions
    assert (decisions.gave_up, decisions.cut, decisions.probes) == (1, 1, 1)
    assert (decisions.taken_tokens, decisions.left_tokens) == (4 * TOKENS, 16 * TOKENS)


def test_a_slow_tier_is_not_waited_for_until_it_is_fast_again() -> None:
    rig = Rig()
    for _ in range(2):
        rig.judge.came("ssd", 16, 100.0)
    arrival, _ = rig.arrive(20, HELD)
    assert rig.arrivals.found(arrival, 0) == 4, "at once"
    assert rig.judge.decisions.gave_up == 0
    rig.client.here = 0
    arrival, _ = rig.arrive(20, [("ssd", 20)])
    assert rig.arrivals.found(arrival, 0) == 0
    assert rig.judge.decisions.probes == 1, "one at a time"
    assert [each.avoid for each in rig.client.fetches] == [["ssd"], [], ["ssd"]], "it is not even read"
    rig.client.fetches[1].tell(20, 0.001, HELD, done=True)
    rig.arrivals.step()
    assert rig.judge.decisions.probes == 1
    assert rig.arrivals.found(rig.arrive(20, [("ssd", 20)])[0], 0) == 0, "one measurement is none"
    assert rig.judge.decisions.probes == 1, "it rests"
    rig.clock.now += PROBE_AFTER_S
    assert rig.arrivals.found(rig.arrive(20, [("ssd", 20)])[0], 0) == 0
    assert rig.judge.decisions.probes == 2
    rig.probe(0.001, [("ssd", 20)])
    arrival, fetch = rig.arrive(20, [("ssd", 20)])
    assert rig.arrivals.found(arrival, 0) is None
    fetch.tell(20, 0.001, done=True)
    assert rig.arrivals.found(arrival, 0) == 20


def test_what_the_engine_has_itself_is_not_loaded() -> None:
    rig = Rig()
    for _ in range(2):
        rig.judge.came("ssd", 16, 100.0)
    arrival, fetch = rig.arrive(20, HELD)
    assert rig.arrivals.found(arrival, 6) == 6
    assert fetch.why == "released"
    assert (rig.judge.decisions.not_taken, rig.judge.decisions.left_tokens) == (1, 14 * TOKENS)


def test_a_server_that_says_nothing_is_given_up() -> None:
    rig = Rig()
    arrival = rig.arrivals.begin(rig.namespace, np.zeros((20, 32), np.uint8))
    assert rig.arrivals.found(arrival, 0) is None
    rig.clock.now += 20 * BLOCK_S
    assert rig.arrivals.found(arrival, 0) == 0
    assert rig.client.fetches[0].why == "cancelled"


def test_requests_that_wait_together_queue() -> None:
    rig = Rig()
    for blocks in (1, 16, 160):
        rig.judge.came("ssd", blocks, blocks * BLOCK_S / 3)
    waiting = [rig.arrive(16, [("ssd", 16)]) for _ in range(4)]
    found = [rig.arrivals.found(arrival, 0) for arrival, _ in waiting]
    assert found == [None, None, 0, 0], "the third would come after what it takes to compute it"
    for number, (arrival, fetch) in enumerate(waiting[:2], 1):
        fetch.tell(16, number * 16 * BLOCK_S / 3, done=True)
        assert rig.arrivals.found(arrival, 0) == 16
    assert rig.arrivals.found(rig.arrive(16, [("ssd", 16)])[0], 0) is None, "nobody is ahead any more"


# ---------------------------------------------------------------- the server


@pytest.mark.usefixtures("leak_check")
def test_the_server_says_where_blocks_are_and_when_they_came(tmp_path: Path) -> None:
    # A host tier of few slots: what is stored first is only in the tier below when the rest has been.
    tier: dict[str, Any] = {"backend": "directory", "root": str(tmp_path / "blocks"), "capacity": "64MiB"}
    cpu: dict[str, Any] = {"backend": "cpu", "capacity": "256KiB", "prefault": False}
    with (
        serving(tmp_path / "s", {"tiers": [cpu, tier]}),
        agent(tmp_path / "s"),
        connect(tmp_path / "s", engine="e") as cache,
    ):
        model = cache.register(SPEC)
        prefixes = []
        for seed in range(12):
            tokens = np.random.default_rng(seed).integers(0, 1 << 31, 8 * BLOCK_SIZE, dtype=np.int32)
            prefixes.append(block_keys(tokens, BLOCK_SIZE, model.root))
            transfer = cache.store(model, prefixes[-1], np.arange(8, dtype=np.int64))
            assert transfer.wait(10)
            assert cache.drain(10)
        gone = next(keys for keys in prefixes if cache.lookup(model, keys).host_blocks == 0)
        avoiding = cache.fetch(model, gone, avoid=["directory"])
        assert avoiding.wait(10)
        assert (avoiding.ready, avoiding.held) == (0, [("directory", 8)])
        fetch = cache.fetch(model, gone)
        assert fetch.wait(10)
        assert fetch.ready == 8
        assert fetch.held == [("directory", 8)]
        assert fetch.steps[0][0] == 0, "said before anything has come"
        assert fetch.steps[-1][0] == 8
        assert [seconds for _, seconds in fetch.steps] == sorted(seconds for _, seconds in fetch.steps)
        fetch.release()
        here = cache.fetch(model, gone)
        assert here.wait(10)
        assert (here.ready, here.held) == (8, [])
        here.release()
