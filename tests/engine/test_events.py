"""KV events of a real vLLM, read as a router reads them: over ZMQ, into a tree of what is where."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from engine_rig import BLOCK, Engine, MakeEngine, Request, config, mixed_requests, stack, until

END = (-1).to_bytes(8, "big", signed=True)
PATIENCE_MS = 30_000
PATIENT = {"call_s": 30.0, "fetch_s": 30.0}
"""However busy the machine: what is not cached is not announced."""
TICK: list[Request] = [{"tokens": [7] * 5}]
"""Less than a block: it makes the engine step, and changes nothing."""


class Router:
    """Knows what the events say, and refuses what contradicts it.

    Attributes:
        blocks: hash -> (parent's hash, tokens, LoRA, extra keys) of all that was ever announced.
        media: hash -> where it is now.
        events: how many of each kind and medium came.
    """

    def __init__(self, folder: Path) -> None:
        self.config = {
            "enable_kv_cache_events": True,
            "endpoint": f"ipc://{folder}/events",
            "replay_endpoint": f"ipc://{folder}/replay",
        }
        self.blocks: dict[Any, tuple[Any, ...]] = {}
        self.media: dict[Any, Counter[str]] = {}
        self.events: Counter[tuple[str, str | None]] = Counter()
        self._next = 0

    def listen(self, engine: Engine) -> None:
        """Take in all that the engine has published."""
        published = "answer = llm.llm_engine.engine_core.engine_core.scheduler.kv_event_publisher._event_queue"
        until(lambda: engine.run(f"{published}.unfinished_tasks") == 0)
        self.take_published()

    def take_published(self) -> None:
        """Take in what has been published since the last call."""
        asking = zmq.Context.instance().socket(zmq.DEALER)
        try:
            asking.connect(self.config["replay_endpoint"])
            asking.send_multipart([b"", self._next.to_bytes(8, "big")])
            while True:
                assert asking.poll(PATIENCE_MS)
                *_, number, batch = asking.recv_multipart()
                if number == END:
                    return
                assert int.from_bytes(number, "big") == self._next, "none is missing"
                self._next += 1
                for event in msgspec.msgpack.decode(batch)[1]:
                    self._take(event)
        finally:
            asking.close(linger=0)

    def _take(self, event: Mapping[str, Any]) -> None:
        kind, medium = event["type"], event.get("medium")
        self.events[kind, medium] += 1
        if kind == "AllBlocksCleared":
            self.media.clear()
        elif kind == "BlockRemoved":
            for digest in event["block_hashes"]:
                self.media[digest][medium] -= 1
                assert self.media[digest][medium] >= 0, "it was not there"
                self.media[digest] += Counter()  # those that are left
                if not self.media[digest]:
                    del self.media[digest]
        else:
            self._stored(event, medium)

    def _stored(self, event: Mapping[str, Any], medium: str) -> None:
        hashes, tokens, parent = event["block_hashes"], event["token_ids"], event["parent_block_hash"]
        assert event["block_size"] == BLOCK
        assert len(tokens) == len(hashes) * BLOCK
        assert event["group_idx"] == 0
        assert event["kv_cache_spec_kind"] == "full_attention"
        assert parent is None or parent in self.media, "its parent is known"
        extras = event.get("extra_keys") or [None] * len(hashes)
        for at, (digest, extra) in enumerate(zip(hashes, extras, strict=True)):
            said = (parent, tokens[at * BLOCK : (at + 1) * BLOCK], event["lora_name"], extra)
            assert self.blocks.setdefault(digest, said) == said, "the engine says otherwise of this hash"
            if medium != "GPU":
                assert not self.media.get(digest, Counter())[medium], "it is there already"
            self.media.setdefault(digest, Counter())[medium] += 1
            parent = digest

    def held(self, medium: str) -> set[Any]:
        return {digest for digest, where in self.media.items() if where[medium]}


@pytest.fixture
def router(tmp_path: Path) -> Router:
    return Router(tmp_path)


def started(make_engine: MakeEngine, *arguments: Any, **options: Any) -> Engine:
    """An engine in one process, its worker connected and its tiers up: what is computed from now on is cached."""
    engine = make_engine(*arguments, **options)

    def ready() -> bool:
        stats = engine.run("answer = connector._scheduler._client.stats()")
        agents = [agent["connected"] for agent in stats.get("server", {"agents": []})["agents"]]
        return any(agents) and all(tier["state"] == "ready" for tier in stats["tiers"].values())

    until(ready)
    return engine


def options(router: Router | None, **env: str) -> dict[str, Any]:
    """Of an engine whose own cache is small, and whose events the router reads, if there is one."""
    events = {"kv_events_config": router.config} if router is not None else {}
    return {**events, "num_gpu_blocks_override": 160, "env": {"VLLM_CPU_KVCACHE_SPACE": "1", **env}}


def settle(engine: Engine, router: Router) -> dict[str, Any]:
    """All has been written down and said; the server's tiers."""
    assert engine.run("answer = connector._scheduler._client.drain(30)")
    engine.generate(TICK, max_tokens=1, reset_every=0)
    router.listen(engine)
    tiers: dict[str, Any] = engine.run("answer = connector._scheduler._client.stats()")["tiers"]
    return tiers


def prompts_of(requests: list[Request]) -> set[tuple[int, ...]]:
    """The first block of each, and what follows it: every run of whole blocks."""
    return {tuple(each["tokens"][:stop]) for each in requests for stop in range(BLOCK, len(each["tokens"]) + 1, BLOCK)}


def paths(router: Router, medium: str) -> Iterator[tuple[int, ...]]:
    """The tokens from the first block on, of all that is held there."""
    for digest in router.held(medium):
        tokens: list[int] = []
        above = digest
        while above is not None:
            parent, own, _, _ = router.blocks[above]
            tokens = own + tokens
            above = parent
        yield tuple(tokens)


def test_a_router_knows_what_the_server_holds(make_engine: MakeEngine, router: Router, tmp_path: Path) -> None:
    requests, tiers = mixed_requests(60), stack(tmp_path, host="2MiB", disk="4MiB")
    tiers["tiers"][1]["write_queue"] = "1GiB"  # a slow disk drops nothing
    engine = started(make_engine, config(tmp_path, tiers, **PATIENT), **options(router))
    for at in range(0, len(requests), 10):
        engine.generate(requests[at : at + 10], reset_every=0 if at % 20 else 1)
        figures = settle(engine, router)
        for name, medium in (("cpu", "CPU"), ("directory", "STORAGE")):
            held, used = len(router.held(medium)), figures[name]["used_blocks"]
            # What lies behind a hole is not announced; tests/test_events.py has the exact books.
            assert 0.9 * used <= held <= used
    assert min(tier["evicted_blocks"] for tier in figures.values()) > 0
    assert engine.figures()["loads"] > 0
    for medium in ("CPU", "STORAGE"):
        assert router.events["BlockStored", medium] > 0
        assert router.events["BlockRemoved", medium] > 0
    whole = prompts_of(requests)
    of_prompts = [path for path in paths(router, "CPU") if path in whole]
    assert len(of_prompts) > len(router.held("CPU")) / 2, "the others end with what was generated"


@pytest.mark.parametrize("form", ["1", "0"], ids=["integers", "bytes"])
def test_salted_requests_have_the_engines_hashes(
    make_engine: MakeEngine, router: Router, tmp_path: Path, form: str
) -> None:
    tokens = mixed_requests(1)[0]["tokens"]
    requests: list[Request] = [{"tokens": tokens}, {"tokens": tokens, "salt": "a"}, {"tokens": tokens, "salt": "b"}]
    env = {"VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES": form}
    engine = started(make_engine, config(tmp_path, **PATIENT), **options(router, **env))
    engine.generate(requests, max_tokens=1)
    settle(engine, router)
    assert router.held("CPU") == router.held("GPU")
    assert len(router.held("CPU")) == 3 * (len(tokens) // BLOCK)
    assert {type(digest) for digest in router.held("CPU")} == {int if form == "1" else bytes}
    salts = [extra for _, _, _, extra in router.blocks.values() if extra]
    assert sorted(salts) == [["a"], ["b"]], "of the first blocks"


@pytest.mark.slow
def test_in_a_process_of_its_own(make_engine: MakeEngine, router: Router, tmp_path: Path) -> None:
    requests = mixed_requests(4)
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    engine = make_engine(config(tmp_path, **PATIENT), **options(router, **env))

    def told() -> bool:
        engine.generate(requests, max_tokens=1)
        router.take_published()
        return len(prompts_of(requests)) == len(router.held("CPU"))

    until(told)
    assert set(paths(router, "CPU")) == prompts_of(requests)


def test_resets(make_engine: MakeEngine, router: Router, tmp_path: Path) -> None:
    requests = mixed_requests(8)
    engine = started(make_engine, config(tmp_path, **PATIENT), **options(router))
    engine.generate(requests)
    settle(engine, router)
    known = {medium: router.held(medium) for medium in ("CPU", "STORAGE")}
    assert all(known.values())
    assert engine.tell("reset")["ok"]
    settle(engine, router)
    assert router.events["AllBlocksCleared", None] == 2, "one before the first batch"
    assert router.held("GPU") == set()
    assert {medium: router.held(medium) for medium in known} == known, "they are still there: it is told again"
    assert engine.tell("reset", connector=True)["ok"]
    settle(engine, router)
    assert router.media == {}
    engine.generate(requests)
    settle(engine, router)
    assert router.held("CPU") == known["CPU"]


@pytest.mark.slow
def test_engine_and_server_come_back(make_engine: MakeEngine, router: Router, tmp_path: Path) -> None:
    requests = mixed_requests(4)
    first = started(make_engine, config(tmp_path, **PATIENT), **options(None))
    first.generate(requests)
    assert first.run("answer = connector._scheduler._client.drain(30)")
    assert first.run("answer = [connector._scheduler._events, list(connector.take_events())]") == [None, []]
    first.close()
    engine = started(make_engine, config(tmp_path, **PATIENT), **options(router))
    engine.generate(TICK, max_tokens=1)
    router.listen(engine)
    assert router.held("CPU") == set()
    engine.generate(requests, max_tokens=1)
    tiers = settle(engine, router)
    assert engine.figures()["loads"] > 0
    assert 0 < len(router.held("CPU")) <= tiers["cpu"]["used_blocks"]
    os.kill(engine.run("answer = connector._scheduler._client.stats()")["server"]["pid"], signal.SIGKILL)
    until(lambda: not engine.run("answer = connector._scheduler._client.connected"))
    engine.generate(TICK, max_tokens=1, reset_every=0)
    router.listen(engine)
    assert router.held("CPU") == router.held("STORAGE") == set()
