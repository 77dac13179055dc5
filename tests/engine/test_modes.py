"""The same tokens in every way that vLLM runs: several processes, tensor parallelism, preemption, chunks, aborts.

Sleep and wake are not here: vLLM's CPU build has no sleep mode. What a sleep asks of a connector is a reset, which is
in test_same_tokens.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_rig import BLOCK, Engine, Expected, MakeEngine, Request, config, mixed_requests, stack, until

PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

COUNT_PREEMPTIONS = """
preempted, chunked, inner = [0], [0], connector.build_connector_meta

def counting(output):
    preempted[0] += len(output.preempted_req_ids or ())
    chunked[0] += any(at and n > 1 for at, n in zip(
        output.scheduled_cached_reqs.num_computed_tokens,
        map(output.num_scheduled_tokens.get, output.scheduled_cached_reqs.req_ids),
    ))
    return inner(output)

connector.build_connector_meta = counting
"""

ABORTS = """
import random
from vllm import SamplingParams

random_ = random.Random(SEED)
engine, half = llm.llm_engine, connector._scheduler
scheduler = engine.engine_core.engine_core.scheduler
phases = dict.fromkeys(("waiting", "fetching", "loading", "running", "storing"), 0)
live = []

def phase(request_id):
    request = scheduler.requests.get(request_id)
    tracked = half._tracked.get(request_id)
    if request is None or tracked is None:
        return None
    if tracked.load is not None:
        return "loading"
    if tracked.arrival is not None and tracked.arrival.asked:
        return "fetching"
    if request.status.name != "RUNNING":
        return "waiting"
    return "storing" if any(not store.transfer.done for store in tracked.stores) else "running"

for number, tokens in enumerate(PROMPTS):
    if number % 8 == 0:
        llm.reset_prefix_cache()
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    live.append(engine.add_request(f"{SEED}-{number}", {"prompt_token_ids": tokens}, sampling))
    wanted, steps = random_.choice(list(phases)), 0
    while len(live) > 6 or (random_.random() < 0.95 and steps < 60):
        there = [one for one in live if phase(one) == wanted]
        if there:
            engine.abort_request([there[-1]], internal=True)
            live.remove(there[-1])
            phases[wanted] += 1
            break
        engine.step()
        steps += 1
        live = [one for one in live if one in scheduler.requests]
engine.abort_request(live, internal=True)
answer = phases
"""

IDLE = """
import time

half, limit = connector._scheduler, time.monotonic() + 30
while (half._tracked or half._loading or half._finishing) and time.monotonic() < limit:
    llm.llm_engine.step()
while time.monotonic() < limit:  # copies that have been cancelled run to their end
    stats = half._client.stats()
    if not (stats["pinned_fetches"] or stats["pinned_bytes"] or stats["fetches"] or stats["pending_stores"]):
        break
    time.sleep(0.02)
stats = half._client.stats()
scheduler = llm.llm_engine.engine_core.engine_core.scheduler
answer = {
    "tracked": len(half._tracked), "loading": len(half._loading), "finishing": len(half._finishing),
    "behind": len(half._arrivals._behind), "fetches": len(half._client._fetches),
    "requests": len(scheduler.requests),
    "used": scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
    - scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
    "server": {name: stats[name] for name in ("pinned_fetches", "pinned_bytes", "fetches", "pending_stores")},
}
"""


def assert_idle(engine: Engine) -> None:
    """Nothing is held, here or in the server, for requests that have ended."""
    left = engine.run(IDLE)
    server = left.pop("server")
    assert left == dict.fromkeys(left, 0)
    assert server == dict.fromkeys(server, 0)


def from_flexkv(engine: Engine, requests: list[Request]) -> tuple[list[list[int]], list[int]]:
    """Serve them one by one: tokens, and how many of each prompt's were found in FlexKV, nothing being in vLLM."""
    tokens, cached = [], []
    for request in requests:
        # While a finished request's blocks are being stored, vLLM does not drop its own cache.
        until(lambda: engine.tell("reset")["ok"])
        served = engine.generate([request], batch=1, reset_every=0)
        tokens += served["tokens"]
        cached += served["cached"]
    return tokens, cached


@pytest.mark.slow
def test_processes(make_engine: MakeEngine, expected: Expected, tmp_path: Path) -> None:
    """The scheduler in a process of its own, as `vllm serve` has it."""
    requests = mixed_requests(100, seed=2)
    flex = make_engine(config(tmp_path), env=PROCESSES)
    assert flex.tokens(requests) == expected(requests)
    again = [request for request in requests if len(request["tokens"]) > 4 * BLOCK][-5:]
    tokens, cached = from_flexkv(flex, again)
    assert tokens == expected(again, batch=1)
    assert min(cached) > 0


@pytest.mark.slow
def test_tensor_parallel(make_engine: MakeEngine, expected: Expected, tmp_path: Path) -> None:
    """Two workers, each with its half of every block."""
    requests = mixed_requests(4, seed=3)
    right = expected(requests, batch=1)
    flex = make_engine(config(tmp_path), env=PROCESSES, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert flex.tokens(requests, batch=1) == right
    tokens, cached = from_flexkv(flex, requests)
    assert tokens == right
    assert cached == [(len(request["tokens"]) - 1) // BLOCK * BLOCK for request in requests]


def test_preempted_chunked_aborted(make_engine: MakeEngine, expected: Expected, tmp_path: Path) -> None:
    """Device memory too small for what runs, prompts computed in pieces, and requests that go away in every phase."""
    requests = mixed_requests(64, seed=4)
    flex = make_engine(
        config(tmp_path, stack(tmp_path, host="4MiB")),
        num_gpu_blocks_override=40,
        max_num_seqs=8,
        max_num_batched_tokens=64,
    )
    flex.run(COUNT_PREEMPTIONS)
    options: dict[str, Any] = {"max_tokens": 40, "batch": 16, "reset_every": 1}
    assert flex.tokens(requests, **options) == expected(requests, **options)
    preempted, chunked = flex.run("answer = preempted[0], chunked[0]")
    figures = flex.figures()
    print(preempted, chunked, figures)
    assert preempted >= 5
    assert chunked >= 5
    assert figures["loads"] > 0
    assert_idle(flex)

    prompts = [request["tokens"] for request in mixed_requests(160, seed=4)]
    phases = flex.run(f"SEED, PROMPTS = 1, {prompts}\n{ABORTS}")
    print(phases)
    assert_idle(flex)
    assert all(phases.values()), phases
    assert flex.tokens(requests, **options) == expected(requests, **options)
    assert_idle(flex)
