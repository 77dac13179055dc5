"""On a real engine: a model of three KV groups, two with a sliding window and one of full attention."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_hybrid
from engine_rig import BLOCK, Engine, Request, Zygote, config, mixed_requests, stack

LARGE = {"tiers": [{"backend": "cpu", "capacity": "128MiB"}]}
NUMBERS = range(2, 500)
GROUPS = range(tiny_hybrid.GROUPS)
SLIDING, FULL = (0, 1), 2
WINDOW_BLOCKS = tiny_hybrid.WINDOW // BLOCK
# Count what is copied, by KV group. While `broken` names a group, its loads fail; while `slow` names
# seconds, stores take so long.
WATCH = """
import time
from flexkv_core.device.cpu import CpuDevice
copied = {"gather": {}, "scatter": {}}
nulls, broken, slow, preempted = [], [], [], []
def watch(name, plain):
    def copy(self, host, offsets, blocks, group=0):
        nulls.extend(int(block) for block in blocks if block <= 0)
        copied[name].setdefault(group, []).append(len(blocks))
        if name == "scatter" and group in broken:
            raise OSError("made to fail")
        if name == "gather":
            time.sleep(sum(slow))
        plain(self, host, offsets, blocks, group)
    return copy
for name in copied:
    setattr(CpuDevice, name, watch(name, getattr(CpuDevice, name)))
half = connector._scheduler
def note(request_id, plain=half._preempted):
    preempted.append(request_id)
    plain(request_id)
