"""`BlockSet` against a Python set of (key, group)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from test_presence_pair import KEYS

from flexkv_core._native import BlockSet
from flexkv_core.errors import KeyInputError, KeyTypeError


def named(keys: np.ndarray, groups: np.ndarray | int) -> list[tuple[bytes, int]]:
    numbers = np.full(len(keys), groups) if isinstance(groups, int) else groups
    return [(key.tobytes(), int(group)) for key, group in zip(keys, numbers, strict=True)]


@pytest.mark.parametrize("seed", range(8))
def test_like_a_python_set(seed: int) -> None:
    random, blocks, model, counts = np.random.default_rng(seed), BlockSet(), set(), Counter[str]()
    for _ in range(400):
        size = int(random.choice([0, 1, 5, 9, 128]))
        keys = KEYS[random.integers(0, len(KEYS), size)]
        groups = int(random.integers(0, 3)) if random.random() < 0.5 else random.integers(0, 3, size).astype(np.uint8)
        names = named(keys, groups)
        if random.random() < 0.4:
            expected = []
            for name in names:
                expected.append(name not in model)
                model.add(name)
            fresh = blocks.add_new(keys, groups)
            assert fresh.dtype == np.bool_
            assert fresh.tolist() == expected
            counts["new"] += sum(expected)
            counts["known"] += len(expected) - sum(expected)
        else:
            blocks.discard(keys, groups)
            counts["gone"] += len(model & set(names))
            model -= set(names)
        found = blocks.contains(KEYS, 1)
        assert found.tolist() == [name in model for name in named(KEYS, 1)]
        assert len(blocks) == len(model)
    assert min(counts["new"], counts["known"], counts["gone"]) > 100, counts
    assert bool(blocks)
    blocks.clear()
    assert not blocks
    assert not blocks.contains(KEYS, 0).any()


def test_a_block_named_twice_is_new_once() -> None:
    assert BlockSet().add_new(KEYS[[3, 3, 4]], 0).tolist() == [True, False, True]


def test_memory_is_reused() -> None:
    blocks = BlockSet()
    for _ in range(3):
        blocks.add_new(KEYS, 0)
        size = blocks.memory_bytes
        blocks.discard(KEYS, 0)
    blocks.add_new(KEYS, 0)
    assert blocks.memory_bytes == size


@pytest.mark.parametrize("call", ["add_new", "contains", "discard"])
def test_bad_arguments_change_nothing(call: str) -> None:
    blocks = BlockSet()
    blocks.add_new(KEYS[:2], 0)
    act = getattr(blocks, call)
    for keys, groups, error in (
        (KEYS.astype(np.int64), 0, KeyTypeError),
        (KEYS.tolist(), 0, KeyTypeError),
        (KEYS[:, :31], 0, KeyInputError),
        (KEYS[0], 0, KeyInputError),
        (KEYS, 255, KeyInputError),
        (KEYS, -1, KeyInputError),
        (KEYS, 2**80, KeyInputError),
        (KEYS, np.zeros(3, np.uint8), KeyInputError),
        (KEYS, np.zeros(len(KEYS), np.int64), KeyInputError),
        (KEYS, "0", TypeError),
    ):
        with pytest.raises(error):
            act(keys, groups)
    assert len(blocks) == 2
