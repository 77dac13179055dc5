"""Duties about a backend's life: persistence, close, open-twice."""

from __future__ import annotations

import pytest

from flexkv_core.backend import PAGE, Batch
from flexkv_core.testing.conformance.blocks import SMALLEST, StoredBlock, content
from flexkv_core.testing.conformance.opened import OK, Opened
from flexkv_core.testing.conformance.suite import Suite
from flexkv_core.testing.conformance.tier import DiedError, RefusedError
from flexkv_core.tier_link import Operation


class LifeDuties(Suite):
    """See the module's docstring."""

    # ------------------------------------------------------------------ persistence

    def test_persistence(self) -> None:
        """Closed and opened again, several times, with more written in between."""
        opened = self.begin("persistence", persistent=True)
        for life in range(3):
            opened.store([self.block(length) for length in (SMALLEST, 3 * PAGE, 33 * PAGE) for _ in range(12)])
            opened.store(self.blocks(self.many // 3))
            opened = self.reopen(opened)
            held, when = list(opened.held.values()), f" after restart number {life + 1}"
            if "probe" in opened.tier.powers:
                some = held[: opened.tier.capabilities.max_batch_blocks]
                if (count := opened.probe(some)) != len(some):
                    self.broken("persistence", f"a probe of {len(some)} held blocks says {count}{when}", opened.tier)
            opened.expect(self.shuffled(held), duty="persistence", when=when)

    def test_a_restart_makes_nothing_wrong(self) -> None:
        """Persistent or not: what is served after a restart is right, and the rest is MISSING."""
        opened = self.begin("persistence")
        blocks = self.blocks(20, 3 * PAGE)
        opened.store(blocks)
        opened = self.reopen(opened)
        opened.safe(blocks, "persistence", " after a restart")
        more = self.blocks(10)
        opened.store(more)
        opened.expect(more, when=" after a restart")

    # ------------------------------------------------------------------ close

    def test_close_of_an_idle_backend(self) -> None:
        opened = self.begin("close")
        self.close(opened)
        opened = self.open()
        opened.store(self.blocks(4))
        self.close(opened)

    def test_close_with_calls_in_flight(self) -> None:
        """It returns promptly and without a crash; what was answered OK stays, what was not is not wrong."""
        opened = self.begin("close")
        for _ in range(3):
            held, sent = self._close_amid_calls(opened)
            opened = self.open()
            if opened.tier.capabilities.persistent:
                opened.expect(held, duty="close", when=" before close, and opened again")
            opened.safe(sent, "close", " after it was being written when close came")

    def _close_amid_calls(self, opened: Opened) -> tuple[list[StoredBlock], list[StoredBlock]]:
        """Returns blocks whose writes were answered OK, and all."""
        tier = opened.tier
        before = self.blocks(8, 16 * PAGE)
        opened.store(before)
        sent: list[StoredBlock] = []
        prepared: list[tuple[Operation, Batch]] = []
        for _ in range(2 * tier.capabilities.concurrency):
            blocks = [self.block(self.random.choice((SMALLEST, 16 * PAGE, 128 * PAGE))) for _ in range(2)]
            if sum(block.length for block in [*sent, *blocks]) > self.region_bytes // 4:
                break
            batch = opened.place(blocks[: tier.capabilities.max_batch_blocks])
            blocks = blocks[: len(batch)]
            for block, offset in zip(blocks, batch.offsets.tolist(), strict=True):
                opened.host.put(offset, content(block))
            prepared += [("write", batch), ("read", opened.place(before[:2][: len(batch)]))]
            sent += blocks
        calls = [tier.begin(operation, batch) for operation, batch in prepared]  # in one go, and close behind them
        self.close(opened)
        answers = [status for answer in tier.settle(calls)[::2] for status in answer.tolist()]
        return [block for block, status in zip(sent, answers, strict=True) if status == OK], sent

    # ------------------------------------------------------------------ open twice

    def test_open_twice(self) -> None:
        """In two processes: refused by the holder's name, or harmless."""
        first = self.begin("open-twice")
        blocks = self.blocks(12, 3 * PAGE)
        first.store(blocks)
        try:
            second = self.open(refused=True)
        except RefusedError as error:
            if self.exclusive and str(first.tier.pid) not in str(error):
                self.broken("open-twice", f"the refusal does not name the holder, process {first.tier.pid}: {error}")
            second = None
        if second is not None and self.exclusive:
            self.broken("open-twice", "it claims its medium for itself, and a second process opened it", second.tier)
        more = self.blocks(6)
        first.store(more)
        first.expect([*blocks, *more], duty="open-twice", when=" after a second process opened the same medium")
        if second is not None:
            second.safe([*blocks, *more], "open-twice", " by a second process on the same medium")
            if not second.by_slot:
                theirs = self.blocks(6)
                second.store(theirs)
                second.expect(theirs, duty="open-twice", when=" by a second process")
                first.safe(theirs, "open-twice", " written by a second process")
                first.expect([*blocks, *more], duty="open-twice", when=" after a second process wrote")
            self.close(second)
        try:
            self.close(first)
        except DiedError as error:
            pytest.fail(str(error))
        again = self.open()
        if again.tier.capabilities.persistent:
            again.expect([*blocks, *more], duty="open-twice", when=" after the medium was opened twice")
