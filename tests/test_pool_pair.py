"""The native slots and their oracle side by side, under the same `SlotPool`: every answer and every refusal."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from reference_pool import ReferenceSlots

from flexkv_core.layout import PAGE
from flexkv_core.pool import SlotPool

COUNTS: Counter[str] = Counter()
SEED = st.integers(0, 2**32 - 1)


class Pair(RuleBasedStateMachine):
    @initialize(
        pages=st.integers(1, 400),
        sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
        extent=st.sampled_from([1, 3, 8, 70, 200]),
    )
    def make(self, pages: int, sizes: list[int], extent: int) -> None:
        self.native, self.oracle = SlotPool(pages * PAGE, extent * PAGE), SlotPool(pages * PAGE, extent * PAGE)
        self.oracle._slots = ReferenceSlots(pages, extent)  # type: ignore[assignment]
        self.pages = pages
        self.classes = {self.both("slot_class", min(size, pages) * PAGE) for size in sizes}
        self.live: set[int] = set()

    def both(self, call: str, *arguments: object) -> object:
        """Call both; their answers, or their refusals, must be equal. Returns None for a refusal."""
        answers = []
        for each in (self.native, self.oracle):
            try:
                answers.append(getattr(each, call)(*arguments))
            except ValueError as error:
                answers.append(error)
        native, oracle = answers
        refused = isinstance(oracle, ValueError) or (call == "allocate" and oracle is None)
        COUNTS[f"{call} refused" if refused else call] += 1
        if isinstance(oracle, ValueError):
            assert str(native) == str(oracle)
            return None
        assert np.array_equal(native, oracle)
        assert getattr(native, "dtype", None) == getattr(oracle, "dtype", None)
        return oracle

    @rule(seed=SEED, all_of_it=st.booleans())
    def allocate(self, seed: int, all_of_it: bool) -> None:
        random = np.random.default_rng(seed)
        number = int(random.choice(sorted(self.classes)))
        most = self.native.available(number)
        slots = self.both("allocate", number, most if all_of_it else int(random.integers(0, most + 3)))
        if slots is not None:
            assert not self.live & set(slots.tolist())
            self.live |= set(slots.tolist())

    @rule(seed=SEED, share=st.sampled_from([0.1, 0.5, 0.9, 1.0]))
    def free(self, seed: int, share: float) -> None:
        random = np.random.default_rng(seed)
        slots = random.permutation(np.array(sorted(self.live), np.int64))[: int(share * len(self.live))]
        self.both("free", slots)
        self.live -= set(slots.tolist())

    @rule(seed=SEED, twice=st.booleans())
    def free_what_must_not_be(self, seed: int, twice: bool) -> None:
        """In the midst of a batch of good ones: then nothing may have changed."""
        random = np.random.default_rng(seed)
        good = random.permutation(np.array(sorted(self.live), np.int64))[:20]
        bad = good[:1] if twice else random.integers(-3, self.pages + 3, 12)
        if twice or not set(bad.tolist()) <= self.live:
            self.both("free", random.permutation(np.concatenate([good, bad])))

    @rule(seed=SEED)
    def adopt(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        number = int(random.choice(sorted(self.classes)))
        pages = self.native._classes[number].pages
        slots = random.integers(-2, self.pages // pages + 2, 15) * pages + (random.random(15) < 0.1)
        taken = self.both("adopt", slots, number)
        COUNTS["adopted"] += int(taken.sum())
        self.live |= set(slots[taken].tolist())

    @rule(chance=st.integers(0, 9))
    def clear(self, chance: int) -> None:
        if not chance:
            self.both("clear")
            self.live.clear()

    @invariant()
    def agree(self) -> None:
        assert (self.native.used_bytes, self.native.used_classes) == (self.oracle.used_bytes, self.oracle.used_classes)
        for number in self.classes:
            for call in ("available", "allocated", "extents"):
                self.both(call, number)
            COUNTS["rooms"] += len(self.native.room_of_others(number))
            self.both("room_of_others", number, 3)


def test_native_and_oracle_answer_alike() -> None:
    COUNTS.clear()
    run_state_machine_as_test(
        Pair,
        settings=settings(
            max_examples=100,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(sorted(COUNTS.items())))
    for transition in ("allocate", "allocate refused", "free", "free refused", "adopted", "clear", "rooms"):
        assert COUNTS[transition], f"{transition} never happened"
