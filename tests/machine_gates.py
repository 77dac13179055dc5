"""Backends, devices and a link that the manager's state machine holds, fails and kills when it likes.

Everything waits at one `Gates`: calls of backends, copies of devices, sealing and verifying. A call that waits can be
let go alone, with all of its kind, or broken. The media belong to the `Gates`, so they survive a manager. What the core
owes a backend (batches, bytes, capacity) is checked here; what is broken is told in `Gates.broken`.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core import backend as fk
from flexkv_core import copying, reading
from flexkv_core.device.cpu import CpuDevice
from flexkv_core.tier_inline import InlineLink

PATIENCE_S = 60.0
"""Longer than anything here takes: a wait that runs into it is a failure."""
KINDS = ("read", "write", "delete", "gather", "seal", "scatter", "verify")
COPIES = ("gather", "seal", "scatter", "verify")
Name = tuple[bytes, int]


@functools.lru_cache(20_000)
def content(key: bytes, group: int, size: int) -> npt.NDArray[np.uint8]:
    """The bytes that a key demands, by hashlib alone."""
    return np.frombuffer(hashlib.shake_128(key + bytes([group])).digest(size), np.uint8)


@dataclass(eq=False)
class Held:
    """A call that has come to a gate. `names`: blocks, or device blocks of a copy."""

    kind: str
    where: str
    names: list[Any]
    free: bool = False
    broken: bool = False


@dataclass
class Gates:
    """See the module's docstring.

    Attributes:
        shut: kinds that wait now.
        held: calls that do.
        failing: how many of the next copies of a kind, by rank, raise.
        media: tier -> (key, group) or slot -> bytes.
        sizes: payload bytes by group, of every key that was ever stored.
        dead: tiers whose calls raise.
    """

    shut: set[str] = field(default_factory=set)
    held: list[Held] = field(default_factory=list)
    failing: Counter[tuple[str, int]] = field(default_factory=Counter)
    media: dict[str, dict[Any, bytes]] = field(default_factory=dict)
    sizes: dict[Name, int] = field(default_factory=dict)
    running: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def enter(self, kind: str, where: str, names: list[Any]) -> None:
        with self.changed:
            if where in self.dead:
                raise OSError("killed")
            if kind not in self.shut:
                return
            held = Held(kind, where, names)
            self.held.append(held)
            if not self.changed.wait_for(lambda: held.free, PATIENCE_S):
                self.broken.append(f"a {kind} was forgotten at its gate")
            self.held.remove(held)
            if held.broken:
                raise OSError("killed")

    def let_go(self, chosen: Iterable[Held], *, broken: bool = False) -> None:
        with self.changed:
            for held in chosen:
                held.free, held.broken = True, broken
            self.changed.notify_all()

    def open(self, kind: str) -> None:
        self.shut.discard(kind)
        self.let_go(self.waiting(kind))

    def open_copies(self) -> None:
        for kind in COPIES:
            self.open(kind)

    def open_all(self) -> None:
        self.shut.clear()
        self.failing.clear()
        self.let_go(self.waiting())

    def waiting(self, *kinds: str, where: str | None = None) -> list[Held]:
        with self.changed:
            return [
                h
                for h in self.held
                if not h.free and (not kinds or h.kind in kinds) and (where is None or h.where == where)
            ]

    def fails(self, kind: str, rank: int) -> bool:
        with self.changed:
            if not self.failing[kind, rank]:
                return False
            self.failing[kind, rank] -= 1
            return True

    def complain(self, what: str) -> None:
        with self.changed:
            self.broken.append(what)


class Current:
    """The gates of the world that runs now; there is one world at a time."""

    gates = Gates()


class GateConfig(fk.BackendConfig):
    tier: str
    persistent: bool = True
    concurrency: int = 2
    max_batch_blocks: int = 4


class Keyed(fk.Backend):
    """Key-addressed, without a bound of its own."""

    addressing: Any = "key"

    def __init__(self, config: GateConfig) -> None:
        self.gates, self.tier, self.config = Current.gates, config.tier, config
        self.medium = self.gates.media.setdefault(config.tier, {})
        self.capabilities = fk.Capabilities(
            self.addressing,
            persistent=config.persistent,
            concurrency=config.concurrency,
            max_batch_blocks=config.max_batch_blocks,
        )

    def open(self, context: fk.OpenContext) -> None:
        self.host, self.capacity = context.host, context.capacity

    def read(self, batch: fk.Batch) -> Sequence[fk.Status]:
        return self._call("read", batch, self._read)

    def write(self, batch: fk.Batch) -> Sequence[fk.Status]:
        statuses = self._call("write", batch, self._write)
        if self.capacity is not None and self.addressing == "key":
            with self.gates.changed:
                held = sum(map(len, self.medium.values()))
                if held > self.capacity:
                    self.gates.broken.append(f"{self.tier} holds {held} bytes, its capacity is {self.capacity}")
        return statuses

    def close(self) -> None:
        pass

    def _call(self, kind: str, batch: fk.Batch, act: Callable[[Name, Any, memoryview], fk.Status]) -> list[fk.Status]:
        gates = self.gates
        names = [(key.tobytes(), int(group)) for key, group in zip(batch.keys, batch.groups, strict=True)]
        with gates.changed:
            gates.running[self.tier] += kind != "delete"
            if gates.running[self.tier] > self.config.concurrency:
                gates.broken.append(f"{gates.running[self.tier]} calls of {self.tier} at a time")
            if not 0 < len(names) <= self.config.max_batch_blocks or len(set(names)) < len(names):
                gates.broken.append(f"a batch of {len(names)} blocks, {len(set(names))} different ones")
            if batch.slots is not None and len(np.unique(batch.slots)) < len(names):
                gates.broken.append("a batch names a slot twice")
            if (batch.offsets % fk.PAGE).any() or (batch.offsets + batch.lengths > len(self.host)).any():
                gates.broken.append("a batch leaves the host region")
        try:
            gates.enter(kind, self.tier, names)
            return [act(name, place, data) for name, place, data in self._blocks(names, batch)]
        finally:
            with gates.changed:
                gates.running[self.tier] -= kind != "delete"

    def _blocks(self, names: list[Name], batch: fk.Batch) -> Iterator[tuple[Name, Any, memoryview]]:
        places = names if batch.slots is None else batch.slots.tolist()
        for name, place, start, size in zip(names, places, batch.offsets, batch.lengths, strict=True):
            yield name, place, self.host[start : start + size]

    def _read(self, name: Name, place: Any, data: memoryview) -> fk.Status:
        held = self.medium.get(place)
        if held is None or len(held) != len(data):
            return fk.Status.MISSING
        data[:] = held
        return fk.Status.OK

    def _write(self, name: Name, place: Any, data: memoryview) -> fk.Status:
        size = self.gates.sizes.get(name)
        if size is None or bytes(data[:size]) != content(*name, size).tobytes():
            self.gates.complain(f"{self.tier} is to write a block with the bytes of another")
        with self.gates.changed:
            self.medium[place] = bytes(data)
        return fk.Status.OK


class Kept(Keyed):
    """Bounded by the core, through list and delete."""

    def delete(self, batch: fk.Batch) -> Sequence[fk.Status]:
        return self._call("delete", batch, self._delete)

    def _delete(self, name: Name, place: Any, data: memoryview) -> fk.Status:
        with self.gates.changed:
            self.medium.pop(name, None)
        return fk.Status.OK

    def list(self) -> Iterator[fk.Listing]:
        with self.gates.changed:
            found = [(key, group, len(data)) for (key, group), data in self.medium.items()]
        for at in range(0, len(found), 7):
            piece = found[at : at + 7]
            yield fk.listing(b"".join(key for key, _, _ in piece), [g for _, g, _ in piece], [n for _, _, n in piece])


class Slotted(Keyed):
    addressing = "slot"


PLUGINS = """
    import flexkv_core.backend as fk
    from machine_gates import GateConfig, {made}

    @fk.hookimpl
    def flexkv_backend():
        return fk.BackendSpec("{name}", GateConfig, {made}, contract_version=1, addressing="{addressing}")
