"""Content derived from keys: any displaced, missing or flipped byte is seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from flexkv_core.cli.content import POISON_BYTE, BlockContent

KEYS = np.random.default_rng(1).integers(0, 256, (6, 32), dtype=np.uint8)
PAGES = np.array([7, 0, 3, 5, 1, 2], np.int64)


def made(dtype: npt.DTypeLike = np.uint16, dim: int = 8) -> tuple[list[npt.NDArray[Any]], BlockContent]:
    tensors = [np.zeros((2, 8, 4, 2, dim), dtype) for _ in range(3)]
    content = BlockContent(tensors)
    content.fill(KEYS, PAGES)
    return tensors, content


@pytest.mark.parametrize(("dtype", "dim"), [(np.uint16, 8), (np.uint8, 3), (np.uint32, 1), (np.uint16, 5)])
def test_what_was_filled_is_right_and_poison_is_wrong(dtype: npt.DTypeLike, dim: int) -> None:
    tensors, content = made(dtype, dim)
    assert content.block_bytes == 3 * 2 * 4 * 2 * dim * np.dtype(dtype).itemsize
    assert not content.wrong(KEYS, PAGES).any()
    assert not any(tensor[:, [4, 6]].any() for tensor in tensors), "pages that were not named are untouched"
    content.poison(PAGES[:2])
    assert content.wrong(KEYS, PAGES).tolist() == [True, True, False, False, False, False]
    assert (tensors[1][:, 7].view(np.uint8) == POISON_BYTE).all()


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("byte", [0, 17, -1])
def test_one_flipped_bit_is_seen(layer: int, byte: int) -> None:
    tensors, content = made()
    tensors[layer][1, 3].reshape(-1).view(np.uint8)[byte] ^= 0x10
    assert content.wrong(KEYS, PAGES).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("axis", ["layers", "halves", "pages", "tokens", "heads", "dims"])
def test_any_exchange_is_seen(axis: str) -> None:
    tensors, content = made()
    first, second = tensors[0], tensors[1]
    pairs = {
        "layers": (first[:, 7], second[:, 7]),
        "halves": (first[0, 7], first[1, 7]),
        "pages": (first[:, 7], first[:, 0]),
        "tokens": (first[:, 7, 0], first[:, 7, 1]),
        "heads": (first[:, 7, :, 0], first[:, 7, :, 1]),
        "dims": (first[:, 7, ..., 0], first[:, 7, ..., 1]),
    }
    one, other = pairs[axis]
    one[...], other[...] = other.copy(), one.copy()
    assert content.wrong(KEYS, PAGES)[0]


def test_content_differs_by_every_bit_of_the_key() -> None:
    _, content = made()
    key = KEYS[0]
    expected = content.expected(key).copy()
    assert np.array_equal(content.expected(key), expected), "the same key gives the same bytes each time"
    for bit in range(256):
        other = key.copy()
        other[bit // 8] ^= 1 << bit % 8
        differing = (content.expected(other).view(np.uint8) != expected.view(np.uint8)).mean()
        assert differing > 0.95, "nearly all bytes differ, not only those that this bit reaches at once"


def test_unequal_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="need equal shapes"):
        BlockContent([np.zeros((2, 8, 4, 2, 8)), np.zeros((2, 9, 4, 2, 8))])
