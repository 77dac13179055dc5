"""What a replay found: totals, the table, the JSON and the figures for the plot.

Owns the names and units of reported figures. Does not own how a request is served (`runners.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from flexkv_core.cli.runners import Served

TIER_FIELDS = (
    "stored_blocks",
    "evicted_blocks",
    "rejected_blocks",
    "bytes_read",
    "bytes_written",
    "corrupt_blocks",
    "failed_blocks",
    "dropped_blocks",
    "given_up_blocks",
    "restarts",
)
"""Counters of a tier that the report takes from `stats()` as they are."""


@dataclass(slots=True)
class Recorder:
    """Gathers what became of each request.

    Attributes:
        timestamps_ms, served: one entry a request.
        memcpy_bytes, memcpy_seconds: plain copies made between requests, for comparison.
    """

    timestamps_ms: list[float] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    memcpy_bytes: int = 0
    memcpy_seconds: float = 0.0

    def add(self, timestamp_ms: float, served: Served) -> None:
        self.timestamps_ms.append(timestamp_ms)
        self.served.append(served)

    def add_memcpy(self, nbytes: int, seconds: float) -> None:
        self.memcpy_bytes += nbytes
        self.memcpy_seconds += seconds


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one replay; `to_json` documents them by name, cli/README.md in words."""

    requests: int
    blocks: int
    hit_blocks: int
    tiers: Mapping[str, Mapping[str, int]]
    wrong_blocks: int
    lookup_us: Mapping[str, float | None]
    load_gb_s: float | None
    store_gb_s: float | None
    memcpy_gb_s: float | None
    seconds: float
    simulated: bool
    verify: bool
    notes: Sequence[str] = ()

    @property
    def hit_rate(self) -> float:
        """Hit blocks over blocks; 0 for no blocks."""
        return self.hit_blocks / self.blocks if self.blocks else 0.0

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "requests": self.requests,
            "blocks": self.blocks,
            "hit_blocks": self.hit_blocks,
            "hit_rate": self.hit_rate,
            "tiers": {name: dict(tier) for name, tier in self.tiers.items()},
            "wrong_blocks": self.wrong_blocks,
            "lookup_us": dict(self.lookup_us),
            "load_gb_s": self.load_gb_s,
            "store_gb_s": self.store_gb_s,
            "memcpy_gb_s": self.memcpy_gb_s,
            "seconds": self.seconds,
            "simulated": self.simulated,
            "verify": self.verify,
            "notes": list(self.notes),
        }


def make_report(
    recorder: Recorder,
    stats: Mapping[str, Any],
    seconds: float,
    *,
    simulated: bool,
    verify: bool,
    notes: Sequence[str] = (),
) -> Report:
    """Sum up a replay; `stats` is what the cache's `stats()` returned after the last request."""
    served = recorder.served
    hits: dict[str, int] = {}
    for one in served:
        for tier, blocks in one.hits_by_tier.items():
            hits[tier] = hits.get(tier, 0) + blocks
    counters: Mapping[str, Mapping[str, Any]] = stats["tiers"]
    names = [*counters, *(name for name in hits if name not in counters)]
    lookups = np.array([one.lookup_seconds for one in served if one.blocks]) * 1e6
    percentile = {f"p{p}": float(np.percentile(lookups, p)) if len(lookups) else None for p in (50, 99)}
    return Report(
        requests=len(served),
        blocks=sum(one.blocks for one in served),
        hit_blocks=sum(one.hit_blocks for one in served),
        tiers={
            name: {
                "hit_blocks": hits.get(name, 0),
                **{key: int(counters.get(name, {}).get(key, 0)) for key in TIER_FIELDS},
            }
            for name in names
        },
        wrong_blocks=sum(one.wrong_blocks for one in served),
        lookup_us=percentile,
        load_gb_s=_rate(sum(one.load_bytes for one in served), sum(one.load_seconds for one in served)),
        store_gb_s=_rate(sum(one.store_bytes for one in served), sum(one.store_seconds for one in served)),
        memcpy_gb_s=_rate(recorder.memcpy_bytes, recorder.memcpy_seconds),
        seconds=seconds,
        simulated=simulated,
        verify=verify,
        notes=tuple(notes),
    )


