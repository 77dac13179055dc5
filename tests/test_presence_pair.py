"""The native presence record and its oracle side by side: batches of hundreds, keys that meet in the look-up table.

Keys share their first bytes in every way that a table of 1,024 shards, tagged by 32 bits, could confuse: the same
shard, the same tag, the same first 8 bytes with another end.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from reference_presence import ReferencePresence

from flexkv_core.presence import Presence

COUNTS: Counter[str] = Counter()


def meeting_keys() -> np.ndarray:
    """(600, 32) distinct keys, of few beginnings."""
    random = np.random.default_rng(1)
    made = random.integers(0, 256, (600, 32), dtype=np.uint8)
    made[:200, :2] = (7, 0)  # one shard
    made[200:400, :4] = (1, 2, 3, 4)
    made[200:400, 4:8] = random.integers(0, 3, (200, 4))  # one shard, few tags, next to each other
    made[400:500, :31] = 9  # alike up to the last byte
    made[400:500, 31] = np.arange(100)
    assert len(np.unique(made, axis=0)) == 600
    return made


KEYS = meeting_keys()
SEED = st.integers(0, 2**32 - 1)
SIZE = st.sampled_from([0, 1, 2, 7, 9, 64, 300])


class Pair(RuleBasedStateMachine):
    @initialize(
        capacity=st.one_of(st.none(), st.integers(0, 40_000)), most=st.one_of(st.integers(1, 400), st.just(2**40))
    )
    def make(self, capacity: int | None, most: int) -> None:
        self.native, self.oracle = Presence(capacity, most), ReferencePresence(capacity, most)
        self.pinned: list[tuple[np.ndarray, np.ndarray]] = []

    @staticmethod
    def blocks(seed: int, size: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
        """Some of the keys, of a narrow or a wide choice, with repeats."""
        random = np.random.default_rng(seed)
        most = int(random.choice([3, 50, len(KEYS)]))
        chosen = (random.integers(0, len(KEYS)) + random.integers(0, most, size)) % len(KEYS)
        return random, KEYS[chosen], random.integers(0, 3, size).astype(np.uint8)

    def both(self, call: str, *arguments: object) -> object:
        """Call both; their answers, or their refusals, must be equal. Returns None for a refusal."""
        answers = []
        for each in (self.native, self.oracle):
            try:
                answers.append(getattr(each, call)(*arguments))
            except ValueError as error:
                answers.append(error)
        native, oracle = answers
        COUNTS[f"{call} refused" if isinstance(oracle, ValueError) else call] += 1
        if isinstance(oracle, ValueError):
            assert str(native) == str(oracle)
            return None
        pairs = zip(native, oracle, strict=True) if isinstance(oracle, tuple) else [(native, oracle)]
        for ours, theirs in pairs:
            assert np.array_equal(ours, theirs)
            assert getattr(ours, "dtype", None) == getattr(theirs, "dtype", None)
            assert getattr(ours, "shape", None) == getattr(theirs, "shape", None)
        return oracle

    @rule(seed=SEED, size=SIZE)
    def add(self, seed: int, size: int) -> None:
        random, keys, groups = self.blocks(seed, size)
        self.both("add", keys, groups, random.integers(0, 300, size))

    @rule(seed=SEED, size=SIZE)
    def discard(self, seed: int, size: int) -> None:
        _, keys, groups = self.blocks(seed, size)
        self.both("discard", keys, groups)

    @rule(seed=SEED, size=SIZE, group=st.integers(0, 2))
    def touch(self, seed: int, size: int, group: int) -> None:
        self.both("touch", self.blocks(seed, size)[1], group)

    @rule(seed=SEED, size=SIZE)
    def pin(self, seed: int, size: int) -> None:
        _, keys, groups = self.blocks(seed, size)
        self.both("pin", keys, groups)
        self.pinned.append((keys, groups))

    @rule()
    def unpin(self) -> None:
        if self.pinned:
            self.both("unpin", *self.pinned.pop(0))

    @rule(seed=SEED, size=SIZE)
    def unpin_any(self, seed: int, size: int) -> None:
        """All pins and some more, which is refused in the middle of the batch: then nothing may have changed."""
        _, keys, groups = self.blocks(seed, size)
        self.both("unpin", *(np.concatenate([p[i] for p in (*self.pinned, (keys, groups))]) for i in (0, 1)))
        if not size:
            self.pinned.clear()

    @rule()
    def overflow(self) -> None:
        COUNTS["overflowed"] += len(self.both("overflow")[1])

    @rule(nbytes=st.one_of(st.integers(0, 10_000), st.just(2**70), st.just(-1)))
    def evict_for(self, nbytes: int) -> None:
        answer = self.both("evict_for", nbytes)
        COUNTS["evicted"] += 0 if answer is None else len(answer[1])

    @rule(chance=st.integers(0, 9))
    def clear(self, chance: int) -> None:
        if not chance:
            self.both("clear")

    @invariant()
    def agree(self) -> None:
        assert (len(self.native), self.native.used_bytes) == (len(self.oracle), self.oracle.used_bytes)
        for group in range(3):
            assert np.array_equal(self.native.held(KEYS, group), self.oracle.held(KEYS, group))


def test_native_and_oracle_answer_alike() -> None:
    COUNTS.clear()
    run_state_machine_as_test(
        Pair,
        settings=settings(
            max_examples=100,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(sorted(COUNTS.items())))
    for transition in ("add", "discard", "touch", "pin", "unpin", "unpin refused", "evict_for refused", "clear"):
        assert COUNTS[transition], f"{transition} never happened"
    assert COUNTS["overflowed"]
    assert COUNTS["evicted"]


def test_order_holds_through_many_entries() -> None:
    """Far beyond one piece of memory and one size of the table: the whole order of use, compared."""
    random = np.random.default_rng(2)
    keys = random.integers(0, 256, (20_000, 32), dtype=np.uint8)
    native, oracle = Presence(10**6, 15_000), ReferencePresence(10**6, 15_000)
    for at in range(0, len(keys), 128):
        batch = keys[at : at + 128]
        for each in (native, oracle):
            each.add(batch, np.zeros(len(batch), np.uint8), np.full(len(batch), 40))
            each.touch(keys[at // 2 : at // 2 + 64], 0)
    sizes = [len(native.overflow()[1]), len(oracle.overflow()[1])]
    assert sizes == [5_000, 5_000]
    rest = [each.evict_for(10**6) for each in (native, oracle)]
    assert all(np.array_equal(a, b) for a, b in zip(*rest, strict=True))
    assert len(rest[0][1]) == 15_000
    assert any((a != b).any() for a, b in pairwise(rest[0][0][:100]))
