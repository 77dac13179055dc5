"""Blocks that the suite stores: their keys, their contents, and where they lie in the host region.

Content derives from key and group alone, so what is expected is made again instead of being kept; it carries the
core's seal, so `verify_blocks` judges as the core does. Knows no tier and no duty.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from flexkv_core.backend import PAGE, Batch
from flexkv_core.region import HostRegion
from flexkv_core.seal import seal_blocks, verify_blocks

Bytes = npt.NDArray[np.uint8]
Fill = Literal["random", "zeros", "ones", "text"]
SMALLEST = 2 * PAGE
"""The smallest block: a page of payload and its seal."""


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block on the medium.

    Attributes:
        key, group: its name.
        length: bytes, seal included.
        slot: where it lies, in pages, for slot-addressed backends; else 0.
        fill: what its payload looks like.
        other: in `damage(how="swap")`, the block to exchange bytes with.
    """

    key: bytes
    group: int
    length: int
    slot: int = 0
    fill: Fill = "random"
    other: StoredBlock | None = None

    @property
    def name(self) -> tuple[bytes, int]:
        return self.key, self.group

    def __str__(self) -> str:
        where = f", slot {self.slot}" if self.slot else ""
        return f"(key {self.key.hex()}, group {self.group}, {self.length} bytes{where})"


def content(block: StoredBlock) -> Bytes:
    """The bytes that a block must have, seal included."""
    data = np.zeros(block.length, np.uint8)
    payload = block.length - PAGE
    if block.fill == "random":
        seed = int.from_bytes(hashlib.blake2b(block.key + bytes([block.group]), digest_size=16).digest(), "big")
        data[:payload] = np.frombuffer(np.random.Generator(np.random.SFC64(seed)).bytes(payload), np.uint8)
    elif block.fill == "ones":
        data[:payload] = 0xFF
    elif block.fill == "text":
        data[:payload] = np.resize(np.frombuffer(b"line\r\n\x00\x1a*3\r\n$3\r\n'\"\\%s", np.uint8), payload)
    seal_blocks(data, np.zeros(1, np.int64), payload, *_named(block))
    return data


def verified(block: StoredBlock, data: Bytes) -> bool:
    """Whether the core would take these bytes for that block."""
    faults = verify_blocks(
        np.ascontiguousarray(data), np.zeros(1, np.int64), np.array([block.length - PAGE]), *_named(block)
    )
    return bool(faults[0] == 0)


def _named(block: StoredBlock) -> tuple[Bytes, Bytes]:
    return np.frombuffer(block.key, np.uint8).reshape(1, 32), np.array([block.group], np.uint8)


def difference(block: StoredBlock, data: Bytes, known: Iterable[StoredBlock] = ()) -> str:
    """How bytes differ from a block's, for people; "" if they do not."""
    want = content(block)
    if np.array_equal(want, data):
        return ""
    for other in known:
        if other.name != block.name and np.array_equal(data, content(other)[: len(data)]):
            return f"the bytes are those of {other}"
    size = min(len(want), len(data))
    differs = np.flatnonzero(want[:size] != data[:size])
    if not len(differs):
        return f"{len(data)} bytes, {len(want)} were written"
    at, last = int(differs[0]), int(differs[-1])
    return (
        f"{len(differs)} of {size} bytes differ, from byte {at} (0x{data[at]:02x}, written 0x{want[at]:02x}) "
        f"to byte {last}"
    )


def batch_of(blocks: Sequence[StoredBlock], offsets: npt.NDArray[np.int64], *, slots: bool) -> Batch:
    """A batch as the core would make it; its arrays are read-only."""
    count = len(blocks)
    arrays = (
        np.frombuffer(b"".join(block.key for block in blocks), np.uint8).reshape(count, 32),
        np.array([block.group for block in blocks], np.uint8),
        offsets,
        np.array([block.length for block in blocks], np.int64),
        np.array([block.slot for block in blocks], np.int64),
    )
    for array in arrays:
        array.flags.writeable = False
    return Batch(*arrays[:4], arrays[4] if slots else None)


class Host:
    """The host region, and an image of what it must hold: what a backend may not touch is compared with it."""

    def __init__(self, region: HostRegion, noise: random.Random) -> None:
        self.region = region
        self.view = region.array
        self._noise = np.frombuffer(noise.randbytes(1 << 16), np.uint8)
        self.view[:] = np.resize(self._noise, region.size)
        self.image = self.view.copy()
        self._next = PAGE

    def place(self, lengths: Sequence[int], order: random.Random) -> npt.NDArray[np.int64]:
        """Offsets of places for a batch, at least a page of guard bytes around each, in no order."""
        gaps = [PAGE * order.choice((1, 1, 2, 3)) for _ in lengths]
        if self._next + sum(lengths) + sum(gaps) + PAGE > self.region.size:
            self._next = PAGE
        offsets = np.zeros(len(lengths), np.int64)
        for number in order.sample(range(len(lengths)), len(lengths)):
            offsets[number] = self._next
            self._next += lengths[number] + gaps[number]
        if self._next > self.region.size:
            raise ValueError("a batch does not fit in the suite's host region: raise region_bytes")
        return offsets

    def put(self, offset: int, data: Bytes) -> None:
        self.view[offset : offset + len(data)] = data
        self.image[offset : offset + len(data)] = data

    def scramble(self, offset: int, length: int) -> None:
        """Fill a place with noise: what was there is gone, and what comes has to come from the medium."""
        self.put(offset, np.resize(self._noise[::-1], length))

    def take(self, offset: int, length: int) -> Bytes:
        """What a read has put in a place; from now on nobody may change it."""
        self.image[offset : offset + length] = self.view[offset : offset + length]
        return self.image[offset : offset + length].copy()

    def differs(self, offset: int, length: int) -> bool:
        """Whether a place does not hold what it must."""
        part = slice(offset, offset + length)
        return not np.array_equal(self.view[part], self.image[part])

    def touched(self) -> int | None:
        """The first byte that differs from the image; None if there is none."""
        if np.array_equal(self.view.view(np.uint64), self.image.view(np.uint64)):
            return None
        return int(np.argmax(self.view != self.image))

    def forgive(self) -> None:
        """Take what is there for what must be there."""
        self.image[:] = self.view


class Slots:
    """Gives out slots of a slot-addressed medium, like the core: page-aligned, never two in one place."""

    def __init__(self, capacity: int) -> None:
        self._pages = capacity // PAGE
        self._next = 0

    def take(self, length: int) -> int:
        pages = -(-length // PAGE)
        if self._next + pages > self._pages:
            raise ValueError("the suite's blocks do not fit in the tier: raise `capacity`")
        slot, self._next = self._next, self._next + pages
        return slot


def some_key(source: random.Random) -> bytes:
    return source.randbytes(32)


Damage = Literal["flip", "truncate", "swap"]
Config = dict[str, object]
Directory = Path
