"""Duties of the optional powers: probe, delete, list, recovery."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from flexkv_core.backend import PAGE, SupportsRecover
from flexkv_core.testing.conformance.blocks import SMALLEST, StoredBlock
from flexkv_core.testing.conformance.duties_data import DataDuties
from flexkv_core.testing.conformance.opened import OK, Opened
from flexkv_core.testing.conformance.suite import Suite

TICK_S = 0.03
"""Longer than the coarsest clock by which file systems date files."""


class PowerDuties(Suite):
    """See the module's docstring."""

    # ------------------------------------------------------------------ probe

    def test_probe_counts_leading_blocks(self) -> None:
        """Exactly the leading ones: holes end the count, whatever is held behind them."""
        opened = self.begin("probe", addressing="key", power="probe")
        held, unknown = self.blocks(40), self.blocks(40)
        self._probes(opened, unknown, 0, "on an empty medium")
        self._probes(opened, [], 0, "without blocks")
        opened.store(held)
        self._probes(opened, held, 40, "all held")
        self._probes(opened, self.shuffled(held), 40, "all held, in another order")
        self._probes(opened, unknown, 0, "none held")
        self._probes(opened, [unknown[0], *held], 0, "all but the first held")
        for _ in range(12):
            at = self.random.randrange(40)
            self._probes(opened, [*held[:at], unknown[at], *held[at:]], at, f"all but number {at} held")
        self._probes(opened, [*held[:7], *unknown[:9], *held[7:]], 7, "a hole of nine")
        other = [StoredBlock(block.key, 1, block.length) for block in held]
        self._probes(opened, [*held[:3], other[3], *held[3:]], 3, "one of another group")
        opened.absent(unknown, "probe", "was only probed for")

    def test_probe_after_a_delete(self) -> None:
        opened = self.begin("probe", addressing="key", power="probe")
        if "delete" not in opened.tier.powers:
            pytest.skip("it has no power 'delete'")
        blocks = self.blocks(20)
        opened.store(blocks)
        opened.delete([blocks[5], blocks[11]])
        self._probes(opened, blocks, 5, "after numbers 5 and 11 were deleted")
        opened.store([blocks[5]])
        self._probes(opened, blocks, 11, "after number 5 was written again")

    def _probes(self, opened: Opened, blocks: list[StoredBlock], want: int, case: str) -> None:
        most = opened.tier.capabilities.max_batch_blocks
        got = opened.probe(blocks[:most])
        if got != min(want, most):
            self.broken("probe", f"{got} of {len(blocks[:most])} blocks, not {min(want, most)} ({case})", opened.tier)

    # ------------------------------------------------------------------ delete

    def test_delete_forgets_what_it_is_told_and_nothing_else(self) -> None:
        opened = self.begin("delete", addressing="key", power="delete")
        base = self.random.randbytes(31)
        blocks = [self.block(key=base + bytes([last]), group=group) for last in range(12) for group in (0, 1, 11)]
        blocks += [self.block(length) for length in (4 * PAGE, 64 * PAGE) for _ in range(3)]
        opened.store(blocks)
        gone = self.random.sample(blocks, 15)
        kept = [block for block in blocks if block not in gone]
        self._deletes(opened, [*gone, *self.blocks(3)])
        opened.absent(gone, "delete", "was deleted")
        opened.expect(kept, duty="delete", when=" after others were deleted")
        self._deletes(opened, self.shuffled(gone))
        opened.expect(kept, duty="delete", when=" after others were deleted twice")
        opened.store(gone)
        opened.expect(self.shuffled(blocks), when=" after deleted blocks were written again")

    def test_delete_holds_across_a_restart(self) -> None:
        opened = self.begin("delete", addressing="key", power="delete", persistent=True)
        blocks = self.blocks(20)
        opened.store(blocks)
        self._deletes(opened, blocks[:10])
        opened = self.reopen(opened)
        opened.absent(blocks[:10], "delete", "was deleted before a restart")
        opened.expect(blocks[10:], duty="persistence", when=" after a restart")

    def _deletes(self, opened: Opened, blocks: list[StoredBlock]) -> None:
        for block, status in zip(blocks, opened.delete(blocks), strict=True):
            if status != OK:
                self.broken("delete", f"answered {status.name}, also what is not there is OK: {block}", opened.tier)

    # ------------------------------------------------------------------ list

    def test_list_is_what_is_held(self) -> None:
        """Nothing left out, nothing twice, lengths as written; also after misses, rewrites, deletes, restarts."""
        opened = self.begin("list", addressing="key", power="list")
        self._lists(opened, "on an empty medium")
        keys = [self.random.randbytes(32) for _ in range(20)] + [bytes(32), b"\xff" * 32, b"a" * 30 + b"\x00\x00"]
        lengths = (SMALLEST, 3 * PAGE, 40 * PAGE)
        blocks = [self.block(lengths[n % 3], key=key, group=g) for n, key in enumerate(keys) for g in (0, 1, 200)]
        blocks += self.blocks(self.many)
        opened.store(self.shuffled(blocks))
        self._lists(opened, "after writes")
        opened.read(self.blocks(5))
        if "probe" in opened.tier.powers:
            opened.probe(self.blocks(5))
        self._lists(opened, "after misses")
        opened.store(blocks[:9])
        self._lists(opened, "after the same blocks were written again")
        if "delete" in opened.tier.powers:
            opened.delete([*self.random.sample(blocks, 30), *self.blocks(2)])
            self._lists(opened, "after deletes")
        if opened.tier.capabilities.persistent:
            opened = self.reopen(opened)
            self._lists(opened, "after a restart")

    def test_list_starts_with_the_least_recently_written(self) -> None:
        if not self.ordered_listing:
            pytest.skip("it does not claim an order: ordered_listing = False")
        opened = self.begin("list", addressing="key", power="list")
        blocks = self.blocks(8)
        for block in blocks:
            opened.store([block])
            time.sleep(TICK_S)
        opened.expect(blocks[:3])
        for again in range(2):
            got = [key for key, _, _ in opened.listing()]
            if got != [block.key for block in blocks]:
                order = [[block.key for block in blocks].index(key) for key in got]
                self.broken("list", f"blocks written in the order 0 to 7 are listed as {order}", opened.tier)
            if again == 0 and opened.tier.capabilities.persistent:
                opened = self.reopen(opened)

    def _lists(self, opened: Opened, when: str) -> None:
        got = Counter(opened.listing())
        want = Counter((block.key, block.group, block.length) for block in opened.held.values())
        for (key, group, length), count in got.items():
            here = f"(key {key.hex()}, group {group}, {length} bytes)"
            if count > 1:
                self.broken("list", f"a block is listed {count} times {when}: {here}", opened.tier)
            if (key, group, length) not in want:
                held = opened.held.get((key, group))
                what = f"it has {held.length} bytes" if held else "it is not held"
                self.broken("list", f"listed {when}, but {what}: {here}", opened.tier)
        left_out = want - got
        if left_out:
            key, group, length = next(iter(left_out))
            self.broken(
                "list",
                f"{len(left_out)} of {len(want)} blocks are left out {when}, such as (key {key.hex()}, group {group}, "
                f"{length} bytes)",
                opened.tier,
            )


