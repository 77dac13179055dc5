"""Eviction policies: the order of each by example, their options, third parties' own, and what is refused."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from conftest import Install, Make
from index_examples import (
    NONE,
    ROOT,
    MakeIndex,
    all_evicted,
    evicted,
    held,
    key,
    keys,
    put,
    recover,
    three,
)

from flexkv_core import policies
from flexkv_core.errors import PolicyError, StateError
from flexkv_core.index import Index
from flexkv_core.policies import BUILT_IN, Eviction, check_policy, make_custom, policy_names, register_policy
from flexkv_core.policies.reference import MOST_USES, make_policy

Reports = Callable[[], int]


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies._registry, "_registered", {})


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Reports:
    """How many failures of a policy were told, by sys.unraisablehook or by logging."""
    hooked: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", hooked.append)
    caplog.set_level(logging.ERROR)
    return lambda: len(hooked) + len(caplog.records)


# ---------------------------------------------------------------- orders


@pytest.mark.parametrize(
    ("policy", "hits", "order"),
    [
        ("lru", "", [1, 2, 3]),
        ("lru", "ba", [3, 2, 1]),
        ("mru", "", [3, 2, 1]),
        ("mru", "a", [1, 3, 2]),
        ("fifo", "ba", [1, 2, 3]),
        ("filo", "ab", [3, 2, 1]),
        ("lfu", "", [1, 2, 3]),
        ("lfu", "aab", [3, 2, 1]),
        ("lfu", "aacb", [3, 2, 1]),
        ("lfu", "bbaacc", [2, 1, 3]),
        ("slru", "aa", [2, 3, 1]),
        ("slru", "bbaa", [3, 2, 1]),
        ("slru", "ab", [3, 1, 2]),
        ("slru", "bbbbbaac", [3, 2, 1]),
        (Eviction("slru", slru_protected_threshold=1), "acc", [2, 1, 3]),
        (Eviction("slru", slru_protected_threshold=3), "aabbbcc", [1, 3, 2]),
        ("s3fifo", "", [1, 2, 3]),
        ("s3fifo", "aab", [2, 3, 1]),
    ],
)
def test_orders(make: Make, policy: str | Eviction, hits: str, order: list[int]) -> None:
    assert three(make(policy), hits) == order


class Scattered:
    """A third party's policy whose orders come in no order: each goes to another place of a heap."""

    def insert(self, now: int) -> int:
        return now * 2_654_435_761 % (1 << 32)

    def hit(self, state: int, now: int) -> int:
        return state * 31 % (1 << 32)

    def order(self, state: int) -> int:
        return state


def test_the_order_of_many(make: Make) -> None:
    if "scattered" not in policy_names():
        register_policy("scattered", Scattered)
    index, dice, policy = make("scattered"), Random(1), Scattered()
    states: dict[str, int] = {}
    for tick in range(1, 3001):
        path = chr(200 + len(states))
        if not states or dice.random() < 0.4:
            put(index, path, len(states))
            states[path] = policy.insert(tick)
        else:
            path = dice.choice(list(states))
            index.touch(ROOT, keys(path))
            states[path] = policy.hit(states[path], tick)
    names = list(states)
    assert all_evicted(index) == sorted(range(len(names)), key=lambda number: states[names[number]])


def test_a_request_is_one_moment(make: Make) -> None:
    for policy in BUILT_IN:
        index = make(policy)
        put(index, "abcd", 1, 2, 3, 4)
        index.touch(ROOT, keys("abcd"))
        assert all_evicted(index) == [4, 3, 2, 1], policy


def test_hit_rewards_add_up(make: Make) -> None:
    index = make(Eviction("lru", hit_reward_seconds=10e-6))
    put(index, "a", 1)  # 1
    put(index, "b", 2)  # 2
    index.touch(ROOT, keys("a"))  # 3: 13
    index.touch(ROOT, keys("a"))  # 4: 23
    index.touch(ROOT, keys("b"))  # 5: 15
    index.advance(20)
    put(index, "c", 3)  # 21
    assert all_evicted(index) == [2, 3, 1]


