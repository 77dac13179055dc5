"""One run of a real vLLM: serves the requests that the plan says, and writes what came out.

    python engine_run.py PLAN OUT

PLAN, JSON: model, kv_transfer_config or null, requests (lists of token ids), batch, max_tokens, reset_every (0: never),
llm (more arguments of `LLM`), prelude (Python, run first), between (Python, run after each batch with `llm`, `step`).
OUT, JSON: tokens by request, cached tokens by request, and the connector's figures.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def connector_of(llm):  # type: ignore[no-untyped-def]
    """The scheduler's half, where it runs in this process."""
    core = llm.llm_engine.engine_core
    inner = getattr(core, "engine_core", None)
    return inner.scheduler.connector if inner is not None else None


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    exec(plan.get("prelude", ""), globals())
    from vllm import LLM, SamplingParams  # noqa: PLC0415

    arguments = {
        "model": plan["model"],
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 1024,
        "dtype": "float32",
        "block_size": 32,
        **plan.get("llm", {}),
    }
    if plan["kv_transfer_config"] is not None:
        arguments["kv_transfer_config"] = plan["kv_transfer_config"]
    llm = LLM(**arguments)
    sampling = SamplingParams(temperature=0, max_tokens=plan["max_tokens"], ignore_eos=True, detokenize=False)
    tokens, cached, seconds = [], [], []
    requests, batch = plan["requests"], plan["batch"]
    for step, at in enumerate(range(0, len(requests), batch)):
        if plan["reset_every"] and step and step % plan["reset_every"] == 0:
            llm.reset_prefix_cache()
        began = time.perf_counter()
        outputs = llm.generate(
            [{"prompt_token_ids": tokens_of} for tokens_of in requests[at : at + batch]], sampling, use_tqdm=False
        )
        seconds.append(time.perf_counter() - began)
        tokens += [list(output.outputs[0].token_ids) for output in outputs]
        cached += [output.num_cached_tokens for output in outputs]
        exec(plan.get("between", ""), {**globals(), "llm": llm, "step": step})
    connector = connector_of(llm)
    half = getattr(connector, "_scheduler", None)
    figures = dict(half.figures()) if half is not None else {}
    stats = half._client.stats() if half is not None else {}
    result = {"tokens": tokens, "cached": cached, "figures": figures, "stats": stats, "seconds": seconds}
    Path(sys.argv[2]).write_text(json.dumps(result))
    if connector is not None:
        connector.shutdown()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
