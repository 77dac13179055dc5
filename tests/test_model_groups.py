"""KV groups from config.json files, against block bytes computed by hand, and what tiers hold of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_core.cli.holdings import holdings
from flexkv_core.config import load_stack
from flexkv_core.errors import LayoutError
from flexkv_core.layout import PAGE, Coverage, KVGroup, ModelSpec
from flexkv_core.model_groups import describe_model
from flexkv_core.pool import SlotPool

MODELS = Path(__file__).parent / "data" / "models"
MIB = 1 << 20


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        # 32 layers x (K and V) x 16 tokens x 8 heads x 128 x 2 bytes
        ("llama-3.1-8b", [(2_097_152, Coverage())]),
        # 28 layers x 2 x 16 x 4 heads x 128 (3584 / 28) x 2; its window is not used
        ("qwen2.5-7b", [(917_504, Coverage())]),
        # as llama, but every layer looks 4096 tokens back: 256 blocks
        ("mistral-7b-v0.1", [(2_097_152, Coverage.window(256))]),
        ("mistral-7b-v0.3", [(2_097_152, Coverage())]),
        # 61 layers x 16 tokens x (512 + 64) x 2 bytes: no K and V, no heads
        ("deepseek-v3", [(1_124_352, Coverage())]),
        # 42 layers, every other one sliding: 21 x 2 x 16 x 8 x 256 x 2 each
        ("gemma-2-9b", [(2_752_512, Coverage()), (2_752_512, Coverage.window(256))]),
        # 62 layers, every 6th full (10): x 2 x 16 x 16 heads x 128 x 2
        ("gemma-3-27b", [(1_310_720, Coverage()), (6_815_744, Coverage.window(64))]),
        # heads left out of the file: 34 layers (5 full), 4 KV heads x 256
        ("gemma-3-4b", [(327_680, Coverage()), (1_900_544, Coverage.window(64))]),
        # 24 layers by layer_types, half each: 12 x 2 x 16 x 8 x 64 x 2; 128 tokens are 8 blocks
        ("gpt-oss-20b", [(393_216, Coverage()), (393_216, Coverage.window(8))]),
    ],
)
def test_block_bytes_are_those_computed_by_hand(name: str, groups: list[tuple[int, Coverage]]) -> None:
    spec = describe_model(str(MODELS / name)).model_spec(16)
    assert spec.model == name
    assert [(group.block_bytes, group.coverage) for group in spec.groups] == groups
    assert describe_model(str(MODELS / name / "config.json")).model_spec(16).groups == spec.groups


def test_names_and_files_agree() -> None:
    assert describe_model("llama-3.1-8b").groups == describe_model(str(MODELS / "llama-3.1-8b")).groups
    assert describe_model("Qwen2.5-7B").groups == describe_model(str(MODELS / "qwen2.5-7b")).groups


def test_a_window_is_rounded_up_to_blocks() -> None:
    spec = describe_model(str(MODELS / "gpt-oss-20b")).model_spec(100)
    assert spec.groups[1].coverage == Coverage.window(2)


def changed(tmp_path: Path, name: str, **changes: Any) -> str:
    config = json.loads((MODELS / name / "config.json").read_text())
    config.update(changes)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return str(file)


def test_qwen_with_its_window_on(tmp_path: Path) -> None:
    file = changed(tmp_path, "qwen2.5-7b", use_sliding_window=True, max_window_layers=20, sliding_window=4096)
    groups = describe_model(file).groups
    assert [(each.layers, each.window) for each in groups] == [(20, None), (8, 4096)]
    assert len(describe_model(changed(tmp_path, "qwen2.5-7b", use_sliding_window="absent")).groups) == 1


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("llama-3.1-8b", {"model_type": "jamba"}, "model_type 'jamba': not known here"),
        ("llama-3.1-8b", {"model_type": ["llama"]}, "model_type ['llama']: not known here"),
        ("llama-3.1-8b", {"torch_dtype": "int4"}, "torch_dtype 'int4': must be one of"),
        ("llama-3.1-8b", {"num_key_value_heads": 0}, "num_key_value_heads 0: must be a positive integer"),
        ("deepseek-v3", {"qk_rope_head_dim": None}, "qk_rope_head_dim None: must be a positive integer"),
        ("gpt-oss-20b", {"layer_types": ["full_attention"]}, "layer_types must list all 24 layers"),
        ("gpt-oss-20b", {"layer_types": ["mamba"] * 24}, "layer_types 'mamba': only full_attention and"),
        ("gpt-oss-20b", {"layer_types": "absent"}, "layer_types is missing"),
        ("gpt-oss-20b", {"sliding_window": None}, "sliding_window None: must be a positive integer"),
        ("gemma-2-9b", {"sliding_window": -1}, "sliding_window -1: must be a positive integer"),
        ("qwen2.5-7b", {"use_sliding_window": True, "max_window_layers": "x"}, "max_window_layers 'x'"),
    ],
)
def test_what_is_not_known_is_refused_with_file_field_and_value(
    name: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    file = changed(tmp_path, name, **changes)
    with pytest.raises(LayoutError) as caught:
        describe_model(file)
    assert file in str(caught.value)
    assert told in str(caught.value)


# ---------------------------------------------------------------------------- what tiers hold


def held(spec: ModelSpec, *tiers: dict[str, Any]) -> list[Any]:
    return holdings(load_stack({"tiers": list(tiers)}), spec)


def test_blocks_and_tokens_by_hand() -> None:
    """A slot of 2 MiB and a seal's page: 15 in an extent of 32 MiB; a run of one extent wastes 1/16."""
    spec = describe_model("llama-3.1-8b").model_spec(16)
    cpu, directory = held(
        spec,
        {"backend": "cpu", "capacity": "1GiB"},
        {"backend": "directory", "root": "x", "capacity": "1GiB"},
    )
    assert (cpu.blocks, cpu.tokens, cpu.group_blocks) == (504, 504 * 16, (504,))
    assert directory.blocks == (1 << 30) // (2_097_152 + 4096)
    (first, second) = held(spec, {"backend": "cpu", "capacity": "70 blocks"}, {"backend": "directory", "root": "x"})
    assert (first.blocks, first.tokens, first.capacity_bytes) == (70, 70 * 16, None)
    assert (second.blocks, second.tokens) == (None, None)


