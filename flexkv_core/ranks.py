"""The ranks of an engine: who copies each rank's part of a block between its device and host memory.

Owns which part of a block is whose and the check that devices fit a model. Does not own when something is copied
(`copying.py`) or how (`device/`; in another process: `server/`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from flexkv_core.device import Device
from flexkv_core.errors import LayoutError
from flexkv_core.layout import ModelSpec
from flexkv_core.region import HostRegion

Direction = Literal["gather", "scatter"]
"""gather: device to host memory; scatter: back."""


class CopyPart(NamedTuple):
    """Blocks of one KV group that a rank copies; arrays are parallel.

    Attributes:
        group: number of the KV group.
        offsets: (m,) int64, bytes in the host region, where the rank's part of each block begins.
        device_blocks: (m,) int64.
    """

    group: int
    offsets: npt.NDArray[np.int64]
    device_blocks: npt.NDArray[np.int64]


class Worker(Protocol):
    """What copies for one rank, wherever it runs."""

    def shape(self, group: int) -> tuple[int, int]:
        """(bytes of this rank's part of a block, device blocks). Raises LayoutError where it has nothing of it."""


class LocalWorker:
    """A device of this process: a copy thread of the scheduler runs the copy."""

    def __init__(self, device: Device, region: HostRegion) -> None:
        self._device = device
        self._region = region

    def shape(self, group: int) -> tuple[int, int]:
        fragments = self._device.fragments(group)
        return fragments.block_bytes, fragments.pages

    def run(self, direction: Direction, parts: Sequence[CopyPart]) -> None:
        """Copy; returns when no byte moves any more."""
        copy = self._device.gather if direction == "gather" else self._device.scatter
        for part in parts:
            copy(self._region.buffer, part.offsets, part.device_blocks, part.group)


class WorkerLostError(RuntimeError):
    """A worker's process has ended, or is away, with a copy under way or asked for."""


class RemoteWorker(Protocol):
    """A worker in another process."""

    def shape(self, group: int) -> tuple[int, int]:
        """As `Worker.shape`."""

    def start(
        self, direction: Direction, parts: Sequence[CopyPart], tag: str, done: Callable[[BaseException | None], None]
    ) -> None:
        """Begin to copy (owner thread). `done` is called there once, when no byte of it can move any more: the worker
        said so, or is known to be gone."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The workers of a model's ranks, and which part of a block each has.

    Attributes:
        shards: by rank and group: (first byte of the payload, bytes); no bytes: nothing to copy there.
        writes: by rank and group: whether the rank stores its part.
        pages: by group: how many device blocks all ranks have.
    """

    workers: tuple[LocalWorker | RemoteWorker, ...]
    shards: tuple[tuple[tuple[int, int], ...], ...]
    writes: tuple[tuple[bool, ...], ...]
    pages: tuple[int, ...]

    @classmethod
    def of(cls, workers: Sequence[LocalWorker | RemoteWorker], model: ModelSpec) -> Ranks:
        """Match workers with a model. Raises LayoutError where their blocks have other sizes than it says."""
        layout = model.tensor_parallel * model.pipeline_parallel
        if not workers or len(workers) not in (1, layout):
            # The order of a block's bytes is that of the ranks, so the namespace must tell one layout from another.
            raise LayoutError(
                f"{len(workers)} devices for tensor_parallel {model.tensor_parallel} and pipeline_parallel "
                f"{model.pipeline_parallel}: give one device a rank, and say so in the ModelSpec"
            )
        by_group = [group.shards(len(workers)) for group in model.groups]
        pages = []
        for number, shards in enumerate(by_group):
            counts = []
            for rank, (worker, (_, size)) in enumerate(zip(workers, shards, strict=True)):
                if not size:
                    continue
                where = f"group {number}, rank {rank}" if len(workers) > 1 else f"group {number}"
                try:
                    block_bytes, count = worker.shape(number)
                except LayoutError as error:
                    raise LayoutError(f"{where}: the model has {size} bytes there, but {error}") from error
                if block_bytes != size:
                    raise LayoutError(
                        f"{where}: the device's blocks have {block_bytes} bytes, the model's {size}: "
                        "describe the same tensors in both"
                    )
                counts.append(count)
            pages.append(min(counts))
        writes = tuple(
            tuple(
                bool(shards[rank][1]) and (rank == 0 or not group.replicated)
                for group, shards in zip(model.groups, by_group, strict=True)
            )
            for rank in range(len(workers))
        )
        by_rank = tuple(tuple(shards[rank] for shards in by_group) for rank in range(len(workers)))
        return cls(tuple(workers), by_rank, writes, tuple(pages))