class RecoveryDuties(DataDuties):
    """Recovery has no place on the tier's wire yet, so it is asked of a backend in this process."""

    def test_recovery_finds_what_survived(self) -> None:
        self.duty = "recovery"
        if self.spec.addressing != "slot":
            pytest.skip("for slot-addressed backends")
        opened = self.begin("recovery", persistent=True)
        blocks = [self.block(length, group=n % 3) for n, length in enumerate((SMALLEST, 3 * PAGE, 16 * PAGE) * 8)]
        opened.store(self.shuffled(blocks))
        reused = [StoredBlock(self.random.randbytes(32), 0, each.length, each.slot) for each in blocks[:5]]
        opened.store(reused)
        want = {block.slot: block for block in [*blocks[5:], *reused]}
        self.close(opened)
        backend = self.in_process(memoryview(bytearray(self.region_bytes)))
        if not isinstance(backend, SupportsRecover):
            self.close_in_process(backend)
            pytest.skip("it has no power 'recover'")
        pieces = self._within("recover", lambda: list(backend.recover()))
        found: dict[int, tuple[bytes, int, int]] = {}
        for piece in pieces:
            count = len(piece.groups)
            for name, shape in (("namespaces", (count, 32)), ("keys", (count, 32)), ("parents", (count, 32))):
                if np.shape(getattr(piece, name)) != shape:
                    self.broken("recovery", f"{name} of {count} blocks have shape {np.shape(getattr(piece, name))}")
            for name in ("depths", "lengths", "slots"):
                if np.shape(getattr(piece, name)) != (count,):
                    self.broken("recovery", f"{name} of {count} blocks have shape {np.shape(getattr(piece, name))}")
            for row, slot in enumerate(piece.slots.tolist()):
                if slot in found:
                    self.broken("recovery", f"slot {slot} is returned twice")
                found[slot] = (piece.keys[row].tobytes(), int(piece.groups[row]), int(piece.lengths[row]))
        self.close_in_process(backend)
        for slot, block in want.items():
            if found.get(slot) != (block.key, block.group, block.length):
                self.broken("recovery", f"slot {slot} holds {block}, it says {found.get(slot)}")
        extra = set(found) - set(want)
        if extra:
            self.broken("recovery", f"slot {min(extra)} is returned, but nothing was written there")
