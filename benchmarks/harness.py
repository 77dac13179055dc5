"""The one harness of all benchmarks, and the one JSON that they write.

Owns the rows, the interleaved comparison with a reference, the table and the file. Does not own what is
measured: each benchmark is a script beside this one (see README.md).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Measure = Callable[[], float]
"""Does the work once and returns the figure, in the row's unit."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. The JSON is a list of these.

    Attributes:
        name: "<benchmark>/<what>".
        params: what the figure depends on: sizes, counts, dtypes, threads.
        value: the median of the runs.
        unit: of `value` and `reference_value`.
        reference: the exact command or code that it is compared with; None: with nothing.
        reference_value: the median of the reference's runs.
        ratio: the median of the pairwise ratios value / reference; a pair ran back to back.
        runs: how many pairs (or values, without a reference) were measured.
        min, max: of the pairwise ratios.
    """

    name: str
    params: Mapping[str, object]
    value: float
    unit: str
    reference: str | None
    reference_value: float | None
    ratio: float | None
    runs: int
    min: float | None
    max: float | None


class Benchmark:
    """Rows of one benchmark. Register parts with `part`, then call `main`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[Row] = []
        self._parts: list[Callable[[Benchmark], None]] = []

    def part(self, function: Callable[[Benchmark], None]) -> Callable[[Benchmark], None]:
        """Register a function that `main` calls to add rows; usable as a decorator."""
        self._parts.append(function)
        return function

    def compare(
        self,
        name: str,
        params: Mapping[str, object],
        unit: str,
        measure: Measure,
        reference: str,
        reference_measure: Measure,
        runs: int = 7,
    ) -> Row:
        """Measure beside a reference, interleaved (A B A B ...), after one pair that does not count.

        Machines drift: only what ran back to back is compared. Raises ValueError for runs < 1 or a reference
        whose figure is not positive.
        """
        if runs < 1:
            raise ValueError(f"runs is {runs}: measure at least one pair")
        pairs = [(float(measure()), float(reference_measure())) for _ in range(runs + 1)][1:]
        if any(beside <= 0 for _, beside in pairs):
            raise ValueError(f"{name}: the reference's figure is not positive, so that there is no ratio")
        ratios = [value / beside for value, beside in pairs]
        row = Row(
            name=f"{self.name}/{name}",
            params=dict(params),
            value=statistics.median(value for value, _ in pairs),
            unit=unit,
            reference=reference,
            reference_value=statistics.median(beside for _, beside in pairs),
            ratio=statistics.median(ratios),
            runs=runs,
            min=min(ratios),
            max=max(ratios),
        )
        self.rows.append(row)
        return row

    def add_row(self, name: str, params: Mapping[str, object], unit: str, values: Sequence[float]) -> Row:
        """Add the median of figures that have no reference, such as a count."""
        if not values:
            raise ValueError(f"{name}: values is empty: give at least one figure")
        row = Row(
            name=f"{self.name}/{name}",
            params=dict(params),
            value=statistics.median(values),
            unit=unit,
            reference=None,
            reference_value=None,
            ratio=None,
            runs=len(values),
            min=None,
            max=None,
        )
        self.rows.append(row)
        return row

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the parts, print the table and, with ``--json FILE``, write the rows. Returns the exit status."""
        parser = argparse.ArgumentParser(description=f"FlexKV benchmark: {self.name}")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write rows here; others' rows are kept")
        arguments = parser.parse_args(argv)
        for part in self._parts:
            part(self)
        print_rows(self.rows, f"{self.name}: {machine()}")
        if arguments.json:
            self.write(arguments.json)
        return 0

    def write(self, path: Path) -> None:
        """Write the rows to a JSON list: this benchmark's older ones are replaced, others' are kept."""
        kept = []
        if path.exists():
            kept = [row for row in json.loads(path.read_text()) if row["name"].split("/")[0] != self.name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept + [asdict(row) for row in self.rows], indent=1) + "\n")


def machine() -> str:
    """The processor, Python and NumPy that figures were measured with."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    try:
        numpy = f", NumPy {version('numpy')}"
    except PackageNotFoundError:
        numpy = ""
    return f"{model}, Python {platform.python_version()}{numpy}"


def print_rows(rows: Sequence[Row], title: str) -> None:
    """Print the figures as a table, and below it, once each, what they were compared with."""
    references = list(dict.fromkeys(row.reference for row in rows if row.reference))
    table = Table(title=title)
    table.add_column("name", overflow="fold")
    for heading in ("value", "reference", "unit", "ratio", "min", "max", "runs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        params = " ".join(f"{name}={value}" for name, value in row.params.items())
        beside, ratios = "", ["", "", ""]
        if row.reference is not None:
            beside = f"[{references.index(row.reference) + 1}] {row.reference_value:,.4g}"
            ratios = [f"{ratio:.2f}" for ratio in (row.ratio, row.min, row.max)]
        figures = [f"{row.value:,.4g}", beside, row.unit, *ratios, str(row.runs)]
        table.add_row(*map(escape, [f"{row.name}\n{params}", *figures]))
    console = Console()
    console.print(table)
    for number, reference in enumerate(references, 1):
        console.print(f"[{number}] {reference}", markup=False, highlight=False)
