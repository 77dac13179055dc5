"""The Mooncake format and the tokens its hash ids stand for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_core.cli.trace import TraceError, TraceRequest, read_trace, request_tokens

LINES = [
    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": list(range(14))},
    {"timestamp": 3000, "input_length": 2290, "output_length": 316, "hash_ids": [0, 42, 43, 44, 45]},
]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def request(length: int, ids: list[int]) -> TraceRequest:
    return TraceRequest(0.0, length, 1, np.array(ids, np.int64))


def test_plain_and_gzipped_read_alike(tmp_path: Path) -> None:
    plain = write(tmp_path / "trace.jsonl", LINES)
    zipped = tmp_path / "trace.any-name"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, zipped):
        requests = read_trace(path)
        assert [r.timestamp_ms for r in requests] == [0.0, 3000.0]
        assert [r.input_length for r in requests] == [6758, 2290]
        assert requests[1].hash_ids.tolist() == [0, 42, 43, 44, 45]
    assert len(read_trace(plain, limit=1)) == 1


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"timestamp": "soon"}, ["timestamp 'soon'"]),
        ({"timestamp": -1}, ["timestamp -1"]),
        ({"timestamp": True}, ["timestamp True"]),
        ({"input_length": 1.5}, ["input_length 1.5"]),
        ({"input_length": 0}, ["input_length 0"]),
        ({"input_length": 2561}, ["input_length 2561", "needs 6 hash_ids", "there are 5"]),
        ({"output_length": None}, ["output_length None"]),
        ({"hash_ids": 7}, ["hash_ids 7"]),
        ({"hash_ids": [0, "1", 2, 3, 4]}, ["hash_ids entry '1'"]),
        ({"hash_ids": [0, -1, 2, 3, 4]}, ["hash_ids entry -1"]),
        ({"hash_ids": [0, 2**63, 2, 3, 4]}, [f"hash_ids entry {2**63}"]),
    ],
)
def test_errors_name_file_line_field_and_value(tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    path = write(tmp_path / "bad.jsonl", [LINES[0], {**LINES[1], **change}])
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    for part in [f"{path}, line 2: ", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize("field", ["timestamp", "input_length", "output_length", "hash_ids"])
def test_missing_fields_are_named(tmp_path: Path, field: str) -> None:
    path = write(tmp_path / "bad.jsonl", [{k: v for k, v in LINES[0].items() if k != field}])
    with pytest.raises(TraceError, match=f"line 1: {field} is missing"):
        read_trace(path)


def test_unreadable_files_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none")
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(TraceError, match="no requests"):
        read_trace(tmp_path / "empty")
    (tmp_path / "text").write_text("hello\n")
    with pytest.raises(TraceError, match="line 1: not JSON"):
        read_trace(tmp_path / "text")
    (tmp_path / "list").write_text("[1]\n")
    with pytest.raises(TraceError, match="line 1: a JSON list"):
        read_trace(tmp_path / "list")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(json.dumps(LINES[0]).encode())[:-9])
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "cut.gz")


def plain_token(hash_id: int, position: int) -> int:
    """The documented hash in plain Python, one token at a time."""
    mixed = (hash_id + 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    mixed ^= mixed >> 31
    low, high = mixed % 2**32, mixed >> 32
    word = (low + position * 0x9E3779B9) % 2**32
    word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
    word = ((word ^ (word >> 13)) + high) * 0xC2B2AE35 % 2**32
    return (word ^ (word >> 16)) >> 1


def test_tokens_are_fixed_for_ever() -> None:
    """Persistent tiers outlive a release: the tokens of a trace may never change."""
    ids = [0, 182789, 2**63 - 1]
    tokens = request_tokens(request(3 * 512, ids))
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [plain_token(hash_id, position) for hash_id in ids for position in range(512)]
    assert tokens[0] == 1792110875


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6), st.data())
def test_tokens_depend_on_id_and_position_alone(ids: list[int], data: st.DataObject) -> None:
    length = data.draw(st.integers(1, len(ids) * 512))
    tokens = request_tokens(request(length, ids))
    assert tokens.shape == (length,)
    assert tokens.min() >= 0
    for place, hash_id in enumerate(ids):
        alone = request_tokens(request(512, [hash_id]))
        part = tokens[place * 512 : (place + 1) * 512]
        assert np.array_equal(part, alone[: len(part)])


def test_different_ids_give_different_tokens() -> None:
    tokens = request_tokens(request(512 * 5000, list(range(5000)))).reshape(5000, 512)
    assert len(np.unique(tokens[:, :2], axis=0)) == 5000
    assert len(np.unique(tokens)) > 0.99 * tokens.size, "512 tokens of an id differ from each other too"
