"""Host copies: gather and scatter of scattered fragments, seal and verify, each against a contiguous memcpy.

The memcpy moves as many bytes between the same two memories with the same threads, right before what it is
compared with; a row gives medians over the rounds of GB/s (10^9 bytes) and of the paired ratios. Seal and
verify only read the payload, a copy also writes it. Run on a quiet machine::

    python benchmarks/host_copy.py [--mib 256] [--fragment-kib 32] [--threads 1 2] [--rounds 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_core import _native
from flexkv_core.device.cpu import CpuDevice
from flexkv_core.layout import PAGE, KVGroup
from flexkv_core.region import HostRegion
from flexkv_core.seal import seal_blocks, verify_blocks

FRAGMENTS = 64  # a block: 32 layers, K and V


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def aligned(size: int) -> npt.NDArray[np.uint8]:
    """Memory that starts at a page, as torch's large tensors do, and is present."""
    memory = np.ones(size + PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    return memory[start : start + size]


def measure(mib: int, fragment: int, threads: int, rounds: int) -> list[dict[str, float | int | str]]:
    block_bytes = FRAGMENTS * fragment
    n = max(1, (mib << 20) // block_bytes)
    total, pages = n * block_bytes, 2 * n
    slot = KVGroup(block_bytes).slot_bytes
    rng = np.random.default_rng(0)
    tensors = aligned(FRAGMENTS * pages * fragment).reshape(FRAGMENTS, pages, fragment)
    device = CpuDevice([list(tensors)], threads=threads)
    blocks = rng.permutation(pages)[:n].astype(np.int64)
    offsets = rng.permutation(n).astype(np.int64) * slot
    keys, groups = rng.integers(0, 256, (n, 32), dtype=np.uint8), np.zeros(n, np.uint8)
    times: dict[str, list[tuple[float, float]]] = {}
    with HostRegion.create(n * slot, "off") as region:

        def to_host() -> None:
            _native.memcpy_parallel(region.array[:total], tensors.reshape(-1)[:total], threads)

        def to_device() -> None:
            _native.memcpy_parallel(tensors.reshape(-1)[:total], region.array[:total], threads)

        def seal() -> None:
            seal_blocks(region.array, offsets, block_bytes, keys, groups, threads=threads)

        def verify() -> None:
            # A block without its seal is rejected before its payload is read: that would time nothing.
            if verify_blocks(region.array, offsets, block_bytes, keys, groups, threads=threads).any():
                raise RuntimeError("verify: blocks are not sealed, so their checksums were not timed")

        # (what, call, memcpy to compare with). A memcpy to the host overwrites seals, so that of seal and
        # verify goes the other way.
        pairs: list[tuple[str, Callable[[], None], Callable[[], None]]] = [
            ("gather", lambda: device.gather(region.array, offsets, blocks), to_host),
            ("scatter", lambda: device.scatter(region.array, offsets, blocks), to_device),
            ("seal", seal, to_device),
            ("verify", verify, to_device),
        ]
        for _ in range(rounds + 1):  # the first is a warm-up
            for name, call, reference in pairs:
                base = seconds(reference)
                times.setdefault(name, []).append((seconds(call), base))
    return [
        {
            "what": name,
            "threads": threads,
            "bytes": total,
            "fragment_bytes": fragment,
            "gb_s": total / statistics.median(t for t, _ in runs[1:]) / 1e9,
            "memcpy_gb_s": total / statistics.median(base for _, base in runs[1:]) / 1e9,
            "ratio": statistics.median(base / t for t, base in runs[1:]),
        }
        for name, runs in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="bytes a call, MiB")
    parser.add_argument("--fragment-kib", type=float, nargs="+", default=[32], help="sizes of fragments, KiB")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = []
    print(f"checksum kernel: {_native.checksum_kernel()}")
    print(f"{'what':8} {'threads':>7} {'fragment':>9} {'GB/s':>7} {'memcpy':>7} {'ratio':>6}")
    for kib in options.fragment_kib:
        for threads in options.threads:
            for row in measure(options.mib, int(kib * 1024), threads, options.rounds):
                rows.append(row)
                print(
                    f"{row['what']:8} {threads:7} {int(kib * 1024):9} {row['gb_s']:7.2f} "
                    f"{row['memcpy_gb_s']:7.2f} {row['ratio']:6.3f}",
                    flush=True,
                )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
