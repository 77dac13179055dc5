"""Geometry: what a model's blocks look like, and where their bytes lie on a device. No I/O.

Owns KV groups, coverage rules, model specs and fragments. Does not own keys (blocks.py) or copying (device/).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

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
        shard_bytes: what each rank owns of a block, in the order of the ranks, which is that of the payload's
            bytes; empty: equal shares. They sum to `block_bytes`.
        replicated: every rank has the same whole block (MLA): the first one writes it, all load it.
    """

    block_bytes: int
    coverage: Coverage = field(default_factory=Coverage)
    layout: str = "opaque"
    shard_bytes: tuple[int, ...] = ()
    replicated: bool = False

    def __post_init__(self) -> None:
        if self.block_bytes <= 0:
            raise LayoutError(f"block_bytes {self.block_bytes}: must be a positive number of bytes")
        if self.shard_bytes and self.replicated:
            raise LayoutError("replicated blocks have no shards: leave shard_bytes out")
        if self.shard_bytes and (min(self.shard_bytes) < 0 or sum(self.shard_bytes) != self.block_bytes):
            raise LayoutError(f"shard_bytes {self.shard_bytes}: must sum to block_bytes {self.block_bytes}")

    def shards(self, ranks: int) -> list[tuple[int, int]]:
        """For each of `ranks` ranks the part of a block's payload that it owns: (first byte, bytes); no bytes for a
        rank that has no layer of this group.

        Raises LayoutError if the block cannot be divided so.
        """
        if self.replicated:
            return [(0, self.block_bytes)] * ranks
        sizes = self.shard_bytes or (self.block_bytes // ranks,) * ranks
        if len(sizes) != ranks or sum(sizes) != self.block_bytes:
            raise LayoutError(
                f"block_bytes {self.block_bytes} with shard_bytes {self.shard_bytes} cannot be divided among {ranks} "
                "ranks: give shard_bytes for each, or a multiple of the ranks"
            )
        starts = [sum(sizes[:rank]) for rank in range(ranks)]
        return list(zip(starts, sizes, strict=True))

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


# --- fragments: where a block's bytes lie in device memory --------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Fragments:
    """The runs of bytes that make up a block of one KV group on one device; arrays of length f, read-only.

    Fragment i of device block b is `length[i]` bytes from address `base[i] + b * page_stride[i]`; in the
    block's payload they start at byte `host_offset[i]`. In payload order, without gaps.

    Attributes:
        base: (f,) uint64, addresses in device block 0.
        page_stride: (f,) int64, bytes from one device block to the next; may be negative; 0 if there is only
            one.
        length: (f,) int64, bytes, positive.
        host_offset: (f,) int64, bytes: the running sum of `length`.
        block_bytes: the sum of `length`: this device's bytes of a block.
        pages: how many device blocks there are.
    """

    base: npt.NDArray[np.uint64]
    page_stride: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    host_offset: npt.NDArray[np.int64]
    block_bytes: int
    pages: int

    def __len__(self) -> int:
        return len(self.base)


def fragments_of(tensors: Sequence[Any], block_axis: int | Sequence[int] = 0) -> Fragments:
    """Find the maximal contiguous runs of a block in a set of tensors.

    **Order of the payload's bytes**: tensor after tensor as given; within a tensor ascending device address,
    that is, all axes but the block axis in order of descending stride, whatever order the shape lists them in
    (two views of the same memory that differ by a transposition give the same payload). A tensor for all
    layers whose layer axis has the largest stride and a list of one tensor a layer hence give the same
    payload too. `KVGroup.layout` must name this order, since caches of different orders must not share.

    Runs that continue each other, also from one tensor to the next, in every device block become one
    fragment.

    Args:
        tensors: NumPy arrays, torch tensors (of any device: only addresses are taken), or anything that has
            `__array_interface__`. K and V may be separate or fused, layers in one tensor or one each, any
            axis order and any strides.
        block_axis: the axis that counts device blocks, negative from the end; one for all, or one a tensor.

    Raises:
        LayoutError: naming the tensor's number: no tensors, no blocks or bytes, different numbers of blocks,
            read-only memory, an axis that does not exist, strides by which elements overlap or interleave.
    """
    if len(tensors) == 0:
        raise LayoutError("tensors: there are none; a KV group needs at least one")
    axes = [block_axis] * len(tensors) if isinstance(block_axis, int) else list(block_axis)
    if len(axes) != len(tensors):
        raise LayoutError(f"block_axis: {len(axes)} axes for {len(tensors)} tensors; give one, or one a tensor")
    bases, strides, lengths, pages = [], [], [], 0
    for number, (tensor, axis) in enumerate(zip(tensors, axes, strict=True)):
        count, stride, runs, length = _runs_of(number, tensor, axis)
        if number and count != pages:
            raise LayoutError(f"tensor {number}: {count} blocks along axis {axis}, but tensor 0 has {pages}")
        pages = count
        bases.append(runs)
        strides.append(np.full(len(runs), stride, np.int64))
        lengths.append(np.full(len(runs), length, np.int64))
    base, stride_of, length_of = np.concatenate(bases), np.concatenate(strides), np.concatenate(lengths)
    continues = (base[:-1] + length_of[:-1].astype(np.uint64) == base[1:]) & (stride_of[:-1] == stride_of[1:])
    first = np.flatnonzero(np.concatenate(([True], ~continues)))
    length_of = np.add.reduceat(length_of, first)
    arrays = (base[first], stride_of[first], length_of, np.cumsum(length_of) - length_of)
    for array in arrays:
        array.flags.writeable = False
    return Fragments(*arrays, block_bytes=int(length_of.sum()), pages=pages)


def _runs_of(number: int, tensor: Any, block_axis: int) -> tuple[int, int, npt.NDArray[np.uint64], int]:
    """Return of one tensor: blocks, bytes between them, addresses of the runs in block 0, bytes of a run."""
    address, shape, strides, item = _geometry(number, tensor)
    if not -len(shape) <= block_axis < len(shape):
        raise LayoutError(f"tensor {number}: has no axis {block_axis}, its shape is {shape}")
    block_axis %= len(shape)
    if 0 in shape or item == 0:
        raise LayoutError(f"tensor {number}: shape {shape} has no blocks or no bytes")
    axes = sorted((abs(s), n, i) for i, (n, s) in enumerate(zip(shape, strides, strict=True)) if n > 1)
    extent = item
    for stride, count, axis in axes:
        if stride < extent:
            raise LayoutError(
                f"tensor {number}: axis {axis} has a stride of {stride} bytes, less than the {extent} bytes "
                "within it: elements overlap or interleave; give the tensor itself, not an expanded view"
            )
        extent += (count - 1) * stride
    pages, page_stride = shape[block_axis], strides[block_axis] if shape[block_axis] > 1 else 0
    # Descending axes start at their last element, the lowest address; blocks keep their numbers.
    address += sum(
        (n - 1) * s for i, (n, s) in enumerate(zip(shape, strides, strict=True)) if s < 0 and i != block_axis
    )
    run = item
    offsets = np.zeros(1, np.int64)
    for stride, count, axis in axes:
        if axis == block_axis:
            continue
        if len(offsets) == 1 and stride == run:
            run *= count
        else:
            offsets = (np.arange(count, dtype=np.int64)[:, None] * stride + offsets).reshape(-1)
    return pages, page_stride, np.uint64(address) + offsets.astype(np.uint64), run


def _geometry(number: int, tensor: Any) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    """Return address, shape, strides in bytes and bytes an element."""
    if all(hasattr(tensor, name) for name in ("data_ptr", "stride", "element_size")):  # torch
        try:
            item = int(tensor.element_size())
            strides = tuple(int(s) * item for s in tensor.stride())
            return int(tensor.data_ptr()), tuple(tensor.shape), strides, item
        except RuntimeError as error:  # sparse, quantized and the like
            raise LayoutError(f"tensor {number}: is not plain strided memory: {error}") from error
    interface = getattr(tensor, "__array_interface__", None)
    if interface is None or interface.get("data") is None:
        raise LayoutError(f"tensor {number}: a {type(tensor).__name__} has neither data_ptr nor __array_interface__")
    address, read_only = interface["data"]
    if read_only:
        raise LayoutError(f"tensor {number}: is read-only; blocks are also loaded into it")
    dtype = np.dtype(interface["typestr"])
    if dtype.hasobject:
        raise LayoutError(f"tensor {number}: dtype {dtype} holds references to objects, not bytes")
    shape, item = tuple(interface["shape"]), dtype.itemsize
    strides = interface.get("strides")
    if strides is None:
        strides = tuple(item * math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return int(address), shape, tuple(strides), item
