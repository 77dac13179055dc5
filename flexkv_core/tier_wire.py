"""The wire between the core and a tier process: messages, framing, arrays as bytes.

Messages are msgpack in frames (msgspec tagged structs, nothing executable). Both sides bound what they read. Arrays
travel as raw bytes and are checked against the batch's length on arrival.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from flexkv_core.backend import Batch, Listing, Recovered
from flexkv_core.framing import WireError, framed

MAX_MESSAGE_BYTES = 64 << 20
LISTING_PIECE = 1 << 16
"""Blocks in one message of a listing."""


class Start(msgspec.Struct, tag=True, frozen=True):
    """Core to tier, first: everything that the process needs; nothing of it is in its argv."""

    name: str
    backend: str
    config: dict[str, Any]
    path: list[str]
    region_bytes: int
    slot_bytes: list[int]
    capacity: int | None
    state_directory: str | None
    faults: dict[str, Any] | None
    log_level: int

    def __repr__(self) -> str:
        return f"Start({self.name!r}, {self.backend!r}, ...)"  # its config has secrets in the clear


class Call(msgspec.Struct, tag=True, frozen=True):
    """Core to tier: one operation on a batch."""

    number: int
    operation: str
    keys: bytes
    groups: bytes
    offsets: bytes
    lengths: bytes
    slots: bytes | None


class Close(msgspec.Struct, tag=True, frozen=True):
    """Core to tier: close the backend and exit."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Tier to core: the backend is open."""

    addressing: str
    persistent: bool
    shared: bool
    alignment: int
    concurrency: int
    max_batch_blocks: int
    powers: list[str]


class Failed(msgspec.Struct, tag=True, frozen=True):
    """Tier to core: the backend could not be opened; the process exits."""

    reason: str


class Done(msgspec.Struct, tag=True, frozen=True):
    """Tier to core: the answer to a call, one byte a block (of a probe: one int32)."""

    number: int
    statuses: bytes


class Piece(msgspec.Struct, tag=True, frozen=True):
    """Tier to core: part of the answer to a listing or a recovery; `last` ends it, `complete` says whether it is whole.

    The last four arrays come with recoveries only.
    """

    number: int
    keys: bytes
    groups: bytes
    lengths: bytes
    last: bool
    complete: bool
    namespaces: bytes = b""
    parents: bytes = b""
    depths: bytes = b""
    slots: bytes = b""


class Log(msgspec.Struct, tag=True, frozen=True):
    """Tier to core: a log record."""

    level: int
    text: str


ToTier = Start | Call | Close
ToCore = Ready | Failed | Done | Piece | Log
_to_tier = msgspec.msgpack.Decoder(ToTier)
_to_core = msgspec.msgpack.Decoder(ToCore)


def frame(message: ToTier | ToCore) -> bytes:
    """A message, ready to send."""
    return framed(msgspec.msgpack.encode(message), MAX_MESSAGE_BYTES)


def parse_to_tier(body: bytes) -> ToTier:
    """Decode what the core sent. Raises WireError."""
    try:
        message: ToTier = _to_tier.decode(body)
        return message
    except msgspec.MsgspecError as error:
        raise WireError(f"unreadable message: {error}") from error


def parse_to_core(body: bytes) -> ToCore:
    """Decode what a tier sent. Raises WireError."""
    try:
        message: ToCore = _to_core.decode(body)
        return message
    except msgspec.MsgspecError as error:
        raise WireError(f"unreadable message: {error}") from error


def call(number: int, operation: str, batch: Batch) -> Call:
    """A batch as a message."""
    return Call(
        number,
        operation,
        np.ascontiguousarray(batch.keys).tobytes(),
        batch.groups.tobytes(),
        batch.offsets.tobytes(),
        batch.lengths.tobytes(),
        None if batch.slots is None else batch.slots.tobytes(),
    )


def batch_of(message: Call) -> Batch:
    """A message as a batch. Raises WireError if its arrays are of different lengths."""
    groups = np.frombuffer(message.groups, np.uint8)
    count = len(groups)
    if len(message.keys) != 32 * count or len(message.offsets) != 8 * count or len(message.lengths) != 8 * count:
        raise WireError(f"the arrays of a batch of {count} blocks have other lengths")
    if message.slots is not None and len(message.slots) != 8 * count:
        raise WireError(f"a batch of {count} blocks has {len(message.slots)} bytes of slots")
    return Batch(
        np.frombuffer(message.keys, np.uint8).reshape(count, 32),
        groups,
        np.frombuffer(message.offsets, np.int64),
        np.frombuffer(message.lengths, np.int64),
        None if message.slots is None else np.frombuffer(message.slots, np.int64),
    )


def pieces_of(number: int, part: Listing | Recovered) -> list[Piece]:
    """Part of a listing or a recovery as messages of bounded size."""

    def raw(array: npt.NDArray[Any], dtype: type[np.generic], at: int) -> bytes:
        return np.ascontiguousarray(array[at : at + LISTING_PIECE], dtype).tobytes()

    pieces = []
    for at in range(0, len(part.groups), LISTING_PIECE):
        names: dict[str, bytes] = {}
        if isinstance(part, Recovered):
            names = {
                "namespaces": raw(part.namespaces, np.uint8, at),
                "parents": raw(part.parents, np.uint8, at),
                "depths": raw(part.depths, np.int64, at),
                "slots": raw(part.slots, np.int64, at),
            }
        keys, groups = raw(part.keys, np.uint8, at), raw(part.groups, np.uint8, at)
        lengths = raw(part.lengths, np.int64, at)
        pieces.append(Piece(number, keys, groups, lengths, last=False, complete=False, **names))
    return pieces


def listing_of(piece: Piece) -> Listing:
    """A message as part of a listing. Raises WireError if its arrays are of different lengths."""
    groups = np.frombuffer(piece.groups, np.uint8)
    return Listing(_keys(piece.keys, len(groups)), groups, _numbers(piece.lengths, len(groups)))


def recovered_of(piece: Piece) -> Recovered:
    """A message as part of a recovery. Raises WireError if its arrays are of different lengths."""
    groups = np.frombuffer(piece.groups, np.uint8)
    count = len(groups)
    return Recovered(
        _keys(piece.namespaces, count),
        _keys(piece.keys, count),
        _keys(piece.parents, count),
        _numbers(piece.depths, count),
        groups,
        _numbers(piece.lengths, count),
        _numbers(piece.slots, count),
    )


def _keys(raw: bytes, count: int) -> npt.NDArray[np.uint8]:
    if len(raw) != 32 * count:
        raise WireError(f"{len(raw)} bytes of keys for {count} blocks")
    return np.frombuffer(raw, np.uint8).reshape(count, 32)


def _numbers(raw: bytes, count: int) -> npt.NDArray[np.int64]:
    if len(raw) != 8 * count:
        raise WireError(f"{len(raw)} bytes of numbers for {count} blocks")
    return np.frombuffer(raw, np.int64)