def test_a_capacity_that_holds_no_block_names_the_tier() -> None:
    spec = describe_model("llama-3.1-8b").model_spec(16)
    with pytest.raises(LayoutError, match=r"tier near: capacity 1048576 bytes cannot hold one slot"):
        held(spec, {"backend": "cpu", "capacity": "1MiB", "name": "near"})
    far = {"backend": "directory", "root": "x", "capacity": "1MiB", "name": "far"}
    with pytest.raises(LayoutError, match=r"tier far: capacity 1048576 bytes cannot hold a block"):
        held(spec, {"backend": "cpu", "capacity": "1GiB"}, far)
    two = ModelSpec("m", 16, (KVGroup(4096), KVGroup(8192)))
    with pytest.raises(LayoutError, match=r"tier cpu: .* each of the 2 KV groups"):
        held(two, {"backend": "cpu", "capacity": "32MiB"})  # one extent: one class


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 400),
    st.integers(4, 24),
)
def test_groups_that_share_a_capacity_fit_as_promised(pages: list[int], capacity: int, extent: int) -> None:
    """The promised number can be allocated, class after class in some order; some runs more of each never."""
    pool = SlotPool(capacity * PAGE, extent * PAGE)
    if max(pages) > capacity:
        return
    classes = [pool.slot_class(each * PAGE) for each in pages]
    promised = pool.capacity_together(classes)
    orders = list(itertools.permutations(classes))
    assert any(allocate_each(pool, order, promised) for order in orders)
    largest_run = max(run_slots(each, extent) for each in pages)
    assert not any(allocate_each(pool, order, promised + 2 * len(pages) * largest_run + 1) for order in orders)


def run_slots(pages: int, extent: int) -> int:
    """Slots of the longest run that a class may take."""
    return (-(-pages // extent) + 15) * extent // pages


def allocate_each(pool: SlotPool, classes: Sequence[int], count: int) -> bool:
    pool.clear()
    return all(pool.allocate(each, count) is not None for each in classes)


def test_one_class_alone_is_its_capacity() -> None:
    pool = SlotPool(10 * MIB)
    number = pool.slot_class(3 * PAGE)
    assert pool.capacity_together([number]) == pool.capacity(number)
    assert pool.capacity_together([number, number]) == pool.capacity(number) // 2
    assert np.asarray(pool.allocate(number, 2 * pool.capacity_together([number, number]))).size
