"""One of examples/dynamo run for real, without a GPU, and what its parts say of themselves."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_model
import tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples" / "dynamo"

BLOCK = 32
START_S = 400
WORKER_ARGS = (
    f"--served-model-name tiny --enforce-eager --dtype float32 --max-model-len 3000 --block-size {BLOCK} "
    "--num-gpu-blocks-override 128"
)
STACK = """
block_size: {block}
tiers:
  - backend: cpu
    capacity: 256MiB
  - backend: directory
    capacity: 1GiB
    root: {folder}/blocks
"""
NUMBERS = itertools.count(1)


@dataclass
class Answer:
    """worker: who computed it. cached: prompt tokens that were not computed. expected: the share of the prompt that a
    router by KV events knew the worker to have."""

    text: str
    prompt: int
    cached: int
    worker: int
    expected: float


@dataclass
class Deployment:
    script: subprocess.Popen[str]
    environ: dict[str, str]
    folder: Path

    @property
    def port(self) -> str:
        return self.environ["DYN_HTTP_PORT"]

    def get(self, path: str, port: str | int | None = None) -> str:
        with urllib.request.urlopen(f"http://localhost:{port or self.port}{path}", timeout=60) as answer:
            return str(answer.read().decode())

    def ask(self, prompt: str, worker: int | None = None) -> Answer:
        """What the model says to a prompt; `worker`: who is to be asked, instead of the router's choice."""
        options: dict[str, Any] = {"extra_fields": ["worker_id", "timing"]}
        if worker is not None:
            options["backend_instance_id"] = worker
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 16,
            "temperature": 0,
            "nvext": options,
        }
        request = urllib.request.Request(
            f"http://localhost:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as stream:
            answer = json.load(stream)
        usage, said = answer["usage"], answer["nvext"]
        return Answer(
            text=answer["choices"][0]["message"]["content"],
            prompt=usage["prompt_tokens"],
            cached=usage["prompt_tokens_details"]["cached_tokens"],
            worker=said["worker_id"]["decode_worker_id"],
            expected=said["timing"].get("kv_hit_rate", 0.0),
        )

    def workers(self) -> list[int]:
        instances = json.loads(self.get("/health"))["instances"]
        return [each["instance_id"] for each in instances if each["endpoint"] == "generate"]

    @property
    def system_port(self) -> int:
        """Of the first worker."""
        return int(self.environ["SYSTEM_PORT"])

    def external_by_worker(self) -> list[float]:
        """Tokens that the two workers' vLLM got from its connector, by its own count."""
        name = "vllm:external_prefix_cache_hits_total"
        return [total(self.get("/metrics", self.system_port + number), name) for number in range(2)]

    def flexkv(self) -> dict[str, Any]:
        """What `flexkv status` says."""
        file = self.folder / "status.json"
        subprocess.run(["flexkv", "status", "--json", str(file)], env=self.environ, check=True, capture_output=True)
        figures: dict[str, Any] = json.loads(file.read_text())
        return figures

    def loads(self) -> int:
        return sum(self.flexkv()["server"]["latencies"]["load"]["counts"])


def total(metrics: str, name: str, **labels: str) -> float:
    """The sum of a Prometheus counter over its series with these labels."""
    lines = re.findall(rf"^{re.escape(name)}\{{(.*)\}} (\S+)$", metrics, re.MULTILINE)
    return sum(float(value) for said, value in lines if all(f'{key}="{text}"' in said for key, text in labels.items()))


def free_ports(count: int) -> int:
    """The first of so many ports in a row that are free now."""
    for first in range(21000, 30000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for port, each in enumerate(sockets, first):
                each.bind(("", port))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise RuntimeError("no free ports")


@contextmanager
def deployed(script_name: str, folder: Path, **variables: str) -> Iterator[Deployment]:
    """The example of this name, serving; stopped in the end, when nothing that it started may be left."""
    model = tiny_tokenizer.make(tiny_model.make(folder / "model"))
    stack = folder / "stack.yaml"
    stack.write_text(STACK.format(block=BLOCK, folder=folder))
    ports = free_ports(7)
    environ = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "FLEXKV_CONFIG_PATH": str(stack),
        "FLEXKV_SERVER_RECV_PORT": f"ipc://{folder}/flexkv.sock",
        "DYN_HTTP_PORT": str(ports),
        "EVENT_PORT": str(ports + 1),
        "SYSTEM_PORT": str(ports + 3),
        "NIXL_PORT": str(ports + 5),
        "MODEL": str(model),
        "WORKER_ARGS": WORKER_ARGS,
        "LOGS": str(folder / "logs"),
        **variables,
    }
    said = folder / "said"
    with said.open("w") as out:
        script = subprocess.Popen(["bash", str(EXAMPLES / script_name)], env=environ, stdout=out, stderr=out, text=True)
    try:
        until = time.monotonic() + START_S
        while "\nserving " not in said.read_text():
            assert script.poll() is None, said.read_text()
            assert time.monotonic() < until, said.read_text()
            time.sleep(0.5)
        yield Deployment(script, environ, folder)
    finally:
        script.send_signal(signal.SIGTERM)
        script.wait(120)
    started = {name: int(pid) for name, pid in re.findall(r"^(\w+): process (\d+),", said.read_text(), re.MULTILINE)}
    assert sorted(started) == ["flexkv", "frontend", "worker0", "worker1"]
    assert {name for name, pid in started.items() if Path(f"/proc/{pid}").exists()} == set()


def prompt() -> str:
    """A new one, of some 1,000 tokens, which differs from all others in its first block."""
    number = next(NUMBERS)
    return f"prompt {number}: " + " ".join(str(word * (number + 7)) for word in range(210))
