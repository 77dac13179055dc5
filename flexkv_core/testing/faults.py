"""Faults on purpose: a decorator around any backend, also from a stack's `faults:` key.

What it can prove: that the core notices, counts and survives what storage does wrong. What it cannot: that a real
medium fails in these ways only. The nth call of an operation since the backend was opened draws from a generator of
its own, seeded by the config's seed, the operation and n: other operations and threads do not change what happens.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from flexkv_core.backend import (
    PAGE,
    Backend,
    Batch,
    Done,
    Listing,
    OpenContext,
    Recovered,
    Status,
    SubmitOperation,
    SupportsDelete,
    SupportsList,
    SupportsProbe,
    SupportsRecover,
    SupportsSubmit,
)

Probability = Annotated[float, Field(ge=0, le=1, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Operation = Literal["open", "read", "write", "probe", "delete", "list", "close"]


class FaultConfig(BaseModel):
    """What goes wrong, and how often.

    Attributes:
        seed: of all draws.
        error: probability a call: it raises.
        delay, delay_s: a call: it takes `delay_s` longer.
        rate: if given, bytes a second that reads and writes move at most, all together.
        hang: a call: it never returns.
        crash: a call: the process aborts.
        duplicate: a read, write or delete: its answer is sent twice (needs a tier process).
        miscount: a read, write or delete: it returns one status too many or too few.
        corrupt: a block: one bit of what was read is flipped.
        short: a block: only the first half is read, reported OK.
        stray: a block: reading it also changes the byte behind it in host memory, which belongs to another block.
            Nothing can tell the core; see "Shared memory" in docs/design.md.
        lost: a block: not written, reported OK.
        short_write: a block: only the first half is written, reported OK.
        after: calls since the backend was opened that go well before anything fails.
        before: if given, from this call on all goes well again.
        operations: which fail.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    error: Probability = 0.0
    delay: Probability = 0.0
    delay_s: Annotated[float, Field(ge=0, le=86400, strict=True)] = 0.1
    rate: Annotated[float, Field(gt=0, strict=True)] | None = None
    hang: Probability = 0.0
    crash: Probability = 0.0
    duplicate: Probability = 0.0
    miscount: Probability = 0.0
    corrupt: Probability = 0.0
    short: Probability = 0.0
    stray: Probability = 0.0
    lost: Probability = 0.0
    short_write: Probability = 0.0
    after: Count = 0
    before: Count | None = None
    operations: tuple[Operation, ...] = ("read", "write", "probe", "delete")


class _Dice:
    """The draws of one call; none where nothing fails (not `active`)."""

    def __init__(self, config: FaultConfig, name: str, *, active: bool) -> None:
        self._config = config
        self.active = active
        self._random = random.Random(name) if active else None

    def falls(self, fault: str) -> bool:
        """A fault happens. What has no probability draws nothing, so that adding a fault moves no other."""
        odds: float = getattr(self._config, fault)
        return self._random is not None and odds > 0 and self._random.random() < odds

    def falls_for(self, fault: str, blocks: int) -> npt.NDArray[np.bool_]:
        return np.array([self.falls(fault) for _ in range(blocks)], np.bool_)

    def below(self, stop: int) -> int:
        return self._random.randrange(stop) if self._random is not None else 0