def print_report(report: Report, console: Console) -> None:
    """Print the table of tiers and the totals."""
    title = "replay, simulated" if report.simulated else "replay"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("tier", no_wrap=True)
    headings = ("hits", "share", "stored", "evicted", "rejected", "read", "written", "corrupt", "failed")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, tier in report.tiers.items():
        table.add_row(
            name,
            f"{tier['hit_blocks']:,}",
            _share(tier["hit_blocks"], report.blocks),
            f"{tier['stored_blocks']:,}",
            f"{tier['evicted_blocks']:,}",
            f"{tier['rejected_blocks']:,}",
            format_bytes(tier["bytes_read"]),
            format_bytes(tier["bytes_written"]),
            f"{tier['corrupt_blocks']:,}",
            f"{tier['failed_blocks']:,}",
        )
    misses = report.blocks - report.hit_blocks
    table.add_section()
    table.add_row("all tiers", f"{report.hit_blocks:,}", _share(report.hit_blocks, report.blocks))
    table.add_row("misses", f"{misses:,}", _share(misses, report.blocks))
    console.print(table)
    for line in _summary(report):
        console.print(line, highlight=False)


def _summary(report: Report) -> list[str]:
    lines = [f"requests {report.requests:,}, blocks {report.blocks:,}, {report.seconds:.1f} s"]
    p50, p99 = report.lookup_us["p50"], report.lookup_us["p99"]
    if p50 is not None and p99 is not None:
        lines.append(f"lookup   p50 {p50:.1f} us, p99 {p99:.1f} us")
    if not report.simulated:
        lines.append(f"load     {_compared(report.load_gb_s, report.memcpy_gb_s)}")
        lines.append(f"store    {_compared(report.store_gb_s, report.memcpy_gb_s)}")
        checked = f"of {report.hit_blocks:,} loaded, every byte compared"
        unverified = "" if report.verify else "; verification was off"
        lines.append(f"wrong    {report.wrong_blocks:,} blocks {checked}{unverified}")
    return [*lines, *(f"note     {note}" for note in report.notes)]


def _compared(rate: float | None, memcpy: float | None) -> str:
    if rate is None:
        return "nothing moved"
    if memcpy is None:
        return f"{rate:.2f} GB/s"
    return f"{rate:.2f} GB/s, {rate / memcpy:.2f} of a NumPy copy in the same run ({memcpy:.2f} GB/s)"


@dataclass(frozen=True, slots=True)
class Timeline:
    """Blocks by outcome over the trace's time.

    Attributes:
        minutes: (bins,) float64, middle of each bin, in minutes of the trace.
        blocks: series (tier names in the stack's order, then "miss") to (bins,) float64, blocks a minute.
    """

    minutes: npt.NDArray[np.float64]
    blocks: Mapping[str, npt.NDArray[np.float64]]


def make_timeline(recorder: Recorder, tiers: Sequence[str], bins: int = 60) -> Timeline:
    """Bin a replay by the trace's timestamps."""
    minutes = np.array(recorder.timestamps_ms, np.float64) / 60_000
    first = float(minutes.min()) if len(minutes) else 0.0
    span = max(float(minutes.max()) - first, 1e-3) if len(minutes) else 1e-3
    width = span / bins
    place = np.minimum(((minutes - first) / width).astype(np.int64), bins - 1)

    def binned(values: list[int]) -> npt.NDArray[np.float64]:
        sums = np.bincount(place, weights=np.array(values, np.float64), minlength=bins)
        return (sums / width).astype(np.float64)

    series = {name: binned([one.hits_by_tier.get(name, 0) for one in recorder.served]) for name in tiers}
    series["miss"] = binned([one.blocks - one.hit_blocks for one in recorder.served])
    middles = (first + (np.arange(bins) + 0.5) * width).astype(np.float64)
    return Timeline(middles, series)


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def _rate(nbytes: int, seconds: float) -> float | None:
    return nbytes / seconds / 1e9 if nbytes and seconds else None
