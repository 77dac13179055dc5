"""Geometry of well-known models: what one block of a dense full-attention model weighs and looks like.

Owns the table of names, the reading of a Hugging Face ``config.json`` and the synthetic geometry of a given
size. Does not own KV groups of other models (sliding window, MLA): these are refused here, `model_groups.py` has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import LayoutError
from flexkv_core.layout import KVGroup, ModelSpec

STORAGE: Mapping[str, npt.DTypeLike] = {
    "bfloat16": np.uint16,
    "float16": np.uint16,
    "float32": np.uint32,
    "fp8_e4m3": np.uint8,
}
"""KV dtype to the NumPy dtype of the same width that carries its bits (NumPy has no bfloat16)."""

DENSE_TYPES = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}
    | {"granite", "olmo", "olmo2", "starcoder2", "phi", "phi3", "gemma"}
)
"""`model_type` values whose layers all keep K and V of all tokens, unless another field says otherwise."""


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """K and V of a dense model, a tensor a layer.

    Attributes:
        name: the model's name, used as its identity.
        layers, kv_heads, head_dim: of the whole model (all ranks).
        dtype: name of the KV dtype: bfloat16, float16, float32 or fp8_e4m3.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for field in ("layers", "kv_heads", "head_dim"):
            value = getattr(self, field)
            if value < 1:
                raise LayoutError(f"model {self.name!r}: {field} {value}: must be at least 1")
        if self.dtype not in STORAGE:
            raise LayoutError(f"model {self.name!r}: dtype {self.dtype!r}: use one of {', '.join(STORAGE)}")

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """The NumPy dtype that carries the bits of `dtype`."""
        return np.dtype(STORAGE[self.dtype])

    def block_bytes(self, block_size: int) -> int:
        """Payload bytes of a block of `block_size` tokens: layers * 2 * tokens * heads * dim * itemsize."""
        return self.layers * 2 * block_size * self.kv_heads * self.head_dim * self.storage_dtype.itemsize

    def tensor_shape(self, pages: int, block_size: int) -> tuple[int, int, int, int, int]:
        """Shape of one layer's tensor, (2, pages, tokens, heads, dim): the block axis is 1."""
        return (2, pages, block_size, self.kv_heads, self.head_dim)

    def model_spec(self, block_size: int) -> ModelSpec:
        """What `KVCacheManager.register` takes: one group that covers all tokens."""
        group = KVGroup(self.block_bytes(block_size), layout="layers,kv,tokens,heads,dim")
        return ModelSpec(model=self.name, block_size=block_size, groups=(group,), dtype=self.dtype)


_KNOWN = {
    model.name: model
    for model in (
        KVGeometry("llama-3.1-8b", 32, 8, 128),
        KVGeometry("llama-3.1-70b", 80, 8, 128),
        KVGeometry("llama-3.1-405b", 126, 8, 128),
        KVGeometry("llama-3.2-1b", 16, 8, 64),
        KVGeometry("llama-3.2-3b", 28, 8, 128),
        KVGeometry("mistral-7b", 32, 8, 128),  # v0.2 and later: no sliding window
        KVGeometry("qwen2.5-7b", 28, 4, 128),
        KVGeometry("qwen2.5-72b", 80, 8, 128),
        KVGeometry("qwen3-0.6b", 28, 8, 128),
        KVGeometry("qwen3-8b", 36, 8, 128),
        KVGeometry("qwen3-14b", 40, 8, 128),
        KVGeometry("qwen3-32b", 64, 8, 128),
        KVGeometry("qwen3-30b-a3b", 48, 4, 128),
    )
}


def known_models() -> list[str]:
    """Names that `resolve_model` knows without a file."""
    return sorted(_KNOWN)


def resolve_model(name_or_path: str) -> KVGeometry:
    """Find a model by name (any case), or read a ``config.json`` or a folder that holds one.

    Raises LayoutError for what is neither, and for models that are not dense full attention.
    """
    found = find_model(name_or_path)
    return found if isinstance(found, KVGeometry) else geometry_from_config(found)


