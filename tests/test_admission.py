"""Admission to lower tiers: what `second_touch` remembers, third parties' rules, and that no block goes in alone."""

from __future__ import annotations

import logging
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from helpers import Engine, prompt, stack
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import nothing_left
from test_planner import chain

from flexkv_core import policies
from flexkv_core._native import TouchSketch
from flexkv_core.errors import PolicyError, StackConfigError
from flexkv_core.index.reference import ReferenceIndex
from flexkv_core.layout import Coverage, KVGroup
from flexkv_core.manager import KVCacheManager
from flexkv_core.planner import Planner
from flexkv_core.plans import Move
from flexkv_core.policies import admission, make_custom, register_policy
from flexkv_core.policies.admission import (
    LARGEST_WINDOW,
    SMALLEST_WINDOW,
    GuardedAdmission,
    SecondTouch,
    admission_names,
    check_admission,
    make_admission,
    register_admission,
)
from flexkv_core.pool import SlotPool
from flexkv_core.presence import Presence
from flexkv_core.tier_book import TierBook

PAGE = 4096
Keys = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


def random_keys(count: int, seed: int = 0) -> Keys:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


def touch(sketch: TouchSketch, keys: Keys, group: int = 0) -> Mask:
    seen = np.empty(len(keys), np.bool_)
    sketch.touch(keys, group, seen)
    return seen


# ---------------------------------------------------------------- the sketch


@given(
    st.integers(1, 40),
    st.lists(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 1)), min_size=1, max_size=30), max_size=20),
)
@settings(max_examples=300, deadline=None)
def test_what_was_offered_within_the_window_is_known(window: int, batches: list[list[tuple[int, int]]]) -> None:
    """Fewer than `window` other blocks since: no false negative, however the batches are cut."""
    sketch, keys = TouchSketch(window), random_keys(61)
    history: list[tuple[int, int]] = []
    for batch in batches:
        for block in batch:  # a call has one group
            seen = bool(touch(sketch, keys[block[0] : block[0] + 1], block[1])[0])
            if block in history:
                since = history[len(history) - history[::-1].index(block) :]
                if len(set(since)) < window:
                    assert seen
            history.append(block)


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 20), st.integers(1, 9))
def test_a_batch_is_the_same_as_its_blocks_one_by_one(order: list[int], window: int, cut: int) -> None:
    keys = random_keys(31)[order]
    whole, single = TouchSketch(window), TouchSketch(window)
    parts = [touch(whole, keys[at : at + cut]) for at in range(0, len(keys), cut)]
    assert np.concatenate([np.empty(0, np.bool_), *parts]).tolist() == [
        bool(touch(single, keys[at : at + 1])[0]) for at in range(len(keys))
    ]


def test_few_new_blocks_are_taken_for_known_ones() -> None:
    """100,000 random keys, both filters full most of the time: at most 0.2 % (the sum that the docstring gives)."""
    sketch = TouchSketch(5_000)
    touch(sketch, random_keys(10_000, seed=1))
    wrong = int(touch(sketch, random_keys(100_000, seed=2)).sum())
    assert 0 < wrong <= 200  # 0: the filters are not full, and nothing was tested
    assert touch(TouchSketch(100_000), random_keys(100_000, seed=3)).sum() <= 200


def test_what_was_offered_long_ago_is_forgotten() -> None:
    sketch, keys = TouchSketch(1_000), random_keys(1_000)
    touch(sketch, keys)
    touch(sketch, random_keys(2_100, seed=1))
    assert touch(sketch, keys).sum() <= 10


def test_memory_is_bounded() -> None:
    for window in (1, 1_000, 1 << 20):
        sketch = TouchSketch(window)
        before = sketch.memory_bytes
        assert before <= 4 * window + 4 * 64
        touch(sketch, random_keys(min(5 * window, 100_000)))
        assert sketch.memory_bytes == before


def test_groups_do_not_mix() -> None:
    sketch, keys = TouchSketch(1 << 12), random_keys(1_000)
    touch(sketch, keys, 0)
    assert touch(sketch, keys, 1).sum() <= 5
    assert touch(sketch, keys, 0).all()


