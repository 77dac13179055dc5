"""The CPU as a device: KV tensors in ordinary memory, copied by native code without the GIL.

Owns the checks of what is copied. Does not own the copying (native/copy.cpp).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core import _native
from flexkv_core.errors import LayoutError
from flexkv_core.layout import Fragments, fragments_of
from flexkv_core.region import check_disjoint, check_spans, host_bytes, int64_vector


class CpuDevice:
    """A `Device` for NumPy arrays and torch CPU tensors. May be called from several threads at a time.

    `gather` and `scatter` return when the copy is complete.
    """

    def __init__(
        self,
        tensors_by_group: Sequence[Sequence[Any]],
        block_axis: int | Sequence[int] = 0,
        threads: int | None = None,
    ) -> None:
        """Take the tensors of each KV group; they are kept alive, and must not be resized.

        Args:
            tensors_by_group: for each KV group its tensors, in payload order (see `fragments_of`); none for a group of
                which this rank has no layer.
            block_axis: the axis that counts device blocks: one for all tensors, or one a KV group.
            threads: that share a copy by bytes; default: the processors that this process may use, at most 4.

        Raises:
            LayoutError: tensors that cannot be served, naming group and tensor.
        """
        self._threads = min(4, len(os.sched_getaffinity(0))) if threads is None else threads
        if self._threads < 1:
            raise LayoutError(f"threads {threads}: must be at least 1")
        if len(tensors_by_group) == 0:
            raise LayoutError("tensors_by_group: there are no KV groups")
        self._tensors = [list(tensors) for tensors in tensors_by_group]
        axes = [block_axis] * len(self._tensors) if isinstance(block_axis, int) else list(block_axis)
        if len(axes) != len(self._tensors):
            raise LayoutError(f"block_axis: {len(axes)} axes for {len(self._tensors)} KV groups")
        self._fragments: list[Fragments | None] = []
        for group, (tensors, axis) in enumerate(zip(self._tensors, axes, strict=True)):
            for number, tensor in enumerate(tensors):
                place = getattr(getattr(tensor, "device", "cpu"), "type", "cpu")
                if place != "cpu":
                    raise LayoutError(f"group {group}, tensor {number}: is on {place!r}, must be in the CPU's memory")
            try:
                self._fragments.append(fragments_of(tensors, axis) if tensors else None)
            except LayoutError as error:
                raise LayoutError(f"group {group}, {error}") from error

    def attach(self, host: Any) -> None:
        """Nothing to do: all of this process's memory will do."""

    def fragments(self, group: int) -> Fragments:
        """Return where the blocks of a KV group lie; LayoutError for a group that this device has nothing of."""
        if not 0 <= group < len(self._fragments):
            raise LayoutError(f"group {group}: this device has groups 0 to {len(self._fragments) - 1}")
        fragments = self._fragments[group]
        if fragments is None:
            raise LayoutError(f"group {group}: this device has no tensors of it")
        return fragments

    def gather(
        self, host: Any, offsets: npt.NDArray[np.int64], device_blocks: npt.NDArray[np.int64], group: int = 0
    ) -> None:
        """Copy device blocks to slots of `host` (see `Device`)."""
        array, offsets, blocks, fragments = self._checked(host, offsets, device_blocks, group)
        if not array.flags.writeable:
            raise LayoutError("host: is read-only, gather writes to it")
        check_disjoint(offsets, fragments.block_bytes)
        _native.gather(
            array,
            offsets,
            blocks,
            fragments.base,
            fragments.page_stride,
            fragments.length,
            fragments.host_offset,
            self._threads,
        )

    def scatter(
        self, host: Any, offsets: npt.NDArray[np.int64], device_blocks: npt.NDArray[np.int64], group: int = 0
    ) -> None:
        """Copy slots of `host` to device blocks (see `Device`)."""
        array, offsets, blocks, fragments = self._checked(host, offsets, device_blocks, group)
        order = np.argsort(blocks, kind="stable")
        twice = np.flatnonzero(blocks[order][1:] == blocks[order][:-1])
        if len(twice):
            i = int(order[twice[0] + 1])
            raise LayoutError(f"device_blocks[{i}] = {int(blocks[i])}: is named twice, so what it would hold is open")
        _native.scatter(
            array,
            offsets,
            blocks,
            fragments.base,
            fragments.page_stride,
            fragments.length,
            fragments.host_offset,
            self._threads,
        )

    def _checked(
        self, host: Any, offsets: Any, device_blocks: Any, group: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64], Fragments]:
        fragments = self.fragments(group)
        array = host_bytes(host)
        offsets = int64_vector("offsets", offsets)
        blocks = int64_vector("device_blocks", device_blocks)
        if len(offsets) != len(blocks):
            raise LayoutError(f"device_blocks: {len(blocks)} of them for {len(offsets)} offsets")
        wrong = (blocks < 0) | (blocks >= fragments.pages)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise LayoutError(
                f"device_blocks[{i}] = {int(blocks[i])}: this device has blocks 0 to {fragments.pages - 1}"
            )
        check_spans(array.size, offsets, fragments.block_bytes)
        return array, offsets, blocks, fragments
