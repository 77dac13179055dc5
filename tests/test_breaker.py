"""The circuit breaker against a model that recomputes everything from the list of what happened."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from pydantic import ValidationError

from flexkv_core.breaker import RATE_CALLS, RATE_OF_BAD, Breaker, BreakerConfig

SEED = int(os.environ.get("FLEXKV_SEED", random.SystemRandom().randrange(1 << 32)))
CONFIG = BreakerConfig(failures=3, window_s=8.0, backoff_s=1.0, backoff_max_s=8.0)
TAKEN: Counter[str] = Counter()


class Model:
    """What the docstring of `breaker.py` says, by recomputing; the jitter is the same generator."""

    def __init__(self) -> None:
        self.jitter = random.Random(1)
        self.calls: list[tuple[float, bool]] = []  # since it last closed
        self.era, self.state, self.until, self.level, self.opened = 0, "closed", 0.0, 0, 0
        self.closed_at: float | None = None
        self.trying = False

    def look(self, now: float) -> str:
        if self.state == "open" and now >= self.until:
            self.state, self.trying = "half_open", False
        return self.state

    def happened(self, now: float, good: bool) -> None:
        if self.look(now) == "half_open":
            if good:
                self.state, self.closed_at, self.calls = "closed", now, []
                self.era += 1
                TAKEN["probe closes"] += 1
            else:
                TAKEN["probe opens"] += 1
                self.open(now, self.level + 1)
            return
        self.calls.append((now, good))
        recent = [ok for at, ok in self.calls if now - at < CONFIG.window_s]
        row = next((n for n, (_, ok) in enumerate(reversed(self.calls)) if ok), len(self.calls))
        often = len(recent) >= RATE_CALLS and recent.count(False) >= RATE_OF_BAD * len(recent)
        if row >= CONFIG.failures or often:
            TAKEN["opens in a row" if row >= CONFIG.failures else "opens by rate"] += 1
            steady = self.closed_at is None or now - self.closed_at >= CONFIG.window_s
            self.open(now, 0 if steady else self.level + 1)

    def open(self, now: float, level: int) -> None:
        self.level = level
        wait = min(CONFIG.backoff_max_s, CONFIG.backoff_s * 2**level)
        self.until = now + wait * self.jitter.uniform(0.5, 1.0)
        self.state, self.opened, self.calls = "open", self.opened + 1, []
        self.era += 1


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.breaker = Breaker(CONFIG, lambda: self.now, seed=1)
        self.model = Model()
        self.flying: list[tuple[int, int]] = []  # the breaker's ticket, the model's era

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.4, 1.0, 4.0, 9.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(past=st.sampled_from([0.0, -1e-3, 0.5]))
    def the_wait_passes(self, past: float) -> None:
        if self.model.look(self.now) == "open":
            self.now = max(self.now, self.model.until + past)

    @rule()
    def begin(self) -> None:
        state = self.model.look(self.now)
        allowed = state == "closed" or (state == "half_open" and not self.model.trying)
        assert self.breaker.admits == allowed
        ticket = self.breaker.begin()
        assert (ticket is not None) == allowed
        TAKEN[f"begin {state} {'let through' if allowed else 'refused'}"] += 1
        if ticket is not None:
            self.model.trying = state == "half_open"
            self.flying.append((ticket, self.model.era))

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 63), how=st.sampled_from(["good", "bad", "void"]))
    def end(self, which: int, how: str) -> None:
        ticket, era = self.flying.pop(which % len(self.flying))
        current = era == self.model.era
        TAKEN[f"end {how}{'' if current else ' too late'}"] += 1
        if how == "void":
            self.breaker.void(ticket)
            if current:
                self.model.trying = False
            return
        self.breaker.end(ticket, good=how == "good")
        if current:
            self.model.happened(self.now, how == "good")

    @rule(pattern=st.lists(st.booleans(), min_size=1, max_size=4), times=st.integers(1, 12))
    def calls_one_by_one(self, pattern: list[bool], times: int) -> None:
        for good in pattern * times:
            ticket = self.breaker.begin()
            if ticket is None:
                return
            self.model.look(self.now)
            self.breaker.end(ticket, good=good)
            self.model.happened(self.now, good)

    @rule()
    def strike(self) -> None:
        self.breaker.strike()
        if self.model.look(self.now) != "open":
            TAKEN["strike counts"] += 1
            self.model.happened(self.now, False)

    @invariant()
    def agree(self) -> None:
        state = self.model.look(self.now)
        assert self.breaker.state == state
        assert self.breaker.opened == self.model.opened
        assert self.breaker.wait_s == pytest.approx(max(0.0, self.model.until - self.now) if state == "open" else 0.0)
        assert self.breaker.wait_s <= CONFIG.backoff_max_s
        if state != "closed":
            assert self.breaker.troubled


def test_the_breaker_is_its_model() -> None:
    """Hypothesis: failures come out small."""
    print(f"FLEXKV_SEED={SEED}")
    options = settings(
        max_examples=150,
        stateful_step_count=40,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(SEED)(Machine), settings=options)


def test_the_breaker_is_its_model_on_a_long_walk() -> None:
    """The same steps from fair dice, which take every transition often."""
    print(f"FLEXKV_SEED={SEED}")
    dice, walk = random.Random(SEED), Machine()
    TAKEN.clear()
    for _ in range(6000):
        step = dice.choice(["begin", "begin", "end", "end", "time", "wait", "calls", "strike"])
        if step == "begin":
            walk.begin()
        elif step == "end" and walk.flying:
            walk.end(dice.randrange(64), dice.choice(["good", "bad", "void"]))
        elif step == "time":
            walk.time_passes(dice.choice([0.0, 0.1, 0.4, 1.0, 4.0, 9.0]))
        elif step == "wait":
            walk.the_wait_passes(dice.choice([0.0, -1e-3, 0.5]))
        elif step == "calls":
            walk.calls_one_by_one([dice.random() < 0.6 for _ in range(dice.randint(1, 4))], dice.randint(1, 12))
        elif step == "strike":
            walk.strike()
        walk.agree()
    print(dict(TAKEN))
    expected = [f"begin {s} {r}" for s, r in (("closed", "let through"), ("open", "refused"))]
    expected += [f"begin half_open {r}" for r in ("let through", "refused")]
    expected += ["end good", "end bad", "end void", "end good too late", "end bad too late", "strike counts"]
    expected += ["probe closes", "probe opens", "opens in a row", "opens by rate"]
    rare = [name for name in expected if TAKEN[name] < 3]
    assert not rare, f"transitions that this run hardly took: {rare}"


def test_a_breaker_that_flaps_waits_longer_and_one_that_was_steady_does_not() -> None:
    now = [0.0]
    breaker = Breaker(CONFIG, lambda: now[0], seed=3)

    def fail() -> float:
        while breaker.state == "closed":
            breaker.strike()
        return breaker.wait_s

    def recover() -> None:
        now[0] += breaker.wait_s
        ticket = breaker.begin()
        assert ticket is not None
        breaker.end(ticket, good=True)
        assert breaker.state == "closed"

    bounds = [(0.5, 1.0), (1.0, 2.0), (2.0, 4.0), (4.0, 8.0), (4.0, 8.0)]
    for least, most in bounds:
        assert least <= fail() <= most
        recover()
    assert breaker.troubled
    now[0] += CONFIG.window_s
    assert not breaker.troubled
    assert 0.5 <= fail() <= 1.0
    assert breaker.opened == len(bounds) + 1


@pytest.mark.parametrize(
    "bad", [{"failures": 0}, {"window_s": 0}, {"backoff_s": 2.0, "backoff_max_s": 1.0}, {"slow_s": -1.0}, {"wait": 1}]
)
def test_configs_that_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        BreakerConfig.model_validate(bad)
