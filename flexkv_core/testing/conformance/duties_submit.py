"""Duties of `submit`: done exactly once for each batch. All other duties go through it too, where a backend has it.

Asked of a backend in this process, since the tier process already ignores what it is told too often.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import cast

import numpy as np
import pytest

from flexkv_core.backend import Backend, Batch, Status, SubmitOperation, SupportsSubmit
from flexkv_core.testing.conformance.blocks import SMALLEST, StoredBlock, batch_of, content, difference
from flexkv_core.testing.conformance.duties_data import DataDuties

BATCHES = 24
AFTERWARDS_S = 0.2
"""For a `done` too many, or one that comes after close."""


class _Dones:
    """Counts what comes back of submitted batches."""

    def __init__(self, backend: SupportsSubmit) -> None:
        self._backend = backend
        self._changed = threading.Condition()
        self.answers: list[list[Sequence[Status]]] = []

    def submit(self, operation: SubmitOperation, batch: Batch) -> None:
        number = len(self.answers)
        self.answers.append([])

        def done(answer: Sequence[Status]) -> None:
            with self._changed:
                self.answers[number].append(answer)
                self._changed.notify_all()

        self._backend.submit(operation, batch, done)

    def wait(self, under_way: int, timeout_s: float) -> int:
        """Wait until at most so many are not done; returns how many are not."""
        with self._changed:
            self._changed.wait_for(lambda: self.answers.count([]) <= under_way, timeout_s)
            return self.answers.count([])

    @property
    def most(self) -> int:
        """The most often that one batch was done."""
        return max(map(len, self.answers), default=0)


class SubmitDuties(DataDuties):
    """See the module's docstring."""

    def _submitting(self, host: memoryview) -> Backend:
        self.duty = "submit"
        backend = self.in_process(host)
        if not isinstance(backend, SupportsSubmit):
            self.close_in_process(backend)
            pytest.skip("it has no power 'submit'")
        return backend

    def test_submit_is_done_once_for_each_batch(self) -> None:
        """As many batches under way as it allows: writes, reads of them, and of what is not there."""
        host = np.zeros(BATCHES * 4 * SMALLEST, np.uint8)
        backend = self._submitting(memoryview(host))  # type: ignore[arg-type]
        size, by_slot = min(4, backend.capabilities.max_batch_blocks), self.spec.addressing == "slot"
        held = [self.blocks(size) for _ in range(BATCHES)]
        starts = np.arange(BATCHES * 4, dtype=np.int64).reshape(BATCHES, 4) * SMALLEST
        batches = [batch_of(blocks, starts[at, :size], slots=by_slot) for at, blocks in enumerate(held)]
        for blocks, batch in zip(held, batches, strict=True):
            for block, offset in zip(blocks, batch.offsets.tolist(), strict=True):
                host[offset : offset + SMALLEST] = content(block)
        self._carry_out(backend, "write", batches)
        host[:] = 0xA5
        self._carry_out(backend, "read", batches)
        for blocks, batch in zip(held, batches, strict=True):
            for block, offset in zip(blocks, batch.offsets.tolist(), strict=True):
                if wrong := difference(block, host[offset : offset + SMALLEST]):
                    self.broken("submit", f"a read was done, and its bytes were not there: {block}: {wrong}")
        if not by_slot:
            absent = [batch_of(self.blocks(1), starts[at, :1], slots=False) for at in range(BATCHES)]
            self._carry_out(backend, "read", absent, Status.MISSING)
        self.close_in_process(backend)

    def _carry_out(
        self, backend: Backend, operation: SubmitOperation, batches: list[Batch], want: Status = Status.OK
    ) -> None:
        dones = _Dones(cast(SupportsSubmit, backend))
        for batch in batches:
            self._within("submit", partial(dones.submit, operation, batch))
            dones.wait(backend.capabilities.concurrency - 1, self.deadline_s)
        if left := dones.wait(0, self.deadline_s):
            self.broken("submit", f"{left} of {len(batches)} {operation}s were not done after {self.deadline_s:g} s")
        time.sleep(AFTERWARDS_S)
        if dones.most > 1:
            self.broken("submit", f"done was called {dones.most} times for one {operation}")
        for answers, batch in zip(dones.answers, batches, strict=True):
            self._statuses(operation, answers[0], len(batch))
            if any(status != want for status in answers[0]):
                self.broken("submit", f"a {operation} was answered {list(answers[0])}, not {want.name} for each block")

    def test_submit_with_batches_under_way_at_close(self) -> None:
        """Done or not when close returns: none twice, and nothing of them is touched afterwards."""
        host = np.zeros(64 * SMALLEST, np.uint8)
        backend = self._submitting(memoryview(host))  # type: ignore[arg-type]
        dones = _Dones(cast(SupportsSubmit, backend))
        by_slot = self.spec.addressing == "slot"
        sent: list[StoredBlock] = self.blocks(min(64, backend.capabilities.concurrency))
        for at, block in enumerate(sent):
            host[at * SMALLEST : (at + 1) * SMALLEST] = content(block)
            dones.submit("write", batch_of([block], np.array([at * SMALLEST], np.int64), slots=by_slot))
        self.close_in_process(backend)
        before = [len(answers) for answers in dones.answers]
        time.sleep(AFTERWARDS_S)
        if [len(answers) for answers in dones.answers] != before:
            self.broken("submit", "done was called after close had returned")
        if dones.most > 1:
            self.broken("submit", f"done was called {dones.most} times for one write that close found under way")
