"""On a real engine: requests of different salts, and of different adapters, never find each other's blocks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_adapter
from engine_rig import BLOCK, Engine, Request, Zygote, config

TOKENS = 200
HIT = (TOKENS - 1) // BLOCK * BLOCK


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    """Three, in folders of one name."""
    folder = tmp_path_factory.mktemp("adapters")
    return [tiny_adapter.make(folder / str(seed) / "adapter", seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def engines(zygote: Zygote, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """With LoRA: one with the connector, one without."""
    folder = tmp_path_factory.mktemp("isolation")
    lora: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": tiny_adapter.RANK}
    large = {"tiers": [{"backend": "cpu", "capacity": "64MiB"}]}
    made = [
        Engine(zygote, model, folder / f"{name}.log", connector, **lora)
        for name, connector in {"with": config(folder, large), "plain": None}.items()
    ]
    yield made[0], made[1]
    for engine in made:
        engine.close()


def prompt(seed: int, **more: Any) -> Request:
    numbers = random.Random(seed)
    return {"tokens": [numbers.randrange(2, 500) for _ in range(TOKENS)], **more}


def serve(engines: tuple[Engine, Engine], request: Request) -> int:
    """Tokens that it found; what came out is what comes out without the connector. It is stored when this returns."""
    done = engines[0].generate([request])
    assert done["tokens"] == engines[1].tokens([request])
    assert engines[0].run("answer = connector._scheduler._client.drain(60.0)")
    (cached,) = done["cached"]
    return int(cached)


def test_salts(engines: tuple[Engine, Engine]) -> None:
    """vLLM's own cache is dropped before each request: what is found is the connector's."""
    salts = [None, "A", "B", "a", "A\0"]
    for salt in salts:
        assert serve(engines, prompt(1, salt=salt)) == 0, f"salt {salt!r} found another's"
    for salt in salts:
        assert serve(engines, prompt(1, salt=salt)) == HIT


def test_adapters(engines: tuple[Engine, Engine], adapters: Sequence[Path]) -> None:
    requests = [prompt(2), *(prompt(2, lora=["adapter", 1 + n, str(adapters[n])]) for n in range(2))]
    said = [engines[1].tokens([request]) for request in requests]
    assert said[0] != said[1] != said[2] != said[0], "else this test could see nothing"
    for request in requests:
        assert serve(engines, request) == 0, f"{request.get('lora')} found another's"
    for request in requests:
        assert serve(engines, request) == HIT
    # Salt and adapter together are neither.
    assert serve(engines, {**requests[1], "salt": "adapter"}) == 0
    assert serve(engines, prompt(2, salt="adapter")) == 0


def test_an_adapter_that_has_changed(engines: tuple[Engine, Engine], adapters: Sequence[Path]) -> None:
    """Same name, same number, other content: what the former computed is not found."""
    former, later = (prompt(3, lora=["changing", 7, str(path)]) for path in adapters[1:])
    assert serve(engines, former) == 0
    assert serve(engines, former) == HIT
    for engine in engines:
        assert engine.run("answer = llm.llm_engine.remove_lora(7)")
    assert serve(engines, later) == 0
    assert serve(engines, later) == HIT