def test_a_reward_starts_from_now_if_that_is_later(make: Make) -> None:
    index = make(Eviction("lru", hit_reward_seconds=10e-6))
    put(index, "a", 1)  # 1
    index.touch(ROOT, keys("a"))  # 2: 12
    index.advance(100)
    index.touch(ROOT, keys("a"))  # 101: 111
    index.advance(109)
    put(index, "b", 2)  # 110
    put(index, "c", 3)  # 111, as a: by key
    put(index, "d", 4)  # 112
    equal = [slot for _, slot in sorted([(key("a"), 1), (key("c"), 3)])]
    assert all_evicted(index) == [2, *equal, 4]


def test_counts_stop_at_their_limit() -> None:
    for name in ("lfu", "slru"):
        policy = make_policy(Eviction(name))
        assert policy.hit((MOST_USES - 1, 5), 6) == (MOST_USES, 6)
        assert policy.hit((MOST_USES, 6), 7) == (MOST_USES, 7)


# ---------------------------------------------------------------- names and options


def test_options_have_bounds() -> None:
    assert Eviction("lru", hit_reward_seconds=1.5).reward_ticks == 1_500_000
    for bad in (-1.0, 1e10, math.nan, math.inf):
        with pytest.raises(PolicyError, match="hit_reward_seconds"):
            Eviction("lru", hit_reward_seconds=bad)
    for threshold in (0, -1, (1 << 20) + 1):
        with pytest.raises(PolicyError, match="slru_protected_threshold"):
            Eviction("slru", slru_protected_threshold=threshold)


def test_names() -> None:
    assert policy_names() == sorted(BUILT_IN)
    assert check_policy("s3fifo") == "s3fifo"
    assert make_custom("lru") is None
    with pytest.raises(PolicyError, match="did you mean 'slru'"):
        check_policy("slruu")
    with pytest.raises(PolicyError, match="known ones are fifo, filo"):
        check_policy("7")
    with pytest.raises(PolicyError, match="not a known policy"):
        make_custom("7")


# ---------------------------------------------------------------- third parties


class Constant:
    """All copies are equal."""

    def insert(self, now: int) -> int:
        return 7

    def hit(self, state: int, now: int) -> int:
        return state

    def order(self, state: int) -> int:
        return state


class Youngest(Constant):
    """The latest first; each hit counts as four ticks less."""

    def insert(self, now: int) -> int:
        return now

    def hit(self, state: int, now: int) -> int:
        return state - 4

    def order(self, state: int) -> int:
        return -state


def test_a_registered_policy_orders(make: Make) -> None:
    register_policy("youngest", Youngest)
    assert "youngest" in policy_names()
    assert three(make("youngest"), "") == [3, 2, 1]
    assert three(make("youngest"), "c") == [2, 1, 3]
    assert three(make(Eviction("youngest")), "cb") == [1, 3, 2]


def test_equal_orders_of_a_third_party(make: Make) -> None:
    register_policy("constant", Constant)
    index = make("constant")
    put(index, "x", 9)
    put(index, "ab", 1, 2)
    put(index, "y", 8)
    last = [slot for _, slot in sorted([(key("x"), 9), (key("a"), 1), (key("y"), 8)])]
    assert all_evicted(index) == [2, *last]


def test_names_are_taken_once() -> None:
    register_policy("mine", Constant)
    for name in ("mine", *BUILT_IN):
        with pytest.raises(PolicyError, match="registered already"):
            register_policy(name, Constant)


def test_a_policy_of_a_distribution(make: Make, install_plugin: Install) -> None:
    source = """
        class Oldest:
            def insert(self, now): return now
            def hit(self, state, now): return state
            def order(self, state): return state
    """
    install_plugin("oldest", source, group="flexkv.policies", attribute=":Oldest")
    assert "oldest" in policy_names()
    assert three(make("oldest"), "a") == [1, 2, 3]
    with pytest.raises(PolicyError, match="registered already"):
        register_policy("oldest", Constant)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("raise RuntimeError('broken module')", "plugin-bad cannot be made: RuntimeError: broken module"),
        ("Made = None", "plugin-bad cannot be made: TypeError"),
        ("def Made(): raise OSError('no state')", "plugin-bad cannot be made: OSError: no state"),
        ("class Made:\n    def insert(self, now): return 0", "plugin-bad has no method hit, order"),
    ],
)
def test_distributions_that_cannot_be_used(
    make_index: MakeIndex, install_plugin: Install, source: str, told: str
) -> None:
    install_plugin("bad", source, group="flexkv.policies", attribute=":Made")
    with pytest.raises(PolicyError, match=told):
        make_index(1, ["bad"])


