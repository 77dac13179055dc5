"""Real engines for tests: vLLM in a process of its own, requests with shared prefixes, and stacks for them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROCESS = Path(__file__).parent / "engine_process.py"
START_S = 240.0
ANSWER_S = 300.0
END_S = 20.0
BLOCK = 32
ENVIRON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # One thread, not bound: threads that spin for each other take turns badly where cores are few and shared.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}

ZEROED = """
from flexkv_core.device.cpu import CpuDevice
if "zeroed" not in globals():
    zeroed = set()
    def zeroing(self, host, offsets, blocks, group=0, plain=CpuDevice.scatter):
        plain(self, host, offsets, blocks, group)
        if group in zeroed:
            for tensor in self._tensors[group]:
                tensor[[int(block) for block in blocks]] = 0
    CpuDevice.scatter = zeroing
"""

Request = dict[str, Any]
MakeEngine = Callable[..., "Engine"]
Expected = Callable[..., list[list[int]]]


class EngineFailedError(AssertionError):
    """The engine died, hung, or said that it failed; the text has the end of its log."""


class Zygote:
    """What engines are forked from: a process that has imported vLLM. Once a test run.

    Args:
        folder: for its socket and log.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "engines.sock"
        with (folder / "engines.log").open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, str(PROCESS), str(self.path)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRON},
            )
        until(lambda: self.path.exists() or self._process.poll() is not None, START_S)
        assert self.path.exists(), (folder / "engines.log").read_text()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def until(true: Callable[[], Any], timeout_s: float = ANSWER_S) -> None:
    """Wait for it."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


class Engine:
    """A vLLM, ready to serve.

    Args:
        zygote: it is forked from. model: folder. log: where its output goes.
        connector: `kv_transfer_config`, or None. env: more environment. llm: more arguments of `LLM`.
    """

    def __init__(
        self,
        zygote: Zygote,
        model: Path,
        log: Path,
        connector: Mapping[str, Any] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        **llm: Any,
    ) -> None:
        arguments = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 1024,
            "dtype": "float32",
            "block_size": BLOCK,
            "gpu_memory_utilization": 0.1,  # of host memory: that so much is free is checked
            **llm,
        }
        if connector is not None:
            arguments["kv_transfer_config"] = dict(connector)
        self._log = log
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(zygote.path))
        self._said = self._socket.makefile("r")
        self._send({"llm": arguments, "env": dict(env or {}), "log": str(log)})
        self.pid = int(self._next(START_S)["pid"])
        try:
            self._next(START_S)
        except BaseException:
            self.kill()
            raise

    def _send(self, order: Mapping[str, Any]) -> None:
        self._socket.sendall((json.dumps(order) + "\n").encode())

    def _next(self, timeout_s: float) -> dict[str, Any]:
        self._socket.settimeout(timeout_s)
        try:
            line = self._said.readline()
            said: dict[str, Any] = json.loads(line) if line else {"failed": "it ended"}
        except (TimeoutError, ConnectionError) as error:
            said = {"failed": f"no answer within {timeout_s:g} s: {error!r}"}
        if "failed" in said:
            raise EngineFailedError(f"{said['failed']}\n{self.log[-6000:]}")
        return said

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def tell(self, do: str, on_batch: Callable[[int], None] | None = None, **order: Any) -> dict[str, Any]:
        """Give an order and wait for its end."""
        self._send({"do": do, **order})
        while "done" not in (said := self._next(ANSWER_S)):
            if on_batch is not None:
                on_batch(said["batch"])
        done: dict[str, Any] = said["done"]
        return done

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_tokens: int = 8,
        batch: int = 8,
        reset_every: int = 1,
        on_batch: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """Serve them; by default vLLM's own cache is dropped before each batch."""
        return self.tell(
            "generate",
            on_batch,
            requests=list(requests),
            max_tokens=max_tokens,
            batch=batch,
            reset_every=reset_every,
        )

    def tokens(self, requests: Sequence[Request], **options: Any) -> list[list[int]]:
        """As `generate`: what came out."""
        tokens: list[list[int]] = self.generate(requests, **options)["tokens"]
        return tokens

    def run(self, code: str) -> Any:
        """Run Python in it; what it called `answer` comes back."""
        return self.tell("run", code=code)["answer"]

    def settle(self) -> None:
        """Have finished requests' stores end and be written down: while one holds its blocks, vLLM does not drop its
        own cache. Single-process engines only."""
        self.run(
            "scheduler = llm.llm_engine.engine_core.engine_core.scheduler\n"
            "while scheduler.has_requests(): llm.llm_engine.step()\n"
            "if connector is not None and hasattr(connector, '_scheduler'): connector._scheduler._client.drain(60.0)"
        )

    def stats(self) -> dict[str, Any]:
        """The server's; single-process engines only."""
        stats: dict[str, Any] = self.run("answer = connector._scheduler._client.stats()")
        return stats

    def zero_loads(self, *groups: int) -> None:
        """From now on loads bring zeros to these KV groups, and to these only. Single-process engines only."""
        self.run(f"{ZEROED}zeroed.clear()\nzeroed.update({groups})")

    def figures(self) -> dict[str, int]:
        """The scheduler half's; single-process engines only."""
        figures: dict[str, int] = self.run("answer = dict(connector._scheduler.figures())")
        return figures

    def close(self) -> None:
        """End it; kills what does not end."""
        with contextlib.suppress(OSError, EngineFailedError):
            self.tell("close")
            self._socket.settimeout(END_S)
            self._said.read()  # until it has ended
        self.kill()

    def kill(self) -> None:
        """kill -9, with all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{self.pid}").exists())
        self._said.close()
        self._socket.close()


def stack(
    folder: Path, *, host: str = "4MiB", disk: str = "16MiB", faults: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Host memory over a directory, both small enough to evict."""
    lower: dict[str, Any] = {"backend": "directory", "root": str(folder / "blocks"), "capacity": disk}
    if faults:
        lower["faults"] = dict(faults)
    return {"tiers": [{"backend": "cpu", "capacity": host}, lower]}


def config(folder: Path, tiers: Mapping[str, Any] | None = None, **extra: Any) -> dict[str, Any]:
    """`kv_transfer_config` of an engine whose server is at `folder`'s socket."""
    return {
        "kv_connector": "FlexKVConnector",
        "kv_role": "kv_both",
        "kv_connector_module_path": "flexkv_core.connectors.vllm",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "stack": dict(tiers if tiers is not None else stack(folder)),
            "socket": str(folder / "flexkv.sock"),
            "call_s": 30,  # that a machine is busy must cost no hit here
            "fetch_s": 60,
            "load_or_compute": False,  # computing is fast with a tiny model
            **extra,
        },
    }


def mixed_requests(count: int, seed: int = 0, bases: int = 12, longest: int = 400) -> list[Request]:
    """Prompts of which many begin alike, at lengths that fall anywhere within blocks."""
    random_ = random.Random(seed)
    prefixes = [[random_.randrange(2, 500) for _ in range(random_.randrange(100, longest))] for _ in range(bases)]
    requests = []
    for _ in range(count):
        prefix = random_.choice(prefixes)
        kept = prefix[: random_.randrange(40, len(prefix) + 1)]
        requests.append({"tokens": kept + [random_.randrange(2, 500) for _ in range(random_.randrange(1, 80))]})
    return requests
