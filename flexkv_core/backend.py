"""The contract of a storage tier: what a backend's author reads, and all that a backend imports.

A backend is a distribution with an entry point in the group ``flexkv.backends`` whose name is the
backend's name and whose value is a module (or object) with a pluggy hook::

    from flexkv_core.backend import BackendSpec, hookimpl

    @hookimpl
    def flexkv_backend() -> BackendSpec: ...

**What the framework guarantees**

- *Life.* ``open`` is called once, before anything else; ``close`` once, after the last call has been made. A
  backend is not opened again after ``close`` or after an ``open`` that raised: a new one is made.
- *Process.* A backend lives in a process of its own (unless ``isolation: none``), on Linux, with no engine's code
  beside it; it may block, crash or leak there. stdout is stderr in it: a ``print`` reaches no engine's output.
  SIGINT is ignored. When its parent dies, it is killed.
- *Threads.* ``open``, ``close`` and the calls come from different threads. At most ``capabilities.concurrency``
  calls of ``read``, ``write``, ``probe``, ``delete`` and ``list`` run at a time, each on one thread until it
  returns. A backend with ``submit`` gets its reads and writes through it alone: one thread makes all those calls, never
  out of a ``done``; at most ``concurrency`` batches are submitted and not done, beside calls of the other kinds.
- *Batches.* 1 to ``capabilities.max_batch_blocks`` blocks a call. No batch names one (key, group), one place in the
  host region or one slot twice. Its arrays are read-only and C-contiguous, and are the call's alone: keep a copy of
  what is to outlive it.
- *Places.* A block is opaque bytes in the host region: ``lengths[i]`` bytes from ``offsets[i]``. Both are multiples
  of `PAGE`, and the region starts on a page, so the same bytes serve ``O_DIRECT``, RDMA registration and HTTP. A
  length is at least 2 pages (payload and seal); one batch may mix lengths; offsets are in no order. Until the call
  has returned (a submitted batch: until its ``done``), nobody else writes those bytes, and for a read nobody looks at
  them; if the call never returns, until the process is dead.
- *Content.* The core has sealed the block before ``write`` and verifies the seal after ``read``: a backend cannot
  return wrong bytes unnoticed, only lose blocks. A (key, group) is only ever written with one content and one
  length.
- *Order.* Writes of one (key, group) are never concurrent with each other or with its ``delete``; nor are those of
  one slot. A read of a block that is being written or deleted may come at any time, and may be answered MISSING or
  FAILED.
- *Slots* (slot-addressed): within ``OpenContext.capacity``, never overlapping for blocks that are held. A slot is
  written again without a word when its block was evicted.
- *Deadlines.* A call that exceeds the tier's deadline (``deadline``, 10 s by default), or an ``open`` or ``list``
  that exceeds the opening deadline (60 s), gets the process killed and restarted with back-off. ``close`` is given
  a few seconds, then the process is killed. So whatever `close` does for tidiness may be left undone at any time.

**What the author owes**

- *Answers.* One `Status` a block, in the batch's order. Raising is the same as FAILED for the whole batch.
- *Submitted batches* (``submit``): ``done`` exactly once for each, from any thread, in any order, also within
  ``submit`` itself. What is owed when a call returns is owed when ``done`` is called: the bytes are moved, and nothing
  of the batch is touched any more. ``submit`` returns at once, and raises only for a batch of which nothing will
  happen.
- *OK for a read* only when all ``lengths[i]`` bytes have been put in their place. OK for less is never right, also
  when the stored block is shorter or was cut short.
- *OK for a write* only when all its bytes would be returned by a read that starts later; in a persistent backend,
  also by one after the process is killed with SIGKILL. (After a power loss too if it says so.) The source's bytes
  are not looked at after the call has returned.
- *MISSING* for a read of what the backend does not hold (key-addressed; a slot that was never written may be
  anything). *FAILED* for what it could not do now: an error of the medium, a short read or write, no room. FAILED
  promises nothing: the block may be held afterwards or not, but it must not be half held.
- *A kill* in the middle of a write leaves the whole block, the block that was there before, or none; key-addressed
  backends owe this by themselves, in slots the seal tells.
- *Only what was asked.* Reads write nothing outside the batch's places, not even after they have returned; writes,
  probes and deletes write nothing in the host region. Other blocks on the medium stay as they are.
- *A full medium* is FAILED for the new block; no block that is held gives way, unless the backend is ``shared`` and
  says how it is bounded.
- *Being called by threads*, up to the ``concurrency`` that it claims.
- *Not blocking for ever*, and no retrying behind the core's back for longer than a call may take: a quick FAILED
  costs a recompute, a late OK costs more. Set explicit timeouts in every client library.
- *Close* returns promptly, also while calls are in flight: those may be let finish within a second or answered
  FAILED. It leaves the medium so that it can be opened again. Submitted batches that are not done when it returns are
  FAILED: from then on nothing of them may be touched, nor ``done`` be called.
- *One user a medium*, where two would harm each other: take a `DirectoryLock`, which names its holder.
- *Nothing executed, nothing leaked.* No pickle; files 0600, directories 0700; no secret in a log record, ``repr``
  or exception.

`flexkv_core.testing.BackendConformance` checks each of these that can be seen from outside.

**Versions.** `CONTRACT_VERSION` is one number. It stays when something is added that an existing backend need not
know: an optional power (found by its methods), a field of `Capabilities` or `BackendSpec` with a default that keeps
the old behaviour, a field of `OpenContext`, `Batch` or `Recovered` at the end, a guarantee of the framework, a
helper. It grows when an existing backend would break: a new duty, a method that must exist, a changed meaning, a
withdrawn guarantee. From version 2 on, a release speaks the newest version and the one before for at least two
minor releases and a year, says so in a warning when an older one is loaded, and never guesses: a version that it
does not speak is refused at load with the fix. Deprecated names keep working, with a DeprecationWarning, until the
version that deprecated them is no longer spoken. While the version is 1, what it means is what this file says.
"""

