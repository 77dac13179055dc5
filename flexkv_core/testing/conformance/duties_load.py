"""Duties under load: concurrency, throughput, leaks."""

from __future__ import annotations

import gc
import os
import random
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

import flexkv_core
from flexkv_core.backend import PAGE, Batch, Status
from flexkv_core.testing.conformance.blocks import SMALLEST, StoredBlock, batch_of, content, difference
from flexkv_core.testing.conformance.duties_data import DataDuties, call_of
from flexkv_core.testing.conformance.opened import MISSING, OK, Opened
from flexkv_core.testing.conformance.tier import descriptors, session_members, shared_memory, threads
from flexkv_core.tier_link import Operation

Call = Callable[[str, Batch], Any]
MAX_THREADS = 16
_STDLIB = sysconfig.get_path("stdlib")
_NOT_TRACED = (str(Path(flexkv_core.__file__).parent), _STDLIB, "<frozen")
LENGTHS = (*[SMALLEST] * 8, 3 * PAGE, 3 * PAGE, 16 * PAGE)
MOST = 32
"""Blocks of one thread: enough for calls long enough to overlap."""


class _WrongError(Exception):
    """What a worker found."""


class _Worker:
    """One thread's blocks, and its part of the host region."""

    def __init__(
        self, blocks: list[StoredBlock], call: Call, host: npt.NDArray[np.uint8], start: int, seed: int
    ) -> None:
        self.blocks, self.call, self.host, self.start = blocks, call, host, start
        self.random = random.Random(seed)
        self.held: set[StoredBlock] = set()
        self.expected = {block: content(block) for block in blocks}
        self.by_slot = False
        self.interrupted = False
        self.error: Exception | None = None

    def run(self, steps: int, operations: tuple[str, ...]) -> None:
        if self.interrupted:
            sys.settrace(self._trace)
        try:
            for _ in range(steps):
                chosen = self.random.sample(self.blocks, self.random.randint(1, len(self.blocks)))
                getattr(self, self.random.choice(operations))(chosen)
            self.read(self.blocks)
            self.storm(4 * steps)
        except Exception as error:
            self.error = error

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        """Now and then, between two lines of the backend's own Python, the other threads run."""
        if event == "line" and self.random.random() < 1 / 16:
            time.sleep(1e-6)
        file = frame.f_code.co_filename
        return None if file.startswith(_NOT_TRACED) and "-packages" not in file[len(_STDLIB) :] else self._trace

    def storm(self, rounds: int) -> None:
        """Nothing but calls, one upon the other, so that they overlap; now and then a write of what is there."""
        self.write(self.blocks)
        batch = self._batch(self.blocks)
        place = self.host[self.start : self.start + int(batch.lengths.sum())]
        expected = np.concatenate([self.expected[block] for block in self.blocks])
        for number in range(rounds):
            if number % 8 == 7:
                place[:] = expected
                self.call("write", batch)
            place[:] = 0xA5
            if any(status != OK for status in self.call("read", batch)) or not np.array_equal(place, expected):
                self.read(self.blocks)
                raise _WrongError("a batch of blocks whose writes were answered OK was read wrong or not at all, once")

    def _batch(self, blocks: list[StoredBlock]) -> Batch:
        offsets = self.start + np.cumsum([0, *(block.length for block in blocks[:-1])], dtype=np.int64)
        return batch_of(blocks, offsets, slots=self.by_slot)

    def write(self, blocks: list[StoredBlock]) -> None:
        batch = self._batch(blocks)
        for block, at in zip(blocks, batch.offsets.tolist(), strict=True):
            self.host[at : at + block.length] = self.expected[block]
        for block, status in zip(blocks, self.call("write", batch), strict=True):
            if status != OK:
                raise _WrongError(f"a write to a medium with room was answered {Status(status).name}: {block}")
            self.held.add(block)

    def read(self, blocks: list[StoredBlock]) -> None:
        batch = self._batch(blocks)
        self.host[self.start : self.start + int(batch.lengths.sum())] = 0xA5
        for block, at, status in zip(blocks, batch.offsets.tolist(), self.call("read", batch), strict=True):
            if block in self.held:
                place = self.host[at : at + block.length]
                if status == OK and np.array_equal(place, self.expected[block]):
                    continue
                wrong = difference(block, place) if status == OK else Status(status).name
                if wrong:
                    raise _WrongError(f"a block whose write was answered OK is read as {wrong}: {block}")
            elif not self.by_slot and status != MISSING:
                raise _WrongError(f"a block that is not held is read as {Status(status).name}: {block}")

    def delete(self, blocks: list[StoredBlock]) -> None:
        for block, status in zip(blocks, self.call("delete", self._batch(blocks)), strict=True):
            if status != OK:
                raise _WrongError(f"a delete is answered {Status(status).name}: {block}")
            self.held.discard(block)

    def probe(self, blocks: list[StoredBlock]) -> None:
        want = [*(block in self.held for block in blocks), False].index(False)
        if (got := self.call("probe", self._batch(blocks))) != want:
            raise _WrongError(f"a probe of {len(blocks)} blocks, {want} leading ones of them held, says {got}")


