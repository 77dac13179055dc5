"""Coverage rules as arithmetic on arrays: which prefix is supplied, and what a prefix needs. No state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flexkv_core.layout import Coverage


def covered_prefix(available: npt.NDArray[np.bool_], coverages: Sequence[Coverage]) -> int:
    """Return the longest prefix, in blocks, that every group can supply.

    Args:
        available: (groups, n) bool, whether a block of a group can be had.
        coverages: one rule a group.

    A prefix of b blocks needs: of an `all` group the blocks [0, b), of a `window` group the last w of them, of a
    `state` group block b - 1. The empty prefix needs nothing.
    """
    blocks = available.shape[1]
    fine = np.ones(blocks + 1, np.bool_)
    for row, rule in zip(available, coverages, strict=True):
        if rule.kind == "all":
            fine[1:] &= np.logical_and.accumulate(row)
        elif rule.kind == "state":
            fine[1:] &= row
        else:
            lacking = np.concatenate([[0], np.cumsum(~row)])
            start = np.maximum(np.arange(1, blocks + 1) - rule.blocks, 0)
            fine[1:] &= lacking[1:] == lacking[start]
    return int(np.flatnonzero(fine)[-1])


def needed(coverages: Sequence[Coverage], blocks: int) -> npt.NDArray[np.bool_]:
    """Return (groups, blocks) bool: the blocks that a prefix of `blocks` blocks needs of each group."""
    wanted = np.zeros((len(coverages), blocks), np.bool_)
    for row, rule in zip(wanted, coverages, strict=True):
        if rule.kind == "all":
            row[:] = True
        elif rule.kind == "state":
            row[blocks - 1 :] = True
        else:
            row[max(0, blocks - rule.blocks) :] = True
    return wanted
