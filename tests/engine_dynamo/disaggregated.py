"""examples/dynamo/disaggregated.sh, NIXL between host memories. Run by `make test-dynamo`, as kv_routing.py."""

from __future__ import annotations

from pathlib import Path

from dynamo_rig import BLOCK, deployed, prompt, total

OTHERS = 12
"""Prompts that fill the prefill worker's own cache, of 128 blocks, three times over."""


def test_the_prefill_worker_loads_from_flexkv_what_nixl_gives_the_decode_worker(tmp_path: Path) -> None:
    with deployed("disaggregated.sh", tmp_path, NIXL_OPTIONS='"kv_buffer_device":"cpu"') as deployment:
        text = prompt()
        first = deployment.ask(text)
        whole = (first.prompt - 1) // BLOCK * BLOCK
        assert first.cached == 0
        for _ in range(OTHERS):
            deployment.ask(prompt())
        before = deployment.external_by_worker()
        assert deployment.loads() == 0
        again = deployment.ask(text)
        decode, prefill = (b - a for a, b in zip(before, deployment.external_by_worker(), strict=True))
        assert (again.text, again.cached) == (first.text, whole)
        assert deployment.loads() == 1
        assert prefill == whole
        assert decode >= whole  # with the last tokens, which are no whole block
        assert total(deployment.get("/metrics", deployment.system_port), "vllm:nixl_num_failed_transfers_total") == 0
