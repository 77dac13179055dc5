"""Arrays that callers may pass to an index: their memory may lie as NumPy allows."""

from __future__ import annotations

import numpy as np
import pytest
from index_examples import ROOT, add, keys, slots_of

from flexkv_core.index import Index
from flexkv_core.index.native import NativeIndex


def test_arrays_need_not_be_contiguous_nor_aligned_nor_writable(index: Index) -> None:
    path = keys("abcd")
    spread = np.repeat(path, 2, axis=0)[::2]
    crooked = np.frombuffer(b"x" + slots_of(1, 2, 3, 4).tobytes(), np.int64, offset=1)
    assert not crooked.flags.aligned
    assert not crooked.flags.writeable
    assert index.insert(ROOT, spread, 0, 0, crooked).tolist() == [True] * 4
    assert index.residency(ROOT, np.asfortranarray(path), 0, 0).tolist() == [1, 2, 3, 4]
    assert index.match(ROOT, np.frombuffer(b"x" + path.tobytes(), np.uint8, offset=1).reshape(4, 32)).blocks == 4
    root = np.frombuffer(ROOT, np.uint8).reshape(1, 32)
    assert index.recover(ROOT, 1, 0, spread[:1], root, slots_of(0, 9)[::2], slots_of(7, 9)[::2]).tolist() == [True]
    assert spread.tobytes() == path.tobytes()


def test_arrays_of_no_elements(index: Index) -> None:
    none, path = keys("")[:0], keys("ab")
    index.insert(ROOT, path, 0, 0, slots_of(1, 2))
    assert index.insert(ROOT, none, 0, 0, slots_of()).tolist() == []
    assert index.match(ROOT, none).blocks == 0
    assert index.residency(ROOT, none, 0, 0).tolist() == []
    assert index.remove(ROOT, path, 0, 0, 2, 2).tolist() == []
    assert index.recover(ROOT, 1, 0, none, none, slots_of(), slots_of()).tolist() == []
    index.pin(ROOT, none, 0, 0, 0, 0)
    index.unpin(ROOT, path, 0, 0, 1, 1)
    gone = index.evict(0, 0)
    assert gone is not None
    assert gone.keys.shape == (0, 32)


def test_arrays_of_dtypes_without_plain_numbers(index: Index) -> None:
    path, slots = keys("abcd"), slots_of(1, 2, 3, 4)
    for bad in (path.view("M8[s]"), path.astype(object), path.view([("a", "u1")]).reshape(4, 32)):
        with pytest.raises(TypeError):
            index.match(ROOT, bad)
    for wrong in (slots.view("m8[s]"), slots.astype(">i8"), slots.view("u8"), slots.astype(object)):
        with pytest.raises(ValueError, match="slots"):
            index.insert(ROOT, path, 1, 0, wrong)
    assert index.count(1) == 0


def test_too_many_keys_are_refused_before_they_are_copied() -> None:
    index = NativeIndex(1)
    add(index)
    with pytest.raises(ValueError, match="many"):
        index.match(ROOT, np.broadcast_to(keys("a"), ((1 << 31) - 1, 32)))  # 64 GiB
