"""What connectors are made of, without an engine: identities of content, the axis of blocks, revoked copies."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from server_rig import SPEC, agent, serving

from flexkv_core.blocks import block_keys
from flexkv_core.connectors.vllm_worker import block_axis
from flexkv_core.errors import LayoutError
from flexkv_core.identity import SAMPLE_BYTES, content_identity
from flexkv_core.server import connect

pytestmark = pytest.mark.usefixtures("leak_check")


def model(folder: Path, weights: bytes, config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_models_identity_is_its_content(tmp_path: Path) -> None:
    weights = bytes(range(256)) * 2048
    one = content_identity(model(tmp_path / "one", weights))
    assert content_identity(model(tmp_path / "elsewhere", weights)) == one
    (tmp_path / "one" / "README.md").write_text("no part of it")
    assert content_identity(tmp_path / "one") == one
    changed = bytearray(weights)
    for at in (0, len(weights) // 2, len(weights) - 1):
        changed[at] ^= 1
        assert content_identity(model(tmp_path / f"changed{at}", bytes(changed))) != one
        changed[at] ^= 1
    assert content_identity(model(tmp_path / "config", weights, '{"a": 1}')) != one
    assert content_identity(model(tmp_path / "longer", weights + b"x")) != one
    assert len(weights) > 4 * SAMPLE_BYTES


def test_the_axis_of_blocks_is_found() -> None:
    assert block_axis([(100, 2, 32, 64)] * 4, 100) == 0
    assert block_axis([(2, 100, 32, 8, 64)] * 4, 100) == 1
    assert block_axis([(2, 2, 32, 8, 64)], 2) == 1
    assert block_axis([], 7) == 0
    with pytest.raises(LayoutError, match="no axis of 100 blocks"):
        block_axis([(2, 99, 32)], 100)


def test_what_was_revoked_is_copied_no_more(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s"),
        agent(tmp_path / "s") as (made, device, _),
        connect(tmp_path / "s", engine="e") as cache,
    ):
        namespace = cache.register(SPEC)
        keys = block_keys(np.arange(8, dtype=np.int32), SPEC.block_size, namespace.root)
        device.gate.clear()
        running = cache.store(namespace, keys, np.arange(2, dtype=np.int64), tag="running")
        ended = threading.Event()

        def revoke() -> None:
            made.revoke("running")
            ended.set()

        waiter = threading.Thread(target=revoke)
        while not made._tags:
            assert not running.wait(0.01)
        waiter.start()
        assert not ended.wait(0.1), "a copy that runs is waited for"
        device.gate.set()
        waiter.join(10)
        assert ended.is_set()
        made.revoke("late")
        late = cache.store(
            namespace,
            block_keys(np.arange(8, 16, dtype=np.int32), 4, namespace.root),
            np.arange(2, dtype=np.int64),
            tag="late",
        )
        assert late.wait(10)
        assert late.error == "its device blocks are not its own any more"