def find_model(name_or_path: str) -> KVGeometry | Path:
    """The geometry of a known name (any case), or the path of a ``config.json``. Raises LayoutError for neither."""
    known = _KNOWN.get(name_or_path.lower())
    if known is not None:
        return known
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise LayoutError(
            f"model {name_or_path!r}: neither a file nor a known name; use a config.json or one of "
            f"{', '.join(known_models())}"
        )
    return path


def geometry_from_config(path: Path) -> KVGeometry:
    """Read the KV geometry of a dense full-attention model from a Hugging Face ``config.json``.

    Raises LayoutError naming the file, the field and the value.
    """
    config = read_hf_config(path)
    _refuse_other_attention(path, config)
    kv_heads, head_dim = heads_of(path, config)
    layers = positive_field(path, config, "num_hidden_layers")
    return KVGeometry(name_of(path, config), layers, kv_heads, head_dim, dtype_of(path, config))


def read_hf_config(path: Path) -> dict[str, Any]:
    """A ``config.json`` as plain data. Raises LayoutError naming the file."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LayoutError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise LayoutError(f"{path}: holds a JSON {type(config).__name__}: a model's config is an object")
    return config


def heads_of(path: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """KV heads of the whole model, and elements of a head. Raises LayoutError naming the field."""
    heads = positive_field(path, config, "num_attention_heads")
    if config.get("head_dim") is not None:
        head_dim = positive_field(path, config, "head_dim")
    else:
        hidden = positive_field(path, config, "hidden_size")
        if hidden % heads:
            raise LayoutError(
                f"{path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}: name head_dim"
            )
        head_dim = hidden // heads
    if config.get("num_key_value_heads") is None:
        return heads, head_dim
    return positive_field(path, config, "num_key_value_heads"), head_dim


def dtype_of(path: Path, config: Mapping[str, Any]) -> str:
    """The dtype of weights, which engines take for the KV too unless told otherwise."""
    dtype_field = "dtype" if "dtype" in config else "torch_dtype"
    dtype = config.get(dtype_field)
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise LayoutError(f"{path}: {dtype_field} {dtype!r}: must be one of {', '.join(STORAGE)}")
    return dtype


def name_of(path: Path, config: Mapping[str, Any]) -> str:
    """What the model is called: its own word, else its folder."""
    return str(config.get("_name_or_path") or path.resolve().parent.name)


def synthetic_geometry(block_bytes: int, block_size: int) -> KVGeometry:
    """Two layers of bfloat16 K and V whose blocks of `block_size` tokens have exactly `block_bytes` bytes.

    Raises LayoutError, naming the nearest usable size, if the bytes cannot be split so.
    """
    unit = 2 * 2 * 2 * block_size
    elements, rest = divmod(block_bytes, unit)
    if rest or not elements:
        nearest = max(1, round(block_bytes / unit)) * unit
        raise LayoutError(
            f"block bytes {block_bytes}: cannot be split into 2 layers of K and V of {block_size} tokens in "
            f"2-byte elements; use a multiple of {unit}, such as {nearest}"
        )
    head_dim = next(dim for dim in (128, 64, 32, 16, 8, 4, 2, 1) if elements % dim == 0)
    return KVGeometry(f"synthetic-{block_bytes}", 2, elements // head_dim, head_dim)


def _refuse_other_attention(path: Path, config: Mapping[str, Any]) -> None:
    """Raise LayoutError where a layer keeps anything else than K and V of all tokens."""

    def refuse(field: str, what: str) -> None:
        raise LayoutError(
            f"{path}: {field} {config.get(field)!r}: {what} not supported by replay, which takes dense "
            "full-attention models; use --block-bytes with the size of a block instead"
        )

    if config.get("kv_lora_rank") is not None:
        refuse("kv_lora_rank", "multi-head latent attention is")
    if config.get("sliding_window") is not None and config.get("use_sliding_window", True):
        refuse("sliding_window", "sliding windows are")
    layer_types = config.get("layer_types")
    if layer_types is not None and set(layer_types) != {"full_attention"}:
        refuse("layer_types", "layers other than full_attention are")
    if config.get("model_type") not in DENSE_TYPES:
        refuse("model_type", "this type of model is")


def positive_field(path: Path, config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if type(value) is not int or value < 1:
        raise LayoutError(f"{path}: {field} {value!r}: must be a positive integer")
    return value
