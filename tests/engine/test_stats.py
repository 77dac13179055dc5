"""A real vLLM's Prometheus metrics of the connector say what its requests, its figures and the server say."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from engine_rig import BLOCK, Engine, MakeEngine, Request, config

COUNT, LENGTH = 8, 20 * BLOCK + 5
STEPS: list[Request] = [{"tokens": [7] * 5}]
"""Less than a block: it makes the engine step, and changes nothing."""
SHOW = """
from vllm.v1.metrics.reader import Counter, Histogram
answer = [
    [each.name.removeprefix("vllm:"),
     next((value for name, value in each.labels.items() if name in ("tier", "decision", "source")), None),
     each.count if isinstance(each, Histogram) else each.value]
    for each in llm.get_metrics()
    if isinstance(each, (Counter, Histogram))
]
"""
BREAK = """
from flexkv_core.device.cpu import CpuDevice
CpuDevice.{0}, unbroken = (lambda *_: 1 / 0), CpuDevice.{0}
"""
MEND = "CpuDevice.{0} = unbroken"

Shown = Counter[tuple[str, str | None]]


def prompts(seed: int = 5, count: int = COUNT) -> list[Request]:
    numbers = random.Random(seed)
    return [{"tokens": [numbers.randrange(2, 500) for _ in range(LENGTH)]} for _ in range(count)]


def shown(engine: Engine) -> Shown:
    """The metrics by name and the label that is their own, all that has happened taken in; zeros are left out."""
    engine.generate(STEPS, max_tokens=2)
    return Counter({(name, label): value for name, label, value in engine.run(SHOW) if value})


def by_tier(metrics: Shown) -> dict[str | None, int]:
    return {label: value for (name, label), value in metrics.items() if name == "flexkv_hit_tokens"}


def settle(engine: Engine) -> None:
    """Have all stores end, and all blocks be written down."""
    engine.run(
        "scheduler = llm.llm_engine.engine_core.engine_core.scheduler\n"
        "while scheduler.has_requests(): llm.llm_engine.step()"
    )
    assert engine.run("answer = connector._scheduler._client.drain(60.0)")


def serve(engine: Engine, requests: list[Request]) -> int:
    """One after the other, all written down after each; tokens that were found."""
    cached = 0
    for request in requests:
        cached += engine.generate([request], batch=1)["cached"][0]
        settle(engine)
    return cached


def test_metrics_say_what_was_served(make_engine: MakeEngine, tmp_path: Path) -> None:
    lower = {
        "backend": "directory",
        "name": "shelf",
        "root": str(tmp_path / "blocks"),
        "capacity": "64MiB",
        "deadline_s": 3600.0,
        "write_queue": "2MiB",
    }
    tiers = {"tiers": [{"backend": "cpu", "capacity": "4MiB"}, lower]}
    connector = config(tmp_path, tiers, load_or_compute=False)
    engine = make_engine(connector, disable_log_stats=False)

    assert serve(engine, prompts()) == 0
    metrics, figures = shown(engine), engine.figures()
    assert by_tier(metrics) == {}
    assert metrics["flexkv_stores", None] == figures["stores"] >= COUNT
    assert metrics["flexkv_stored_blocks", None] == figures["stored_blocks"] >= COUNT * 20
    assert metrics["flexkv_fetch_seconds", None] == 0, "nothing was found"

    # Hits of both tiers.
    cached = serve(engine, prompts()[-1:] + prompts())
    metrics, figures = shown(engine), engine.figures()
    server = engine.run("answer = connector._scheduler._client.stats()['tiers']")
    assert by_tier(metrics) == {name: tier["hit_blocks"] * BLOCK for name, tier in server.items()}
    assert by_tier(metrics).keys() == {"cpu", "shelf"}
    assert cached == sum(by_tier(metrics).values()) == figures["hit_tokens"] == (COUNT + 1) * 20 * BLOCK
    assert metrics["external_prefix_cache_hits", None] == cached
    assert metrics["prompt_tokens_cached_by_source", "host"] == by_tier(metrics)["cpu"]
    assert metrics["prompt_tokens_cached_by_source", "external_unspecified"] == by_tier(metrics)["shelf"]
    assert metrics["flexkv_hits", "whole"] == figures["choice_whole"] == COUNT + 1
    assert metrics["flexkv_load_seconds", None] == metrics["flexkv_fetch_seconds", None] == COUNT + 1
    failures = ("flexkv_failed_stores", "flexkv_failed_loads", "flexkv_failed_fetches")
    assert not any(metrics[name, None] for name in failures)

    # A load that fails has loaded nothing: its request is computed, and stored again.
    engine.run(BREAK.format("scatter"))
    assert serve(engine, prompts()[-1:]) == 0
    engine.run(MEND.format("scatter"))
    before, metrics = metrics, shown(engine)
    assert metrics["flexkv_failed_loads", None] == engine.figures()["failed_loads"] == 1
    assert by_tier(metrics) == by_tier(before)

    # Stores.
    engine.run(BREAK.format("gather"))
    assert serve(engine, prompts(6, 2)) == 0
    engine.run(MEND.format("gather"))
    before, metrics = metrics, shown(engine)
    assert metrics["flexkv_stores", None] - before["flexkv_stores", None] == 2
    assert metrics["flexkv_failed_stores", None] == engine.figures()["failed_stores"] == 2

    # And a fetch of what is gone.
    shutil.rmtree(tmp_path / "blocks")
    serve(engine, prompts()[:1])
    assert shown(engine)["flexkv_failed_fetches", None] == engine.figures()["failed_fetches"] == 1


@pytest.mark.slow
def test_metrics_go_from_process_to_process(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Below MultiConnector too, which looks classes up by name: nobody has told vLLM this one's but its path."""
    inner = config(tmp_path, {"tiers": [{"backend": "cpu", "capacity": "32MiB"}]}, load_or_compute=False)
    outer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [inner]},
    }
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_PLUGINS": "", "VLLM_LOG_STATS_INTERVAL": "0.1"}
    engine = make_engine(outer, env=env, disable_log_stats=False)
    assert sum(engine.generate(prompts(), batch=1)["cached"]) == 0
    cached = sum(engine.generate(prompts(), batch=4)["cached"])
    metrics = shown(engine)
    assert by_tier(metrics) == {"cpu": cached}
    assert cached > 0
    assert metrics["flexkv_load_seconds", None] == cached / (20 * BLOCK)
    assert metrics["prompt_tokens_cached_by_source", "host"] == cached
    assert metrics["flexkv_stores", None] >= COUNT
