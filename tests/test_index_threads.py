"""Who may call the index when: `match` from any thread while the owner changes it; nobody from within a call.

A deadlock does not fail a test, it hangs it: the watchdog tells where each thread stands and ends the process.
"""

from __future__ import annotations

import faulthandler
import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from index_examples import ROOT, add, keys, put

from flexkv_core.errors import StateError
from flexkv_core.index import NO_TIER
from flexkv_core.index.native import NativeIndex
from flexkv_core.policies import policy_names, register_policy

WATCHDOG_SECONDS = 240
READERS = 4
LENGTH = 24
Matched = Callable[[bool, np.ndarray, Any], None]


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


class Older:
    """A third party's policy that gives other threads their turn in the midst of a call."""

    def insert(self, now: int) -> int:
        time.sleep(0)
        return now

    def hit(self, state: int, now: int) -> int:
        time.sleep(0)
        return now

    def order(self, state: int) -> int:
        return state


class Inner:
    """A policy that calls the index that asks it."""

    index: Any = None

    def insert(self, now: int) -> int:
        if self.index is not None:
            self.index.match(ROOT, keys("ab"))
        return now

    def hit(self, state: int, now: int) -> int:
        return now

    def order(self, state: int) -> int:
        if self.index is not None:
            self.index.evict(0, 1)
        return state


for _name, _policy in (("threads-older", Older), ("threads-inner", Inner)):
    if _name not in policy_names():
        register_policy(_name, _policy)


def slots_for(path: np.ndarray, tier: int) -> np.ndarray:
    """Slots that say whose they are: of a key and a tier."""
    words = np.ascontiguousarray(path[:, 8:16]).view(np.int64).reshape(-1)
    return (words & ((1 << 38) - 1)) + tier


def check(path: np.ndarray, found: Any) -> None:
    """What is found is the path's own, and the prefix has no holes."""
    known = found.tiers.shape[1]
    assert found.blocks <= known <= len(path)
    assert (found.tiers[0, : found.blocks] != NO_TIER).all()
    for tier in range(2):
        mine = found.tiers[0] == tier
        assert (found.slots[0][mine] == slots_for(path[:known], tier)[mine]).all()


class Readers:
    """Threads that match until told to stop; their failures are raised on leaving."""

    def __init__(self, index: NativeIndex, paths: list[np.ndarray], whole: np.ndarray) -> None:
        self.matches, self.seen, self.failures = [0] * READERS, set[int](), list[BaseException]()
        self._over = threading.Event()

        def read(number: int) -> None:
            dice = random.Random(number)
            try:
                while not self._over.is_set():
                    path = dice.choice(paths)
                    check(path, index.match(ROOT, path))
                    found = index.match(ROOT, whole)
                    check(whole, found)
                    assert found.blocks in {0, len(whole)}, f"{found.blocks} of {len(whole)} blocks seen"
                    self.seen.add(found.blocks)
                    self.matches[number] += 1
            except BaseException as error:
                self.failures.append(error)

        self._threads = [threading.Thread(target=read, args=(number,)) for number in range(READERS)]

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


@pytest.mark.parametrize(
    ("policies", "steps"), [(["lru", "s3fifo"], 600), (["threads-older", "lru"], 60)], ids=["native", "python"]
)
def test_matches_see_whole_states_while_the_owner_changes(policies: list[str], steps: int) -> None:
    index = NativeIndex(2, policies)
    add(index)
    dice = random.Random(7)
    paths = [keys("".join(dice.choices("ab", weights=(5, 1), k=LENGTH))) for _ in range(12)]
    whole = keys("w" * LENGTH)  # comes and goes in one call
    with Readers(index, paths, whole) as readers:
        step = 0
        while not readers.failures and (step < steps or min(readers.matches) < 30 or len(readers.seen) < 2):
            step += 1
            path, tier = dice.choice(paths), dice.randrange(2)
            part = path[: dice.randint(1, LENGTH)]
            index.insert(ROOT, part, tier, 0, slots_for(part, tier))
            index.touch(ROOT, path)
            index.evict(tier, dice.randint(1, 20))
            index.remove(ROOT, path, tier, 0, 1, 3)
            if step % 2:
                index.remove_subtree(ROOT, whole[:1])
                index.insert(ROOT, whole, 0, 0, slots_for(whole, 0))
                index.pin(ROOT, whole, 0, 0, 0, LENGTH)
            else:
                index.unpin(ROOT, whole, 0, 0, 0, LENGTH)
                index.remove_subtree(ROOT, whole[:1])
            if step % 50 == 0:
                index.drop_tier(1)  # without the GIL
                index.copies(ROOT, 0, 0)
                index.recover(ROOT, 1, 0, *_records(paths[0]))
                index.end_recovery()


def _records(path: np.ndarray) -> tuple[np.ndarray, ...]:
    parents = np.concatenate([np.frombuffer(ROOT, np.uint8).reshape(1, 32), path[:-1]])
    return path, parents, np.arange(len(path)), slots_for(path, 1)


def test_a_policy_that_calls_its_index_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    index = NativeIndex(1, ["threads-inner"])
    add(index)
    monkeypatch.setattr(Inner, "index", index)
    assert put(index, "abc", 1, 2, 3) == [True] * 3
    index.touch(ROOT, keys("ab"))
    gone = index.evict(0, 3)
    assert gone is not None
    assert sorted(gone.slots.tolist()) == [1, 2, 3]
    assert {type(error) for error in told} == {StateError}
    assert "within" in str(told[0])


def test_a_finalizer_that_calls_the_index_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage is collected whenever something is made: within a call, too."""
    told: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    index = NativeIndex(2)
    add(index)
    put(index, "ab", 1, 2)
    ran: list[int] = []

    class Lease:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            ran.append(index.count(0))

    path, before = keys("ab"), gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(200):
            Lease()
            index.match(ROOT, path)
            index.statistics()
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert len(ran) + len(told) == 200
    assert {type(error) for error in told} <= {StateError}
    assert index.match(ROOT, path).blocks == 2


def test_an_array_that_calls_the_index_is_told_so() -> None:
    index = NativeIndex(2)
    add(index)

    class Calling(np.ndarray):
        armed = False

        def __array_finalize__(self, other: Any) -> None:
            if Calling.armed:
                index.count(0)

    spread = np.zeros((4, 32), np.uint8).view(Calling)[::2]
    Calling.armed = True
    with pytest.raises(StateError, match="within"):
        index.touch(ROOT, spread)
    Calling.armed = False
    assert put(index, "ab", 1, 2) == [True, True]


def test_a_change_that_runs_out_of_memory_is_the_last() -> None:
    """In a process of its own: a limit on memory, then inserts until one fails in the midst."""
    script = """
import resource, sys
import numpy as np
from flexkv_core.errors import StateError
from flexkv_core.index import GroupRule
from flexkv_core.index.native import NativeIndex
root, index = bytes(32), NativeIndex(3)
index.add_namespace(root, [GroupRule()])
rows = np.random.default_rng(0).integers(0, 256, (4096, 32), dtype=np.uint8)
slots = np.arange(4096)
index.insert(root, rows, 0, 0, slots)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
for number in range(1, 100_000):
    rows[:, :8] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
    try:
        index.insert(root, rows, 0, 0, slots)
    except MemoryError:
        break
else:
    sys.exit("memory never ran out")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
calls = lambda: index.match(root, rows), lambda: index.evict(0, 1), lambda: index.has_namespace(root)
for call in (index.statistics, *calls):
    try:
        call()
    except StateError as error:
        assert "memory" in str(error)
    else:
        sys.exit("an index that is torn was used")
del index
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
