"""A state machine drives two indexes side by side: random, with a printed seed, and hypothesis, which shrinks.

FLEXKV_STEPS: how many transitions in all (20,000; 1,000,000 with FLEXKV_SOAK=1). FLEXKV_SEED repeats a run.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from index_calls import WEIGHTS
from index_pair import MakeIndex, Pair

from flexkv_core.index.native import NativeIndex
from flexkv_core.index.reference import ReferenceIndex
from flexkv_core.policies import Eviction, policy_names, register_policy

PAIRS: list[tuple[MakeIndex, MakeIndex]] = [(ReferenceIndex, NativeIndex)]
"""(left, right): each pair is driven through all stacks."""

CUSTOM = "machine-test"
STACKS: dict[str, list[str | Eviction]] = {
    "lru+filo": ["lru", "filo"],
    "reward+s3fifo": [Eviction("lru", hit_reward_seconds=9e-6), "s3fifo"],
    "lfu+slru+fifo": ["lfu", Eviction("slru", slru_protected_threshold=2), "fifo"],
    "s3fifo+mru+custom": ["s3fifo", "mru", CUSTOM],
    "custom+s3fifo+slru": [CUSTOM, "s3fifo", Eviction("slru", slru_protected_threshold=1)],
}
SOAK = bool(os.environ.get("FLEXKV_SOAK"))
STEPS = int(os.environ.get("FLEXKV_STEPS", "1000000" if SOAK else "20000"))
SEED = int(os.environ.get("FLEXKV_SEED") or random.SystemRandom().randrange(1 << 32))
WORLD_STEPS = (50, 200, 1000)
HYPOTHESIS_STEPS = 50
HYPOTHESIS_SHARE = 0.2


class Odd:
    """A third party's policy with equal and negative orders, that fails now and then."""

    def insert(self, now: int) -> int:
        if now % 23 == 0:
            raise RuntimeError("insert of the test's policy")
        return now // 8

    def hit(self, state: int, now: int) -> int:
        if now % 29 == 0:
            raise RuntimeError("hit of the test's policy")
        return state + 5

    def order(self, state: int) -> int:
        if state % 31 == 0:
            raise RuntimeError("order of the test's policy")
        return (state * 7) % 19 - 9


@pytest.fixture(autouse=True, scope="module")
def _custom_policy() -> Any:
    """Registered once a process; its failures are expected and not told."""
    if CUSTOM not in policy_names():
        register_policy(CUSTOM, Odd)
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "unraisablehook", lambda unraisable: None)
    patch.setattr(logging.getLogger("flexkv_core.policies.reference"), "disabled", True)
    yield
    patch.undo()


def report(taken: Counter[str], steps: int) -> None:
    """Print how often each transition was taken, and require that none was neglected."""
    print("; ".join(f"{name} {count}" for name, count in sorted(taken.items())))
    total = sum(WEIGHTS.values())
    for name, weight in WEIGHTS.items():
        assert taken[name] >= steps * weight / total / 10, f"{name} was taken {taken[name]} times in {steps} steps"


OUTCOMES = (
    "evict none",
    "evicted of a retired one",
    "forgotten",
    "insert refused",
    "orphans joined",
    "pin of copies",
    "pin refused",
    "recover refused",
    "recovered a copy",
    "remove refused",
    "remove_subtree refused",
    "unpin of copies",
    "unpin refused",
)


@pytest.mark.soak
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_random_steps(left: MakeIndex, right: MakeIndex) -> None:
    """Worlds of some steps each, with fresh indexes; drained one by one at the end."""
    steps, done, number = round(STEPS * (1 - HYPOTHESIS_SHARE)), 0, 0
    taken: Counter[str] = Counter()
    print(f"FLEXKV_SEED={SEED}")
    while done < steps:
        stack = list(STACKS)[number % len(STACKS)]
        dice = random.Random(f"{SEED} {number}")
        pair = Pair(left, right, STACKS[stack], dice)
        try:
            length = min(dice.choice(WORLD_STEPS), steps - done)
            for operation in dice.choices(list(pair.moods), list(pair.moods.values()), k=length):
                pair.step(operation, dice)
                done += 1
            pair.drain()
        except Exception as error:
            error.add_note(f"FLEXKV_SEED={SEED}, world {number} ({stack}), after {done} steps in all:")
            error.add_note("\n".join(pair.log))
            raise
        taken += pair.taken
        number += 1
    report(taken, steps)
    for name in OUTCOMES:
        assert taken[name] >= steps // 9000, f"{name!r} came about {taken[name]} times in {steps} steps"


def machine(left: MakeIndex, right: MakeIndex, stack: list[str | Eviction], taken: Counter[str]) -> type[Any]:
    """The class of a hypothesis machine with one rule a transition."""

    class Machine(RuleBasedStateMachine):
        failed = False

        @initialize(dice=st.randoms(use_true_random=False))
        def begin(self, dice: random.Random) -> None:
            self.pair = Pair(left, right, stack, dice)

        def teardown(self) -> None:
            if hasattr(self, "pair") and not self.failed:
                taken.update(self.pair.taken)
                self.told(self.pair.drain)

        def told(self, action: Callable[..., None], *arguments: Any) -> None:
            """Do something; if it fails, tell the calls that led there."""
            self.failed = True
            try:
                action(*arguments)
            except Exception:
                note("\n".join(self.pair.log))
                raise
            self.failed = False

    def add(operation: str) -> None:
        def step(self: Machine, dice: random.Random) -> None:
            self.told(self.pair.step, operation, dice)

        step.__name__ = operation
        setattr(Machine, operation, rule(dice=st.randoms(use_true_random=False))(step))

    for operation in WEIGHTS:
        add(operation)
    return Machine


@pytest.mark.soak
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_hypothesis_steps(left: MakeIndex, right: MakeIndex, stack: str) -> None:
    """Fewer steps, but failures come out small."""
    examples = max(8, round(STEPS * HYPOTHESIS_SHARE / len(STACKS) / HYPOTHESIS_STEPS))
    taken: Counter[str] = Counter()
    print(f"FLEXKV_SEED={SEED}")
    made = seed(SEED + list(STACKS).index(stack))(machine(left, right, STACKS[stack], taken))
    options = settings(
        max_examples=examples,
        stateful_step_count=HYPOTHESIS_STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(made, settings=options)
    print("; ".join(f"{name} {count}" for name, count in sorted(taken.items())))
    assert sum(taken[name] for name in WEIGHTS) >= examples * HYPOTHESIS_STEPS / 4
