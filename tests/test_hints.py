"""What probes ask and what their answers do: every prefix that a tier could complete is found, and nothing else."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest

from flexkv_core.blocks import block_keys
from flexkv_core.books import make_planner
from flexkv_core.index.coverage import covered_prefix
from flexkv_core.layout import Coverage, KVGroup
from flexkv_core.planner import Planner
from flexkv_core.plans import Probe
from flexkv_core.pool import SlotPool
from flexkv_core.presence import Presence
from flexkv_core.tier_book import TierBook

ROOT = bytes(32)
ALL, WINDOW, STATE = Coverage(), Coverage.window(3), Coverage("state")
MIXES = ((ALL,), (ALL, ALL), (WINDOW,), (STATE,), (ALL, WINDOW), (ALL, STATE), (ALL, WINDOW, STATE))
SLOT = 8192


def planner_of(coverages: tuple[Coverage, ...], capacity: int | None = None) -> Planner:
    host = TierBook("cpu", "cpu", 0, "slot", 1 << 24, pool=SlotPool(1 << 24, 1 << 20, "cpu"), column=0)
    low = TierBook("low", "low", 1, "key", capacity, presence=Presence(capacity))
    planner = make_planner([host, low])
    planner.add_model(ROOT, [KVGroup(3000, coverage) for coverage in coverages])
    return planner


def path(blocks: int) -> npt.NDArray[np.uint8]:
    return block_keys(np.arange(blocks, dtype=np.int32), 1, ROOT)


class Medium:
    """A tier that holds `held`, (groups, n) bool, of a path."""

    def __init__(self, keys: npt.NDArray[np.uint8], held: npt.NDArray[np.bool_]) -> None:
        self.names = {(keys[at].tobytes(), int(group)) for group, at in np.argwhere(held)}
        self.asked: list[list[tuple[bytes, int]]] = []

    def probe(self, planner: Planner, probe: Probe, most: int) -> int:
        """Carry a probe through; returns the number of calls."""
        for calls in range(10_000):
            question = planner.hints.ask(probe, most)
            if question is None:
                return calls
            batch = question.batch
            asked = [(key.tobytes(), int(group)) for key, group in zip(batch.keys, batch.groups, strict=True)]
            assert 1 <= len(asked) <= most
            assert len(set(asked)) == len(asked)
            self.asked.append(asked)
            planner.hints.answer(probe, question, [*(name in self.names for name in asked), False].index(False))
        raise AssertionError("it asks for ever")


@pytest.mark.parametrize("coverages", MIXES, ids=str)
def test_the_longest_prefix_that_a_tier_can_complete_is_found(coverages: tuple[Coverage, ...]) -> None:
    for seed in range(60):
        dice, draw = random.Random(seed), np.random.default_rng(seed)
        blocks = dice.randint(1, 24)
        keys = path(blocks)
        held = draw.random((len(coverages), blocks)) < dice.choice((0.0, 0.5, 0.8, 0.95, 1.0))
        planner = planner_of(coverages)
        medium = Medium(keys, held)
        known = planner.hints.begin(ROOT, keys, 0, 1)
        medium.probe(planner, known, dice.choice((1, 2, 7, 128)))
        assert planner.lookup(ROOT, keys)[0] == covered_prefix(held, coverages), (seed, held)
        presence = planner.tiers[1].presence
        assert presence is not None
        for group in range(len(coverages)):
            assert not (presence.held(keys, group) & ~held[group]).any()
        asked = [name for names in medium.asked for name in names]
        assert len(asked) <= held.size + sum(len(names) for names in medium.asked[:-1])


def test_a_plain_path_takes_one_call_a_batch_and_one_more_says_where_it_ends() -> None:
    keys = path(300)
    planner = planner_of((ALL,))
    held = (np.arange(300) < 250)[None]
    assert Medium(keys, held).probe(planner, planner.hints.begin(ROOT, keys, 0, 1), 128) == 2
    assert planner.lookup(ROOT, keys)[0] == 250


def test_a_state_is_looked_for_from_the_end() -> None:
    keys = path(50)
    planner = planner_of((ALL, STATE))
    held = np.ones((2, 50), np.bool_)
    held[1] = np.isin(np.arange(50), (9, 29))
    medium = Medium(keys, held)
    medium.probe(planner, planner.hints.begin(ROOT, keys, 0, 1), 128)
    states = [name for names in medium.asked for name in names if name[1] == 1]
    assert states == [(keys[at].tobytes(), 1) for at in range(49, 28, -1)]
    assert planner.lookup(ROOT, keys)[0] == 30


def test_answers_of_a_lost_medium_of_a_reset_or_of_a_tier_that_is_away_go_nowhere() -> None:
    keys = path(4)
    for spoil in ("lose", "reset", "away"):
        planner = planner_of((ALL,))
        probe = planner.hints.begin(ROOT, keys, 0, 1)
        question = planner.hints.ask(probe, 128)
        assert question is not None
        if spoil == "lose":
            planner.lose_tier(1)
        elif spoil == "reset":
            planner.retire(ROOT)
        else:
            planner.tiers[1].available = False
        planner.hints.answer(probe, question, 4)
        presence = planner.tiers[1].presence
        assert presence is not None
        assert (len(presence), planner.tiers[1].counters.probed_blocks) == (0, 0)
        assert planner.hints.ask(probe, 128) is None


def test_a_tier_whose_capacity_we_keep_gets_only_hints_that_fit() -> None:
    keys = path(8)
    planner = planner_of((ALL,), capacity=10 * SLOT)
    tier = planner.tiers[1]
    assert tier.presence is not None
    tier.presence.add(path(20)[17:], np.zeros(3, np.uint8), np.full(3, SLOT))
    tier.reserved_bytes, tier.debris_bytes = SLOT, SLOT
    Medium(keys, np.ones((1, 8), np.bool_)).probe(planner, planner.hints.begin(ROOT, keys, 0, 1), 128)
    assert planner.lookup(ROOT, keys)[0] == 5
    assert tier.presence.used_bytes == 8 * SLOT


def test_hints_are_in_the_order_of_the_path_so_that_leaves_go_first() -> None:
    keys = path(6)
    planner = planner_of((Coverage.window(6),), capacity=6 * SLOT)
    Medium(keys, np.ones((1, 6), np.bool_)).probe(planner, planner.hints.begin(ROOT, keys, 0, 1), 128)
    presence = planner.tiers[1].presence
    assert presence is not None
    assert np.array_equal(presence.evict_for(SLOT)[0], keys[5:])
