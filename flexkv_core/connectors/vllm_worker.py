"""vLLM's worker half: one rank's KV tensors, given to a device agent, and the ends of transfers, told to vLLM.

Owns which axis of a tensor counts blocks, and that a request whose load failed, or whose blocks go, has no copy running
any more. Copies themselves run in the agent's threads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkv_core.connectors.vllm_ends import Ends
from flexkv_core.device.cpu import CpuDevice
from flexkv_core.errors import LayoutError
from flexkv_core.server import DeviceAgent

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger("flexkv.vllm")

NONE: set[str] = set()
"""Of requests; not to be changed."""


class WorkerHalf:
    """See the module's docstring. One that copies nothing still tells vLLM what has ended: no request waits for it."""

    def __init__(self, kv_cache_config: KVCacheConfig) -> None:
        self._config = kv_cache_config
        self._place: tuple[Path, str, int, int] | None = None
        self._agent: DeviceAgent | None = None
        self._ends = Ends()

    def serve(self, path: Path, engine: str, rank: int, ranks: int) -> None:
        """Copy, from `register` on.

        Args:
            path: of the server's socket. engine: the engine's name.
            rank, ranks: this worker's number, pipeline stage by pipeline stage, and how many there are.
        """
        self._place = (path, engine, rank, ranks)

    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """The tensors are there: begin to serve copies. Raises LayoutError for tensors that cannot be."""
        if self._place is None:
            return
        groups, axes = [], []
        for group in self._config.kv_cache_groups:
            tensors = [kv_caches[name] for name in group.layer_names if name in kv_caches]
            groups.append(tensors)
            axes.append(block_axis([tuple(tensor.shape) for tensor in tensors], self._config.num_blocks))
        device = CpuDevice(groups, axes)
        path, engine, rank, ranks = self._place
        self._agent = DeviceAgent(path, engine=engine, device=device, groups=len(groups), rank=rank, ranks=ranks)

    def bind(self, ends: Ends) -> None:
        """A step begins."""
        self._ends = ends

    def revoke(self, ends: Ends) -> None:
        """Before device blocks are overwritten: end the copies of those who have lost them."""
        for tag in ends.revoked:
            self._revoke(tag)

    def _revoke(self, tag: str) -> None:
        if self._agent is not None:
            self._agent.revoke(tag)

    def finished(self) -> tuple[set[str], set[str], set[str]]:
        """(saved, loaded, failed) requests; those that failed are among the loaded too, as vLLM wants it."""
        if not self._ends:
            return NONE, NONE, NONE
        ends, self._ends = self._ends, Ends()
        self.revoke(ends)
        for tag in ends.failed.values():
            self._revoke(tag)
        return ends.saved, ends.loaded | set(ends.failed), set(ends.failed)

    def close(self) -> None:
        if self._agent is not None:
            self._agent.close()


def block_axis(shapes: Sequence[tuple[int, ...]], blocks: int) -> int:
    """Which axis of a group's tensors counts device blocks: the one of that length, the first where there are several.

    Raises LayoutError where there is none.
    """
    if not shapes:
        return 0
    axes = [axis for axis in range(len(shapes[0])) if all(shape[axis] == blocks for shape in shapes)]
    if not axes:
        raise LayoutError(f"KV tensors of shapes {sorted(set(shapes))} have no axis of {blocks} blocks")
    # (2, blocks, ...) has K and V before the blocks; with two blocks in all the first axis may be either.
    return axes[-1] if len(axes) > 1 and axes[0] == 0 and axes[1] == 1 and blocks == 2 else axes[0]
