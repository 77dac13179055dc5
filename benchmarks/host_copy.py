"""Host copies: gather and scatter of scattered fragments, seal and verify, each beside a contiguous memcpy.

256 MiB in blocks of 64 fragments of 32 KiB (32 layers, K and V), between tensors and the host region. The memcpy moves
as many bytes between the same two memories with the same threads, right after what it is compared with. Seal and
verify only read the payload; a copy also writes it.

    python benchmarks/host_copy.py [--json FILE]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from harness import Benchmark

from flexkv_core import _native
from flexkv_core.device.cpu import CpuDevice
from flexkv_core.layout import PAGE, KVGroup
from flexkv_core.region import HostRegion
from flexkv_core.seal import seal_blocks, verify_blocks

FRAGMENTS = 64
TOTAL = 256 << 20
RUNS = 15
MEMCPY = "_native.memcpy_parallel: std::memcpy of one contiguous range, split evenly over the same threads"

benchmark = Benchmark("host_copy")


def gigabytes_per_second(call: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        call()
        return TOTAL / (time.perf_counter() - start) / 1e9

    return measure


def aligned(size: int) -> npt.NDArray[np.uint8]:
    """Memory that starts at a page, as torch's large tensors do, and is present."""
    memory = np.ones(size + PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    return memory[start : start + size]


@benchmark.part
def fragments_of_32_kib(bench: Benchmark) -> None:
    for threads in (1, 2):
        measure(bench, 32 << 10, threads)


@benchmark.part
def smaller_fragments(bench: Benchmark) -> None:
    for kib in (16, 4):
        measure(bench, kib << 10, 1)


def measure(bench: Benchmark, fragment: int, threads: int) -> None:
    block_bytes = FRAGMENTS * fragment
    n = TOTAL // block_bytes
    pages, slot = 2 * n, KVGroup(block_bytes).slot_bytes
    rng = np.random.default_rng(0)
    tensors = aligned(FRAGMENTS * pages * fragment).reshape(FRAGMENTS, pages, fragment)
    device = CpuDevice([list(tensors)], threads=threads)
    blocks = rng.permutation(pages)[:n].astype(np.int64)
    offsets = rng.permutation(n).astype(np.int64) * slot
    keys, groups = rng.integers(0, 256, (n, 32), dtype=np.uint8), np.zeros(n, np.uint8)
    with HostRegion.create(n * slot, "off") as region:
        host, flat = region.array[:TOTAL], tensors.reshape(-1)[:TOTAL]

        def verify() -> None:
            # A block without its seal is rejected before its payload is read: that would time nothing.
            if verify_blocks(region.array, offsets, block_bytes, keys, groups, threads=threads).any():
                raise RuntimeError("verify: blocks are not sealed, so their checksums were not timed")

        def to_host() -> None:
            _native.memcpy_parallel(host, flat, threads)

        def to_device() -> None:
            _native.memcpy_parallel(flat, host, threads)

        # A memcpy to the host overwrites seals, so that of seal and verify goes the other way.
        calls: list[tuple[str, Callable[[], None], Callable[[], None]]] = [
            ("gather", lambda: device.gather(region.array, offsets, blocks), to_host),
            ("scatter", lambda: device.scatter(region.array, offsets, blocks), to_device),
            (
                "seal",
                lambda: seal_blocks(region.array, offsets, block_bytes, keys, groups, threads=threads),
                to_device,
            ),
            ("verify", verify, to_device),
        ]
        params = {"fragment_kib": fragment >> 10, "mib": TOTAL >> 20, "threads": threads}
        for name, call, reference in calls:
            bench.compare(
                name, params, "GB/s", gigabytes_per_second(call), MEMCPY, gigabytes_per_second(reference), RUNS
            )


if __name__ == "__main__":
    sys.exit(benchmark.main())
