"""What the index costs: one thread, through the Python call, three tier columns, beside the reference index and memcpy.

Each figure is a median of runs; within a run a call is repeated, with inputs that differ, so that timers and caches
play no part. Bounds ("wanted") are this project's own. `--ten-million` fills ten million blocks and measures again.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Benchmark

from flexkv_core.blocks import block_keys
from flexkv_core.index import NO_SLOT, GroupRule
from flexkv_core.index.native import NativeIndex
from flexkv_core.index.reference import ReferenceIndex
from flexkv_core.policies import BUILT_IN

ROOT = hashlib.sha256(b"benchmark").digest()
TIERS = 3
REFERENCE = "flexkv_core.index.reference.ReferenceIndex, same calls"
MEMCPY = "numpy.copyto of len(n) int64 (memcpy)"
TRACE = Path(__file__).parents[1] / "data" / "conversation_trace.jsonl.gz"
RANDOM = np.random.default_rng(0)

bench = Benchmark("index")


def new_index(kind: Callable[..., Any] = NativeIndex, policy: str = "lru") -> Any:
    index = kind(TIERS, [policy] * TIERS)
    index.add_namespace(ROOT, [GroupRule()])
    return index


def random_keys(n: int) -> np.ndarray:
    """Keys are digests: random bytes are as good, and the index does not hash."""
    return RANDOM.integers(0, 256, (n, 32), dtype=np.uint8)


def fill(index: Any, sequences: int, length: int, tiers: int = TIERS) -> list[np.ndarray]:
    """Sequences of blocks, each in all tiers."""
    keys = random_keys(sequences * length).reshape(sequences, length, 32)
    for tier in range(tiers):
        for number in range(sequences):
            index.insert(ROOT, keys[number], tier, 0, np.arange(number * length, (number + 1) * length))
    return list(keys)


def seconds(call: Callable[[], Any], repeat: int) -> float:
    """Seconds a call, over `repeat` of them."""
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def micro(call: Callable[[], Any], repeat: int) -> Callable[[], float]:
    return lambda: seconds(call, repeat) * 1e6


# ---------------------------------------------------------------- matching


def staircase(index: Any, keys: np.ndarray) -> None:
    """What leaf-first eviction leaves: a third of the prefix in host memory, two thirds below, all at the end."""
    n = len(keys)
    for tier, held in enumerate((n // 3, 2 * n // 3, n)):
        index.insert(ROOT, keys[:held], tier, 0, np.arange(held))


@bench.part
def match_one_node(rows: Benchmark) -> None:
    for n, wanted in ((64, 2), (1024, 3), (8192, 8), (65536, 60)):
        keys = random_keys(n)
        index, reference = new_index(), new_index(ReferenceIndex)
        staircase(index, keys)
        staircase(reference, keys)
        assert index.match(ROOT, keys).blocks == n
        source, target = np.arange(n), np.empty(n, np.int64)
        repeat = max(20, 200_000 // n)
        params = {"blocks": n, "wanted_us": wanted}
        rows.compare(
            "match, one node",
            params,
            "us",
            micro(lambda: index.match(ROOT, keys), repeat),
            MEMCPY,
            micro(lambda: np.copyto(target, source), repeat),
        )
        rows.compare(
            "match, one node",
            params,
            "us",
            micro(lambda: index.match(ROOT, keys), repeat),
            REFERENCE,
            micro(lambda: reference.match(ROOT, keys), 1 + 2000 // n),
        )


@bench.part
def match_short_nodes(rows: Benchmark) -> None:
    n, short = 8192, 8
    keys = random_keys(n)
    index, reference = new_index(), new_index(ReferenceIndex)
    for each in (index, reference):
        staircase(each, keys)
        for at in range(short, n, short):  # a branch every eight blocks
            branch = np.concatenate([keys[:at], random_keys(1)])
            slots = np.full(at + 1, NO_SLOT)
            slots[at] = at
            each.insert(ROOT, branch, 2, 0, slots)
    assert index.match(ROOT, keys).blocks == n
    assert index.statistics()["nodes"] >= 2 * (n // short - 1)
    rows.compare(
        "match, nodes of 8 blocks",
        {"blocks": n, "wanted_us": 20},
        "us",
        micro(lambda: index.match(ROOT, keys), 100),
        REFERENCE,
        micro(lambda: reference.match(ROOT, keys), 1),
    )


@bench.part
def match_miss(rows: Benchmark) -> None:
    index, reference = new_index(), new_index(ReferenceIndex)
    fill(index, 1_000_000 // 64, 64)
    fill(reference, 20_000 // 64, 64)
    unknown = [random_keys(64) for _ in range(64)]
    turn = iter(range(1 << 60))
    rows.compare(
        "match, miss at the first block",
        {"resident": 1_000_000, "wanted_us": 1.5},
        "us",
        micro(lambda: index.match(ROOT, unknown[next(turn) % 64]), 5000),
        REFERENCE + ", 20,000 resident",
        micro(lambda: reference.match(ROOT, unknown[next(turn) % 64]), 500),
    )


@bench.part
def keys_and_match(rows: Benchmark) -> None:
    tokens = RANDOM.integers(0, 1 << 17, 32_768, dtype=np.int32)
    keys = block_keys(tokens, 16, ROOT)
    index = new_index()
    staircase(index, keys)
    data = tokens.tobytes()

    def by_hashlib() -> None:
        key = ROOT
        for at in range(0, len(data), 64):
            key = hashlib.sha256(data[at : at + 64] + key).digest()

    rows.compare(
        "keys and match of a prompt",
        {"tokens": 32_768, "block_size": 16, "wanted_us": 250},
        "us",
        micro(lambda: index.match(ROOT, block_keys(tokens, 16, ROOT)), 20),
        "hashlib.sha256 once a block, keys only",
        micro(by_hashlib, 1),
    )


# ---------------------------------------------------------------- changing


def insert_time(kind: Callable[..., Any], sequences: int, length: int) -> float:
    """Microseconds a block, into a fresh index."""
    keys = random_keys(sequences * length).reshape(sequences, length, 32)
    slots = np.arange(sequences * length).reshape(sequences, length)
    calls = list(zip(keys, slots, strict=True))
    index = new_index(kind)
    start = time.perf_counter()
    for key, slot in calls:
        index.insert(ROOT, key, 0, 0, slot)
    return (time.perf_counter() - start) / (sequences * length) * 1e6


@bench.part
def insert(rows: Benchmark) -> None:
    for length, wanted in ((64, 0.1), (4, 0.5)):
        blocks = 200_000
        rows.compare(
            "insert",
            {"sequence": length, "blocks": blocks, "wanted_us": wanted},
            "us/block",
            lambda: insert_time(NativeIndex, blocks // length, length),
            REFERENCE,
            lambda: insert_time(ReferenceIndex, 2048 // length, length),
        )


def leaves(kind: Callable[..., Any], policy: str, count: int) -> tuple[Any, np.ndarray]:
    """Leaves of one block, in the first tier, touched in shuffled order."""
    index = new_index(kind, policy)
    keys = fill(index, count, 1, 1)
    order = RANDOM.permutation(count)
    for number in order:
        index.touch(ROOT, keys[number])
    return index, np.stack(keys)


@bench.part
def evict(rows: Benchmark) -> None:
    for count, wanted in ((1000, 10), (100_000, 30), (1_000_000, 50)):
        for policy in BUILT_IN:
            index, _ = leaves(NativeIndex, policy, count)
            reference, _ = leaves(ReferenceIndex, policy, min(count, 10_000))

            def run(each: Any, rounds: int = 60) -> float:
                """The median of some evictions of 64 blocks, each made up for with new ones."""
                times = []
                for _ in range(rounds):
                    start = time.perf_counter()
                    gone = each.evict(0, 64)
                    times.append(time.perf_counter() - start)
                    assert gone is not None
                    fresh = random_keys(64)
                    for number in range(64):
                        each.insert(ROOT, fresh[number : number + 1], 0, 0, gone.slots[number : number + 1])
                return statistics.median(times) * 1e6

            params = {"leaves": count, "policy": policy, "blocks": 64, "wanted_us": wanted}
            rows.compare(
                "evict",
                params,
                "us",
                lambda: run(index),
                REFERENCE + ", at most 10,000 leaves",
                lambda: run(reference, 5),
                runs=7,
            )
            index = reference = None
            gc.collect()


@bench.part
def touch(rows: Benchmark) -> None:
    index = new_index()
    fill(index, 1_000_000 // 64 - 32, 64)
    keys = random_keys(2048)
    staircase(index, keys)
    target, source = np.empty((2048, 32), np.uint8), keys
    rows.compare(
        "touch",
        {"blocks": 2048, "resident": 1_000_000, "wanted_us": 100},
        "us",
        micro(lambda: index.touch(ROOT, keys), 200),
        "numpy.copyto of the keys",
        micro(lambda: np.copyto(target, source), 200),
    )


@bench.part
def memory(rows: Benchmark) -> None:
    for length, wanted in ((4, 110), (64, 60), (1000, 50)):
        index = new_index()
        sequences = 1_000_000 // length
        fill(index, sequences, length)
        found = index.statistics()
        params = {"sequence": length, "blocks": sequences * length, "columns": TIERS, "wanted_bytes": wanted}
        rows.add_row("memory", params, "bytes/block", [found["memory_bytes"] / found["positions"]])


@bench.part
def rebuild(rows: Benchmark) -> None:
    """In order of prefixes, as a medium lists what was written in turn, and shuffled; at once, and in pieces."""
    sequences, length = 500, 1000
    blocks = sequences * length
    keys = random_keys(blocks).reshape(sequences, length, 32)
    parents = np.concatenate([np.broadcast_to(np.frombuffer(ROOT, np.uint8), (sequences, 1, 32)), keys[:, :-1]], axis=1)
    depths = np.broadcast_to(np.arange(length), (sequences, length))

    def run(kind: Callable[..., Any], order: np.ndarray, piece: int) -> float:
        """Seconds, scaled to all blocks."""
        columns = [np.ascontiguousarray(a.reshape(blocks, -1)[order]) for a in (keys, parents, depths)]
        index = new_index(kind)
        start = time.perf_counter()
        for at in range(0, len(order), piece):
            part = slice(at, min(at + piece, len(order)))
            slots = np.arange(part.start, part.stop)
            index.recover(ROOT, 0, 0, columns[0][part], columns[1][part], columns[2][part, 0], slots)
        index.end_recovery()
        took = time.perf_counter() - start
        if len(order) == blocks:
            assert index.count(0) == blocks
            assert index.statistics()["orphans"] == 0
        return took * blocks / len(order)

    for name, order in (("by prefix", np.arange(blocks)), ("shuffled", RANDOM.permutation(blocks))):
        for pieces in (1, 8):
            rows.compare(
                "bulk rebuild",
                {"blocks": blocks, "order": name, "pieces": pieces, "wanted_s": 0.5},
                "s",
                lambda: run(NativeIndex, order, -(-blocks // pieces)),
                REFERENCE + ", 20,000 blocks, scaled",
                lambda: run(ReferenceIndex, order[:20_000], 20_000),
            )


# ---------------------------------------------------------------- a whole trace


def trace_keys(block_size: int) -> list[np.ndarray]:
    """Keys of each request's complete blocks: a 512-token block of the trace is 512 / block_size of ours."""
    with gzip.open(TRACE, "rt") as lines:
        requests = [json.loads(line) for line in lines]
    per, made, known = 512 // block_size, [], {}
    for request in requests:
        ids = request["hash_ids"][: request["input_length"] // 512]
        for block in ids:
            if block not in known:
                seed = hashlib.shake_128(block.to_bytes(8, "little")).digest(32 * per)
                known[block] = np.frombuffer(seed, np.uint8).reshape(per, 32)
        made.append(np.concatenate([known[block] for block in ids]) if ids else np.empty((0, 32), np.uint8))
    return made


def replay(kind: Callable[..., Any], requests: list[np.ndarray], capacity: int) -> tuple[float, int]:
    """Match, touch, evict, insert: seconds and hits of the whole trace."""
    index, hits, used, free = new_index(kind), 0, 0, np.zeros(0, np.int64)
    start = time.perf_counter()
    for keys in requests:
        found = index.match(ROOT, keys)
        hits += found.blocks
        index.touch(ROOT, keys[: found.blocks])
        slots = np.full(len(keys), NO_SLOT)
        want = len(keys) - found.blocks
        short = used + want - capacity - len(free)
        if short > 0:
            gone = index.evict(0, short)
            free = np.concatenate([free, gone.slots]) if gone is not None else free
        fresh = max(0, want - len(free))
        slots[found.blocks :] = np.concatenate([free[: want - fresh], np.arange(used, used + fresh)])
        free, used = free[want - fresh :], used + fresh
        index.insert(ROOT, keys, 0, 0, slots)
    return time.perf_counter() - start, hits


@bench.part
def whole_trace(rows: Benchmark) -> None:
    requests = trace_keys(16)
    blocks = sum(map(len, requests))
    few = trace_keys(16)[:100]
    few_blocks = sum(map(len, few))
    rows.compare(
        "conversation trace, simulated",
        {"block_size": 16, "blocks": blocks, "capacity": 1_000_000, "wanted_s": 15},
        "s",
        lambda: replay(NativeIndex, requests, 1_000_000)[0],
        REFERENCE + ", first 100 requests, scaled",
        lambda: replay(ReferenceIndex, few, 1_000_000)[0] * blocks / few_blocks,
        runs=3,
    )


def ten_million(rows: Benchmark) -> None:
    """Everything above that depends on how much is resident, at ten million blocks."""
    index = new_index()
    fill(index, 10_000_000 // 64, 64, 1)
    unknown = [random_keys(64) for _ in range(64)]
    turn = iter(range(1 << 60))
    miss = micro(lambda: index.match(ROOT, unknown[next(turn) % 64]), 5000)
    rows.add_row("ten million: match, miss", {"resident": 10_000_000}, "us", [miss() for _ in range(7)])
    keys = random_keys(2048)
    staircase(index, keys)
    rows.add_row(
        "ten million: match, one node",
        {"blocks": 2048},
        "us",
        [micro(lambda: index.match(ROOT, keys), 100)() for _ in range(7)],
    )
    rows.add_row(
        "ten million: touch", {"blocks": 2048}, "us", [micro(lambda: index.touch(ROOT, keys), 200)() for _ in range(7)]
    )
    found = index.statistics()
    rows.add_row("ten million: memory", {"sequence": 64}, "bytes/block", [found["memory_bytes"] / found["positions"]])
    fresh = random_keys(64 * 2000).reshape(2000, 64, 32)
    start = time.perf_counter()
    for number in range(2000):
        index.insert(ROOT, fresh[number], 0, 0, np.arange(64))
    rows.add_row(
        "ten million: insert", {"sequence": 64}, "us/block", [(time.perf_counter() - start) / (2000 * 64) * 1e6]
    )
    del index
    gc.collect()
    index, _ = leaves(NativeIndex, "lru", 10_000_000)
    times = []
    for _ in range(21):
        start = time.perf_counter()
        assert index.evict(0, 64) is not None
        times.append((time.perf_counter() - start) * 1e6)
    rows.add_row("ten million: evict", {"leaves": 10_000_000, "policy": "lru", "blocks": 64}, "us", times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--ten-million", action="store_true")
    chosen, rest = parser.parse_known_args()
    if chosen.ten_million:
        bench.part(ten_million)
    sys.argv[1:] = rest
    raise SystemExit(bench.main())
