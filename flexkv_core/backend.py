"""The contract of a storage tier: what a backend's author reads, and all that a backend imports.

A backend is a distribution with an entry point in the group ``flexkv.backends`` whose name is the
backend's name and whose value is a module (or object) with a pluggy hook::

    from flexkv_core.backend import BackendSpec, hookimpl

    @hookimpl
    def flexkv_backend() -> BackendSpec: ...

**What the framework guarantees**

- ``open`` is called once, before anything else, and ``close`` once, after the last call has returned or
  been abandoned.
- A backend lives in a process of its own (unless ``isolation: none``); it may block, crash or leak there.
- A block is opaque bytes in the host region: ``lengths[i]`` bytes from ``offsets[i]``. Both are multiples
  of `PAGE` bytes, so the same bytes serve ``O_DIRECT``, RDMA registration and HTTP. Nobody else writes
  those bytes until the call has returned; if the call never returns, until the process is dead.
- The core has sealed the block before ``write`` and verifies the seal after ``read``: a backend cannot
  return wrong bytes unnoticed, only lose blocks.
- A (key, group) is only ever written with one content. No batch names one block twice.
- At most ``capabilities.concurrency`` calls at a time, at most ``capabilities.max_batch_blocks`` blocks a call.

**What the author owes**

- One `Status` a block, in the batch's order, and never more than one answer.
- OK for a write only when all its bytes would be returned by a read that starts later; in a persistent
  backend, also by one after the process is killed. A short read or write is FAILED, not OK.
- MISSING for a read of what the backend does not hold. FAILED for what it could not do; raising is the same
  as FAILED for the whole batch.
- Writes touch nothing outside the batch's offsets; reads write nothing outside them.
- Not blocking for ever. A call that exceeds the tier's deadline gets the process killed and restarted.
"""

from __future__ import annotations

import enum
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pluggy
from pydantic import BaseModel, ConfigDict, PrivateAttr

from flexkv_core.locks import DirectoryLock

__all__ = [
    "CONTRACT_VERSION",
    "PAGE",
    "Backend",
    "BackendConfig",
    "BackendSpec",
    "Batch",
    "Capabilities",
    "DirectoryLock",
    "Listing",
    "OpenContext",
    "Status",
    "SupportsDelete",
    "SupportsList",
    "SupportsProbe",
    "hookimpl",
    "listing",
]

CONTRACT_VERSION = 1
PAGE = 4096
"""Alignment in bytes of every block's offset and length in the host region."""

ENTRY_POINT_GROUP = "flexkv.backends"
hookspec = pluggy.HookspecMarker("flexkv")
hookimpl = pluggy.HookimplMarker("flexkv")


class Status(enum.IntEnum):
    """What became of one block of a batch."""

    OK = 0
    MISSING = 1
    FAILED = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks to move. Arrays of length n, read-only for the backend.

    Attributes:
        keys: (n, 32) uint8, block keys.
        groups: (n,) uint8, KV group numbers; with the key they name a block.
        offsets: (n,) int64, bytes from the start of the host region.
        lengths: (n,) int64, bytes, seal included.
        slots: (n,) int64 for slot-addressed tiers: byte offset in the tier divided by `PAGE`; else None.
    """

    keys: npt.NDArray[np.uint8]
    groups: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.groups)


@dataclass(frozen=True, slots=True)
class Listing:
    """Blocks that a key-addressed backend holds; arrays of length n as in `Batch`."""

    keys: npt.NDArray[np.uint8]
    groups: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int64]


def listing(keys: bytes, groups: Sequence[int], lengths: Sequence[int]) -> Listing:
    """Make a `Listing` of plain values: the keys one after the other, 32 bytes each."""
    rows = np.frombuffer(keys, np.uint8).reshape(len(groups), 32)
    return Listing(rows, np.array(groups, np.uint8), np.array(lengths, np.int64))


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend is and how the core may call it.

    Attributes:
        addressing: "slot": the core chooses where a block lies, and owns capacity and eviction;
            "key": the backend stores by (key, group).
        persistent: blocks survive the end of the process.
        shared: others read and write the same medium; the core then bounds nothing and probes.
        concurrency: how many calls may run at a time, each in a thread of its own.
        max_batch_blocks: how many blocks one call may carry.
    """

    addressing: Literal["slot", "key"]
    persistent: bool = False
    shared: bool = False
    alignment: int = PAGE
    concurrency: int = 4
    max_batch_blocks: int = 128