from __future__ import annotations

import enum
import logging
import queue
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
from flexkv_core.seal import Seals, find_seals

__all__ = [
    "CONTRACT_VERSION",
    "PAGE",
    "Backend",
    "BackendConfig",
    "BackendSpec",
    "Batch",
    "Capabilities",
    "DirectoryLock",
    "Done",
    "Listing",
    "OpenContext",
    "Recovered",
    "Seals",
    "Status",
    "SubmitBackend",
    "SubmitOperation",
    "SupportsDelete",
    "SupportsList",
    "SupportsProbe",
    "SupportsRecover",
    "SupportsSubmit",
    "find_seals",
    "hookimpl",
    "listing",
    "submit_and_wait",
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
class Recovered:
    """Blocks that a slot-addressed backend still has after a restart; arrays of length n.

    Attributes:
        namespaces: (n, 32) uint8, the roots of the namespaces that the blocks belong to.
        keys: (n, 32) uint8, block keys.
        parents: (n, 32) uint8, the key before each; of a first block, the namespace's root.
        depths: (n,) int64, how many blocks come before each in its prefix.
        groups: (n,) uint8, KV group numbers.
        lengths: (n,) int64, bytes, seal included.
        slots: (n,) int64, byte offset in the tier divided by `PAGE`.
    """

    namespaces: npt.NDArray[np.uint8]
    keys: npt.NDArray[np.uint8]
    parents: npt.NDArray[np.uint8]
    depths: npt.NDArray[np.int64]
    groups: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.groups)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend is and how the core may call it.

    Attributes:
        addressing: "slot": the core chooses where a block lies, and owns capacity and eviction;
            "key": the backend stores by (key, group).
        persistent: blocks survive the end of the process.
        shared: others read and write the same medium; the core then bounds nothing and probes.
        alignment: bytes that slots and lengths are multiples of; at most `PAGE` is what the core gives today.
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
        """Release everything: threads, descriptors, connections, locks. Called once, from any thread.

        Must return promptly, also when calls are still in flight; those may fail. The process ends afterwards,
        or, with `isolation: none`, goes on without it.
        """


@runtime_checkable
class SupportsProbe(Protocol):
    """Key-addressed backends that can say what they hold without moving bytes."""

    def probe(self, batch: Batch) -> int:
        """Return how many leading blocks of the batch are held: the number before the first that is not.

        Never more than a read would bring, now and if nothing happens. Offsets and lengths are zero. The blocks may be
        of several groups, and in any order. An exception says that it cannot be told now; it counts as a failed call.
        """


