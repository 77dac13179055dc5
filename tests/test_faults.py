"""Each fault around the real directory backend, in a real tier process, below a real manager.

Whatever is wrong with storage: it is noticed and counted, it never raises into the caller, no wrong byte reaches a
device, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flexkv_backend_directory import DirectoryBackend, DirectoryConfig
from helpers import Engine, prompt, stack
from leaks import no_leaks, nothing_held

from flexkv_core.backend import Batch, OpenContext, Status, SupportsDelete, SupportsList, SupportsProbe
from flexkv_core.config import load_stack
from flexkv_core.errors import StackConfigError
from flexkv_core.manager import KVCacheManager
from flexkv_core.testing import FaultyBackend, wrap

SEED = int(os.environ.get("FLEXKV_SEED", random.SystemRandom().randrange(1 << 32)))
SIZE = 8192
PROMPTS, BLOCKS = 6, 8
NEVER_OPENS = {"failures": 10_000}

Figures = dict[str, Any]
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Figures], bool]]] = {
    # name: the faults, the tier's options, what must be seen of them in the tier's figures
    "error in read": ({"error": 1.0, "operations": ["read"]}, {}, lambda f: f["failed_blocks"] > 0),
    "error in write": ({"error": 1.0, "operations": ["write"]}, {}, lambda f: f["failed_blocks"] > 0),
    "error now and then": ({"error": 0.3}, {}, lambda f: f["failed_blocks"] > 0),
    "error in probe and list": ({"error": 1.0, "operations": ["probe", "list"]}, {}, lambda f: f["hit_blocks"] > 0),
    "delay": (
        {"delay": 1.0, "delay_s": 0.05, "operations": ["read"]},
        {"breaker": {"failures": 2, "slow_s": 0.01}},
        lambda f: f["breaker"]["opened"] > 0 and "took" in f["breaker"]["last_trouble"],
    ),
    "rate": (
        {"rate": 400_000, "operations": ["read"]},
        {"breaker": {"failures": 2, "slow_s": 0.01}},
        lambda f: f["breaker"]["opened"] > 0 and "took" in f["breaker"]["last_trouble"],
    ),
    "hang in read": (
        {"hang": 1.0, "operations": ["read"]},
        {"deadline_s": 0.3},
        lambda f: f["restarts"] > 0 and f["failed_blocks"] > 0,
    ),
    "hang in write": (
        {"hang": 1.0, "operations": ["write"], "after": 2},
        {"deadline_s": 0.3},
        lambda f: f["restarts"] > 0,
    ),
    "crash": ({"crash": 1.0, "operations": ["read"]}, {}, lambda f: f["restarts"] > 0 and f["failed_blocks"] > 0),
    "duplicate": (
        {"duplicate": 1.0},
        {},
        lambda f: f["unexpected_answers"] > 0 and f["hit_blocks"] > 0 and f["restarts"] == 0,
    ),
    "miscount": ({"miscount": 1.0, "operations": ["read"]}, {}, lambda f: f["failed_blocks"] > 0),
    "corrupt": ({"corrupt": 0.5}, {}, lambda f: f["corrupt_blocks"] > 0),
    "short": ({"short": 1.0}, {}, lambda f: f["corrupt_blocks"] > 0),
    "lost": ({"lost": 0.5}, {}, lambda f: f["missing_blocks"] > 0),
    "short write": ({"short_write": 0.5}, {}, lambda f: f["failed_blocks"] > 0),
    "all at once": (
        {"error": 0.1, "duplicate": 0.3, "miscount": 0.1, "corrupt": 0.1, "short": 0.1, "lost": 0.1, "crash": 0.05},
        {},
        lambda f: f["failed_blocks"] + f["corrupt_blocks"] + f["missing_blocks"] + f["dropped_blocks"] > 0,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed_and_no_wrong_byte_comes_back(name: str, tmp_path: Path) -> None:
    faults, options, seen = FAULTS[name]
    print(f"FLEXKV_SEED={SEED}")
    wrong = 0
    options = {"breaker": NEVER_OPENS, "faults": {"seed": SEED, **faults}, **options}
    with no_leaks(), KVCacheManager.open(stack(tmp_path, host_blocks=16, **options)) as manager:
        engine = Engine(manager)
        prompts = [engine.keys(prompt(number, BLOCKS)) for number in range(PROMPTS)]
        deadline = time.monotonic() + 20
        figures: Figures = {}
        while not (figures and seen(figures)) and time.monotonic() < deadline:  # small odds, a tier that restarts
            for keys in prompts:
                engine.store(keys)
                manager.drain(2)
            for keys in prompts:
                wrong += engine.load(keys, deadline_s=2.0)[1]
            time.sleep(0.05)
            figures = manager.stats()["tiers"]["directory"]
        assert wrong == 0
        assert seen(figures), figures
        nothing_held(manager)


# ---------------------------------------------------------------- the decorator by itself


class Medium:
    """A faulty directory without a core: a host region of a few blocks."""

    def __init__(self, root: Path, **faults: Any) -> None:
        self.host = bytearray(np.random.default_rng(0).integers(0, 256, 16 * SIZE, dtype=np.uint8).tobytes())
        self.backend: Any = wrap(DirectoryBackend(DirectoryConfig(root=root)), {"seed": SEED, **faults})
        self.backend.open(OpenContext(memoryview(self.host), (SIZE,), None, logging.getLogger("test")))

    def batch(self, *numbers: int, at: int = 0) -> Batch:
        keys = np.zeros((len(numbers), 32), np.uint8)
        keys[:, 0] = numbers
        offsets = np.arange(at, at + len(numbers), dtype=np.int64) * SIZE
        return Batch(keys, np.zeros(len(numbers), np.uint8), offsets, np.full(len(numbers), SIZE, np.int64))

    def block(self, number: int) -> bytes:
        return bytes(self.host[number * SIZE : (number + 1) * SIZE])


def test_powers_stay_and_only_they(tmp_path: Path) -> None:
    class Plain:
        capabilities = DirectoryBackend.capabilities

    made = wrap(DirectoryBackend(DirectoryConfig(root=tmp_path)), {})
    powers = (SupportsProbe, SupportsDelete, SupportsList)
    assert all(isinstance(made, power) for power in powers)
    plain = wrap(Plain(), {})  # type: ignore[arg-type]
    assert isinstance(plain, FaultyBackend)
    assert not any(isinstance(plain, power) for power in powers)


def test_what_a_fault_does_to_the_bytes(tmp_path: Path) -> None:
    def one(**faults: Any) -> tuple[Medium, bytes, list[Status]]:
        root = tmp_path / "-".join(faults)
        good = Medium(root)
        good.backend.close()
        medium = Medium(root, **faults)
        assert medium.backend.write(medium.batch(1)) == [Status.OK]
        return medium, medium.block(0), list(medium.backend.read(medium.batch(1, at=4)))

    medium, written, answer = one(corrupt=1.0)
    assert answer == [Status.OK]
    flipped = np.bitwise_xor(np.frombuffer(written, np.uint8), np.frombuffer(medium.block(4), np.uint8))
    assert int(np.bitwise_count(flipped).sum()) == 1
    medium, written, answer = one(short=1.0)
    assert answer == [Status.OK]
    assert medium.block(4) == written[: SIZE // 2] + bytes(SIZE // 2)
    medium, written, answer = one(lost=1.0)
    assert answer == [Status.MISSING]
    medium, written, answer = one(short_write=1.0)
    assert answer == [Status.FAILED]
    assert [file.stat().st_size for file in (tmp_path / "short_write").rglob("*.kv")] == [SIZE // 2]
    medium, written, answer = one(stray=1.0)
    assert answer == [Status.OK]
    assert medium.block(4) == written
    clean = Medium(tmp_path / "clean")
    assert medium.block(5)[0] == clean.block(5)[0] ^ 0xFF
    assert medium.block(5)[1:] == clean.block(5)[1:]


def test_miscount_answers_too_few_or_too_many(tmp_path: Path) -> None:
    medium = Medium(tmp_path, miscount=1.0)
    counts = {len(medium.backend.write(medium.batch(1, 2, 3))) for _ in range(40)}
    assert counts == {2, 4}


def test_the_answer_of_the_call_that_was_drawn_is_sent_twice(tmp_path: Path) -> None:
    medium = Medium(tmp_path, duplicate=1.0, operations=["write"])
    medium.backend.write(medium.batch(1))
    assert medium.backend.answers() == 2
    medium.backend.read(medium.batch(1))
    assert medium.backend.answers() == 1


def test_an_operation_draws_the_same_whatever_the_others_do(tmp_path: Path) -> None:
    def fate(root: Path, *, busy: bool, seed: int = 7) -> list[bool]:
        medium, failed = Medium(root, seed=seed, error=0.5), []
        for number in range(40):
            if busy:
                for other in (medium.backend.probe, medium.backend.delete):
                    with contextlib.suppress(OSError):
                        other(medium.batch(9))
            try:
                medium.backend.write(medium.batch(number))
                failed.append(False)
            except OSError:
                failed.append(True)
        medium.backend.close()
        return failed

    alone = fate(tmp_path / "alone", busy=False)
    assert 5 < sum(alone) < 35
    assert fate(tmp_path / "busy", busy=True) == alone
    assert fate(tmp_path / "other", busy=False, seed=8) != alone


def test_faults_begin_and_end(tmp_path: Path) -> None:
    medium = Medium(tmp_path, lost=1.0, after=3, before=5)  # the first call was open
    for number in range(6):
        medium.backend.write(medium.batch(number))
    held = [len(list(tmp_path.rglob(f"{number:02x}" + "0" * 62 + ".0.kv"))) for number in range(6)]
    assert held == [1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("tier", "key", "says"),
    [
        ({"faults": {"explode": 1}}, "faults.explode", "unknown key"),
        ({"faults": {"hang": 1.5}}, "faults.hang", "less than or equal to 1"),
        ({"faults": {"hang": True}}, "faults.hang", "valid number"),
        ({"faults": {"operations": ["sing"]}}, "faults.operations", "'open'"),
        ({"faults": {"crash": 1}, "isolation": "none"}, "faults", "crash is a fault of a tier's process"),
        ({"faults": {"duplicate": 1}, "isolation": "none"}, "faults", "duplicate is a fault of a tier's process"),
        ({"breaker": {"failurs": 1}}, "breaker.failurs", "did you mean 'failures'"),
        ({"breaker": {"backoff_s": 9.0, "backoff_max_s": 1.0}}, "breaker", "more than backoff_max_s"),
    ],
)
def test_faults_and_breakers_that_are_refused(tier: dict[str, Any], key: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(StackConfigError) as caught:
        load_stack(stack(tmp_path, **tier))
    assert str(caught.value.key).startswith(f"tiers[1].{key}")
    assert says in str(caught.value)


@pytest.mark.parametrize("key", ["faults", "breaker"])
def test_the_host_tier_has_neither_faults_nor_breaker(key: str, tmp_path: Path) -> None:
    config = stack(tmp_path)
    config["tiers"][0][key] = {}
    with pytest.raises(StackConfigError, match="no backend runs for the host tier"):
        load_stack(config)
