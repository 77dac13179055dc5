"""A copy that can never be read is given up, while an outage of its tier forgets nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gates import GATES, PATIENCE_S, Gate, until
from hypothesis import given
from hypothesis import strategies as st
from rig import PLAIN_SLOT, Keys, Rig, gate_stack, gate_tier, nothing_left, own, settled, wait_ready

from flexkv_core import failures
from flexkv_core.failures import FAILURES, MOST_BLOCKS, RepeatedFailures
from flexkv_core.manager import KVCacheManager

HOST = 16
GOOD, BAD, NEITHER = "good", "bad", "neither"


def key(number: int) -> Keys:
    return np.frombuffer(number.to_bytes(32, "big"), np.uint8)


def note(memory: RepeatedFailures, call: list[tuple[int, str]], group: int = 0) -> list[int]:
    """One call of (block, what became of it); returns the blocks that are given up."""
    keys = np.stack([key(number) for number, _ in call])
    good, bad = (np.array([became == what for _, became in call]) for what in (GOOD, BAD))
    given_up = memory.note(keys, np.full(len(call), group, np.uint8), good, bad)
    return [number for (number, _), gone in zip(call, given_up, strict=True) if gone]


# ---------------------------------------------------------------- the memory


def test_three_failures_in_a_row_beside_blocks_that_are_read() -> None:
    memory = RepeatedFailures()
    for _ in range(2):
        assert note(memory, [(1, GOOD), (7, BAD)]) == []
    assert note(memory, [(1, GOOD), (7, BAD)]) == [7]
    assert len(memory) == 0
    assert note(memory, [(1, GOOD), (7, BAD)]) == [], "counted anew"


def test_the_others_may_be_read_by_other_calls() -> None:
    """The one before and the one after; so the read that is given up is the one after the last that counts."""
    memory = RepeatedFailures()
    note(memory, [(1, GOOD)])
    for _ in range(FAILURES):
        assert note(memory, [(7, BAD)]) == []
        assert note(memory, [(1, GOOD)]) == []
    assert note(memory, [(7, BAD)]) == [7]


@pytest.mark.parametrize("between", [GOOD, NEITHER])
def test_any_other_answer_ends_the_row(between: str) -> None:
    memory = RepeatedFailures()
    for _ in range(10):
        for _ in range(FAILURES - 1):
            assert note(memory, [(7, BAD), (1, GOOD)]) == []
        note(memory, [(7, between), (1, GOOD)])
        assert len(memory) == 0


@pytest.mark.parametrize("calls", [2, 3, 100])
def test_an_outage_does_not_count_however_often_it_comes(calls: int) -> None:
    memory = RepeatedFailures()
    for _ in range(10):
        note(memory, [(99, GOOD)])
        for _ in range(calls):
            assert note(memory, [(number, BAD) for number in range(20)]) == []
    note(memory, [(99, GOOD)])
    assert len(memory) == 0


def test_groups_do_not_mix() -> None:
    memory = RepeatedFailures()
    for group in (0, 1, 2):
        assert note(memory, [(7, BAD), (1, GOOD)], group) == []
    assert len(memory) == 3


def test_it_is_bounded_and_what_failed_longest_ago_gives_way() -> None:
    memory = RepeatedFailures()
    for first in range(0, 3 * MOST_BLOCKS, 128):
        note(memory, [(1 << 40, GOOD), *((number, BAD) for number in range(first, first + 128))])
    assert len(memory) == MOST_BLOCKS
    assert len(memory._known) == MOST_BLOCKS
    memory.clear()
    assert len(memory) == len(memory._known) == 0


def test_one_that_fails_again_stays() -> None:
    memory = RepeatedFailures()
    note(memory, [(1, GOOD), (7, BAD)])
    note(memory, [(1, GOOD), *((number, BAD) for number in range(100, 100 + MOST_BLOCKS - 1))])
    note(memory, [(1, GOOD), (7, BAD)])
    note(memory, [(1, GOOD), *((number, BAD) for number in range(10_000, 10_100))])
    assert note(memory, [(1, GOOD), (7, BAD)]) == [7]


answers = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([GOOD, BAD, BAD, NEITHER])), min_size=1, max_size=6)


@given(st.lists(answers.map(lambda call: list(dict(call).items())), max_size=40), st.integers(1, 4))
def test_it_does_what_the_rule_says(calls: list[list[tuple[int, str]]], most: int) -> None:
    """By another way: at each failure from the whole history. The bound is out of reach, then within."""
    memory = RepeatedFailures()
    well = [any(became == GOOD for _, became in call) for call in calls]
    since = dict[int, int]()  # block -> the call after which it is counted
    for now, call in enumerate(calls):
        expected = []
        for number, became in call:
            if became == BAD:
                count = 0
                for at in range(since.get(number, 0), now + 1):
                    isolated = 0 < at < now and well[at - 1] and well[at + 1]
                    count += dict(calls[at]).get(number) == BAD and (well[at] or isolated)
                if count < FAILURES:
                    continue
                expected.append(number)
            since[number] = now + 1
        assert note(memory, call) == expected
        assert len(memory._known) == len(memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failures, "MOST_BLOCKS", most)
        small = RepeatedFailures()
        for call in calls:
            note(small, call)
            assert len(small) == len(small._known) <= most


# ---------------------------------------------------------------- through the manager


def opened(**tier: Any) -> KVCacheManager:
    manager = KVCacheManager.open(gate_stack(HOST, gate_tier(max_batch_blocks=32, **tier)))
    wait_ready(manager)
    return manager


@pytest.fixture(params=["key", "key with a capacity", "slot"])
def manager(request: pytest.FixtureRequest, gates: None) -> Iterator[KVCacheManager]:
    more: dict[str, Any] = {
        "key": {},
        "key with a capacity": {"capacity": 256 * PLAIN_SLOT},
        "slot": {"backend": "slotgate", "capacity": 256 * PLAIN_SLOT},
    }[request.param]
    with opened(**more) as manager:
        yield manager
        nothing_left(manager)


def sunk(rig: Rig, seed: int, blocks: int = 4) -> Keys:
    """A prompt that only the lower tier holds."""
    keys = rig.keys(seed, blocks)
    rig.store(keys)
    rig.evict_host(HOST)
    assert rig.found(keys) == (blocks, 0)
    return keys


def fails(rig: Rig, keys: Keys, good: int) -> None:
    """Fetch, and have it pushed out again."""
    fetch = rig.fetch(keys)
    assert fetch.wait(PATIENCE_S)
    assert fetch.ready == good
    fetch.release()
    rig.evict_host(HOST)


def figures(manager: KVCacheManager) -> dict[str, Any]:
    found: dict[str, Any] = settled(manager)["tiers"]["gate"]
    return found


def times_read(gate: Gate, block: Any) -> int:
    return gate.blocks("read").count(block.tobytes())


def test_a_copy_that_cannot_be_read_is_given_up_and_stored_again(manager: KVCacheManager) -> None:
    rig, gate = Rig(manager), GATES["gate"]
    keys = sunk(rig, 1)
    gate.unreadable = {keys[2].tobytes()}
    used = figures(manager)["used_bytes"]
    for _ in range(FAILURES):
        assert rig.found(keys)[0] == 4
        fails(rig, keys, 2)
    assert rig.found(keys)[0] == 2, "beside blocks of the same call, which were read"
    for _ in range(5):
        fails(rig, keys, 2)
    assert times_read(gate, keys[2]) == FAILURES
    found = figures(manager)
    assert (found["given_up_blocks"], found["failed_blocks"], found["missing_blocks"]) == (1, FAILURES, 0)
    assert found["used_bytes"] == used - PLAIN_SLOT
    if manager._books[1].presence is not None:
        assert ((keys[2].tobytes(), 0) in gate.medium) == (manager._books[1].capacity_bytes is None)
    gate.unreadable = set()  # what is written is on another place of the medium
    assert rig.store(keys) == 4
    rig.evict_host(HOST)
    assert rig.load(keys) == (4, 0)
    assert figures(manager)["used_bytes"] == used


def test_one_that_is_read_in_between_stays(manager: KVCacheManager) -> None:
    rig, gate = Rig(manager), GATES["gate"]
    keys = sunk(rig, 1)
    for _ in range(4):
        gate.unreadable = {keys[2].tobytes()}
        for _ in range(FAILURES - 1):
            fails(rig, keys, 2)
        gate.unreadable = set()
        fails(rig, keys, 4)
    assert figures(manager)["given_up_blocks"] == 0


def test_an_outage_forgets_nothing(gates: None) -> None:
    with opened(breaker={"failures": 5, "backoff_s": 0.01, "backoff_max_s": 0.01}) as manager:
        rig, gate = Rig(manager), GATES["gate"]
        prompts = [sunk(rig, seed) for seed in (1, 2, 3)]
        for turn in range(6):
            gate.failing = {"read"}
            for _ in range(4):
                for keys in prompts:
                    fetch = rig.fetch(keys)
                    assert fetch.wait(PATIENCE_S)
                    assert fetch.ready == 0
                    fetch.release()
            gate.failing = set()
            until(lambda keys=prompts[turn % 3]: rig.load(keys) == (4, 0))  # when the breaker lets one through
            rig.evict_host(HOST)
        for keys in prompts:
            assert rig.load(keys) == (4, 0)
        found = figures(manager)
        assert (found["given_up_blocks"], found["breaker"]["opened"] > 0) == (0, True)


def test_a_tier_that_goes_away_under_its_calls_forgets_nothing(gates: None) -> None:
    with opened() as manager:
        rig, gate = Rig(manager), GATES["gate"]
        keys, other = sunk(rig, 1), sunk(rig, 2)
        link = manager._scheduler.queues()[1].link
        for _ in range(2 * FAILURES):
            gate.shut("read")
            fetch = rig.fetch(keys)
            until(lambda: own(keys)[0] in gate.blocks("read"))
            manager._scheduler.ask(setattr, link, "state", "backoff")
            gate.failing = {"read"}
            gate.open("read")
            assert fetch.wait(PATIENCE_S)
            assert fetch.ready == 0
            fetch.release()
            gate.failing, gate.calls = set(), []
            manager._scheduler.ask(setattr, link, "state", "ready")
            manager._scheduler.ask(manager._scheduler.on_link_state, 1, link)
            fails(rig, other, 4)
        assert rig.load(keys) == (4, 0)
        assert figures(manager)["given_up_blocks"] == 0
