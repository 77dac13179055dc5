"""A state machine drives managers with faults on, against a model of what may be returned: random, and hypothesis.

Rules 1 to 8 of the design; see `machine_world.py` for the model and `machine_steps.py` for what happens. Prints how
often each transition was taken. FLEXKV_STEPS: how many operations in all (1,000,000 with FLEXKV_SOAK=1). FLEXKV_SEED
repeats a run, as far as threads let it; FLEXKV_WORLD begins with the world of that number.
"""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Install
from hypothesis import HealthCheck, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from machine_gates import BACKENDS, PLUGINS, Current, KillableLink, gated_seal, gated_verify
from machine_steps import PROCESS_TRANSITIONS, TRANSITIONS, WEIGHTS, World

from flexkv_core import books, copying, manager, reading

SOAK = bool(os.environ.get("FLEXKV_SOAK"))
STEPS = int(os.environ.get("FLEXKV_STEPS", "1000000" if SOAK else "24000"))
SEED = int(os.environ.get("FLEXKV_SEED") or random.SystemRandom().randrange(1 << 32))
FIRST = int(os.environ.get("FLEXKV_WORLD") or 0)
KINDS = ("kept", "kept+keyed", "slots+kept", "staging", "directory")
PROCESS_EVERY = 12
"""Worlds; those with tier processes take their time."""
WORLD_STEPS = (20, 60, 100)
HYPOTHESIS_STEPS = 30
HYPOTHESIS_SHARE = 0.1
NUMBERS = st.integers(0, 1 << 32)
"""Seeds of an operation's choices: how many it makes depends on what threads have done so far."""
FULL_STEPS = 24_000
"""So many steps take each transition at least 100 times; of fewer, a seed looked at again, no count is due."""


@pytest.fixture(autouse=True)
def _machinery(install_plugin: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates in the manager, small extents, and nothing told of failures on purpose."""
    for name, (made, addressing) in BACKENDS.items():
        install_plugin(name, PLUGINS.format(name=name, made=made, addressing=addressing))
    monkeypatch.setattr(reading, "verify_blocks", gated_verify)
    monkeypatch.setattr(copying, "seal_blocks", gated_seal)
    monkeypatch.setattr(manager, "InlineLink", KillableLink)
    monkeypatch.setattr(books, "SMALLEST_EXTENT_BYTES", 32 << 10)
    monkeypatch.setattr(books, "STAGING_BYTES", 256 << 10)
    monkeypatch.setattr(threading, "excepthook", lambda args: Current.gates.complain(f"a thread: {args.exc_value!r}"))


def tell(error: Exception, world: World, *more: str) -> None:
    error.add_note("\n".join((*more, f"{world.kind}: {world.config}", *world.log)))


def abandon(world: World) -> None:
    """After a failure: let nothing of it hang around."""
    world.gates.open_all()
    world.deaf()
    if hasattr(world, "manager"):
        world.manager.close(1.0)


def report(taken: Counter[str]) -> None:
    print("; ".join(f"{name} {count}" for name, count in sorted(taken.items())))


def lacking(taken: Counter[str]) -> dict[str, int]:
    """Transitions that were not taken as often as is due, and how often they were."""
    if STEPS < FULL_STEPS:
        return {}
    due = dict.fromkeys((*WEIGHTS, *TRANSITIONS), 100) | dict.fromkeys(PROCESS_TRANSITIONS, 1)
    return {name: taken[name] for name, least in due.items() if taken[name] < least}


@pytest.mark.soak
def test_random_steps(tmp_path: Path) -> None:
    """Worlds of some steps each."""
    steps, done, number = round(STEPS * (1 - HYPOTHESIS_SHARE)), 0, FIRST
    taken: Counter[str] = Counter()
    print(f"FLEXKV_SEED={SEED}")
    while done < steps or (lacking(taken) and done < 1.5 * steps):
        dice = random.Random(f"{SEED} {number}")
        kind = "process" if number % PROCESS_EVERY == PROCESS_EVERY - 1 else KINDS[number % len(KINDS)]
        world = World(kind, dice, tmp_path / f"{number}", taken)
        try:
            for operation in dice.choices(list(WEIGHTS), list(WEIGHTS.values()), k=dice.choice(WORLD_STEPS)):
                world.step(operation)
                done += 1
            world.end()
        except Exception as error:
            tell(error, world, f"FLEXKV_SEED={SEED}, world {number}, after {done} steps in all:")
            abandon(world)
            raise
        number += 1
    print(f"{number} worlds, {done} steps")
    report(taken)
    assert not lacking(taken), f"of these more are due in {done} steps: {lacking(taken)}"


def machine(kind: str, root: Path, taken: Counter[str]) -> type[Any]:
    """The class of a hypothesis machine with one rule an operation."""

    class Machine(RuleBasedStateMachine):
        failed = False

        @initialize(number=NUMBERS)
        def begin(self, number: int) -> None:
            taken["worlds"] += 1
            self.world = World(kind, random.Random(number), root / f"{taken['worlds']}", taken)

        def teardown(self) -> None:
            if hasattr(self, "world") and not self.failed:
                self.told(self.world.end)

        def told(self, action: Callable[..., None], *arguments: Any) -> None:
            """Do something; if it fails, tell the operations that led there."""
            self.failed = True
            try:
                action(*arguments)
            except Exception:
                note("\n".join((f"{self.world.config}", *self.world.log)))
                abandon(self.world)
                raise
            self.failed = False

    def add(operation: str) -> None:
        def step(self: Machine, number: int) -> None:
            self.world.dice = random.Random(number)
            self.told(self.world.step, operation)

        step.__name__ = operation
        setattr(Machine, operation, rule(number=NUMBERS)(step))

    for operation in WEIGHTS:
        add(operation)
    return Machine


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_hypothesis_steps(kind: str, tmp_path: Path) -> None:
    """Fewer steps, but failures come out small."""
    examples = max(4, round(STEPS * HYPOTHESIS_SHARE / len(KINDS) / HYPOTHESIS_STEPS))
    taken: Counter[str] = Counter()
    print(f"FLEXKV_SEED={SEED}")
    made = seed(SEED + KINDS.index(kind))(machine(kind, tmp_path, taken))
    options = settings(
        max_examples=examples,
        stateful_step_count=HYPOTHESIS_STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(made, settings=options)
    report(taken)
    assert sum(taken[name] for name in WEIGHTS) >= examples * HYPOTHESIS_STEPS / 4
