"""Traces: reading the Mooncake format, and the tokens that its hash ids stand for.

Owns the format and its errors. Does not own keys (`flexkv_core.blocks`) or what is done with a request.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import msgspec
import numpy as np
import numpy.typing as npt

from flexkv_core.errors import FlexKVError

HASH_ID_TOKENS = 512
"""Tokens that one hash id stands for, fixed by the Mooncake format."""

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_HASH_ID = 2**63 - 1


class TraceError(FlexKVError, ValueError):
    """A trace that cannot be read; the text names file, line, field and value."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        timestamp_ms: milliseconds since the trace began.
        input_length, output_length: tokens.
        hash_ids: (ceil(input_length / 512) or more,) int64; equal ids stand for equal 512 tokens.
    """

    timestamp_ms: float
    input_length: int
    output_length: int
    hash_ids: npt.NDArray[np.int64]


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """Read the first `limit` requests (all if None) of a trace, plain or gzipped JSON lines.

    Empty lines are skipped and unknown fields ignored. Raises TraceError.
    """
    requests: list[TraceRequest] = []
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(requests) >= limit:
                    break
                if line.strip():
                    requests.append(_parse(path, number, line))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TraceError(f"{path}: cannot be read: {reason}") from error
    if not requests and limit != 0:
        raise TraceError(f"{path}: holds no requests: give a file of JSON lines in the Mooncake format")
    return requests


def request_tokens(request: TraceRequest) -> npt.NDArray[np.int32]:
    """Return the (input_length,) int32 tokens in [0, 2^31) of a request.

    A token is a hash of (hash id, position within its 512 tokens) alone, so equal hash ids give equal tokens
    in every request, run and machine. Two ids share all 512 tokens only if they collide in 64 bits.
    """
    needed = -(-request.input_length // HASH_ID_TOKENS)
    mixed = _splitmix64(request.hash_ids[:needed].view(np.uint64))
    low = mixed.astype(np.uint32)[:, None]
    high = (mixed >> np.uint64(32)).astype(np.uint32)[:, None]
    # murmur3's finaliser with the id's second half added between its rounds; in place, so that a request
    # stays in the processor's cache
    words = low + _POSITIONS
    scratch = words >> np.uint32(16)
    words ^= scratch
    words *= np.uint32(0x85EBCA6B)
    np.right_shift(words, np.uint32(13), out=scratch)
    words ^= scratch
    words += high
    words *= np.uint32(0xC2B2AE35)
    np.right_shift(words, np.uint32(16), out=scratch)
    words ^= scratch
    words >>= np.uint32(1)
    return words.reshape(-1)[: request.input_length].view(np.int32)


_POSITIONS = np.arange(HASH_ID_TOKENS, dtype=np.uint32) * np.uint32(0x9E3779B9)


def _splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Steele, Lea and Flood's SplitMix64 finaliser, a bijection of 64-bit integers."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as probe:
        zipped = probe.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    return cast(IO[bytes], gzip.open(path, "rb")) if zipped else path.open("rb")


def _parse(path: Path, number: int, line: bytes) -> TraceRequest:
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}, line {number}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise TraceError(f"{path}, line {number}: a JSON {type(record).__name__}: each line is an object")

    def fail(field: str, rule: str) -> NoReturn:
        value = _shorten(record[field]) if field in record else "is missing"
        raise TraceError(f"{path}, line {number}: {field} {value}: {rule}")

    timestamp: Any = record.get("timestamp")
    if type(timestamp) not in (int, float) or not math.isfinite(timestamp) or timestamp < 0:
        fail("timestamp", "must be milliseconds, a number of at least 0")
    length = record.get("input_length")
    if type(length) is not int or length < 1:
        fail("input_length", "must be an integer of at least 1 token")
    output = record.get("output_length")
    if type(output) is not int or output < 0:
        fail("output_length", "must be an integer of at least 0 tokens")
    ids = record.get("hash_ids")
    if not isinstance(ids, list):
        fail("hash_ids", "must be a list of integers")
    for wrong in _not_hash_ids(ids):
        raise TraceError(f"{path}, line {number}: hash_ids entry {_shorten(wrong)}: must be an integer in [0, 2^63)")
    if length > len(ids) * HASH_ID_TOKENS:
        fail(
            "input_length",
            f"needs {-(-length // HASH_ID_TOKENS)} hash_ids of {HASH_ID_TOKENS} tokens, there are {len(ids)}",
        )
    return TraceRequest(float(timestamp), length, output, np.array(ids, np.int64))


def _not_hash_ids(ids: list[Any]) -> Iterator[Any]:
    return (entry for entry in ids if type(entry) is not int or not 0 <= entry <= _MAX_HASH_ID)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