"""
BACKENDS = {"gate-kept": ("Kept", "key"), "gate-keyed": ("Keyed", "key"), "gate-slotted": ("Slotted", "slot")}


class GatedDevice(CpuDevice):
    """One rank's device: copies wait, and raise when told to."""

    rank = 0

    def gather(
        self, host: Any, offsets: npt.NDArray[np.int64], device_blocks: npt.NDArray[np.int64], group: int = 0
    ) -> None:
        self._copy("gather", super().gather, host, offsets, device_blocks, group)

    def scatter(
        self, host: Any, offsets: npt.NDArray[np.int64], device_blocks: npt.NDArray[np.int64], group: int = 0
    ) -> None:
        self._copy("scatter", super().scatter, host, offsets, device_blocks, group)

    def _copy(self, kind: str, copy: Callable[..., None], host: Any, offsets: Any, blocks: Any, group: int) -> None:
        gates = Current.gates
        gates.enter(kind, f"rank {self.rank}", [(id(self), int(block)) for block in blocks])
        if gates.fails(kind, self.rank):
            raise RuntimeError("the device failed on purpose")
        copy(host, offsets, blocks, group)


_verify_blocks, _seal_blocks = reading.verify_blocks, copying.seal_blocks


def gated_verify(host: Any, offsets: Any, lengths: Any, keys: Any, groups: Any, **options: Any) -> Any:
    names = [(key.tobytes(), int(group)) for key, group in zip(keys, groups, strict=True)]
    Current.gates.enter("verify", "", names)
    return _verify_blocks(host, offsets, lengths, keys, groups, **options)