@contextmanager
def _switching_often() -> Iterator[None]:
    """Have Python change threads at every opportunity: races of Python code show in a second, not in a month."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class LoadDuties(DataDuties):
    """See the module's docstring."""

    # ------------------------------------------------------------------ concurrency

    def test_concurrency_in_its_own_process(self) -> None:
        """Threads that write, read, delete and probe blocks of their own, all at a time."""
        opened = self.begin("concurrency")
        tier = opened.tier

        def call(operation: str, batch: Batch) -> Any:
            return tier.probe(batch) if operation == "probe" else tier.call(operation, batch)  # type: ignore[arg-type]

        self._stress(
            call,
            tier.capabilities.concurrency,
            opened.host.view,
            tier.powers,
            40,
            tier.capabilities.max_batch_blocks,
            opened,
        )

    def test_concurrency_with_threads_that_switch_often(self) -> None:
        """The same in this process, where Python is made to switch threads all the time, also between two lines."""
        self.duty = "concurrency"
        host = np.zeros(self.region_bytes, np.uint8)
        backend = self.in_process(memoryview(host))  # type: ignore[arg-type]
        powers = frozenset(name for name in ("probe", "delete") if hasattr(backend, name))
        with _switching_often():
            self._stress(
                lambda operation, batch: call_of(backend, operation, batch),
                backend.capabilities.concurrency,
                host,
                powers,
                40,
                backend.capabilities.max_batch_blocks,
                None,
            )
        self.close_in_process(backend)

    def _stress(
        self,
        call: Call,
        concurrency: int,
        host: npt.NDArray[np.uint8],
        powers: frozenset[str],
        steps: int,
        most: int,
        opened: Opened | None,
    ) -> None:
        count = min(concurrency, MAX_THREADS)
        operations = ("write", "write", "read", "read", *sorted(powers & {"delete", "probe"}))
        part = self.region_bytes // count // PAGE * PAGE
        most = max(1, min(MOST, part // (16 * PAGE), most, self.capacity // 2 // count // (16 * PAGE)))
        workers = []
        for number in range(count):
            blocks = [self.block(self.random.choice(LENGTHS), group=number % 3) for _ in range(most)]
            worker = _Worker(blocks, call, host, number * part, self.random.randrange(1 << 30))
            worker.by_slot = self.spec.addressing == "slot"
            worker.interrupted = opened is None
            workers.append(worker)
        rounds = steps * (10 if self.soak else 1)
        running = [threading.Thread(target=w.run, args=(rounds, operations), daemon=True) for w in workers]
        for thread in running:
            thread.start()
        until = time.monotonic() + self.deadline_s * 4
        for thread in running:
            thread.join(max(0.0, until - time.monotonic()))
        tier = opened.tier if opened else None
        for worker in workers:
            if isinstance(worker.error, _WrongError):
                self.broken("concurrency", f"with {count} calls at a time, {worker.error}", tier)
            if worker.error is not None:
                self.broken(
                    "concurrency", f"with {count} calls at a time, {type(worker.error).__name__}: {worker.error}", tier
                )
        if any(thread.is_alive() for thread in running):
            self.broken("concurrency", f"{count} calls at a time had not ended after {4 * self.deadline_s:g} s", tier)

    # ------------------------------------------------------------------ throughput

    def test_throughput(self, record_property: Callable[[str, object], None]) -> None:
        """Printed (pytest -s or -rP); nothing is asked of the figures."""
        opened = self.begin("throughput")
        tier, size = opened.tier, min(1 << 20, self.largest)
        count = max(1, min(self.region_bytes // 2, self.capacity // 2) // (size + 4 * PAGE))
        blocks = self.blocks(count, size)
        batch = opened.place(blocks)
        for block, offset in zip(blocks, batch.offsets.tolist(), strict=True):
            opened.host.put(offset, content(block))
        most = min(tier.capabilities.max_batch_blocks, max(1, count // tier.capabilities.concurrency))
        pieces = [_part(batch, slice(at, at + most)) for at in range(0, count, most)]
        figures: dict[str, float] = {}
        operations: tuple[Operation, ...] = ("write", "read")
        for operation in operations:
            begun = time.perf_counter()
            answers = tier.settle([tier.begin(operation, piece) for piece in pieces])
            figures[operation] = count * size / 1e6 / max(time.perf_counter() - begun, 1e-9)
            if not all((answer == OK).all() for answer in answers):
                self.broken("throughput", f"a {operation} was not answered OK: {tier.last_error or ''}", tier)
            if operation == "write":
                for block, offset in zip(blocks, batch.offsets.tolist(), strict=True):
                    opened.host.scramble(offset, block.length)
        for block, offset in zip(blocks, batch.offsets.tolist(), strict=True):
            wrong = difference(block, opened.host.view[offset : offset + block.length])
            if wrong:
                self.broken("throughput", f"a read is answered OK with wrong bytes: {block}: {wrong}", tier)
        reference = self.medium_throughput(self.directory)
        beside = f"; the medium itself {reference[0]:.0f} and {reference[1]:.0f}" if reference else ""
        line = f"{self.backend}: {figures['write']:.0f} MB/s written, {figures['read']:.0f} MB/s read{beside}"
        print(f"throughput of {line} ({count} blocks of {size} bytes)")
        record_property("throughput", line)

    # ------------------------------------------------------------------ leaks

    def test_leaks_while_it_is_open(self) -> None:
        """Rounds of everything that goes well and everything that does not; counted after some, and after more."""
        opened = self.begin("leaks")
        blocks = [self.block(length) for length in (SMALLEST, 16 * PAGE) for _ in range(4)]
        rounds = 12

        def one_round() -> None:
            opened.store(blocks)
            opened.expect(blocks)
            if not opened.by_slot:
                opened.read(self.blocks(2))
                opened.read([StoredBlock(block.key, block.group, block.length + PAGE) for block in blocks])
            if "probe" in opened.tier.powers:
                opened.probe([*blocks, *self.blocks(1)])
            if "list" in opened.tier.powers:
                opened.listing()
            if "delete" in opened.tier.powers:
                opened.delete([*blocks[:3], *self.blocks(1)])

        pid = opened.tier.pid
        for _ in range(2):
            busy = [opened.tier.begin("read", opened.place(blocks[:1])) for _ in range(MAX_THREADS)]
            opened.tier.settle(busy)
            opened.host.forgive()
            one_round()
        before = len(descriptors(pid)), threads(pid), len(session_members(pid))
        for _ in range(rounds):
            one_round()
        after = len(descriptors(pid)), threads(pid), len(session_members(pid))
        for what, had, has in zip(("file descriptors", "threads", "processes"), before, after, strict=True):
            if has - had > rounds // 3:
                last = f": {', '.join(descriptors(pid)[-3:])}" if what == "file descriptors" else ""
                self.broken("leaks", f"{rounds} rounds of calls left {has - had} more {what}{last}", opened.tier)

    def test_leaks_after_close(self) -> None:
        """Opened and closed in this process again and again; and nothing outlives the tier's own process."""
        self.duty = "leaks"
        shared = shared_memory()
        opened = self.begin("leaks")
        opened.store(self.blocks(3))
        pid = opened.tier.pid
        self.close(opened)
        if left := session_members(pid):
            self.broken("leaks", f"processes {left} outlive the closed backend")
        counts, cycles = [], 5
        for cycle in range(cycles + 1):
            backend = self.in_process(memoryview(bytearray(4 * SMALLEST)))
            self.close_in_process(backend)
            del backend
            gc.collect()
            if cycle in (0, cycles):
                time.sleep(0.05)
                counts.append((len(descriptors(os.getpid())), threading.active_count()))
        for what, had, has in zip(("file descriptors", "threads"), *counts, strict=True):
            if has - had >= cycles - 1:
                self.broken("leaks", f"{cycles} times opened and closed, {has - had} more {what} are left")
        if mine := {name for name in shared_memory() - shared if self.backend in name}:
            self.broken("leaks", f"shared memory is left after close: {sorted(mine)}")


def _part(batch: Batch, rows: slice) -> Batch:
    slots = None if batch.slots is None else batch.slots[rows]
    return Batch(batch.keys[rows], batch.groups[rows], batch.offsets[rows], batch.lengths[rows], slots)
