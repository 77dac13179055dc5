"""What a vLLM engine caches, in FlexKV's words: groups and bytes of blocks, ranks, namespaces of its requests.

Owns the translation of vLLM's configs, adapters, salts and multimodal inputs. Does not own what is moved when.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkv_core.blocks import multimodal_extra
from flexkv_core.errors import LayoutError
from flexkv_core.identity import content_identity
from flexkv_core.layout import Coverage, KVGroup, ModelSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


def world_of(vllm_config: VllmConfig) -> int:
    """How many workers hold a part of every block."""
    parallel = vllm_config.parallel_config
    return int(parallel.tensor_parallel_size * parallel.pipeline_parallel_size)


def model_spec(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> ModelSpec:
    """The engine's model, without adapter and salt.

    Raises LayoutError for layouts that are not served; the text says which.
    """
    import vllm  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415

    parallel = vllm_config.parallel_config
    if (
        getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1
    ):
        raise LayoutError("context parallelism is not served: blocks are divided by tokens there")
    block_size = int(vllm_config.cache_config.block_size)
    groups = tuple(
        _group(vllm_config, kv_cache_config, number, block_size)
        for number in range(len(kv_cache_config.kv_cache_groups))
    )
    model = vllm_config.model_config
    dtype = str(vllm_config.cache_config.cache_dtype)
    return ModelSpec(
        model=model_identity(str(model.model), getattr(model, "revision", None)),
        block_size=block_size,
        groups=groups,
        dtype=str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype,
        engine=f"vllm {vllm.__version__} {current_platform.device_type}",
        tensor_parallel=int(parallel.tensor_parallel_size),
        pipeline_parallel=int(parallel.pipeline_parallel_size),
    )


def model_identity(model: str, revision: str | None) -> str:
    """A digest of a local model's content, else the name and revision that the user gave."""
    folder = Path(model)
    if folder.is_dir():
        return content_identity(folder)
    return f"{model}@{revision}" if revision else model


def _group(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, number: int, block_size: int) -> KVGroup:
    from vllm.v1 import kv_cache_interface as kv  # noqa: PLC0415

    group = kv_cache_config.kv_cache_groups[number]
    spec = group.kv_cache_spec
    if spec.block_size != block_size:
        raise LayoutError(f"KV group {number} has blocks of {spec.block_size} tokens, others of {block_size}")
    if isinstance(spec, kv.SlidingWindowSpec):
        coverage = Coverage.window(max(1, -(-(spec.sliding_window - 1) // block_size)))
    elif isinstance(spec, kv.MambaSpec):
        coverage = Coverage("state")
    elif isinstance(spec, kv.FullAttentionSpec):
        coverage = Coverage()
    else:
        raise LayoutError(f"KV group {number}: {type(spec).__name__} is not served")
    tensor, pipeline = (
        int(vllm_config.parallel_config.tensor_parallel_size),
        int(vllm_config.parallel_config.pipeline_parallel_size),
    )
    if pipeline > 1 and len(kv_cache_config.kv_cache_groups) > 1:
        raise LayoutError("pipeline parallelism of models with several KV groups is not served")
    stages = [len(group.layer_names)]
    if pipeline > 1:
        from vllm.distributed.utils import get_pp_indices  # noqa: PLC0415

        layers = int(vllm_config.model_config.hf_text_config.num_hidden_layers)
        stages = [end - start for start, end in (get_pp_indices(layers, rank, pipeline) for rank in range(pipeline))]
    # Tensors show a page without what pads it to another group's, as of a state beside full attention.
    padded = getattr(spec, "page_size_padded", None) is not None
    page = int((dataclasses.replace(spec, page_size_padded=None) if padded else spec).page_size_bytes)
    layout = f"{kv_cache_config.kv_cache_layout}: {spec!r}"
    replicated = isinstance(spec, kv.MLAAttentionSpec)
    if replicated and pipeline == 1:
        return KVGroup(page * stages[0], coverage, layout, replicated=True)
    sizes = [page * layers for layers in stages for _ in range(tensor)]
    equal = len(set(sizes)) == 1
    return KVGroup(sum(sizes), coverage, layout, shard_bytes=() if equal else tuple(sizes))


class Namespaces:
    """Specs of requests: by adapter and salt.

    Args:
        spec: of the engine's model alone.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._adapters: dict[tuple[int, str], str] = {}

    def spec_of(self, request: Request) -> ModelSpec:
        """The request's, without its tokens. Raises OSError if its adapter cannot be read."""
        lora = request.lora_request
        if lora is None and request.cache_salt is None:
            return self._spec
        return dataclasses.replace(
            self._spec, lora=None if lora is None else self._adapter(lora), salt=request.cache_salt
        )

    def _adapter(self, lora: Any) -> str:
        known = (int(lora.lora_int_id), str(lora.lora_path))
        if known not in self._adapters:
            folder = Path(lora.lora_path)
            self._adapters[known] = content_identity(folder) if folder.is_dir() else f"name:{lora.lora_name}"
        return self._adapters[known]


def cacheable(request: Request) -> bool:
    """Whether tokens (and multimodal inputs) say all that the request's KV depends on."""
    return request.prompt_embeds is None and request.prompt_token_ids is not None


def extras_of(request: Request, first: int, count: int, block_size: int) -> list[bytes | None] | None:
    """Identities of the multimodal inputs that `count` blocks from number `first` on stand for; None: of none."""
    if not request.mm_features:
        return None
    extras: list[bytes | None] = [None] * count
    for feature in request.mm_features:
        identity = str(feature.identifier).encode()
        start, length = int(feature.mm_position.offset), int(feature.mm_position.length)
        for block in range(max(first, start // block_size), min(first + count, -(-(start + length) // block_size))):
            # Where in the input the block begins: two blocks of one image are different blocks.
            within = identity + b"@" + str(block * block_size - start).encode()
            extras[block - first] = (extras[block - first] or b"") + multimodal_extra(within)
    return extras
