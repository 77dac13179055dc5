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
        48  32  parent              key of the block before it; the root for a first block
        80  32  root                the namespace
        112 8   depth               position in the prefix, 0 for a first block
        120 8   length              payload_bytes
        128 8   xxh3-64 (seed 0) of the payload
        136 8   xxh3-64 (seed 0) of bytes 0 to 135 of this page
        144     zeros

The checksums cover the payload and the header. The padding and the zeros after the header are of no use to
anybody and are not covered: damage there does not make a block bad. A block's identity is key, group and length;
parent, root and depth say where it belongs, so that a tier which has lost its index can be taken up again.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flexkv_core import _native
from flexkv_core.errors import LayoutError
from flexkv_core.layout import PAGE, SEAL_BYTES
from flexkv_core.region import check_disjoint, check_spans, host_bytes, int64_vector

MAGIC = b"FlexKVB\x1a"
VERSION = 1
ROOT_AT = 80
"""Where in the seal page the namespace's root is."""


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
    ROOT = 8
    """It belongs to another namespace, or to an epoch before a reset."""


def seal_blocks(
    host: Any,
    offsets: npt.NDArray[np.int64],
    payload_bytes: npt.NDArray[np.int64] | int,
    keys: npt.NDArray[np.uint8],
    groups: npt.NDArray[np.uint8],
    *,
    root: bytes = bytes(32),
    parents: npt.NDArray[np.uint8] | None = None,
    depths: npt.NDArray[np.int64] | None = None,
    threads: int = 1,
) -> None:
    """Write padding and seal behind each payload. Releases the GIL.

    Args:
        host: writable buffer, the host region.
        offsets: (n,) int64, where each block starts, bytes.
        payload_bytes: (n,) int64, or one number for all, bytes; positive.
        keys: (n, 32) uint8, block keys.
        groups: (n,) uint8, KV group numbers.
        root: 32 bytes, the namespace of all of them.
        parents, depths: (n, 32) uint8 and (n,) int64, the keys before them and their positions; zeros by default.
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
    above = np.zeros((len(offsets), 32), np.uint8) if parents is None else np.ascontiguousarray(parents)
    places = np.zeros(len(offsets), np.int64) if depths is None else int64_vector("depths", depths)
    if above.dtype != np.uint8 or above.shape != keys.shape or len(places) != len(offsets) or len(root) != 32:
        raise LayoutError(
            f"parents {above.dtype} {above.shape}, {len(places)} depths, a root of {len(root)} bytes for "
            f"{len(offsets)} blocks: pass uint8 (n, 32), n depths, 32 bytes"
        )
    _native.seal_blocks(array, offsets, lengths, keys, groups, root, above, places, threads)


class Seals(NamedTuple):
    """Seals that were found in a buffer; arrays of length n, in order of place.

    Attributes:
        pages: (n,) int64: bytes from the buffer's start to the seal page; the block ends right before it.
        roots, keys, parents: (n, 32) uint8.
        depths, lengths: (n,) int64; lengths are payload bytes.
        groups: (n,) uint8.
    """

    pages: npt.NDArray[np.int64]
    roots: npt.NDArray[np.uint8]
    keys: npt.NDArray[np.uint8]
    parents: npt.NDArray[np.uint8]
    depths: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    groups: npt.NDArray[np.uint8]


def find_seals(buffer: Any) -> Seals:
    """Find the pages of a buffer that are undamaged seals: what a slot-addressed backend recovers from.

    Looks at every page of 4096 bytes from the buffer's start on; payloads are not checked (the core does so before
    a block is used). Releases the GIL. Raises LayoutError for what is not one contiguous run of bytes.
    """
    array = host_bytes(buffer)
    most = 1024
    while True:
        names, numbers = np.empty((most, 96), np.uint8), np.empty((most, 3), np.int64)
        groups = np.empty(most, np.uint8)
        found = _native.find_seals(array, names, numbers, groups)
        if found <= most:
            break
        most = found
    roots, keys, parents = (np.ascontiguousarray(names[:found, at : at + 32]) for at in (0, 32, 64))
    pages, depths, lengths = (np.ascontiguousarray(numbers[:found, column]) for column in range(3))
    return Seals(pages, roots, keys, parents, depths, lengths, groups[:found].copy())


def verify_blocks(
    host: Any,
    offsets: npt.NDArray[np.int64],
    payload_bytes: npt.NDArray[np.int64] | int,
    keys: npt.NDArray[np.uint8],
    groups: npt.NDArray[np.uint8],
    *,
    root: bytes | None = None,
    threads: int = 1,
) -> npt.NDArray[np.uint8]:
    """Check each block against its seal and the identity that is expected of it. Releases the GIL.

    Arguments and errors are those of `seal_blocks`; the buffer may be read-only and blocks may overlap. Without a root
    blocks of any namespace are good.

    Returns:
        (n,) uint8: `SealFault` numbers, 0 (GOOD) where the block is the one that was sealed under this key
        and group.
    """
    array, offsets, lengths, keys, groups = _checked(host, offsets, payload_bytes, keys, groups)
    _check_threads(threads)
    faults = np.empty(len(offsets), np.uint8)
    _native.verify_blocks(array, offsets, lengths, keys, groups, faults, threads)
    if root is not None:
        pages = offsets + _slot_bytes(lengths) - SEAL_BYTES
        found = array[pages[:, None] + np.arange(ROOT_AT, ROOT_AT + 32)]
        other = (found != np.frombuffer(root, np.uint8)).any(axis=1)
        faults[other & (faults == SealFault.GOOD)] = SealFault.ROOT
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