def test_the_sketch_refuses_what_it_cannot_read() -> None:
    for window in (0, 1 << 40):
        with pytest.raises(ValueError, match=f"window {window}: must be from 1 to"):
            TouchSketch(window)
    sketch, keys = TouchSketch(10), random_keys(3)
    with pytest.raises(ValueError, match="one entry a key"):
        sketch.touch(keys, 0, np.empty(2, np.bool_))
    with pytest.raises(ValueError, match="group"):
        sketch.touch(keys, 255, np.empty(3, np.bool_))
    with pytest.raises(TypeError):
        sketch.touch(keys[:, :31].copy(), 0, np.empty(3, np.bool_))
    with pytest.raises(TypeError):
        sketch.touch(keys[:, ::-1], 0, np.empty(3, np.bool_))


def test_the_window_follows_the_tiers_capacity() -> None:
    rule = SecondTouch()
    rule.set_capacity(5_000)
    assert rule.window == 5_000
    keys = random_keys(10)
    rule.admit(keys, 0)
    rule.set_capacity(4_000)  # never smaller, so nothing is lost
    assert rule.window == 5_000
    assert rule.admit(keys, 0).all()
    rule.set_capacity(1 << 50)
    assert rule.window == LARGEST_WINDOW
    assert rule.memory_bytes <= 64 << 20
    small = SecondTouch()
    small.set_capacity(1)
    assert small.window == SMALLEST_WINDOW


# ---------------------------------------------------------------- third parties

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a distribution with one entry point, on sys.path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    modules: list[str] = []

    def install(group: str, name: str, source: str, distribution: str = "their-rule") -> None:
        module = distribution.replace("-", "_")
        modules.append(module)
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        info = site / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:Made\n")

    yield install
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, admission.Admission], None]:
    """Registers a rule for the length of a test."""
    monkeypatch.setattr(admission._registry, "_registered", {})
    return lambda name, rule: register_admission(name, lambda: rule)


class Picky:
    """Refuses the blocks with these keys; remembers what it was asked."""

    def __init__(self, *refused: bytes) -> None:
        self.refused = set(refused)
        self.calls: list[tuple[int, int]] = []
        self.capacity: int | None = None

    def set_capacity(self, blocks: int) -> None:
        self.capacity = blocks

    def admit(self, keys: Keys, group: int) -> Mask:
        self.calls.append((len(keys), group))
        return np.array([key.tobytes() not in self.refused for key in keys], np.bool_)


def test_names_and_their_errors(registered: Callable[[str, admission.Admission], None]) -> None:
    assert admission_names() == ["all", "second_touch"]
    assert make_admission("all") is None
    registered("picky", Picky())
    assert check_admission("picky") == "picky"
    with pytest.raises(
        PolicyError, match="admission 'second_tuoch' is not a known policy: did you mean 'second_touch'"
    ):
        check_admission("second_tuoch")
    with pytest.raises(PolicyError, match="known ones are all, picky, second_touch"):
        check_admission("zzz")
    for taken in ("all", "second_touch", "picky"):
        with pytest.raises(PolicyError, match=f"'{taken}' is registered already: choose another name"):
            register_admission(taken, Picky)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise SystemError('at import')", "of their-rule cannot be made: SystemError: at import"),
        ("x = 1", "of their-rule cannot be made: AttributeError"),
        ("def Made(): return 1 / 0", "of their-rule cannot be made: ZeroDivisionError"),
        ("class Made: pass", "of their-rule has no method admit: see flexkv_core.policies.admission.Admission"),
    ],
)
def test_a_broken_distribution_is_named(install: Install, source: str, says: str) -> None:
    install("flexkv.admissions", "theirs", source)
    assert "theirs" in admission_names()
    with pytest.raises(PolicyError, match=f"admission policy 'theirs' {says}"):
        make_admission("theirs")
    mapping = {"tiers": [{"backend": "cpu", "capacity": "1MiB"}, {"backend": "directory", "root": "x"}]}
    mapping["tiers"][1]["admission"] = "theirs"
    with pytest.raises(StackConfigError, match=f"tier directory: admission policy 'theirs' {says}"):
        KVCacheManager.open(mapping)


