"""Duties about bytes: answers, identity, batches, statuses, only-what-was-asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import pytest

from flexkv_core.backend import (
    PAGE,
    Backend,
    Batch,
    OpenContext,
    Status,
    SubmitOperation,
    SupportsDelete,
    SupportsList,
    SupportsProbe,
    SupportsSubmit,
    submit_and_wait,
)
from flexkv_core.testing.conformance.blocks import SMALLEST, Fill, StoredBlock, batch_of, content
from flexkv_core.testing.conformance.opened import FAILED, MISSING, OK, Opened
from flexkv_core.testing.conformance.suite import Suite
from flexkv_core.testing.conformance.tier import DiedError, within


def call_of(backend: Backend, operation: str, batch: Batch) -> Any:
    """Call a backend as the core would, and wait."""
    if isinstance(backend, SupportsSubmit) and operation in get_args(SubmitOperation):
        return submit_and_wait(backend, "read" if operation == "read" else "write", batch)
    return getattr(backend, operation)(batch)


class DataDuties(Suite):
    """See the module's docstring."""

    # ------------------------------------------------------------------ answers

    def in_process(self, host: memoryview) -> Backend:
        """The backend itself, opened in this process: for what the tier process would put right."""
        made: Backend = self.spec.factory(self.spec.config_model.model_validate(self.make_config(self.directory)))
        state = self.directory.with_name(self.directory.name + ".state")
        state.mkdir(mode=0o700, exist_ok=True)
        capacity = self.capacity if self.spec.addressing == "slot" else None
        context = OpenContext(host, (SMALLEST, 65536), capacity, logging.getLogger("flexkv.conformance"), state)
        self._within("open", lambda: made.open(context))
        return made

    def _within(self, doing: str, act: Callable[[], Any]) -> Any:
        try:
            return within(self.deadline_s, act)
        except DiedError as error:
            self.broken(self.duty, f"{doing}: {error}")
        except Exception as error:
            self.broken(self.duty, f"{doing} raised {type(error).__name__}: {error}")

    def close_in_process(self, backend: Backend) -> None:
        """Close a backend of this process; that it does not is a breach of "close", whichever duty is looked at."""
        try:
            within(self.close_deadline_s, backend.close)
        except DiedError:
            self.broken("close", f"close had not returned after {self.close_deadline_s:g} s")
        except Exception as error:
            self.broken("close", f"close raised {type(error).__name__}: {error}")

    def test_answers(self) -> None:
        """The backend itself, without the process around it: types and numbers of what it returns."""
        self.duty = "answers"
        host = memoryview(bytearray(64 * SMALLEST))
        backend = self.in_process(host)
        found = backend.capabilities
        if found.addressing != self.spec.addressing:
            self.broken("answers", f"its spec says {self.spec.addressing!r} addressing, its capabilities do not")
        if found.concurrency < 1 or found.max_batch_blocks < 1:
            self.broken("answers", f"capabilities that allow no call: {found}")
        blocks = self.blocks(min(5, found.max_batch_blocks))
        offsets = np.arange(len(blocks), dtype=np.int64) * SMALLEST
        batch = batch_of(blocks, offsets, slots=found.addressing == "slot")
        for offset, block in zip(offsets.tolist(), blocks, strict=True):
            host[offset : offset + block.length] = content(block).data
        self._statuses("write", self._within("write", lambda: call_of(backend, "write", batch)), len(blocks))
        self._statuses("read", self._within("read", lambda: call_of(backend, "read", batch)), len(blocks))
        bare = Batch(batch.keys, batch.groups, np.zeros_like(offsets), np.zeros_like(offsets), batch.slots)
        if isinstance(backend, SupportsProbe):
            count = self._within("probe", lambda: backend.probe(bare))
            if not isinstance(count, int | np.integer) or isinstance(count, bool) or not 0 <= count <= len(blocks):
                self.broken("answers", f"a probe of {len(blocks)} blocks returned {count!r}")
        if isinstance(backend, SupportsList):
            for piece in self._within("list", lambda: list(backend.list())):
                count = len(piece.groups)
                if np.shape(piece.keys) != (count, 32) or np.shape(piece.lengths) != (count,):
                    self.broken("answers", f"a listing of {count} groups has keys of shape {np.shape(piece.keys)}")
        if isinstance(backend, SupportsDelete):
            self._statuses("delete", self._within("delete", lambda: backend.delete(bare)), len(blocks))
        self.close_in_process(backend)

    def _statuses(self, operation: str, answer: Any, count: int) -> None:
        statuses = list(answer)
        if len(statuses) != count:
            self.broken("answers", f"a {operation} of {count} blocks returned {len(statuses)} statuses")
        wrong = [status for status in statuses if status not in tuple(Status)]
        if wrong:
            self.broken("answers", f"a {operation} returned {wrong[0]!r}, which is no Status")

    # ------------------------------------------------------------------ identity

    def test_identity_of_many_keys(self) -> None:
        """Many blocks, read twice, in other orders and batches than they were written in."""
        opened = self.begin("identity")
        sizes = (SMALLEST, SMALLEST, SMALLEST, 3 * PAGE, 16 * PAGE, 33 * PAGE)
        budget, blocks = self.capacity // 3, []
        for _ in range(self.many):
            length = self.random.choice(sizes)
            budget -= length
            if budget > 0:
                blocks.append(self.block(length, group=self.random.choice((0, 0, 0, 1, 2))))
        opened.store(blocks)
        opened.expect(self.shuffled(blocks))
        opened.expect(self.shuffled(blocks), when=" the second time", most=self.random.randint(1, 17))

    def test_identity_of_keys_that_differ_in_one_bit(self) -> None:
        opened = self.begin("identity")
        base = self.random.randbytes(32)
        keys = [base]
        for bit in range(256):
            near = bytearray(base)
            near[bit // 8] ^= 1 << (bit % 8)
            keys.append(bytes(near))
        blocks = [self.block(key=key) for key in keys]
        opened.store(self.shuffled(blocks))
        opened.expect(self.shuffled(blocks))

    def test_identity_of_keys_with_special_bytes(self) -> None:
        opened = self.begin("identity")
        tail = self.random.randbytes(16)
        keys = [bytes(32), b"\xff" * 32, b"/../" * 8, b"\r\n" * 16, b" " * 32, b"\x00" * 16 + tail, tail + b"\x00" * 16]
        keys += [bytes([0] * 31 + [1]), bytes([1] + [0] * 31), b"%s{}" * 8, "é".encode() * 16, b"aA" * 16, b"Aa" * 16]
        blocks = [self.block(key=key) for key in keys]
        opened.store(self.shuffled(blocks))
        opened.expect(self.shuffled(blocks))

    def test_identity_of_groups(self) -> None:
        """One key in many groups, and groups that do not all hold the same keys."""
        opened = self.begin("identity")
        groups = (0, 1, 2, 3, 9, 10, 11, 12, 99, 100, 127, 128, 129, 254, 255)
        keys = [self.random.randbytes(32) for _ in range(4)]
        blocks = [self.block(SMALLEST + PAGE * (group % 3), key=key, group=group) for key in keys for group in groups]
        if opened.by_slot:
            opened.store(self.shuffled(blocks))
            opened.expect(self.shuffled(blocks))
            return
        odd = [block for number, block in enumerate(blocks) if number % 2]
        opened.store(self.shuffled(odd))
        opened.absent([block for block in blocks if block not in odd], "identity", "was only written in other groups")
        opened.store([block for block in blocks if block not in odd])
        opened.expect(self.shuffled(blocks))

    def test_identity_of_contents(self) -> None:
        """Contents that compress, look like a protocol, or are the same under many keys."""
        opened = self.begin("identity")
        fills: tuple[Fill, ...] = ("zeros", "ones", "text", "random")
        lengths = (SMALLEST, 17 * PAGE, 64 * PAGE)
        blocks = [self.block(length, fill=fill) for fill in fills for length in lengths for _ in range(3)]
        opened.store(self.shuffled(blocks))
        opened.expect(self.shuffled(blocks))

    def test_identity_when_the_source_changes_at_once(self) -> None:
        """The place in the host region is used for something else as soon as a write has returned."""
        opened = self.begin("identity")
        blocks = [self.block(length) for length in (SMALLEST, 16 * PAGE, 64 * PAGE) for _ in range(6)]
        opened.store(self.shuffled(blocks), most=1)
        opened.expect(self.shuffled(blocks), when=", and its source changed as soon as the write had returned")

    def test_identity_after_a_rewrite(self) -> None:
        """The same content once more changes nothing; a slot that is used again holds what was written last."""
        opened = self.begin("identity")
        blocks = [self.block(length) for length in (SMALLEST, 5 * PAGE, 65 * PAGE) for _ in range(6)]
        opened.store(blocks)
        again = [StoredBlock(block.key, block.group, block.length, block.slot) for block in self.shuffled(blocks)[:12]]
        opened.store(again)
        opened.expect(self.shuffled(blocks), when=" after some were written again")
        if opened.by_slot:
            reused = [StoredBlock(self.random.randbytes(32), 1, block.length, block.slot) for block in again]
            opened.store(reused)
            opened.expect(reused, when=" after its slot was used again")
            opened.expect([block for block in blocks if block not in again], when=" after other slots were used again")

    # ------------------------------------------------------------------ batches

    def test_batches_of_every_size(self) -> None:
        """1, 2, 3 blocks, the largest batch, and what is left over."""
        opened = self.begin("batches")
        most = opened.tier.capabilities.max_batch_blocks
        room = min(most, self.capacity // 4 // SMALLEST, self.region_bytes // 4 // SMALLEST)
        for count in sorted({1, 2, 3, max(1, room // 2 + 1), max(1, room - 1), room}):
            if count <= most:
                blocks = self.blocks(count)
                opened.store(blocks)
                opened.expect(self.shuffled(blocks), duty="", when=f" in a batch of {count}")

    def test_batches_of_mixed_lengths(self) -> None:
        """From the smallest block to several MiB, in one batch where it fits."""
        opened = self.begin("batches")
        lengths = [SMALLEST, 3 * PAGE, 4 * PAGE, 5 * PAGE, 16 * PAGE, 17 * PAGE, 128 * PAGE, 257 * PAGE]
        lengths += [self.largest // 2 + PAGE, self.largest - PAGE, self.largest, SMALLEST]
        blocks = [self.block(length) for length in lengths]
        opened.store(self.shuffled(blocks))
        opened.expect(self.shuffled(blocks))
        opened.expect(blocks, most=1)

    # ------------------------------------------------------------------ statuses

    def test_statuses_of_what_is_not_held(self) -> None:
        """MISSING, also where only some blocks of a batch are held; the others come whole, in their order."""
        opened = self.begin("statuses", addressing="key")
        opened.absent(self.blocks(3), "statuses", "was never written")
        held, unknown = self.blocks(24), self.blocks(24)
        opened.store(held)
        patterns = [[held[0], unknown[0]], [unknown[0], held[0]], [unknown[1], held[1], unknown[2]], unknown[:5]]
        patterns += [self.shuffled([*held, *unknown])[: self.random.randint(2, 48)] for _ in range(6)]
        for pattern in patterns:
            self._in_order(opened, pattern, {block.name for block in held})

    def _in_order(self, opened: Opened, pattern: Sequence[StoredBlock], held: set[tuple[bytes, int]]) -> None:
        answers = opened.read(pattern)
        want = "".join("h" if block.name in held else "-" for block in pattern)
        got = "".join({OK: "h", MISSING: "-", FAILED: "F"}[answer.status] for answer in answers)
        if got != want:
            self.broken(
                "statuses", f"held (h) and unknown (-) blocks {want} were answered {got} (F: FAILED)", opened.tier
            )
        for answer in answers:
            if answer.status == OK:
                opened.right(answer, "identity")

    def test_statuses_of_another_length(self) -> None:
        """A block is asked for with another length than it has: never OK for what is not there."""
        opened = self.begin("statuses", addressing="key")
        blocks = [self.block(length) for length in (SMALLEST, 4 * PAGE, 64 * PAGE)]
        opened.store(blocks)
        for block in blocks:
            for length in (block.length + PAGE, 2 * block.length, block.length - PAGE, block.length // 2):
                if length < PAGE or length % PAGE:
                    continue
                (answer,) = opened.read([StoredBlock(block.key, block.group, length)])
                if answer.status != OK:
                    continue
                if length > block.length:
                    self.broken(
                        "statuses",
                        f"a read of {length} bytes is answered OK, but the block has fewer: {block}",
                        opened.tier,
                    )
                if not np.array_equal(answer.data, content(block)[:length]):
                    self.broken(
                        "statuses",
                        f"a read of {length} bytes is answered OK with bytes that are not of {block}",
                        opened.tier,
                    )
        opened.expect(blocks, when=" after reads with another length")

    # ------------------------------------------------------------------ only what was asked

    def test_only_what_was_asked_in_the_host_region(self) -> None:
        """Guard bytes around every block, through every kind of call, and a while after it has returned."""
        opened = self.begin("only-what-was-asked")
        blocks = [self.block(length) for length in (SMALLEST, 3 * PAGE, 16 * PAGE, 65 * PAGE, 256 * PAGE) for _ in "ab"]
        opened.store(blocks)
        if "probe" in opened.tier.powers:
            opened.probe(blocks)
        opened.expect(blocks, duty="")
        if not opened.by_slot:
            opened.read(self.shuffled([*blocks, *self.blocks(5, 5 * PAGE)]))
            for block in blocks:
                opened.read([StoredBlock(block.key, block.group, block.length - PAGE)])
        if "list" in opened.tier.powers:
            opened.listing()
        if "delete" in opened.tier.powers:
            opened.delete(blocks[:3])
        time.sleep(0.2)
        opened.guard("late", blocks)

    def test_only_what_was_asked_on_the_medium(self) -> None:
        """Neighbours in slots, or written in the same batch, keep what they have while others are written."""
        opened = self.begin("only-what-was-asked")
        blocks = [self.block(length) for length in (SMALLEST, 3 * PAGE, 7 * PAGE, 16 * PAGE) * 8]
        opened.store(self.shuffled(blocks))
        for _ in range(6):
            written = self.random.sample(blocks, 8)
            if opened.by_slot:
                blocks = [block for block in blocks if block not in written]
                written = [StoredBlock(self.random.randbytes(32), 0, each.length, each.slot) for each in written]
                blocks += written
            opened.store(written)
            opened.expect(self.shuffled(blocks), duty="only-what-was-asked", when=" after others were written")

    def test_a_power_is_not_claimed_in_vain(self) -> None:
        """Slot-addressed backends do not probe, delete or list: the core knows what lies where."""
        opened = self.begin("answers")
        if opened.by_slot and opened.tier.powers & {"probe", "delete", "list"}:
            pytest.fail(
                f'duty "answers" is broken: slot-addressed backends have no powers {sorted(opened.tier.powers)}'
            )
