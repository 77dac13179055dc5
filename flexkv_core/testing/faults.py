"""Faults on purpose: a decorator around any backend, also from a stack's `faults:` key.

What it can prove: that the core notices, counts and survives what storage does wrong. What it cannot: that a real
medium fails in these ways only. Draws come from one seeded generator, in the order of the calls.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from flexkv_core.backend import (
    Backend,
    Batch,
    Listing,
    OpenContext,
    Recovered,
    Status,
    SupportsDelete,
    SupportsList,
    SupportsProbe,
    SupportsRecover,
)

Probability = Annotated[float, Field(ge=0, le=1)]
Operation = Literal["open", "read", "write", "probe", "delete", "list"]
ALL_OPERATIONS: tuple[Operation, ...] = ("open", "read", "write", "probe", "delete", "list")


class FaultConfig(BaseModel):
    """What goes wrong, and how often.

    Probabilities a call: error (it raises), delay (it takes delay_s longer), hang (it never returns), crash (the
    process aborts). Probabilities a block: corrupt (one byte of what was read is flipped), short (only the first
    half is read, reported OK), lost (not written, reported OK).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    error: Probability = 0.0
    delay: Probability = 0.0
    delay_s: Annotated[float, Field(ge=0)] = 0.1
    hang: Probability = 0.0
    crash: Probability = 0.0
    corrupt: Probability = 0.0
    short: Probability = 0.0
    lost: Probability = 0.0
    after: Annotated[int, Field(ge=0)] = 0
    """Calls that go well before anything fails."""
    operations: tuple[Operation, ...] = ("read", "write", "probe", "delete")


class FaultyBackend(Backend):
    """Passes every call on to another backend, and does wrong what its config says."""

    def __init__(self, inner: Backend, config: FaultConfig) -> None:
        self._inner = inner
        self._config = config
        self._random = random.Random(config.seed)
        self._lock = threading.Lock()
        self._calls = 0
        self.capabilities = inner.capabilities

    def open(self, context: OpenContext) -> None:
        self._trouble("open")
        self._host = context.host
        self._inner.open(context)

    def read(self, batch: Batch) -> Sequence[Status]:
        active = self._trouble("read")
        statuses = list(self._inner.read(batch))
        if active:
            for number, status in enumerate(statuses):
                if status == Status.OK:
                    self._damage(int(batch.offsets[number]), int(batch.lengths[number]))
        return statuses

    def write(self, batch: Batch) -> Sequence[Status]:
        active = self._trouble("write")
        lost = np.array([active and self._draw(self._config.lost) for _ in range(len(batch))], np.bool_)
        statuses = [Status.OK] * len(batch)
        kept = np.flatnonzero(~lost)
        if len(kept):
            slots = None if batch.slots is None else batch.slots[kept]
            part = Batch(batch.keys[kept], batch.groups[kept], batch.offsets[kept], batch.lengths[kept], slots)
            for number, status in zip(kept.tolist(), self._inner.write(part), strict=True):
                statuses[number] = status
        return statuses

    def close(self) -> None:
        self._inner.close()

    def _draw(self, probability: float) -> bool:
        with self._lock:
            return probability > 0 and self._random.random() < probability

    def _trouble(self, operation: Operation) -> bool:
        """Do what goes wrong with a whole call; returns whether faults are on for it."""
        config = self._config
        with self._lock:
            self._calls += 1
            active = operation in config.operations and self._calls > config.after
        if not active:
            return False
        if self._draw(config.crash):
            os.abort()
        if self._draw(config.hang):
            threading.Event().wait()
        if self._draw(config.delay):
            time.sleep(config.delay_s)
        if self._draw(config.error):
            raise OSError(f"fault on purpose in {operation}")
        return True

    def _damage(self, offset: int, length: int) -> None:
        if self._draw(self._config.corrupt):
            with self._lock:
                # Of a seal's page only the head means anything, so flip a byte in front of it or in its head.
                at = offset + self._random.randrange(length - 4096 if length > 4096 else length)
                self._host[at] ^= 1 << self._random.randrange(8)
        if self._draw(self._config.short):
            half = length // 2
            self._host[offset + half : offset + length] = bytes(length - half)


class _Probing:
    _inner: Any
    _trouble: Callable[[Operation], bool]

    def probe(self, batch: Batch) -> int:
        self._trouble("probe")
        return int(self._inner.probe(batch))


class _Deleting:
    _inner: Any
    _trouble: Callable[[Operation], bool]

    def delete(self, batch: Batch) -> Sequence[Status]:
        self._trouble("delete")
        statuses: Sequence[Status] = self._inner.delete(batch)
        return statuses


class _Listing:
    _inner: Any
    _trouble: Callable[[Operation], bool]

    def list(self) -> Iterator[Listing]:
        self._trouble("list")
        yield from self._inner.list()


class _Recovering:
    _inner: Any

    def recover(self) -> Iterator[Recovered]:
        yield from self._inner.recover()


def wrap(backend: Backend, faults: Mapping[str, Any] | FaultConfig) -> Backend:
    """Put faults around a backend; the result has the same optional powers.

    Raises pydantic.ValidationError for a config that is not one.
    """
    config = faults if isinstance(faults, FaultConfig) else FaultConfig.model_validate(faults)
    bases: list[type] = [FaultyBackend]
    powers: tuple[tuple[type, type], ...] = (
        (SupportsProbe, _Probing),
        (SupportsDelete, _Deleting),
        (SupportsList, _Listing),
        (SupportsRecover, _Recovering),
    )
    bases += [mixin for power, mixin in powers if isinstance(backend, power)]
    made: Backend = type("FaultyBackend", tuple(bases), {})(backend, config)
    return made
