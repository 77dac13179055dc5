"""How fast block keys are made: tokens a second on one thread, through the Python call, beside hashlib.

A figure is the best of ten calls, for both sides: one call takes milliseconds, and whoever shares the processor
takes it away for longer.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import numpy as np
from harness import Benchmark

from flexkv_core import _native
from flexkv_core.blocks import block_keys

TOKENS = 131_072
ROOT = bytes(32)
REFERENCE = "for part in parts: key = hashlib.sha256(part + key).digest()  # parts: made beforehand"

bench = Benchmark("keys")


@bench.part
def tokens_a_second(rows: Benchmark) -> None:
    for dtype in (np.int32, np.int64):
        tokens = np.random.default_rng(0).integers(0, 2**31, TOKENS, dtype=dtype)
        for block_size in (16, 64, 512):
            compare(rows, tokens, block_size)


def compare(rows: Benchmark, tokens: np.ndarray, block_size: int) -> None:
    data = tokens.astype("<i4").tobytes()
    parts = [data[at : at + 4 * block_size] for at in range(0, len(data), 4 * block_size)]

    def native() -> None:
        block_keys(tokens, block_size, ROOT)

    def by_hashlib() -> None:
        key = ROOT
        for part in parts:
            key = hashlib.sha256(part + key).digest()

    params = {
        "block_size": block_size,
        "tokens": TOKENS,
        "dtype": str(tokens.dtype),
        "threads": 1,
        "sha256": _native.sha256_implementation(),
    }
    rows.compare("hash", params, "Mtokens/s", lambda: rate(native), REFERENCE, lambda: rate(by_hashlib))


def rate(hash_all: Callable[[], None]) -> float:
    """Return millions of tokens a second, of the best of ten calls."""
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        hash_all()
        best = min(best, time.perf_counter() - start)
    return TOKENS / best / 1e6


if __name__ == "__main__":
    raise SystemExit(bench.main())
