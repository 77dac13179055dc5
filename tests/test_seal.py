"""Seals: identity and integrity of every block, against the PyPI xxhash package as the reference."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv_core import backend, layout
from flexkv_core.errors import LayoutError
from flexkv_core.layout import PAGE, SEAL_BYTES, KVGroup
from flexkv_core.seal import MAGIC, VERSION, SealFault, find_seals, seal_blocks, verify_blocks

HEADER_BYTES = 144
ROOT = bytes(range(100, 132))
GROUP = 3

Bytes = npt.NDArray[np.uint8]


def slot_bytes(payload: int) -> int:
    return KVGroup(payload).slot_bytes


def make(payloads: list[int], seed: int = 0) -> tuple[Bytes, npt.NDArray[np.int64], Bytes, Bytes]:
    """A host full of noise, with a guard page before, between and after the slots."""
    rng = np.random.default_rng(seed)
    offsets, at = [], PAGE
    for payload in payloads:
        offsets.append(at)
        at += slot_bytes(payload) + PAGE
    host = rng.integers(0, 256, at, dtype=np.uint8)
    keys = rng.integers(0, 256, (len(payloads), 32), dtype=np.uint8)
    return host, np.array(offsets, np.int64), keys, np.full(len(payloads), GROUP, np.uint8)


def reference(payload: bytes, key: bytes, parent: bytes, depth: int, group: int) -> bytes:
    """The block as the format says, built without the code under test."""
    fields = struct.pack("<8sII32s32s32sQQ", MAGIC, VERSION, group, key, parent, ROOT, depth, len(payload))
    fields += struct.pack("<Q", xxhash.xxh3_64_intdigest(payload))
    fields += struct.pack("<Q", xxhash.xxh3_64_intdigest(fields))
    return payload + bytes(-len(payload) % PAGE) + fields.ljust(SEAL_BYTES, b"\0")


def test_page_is_the_contract_s() -> None:
    assert PAGE == backend.PAGE == layout.SEAL_BYTES


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(1, 600), st.integers(1, 20000)), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.integers(1, 4),
)
def test_bytes_are_the_format_and_nothing_else_is_written(payloads: list[int], seed: int, threads: int) -> None:
    host, offsets, keys, groups = make(payloads, seed)
    expected = host.copy()
    parents, depths = keys[::-1].copy(), np.arange(len(payloads), dtype=np.int64) + (1 << 33)
    for offset, payload, key, parent, depth in zip(offsets, payloads, keys, parents, depths, strict=True):
        block = reference(host[offset : offset + payload].tobytes(), key.tobytes(), parent.tobytes(), int(depth), GROUP)
        expected[offset : offset + len(block)] = np.frombuffer(block, np.uint8)
    lengths = np.array(payloads, np.int64)
    seal_blocks(host, offsets, lengths, keys, groups, root=ROOT, parents=parents, depths=depths, threads=threads)
    np.testing.assert_array_equal(host, expected)
    faults = verify_blocks(host, offsets, lengths, keys, groups, threads=threads)
    assert faults.dtype == np.uint8
    assert not faults.any()
    np.testing.assert_array_equal(host, expected)
    found = find_seals(host)
    assert found.pages.tolist() == [o + slot_bytes(p) - SEAL_BYTES for o, p in zip(offsets, payloads, strict=True)]
    assert {root.tobytes() for root in found.roots} == {ROOT}
    for got, put in ((found.keys, keys), (found.parents, parents), (found.depths, depths), (found.lengths, lengths)):
        np.testing.assert_array_equal(got, put)
    np.testing.assert_array_equal(found.groups, groups)


def test_seals_that_are_damaged_are_not_found_and_many_are() -> None:
    host, offsets, keys, groups = make([100] * 3000)
    seal_blocks(host, offsets, 100, keys, groups)
    host[offsets[7] + PAGE + 50] ^= 1
    found = find_seals(host)
    assert len(found.pages) == 2999
    np.testing.assert_array_equal(found.keys, np.delete(keys, 7, axis=0))
    assert len(find_seals(np.zeros(0, np.uint8)).pages) == 0
    assert len(find_seals(host[:PAGE]).pages) == 0


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_flip_of_any_byte_is_found_in_that_block_only(data: st.DataObject) -> None:
    payload = data.draw(st.one_of(st.integers(1, 300), st.integers(4000, 9000)))
    host, offsets, keys, groups = make([payload] * 3)
    seal_blocks(host, offsets, payload, keys, groups)
    body = slot_bytes(payload) - SEAL_BYTES
    at = data.draw(st.one_of(st.integers(0, payload - 1), st.integers(body, body + HEADER_BYTES - 1)))
    host[offsets[1] + at] ^= data.draw(st.integers(1, 255))
    faults = verify_blocks(host, offsets, payload, keys, groups)
    assert faults[0] == faults[2] == SealFault.GOOD
    if at < payload:
        assert faults[1] == SealFault.CHECKSUM
    elif at < body + 8:
        assert faults[1] == SealFault.MAGIC
    elif at < body + 12:
        assert faults[1] == SealFault.VERSION
    else:
        assert faults[1] == SealFault.HEADER


def test_every_byte_of_the_header_is_covered() -> None:
    host, offsets, keys, groups = make([5000])
    seal_blocks(host, offsets, 5000, keys, groups)
    start = int(offsets[0]) + slot_bytes(5000) - SEAL_BYTES
    for at in range(start, start + HEADER_BYTES):
        host[at] ^= 0x80
        assert verify_blocks(host, offsets, 5000, keys, groups)[0] != SealFault.GOOD, at - start
        host[at] ^= 0x80
    assert verify_blocks(host, offsets, 5000, keys, groups)[0] == SealFault.GOOD


def test_another_block_s_bytes_are_found() -> None:
    host, offsets, keys, groups = make([8000, 8000])
    seal_blocks(host, offsets, 8000, keys, groups)
    assert verify_blocks(host, offsets[::-1], 8000, keys, groups).tolist() == [SealFault.KEY] * 2
    assert verify_blocks(host, offsets, 8000, keys, groups + np.uint8(1)).tolist() == [SealFault.GROUP] * 2
    # 8000 and 8001 bytes take the same slot, 20 and 8000 do not.
    assert verify_blocks(host, offsets, 8001, keys, groups).tolist() == [SealFault.LENGTH] * 2
    assert verify_blocks(host, offsets, 20, keys, groups).tolist() == [SealFault.MAGIC] * 2


def test_never_sealed_and_half_written_are_found() -> None:
    zeros = np.zeros(4 * PAGE, np.uint8)
    keys, groups = np.zeros((1, 32), np.uint8), np.zeros(1, np.uint8)
    at = np.zeros(1, np.int64)
    assert verify_blocks(zeros, at, PAGE, keys, groups).tolist() == [SealFault.MAGIC]
    host, offsets, keys, groups = make([8192])
    seal_blocks(host, offsets, 8192, keys, groups)
    torn = host.copy()
    torn[offsets[0] + 4096 : offsets[0] + 8192] = 0
    assert verify_blocks(torn, offsets, 8192, keys, groups).tolist() == [SealFault.CHECKSUM]
    torn = host.copy()
    torn[offsets[0] + 8192 :] = 0
    assert verify_blocks(torn, offsets, 8192, keys, groups).tolist() == [SealFault.MAGIC]


def test_padding_is_not_covered() -> None:
    host, offsets, keys, groups = make([100])
    seal_blocks(host, offsets, 100, keys, groups)
    host[offsets[0] + 100] ^= 1
    assert verify_blocks(host, offsets, 100, keys, groups).tolist() == [SealFault.GOOD]


def test_verify_reads_read_only_buffers_and_an_empty_batch_is_nothing() -> None:
    host, offsets, keys, groups = make([100])
    seal_blocks(memoryview(host), offsets, 100, keys, groups)
    assert not verify_blocks(host.tobytes(), offsets, 100, keys, groups).any()
    assert len(verify_blocks(host, offsets[:0], 100, keys[:0], groups[:0])) == 0
    with pytest.raises(LayoutError, match="read-only"):
        seal_blocks(host.tobytes(), offsets, 100, keys, groups)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": [0, -4096]}, r"offsets\[1\] = -4096"),
        ({"offsets": [0, 5 * PAGE + 1]}, r"offsets\[1\] = 20481"),
        ({"offsets": [0, 2**63 - 1]}, r"offsets\[1\] = 9223372036854775807"),
        ({"offsets": [0, 2 * PAGE]}, r"offsets\[1\] = 8192: overlaps the block of offsets\[0\] = 0"),
        ({"offsets": np.zeros(2, np.int32)}, "offsets: must be an int64"),
        ({"payload_bytes": 0}, r"payload_bytes\[0\] = 0"),
        ({"payload_bytes": np.array([1, -1])}, r"payload_bytes\[1\] = -1"),
        ({"payload_bytes": 2**63 - 1}, r"payload_bytes\[0\] = 9223372036854775807"),
        ({"payload_bytes": np.array([1])}, r"payload_bytes: shape \(1,\)"),
        ({"payload_bytes": 1.5}, "payload_bytes: must be an int64"),
        ({"keys": np.zeros((2, 31), np.uint8)}, r"keys: shape \(2, 31\)"),
        ({"keys": np.zeros((2, 32), np.int8)}, "keys: dtype int8"),
        ({"groups": np.zeros(3, np.uint8)}, r"groups: shape \(3,\)"),
        ({"root": bytes(31)}, "a root of 31 bytes"),
        ({"parents": np.zeros((1, 32), np.uint8)}, r"parents uint8 \(1, 32\)"),
        ({"depths": np.zeros(3, np.int64)}, "3 depths"),
        ({"threads": 0}, "threads 0"),
        ({"host": 17}, "host int"),
        ({"host": np.zeros((8 * PAGE, 2), np.uint8)[:, 0]}, "host ndarray: must be a contiguous"),
    ],
)
def test_bad_input_names_field_and_value(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "host": np.zeros(8 * PAGE, np.uint8),
        "offsets": np.array([0, 4 * PAGE]),
        "payload_bytes": 2 * PAGE,
        "keys": np.zeros((2, 32), np.uint8),
        "groups": np.zeros(2, np.uint8),
    }
    seal_blocks(**good)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match=message):
        seal_blocks(**(good | change))  # type: ignore[arg-type]
