"""An opened backend as the duties see it: whole sets of blocks in and out, every call watched.

Cuts sets into batches, places them between guard bytes, scrambles what was written, and compares the whole host
region after each call. Says which duty is broken through `Suite.broken`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from flexkv_core.backend import Batch, Status
from flexkv_core.testing.conformance.blocks import (
    Bytes,
    Host,
    StoredBlock,
    batch_of,
    content,
    difference,
    verified,
)
from flexkv_core.testing.conformance.tier import DiedError, ListingFailedError, Tier

if TYPE_CHECKING:
    from flexkv_core.testing.conformance.suite import Suite
    from flexkv_core.tier_link import Operation

OK, MISSING, FAILED = Status.OK, Status.MISSING, Status.FAILED


@dataclass(slots=True)
class Answer:
    """What a read brought: `data` is what was in the block's place afterwards."""

    block: StoredBlock
    status: Status
    data: Bytes


class Opened:
    """A tier, the host region and the blocks that it should hold. One thread."""

    def __init__(self, suite: Suite, tier: Tier, host: Host) -> None:
        self.suite, self.tier, self.host = suite, tier, host
        self.held: dict[tuple[bytes, int], StoredBlock] = {}
        self.by_slot = tier.capabilities.addressing == "slot"
        self.random = random.Random(suite.seed ^ 0x5EED)

    # ------------------------------------------------------------------ calls

    def batches(self, blocks: Sequence[StoredBlock], most: int | None = None) -> Iterator[list[StoredBlock]]:
        """In pieces that the backend and the host region take."""
        most = most or self.tier.capabilities.max_batch_blocks
        piece: list[StoredBlock] = []
        room = self.host.region.size // 2
        for block in blocks:
            if piece and (len(piece) == most or sum(each.length + 12288 for each in piece) + block.length > room):
                yield piece
                piece = []
            piece.append(block)
        if piece:
            yield piece

    def place(self, blocks: Sequence[StoredBlock]) -> Batch:
        """A batch with places in the host region."""
        return batch_of(blocks, self.host.place([block.length for block in blocks], self.random), slots=self.by_slot)

    def write(self, blocks: Sequence[StoredBlock], most: int | None = None) -> list[Status]:
        """Write; remember what was answered OK. The source is scrambled after each call."""
        statuses: list[Status] = []
        for piece in self.batches(blocks, most):
            batch = self.place(piece)
            for block, offset in zip(piece, batch.offsets.tolist(), strict=True):
                self.host.put(offset, content(block))
            found = self._call("write", batch)
            places = list(zip(piece, batch.offsets.tolist(), strict=True))
            changed = [block for block, offset in places if self.host.differs(offset, block.length)]
            for block, offset in places:  # at once: it is not to be looked at after the call has returned
                self.host.scramble(offset, block.length)
            if changed:
                self.suite.broken("only-what-was-asked", f"a write changed its source: {changed[0]}", self.tier)
            self.guard("write", piece)
            self.held |= {block.name: block for block, status in zip(piece, found, strict=True) if status == OK}
            statuses += found
        return statuses

    def read(self, blocks: Sequence[StoredBlock], most: int | None = None) -> list[Answer]:
        """Read into scrambled places."""
        answers: list[Answer] = []
        for piece in self.batches(blocks, most):
            batch = self.place(piece)
            for block, offset in zip(piece, batch.offsets.tolist(), strict=True):
                self.host.scramble(offset, block.length)
            found = self._call("read", batch)
            for block, offset, status in zip(piece, batch.offsets.tolist(), found, strict=True):
                answers.append(Answer(block, status, self.host.take(offset, block.length)))
            self.guard("read", piece)
        return answers

    def delete(self, blocks: Sequence[StoredBlock]) -> list[Status]:
        statuses: list[Status] = []
        for piece in self.batches(blocks):
            found = self._call("delete", self._bare(piece))
            self.guard("delete", piece)
            for block, status in zip(piece, found, strict=True):
                if status == OK:
                    self.held.pop(block.name, None)
            statuses += found
        return statuses

    def probe(self, blocks: Sequence[StoredBlock]) -> int:
        try:
            count = self.tier.probe(self._bare(blocks))
        except (DiedError, TimeoutError) as error:
            self._died("probe", error)
        self.guard("probe", blocks)
        return count

    def listing(self) -> list[tuple[bytes, int, int]]:
        """(key, group, length) of what the backend says it holds, in its order."""
        try:
            found = self.tier.listing()
        except (DiedError, TimeoutError) as error:
            self._died("list", error)
        except ListingFailedError:
            self.suite.broken("list", "it raised while listing", self.tier)
        self.guard("list", [])
        rows = np.ascontiguousarray(found.keys).tobytes()
        keys = [rows[at : at + 32] for at in range(0, len(rows), 32)]
        return list(zip(keys, found.groups.tolist(), found.lengths.tolist(), strict=True))

    def _bare(self, blocks: Sequence[StoredBlock]) -> Batch:
        """A batch for probe and delete: no offsets, no lengths."""
        batch = batch_of(blocks, np.zeros(len(blocks), np.int64), slots=self.by_slot)
        return Batch(batch.keys, batch.groups, batch.offsets, np.zeros(len(blocks), np.int64), batch.slots)

    def _call(self, operation: Operation, batch: Batch) -> list[Status]:
        try:
            return [Status(status) for status in self.tier.call(operation, batch).tolist()]
        except (DiedError, TimeoutError) as error:
            self._died(f"{operation} of {len(batch)} blocks", error)

    def _died(self, doing: str, error: Exception) -> NoReturn:
        self.suite.broken(self.suite.duty, f"during a {doing}: {error or 'no answer came'}", self.tier)

    def guard(self, operation: str, blocks: Sequence[StoredBlock]) -> None:
        """Nothing of the host region has changed but what was asked for, and every call was answered once."""
        if self.tier.unexpected_answers:
            self.suite.broken("submit", "done was called a second time for one batch", self.tier)
        at = self.host.touched()
        if at is None:
            return
        self.host.forgive()
        sizes = sorted({block.length for block in blocks})
        self.suite.broken(
            "only-what-was-asked",
            f"byte {at} of the host region changed by the time a {operation} of {len(blocks)} blocks (lengths {sizes}) "
            f"had returned, and no block of it lies there to be read into",
            self.tier,
        )

    # ------------------------------------------------------------------ what is expected

    def store(self, blocks: Sequence[StoredBlock], most: int | None = None) -> None:
        """Write to a medium with room: all OK, or the duty under test is broken."""
        statuses = self.write(blocks, most)
        for block, status in zip(blocks, statuses, strict=True):
            if status != OK:
                self.suite.broken(
                    self.suite.duty, f"a write to a medium with room was answered {status.name}: {block}", self.tier
                )

    def expect(self, blocks: Sequence[StoredBlock], duty: str = "", when: str = "", most: int | None = None) -> None:
        """All are read OK and are what was written."""
        for answer in self.read(blocks, most):
            if answer.status != OK:
                self.suite.broken(
                    duty or "statuses",
                    f"a block whose write was answered OK is read as {answer.status.name}{when}: {answer.block}",
                    self.tier,
                )
            self.right(answer, duty or "identity", when)

    def right(self, answer: Answer, duty: str, when: str = "") -> None:
        """An OK comes with the bytes that were written."""
        wrong = difference(answer.block, answer.data, self.held.values())
        if wrong:
            self.suite.broken(duty, f"a read is answered OK with wrong bytes{when}: {answer.block}: {wrong}", self.tier)

    def absent(self, blocks: Sequence[StoredBlock], duty: str, why: str) -> None:
        """Key-addressed: all are MISSING."""
        for answer in self.read(blocks):
            if answer.status != MISSING:
                self.suite.broken(
                    duty, f"a read of a block that {why} is answered {answer.status.name}: {answer.block}", self.tier
                )

    def safe(self, blocks: Sequence[StoredBlock], duty: str, when: str = "") -> list[Status]:
        """Whatever is answered, nobody is served wrong bytes. What a slot holds is the seal's business."""
        answers = self.read(blocks)
        for answer in answers:
            if answer.status == OK and self.by_slot:
                if verified(answer.block, answer.data):
                    self.right(answer, duty, when)
            elif answer.status == OK:
                self.right(answer, duty, when)
        return [answer.status for answer in answers]