@runtime_checkable
class SupportsDelete(Protocol):
    """Key-addressed backends whose capacity the core bounds."""

    def delete(self, batch: Batch) -> Sequence[Status]:
        """Forget blocks and give their room back; OK also for what is not there. Offsets and lengths are zero.

        After OK a read is MISSING, and a probe or a list does not say otherwise; also after a restart.
        """


@runtime_checkable
class SupportsList(Protocol):
    """Key-addressed backends that can enumerate what they hold; called after `open`, and whenever the core asks."""

    def list(self) -> Iterator[Listing]:
        """Yield all blocks in pieces of any size, least recently written first where the medium knows.

        Every block that is held, once, with its length. What is written or deleted meanwhile may be in it or not.
        """


@runtime_checkable
class SupportsRecover(Protocol):
    """Persistent slot-addressed backends that can say what survived; called once after `open`, before other calls."""

    def recover(self) -> Iterator[Recovered]:
        """Yield all blocks that were written OK and whose slots were not written since, in pieces of any size.

        Nothing else: a slot that was being written when the process ended is left out, as is one that holds
        no whole block. The core verifies each block again when it is read.
        """


SubmitOperation = Literal["read", "write"]
Done = Callable[[Sequence[Status]], None]
"""Takes one `Status` a block, in the batch's order."""


@runtime_checkable
class SupportsSubmit(Protocol):
    """Backends of either addressing whose engine is asynchronous, such as io_uring: no thread a call.

    The core then calls neither ``read`` nor ``write``. `SubmitBackend` has both, for tests and tools.
    """

    def submit(self, operation: SubmitOperation, batch: Batch, done: Done) -> None:
        """Begin to read or write, as ``read`` and ``write`` do, and return at once; call ``done`` when it has ended.

        ``done`` may be called by any thread, in any order of batches, and before this returns; exactly once. It
        returns quickly and raises nothing. A second call is ignored and counted. A batch that is not done
        within the tier's deadline gets the process killed. An exception here is FAILED for the batch, and says that
        nothing of it will be touched.
        """


def submit_and_wait(backend: SupportsSubmit, operation: SubmitOperation, batch: Batch) -> Sequence[Status]:
    """A submitted batch as a blocking call. Raises what `submit` raises; waits as long as it takes."""
    answers: queue.SimpleQueue[Sequence[Status]] = queue.SimpleQueue()
    backend.submit(operation, batch, answers.put)
    return answers.get()


class SubmitBackend(Backend):
    """Base of backends with `submit`: reading and writing are submitting and waiting."""

    @abstractmethod
    def submit(self, operation: SubmitOperation, batch: Batch, done: Done) -> None:
        """As `SupportsSubmit.submit`."""

    def read(self, batch: Batch) -> Sequence[Status]:
        return submit_and_wait(self, "read", batch)

    def write(self, batch: Batch) -> Sequence[Status]:
        return submit_and_wait(self, "write", batch)


class BackendConfig(BaseModel):
    """Base of a backend's configuration: its fields are the keys that a tier accepts in the stack."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    _hidden: frozenset[str] = PrivateAttr(default=frozenset())

    def epoch_directory(self) -> Path | None:
        """A directory on the tier's own medium that the core may have for its record of resets: a file of up to 120 KB.

        It must live exactly as long as the tier's blocks; the core makes it (0700) and locks it. None where the medium
        has no directory: a stack with such a tier, if it is persistent, needs `state_directory` to be reset.
        """
        return None

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
        persistent: False if the capabilities never say so: then nothing need be known after a restart.
    """

    name: str
    config_model: type[BackendConfig]
    factory: Callable[[Any], Backend]
    contract_version: int
    addressing: Literal["slot", "key"]
    hosts: bool = False
    persistent: bool = True
    extra: Mapping[str, str] = field(default_factory=dict)


@hookspec
def flexkv_backend() -> BackendSpec:
    """Return the plug-in's `BackendSpec`."""
    raise LookupError("a hook specification is not to be called")
