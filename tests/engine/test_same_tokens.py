"""Rule one, on a real engine: with FlexKV, the same tokens as without, and the same bytes."""

from __future__ import annotations

import os
import random
from pathlib import Path

from engine_rig import BLOCK, Expected, MakeEngine, Request, config, mixed_requests, stack

SOAK = bool(os.environ.get("FLEXKV_SOAK"))
REQUESTS = 2000 if SOAK else 500
FAULTS = {"error": 0.1, "corrupt": 0.1, "short": 0.05, "lost": 0.1}
WATCH = """
kv_caches = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.kv_caches
seen = {}
finished = connector.request_finished_all_groups
def watched(request, block_ids):
    full = min(request.num_computed_tokens, request.num_prompt_tokens) // 32
    seen[request.request_id] = [b"".join(t[b].numpy().tobytes() for t in kv_caches) for b in block_ids[0][:full]]
    return finished(request, block_ids)
connector.request_finished_all_groups = watched
def digests():
    import hashlib
    found = [[hashlib.sha256(block).hexdigest() for block in blocks] for blocks in seen.values()]
    seen.clear()
    return found
"""


def long_prompts(count: int, seed: int) -> list[Request]:
    numbers = random.Random(seed)
    return [{"tokens": [numbers.randrange(2, 500) for _ in range(6 * BLOCK + 7)]} for _ in range(count)]


def test_shared_prefixes(make_engine: MakeEngine, expected: Expected, tmp_path: Path) -> None:
    requests = mixed_requests(REQUESTS)
    flex = make_engine(config(tmp_path, stack(tmp_path, disk="8MiB", faults=FAULTS)))

    half = REQUESTS // 2 // 8 * 8
    tokens = flex.tokens(requests[:half])
    flex.settle()
    assert flex.tell("reset", connector=True)["ok"]
    tokens += flex.tokens(requests[half:])
    assert tokens == expected(requests)
    flex.settle()
    figures, tiers = flex.figures(), flex.stats()["tiers"]
    print(figures, tiers)
    assert figures["hit_tokens"] > REQUESTS * BLOCK / 4
    assert figures["failed_loads"] == 0, "no fault of a tier reaches a load"
    for tier in ("cpu", "directory"):
        assert tiers[tier]["evicted_blocks"] > 0, tier
    assert tiers["directory"]["hit_blocks"] > 0
    assert tiers["directory"]["corrupt_blocks"] > 0
    assert tiers["directory"]["failed_blocks"] > 0


def test_loaded_bytes_are_those_that_are_computed(make_engine: MakeEngine, expected: Expected, tmp_path: Path) -> None:
    requests = long_prompts(12, 5)
    flex = make_engine(config(tmp_path))
    flex.run(WATCH)
    rounds = []
    for connector_too in (False, False, True):
        flex.settle()
        assert flex.tell("reset", connector=connector_too)["ok"]
        done = flex.generate(requests, batch=1, reset_every=0)
        assert done["tokens"] == expected(requests, batch=1)
        rounds.append((flex.run("answer = digests()"), sum(done["cached"])))
    computed, loaded, again = (digests for digests, _ in rounds)
    assert [cached for _, cached in rounds] == [0, 12 * 6 * BLOCK, 0]
    assert all(len(blocks) == 6 and len(set(blocks)) == 6 for blocks in computed)
    assert loaded == computed
    assert again == computed


def test_what_was_damaged_is_computed_and_what_is_zeroed_is_seen(
    make_engine: MakeEngine, expected: Expected, tmp_path: Path
) -> None:
    requests = long_prompts(60, 6)  # 360 blocks: host memory holds a third
    flex = make_engine(config(tmp_path, stack(tmp_path, disk="64MiB")))
    assert flex.tokens(requests) == expected(requests)
    flex.settle()
    files = [path for path in (tmp_path / "blocks").rglob("*") if path.is_file() and path.stat().st_size > BLOCK << 9]
    assert len(files) > 200
    for path in files:
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    assert flex.tokens(requests) == expected(requests)
    assert flex.stats()["tiers"]["directory"]["corrupt_blocks"] > 0
    # The control: were loads to bring wrong bytes, the tokens would show it.
    before = flex.figures()["loads"]
    flex.zero_loads(0)
    flex.settle()
    assert flex.tokens(requests[-20:]) != expected(requests)[-20:]
    assert flex.figures()["loads"] > before
