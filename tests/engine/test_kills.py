"""Restarts and kill -9 around a real engine: every request is answered, with the same tokens, and hits come again."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_rig import BLOCK, Engine, Expected, MakeEngine, Request, config, mixed_requests, stack, until
from server_rig import ServerProcess, Wire, figures_of, hello

from flexkv_core.server import messages as m
from flexkv_core.server.reattach import holders, label_of

REQUESTS, BATCH = 200, 8
ROUNDS = 20 if os.environ.get("FLEXKV_SOAK") else 1
AGENT = """
import os, socket, sys, threading, time
from vllm.distributed.kv_transfer import get_kv_transfer_group
agent = get_kv_transfer_group()._worker._agent
def cut():
    while True:
        while not os.path.exists(TRIGGER):
            time.sleep(0.002)
        frame = sys._current_frames()[agent._thread.ident]
        while frame is not None and 'connection' not in frame.f_locals:
            frame = frame.f_back
        if frame is not None:
            frame.f_locals['connection'].shutdown(socket.SHUT_RDWR)
            os.unlink(TRIGGER)
threading.Thread(target=cut, daemon=True).start()
"""


def prompts(seed: int) -> list[Request]:
    numbers = random.Random(seed)
    return [{"tokens": [numbers.randrange(2, 500) for _ in range(5 * BLOCK + 3)]} for _ in range(12)]


def observed(path: Path) -> tuple[int, dict[str, Any]]:
    """(process, stats) of the server there."""
    with Wire(path) as wire:
        welcome = wire.ask(hello("observer"))
        assert isinstance(welcome, m.Welcome)
        return welcome.pid, figures_of(wire)


def served(engine: Engine, requests: list[Request]) -> tuple[list[list[int]], int]:
    """(tokens, tokens that came from a cache) with vLLM's own dropped before."""
    done = engine.generate(requests, batch=1)
    return done["tokens"], sum(done["cached"])


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server of its own, that no engine starts or ends."""
    with ServerProcess(tmp_path / "flexkv.sock", stack(tmp_path, disk="64MiB")) as server:
        yield server


def test_hits_survive_restarts(
    make_engine: MakeEngine, expected: Expected, kept: ServerProcess, tmp_path: Path
) -> None:
    requests = prompts(1)
    connector = config(tmp_path, stack(tmp_path, disk="64MiB"))
    right, whole = expected(requests, batch=1), len(requests) * 5 * BLOCK
    first = make_engine(connector)
    assert served(first, requests) == (right, 0)
    first.settle()
    first.kill()
    second = make_engine(connector)
    assert served(second, requests) == (right, whole), "the server was kept"
    second.settle()
    second.kill()
    kept.kill()
    kept.start()
    until(lambda: answering(kept.path))
    third = make_engine(connector)
    assert served(third, requests) == (right, whole), "the lower tier was kept"


def test_kills_in_the_middle(make_engine: MakeEngine, expected: Expected, tmp_path: Path) -> None:
    seed = int(os.environ.get("FLEXKV_SEED", random.randrange(1 << 30)))
    print(f"seed {seed}")
    numbers = random.Random(seed)
    requests = mixed_requests(REQUESTS, seed=2)
    right = expected(requests, batch=BATCH)
    path, trigger = tmp_path / "flexkv.sock", tmp_path / "cut"
    flex = make_engine(config(tmp_path, stack(tmp_path), call_s=2, fetch_s=5))
    flex.run(AGENT.replace("TRIGGER", repr(str(trigger))))

    def kill_tier() -> None:
        until(lambda: answering(path))  # where it was killed before
        pid = observed(path)[1]["tiers"]["directory"]["pid"]
        os.kill(pid, signal.SIGKILL)

    def cut_agent() -> None:
        trigger.touch()
        until(lambda: not trigger.exists())

    def kill_server() -> None:
        os.kill(observed(path)[0], signal.SIGKILL)

    kills: dict[str, Callable[[], object]] = {"tier": kill_tier, "agent": cut_agent, "server": kill_server}
    for name, kill in kills.items():
        for _ in range(ROUNDS):
            at, done = numbers.randrange(2, REQUESTS // BATCH - 4), []

            def on_batch(batch: int, at: int = at, done: list[int] = done, kill: Callable[[], object] = kill) -> None:
                if batch == at:
                    kill()
                    done.append(batch)

            assert flex.tokens(requests, batch=BATCH, on_batch=on_batch) == right, name
            assert done == [at]
            until(lambda: answering(path))
            before = flex.figures()["hit_tokens"]
            assert flex.tokens(requests[:64], batch=BATCH) == right[:64]
            assert flex.tokens(requests[:64], batch=BATCH) == right[:64]
            assert flex.figures()["hit_tokens"] > before, f"no hit after the kill of the {name}"
    figures = flex.figures()
    print(figures)
    assert figures["client_connections"] == 1 + ROUNDS
    pid = observed(path)[0]
    flex.close()
    os.kill(pid, signal.SIGTERM)
    until(lambda: not Path(f"/proc/{pid}").exists())
    until(lambda: not holders(label_of(path)))


def answering(path: Path) -> bool:
    """Whether a server is ready there, its tiers too."""
    try:
        return bool(observed(path)[1]["tiers"]["directory"]["state"] == "ready")
    except (OSError, AssertionError, KeyError):
        return False
