"""The benchmarks' harness: what a row says is what was measured, and one file holds all benchmarks."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HARNESS = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "harness.py"), run_name="harness")
Benchmark: Any = HARNESS["Benchmark"]
FIELDS = ["name", "params", "value", "unit", "reference", "reference_value", "ratio", "runs", "min", "max"]


def figures(calls: list[str], name: str, values: list[float]) -> Callable[[], float]:
    rest = iter(values)

    def measure() -> float:
        calls.append(name)
        return next(rest)

    return measure


def test_runs_are_interleaved_and_the_first_pair_does_not_count() -> None:
    calls: list[str] = []
    bench = Benchmark("b")
    row = bench.compare(
        "x",
        {"size": 1},
        "GB/s",
        figures(calls, "A", [100, 2, 9, 4]),
        "ref",
        figures(calls, "B", [1, 1, 3, 1]),
        runs=3,
    )
    assert calls == ["A", "B"] * 4
    assert (row.name, row.params, row.unit, row.reference, row.runs) == ("b/x", {"size": 1}, "GB/s", "ref", 3)
    assert (row.value, row.reference_value) == (4, 1)
    assert (row.ratio, row.min, row.max) == (3, 2, 4)  # of 2/1, 9/3, 4/1: pairwise, not of the medians
    assert bench.rows == [row]


def test_a_row_without_a_reference() -> None:
    row = Benchmark("b").add_row("count", {}, "calls", [3, 1, 2])
    assert (row.name, row.value, row.runs) == ("b/count", 2, 3)
    assert row.reference is row.reference_value is row.ratio is row.min is row.max is None


def test_bad_input() -> None:
    bench = Benchmark("b")
    with pytest.raises(ValueError, match="runs is 0"):
        bench.compare("x", {}, "s", lambda: 1, "ref", lambda: 1, runs=0)
    with pytest.raises(ValueError, match="not positive"):
        bench.compare("x", {}, "s", lambda: 1, "ref", lambda: 0)
    with pytest.raises(ValueError, match="values is empty"):
        bench.add_row("x", {}, "s", [])
    assert bench.rows == []


def test_main_prints_a_table_and_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench, path = Benchmark("b"), tmp_path / "new" / "all.json"

    @bench.part
    def part(rows: Any) -> None:
        rows.compare("x", {"n": 1}, "ms", lambda: 3, "ref", lambda: 2)

    assert bench.main(["--json", str(path)]) == 0
    assert "b/x" in capsys.readouterr().out
    (row,) = json.loads(path.read_text())
    assert list(row) == FIELDS
    assert (row["value"], row["ratio"]) == (3, 1.5)


def test_one_file_for_all_benchmarks(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    for name, value in [("a", 1), ("ab", 2), ("a", 3)]:
        bench = Benchmark(name)
        bench.add_row("x", {}, "calls", [value])
        bench.write(path)
    assert [(row["name"], row["value"]) for row in json.loads(path.read_text())] == [("ab/x", 2), ("a/x", 3)]
