"""One vLLM, for `vllm_ttft.py`: does what is asked on its standard input, a JSON object a line, and answers likewise.

    python vllm_engine.py MODEL '{"arguments of LLM": ...}'

Commands: {"do": "run", "prompts": [tokens, ...], "tokens": n, "together": bool} -> a list, by prompt: ttft_s, token_s
(a token after the first), cached; {"do": "forget"}: drop vLLM's own prefix cache; {"do": "figures"}: of the connector;
{"do": "drain"}: wait until what was stored is in the lower tiers. Answers begin with "@"; what else is printed is
vLLM's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def run(llm: Any, prompts: list[list[int]], tokens: int, *, together: bool) -> list[dict[str, float]]:
    """Serve prompts at once or one by one; times count from when vLLM was given the prompt."""
    results: list[dict[str, float]] = []
    for batch in [prompts] if together else [[prompt] for prompt in prompts]:
        results += serve(llm.llm_engine, batch, tokens)
    return results


def serve(engine: Any, prompts: list[list[int]], tokens: int) -> list[dict[str, float]]:
    from vllm import SamplingParams  # noqa: PLC0415

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    began, first, last, cached = {}, {}, {}, {}
    start = serve.requests  # type: ignore[attr-defined]
    serve.requests += len(prompts)  # type: ignore[attr-defined]
    for number, prompt in enumerate(prompts, start):
        began[str(number)] = time.perf_counter()
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling.clone())
    halves = [half for half in connectors(engine) if hasattr(half, "costs")]
    inside = spent(halves)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        before, inside = inside, spent(halves)
        step_s.append(inside - before)
        for output in outputs:
            now = time.perf_counter()
            first.setdefault(output.request_id, now)
            last[output.request_id] = now
            cached[output.request_id] = output.num_cached_tokens or 0
    return [
        {
            "ttft_s": first[name] - began[name],
            "token_s": (last[name] - first[name]) / max(1, tokens - 1),
            "cached": cached[name],
        }
        for name in began
    ]


serve.requests = 0  # type: ignore[attr-defined]
step_s: list[float] = []
"""Seconds inside the connector's hooks, by step, since the figures were asked for last."""


def spent(halves: list[Any]) -> float:
    return sum(cost.seconds for half in halves for cost in half.costs.values())


def connectors(engine: Any) -> tuple[Any, Any]:
    """The connector's two halves; None where there is none. In this process, as the engine is."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group  # noqa: PLC0415

    scheduler = engine.engine_core.engine_core.scheduler.connector
    return scheduler, get_kv_transfer_group() if has_kv_transfer_group() else None


def figures(llm: Any) -> dict[str, Any]:
    scheduler, worker = connectors(llm.llm_engine)
    by_step = step_s.copy()
    step_s.clear()
    if scheduler is None or not hasattr(scheduler, "costs"):
        return {}
    half = scheduler._scheduler
    return {
        "step_s": by_step,
        "hooks": {
            side: {name: [cost.calls, cost.seconds] for name, cost in connector.costs.items()}
            for side, connector in (("scheduler", scheduler), ("worker", worker))
        },
        "connector": half.figures(),
        "server": half._client.stats(),
    }


def main() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm import LLM  # noqa: PLC0415

    llm = LLM(model=sys.argv[1], skip_tokenizer_init=True, **json.loads(sys.argv[2]))
    connector, _ = connectors(llm.llm_engine)
    answer: Any = "ready"
    while True:
        print("@" + json.dumps(answer), flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        asked = json.loads(line)
        if asked["do"] == "run":
            answer = run(llm, asked["prompts"], asked["tokens"], together=asked["together"])
        elif asked["do"] == "forget":
            answer = llm.reset_prefix_cache()
        elif asked["do"] == "drain":
            answer = connector._scheduler._client.drain(60.0)
        else:
            answer = figures(llm)
    if connector is not None:
        connector.shutdown()
    sys.stdout.flush()
    os._exit(0)  # an engine that is torn down may wait for threads that do not end


if __name__ == "__main__":
    main()
