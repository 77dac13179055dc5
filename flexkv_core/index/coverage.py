"""Coverage rules over arrays: which prefix can be supplied, and what it needs. No trees, no tiers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flexkv_core.layout import Coverage

BoolArray = npt.NDArray[np.bool_]


def _span(coverage: Coverage, blocks: int) -> int:
    """How many of the last positions before boundary `blocks` a group needs (an upper bound: cut at 0)."""
    return {"all": blocks, "window": coverage.blocks, "state": 1}[coverage.kind]


def covered_prefix(available: BoolArray, coverages: Sequence[Coverage]) -> int:
    """The longest prefix that can be supplied.

    Args:
        available: (groups, n) bool: whether group g's block at position i is to be had.
        coverages: one rule a group.

    Returns:
        The largest b in 0..n such that every group has the blocks its rule needs: "all" positions [0, b),
        "window" [max(0, b - w), b), "state" position b - 1. b = 0 needs nothing.

    Raises ValueError if `available` is not (len(coverages), n) bool, or there is no group.
    """
    if available.ndim != 2 or available.dtype != np.bool_ or available.shape[0] != len(coverages) or not coverages:
        raise ValueError(
            f"available is {available.dtype} {available.shape} for {len(coverages)} coverages: "
            "pass bool (groups, n) with one coverage for each of at least one group"
        )
    if available.all():
        return len(available[0])
    if all(coverage.kind == "all" for coverage in coverages):
        holes = np.flatnonzero(~available.all(axis=0))
        return int(holes[0]) if len(holes) else available.shape[1]
    boundaries = np.arange(available.shape[1] + 1)
    supplied = np.ones(boundaries.size, dtype=bool)
    for row, coverage in zip(available, coverages, strict=True):
        # run[b]: how many positions just before b are available without a gap
        gap_end = np.zeros_like(boundaries)
        gap_end[1:] = np.maximum.accumulate(np.where(row, 0, boundaries[1:]))
        run = boundaries - gap_end
        supplied &= run >= np.minimum(_span(coverage, available.shape[1]), boundaries)
    return int(np.flatnonzero(supplied)[-1])


def needed(coverages: Sequence[Coverage], blocks: int) -> BoolArray:
    """(groups, blocks) bool: which positions each group needs to continue after a prefix of `blocks` blocks.

    Raises ValueError if `blocks` is negative.
    """
    if blocks < 0:
        raise ValueError(f"blocks {blocks}: a prefix has 0 or more blocks")
    need = np.zeros((len(coverages), blocks), dtype=bool)
    for row, coverage in zip(need, coverages, strict=True):
        row[max(0, blocks - _span(coverage, blocks)) :] = True
    return need