class FaultyBackend(Backend):
    """Passes every call on to another backend, and does wrong what its config says."""

    def __init__(self, inner: Backend, config: FaultConfig) -> None:
        self._inner = inner
        self._config = config
        self._lock = threading.Lock()
        self._calls = itertools.count()
        self._counts: dict[Operation, int] = {}
        self._thread = threading.local()
        self._free_at = 0.0
        self.capabilities = inner.capabilities

    def open(self, context: OpenContext) -> None:
        self._trouble("open")
        self._host = context.host
        self._inner.open(context)

    def read(self, batch: Batch) -> Sequence[Status]:
        dice = self._trouble("read")
        time.sleep(self._turn(dice, batch))
        return self._after_read(dice, batch, self._inner.read(batch))

    def _after_read(self, dice: _Dice, batch: Batch, answer: Sequence[Status]) -> Sequence[Status]:
        """Damage what a read has brought."""
        statuses = list(answer)
        for status, offset, length in zip(statuses, batch.offsets.tolist(), batch.lengths.tolist(), strict=True):
            if status == Status.OK:
                self._damage(dice, offset, length)
        return self._miscounted(dice, statuses)

    def write(self, batch: Batch) -> Sequence[Status]:
        dice = self._trouble("write")
        time.sleep(self._turn(dice, batch))
        part, answer_of = self._before_write(dice, batch)
        return answer_of(self._inner.write(part) if len(part) else [])

    def _before_write(self, dice: _Dice, batch: Batch) -> tuple[Batch, Callable[[Sequence[Status]], Sequence[Status]]]:
        """What of a batch is to be written, and what makes the batch's answer of that of its part."""
        lost = dice.falls_for("lost", len(batch))
        half = dice.falls_for("short_write", len(batch))
        lengths = np.where(half, np.maximum(batch.lengths // 2 // PAGE * PAGE, PAGE), batch.lengths)
        kept = np.flatnonzero(~lost)
        slots = None if batch.slots is None else batch.slots[kept]
        part = Batch(batch.keys[kept], batch.groups[kept], batch.offsets[kept], lengths[kept], slots)

        def answer_of(answer: Sequence[Status]) -> Sequence[Status]:
            statuses = [Status.OK] * len(batch)
            for number, status in zip(kept.tolist(), answer, strict=True):
                statuses[number] = status
            return self._miscounted(dice, statuses)

        return part, answer_of

    def close(self) -> None:
        self._trouble("close")
        self._inner.close()

    def answers(self) -> int:
        """How often the tier process is to send the answer of the call that this thread ran last."""
        return int(getattr(self._thread, "answers", 1))

    def _trouble(self, operation: Operation) -> _Dice:
        """Do what goes wrong with a whole call; returns the draws for its blocks."""
        dice = self._dice(operation)
        self._thread.answers = 1
        if dice.falls("crash"):
            os.abort()
        if dice.falls("hang"):
            threading.Event().wait()
        if dice.falls("delay"):
            time.sleep(self._config.delay_s)
        if operation in ("read", "write", "delete") and dice.falls("duplicate"):
            self._thread.answers = 2
        if dice.falls("error"):
            raise OSError(f"fault on purpose in {operation}")
        return dice

    def _dice(self, operation: Operation) -> _Dice:
        """The draws of the next call."""
        config = self._config
        with self._lock:
            call = next(self._calls)
            count = self._counts[operation] = self._counts.get(operation, 0) + 1
        active = operation in config.operations and call >= config.after
        active = active and (config.before is None or call < config.before)
        return _Dice(config, f"{config.seed}/{operation}/{count}", active=active)

    def _turn(self, dice: _Dice, batch: Batch) -> float:
        """Seconds until a call of that many bytes has had its turn at `rate`."""
        if self._config.rate is None or not dice.active:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + int(batch.lengths.sum()) / self._config.rate
            return self._free_at - now

    def _damage(self, dice: _Dice, offset: int, length: int) -> None:
        if dice.falls("corrupt"):
            # Of a seal's page only the head means anything, so flip a bit in front of it or in its head.
            at = offset + dice.below(length - PAGE if length > PAGE else length)
            self._host[at] ^= 1 << dice.below(8)
        if dice.falls("short"):
            half = length // 2
            self._host[offset + half : offset + length] = bytes(length - half)
        if dice.falls("stray") and offset + length < len(self._host):
            self._host[offset + length] ^= 0xFF

    @staticmethod
    def _miscounted(dice: _Dice, statuses: Sequence[Status]) -> Sequence[Status]:
        if not dice.falls("miscount"):
            return statuses
        return [*statuses, Status.OK] if dice.below(2) else statuses[:-1]


class _Probing(FaultyBackend):
    _inner: Any

    def probe(self, batch: Batch) -> int:
        self._trouble("probe")
        return int(self._inner.probe(batch))


class _Deleting(FaultyBackend):
    _inner: Any

    def delete(self, batch: Batch) -> Sequence[Status]:
        dice = self._trouble("delete")
        return self._miscounted(dice, list(self._inner.delete(batch)))


class _Listing(FaultyBackend):
    _inner: Any

    def list(self) -> Iterator[Listing]:
        self._trouble("list")
        yield from self._inner.list()


class _Recovering(FaultyBackend):
    _inner: Any

    def recover(self) -> Iterator[Recovered]:
        yield from self._inner.recover()


class _Submitting(FaultyBackend):
    """The faults of reads and writes, where no thread waits: a call that hangs is never done, a delay delays `done`."""

    _inner: Any

    def submit(self, operation: SubmitOperation, batch: Batch, done: Done) -> None:
        dice = self._dice(operation)
        if dice.falls("crash"):
            os.abort()
        if dice.falls("hang"):
            return
        delay_s = self._config.delay_s if dice.falls("delay") else 0.0
        delay_s += self._turn(dice, batch)
        times = 2 if dice.falls("duplicate") else 1
        if dice.falls("error"):
            raise OSError(f"fault on purpose in {operation}")

        def tell(statuses: Sequence[Status]) -> None:
            for _ in range(times):
                done(statuses)

        def ended(answer: Sequence[Status], made: Callable[[Sequence[Status]], Sequence[Status]]) -> None:
            try:
                statuses = made(answer)
            except ValueError:  # another number of statuses than of blocks: for the worker to say
                statuses = answer
            if delay_s:
                timer = threading.Timer(delay_s, tell, (statuses,))
                timer.daemon = True
                timer.start()
            else:
                tell(statuses)

        if operation == "read":
            self._inner.submit("read", batch, lambda answer: ended(answer, partial(self._after_read, dice, batch)))
            return
        part, answer_of = self._before_write(dice, batch)
        if len(part):
            self._inner.submit("write", part, lambda answer: ended(answer, answer_of))
        else:
            ended([], answer_of)


def wrap(backend: Backend, faults: Mapping[str, Any] | FaultConfig) -> Backend:
    """Put faults around a backend; the result has the same optional powers.

    Raises pydantic.ValidationError for a config that is not one.
    """
    config = faults if isinstance(faults, FaultConfig) else FaultConfig.model_validate(faults)
    powers: tuple[tuple[type, type[FaultyBackend]], ...] = (
        (SupportsProbe, _Probing),
        (SupportsDelete, _Deleting),
        (SupportsList, _Listing),
        (SupportsRecover, _Recovering),
        (SupportsSubmit, _Submitting),
    )
    bases = [mixin for power, mixin in powers if isinstance(backend, power)]
    made: Backend = type("FaultyBackend", tuple(bases or [FaultyBackend]), {})(backend, config)
    return made
