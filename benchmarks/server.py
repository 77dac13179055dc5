"""The server: lookups of 32k-token prompts by many clients beside null calls of their size, and loads beside memcpy.

A null call sends as many bytes and gets an answer of a few bytes that costs nothing to make: what a lookup takes beyond
it is the lookup. Both take turns in the same processes. Loads go through client, server and device agent; the memcpy
moves as many bytes between the same two memories with the same threads.

    python benchmarks/server.py [--json FILE]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import Benchmark

from flexkv_core import _native
from flexkv_core.blocks import block_keys
from flexkv_core.device.cpu import CpuDevice
from flexkv_core.layout import PAGE, KVGroup, ModelSpec
from flexkv_core.server import Client, DeviceAgent, connect
from flexkv_core.server.launch import ensure_server

BLOCK_SIZE, TOKENS = 16, 32 << 10
CLIENTS, RATE, SECONDS = 8, 50, 20.0
NULL = "Client.null: a message of as many bytes, answered at once, by the same processes in turns"
LOADED = 1 << 30
FRAGMENT, LAYERS, THREADS = 32 << 10, 32, 2
MEMCPY = "_native.memcpy_parallel: std::memcpy of one contiguous range, split evenly over the same threads"
STACK = {"tiers": [{"backend": "cpu", "capacity": "1536MiB"}]}
SPEC = ModelSpec("loads", BLOCK_SIZE, (KVGroup(LAYERS * FRAGMENT),))
SMALL = ModelSpec("lookups", BLOCK_SIZE, (KVGroup(4096),))

benchmark = Benchmark("server")


def prompt(root: bytes) -> np.ndarray:
    return block_keys(np.arange(TOKENS, dtype=np.int32), BLOCK_SIZE, root)


def one_client(socket: str, seconds: float, rate: float, seed: int) -> tuple[list[float], list[float]]:
    """Null calls and lookups in turns, at a rate; their times in seconds."""
    rng = np.random.default_rng(seed)
    with connect(socket, deadline_s=5) as cache:
        namespace = cache.register(SMALL)
        keys = prompt(namespace.root)
        if cache.lookup(namespace, keys).host_blocks != len(keys):
            raise RuntimeError("the prompt is not held: the lookup would not walk it")
        data = keys.tobytes()
        calls: tuple[Callable[[], object], ...] = (lambda: cache.null(data), lambda: cache.lookup(namespace, keys))
        times: tuple[list[float], list[float]] = ([], [])
        due = end = time.perf_counter()
        end += seconds
        number = 0
        while due < end:
            due += rng.exponential(1 / rate) if rate else 0.0
            time.sleep(max(0.0, due - time.perf_counter()) if rate else 0.0)
            start = time.perf_counter()
            calls[number % 2]()
            times[number % 2].append(time.perf_counter() - start)
            number += 1
            if not rate:
                due = time.perf_counter()
    return times


def percentile(times: list[float], share: float) -> float:
    return float(np.quantile(times, share)) * 1000


def store_prompt(cache: Client, engine_socket: Path) -> None:
    """Have the looked-up prompt in host memory, so that a lookup walks all of it."""
    agent = DeviceAgent(engine_socket, engine=cache.engine, device=CpuDevice([[np.zeros((4, 4096), np.uint8)]]))
    agent.wait_connected(30)
    namespace = cache.register(SMALL)
    keys = prompt(namespace.root)
    transfer = cache.store(namespace, keys, np.zeros(len(keys), np.int64))
    if not cache.wait(transfer, 60) or transfer.error:
        raise RuntimeError(f"the prompt could not be stored: {transfer.error}")
    agent.close()


@benchmark.part
def lookups(bench: Benchmark) -> None:
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "s"
        ensure_server(STACK, socket, linger_s=1.0)
        with connect(socket, engine="store") as cache:
            store_prompt(cache, socket)
            params = {"tokens": TOKENS, "keys": TOKENS // BLOCK_SIZE}
            nulls, found = one_client(str(socket), 4.0, 0, 1)
            pairs = min(len(nulls), len(found))
            report(bench, "lookup, idle, p50", {**params, "clients": 1}, [(nulls[:pairs], found[:pairs])], 0.5)
            command = [sys.executable, __file__, "client", str(socket), str(SECONDS), str(RATE)]
            clients = [
                subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True)
                for number in range(CLIENTS)
            ]
            results = [json.loads(client.communicate()[0]) for client in clients]
            busy = {**params, "clients": CLIENTS, "requests_per_second": CLIENTS * RATE}
            # By second-long slices over all clients, so that a ratio's spread is seen.
            slices = sliced(results, int(SECONDS / 4))
            report(bench, "lookup, p50", busy, slices, 0.5)
            report(bench, "lookup, p99", busy, slices, 0.99)


def sliced(results: list[list[list[float]]], count: int) -> list[tuple[list[float], list[float]]]:
    """Times of all clients, by slices of the run."""
    slices = []
    for at in range(count):
        part: tuple[list[float], list[float]] = ([], [])
        for nulls, found in results:
            for kind, times in enumerate((nulls, found)):
                step = len(times) / count
                part[kind].extend(times[int(at * step) : int((at + 1) * step)])
        slices.append(part)
    return slices


def report(
    bench: Benchmark,
    name: str,
    params: dict[str, object],
    slices: list[tuple[list[float], list[float]]],
    share: float,
) -> None:
    """A percentile in milliseconds beside that of the null calls, slice by slice."""
    pairs = [(percentile(found, share), percentile(nulls, share)) for nulls, found in slices]
    values = iter([pairs[0], *pairs])  # the first pair does not count
    current = (0.0, 0.0)

    def value() -> float:
        nonlocal current
        current = next(values)
        return current[0]

    bench.compare(name, params, "ms", value, NULL, lambda: current[1], len(slices))


@benchmark.part
def loads(bench: Benchmark) -> None:
    blocks = LOADED // (LAYERS * FRAGMENT)
    memory = np.ones(LOADED + PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    flat = memory[start : start + LOADED]
    tensors = flat.reshape(LAYERS, blocks, FRAGMENT)
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "s"
        ensure_server(STACK, socket, linger_s=1.0)
        with connect(socket, engine="load", deadline_s=30) as cache:
            device = CpuDevice([list(tensors)], threads=THREADS)
            agent = DeviceAgent(socket, engine="load", device=device)
            agent.wait_connected(30)
            namespace = cache.register(SPEC)
            keys = block_keys(np.arange(blocks * BLOCK_SIZE, dtype=np.int32), BLOCK_SIZE, namespace.root)
            order = np.random.default_rng(0).permutation(blocks).astype(np.int64)
            transfer = cache.store(namespace, keys, order)
            if not cache.wait(transfer, 60) or transfer.error:
                raise RuntimeError(f"nothing was stored: {transfer.error}")
            region = agent._region
            if region is None:
                raise RuntimeError("the agent has no host memory")

            def load() -> float:
                began = time.perf_counter()
                fetch = cache.fetch(namespace, keys)
                fetch.wait(30)
                done = cache.load(fetch, order)
                done.wait(30)
                took = time.perf_counter() - began
                fetch.release()
                if done.error or done.blocks != blocks:
                    raise RuntimeError(f"loaded {done.blocks} of {blocks} blocks: {done.error}")
                return LOADED / took / 1e9

            def memcpy() -> float:
                began = time.perf_counter()
                _native.memcpy_parallel(flat, region.array[:LOADED], THREADS)
                return LOADED / (time.perf_counter() - began) / 1e9

            params = {"mib": LOADED >> 20, "fragment_kib": FRAGMENT >> 10, "threads": THREADS}
            bench.compare("fetch and load of host memory", params, "GB/s", load, MEMCPY, memcpy, 11)
            agent.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        print(json.dumps(one_client(sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))))
        sys.exit(0)
    sys.exit(benchmark.main())
