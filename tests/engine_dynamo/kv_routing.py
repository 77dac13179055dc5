"""examples/dynamo/kv_routing.sh for real, without a GPU: a frontend, two workers, one FlexKV server. Run by
`make test-dynamo`; not collected by `make test`, since the installation takes some 5 GB."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples" / "dynamo"
sys.path.insert(0, str(REPOSITORY / "tests" / "engine"))
import tiny_model  # noqa: E402
import tiny_tokenizer  # noqa: E402

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
    """worker: who computed it. cached: prompt tokens that were not computed. expected: the share of the prompt that the
    router knew to be in that worker's own cache."""

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
            expected=said["timing"]["kv_hit_rate"],
        )

    def workers(self) -> list[int]:
        instances = json.loads(self.get("/health"))["instances"]
        return [each["instance_id"] for each in instances if each["endpoint"] == "generate"]

    def external_tokens(self) -> float:
        """Tokens that workers' vLLM got from its connector, by its own count."""
        first = int(self.environ["SYSTEM_PORT"])
        return sum(total(self.get("/metrics", port), "vllm:external_prefix_cache_hits_total") for port in (first, first + 1))

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


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("dynamo")
    model = tiny_tokenizer.make(tiny_model.make(folder / "model"))
    stack = folder / "stack.yaml"
    stack.write_text(STACK.format(block=BLOCK, folder=folder))
    ports = free_ports(5)
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
        "MODEL": str(model),
        "WORKER_ARGS": WORKER_ARGS,
        "LOGS": str(folder / "logs"),
    }
    said = folder / "said"
    with said.open("w") as out:
        script = subprocess.Popen(["bash", str(EXAMPLES / "kv_routing.sh")], env=environ, stdout=out, stderr=out, text=True)
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


def test_what_one_worker_has_computed_another_loads(deployment: Deployment) -> None:
    text = prompt()
    loads, external = deployment.loads(), deployment.external_tokens()
    first = deployment.ask(text)
    assert (first.cached, deployment.loads() - loads) == (0, 0)
    (other,) = set(deployment.workers()) - {first.worker}
    second = deployment.ask(text, other)
    assert (second.worker, second.expected) == (other, 0.0)  # nothing of it in its own cache
    assert second.cached == (first.prompt - 1) // BLOCK * BLOCK
    assert second.text == first.text
    assert deployment.loads() - loads == 1
    assert deployment.external_tokens() - external == second.cached


def test_the_router_hears_what_its_workers_hold(deployment: Deployment) -> None:
    texts = [prompt() for _ in range(4)]
    firsts = [deployment.ask(text) for text in texts]
    seconds = [deployment.ask(text) for text in texts]
    assert [answer.expected for answer in firsts] == [0.0] * 4
    assert all(answer.expected > 0.9 for answer in seconds)
    assert [answer.worker for answer in seconds] == [answer.worker for answer in firsts]
    metrics = deployment.get("/metrics")
    assert total(metrics, "dynamo_component_kv_cache_events_applied", event_type="stored", status="ok") > 0


def test_the_script_that_verifies(deployment: Deployment) -> None:
    """A worker's own cache loses the prompt to others and gets it back from FlexKV."""
    hits = deployment.flexkv()["tiers"]["cpu"]["hit_blocks"]
    ran = subprocess.run(["bash", str(EXAMPLES / "verify"), "64"], env=deployment.environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^external hit: \d+ of \d+ prompt tokens", ran.stdout, re.MULTILINE), ran.stdout
    assert deployment.flexkv()["tiers"]["cpu"]["hit_blocks"] > hits
    print(ran.stdout)