def test_a_factory_that_fails_is_named(make_index: MakeIndex) -> None:
    register_policy("bad", lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(PolicyError, match="'bad' cannot be made: ZeroDivisionError"):
        make_index(1, ["bad"])


def test_each_tier_has_an_instance_of_its_own(make_index: MakeIndex) -> None:
    made: list[Constant] = []

    def factory() -> Constant:
        made.append(Constant())
        return made[-1]

    register_policy("mine", factory)
    make_index(3, ["mine", "lru", "mine"])
    assert len(made) == 2
    assert made[0] is not made[1]


def test_now_is_one_for_a_request_and_grows(make: Make) -> None:
    seen: list[int] = []

    class Watch(Constant):
        def insert(self, now: int) -> int:
            seen.append(now)
            return now

        def hit(self, state: int, now: int) -> int:
            seen.append(now)
            return now

    register_policy("watch", Watch)
    index = make("watch")
    put(index, "abcd", 1, 2, 3, 4)
    assert set(seen) == {1}
    index.touch(ROOT, keys("ab"))
    assert set(seen) == {1, 2}
    index.touch(ROOT, keys("abcd"))
    assert set(seen) == {1, 2, 3}
    index.advance(1000)
    recover(index, ("x", 5))
    assert set(seen) == {1, 2, 3, 1001}
    assert seen == sorted(seen)


@pytest.mark.parametrize("wrong", [RuntimeError("fails"), "text", 1.5, None, 1 << 63, -(1 << 63) - 1])
def test_failures_count_as_nothing_and_are_told(make: Make, reports: Reports, wrong: Any) -> None:
    def fail() -> Any:
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    class InsertFails(Youngest):
        def insert(self, now: int) -> int:
            return int(now) if now != 2 else fail()

        def order(self, state: int) -> int:
            return state

    class HitFails(InsertFails):
        def insert(self, now: int) -> int:
            return now

        def hit(self, state: int, now: int) -> int:
            return fail()

    class OrderFails(HitFails):
        def hit(self, state: int, now: int) -> int:
            return state

        def order(self, state: int) -> int:
            return state - 2 if state != 1 else fail()

    for policy, order in ((InsertFails, [2, 1, 3]), (HitFails, [1, 2, 3]), (OrderFails, [])):
        register_policy(policy.__name__, policy)
        told = reports()
        if order:
            assert three(make(policy.__name__), "c" if policy is HitFails else "") == order
        else:  # orders 0 (failed), 0 and 1
            equal = [slot for _, slot in sorted([(key("a"), 1), (key("b"), 2)])]
            assert three(make(policy.__name__), "") == [*equal, 3]
        assert reports() > told, policy


def test_the_largest_integers_are_fine(make: Make, reports: Reports) -> None:
    class Large(Youngest):
        def insert(self, now: int) -> int:
            return {1: (1 << 63) - 1, 2: -(1 << 63)}.get(now, 0)

        def order(self, state: int) -> int:
            return state

    register_policy("large", Large)
    assert three(make("large"), "") == [2, 3, 1]
    assert reports() == 0


def test_calls_from_within_are_refused(make: Make, reports: Reports) -> None:
    refused: list[Exception] = []
    holder: list[Index] = []

    class Curious(Constant):
        def insert(self, now: int) -> int:
            index = holder[0]
            calls: list[Callable[[], object]] = [
                lambda: index.count(0),
                lambda: index.match(ROOT, keys("a")),
                lambda: index.evict(0, 1),
                lambda: index.touch(ROOT, keys("a")),
                lambda: put(index, "zzz", 5),
                index.statistics,
                lambda: index.has_namespace(ROOT),
                lambda: index.drop_tier(0),
            ]
            for call in calls:
                try:
                    call()
                except Exception as error:
                    refused.append(error)
            index.advance(99)  # not caught here: counts as a failure
            return 5

    register_policy("curious", Curious)
    index = make("curious")
    holder.append(index)
    assert put(index, "ab", 1, 2) == [True, True]
    assert {type(error) for error in refused} == {StateError}
    assert len(refused) % 8 == 0
    assert reports() > 0
    assert held(index, "abc") == [1, 2, NONE]
    assert evicted(index, 2) == [2, 1]
