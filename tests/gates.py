"""Backends and devices that wait at a gate, count their calls and fail when told to.

`GateBackend` is key-addressed, `SharedGateBackend` too, for several managers; `SlotGateBackend` is slot-addressed. All
keep blocks in a dict of this process, so they need `isolation: none`. The medium belongs to the `Gate` of that name,
hence survives the backend.
"""

from __future__ import annotations

import dataclasses
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core import backend as fk
from flexkv_core.device.cpu import CpuDevice

PATIENCE_S = 30.0
"""Longer than anything here takes: a wait that runs into it is a failure."""


def until(true: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
    """Wait for something that will come, however long it takes."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


class Gate:
    """What a test sees of its backend.

    Attributes:
        calls: (operation, names of the blocks) in the order in which they reached the backend.
        medium: what it holds: (key, group) or slot -> bytes. folder: what the core keeps beside that.
        lies: probes claim to hold whatever they are asked for.
        most_bytes: of calls that were under way at a time.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[tuple[bytes, int]]]] = []
        self.medium: dict[Any, bytes] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="gate-")
        self.most_bytes = 0
        self.lies = False
        self.failing: set[str] = set()
        self.failing_once: set[str] = set()
        self.unreadable: set[bytes] = set()  # keys
        self._bytes = 0
        self._closed: set[str] = set()
        self._changed = threading.Condition()

    def shut(self, operation: str) -> None:
        """From now on calls of this operation wait."""
        with self._changed:
            self._closed.add(operation)

    def open(self, operation: str) -> None:
        """Let them go on."""
        with self._changed:
            self._closed.discard(operation)
            self._changed.notify_all()

    def count(self, operation: str) -> int:
        """Calls so far."""
        return sum(1 for name, _ in self.calls if name == operation)

    def blocks(self, operation: str) -> list[bytes]:
        """Keys that calls have named so far, in order."""
        return [key for name, names in self.calls if name == operation for key, _ in names]

    def enter(self, operation: str, batch: fk.Batch) -> None:
        names = [(key.tobytes(), int(group)) for key, group in zip(batch.keys, batch.groups, strict=True)]
        with self._changed:
            self.calls.append((operation, names))
            self._bytes += int(batch.lengths.sum())
            self.most_bytes = max(self.most_bytes, self._bytes)
            assert self._changed.wait_for(lambda: operation not in self._closed, PATIENCE_S)
            self._bytes -= int(batch.lengths.sum())
            if operation in self.failing or operation in self.failing_once:
                self.failing_once.discard(operation)
                raise OSError("told to fail")


GATES: defaultdict[str, Gate] = defaultdict(Gate)


class GateConfig(fk.BackendConfig):
    gate: str
    concurrency: int = 1
    max_batch_blocks: int = 128

    def epoch_directory(self) -> Path | None:
        return Path(GATES[self.gate].folder.name) / "epochs"


class SharedGateConfig(GateConfig):
    """Of a medium that is not one node's: its record of resets cannot lie there."""

    def epoch_directory(self) -> Path | None:
        return None


class GateBackend(fk.Backend):
    addressing: Any = "key"

    def __init__(self, config: GateConfig) -> None:
        self.gate = GATES[config.gate]
        self.capabilities = fk.Capabilities(
            self.addressing, concurrency=config.concurrency, max_batch_blocks=config.max_batch_blocks, persistent=True
        )

    def open(self, context: fk.OpenContext) -> None:
        self.host = context.host

    def read(self, batch: fk.Batch) -> Sequence[fk.Status]:
        self.gate.enter("read", batch)
        bad = [key.tobytes() in self.gate.unreadable for key in batch.keys]
        blocks = zip(self._blocks(batch), bad, strict=True)
        return [fk.Status.FAILED if unreadable else self._read(*block) for block, unreadable in blocks]

    def write(self, batch: fk.Batch) -> Sequence[fk.Status]:
        self.gate.enter("write", batch)
        for name, place in self._blocks(batch):
            self.gate.medium[name] = bytes(place)
        return [fk.Status.OK] * len(batch)

    def close(self) -> None:
        pass

    def _read(self, name: Any, place: memoryview) -> fk.Status:
        if name not in self.gate.medium:
            return fk.Status.MISSING
        place[:] = self.gate.medium[name]
        return fk.Status.OK

    def _blocks(self, batch: fk.Batch) -> Iterator[tuple[Any, memoryview]]:
        names = zip(batch.keys, batch.groups, strict=True) if batch.slots is None else batch.slots
        for name, start, size in zip(names, batch.offsets, batch.lengths, strict=True):
            yield (
                int(name) if batch.slots is not None else (name[0].tobytes(), int(name[1])),
                self.host[start : start + size],
            )


class KeptGateBackend(GateBackend):
    """With delete, so that the core bounds its capacity."""

    def delete(self, batch: fk.Batch) -> Sequence[fk.Status]:
        self.gate.enter("delete", batch)
        for key, group in zip(batch.keys, batch.groups, strict=True):
            self.gate.medium.pop((key.tobytes(), int(group)), None)
        return [fk.Status.OK] * len(batch)


class SharedGateBackend(GateBackend):
    """With probe, and written to by others."""

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.capabilities = dataclasses.replace(self.capabilities, shared=True)

    def probe(self, batch: fk.Batch) -> int:
        assert not batch.offsets.any()
        assert not batch.lengths.any()
        self.gate.enter("probe", batch)
        held = [self.gate.lies or name in self.gate.medium for name, _ in self._blocks(batch)]
        return [*held, False].index(False)


class SlotGateBackend(GateBackend):
    addressing = "slot"


class GatedDevice(CpuDevice):
    """A CPU device whose copies wait while `free` is not set, and fail while `failing` is."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Semaphore(0)
        self.failing = False
        self.gathers = 0
        self.scatters = 0

    def gather(
        self, host: Any, offsets: npt.NDArray[np.int64], device_blocks: npt.NDArray[np.int64], group: int = 0
    ) -> None:
        self.gathers += 1
        self._wait()
        super().gather(host, offsets, device_blocks, group)

    def scatter(
        self, host: Any, offsets: npt.NDArray[np.int64], device_blocks: npt.NDArray[np.int64], group: int = 0
    ) -> None:
        self.scatters += 1
        self._wait()
        super().scatter(host, offsets, device_blocks, group)

    def _wait(self) -> None:
        self.entered.release()
        assert self.free.wait(PATIENCE_S)
        if self.failing:
            raise RuntimeError("the device is gone")


@fk.hookimpl
def gate_backend() -> fk.BackendSpec:
    return fk.BackendSpec("gate", GateConfig, KeptGateBackend, contract_version=1, addressing="key")


@fk.hookimpl
def shared_gate_backend() -> fk.BackendSpec:
    return fk.BackendSpec("sharedgate", SharedGateConfig, SharedGateBackend, contract_version=1, addressing="key")


@fk.hookimpl
def slot_gate_backend() -> fk.BackendSpec:
    return fk.BackendSpec("slotgate", GateConfig, SlotGateBackend, contract_version=1, addressing="slot")
