"""How long operations take: counts by bucket, cheap enough for every request.

Owns the buckets and their counts. Written and read on the owner thread, without a lock. Does not own what is measured
(`client_session.py`) or how it is shown (`metrics.py`, `flexkv status`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any

_MS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000)
_FROM_100_US = tuple(each / 1000 for each in _MS)
BUCKETS: dict[str, tuple[float, ...]] = {
    "lookup": (20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3, 0.25, 1.0),
    "fetch": _FROM_100_US,
    "load": _FROM_100_US,
    "store": _FROM_100_US,
}
"""Operation -> upper bounds, seconds, ascending; what takes longer is in a last bucket without one."""


class Latencies:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._counts = {what: [0] * (len(bounds) + 1) for what, bounds in BUCKETS.items()}
        self._seconds = dict.fromkeys(BUCKETS, 0.0)

    def observe(self, what: str, seconds: float) -> None:
        """An operation has taken so long."""
        self._counts[what][bisect_left(BUCKETS[what], seconds)] += 1
        self._seconds[what] += seconds

    def figures(self) -> dict[str, Any]:
        """By operation: `seconds` in all, `bounds`, and `counts`: how many took no longer than each bound, and no less
        than the one before; the last count has no bound."""
        return {
            what: {"seconds": self._seconds[what], "bounds": list(BUCKETS[what]), "counts": list(counts)}
            for what, counts in self._counts.items()
        }


def quantile(figures: dict[str, Any], share: float) -> float | None:
    """The bound below which this share of the operations of one kind lies, an upper estimate: infinite in the last
    bucket, None where there were none."""
    counts: list[int] = figures["counts"]
    bounds: list[float] = [*figures["bounds"], math.inf]
    wanted, seen = share * sum(counts), 0
    for count, bound in zip(counts, bounds, strict=True):
        seen += count
        if count and seen >= wanted:
            return bound
    return None