half._preempted = note
specs = connector._kv_cache_config.kv_cache_groups
answer = [type(group.kv_cache_spec).__name__ for group in specs]
"""


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hybrid.make(tmp_path_factory.mktemp("hybrid") / "tiny")


@pytest.fixture(scope="module")
def alone(zygote: Zygote, hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The model without a connector."""
    made = Engine(zygote, hybrid, tmp_path_factory.mktemp("alone") / "engine.log")
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(zygote: Zygote, hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """With the connector, and room for all; it retains all blocks of a window that have been computed."""
    folder = tmp_path_factory.mktemp("with")
    made = Engine(zygote, hybrid, folder / "engine.log", config(folder, LARGE), prefix_cache_retention_interval=BLOCK)
    watched(made)
    yield made
    made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the server of `short`."""
    return tmp_path_factory.mktemp("short")


@pytest.fixture(scope="module")
def short(zygote: Zygote, hybrid: Path, folder: Path) -> Iterator[Engine]:
    """With the connector, and room for little anywhere."""
    options: dict[str, Any] = {"num_gpu_blocks_override": 80, "max_num_batched_tokens": 128, "max_num_seqs": 16}
    made = Engine(zygote, hybrid, folder / "engine.log", config(folder, stack(folder)), **options)
    watched(made)
    yield made
    made.close()


def watched(engine: Engine) -> None:
    """vLLM really has made the groups that this is about."""
    hma = engine.run("answer = llm.llm_engine.vllm_config.scheduler_config.disable_hybrid_kv_cache_manager")
    assert hma is False, "vLLM turns its hybrid manager off for connectors that do not support it"
    assert engine.run(WATCH) == ["SlidingWindowSpec", "SlidingWindowSpec", "FullAttentionSpec"]


def blocks(engine: Engine, copy: str) -> list[int]:
    """How many have been copied, by KV group, since this was asked last."""
    by_group = engine.run(f"answer = [sum(copied[{copy!r}].pop(group, [])) for group in range({len(GROUPS)})]")
    assert engine.run("answer = nulls") == [], "the null block was copied as if it were real"
    return [int(count) for count in by_group]


def listener(path: Path) -> int:
    """The process that serves a socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))
        return int(struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def stored(engine: Engine) -> None:
    assert engine.run("answer = connector._scheduler._client.drain(60.0)")


def prompt(seed: int, length: int, *, prefix: list[int] | None = None) -> Request:
    numbers = random.Random(seed)
    return {"tokens": [*(prefix or []), *(numbers.choice(NUMBERS) for _ in range(length))]}


def test_each_group_is_stored_and_loaded(engine: Engine, alone: Engine) -> None:
    request = [prompt(1, 300)]
    said = alone.tokens(request, max_tokens=16)
    assert engine.tokens(request, max_tokens=16) == said
    stored(engine)
    gathered = blocks(engine, "gather")
    assert gathered == [9, 9, 9]
    done = engine.generate(request, max_tokens=16)
    assert done["tokens"] == said
    assert done["cached"] == [288]
    # Of a window's group no more is loaded than continues from there.
    assert blocks(engine, "scatter") == [WINDOW_BLOCKS, WINDOW_BLOCKS, 9]


def test_prompts_that_part_before_the_last_window(engine: Engine, alone: Engine) -> None:
    """vLLM has freed the blocks in the middle of a prompt of a window's group when they can be stored: they are stored,
    since it retains them.
    """
    shared = prompt(2, 300)["tokens"]
    requests = [prompt(20 + tail, 200, prefix=shared) for tail in range(3)]
    assert engine.tokens(requests[:1]) == alone.tokens(requests[:1])
    stored(engine)
    done = engine.generate(requests[1:])
    assert done["tokens"] == alone.tokens(requests[1:])
    assert done["cached"] == [288, 288]


def test_answers_that_outgrow_the_window(engine: Engine, alone: Engine) -> None:
    """What is generated is stored as the window moves on, and continues from there."""
    first = prompt(3, 70)
    said = alone.tokens([first], max_tokens=200)
    assert engine.tokens([first], max_tokens=200) == said
    stored(engine)
    follow = {"tokens": first["tokens"] + said[0] + prompt(4, 20)["tokens"]}
    done = engine.generate([follow])
    assert done["tokens"] == alone.tokens([follow])
    assert done["cached"] == [256]


@pytest.mark.parametrize("group", GROUPS)
def test_the_tokens_depend_on_each_group(engine: Engine, alone: Engine, group: int) -> None:
    """Else the tests here could see nothing."""
    requests = [prompt(50 + 10 * group + number, 300) for number in range(3)]
    said = alone.tokens(requests)
    assert engine.tokens(requests) == said
    stored(engine)
    engine.zero_loads(group)
    assert engine.tokens(requests) != said
    engine.zero_loads()
    assert engine.tokens(requests) == said


@pytest.mark.parametrize("group", GROUPS)
def test_a_load_that_fails_is_computed(engine: Engine, alone: Engine, group: int) -> None:
    """vLLM raises where any block of several groups is said to be invalid: what failed is the request's load."""
    requests = [prompt(100 + 10 * group + number, 200) for number in range(4)]
    said = alone.tokens(requests)
    assert engine.tokens(requests) == said
    stored(engine)
    before = engine.figures()
    engine.run(f"broken.append({group})")
    assert engine.tokens(requests) == said
    engine.run("broken.clear()")
    after = engine.figures()
    assert after["failed_loads"] - before["failed_loads"] == after["loads"] - before["loads"] == len(requests)
    done = engine.generate(requests)
    assert (done["tokens"], done["cached"]) == (said, [192] * 4)


@pytest.fixture(scope="module")
def mixed(alone: Engine) -> tuple[list[Request], list[list[int]]]:
    """200 requests, the last 40 with long answers; and what comes out."""
    requests = mixed_requests(200)
    said = alone.tokens(requests[:160], batch=16) + alone.tokens(requests[160:], batch=8, max_tokens=100)
    return requests, said


def test_blocks_that_leave_the_window_while_they_are_copied(short: Engine, alone: Engine) -> None:
    """vLLM gives a block that it has freed and does not retain to whom asks next: not before its copy has ended."""
    first = prompt(5, 70)
    said = alone.tokens([first], max_tokens=200)
    short.run("slow.append(0.5)")
    assert short.tokens([first], max_tokens=200) == said
    stored(short)
    short.run("slow.clear()")
    tokens, found = first["tokens"] + said[0], []
    for length in range(40, len(tokens), BLOCK):
        follow = {"tokens": tokens[:length]}
        done = short.generate([follow])
        assert done["tokens"] == alone.tokens([follow]), f"of {length} tokens"
        found += done["cached"]
    assert sum(found) > 0


@pytest.mark.slow
def test_mixed_requests_where_memory_is_short(
    short: Engine, folder: Path, mixed: tuple[list[Request], list[list[int]]]
) -> None:
    """Chunked prefill, preemption, eviction from both tiers, resets; at last the server is killed."""
    requests, said = mixed
    before = short.figures()["hit_tokens"]
    blocks(short, "gather"), blocks(short, "scatter")
    assert short.tokens(requests[:160], batch=16, reset_every=2) == said[:160]
    figures = short.figures()
    assert figures["hit_tokens"] - before >= 100 * BLOCK, figures
    assert figures["failed_loads"] == 0
    assert min(blocks(short, "gather")) > 0
    assert min(blocks(short, "scatter")) > 0

    def kill(batch: int) -> None:
        if batch == 2:
            os.kill(listener(folder / "flexkv.sock"), signal.SIGKILL)

    tokens = short.tokens(requests[160:], batch=8, max_tokens=100, on_batch=kill)
    assert tokens == said[160:]
    assert (count := short.run("answer = len(preempted)")) >= 5, count
