"""Fixtures of the tests on a real engine: engines, a model, and what it says without a connector."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from engine_rig import Engine, Expected, MakeEngine, Request, Zygote


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(tmp_path_factory.mktemp("zygote"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens depend on its KV."""
    return tiny_model.make(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def make_engine(zygote: Zygote, model: Path, tmp_path: Path) -> Iterator[MakeEngine]:
    """Makes engines that end with the test: `make_engine(kv_transfer_config, **arguments of Engine)`."""
    made: list[Engine] = []
    numbers = itertools.count()

    def make(connector: Any = None, *, model: Path = model, **options: Any) -> Engine:
        made.append(Engine(zygote, model, tmp_path / f"engine{next(numbers)}.log", connector, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="session")
def plain(zygote: Zygote, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM without a connector."""
    made = Engine(zygote, model, tmp_path_factory.mktemp("plain") / "engine.log")
    yield made
    made.close()


@pytest.fixture(scope="session")
def expected(plain: Engine) -> Expected:
    """What vLLM says without a connector, for the same requests and options."""
    known: dict[str, list[list[int]]] = {}

    def tokens(requests: list[Request], **options: Any) -> list[list[int]]:
        name = repr((requests, sorted(options.items())))
        if name not in known:
            known[name] = plain.tokens(requests, **options)
        return known[name]

    return tokens