def test_two_distributions_of_one_rule_are_refused(install: Install) -> None:
    source = "class Made:\n    def admit(self, keys, group): return keys[:, 0] > 0"
    install("flexkv.admissions", "theirs", source)
    assert make_admission("theirs") is not None
    install("flexkv.admissions", "theirs", source, distribution="other-rule")
    with pytest.raises(PolicyError, match="provided by other-rule and their-rule: uninstall one of them"):
        make_admission("theirs")


def test_eviction_has_the_same_registry(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies._registry, "_registered", {})
    install("flexkv.policies", "mine", "class Made:\n    def insert(self, now): return now")
    assert "mine" in policies.policy_names()
    assert "mine" not in admission_names()
    with pytest.raises(PolicyError, match="eviction policy 'mine' of their-rule has no method hit, order"):
        make_custom("mine")
    with pytest.raises(PolicyError, match="eviction policy 'lru' is registered already"):
        register_policy("lru", Picky)  # type: ignore[arg-type]
    assert make_custom("s3fifo") is None


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda keys: 1 / 0, "raised ZeroDivisionError"),
        (lambda keys: np.ones(len(keys) + 1, np.bool_), r"returned bool \(4,\): return a bool array \(3,\)"),
        (lambda keys: np.ones(len(keys), np.int64), "returned int64"),
        (lambda keys: [True] * len(keys), "returned list"),
    ],
)
def test_a_mistaken_rule_refuses_and_is_reported_once(
    answer: Callable[[Keys], Mask], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Mistaken:
        def admit(self, keys: Keys, group: int) -> Mask:
            return answer(keys)

    rule = GuardedAdmission("theirs", Mistaken())
    with caplog.at_level(logging.ERROR, "flexkv.admission"):
        for _ in range(3):
            assert rule.admit(random_keys(3), 0).tolist() == [False] * 3
    assert len(caplog.records) == 1
    assert re.search(says, caplog.records[0].getMessage())


# ---------------------------------------------------------------- what a tier takes

ROOT = b"r" * 32
GROUPS = (KVGroup(PAGE), KVGroup(PAGE, Coverage.window(2)))
SLOT = 2 * PAGE


def planner_with(rule: admission.Admission, groups: tuple[KVGroup, ...] = GROUPS) -> Planner:
    """Host memory over a slot-addressed tier with the rule and a key-addressed one that takes all."""
    books = [
        TierBook("cpu", "cpu", 0, "slot", 64 * SLOT, SlotPool(64 * SLOT, 4 * SLOT), column=0),
        TierBook("ssd", "ssd", 1, "slot", 64 * SLOT, SlotPool(64 * SLOT, 4 * SLOT), column=1),
        TierBook("dir", "dir", 2, "key", None, presence=Presence(None)),
    ]
    books[1].admission = GuardedAdmission("test", rule)
    planner = Planner(books, ReferenceIndex(2))
    planner.add_model(ROOT, groups)
    return planner


def store(planner: Planner, keys: Keys, *, land: bool = True) -> dict[int, set[tuple[int, int]]]:
    """Store a path; returns by tier the (group, position) pairs that are written, and lets them succeed."""
    groups = len(planner.groups(ROOT))
    plan = planner.begin_store(ROOT, keys, np.ones((groups, len(keys)), np.bool_))
    return written(planner, planner.commit_store(plan), land=land)


def hit(planner: Planner, keys: Keys, *, counted: bool = True) -> dict[int, set[tuple[int, int]]]:
    """Fetch a path that is in host memory; returns what is written."""
    fetch = planner.begin_fetch(ROOT, keys)
    fetch.counted = counted
    planner.close_fetch(fetch)
    found = written(planner, planner.sink_hits(fetch))
    planner.release(fetch)
    return found


def written(planner: Planner, moves: list[Move], *, land: bool = True) -> dict[int, set[tuple[int, int]]]:
    found: dict[int, set[tuple[int, int]]] = {1: set(), 2: set()}
    for move in moves:
        found[move.tier] |= {(int(g), int(p)) for g, p in zip(move.groups, move.positions, strict=True)}
        if land:
            write, _ = planner.down.start_write(move)
            assert write is not None
            planner.down.finish_write(write, np.ones(len(write), np.bool_))
    return found


def all_of(groups: int, blocks: int) -> set[tuple[int, int]]:
    return {(group, at) for group in range(groups) for at in range(blocks)}


def test_nothing_is_taken_behind_a_refused_block() -> None:
    keys = chain(ROOT, (0, 1, 0, 1, 0))
    rule = Picky(keys[2].tobytes())
    planner = planner_with(rule)
    assert rule.capacity == 64
    taken = store(planner, keys)
    assert taken[1] == all_of(2, 2)
    assert taken[2] == all_of(2, 5)
    assert rule.calls == [(5, 0), (5, 1)]  # one call a batch
    assert planner.tiers[1].counters.rejected_blocks == 6
    assert planner.tiers[2].counters.rejected_blocks == 0
    assert planner.tiers[1].figures()["rejected_blocks"] == 6
    # once it is admitted, so are those behind it, whose ancestors are held
    rule.refused.clear()
    assert hit(planner, keys) == {1: {(0, 2), (0, 3), (0, 4), (1, 3), (1, 4)}, 2: set()}, "a window needs its last two"


def test_what_is_queued_counts_as_there() -> None:
    keys = chain(ROOT, (0, 1, 0, 1))
    rule = Picky()
    planner = planner_with(rule)
    assert store(planner, keys[:2], land=False)[1] == all_of(2, 2)
    assert store(planner, keys, land=False)[1] == all_of(2, 4) - all_of(2, 2)
    assert rule.calls == [(2, 0), (2, 1), (2, 0), (2, 1)]


def test_a_refused_block_of_a_window_bars_nothing() -> None:
    class OnlyAll:
        def admit(self, keys: Keys, group: int) -> Mask:
            return np.full(len(keys), group == 0, np.bool_)

    planner = planner_with(OnlyAll())
    assert store(planner, chain(ROOT, (0, 1, 0)))[1] == {(0, at) for at in range(3)}


def test_a_dropped_ancestor_bars_what_follows() -> None:
    """Its write was given up, so it is neither held nor queued; the next store offers it again."""
    keys = chain(ROOT, (0, 1, 0, 1))
    rule = Picky()
    planner = planner_with(rule)
    for move in planner.commit_store(planner.begin_store(ROOT, keys[:1], np.ones((2, 1), np.bool_))):
        planner.down.drop_write(move)
    rule.refused = {keys[0].tobytes()}
    assert store(planner, keys)[1] == set()


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.integers(0, 1 << 12)), max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_every_block_of_a_tier_can_be_found_there(requests: list[tuple[list[int], int]]) -> None:
    """Whatever a rule refuses: a tier that takes part in nothing else holds whole prefixes only."""

    class Noise:
        bits = 0

        def admit(self, keys: Keys, group: int) -> Mask:
            return np.array([self.bits >> (i + 6 * group) & 1 for i in range(len(keys))], np.bool_)

    rule = Noise()
    planner = planner_with(rule)
    for path, bits in requests:
        rule.bits = bits
        keys = chain(ROOT, tuple(path))
        taken = store(planner, keys)[1]
        held = planner.index.residency(ROOT, keys, 1, 0) >= 0
        assert held.tolist() == sorted(held.tolist(), reverse=True)
        windows = planner.index.residency(ROOT, keys, 1, 1) >= 0
        assert not (windows & ~held).any()
        counters = planner.tiers[1].counters
        assert counters.stored_blocks == planner.index.count(1)
        assert all(at < held.sum() for _, at in taken)


