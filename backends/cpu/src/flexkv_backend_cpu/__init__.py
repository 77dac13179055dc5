"""Host memory as a tier.

First in a stack it *is* the host region, which the core owns, and no backend runs. Elsewhere it is an ordinary
slot-addressed tier: memory of its own, from which blocks are copied to and from the host region.
"""

import mmap
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

import flexkv_core.backend as fk


class CpuConfig(fk.BackendConfig):
    """huge_pages: ask for huge pages, fall back to small ones; prefault: touch all memory at start; threads: for it."""

    huge_pages: bool = False
    prefault: bool = True
    threads: Annotated[int, Field(ge=1, le=256)] | None = None


class CpuBackend(fk.Backend):
    """Slots in an anonymous mapping, which takes memory only as slots are written."""

    capabilities = fk.Capabilities(addressing="slot", concurrency=2)

    def __init__(self, config: CpuConfig) -> None:
        self._config = config

    def open(self, context: fk.OpenContext) -> None:
        if context.capacity is None:
            raise ValueError("the cpu tier needs a capacity")
        self._host = context.host
        self._memory = mmap.mmap(-1, context.capacity, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._slots = memoryview(self._memory)

    def read(self, batch: fk.Batch) -> Sequence[fk.Status]:
        for host, slot in self._pairs(batch):
            self._host[host] = self._slots[slot]
        return [fk.Status.OK] * len(batch)

    def write(self, batch: fk.Batch) -> Sequence[fk.Status]:
        for host, slot in self._pairs(batch):
            self._slots[slot] = self._host[host]
        return [fk.Status.OK] * len(batch)

    def close(self) -> None:
        # Calls still in flight keep the mapping alive until they return.
        self._slots = memoryview(b"")

    @staticmethod
    def _pairs(batch: fk.Batch) -> list[tuple[slice, slice]]:
        if batch.slots is None:
            raise ValueError("a slot-addressed batch comes with slots")
        starts = zip(batch.offsets.tolist(), (batch.slots * fk.PAGE).tolist(), batch.lengths.tolist(), strict=True)
        return [(slice(host, host + size), slice(slot, slot + size)) for host, slot, size in starts]


@fk.hookimpl
def flexkv_backend() -> fk.BackendSpec:
    return fk.BackendSpec(
        "cpu", CpuConfig, CpuBackend, contract_version=1, addressing="slot", hosts=True, persistent=False
    )
