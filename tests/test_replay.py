"""`flexkv replay` as issue and README promise it: figures of the real trace, and what faults do to real bytes."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flexkv_core.cli.main import main

TRACE = Path(__file__).parents[1] / "data" / "conversation_trace.jsonl.gz"
BLOCK = 512


def replay(tmp_path: Path, stack: dict[str, Any], *options: str) -> dict[str, Any]:
    """Run the command and return its JSON."""
    file, report = tmp_path / "stack.json", tmp_path / "report.json"
    file.write_text(json.dumps(stack))  # JSON is YAML
    result = CliRunner().invoke(main, ["replay", str(TRACE), "--stack", str(file), "--json", str(report), *options])
    assert report.exists(), result.output
    answer: dict[str, Any] = json.loads(report.read_text())
    answer["exit_code"] = result.exit_code
    return answer


def host(capacity: str) -> dict[str, Any]:
    return {"block_size": BLOCK, "tiers": [{"backend": "cpu", "capacity": capacity}]}


def two_tiers(root: Path, **directory: Any) -> dict[str, Any]:
    """Small host memory over a directory; 68 KiB a block with its seal."""
    tiers = [
        {"backend": "cpu", "capacity": "16MiB"},
        {"backend": "directory", "capacity": "256MiB", "root": str(root), "write_queue": "16MiB", **directory},
    ]
    return {"block_size": BLOCK, "tiers": tiers}


def lru_hits(capacity: int) -> int:
    """Plain LRU, touched leaf first, shares nothing with the code under test."""
    with gzip.open(TRACE, "rt") as lines:
        requests = [json.loads(line) for line in lines]
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in requests:
        blocks = request["hash_ids"][: request["input_length"] // BLOCK]
        for block in blocks:
            if block not in cache:
                break
            hits += 1
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


def test_the_whole_trace_unbounded(tmp_path: Path) -> None:
    found = replay(tmp_path, host("unbounded"), "--simulate")
    assert (found["requests"], found["blocks"], found["hit_blocks"]) == (12031, 276491, 105592)
    assert round(found["hit_rate"], 3) == 0.382
    assert found["exit_code"] == 0


@pytest.mark.parametrize("capacity", [10_000, 30_000])
def test_a_bounded_host_tier_is_plain_lru(tmp_path: Path, capacity: int) -> None:
    found = replay(tmp_path, host(f"{capacity} blocks"), "--simulate")
    assert found["hit_blocks"] == lru_hits(capacity)
    assert found["tiers"]["cpu"]["stored_blocks"] - found["tiers"]["cpu"]["evicted_blocks"] == capacity


def test_real_bytes_take_the_decisions_of_the_simulation(tmp_path: Path) -> None:
    stack = two_tiers(tmp_path / "blocks")
    real = replay(tmp_path, stack, "--limit", "150")
    simulated = replay(tmp_path, stack, "--limit", "150", "--simulate")
    assert real["wrong_blocks"] == 0
    assert real["tiers"]["directory"]["hit_blocks"] > 0
    for tier in ("cpu", "directory"):
        for figure in ("hit_blocks", "stored_blocks", "evicted_blocks"):
            assert real["tiers"][tier][figure] == simulated["tiers"][tier][figure], (tier, figure)
    assert real["load_gb_s"] > 0
    assert real["memcpy_gb_s"] > 0


def test_a_corrupting_tier_is_noticed_only_with_verification(tmp_path: Path) -> None:
    stack = two_tiers(tmp_path / "blocks", faults={"corrupt": 0.3, "seed": 11})
    checked = replay(tmp_path, stack, "--limit", "150")
    assert checked["wrong_blocks"] == 0
    assert checked["tiers"]["directory"]["corrupt_blocks"] > 0
    unchecked = replay(
        tmp_path, two_tiers(tmp_path / "other", faults={"corrupt": 0.3, "seed": 11}), "--limit", "150", "--no-verify"
    )
    assert unchecked["wrong_blocks"] > 0
    assert unchecked["tiers"]["directory"]["corrupt_blocks"] == 0


def tier_processes() -> list[int]:
    """Tier processes that this process has started."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"flexkv_core.tier_process" in argv:
                found.append(int(pid))
    return found


@pytest.mark.soak
@pytest.mark.usefixtures("leak_check")
def test_kill_9_of_the_tier_process_at_random_times(tmp_path: Path) -> None:
    soak = bool(os.environ.get("FLEXKV_SOAK"))
    kills, limit = (100, "4000") if soak else (5, "250")
    seed = int(os.environ.get("FLEXKV_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"FLEXKV_SEED={seed}")
    dice, done, killed = random.Random(seed), threading.Event(), []

    def killer() -> None:
        while not done.is_set() and next((tmp_path / "blocks").rglob("*.kv"), None) is None:
            time.sleep(0.01)  # until blocks are on their way: a kill while the tier opens would prove little
        while not done.is_set() and len(killed) < kills:
            time.sleep(dice.uniform(0.05, 0.6))
            for pid in tier_processes():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        found = replay(tmp_path, two_tiers(tmp_path / "blocks"), "--limit", limit)
    finally:
        done.set()
        thread.join()
    assert killed, "the replay was over before the first kill"
    assert found["exit_code"] == 0
    assert found["wrong_blocks"] == 0
    assert found["requests"] == int(limit)
    assert found["notes"] == [], "the replay never stood still"
    assert found["tiers"]["directory"]["restarts"] >= 1
    assert not tier_processes()
