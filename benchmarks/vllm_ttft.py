"""vLLM with FlexKV beside vLLM alone: time to first token, time a token, throughput, and what our hooks cost a step.

Engines run in processes of their own, all at once, and are asked in turns (A B A B ...), so that a machine's drift hits
all alike: none (no connector, twice, so that its own spread is seen), flexkv (host memory), fast and throttled (a tier
of files below host memory for one prompt; throttled: at a hundredth of the rate that fast was seen to have), and
vLLM's OffloadingConnector where it runs. The model is a config of a named model with random weights: what it computes
costs what the named one's does.

    python benchmarks/vllm_ttft.py [--model NAME or DIR] [--tokens N] [--runs N] [--json FILE] [--plot FILE.png]

Needs an interpreter with vLLM and FlexKV; the same command on a GPU. `--model`: a name below, or a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness import Benchmark, machine, print_rows

MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
}
COMMON = {
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHARED = 0.9
OUTPUT = 8
BATCH, BATCH_OUTPUT = 8, 32
OWN_HIT = "the same engine without a connector, its prefix cache holding the same share of the prompt, in turns"
RECOMPUTE = "the same engine without a connector and with nothing cached, in turns"
ALONE = "the same batch by the same engine without a connector, in turns"
LIMIT = "the limit: 150 us"


class Engine:
    """A vLLM in a process of its own; see `vllm_engine.py`."""

    def __init__(self, name: str, model: Path, arguments: Mapping[str, Any], folder: Path) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "vllm_engine.py"), str(model), json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"the engine ended: {self.log.read_text()[-2000:]}")

    def ask(self, **what: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def run(self, *prompts: list[int], tokens: int = OUTPUT, together: bool = False) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = self.ask(do="run", prompts=prompts, tokens=tokens, together=together)
        return results

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Runs:
    """The engines, and prompts that none has seen."""

    def __init__(self, options: argparse.Namespace, folder: Path, model: Path, vocabulary: int) -> None:
        self.options, self.folder, self.model = options, folder, model
        self._numbers = random.Random(20261125)
        self._vocabulary = vocabulary
        self._stack = contextlib.ExitStack()
        self.params = {"model": options.model, "tokens": options.tokens}

    def prompt(self, tokens: int) -> list[int]:
        return [self._numbers.randrange(10, self._vocabulary) for _ in range(tokens)]

    def engine(self, name: str, connector: Mapping[str, Any] | None = None) -> Engine:
        arguments: dict[str, Any] = {
            "max_model_len": self.options.tokens + 256,
            "max_num_batched_tokens": max(self.options.tokens + 256, 2048),
            "max_num_seqs": 16,
            "enforce_eager": True,
            "gpu_memory_utilization": self.options.memory,
        }
        if self.options.model in MODELS:
            arguments["load_format"] = "dummy"
        if connector is not None:
            arguments["kv_transfer_config"] = connector
        engine = Engine(name, self.model, arguments, self.folder)
        self._stack.callback(engine.close)
        engine.run(self.prompt(64))
        return engine

    def flexkv(self, name: str, host: str, lower: Mapping[str, Any] | None = None) -> Engine:
        tiers = [{"backend": "cpu", "capacity": host}, *([lower] if lower else [])]
        extra = {"stack": {"tiers": tiers}, "socket": str(self.folder / f"{name}.sock"), "call_s": 20.0}
        return self.engine(
            name,
            {
                "kv_connector": "FlexKVConnector",
                "kv_role": "kv_both",
                "kv_connector_module_path": "flexkv_core.connectors.vllm",
                "kv_connector_extra_config": extra,
            },
        )

    def close(self) -> None:
        self._stack.close()


def figure(result: list[dict[str, Any]], what: str = "ttft_s") -> float:
    return statistics.median(each[what] for each in result) * 1000


class Pairs:
    """Pairs of figures measured by hand, for `Benchmark.compare`, whose first pair does not count."""

    def __init__(self, pairs: list[tuple[float, float]]) -> None:
        self._rest: Iterator[tuple[float, float]] = iter([pairs[0], *pairs])
        self._reference = 0.0

    def value(self) -> float:
        value, self._reference = next(self._rest)
        return value

    def reference(self) -> float:
        return self._reference


def compare(
    bench: Benchmark, runs: Runs, name: str, unit: str, pairs: list[tuple[float, float]], reference: str, **params: Any
) -> None:
    each = Pairs(pairs)
    bench.compare(name, {**runs.params, **params}, unit, each.value, reference, each.reference, len(pairs))


def shared_prefix(bench: Benchmark, runs: Runs, none: Engine, flexkv: Engine, curves: dict[str, list[float]]) -> None:
    """Nine tenths of a prompt were served before: from vLLM's own cache, from host memory, and computed."""
    first: list[tuple[float, float]] = []
    token: list[tuple[float, float]] = []
    computed: list[tuple[float, float]] = []
    hits = []
    for _ in range(runs.options.runs):
        prefix = runs.prompt(int(SHARED * runs.options.tokens))
        before, after = (prefix + runs.prompt(runs.options.tokens - len(prefix)) for _ in range(2))
        cold = none.run(before)
        own = none.run(after)
        flexkv.run(before)
        flexkv.ask(do="drain")
        flexkv.ask(do="forget")
        ours = flexkv.run(after)
        none.ask(do="forget")
        hits.append(ours[0]["cached"])
        first.append((figure(ours), figure(own)))
        token.append((figure(ours, "token_s"), figure(own, "token_s")))
        computed.append((figure(ours), figure(cold)))
        for line, value in (("computed", cold), ("own hit", own), ("FlexKV, host memory", ours)):
            curves.setdefault(line, []).append(figure(value))
    compare(bench, runs, "ttft, 90% shared, host memory", "ms", first, OWN_HIT, limit=1.3)
    compare(bench, runs, "time a token after it", "ms", token, OWN_HIT)
    compare(bench, runs, "ttft, 90% shared, host memory, beside none", "ms", computed, RECOMPUTE)
    bench.add_row("hit tokens", runs.params, "tokens", hits)


