"""Seals: the page behind a block's payload that says what the block is and whether it is whole.

Owns the format and the batch calls that write and check it. Does not own what a bad seal entails (the caller
counts a miss and drops the copy), nor where blocks lie.

A block in a slot, all numbers little endian::

    payload                         payload_bytes bytes
    padding                         zeros up to a multiple of 4096 bytes, written by sealing
    seal page, 4096 bytes:
        0   8   magic               b"FlexKVB\\x1a"
        8   4   version             1
        12  4   group               KV group number
        16  32  key                 block key
        48  8   length              payload_bytes
        56  8   xxh3-64 (seed 0) of the payload
        64  8   xxh3-64 (seed 0) of bytes 0 to 63 of this page
        72      zeros

The checksums cover the payload and the header. The padding and the zeros after the header are of no use to
anybody and are not covered: damage there does not make a block bad.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core import _native
from flexkv_core.errors import LayoutError
from flexkv_core.layout import PAGE, SEAL_BYTES
from flexkv_core.region import check_disjoint, check_spans, host_bytes, int64_vector

MAGIC = b"FlexKVB\x1a"
VERSION = 1


class SealFault(enum.IntEnum):
    """What is wrong with a block; the first that holds, in this order (as in native/seal.cpp)."""

    GOOD = 0
    MAGIC = 1
    """There is no seal: never written, torn, or a block of another length."""
    VERSION = 2
    HEADER = 3
    """The seal itself is damaged."""
    KEY = 4
    GROUP = 5
    LENGTH = 6
    CHECKSUM = 7
    """The payload is damaged."""


def seal_blocks(
    host: Any,
    offsets: npt.NDArray[np.int64],
    payload_bytes: npt.NDArray[np.int64] | int,
    keys: npt.NDArray[np.uint8],
    groups: npt.NDArray[np.uint8],
    *,
    threads: int = 1,
) -> None:
    """Write padding and seal behind each payload. Releases the GIL.

    Args:
        host: writable buffer, the host region.
        offsets: (n,) int64, where each block starts, bytes.
        payload_bytes: (n,) int64, or one number for all, bytes; positive.
        keys: (n, 32) uint8, block keys.
        groups: (n,) uint8, KV group numbers.
        threads: that share the work by bytes.

    Raises:
        LayoutError: an argument of another shape or dtype, a block (payload, padding and seal) that is not
            within the buffer, blocks that overlap, a buffer that is read-only. Nothing has been written.
    """
    array, offsets, lengths, keys, groups = _checked(host, offsets, payload_bytes, keys, groups)
    _check_threads(threads)
    if not array.flags.writeable:
        raise LayoutError("host: is read-only, sealing writes to it")
    check_disjoint(offsets, _slot_bytes(lengths))
    _native.seal_blocks(array, offsets, lengths, keys, groups, threads)


def verify_blocks(
    host: Any,
    offsets: npt.NDArray[np.int64],
    payload_bytes: npt.NDArray[np.int64] | int,
    keys: npt.NDArray[np.uint8],
    groups: npt.NDArray[np.uint8],
    *,
    threads: int = 1,
) -> npt.NDArray[np.uint8]:
    """Check each block against its seal and the identity that is expected of it. Releases the GIL.

    Arguments and errors are those of `seal_blocks`; the buffer may be read-only and blocks may overlap.

    Returns:
        (n,) uint8: `SealFault` numbers, 0 (GOOD) where the block is the one that was sealed under this key
        and group.
    """
    array, offsets, lengths, keys, groups = _checked(host, offsets, payload_bytes, keys, groups)
    _check_threads(threads)
    faults = np.empty(len(offsets), np.uint8)
    _native.verify_blocks(array, offsets, lengths, keys, groups, faults, threads)
    return faults


def _check_threads(threads: int) -> None:
    if threads < 1:
        raise LayoutError(f"threads {threads}: must be at least 1")


def _slot_bytes(payload_bytes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return -(-payload_bytes // PAGE) * PAGE + SEAL_BYTES


def _checked(
    host: Any, offsets: Any, payload_bytes: Any, keys: Any, groups: Any
) -> tuple[
    npt.NDArray[np.uint8],
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    npt.NDArray[np.uint8],
    npt.NDArray[np.uint8],
]:
    array = host_bytes(host)
    offsets = int64_vector("offsets", offsets)
    n = len(offsets)
    if np.ndim(payload_bytes) == 0:
        payload_bytes = np.full(n, payload_bytes)
    lengths = int64_vector("payload_bytes", payload_bytes)
    keys, groups = np.asarray(keys), np.asarray(groups)
    for name, value, shape in (
        ("payload_bytes", lengths, (n,)),
        ("keys", keys, (n, 32)),
        ("groups", groups, (n,)),
    ):
        if value.shape != shape:
            raise LayoutError(f"{name}: shape {value.shape}, but {n} offsets need {shape}")
        if name != "payload_bytes" and value.dtype != np.uint8:
            raise LayoutError(f"{name}: dtype {value.dtype}, must be uint8")
    # The upper bound keeps the sums below from overflowing.
    wrong = (lengths <= 0) | (lengths > array.size)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise LayoutError(
            f"payload_bytes[{i}] = {int(lengths[i])}: must be positive and fit in the host region's {array.size} bytes"
        )
    check_spans(array.size, offsets, _slot_bytes(lengths))
    return array, offsets, lengths, np.ascontiguousarray(keys), np.ascontiguousarray(groups)