def gated_seal(host: Any, offsets: Any, lengths: Any, keys: Any, groups: Any, **options: Any) -> None:
    names = [(key.tobytes(), int(group)) for key, group in zip(keys, groups, strict=True)]
    Current.gates.enter("seal", "", names)
    _seal_blocks(host, offsets, lengths, keys, groups, **options)


class Complaints(logging.Handler):
    """Errors of the core that would otherwise only be logged."""

    EXPECTED = ("a %s failed", "%s of %d blocks failed", "probe of %d blocks failed", "a tier did not stop in time")

    def __init__(self, gates: Gates) -> None:
        super().__init__()
        self.gates = gates

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR and not str(record.msg).startswith(self.EXPECTED):
            trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
            self.gates.complain(f"{record.name}: {record.getMessage()} {trace}")
        # Frames of the manager, which pytest's own handler would keep.
        record.msg, record.args, record.exc_info = record.getMessage(), (), None


def resources() -> tuple[int, int, int]:
    """Threads, open files and children of this process."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return threading.active_count(), len(os.listdir("/proc/self/fd")), len(children)


class KillableLink(InlineLink):
    """A link whose backend dies and returns as a tier process does: see `tier_link.TierLink._reap`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.calls = 0

    def submit(self, operation: Any, batch: fk.Batch, on_done: Callable[[Any], None]) -> None:
        self.calls += 1

        def done(statuses: Any) -> None:
            self.calls -= 1
            on_done(statuses)

        super().submit(operation, batch, done)

    def die(self) -> None:
        """First part, on the owner thread: no more calls; those under way are answered FAILED."""
        self.state = "backoff"

    def died(self) -> None:
        """Second part, when all have been answered."""
        self.last_error = "killed on purpose"
        self._on_state(self)

    def restart(self) -> None:
        self.state = "starting"

    def opened_again(self) -> None:
        if self.state == "starting":
            self.state = "ready"
            self._on_state(self)
