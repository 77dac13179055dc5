"""What callers of manager and client pass: checked in one place, with errors that name the fix. No state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flexkv_core.blocks import Keys
from flexkv_core.errors import KeyInputError, KeyTypeError

DeviceBlocks = npt.NDArray[np.int64] | Sequence[npt.NDArray[np.int64]]
"""Device blocks of a prefix: (n,) int64, or one such array a KV group."""


def checked_keys(keys: Keys) -> Keys:
    """(n, 32) uint8, C-contiguous. Raises KeyTypeError or KeyInputError."""
    if not isinstance(keys, np.ndarray) or keys.dtype != np.uint8:
        kind = f"{keys.dtype} array" if isinstance(keys, np.ndarray) else type(keys).__name__
        raise KeyTypeError(f"keys is a {kind}: pass the (n, 32) uint8 array that block_keys() returns")
    if keys.ndim != 2 or keys.shape[1] != 32:
        raise KeyInputError(f"keys has shape {keys.shape}: pass an array of shape (n, 32)")
    return np.ascontiguousarray(keys)


def seconds(deadline_s: float) -> float:
    """Not less than 0; NaN is 0: it would confuse timers."""
    return max(0.0, float(deadline_s))  # in this order


def by_group(blocks: DeviceBlocks, groups: int, limit: int, name: str) -> Sequence[npt.NDArray[np.int64]]:
    """Return one int64 array a group, each at most `limit` long. Raises KeyInputError or KeyTypeError."""
    listed = [blocks] if isinstance(blocks, np.ndarray) else list(blocks)
    if len(listed) != groups:
        raise KeyInputError(f"{name} has arrays for {len(listed)} KV groups: this model has {groups}")
    for array in listed:
        if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.ndim != 1:
            raise KeyTypeError(f"{name} must be one-dimensional int64 arrays")
        if len(array) > limit:
            raise KeyInputError(f"{name} names {len(array)} blocks: at most {limit} can be given here")
    return listed
