"""A hybrid model of linear attention: a state beside full attention, in two KV groups with equal pages, one padded."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import tiny_state
from engine_rig import Engine, Request, Zygote, config

BOUNDARY = 384
"""Tokens of a block: a state is kept at its end."""
PROMPT = 2 * BOUNDARY + 5
OPTIONS = {"dtype": "bfloat16", "block_size": BOUNDARY}


@pytest.fixture(scope="module")
def engines(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """Without a connector, and with one."""
    folder = tmp_path_factory.mktemp("state")
    model = tiny_state.make(folder / "model")
    tiers = {"tiers": [{"backend": "cpu", "capacity": "256MiB", "prefault": False}]}
    alone = Engine(zygote, model, folder / "alone.log", **OPTIONS)
    flex = Engine(zygote, model, folder / "flex.log", config(folder, tiers), **OPTIONS)
    yield alone, flex
    alone.close()
    flex.close()


def prompts(count: int) -> list[Request]:
    numbers = random.Random(3)
    return [{"tokens": [numbers.randrange(2, 500) for _ in range(PROMPT)]} for _ in range(count)]


def test_a_state_and_what_goes_with_it_come_back(engines: tuple[Engine, Engine]) -> None:
    alone, flex = engines
    requests = prompts(4)
    said = alone.tokens(requests, batch=1)
    assert len({tuple(tokens) for tokens in said}) == len(said), "the tokens depend on the prompt"
    first = flex.generate(requests, batch=1)
    assert (first["tokens"], first["cached"]) == (said, [0] * 4)
    flex.settle()
    again = flex.generate(requests, batch=1)
    assert (again["tokens"], again["cached"]) == (said, [2 * BOUNDARY] * 4)
    for group in (0, 1):
        flex.settle()
        flex.zero_loads(group)
        assert flex.tokens(requests, batch=1) != said, f"group {group} does not matter: nothing is shown here"
    flex.zero_loads()
    flex.settle()
    assert flex.tokens(requests, batch=1) == said
