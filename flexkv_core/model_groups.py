"""KV groups of models from a Hugging Face ``config.json``: full attention, sliding windows, latent attention (MLA).

Says what a block of each group weighs, for sizing. Does not say how an engine lays bytes out: that is the engine's own
word when it registers. Plain dense models have one group and are also known by name (`models.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexkv_core.errors import LayoutError
from flexkv_core.layout import Coverage, KVGroup, ModelSpec
from flexkv_core.models import (
    DENSE_TYPES,
    STORAGE,
    KVGeometry,
    dtype_of,
    find_model,
    heads_of,
    name_of,
    positive_field,
    read_hf_config,
)

FULL, SLIDING = "full_attention", "sliding_attention"
_GEMMA3_TEXT = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window_pattern": 6}
"""Defaults of transformers' Gemma3TextConfig, which published files leave out."""
_GEMMA = frozenset({"gemma2", "gemma3_text"})
_MLA = frozenset({"deepseek_v2", "deepseek_v3", "kimi_k2"})
_LISTED = frozenset({"gpt_oss"})
"""Types whose files list every layer in `layer_types`."""
_QWEN_FULL_LAYERS = 28
"""Default of `max_window_layers` in transformers' Qwen configs."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that keep the same tokens.

    Attributes:
        what: in words.
        layers: how many.
        token_bytes: of one token in one layer, all ranks; MLA's latent, identical on all ranks, once.
        window: tokens that a layer looks back, None for all.
    """

    what: str
    layers: int
    token_bytes: int
    window: int | None = None

    def kv_group(self, block_size: int) -> KVGroup:
        """The group of blocks of `block_size` tokens."""
        coverage = Coverage() if self.window is None else Coverage.window(-(-self.window // block_size))
        return KVGroup(self.layers * self.token_bytes * block_size, coverage, self.what)


@dataclass(frozen=True, slots=True)
class ModelGroups:
    """A model: its name, the KV dtype, and its groups, full attention first."""

    name: str
    dtype: str
    groups: tuple[LayerGroup, ...]

    def model_spec(self, block_size: int) -> ModelSpec:
        """What `KVCacheManager.register` takes."""
        return ModelSpec(self.name, block_size, tuple(each.kv_group(block_size) for each in self.groups), self.dtype)


def describe_model(name_or_path: str) -> ModelGroups:
    """Find a model by name, or read a ``config.json`` or a folder that holds one.

    Raises LayoutError for what is neither, and for attention of another kind; it names file, field and value.
    """
    found = find_model(name_or_path)
    if isinstance(found, KVGeometry):
        token_bytes = 2 * found.kv_heads * found.head_dim * found.storage_dtype.itemsize
        return ModelGroups(found.name, found.dtype, (LayerGroup("full attention", found.layers, token_bytes),))
    return groups_from_config(found)


def groups_from_config(path: Path) -> ModelGroups:
    """Read the KV groups of a model. Raises LayoutError naming the file, the field and the value."""
    whole = read_hf_config(path)
    config = dict(whole)
    if isinstance(whole.get("text_config"), dict):  # a multimodal model: only its text part has a KV cache
        config = {**{key: whole[key] for key in ("dtype", "torch_dtype") if key in whole}, **whole["text_config"]}
    if config.get("model_type") == "gemma3_text":
        config = {**_GEMMA3_TEXT, **config}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in DENSE_TYPES | _GEMMA | _MLA | _LISTED:
        known = ", ".join(sorted(DENSE_TYPES | _GEMMA | _MLA | _LISTED))
        raise LayoutError(f"{path}: model_type {kind!r}: not known here; known ones are {known}")
    layers = positive_field(path, config, "num_hidden_layers")
    dtype = dtype_of(path, config)
    item = np.dtype(STORAGE[dtype]).itemsize
    if config.get("kv_lora_rank") is not None:
        latent = positive_field(path, config, "kv_lora_rank") + positive_field(path, config, "qk_rope_head_dim")
        groups = [LayerGroup("multi-head latent attention", layers, latent * item)]
    else:
        kv_heads, head_dim = heads_of(path, config)
        token_bytes = 2 * kv_heads * head_dim * item
        kinds = _layer_kinds(path, config, layers)
        groups = []
        if FULL in kinds:
            groups.append(LayerGroup("full attention", kinds.count(FULL), token_bytes))
        if SLIDING in kinds:
            window = positive_field(path, config, "sliding_window")
            groups.append(LayerGroup(f"sliding window {window}", kinds.count(SLIDING), token_bytes, window))
    return ModelGroups(name_of(path, whole), dtype, tuple(groups))


def _layer_kinds(path: Path, config: Mapping[str, Any], layers: int) -> list[str]:
    """Each layer's kind, as transformers derives it where the file does not list them."""
    listed = config.get("layer_types")
    kind = config["model_type"]
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != layers:
            raise LayoutError(f"{path}: layer_types must list all {layers} layers of num_hidden_layers")
        for one in listed:
            if one not in (FULL, SLIDING):
                raise LayoutError(f"{path}: layer_types {one!r}: only {FULL} and {SLIDING} are known here")
        return listed
    if kind in _LISTED:
        raise LayoutError(f"{path}: layer_types is missing: a {kind} model lists its layers")
    used = config.get("use_sliding_window", not kind.startswith("qwen"))
    if config.get("sliding_window") is None or not used:
        return [FULL] * layers
    if kind == "gemma2":
        return [FULL if layer % 2 else SLIDING for layer in range(layers)]
    if kind == "gemma3_text":
        pattern = positive_field(path, config, "sliding_window_pattern")
        return [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)]
    if kind.startswith("qwen"):
        first = config.get("max_window_layers", _QWEN_FULL_LAYERS)
        if type(first) is not int or first < 0:
            raise LayoutError(f"{path}: max_window_layers {first!r}: must be a number of layers")
        return [SLIDING if layer >= first else FULL for layer in range(layers)]
    return [SLIDING] * layers
