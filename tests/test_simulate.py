"""Stacks with options of eviction and admission, through the simulation and `flexkv replay --simulate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from flexkv_core.blocks import block_keys
from flexkv_core.cli.main import main
from flexkv_core.config import load_stack
from flexkv_core.layout import KVGroup, ModelSpec
from flexkv_core.policies import BUILT_IN
from flexkv_core.simulate import SimulatedCache

TRACE = Path(__file__).parents[1] / "data" / "conversation_trace.jsonl.gz"
BLOCK_SIZE = 16


class Cache:
    """A simulated cache whose requests are paths of small numbers, a block each."""

    def __init__(self, *tiers: dict[str, Any]) -> None:
        self.cache = SimulatedCache(load_stack({"block_size": BLOCK_SIZE, "tiers": list(tiers)}))
        self.root = self.cache.register(ModelSpec("m", BLOCK_SIZE, (KVGroup(4096),))).root

    def request(self, *path: int, at_s: float = 0.0) -> dict[str, int]:
        tokens = [step for step in path for _ in range(BLOCK_SIZE)]
        keys = block_keys(np.array(tokens, np.int32), BLOCK_SIZE, self.root)
        return dict(self.cache.request(self.root, keys, at_s).hits_by_tier)

    def figures(self, tier: str) -> dict[str, Any]:
        figures: dict[str, Any] = self.cache.stats()["tiers"][tier]
        return figures


def host(blocks: int, **options: Any) -> dict[str, Any]:
    return {"backend": "cpu", "capacity": f"{blocks} blocks", **options}


@pytest.mark.parametrize(("reward", "hits"), [(None, 0), (10, 0), (60, 1)])
def test_rewards_count_in_the_requests_own_time(reward: float | None, hits: int) -> None:
    cache = Cache(host(2, **({} if reward is None else {"hit_reward_seconds": reward})))
    cache.request(1, at_s=0)
    cache.request(1, at_s=1)
    for second in (20, 30, 40):
        cache.request(second, at_s=second)
    assert cache.request(1, at_s=50)["cpu"] == hits


def test_the_stacks_options_reach_the_tiers() -> None:
    cache = Cache(host(10, evict_ratio=0.5))
    for number in range(11):
        cache.request(number)
    assert cache.figures("cpu")["evicted_blocks"] == 5
    cache = Cache(host(10, evict_start_threshold=0.5))
    for number in range(11):
        cache.request(number)
    assert cache.figures("cpu")["evicted_blocks"] == 6
    cache = Cache(host(2, eviction="mru"))
    for number in (1, 2, 3):
        cache.request(number)
    assert [cache.request(number)["cpu"] for number in (1, 3)] == [1, 1]


def test_a_tier_without_an_admission_takes_all(tmp_path: Path) -> None:
    lower = {"backend": "directory", "root": str(tmp_path), "capacity": "100 blocks"}
    for admission, stored in (("all", [3, 3]), ("second_touch", [0, 3])):
        cache = Cache(host(10), {**lower, "admission": admission})
        found = []
        for _ in stored:
            cache.request(1, 2, 3)
            found.append(cache.figures("directory")["stored_blocks"])
        assert found == stored
        assert cache.figures("directory")["rejected_blocks"] == (0 if admission == "all" else 3)


def replay(tmp_path: Path, *tiers: dict[str, Any], limit: int = 300) -> tuple[dict[str, Any], str]:
    file, report = tmp_path / "stack.json", tmp_path / "report.json"
    file.write_text(json.dumps({"block_size": 512, "tiers": list(tiers)}))  # JSON is YAML
    arguments = ["replay", str(TRACE), "--stack", str(file), "--json", str(report), "--simulate"]
    result = CliRunner().invoke(main, [*arguments, "--limit", str(limit)])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(report.read_text())
    return answer, result.output


@pytest.mark.parametrize("policy", BUILT_IN)
def test_every_policy_in_a_replay(policy: str, tmp_path: Path) -> None:
    found, _ = replay(tmp_path, host(800, eviction=policy))
    cpu = found["tiers"]["cpu"]
    assert 0 < found["hit_blocks"] < found["blocks"]
    assert cpu["stored_blocks"] - cpu["evicted_blocks"] == 800


def test_a_replay_tells_what_was_refused(tmp_path: Path) -> None:
    lower = {"backend": "directory", "root": str(tmp_path / "d"), "admission": "second_touch"}
    found, output = replay(tmp_path, host(800), lower)
    directory = found["tiers"]["directory"]
    assert directory["rejected_blocks"] > directory["stored_blocks"] > 0
    assert found["tiers"]["cpu"]["rejected_blocks"] == 0
    assert "rejected" in output
    assert f"{directory['rejected_blocks']:,}" in output


def test_time_of_the_trace_decides_over_rewards(tmp_path: Path) -> None:
    """If the time stood still, any reward would last for ever."""
    hits = {
        reward: replay(tmp_path, host(2000, hit_reward_seconds=reward), limit=1000)[0]["hit_blocks"]
        for reward in (0, 5, 1_000_000)
    }
    assert hits[0] < hits[5] < hits[1_000_000]
    assert replay(tmp_path, host(2000), limit=1000)[0]["hit_blocks"] == hits[0]
