"""The stack file: what is accepted, and that every error names its place and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flexkv_core.config import Capacity, load_stack
from flexkv_core.config.load import load_stack_config
from flexkv_core.config.references import resolve
from flexkv_core.config.sizes import parse_capacity, parse_size
from flexkv_core.config.source import read_text
from flexkv_core.config.stack import stack_of
from flexkv_core.errors import StackConfigError
from flexkv_core.policies import BUILT_IN, Eviction

BAD = yaml.safe_load((Path(__file__).parent / "data" / "bad_stacks.yaml").read_text())


def test_a_whole_stack(tmp_path: Path) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text(
        "block_size: 16\n"
        "tiers:\n"
        "  - backend: cpu\n    capacity: 32GiB\n    eviction: lru\n    huge_pages: true\n"
        f"  - backend: directory\n    root: {tmp_path}\n    capacity: 1.5TiB\n    deadline_s: 2\n"
        f"  - backend: directory\n    root: {tmp_path}/b\n    write_queue: 64 MiB\n    isolation: none\n"
    )
    stack = load_stack(file)
    assert stack.block_size == 16
    assert [tier.name for tier in stack.tiers] == ["cpu", "directory", "directory-2"]
    assert [tier.hosts for tier in stack.tiers] == [True, False, False]
    assert stack.tiers[0].capacity == Capacity(bytes=32 << 30)
    assert stack.tiers[1].capacity == Capacity(bytes=3 << 39)
    assert stack.tiers[2].capacity is None
    assert stack.tiers[2].write_queue == 64 << 20
    assert stack.tiers[1].deadline_s == 2.0
    assert stack.tiers[0].options.model_dump() == {"huge_pages": True, "prefault": True, "threads": None}


def test_options_of_eviction_and_admission() -> None:
    first = {"backend": "cpu", "capacity": "1GiB", "eviction": "lru", "hit_reward_seconds": 1.5, "evict_ratio": 0.05}
    lower = {"backend": "directory", "root": "x", "capacity": "1GiB", "admission": "second_touch"}
    tiers = load_stack({"tiers": [first, {**lower, "evict_start_threshold": 0.7}]}).tiers
    assert tiers[0].eviction == Eviction("lru", hit_reward_seconds=1.5)
    assert [(tier.evict_ratio, tier.evict_start_threshold) for tier in tiers] == [(0.05, 1.0), (0.0, 0.7)]
    assert [tier.admission for tier in tiers] == ["all", "second_touch"]
    slru = {"backend": "cpu", "capacity": "1GiB", "eviction": "slru", "slru_protected_threshold": 4}
    assert load_stack({"tiers": [slru]}).tiers[0].eviction == Eviction("slru", slru_protected_threshold=4)
    plain = load_stack({"tiers": [{"backend": "cpu", "capacity": "1GiB"}]}).tiers[0]
    assert (plain.eviction, plain.evict_ratio, plain.evict_start_threshold) == (Eviction(), 0.0, 1.0)
    for name in BUILT_IN:
        assert load_stack({"tiers": [{**slru, "eviction": name, "slru_protected_threshold": None}]})


@pytest.mark.parametrize("case", BAD, ids=lambda case: case["says"])
def test_bad_stacks(case: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text(case["text"])
    with pytest.raises(StackConfigError) as caught:
        load_stack(file)
    error = caught.value
    assert case["says"] in str(error)
    assert (error.line, error.column, error.key) == (case["line"], case["column"], case["key"]), str(error)
    assert error.file == str(file)
    if case["line"] is not None:
        assert str(error).startswith(f"{file}:{case['line']}:{case['column']}: ")


def test_there_are_forty_bad_stacks() -> None:
    assert len(BAD) >= 40


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StackConfigError, match="No such file"):
        load_stack(tmp_path / "nothing.yaml")
    with pytest.raises(StackConfigError, match="directory"):
        load_stack(tmp_path)
    file = tmp_path / "stack.yaml"
    file.write_bytes(b"tiers:\n  \xff\n")
    with pytest.raises(StackConfigError, match=r":2:3: is not UTF-8"):
        load_stack(file)
    file.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(StackConfigError, match="larger than"):
        load_stack(file)


def test_a_mapping_has_the_same_errors_without_a_place() -> None:
    with pytest.raises(StackConfigError, match=r"^<mapping>: tiers\[0\].capacity: 'x' is not a size") as caught:
        load_stack({"tiers": [{"backend": "cpu", "capacity": "x"}]})
    assert caught.value.line is None
    assert caught.value.value == "x"


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), (4096, 4096), ("64 KiB", 65536), ("500GB", 500 * 10**9), ("1.5TiB", 3 << 39), ("2mib", 2 << 20)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(1, 1 << 20), st.sampled_from(["KiB", "MiB", "GiB"]))
def test_whole_sizes_are_exact(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number << {"KiB": 10, "MiB": 20, "GiB": 30}[unit]


def test_capacities() -> None:
    assert parse_capacity("10000 blocks") == Capacity(blocks=10000)
    assert parse_capacity("unbounded").unbounded
    assert parse_capacity(" 1 block ") == Capacity(blocks=1)


@given(st.text(max_size=30))
def test_any_text_is_a_stack_or_a_clear_error(text: str) -> None:
    with pytest.raises(StackConfigError, match=r"^any\.yaml"):  # no text this short is a whole stack
        stack_of(resolve(read_text(text, "any.yaml"), {}))


def test_the_state_directory_may_be_a_reference() -> None:
    mapping = {"state_directory": "${STATE}/flexkv", "tiers": [{"backend": "cpu", "capacity": "1GiB"}]}
    loaded = load_stack_config(mapping, {"STATE": "/srv/hidden"})
    assert loaded.stack.state_directory == Path("/srv/hidden/flexkv")
    assert loaded.document["state_directory"] == "${STATE}/flexkv"
    assert "hidden" not in repr(loaded)