@dataclass(frozen=True, slots=True)
class OpenContext:
    """What a backend gets when it is opened.

    Attributes:
        host: the host region, writable; address it by a batch's offsets and lengths.
        slot_bytes: the sizes of blocks (seal included) known at this time; others may come later.
        capacity: bytes that the core will keep in this tier at most, None where the backend bounds itself.
        logger: use this one; its records reach the manager's log.
        state_directory: private to this tier (0700), survives restarts; None if the stack names none.
    """

    host: memoryview
    slot_bytes: Sequence[int]
    capacity: int | None
    logger: logging.Logger
    state_directory: Path | None = None


class Backend(ABC):
    """Runs in its tier process. Moves sealed blocks: opaque bytes in the host region; never looks inside."""

    capabilities: Capabilities

    @abstractmethod
    def open(self, context: OpenContext) -> None:
        """Make ready. An exception here keeps the tier away and is retried with back-off."""

    @abstractmethod
    def read(self, batch: Batch) -> Sequence[Status]:
        """Fill the host region from the medium. Blocking; called from up to `concurrency` threads."""

    @abstractmethod
    def write(self, batch: Batch) -> Sequence[Status]:
        """Put the host region's bytes on the medium. Blocking; called from up to `concurrency` threads."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. Must return promptly, also when calls are still in flight."""


@runtime_checkable
class SupportsProbe(Protocol):
    """Key-addressed backends that can say what they hold without moving bytes."""

    def probe(self, batch: Batch) -> int:
        """Return how many leading blocks of the batch are held. Offsets and lengths are zero."""


@runtime_checkable
class SupportsDelete(Protocol):
    """Key-addressed backends whose capacity the core bounds."""

    def delete(self, batch: Batch) -> Sequence[Status]:
        """Forget blocks; OK also for what is not there. Offsets are zero."""


@runtime_checkable
class SupportsList(Protocol):
    """Key-addressed backends that can enumerate what they hold; called once after `open`."""

    def list(self) -> Iterator[Listing]:
        """Yield all blocks in pieces of any size, least recently written first where the medium knows."""


class BackendConfig(BaseModel):
    """Base of a backend's configuration: its fields are the keys that a tier accepts in the stack."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    _hidden: frozenset[str] = PrivateAttr(default=frozenset())

    def hide_in_repr(self, fields: Iterable[str]) -> None:
        """Have the repr mask these fields: the core calls it for what came from a `${NAME}` reference."""
        self._hidden = frozenset(fields)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, "***" if name in self._hidden else value


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """What a plug-in's hook returns.

    Attributes:
        name: the `backend:` value in a stack; equal to the entry point's name.
        config_model: subclass of `BackendConfig`; validates the tier's keys that the core does not know.
        factory: called in the tier process with an instance of `config_model`.
        contract_version: the `CONTRACT_VERSION` that this plug-in was written for, as a literal number.
        addressing: as in the backend's capabilities; needed before the backend exists.
        hosts: True if the tier may live in the host region itself when it is the first of the stack; the core
            then sizes the region by its capacity and no backend runs for it.
    """

    name: str
    config_model: type[BackendConfig]
    factory: Callable[[Any], Backend]
    contract_version: int
    addressing: Literal["slot", "key"]
    hosts: bool = False
    extra: Mapping[str, str] = field(default_factory=dict)


@hookspec
def flexkv_backend() -> BackendSpec:
    """Return the plug-in's `BackendSpec`."""
    raise LookupError("a hook specification is not to be called")