def test_second_touch_takes_the_second_time() -> None:
    planner = planner_with(SecondTouch(), GROUPS[:1])
    keys = chain(ROOT, (0, 1, 0, 1))
    assert store(planner, keys[:3])[1] == set()
    assert planner.tiers[1].counters.rejected_blocks == 3
    assert hit(planner, keys[:3])[1] == all_of(1, 3)
    assert store(planner, keys)[1] == set()
    assert hit(planner, keys)[1] == {(0, 3)}
    assert hit(planner, keys)[1] == set()
    assert planner.tiers[1].counters.rejected_blocks == 4


def test_a_growing_request_touches_its_blocks_once() -> None:
    """Regression: each of its stores counted all that it had stored before, so its second block let the first in."""
    planner = planner_with(SecondTouch(), GROUPS[:1])
    keys = chain(ROOT, (0, 1, 0, 1, 0))
    for blocks in (1, 2, 3, 4, 5, 5, 5):
        assert store(planner, keys[:blocks])[1] == set()
    assert planner.tiers[1].counters.rejected_blocks == 5
    overlapping = [planner.begin_store(ROOT, path, np.ones((1, len(path)), np.bool_)) for path in (keys, keys)]
    assert [written(planner, planner.commit_store(plan))[1] for plan in overlapping] == [set(), set()]


