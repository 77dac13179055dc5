"""Load or compute in a real vLLM: a fast tier is used, and not one that is throttled; the tokens are the same.

The engine is told what a token of a prompt takes, so that only the tier decides; how fast that is is really measured.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engine_rig import BLOCK, Engine, Expected, MakeEngine, Request, config

COUNT, LENGTH = 8, 30 * BLOCK + 5
TOKEN_S = 0.002
BLOCK_BYTES = 32 << 10
THROTTLED = BLOCK_BYTES / (100 * TOKEN_S * BLOCK)
"""Bytes a second of a tier that takes 100 times as long for a block as computing it does."""
TELL = f"""
from flexkv_core.connectors.estimates import PrefillSpeed
PrefillSpeed.token_s = property(lambda self: {TOKEN_S})
answer = None
"""


def prompts() -> list[Request]:
    numbers = random.Random(4)
    return [{"tokens": [numbers.randrange(2, 500) for _ in range(LENGTH)]} for _ in range(COUNT)]


def stored(engine: Engine) -> list[list[int]]:
    """Serve all prompts and have each written down; what came out."""
    engine.run(TELL)
    said = []
    for prompt in prompts():
        said += engine.tokens([prompt])
        assert engine.run("answer = connector._scheduler._client.drain(60.0)")
    return said


def over(folder: Path, rate: float | None) -> dict[str, Any]:
    """Host memory for three prompts over a tier that is never taken for ill."""
    lower: dict[str, Any] = {
        "backend": "directory",
        "root": str(folder / "blocks"),
        "capacity": "64MiB",
        "deadline_s": 3600.0,
        "write_queue": "2MiB",
    }
    if rate is not None:
        lower["faults"] = {"rate": rate, "operations": ["read"]}
    return {"tiers": [{"backend": "cpu", "capacity": "4MiB"}, lower]}


@pytest.mark.parametrize("rate", [None, THROTTLED], ids=["fast", "throttled"])
def test_a_throttled_tier_turns_the_decision(
    make_engine: MakeEngine, expected: Expected, tmp_path: Path, rate: float | None
) -> None:
    engine = make_engine(config(tmp_path, over(tmp_path, rate), fetch_s=2.0, call_s=20.0, load_or_compute=True))
    said = stored(engine)
    assert engine.figures()["hit_tokens"] == 0
    done = engine.generate(prompts(), batch=1)
    assert done["tokens"] == said == expected(prompts(), batch=1)
    figures = engine.figures()
    whole, refused = figures["choice_whole"], figures["choice_cut"] + figures["choice_not_taken"]
    if rate is None:
        assert whole >= COUNT - 2, "but what was late once on a busy machine"
        assert figures["hit_tokens"] >= whole * 30 * BLOCK
    else:
        assert whole <= 3, "what was still in host memory"
        assert refused >= COUNT - 3, figures
        assert figures["choice_gave_up"] <= 2, "it is tried once or twice, then nobody waits any more"
        assert figures["choice_probes"] >= 1


@pytest.mark.slow
def test_it_can_be_turned_off(make_engine: MakeEngine, tmp_path: Path) -> None:
    rate = THROTTLED * 50  # it takes twice as long as computing
    engine = make_engine(config(tmp_path, over(tmp_path, rate), fetch_s=60.0, call_s=20.0, load_or_compute=False))
    said = stored(engine)
    assert engine.tokens(prompts()[:1], batch=1) == said[:1]
    figures = engine.figures()
    assert (figures["choice_whole"], figures["choice_gave_up"]) == (1, 0)
    assert figures["hit_tokens"] == 30 * BLOCK
