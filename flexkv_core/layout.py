"""Geometry: what a model's blocks look like, and where their bytes lie on a device. No I/O.

Owns KV groups, coverage rules, model specs and fragments. Does not own keys (blocks.py) or copying (device/).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flexkv_core.errors import LayoutError

PAGE = 4096
"""Bytes; alignment of slots and length of a seal (equal to `flexkv_core.backend.PAGE`, checked by a test)."""
SEAL_BYTES = PAGE


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which blocks before a boundary a KV group needs to continue from there.

    Attributes:
        kind: "all": every block; "window": the last `blocks` blocks; "state": only the last block.
        blocks: for "window": ceil(window tokens / block_size), at least 1; otherwise 0.
    """

    kind: Literal["all", "window", "state"] = "all"
    blocks: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("all", "window", "state"):
            raise LayoutError(f"coverage kind {self.kind!r}: use 'all', 'window' or 'state'")
        if (self.kind == "window") != (self.blocks > 0):
            raise LayoutError(
                f"coverage {self.kind!r} with blocks={self.blocks}: 'window' needs blocks >= 1, others none"
            )

    @classmethod
    def window(cls, blocks: int) -> Coverage:
        return cls("window", blocks)


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share a coverage rule.

    Attributes:
        block_bytes: payload bytes of one block of this group: all its layers, all ranks.
        coverage: the group's rule.
        layout: names the order of bytes within a block; part of the namespace, so caches of different
            order never share. Free text, such as "layers,kv,tokens,heads,dim".
    """

    block_bytes: int
    coverage: Coverage = field(default_factory=Coverage)
    layout: str = "opaque"

    def __post_init__(self) -> None:
        if self.block_bytes <= 0:
            raise LayoutError(f"block_bytes {self.block_bytes}: must be a positive number of bytes")

    @property
    def slot_bytes(self) -> int:
        """Bytes that a block takes in every tier: the payload rounded up to a page, then the seal."""
        return -(-self.block_bytes // PAGE) * PAGE + SEAL_BYTES


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What `KVCacheManager.register` needs to know of a model.

    Attributes:
        model: the model's identity: a digest of its config and weight samples, or a name the user vouches for.
        block_size: tokens a block.
        groups: the KV groups, at most 255; a plain model has one.
        dtype: the KV dtype's name, with the identity of scales where there are any ("fp8_e4m3:3fa1...").
        engine: the engine and its version of the KV layout, if caches of two engines must not share.
        tensor_parallel, pipeline_parallel: the parallel layout.
        lora: the content identity of the adapter (a digest, not a name), or None.
        salt: the tenant's salt, or None.
    """

    model: str
    block_size: int
    groups: tuple[KVGroup, ...]
    dtype: str = "bfloat16"
    engine: str = ""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    lora: str | None = None
    salt: str | None = None

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise LayoutError(f"block_size {self.block_size}: must be at least 1 token")
        if not 1 <= len(self.groups) <= 255:
            raise LayoutError(f"{len(self.groups)} KV groups: a model has 1 to 255")