def test_stores_that_overlap_touch_once() -> None:
    """The second one began before the first was committed, hence has copied the same blocks."""
    planner = planner_with(SecondTouch(), GROUPS[:1])
    keys = chain(ROOT, (0, 1, 0, 1, 0))
    plans = [planner.begin_store(ROOT, keys[:n], np.ones((1, n), np.bool_)) for n in (3, 5)]
    assert [written(planner, planner.commit_store(plan))[1] for plan in plans] == [set(), set()]
    assert planner.tiers[1].counters.rejected_blocks == 5


def test_a_block_that_was_evicted_and_computed_again_is_touched_again() -> None:
    planner = planner_with(SecondTouch(), GROUPS[:1])
    keys = chain(ROOT, (0, 1, 0))
    assert store(planner, keys)[1] == set()
    host = planner.tiers[0]
    assert planner._ledger._evict(host, 3, 0)
    planner.lose_tier(2)  # which had it too
    assert store(planner, keys)[1] == all_of(1, 3)


def test_a_prefetch_is_no_touch() -> None:
    planner = planner_with(SecondTouch(), GROUPS[:1])
    keys = chain(ROOT, (0, 1, 0))
    store(planner, keys)
    for _ in range(3):
        assert hit(planner, keys, counted=False) == {1: set(), 2: set()}
    assert hit(planner, keys)[1] == all_of(1, 3)


def test_a_hit_writes_nothing_to_tiers_that_take_all() -> None:
    """Those have been offered it by the store; what they lack they have lost."""
    planner = planner_with(SecondTouch(), GROUPS[:1])
    keys = chain(ROOT, (0, 1, 0))
    store(planner, keys)
    planner.lose_tier(2)
    assert hit(planner, keys) == {1: all_of(1, 3), 2: set()}


def test_a_hit_of_a_namespace_that_was_reset_writes_nothing() -> None:
    planner = planner_with(SecondTouch(), GROUPS[:1])
    keys = chain(ROOT, (0, 1, 0))
    store(planner, keys)
    fetch = planner.begin_fetch(ROOT, keys)
    planner.retire(ROOT)
    planner.close_fetch(fetch)
    assert planner.sink_hits(fetch) == []
    planner.release(fetch)


def test_second_touch_with_bytes(tmp_path: Path) -> None:
    with KVCacheManager.open(stack(tmp_path, isolation="none", admission="second_touch")) as manager:
        engine = Engine(manager)
        keys = engine.keys(prompt(1, 8))
        figures = []
        for used in (False, False, True, True):
            for blocks in (2, 4, 8):
                engine.store(keys[:blocks])
            if used:
                assert engine.load(keys)[:2] == (8, 0)
            assert manager.drain(10)
            figures.append(manager.stats()["tiers"]["directory"])
        assert [tier["stored_blocks"] for tier in figures] == [0, 0, 8, 8]
        assert [tier["rejected_blocks"] for tier in figures] == [8, 8, 8, 8]
        assert engine.load(keys)[:2] == (8, 0)
        nothing_left(manager)