def no_reuse(bench: Benchmark, runs: Runs, none: Engine, again: Engine, flexkv: Engine) -> None:
    """Batches of prompts that nobody has seen: what caching for nothing costs."""
    totals: list[tuple[float, float]] = []
    spread: list[tuple[float, float]] = []
    means: list[float] = []
    medians: list[float] = []

    def seconds(engine: Engine) -> float:
        prompts = [runs.prompt(runs.options.tokens // 4) for _ in range(BATCH)]
        began = time.perf_counter()
        engine.run(*prompts, tokens=BATCH_OUTPUT, together=True)
        return time.perf_counter() - began

    for _ in range(runs.options.runs):
        flexkv.ask(do="figures")
        alone, other, ours = seconds(none), seconds(again), seconds(flexkv)
        steps = flexkv.ask(do="figures")["step_s"]
        means.append(statistics.mean(steps) * 1e6)
        medians.append(statistics.median(steps) * 1e6)
        totals.append((ours, alone))
        spread.append((other, alone))
    params = {"batch": BATCH, "prompt": runs.options.tokens // 4, "output": BATCH_OUTPUT}
    compare(bench, runs, "no reuse, total time", "s", totals, ALONE, **params)
    compare(bench, runs, "no reuse, total time, a second engine without", "s", spread, ALONE, **params)
    rate = BATCH * BATCH_OUTPUT
    bench.add_row("no reuse, throughput", {**runs.params, **params}, "tokens/s", [rate / ours for ours, _ in totals])
    for name, values in (("mean", means), ("p50", medians)):
        pairs = [(each, 150.0) for each in values]
        compare(bench, runs, f"no reuse, in our hooks a step, {name}", "us", pairs, LIMIT, **params)


def below(bench: Benchmark, runs: Runs, none: Engine, curves: dict[str, list[float]]) -> None:
    """Prompts that only a lower tier has: as fast as it is, and throttled 100 times."""
    block = block_bytes(runs) * 32
    host = f"{max(16, 2 * runs.options.tokens * block_bytes(runs) >> 20)}MiB"
    lower: dict[str, Any] = {"backend": "directory", "capacity": "8GiB", "deadline_s": 3600.0, "write_queue": host}
    rate = 0.0
    for name, line in (("fast", "FlexKV, files"), ("throttled", "FlexKV, files throttled 100 times")):
        tier = {**lower, "root": str(runs.folder / name)}
        if rate:
            tier["faults"] = {"rate": rate, "operations": ["read"]}
        engine = runs.flexkv(name, host, tier)
        prompts = [runs.prompt(runs.options.tokens) for _ in range(runs.options.runs + 4)]
        for prompt in prompts:
            engine.run(prompt)
            engine.ask(do="drain")
        figures = []
        for prompt in prompts[:-4]:
            engine.ask(do="forget")
            none.ask(do="forget")
            ours = engine.run(prompt)
            figures.append((figure(ours), figure(none.run(prompt))))
            curves.setdefault(line, []).append(figures[-1][0])
        said = engine.ask(do="figures")["connector"]
        choices = {key: said[f"choice_{key}"] for key in ("whole", "cut", "not_taken", "gave_up", "probes")}
        # The first ones teach the estimate what the tier is worth.
        compare(bench, runs, f"ttft, {name} tier", "ms", figures[2:], RECOMPUTE, **choices)
        rate = block / max(said["choice_tier_block_s"].get("directory", 1.0), 1e-6) / 100
        engine.close()


def block_bytes(runs: Runs) -> int:
    """Bytes of KV a token."""
    config = json.loads((runs.model / "config.json").read_text())
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * 2 * config["num_hidden_layers"] * heads * dim)


def offloading(bench: Benchmark, runs: Runs, none: Engine) -> None:
    """vLLM's own host tier on the same prompts, or why it does not run."""
    extra = {"cpu_bytes_to_use": 1 << 30}
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    try:
        engine = runs.engine("offloading", connector)
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if "Error: " in line or "Exception: " in line]
        why = lines[-1].rsplit("]: ", 1)[-1] if lines else error
        print(f"OffloadingConnector does not run here: {why}", file=sys.stderr)
        return
    figures = []
    for _ in range(runs.options.runs):
        prefix = runs.prompt(int(SHARED * runs.options.tokens))
        before, after = (prefix + runs.prompt(runs.options.tokens - len(prefix)) for _ in range(2))
        engine.run(before)
        time.sleep(0.5)
        engine.ask(do="forget")
        none.run(before)
        figures.append((figure(engine.run(after)), figure(none.run(after))))
    compare(bench, runs, "ttft, 90% shared, OffloadingConnector", "ms", figures, OWN_HIT)
    engine.close()


def plot(curves: Mapping[str, list[float]], path: Path) -> None:
    import matplotlib  # noqa: PLC0415

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    _, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.boxplot(list(curves.values()), orientation="horizontal", tick_labels=list(curves))
    axes.set_xlabel("time to first token, ms")
    pyplot.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M", help=f"{', '.join(MODELS)}, or a checkpoint's folder")
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument(
        "--memory", type=float, default=0.1, help="vLLM's gpu_memory_utilization, for each of 4 engines"
    )
    parser.add_argument("--parts", default="shared,no-reuse,below,offloading", help="which to run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows here; others' rows are kept")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times to first token")
    options = parser.parse_args()
    bench = Benchmark("vllm_ttft")
    curves: dict[str, list[float]] = {}
    # Threads that spin for each other take turns badly where cores are shared with other work.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Path(options.model)
        if options.model in MODELS:
            model = folder / options.model
            model.mkdir()
            (model / "config.json").write_text(json.dumps({**COMMON, **MODELS[options.model]}))
        vocabulary = int(json.loads((model / "config.json").read_text())["vocab_size"])
        runs = Runs(options, folder, model, vocabulary)
        parts = options.parts.split(",")
        try:
            none = runs.engine("none")
            flexkv = runs.flexkv("flexkv", "1GiB") if {"shared", "no-reuse"} & set(parts) else none
            if "shared" in parts:
                shared_prefix(bench, runs, none, flexkv, curves)
            if "no-reuse" in parts:
                no_reuse(bench, runs, none, runs.engine("again"), flexkv)
            if "below" in parts:
                below(bench, runs, none, curves)
            if "offloading" in parts:
                offloading(bench, runs, none)
        finally:
            runs.close()
    print_rows(bench.rows, f"{bench.name}: {machine()}, {os.environ['OMP_NUM_THREADS']} threads")
    if options.json:
        bench.write(options.json)
    if options.plot:
        plot(curves, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
