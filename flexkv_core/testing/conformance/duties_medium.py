"""Duties about the medium: full, damaged, or taking a part of a write only."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from flexkv_core.backend import PAGE
from flexkv_core.testing.conformance.blocks import SMALLEST, Damage, StoredBlock, verified
from flexkv_core.testing.conformance.opened import FAILED, OK, Opened
from flexkv_core.testing.conformance.suite import Suite


class MediumDuties(Suite):
    """See the module's docstring."""

    # ------------------------------------------------------------------ full medium

    def test_full_medium(self) -> None:
        """Written to until it is full: FAILED from then on, nothing lost, and room again after deletes."""
        self.duty = "full-medium"
        config = self.make_full_config(self.directory)
        if config is None:
            pytest.skip("no small medium: make_full_config returns None")
        opened = self.open(config=config)
        blocks: list[StoredBlock] = []
        failed: list[StoredBlock] = []
        size = max(SMALLEST, self.full_bytes // 64 // PAGE * PAGE)
        while len(failed) < 8 and sum(block.length for block in blocks) < 4 * self.full_bytes:
            some = self.blocks(4, size)
            for block, status in zip(some, opened.write(some), strict=True):
                (blocks if status == OK else failed).append(block)
                if status not in (OK, FAILED):
                    self.broken("full-medium", f"a write is answered {status.name}: {block}", opened.tier)
        if not opened.tier.capabilities.shared:
            opened.expect(blocks, duty="full-medium", when=" after the medium was full")
        opened.safe([*blocks, *failed], "full-medium", " after the medium was full")
        if not failed:
            self.broken(
                "full-medium",
                f"{len(blocks)} writes of {size} bytes to a medium of {self.full_bytes} are answered OK",
                opened.tier,
            )
        if not blocks:
            self.broken("full-medium", "the empty medium takes nothing", opened.tier)
        claims_are_true(self, opened, failed, "full-medium")
        if "delete" in opened.tier.powers:
            statuses = opened.delete(blocks[: len(blocks) // 2])
            if FAILED in statuses:
                self.broken("full-medium", "on a full medium, a delete is answered FAILED", opened.tier)
            again = self.blocks(max(1, len(blocks) // 8), size)
            if OK not in opened.write(again):
                self.broken("full-medium", "half of all blocks were deleted, and still nothing is taken", opened.tier)
        if opened.tier.capabilities.persistent:
            opened = self.reopen(opened, config=config)
            opened.expect(
                list(opened.held.values()), duty="full-medium", when=" after the full medium was opened again"
            )

    # ------------------------------------------------------------------ short writes

    def test_short_writes(self) -> None:
        """The kernel takes a part of a write (RLIMIT_FSIZE): FAILED, not held; whole again afterwards."""
        opened = self.begin("short-writes")
        before = [self.block(length) for length in (SMALLEST, 5 * PAGE) for _ in range(3)]
        opened.store(before)
        failed: list[StoredBlock] = []
        pid, unlimited = opened.tier.pid, resource.prlimit(opened.tier.pid, resource.RLIMIT_FSIZE)
        for limit in (6 * PAGE + 1000, 20 * PAGE - 1, 30 * PAGE + 1):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, unlimited[1]))
            blocks = [self.block(length) for length in (SMALLEST, 8 * PAGE, 24 * PAGE, 40 * PAGE, 100 * PAGE)]
            statuses = opened.write(self.shuffled(blocks), most=self.random.choice((1, 5)))
            resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
            failed += [block for block in blocks if block.name not in opened.held]
            del statuses
        opened.expect(list(opened.held.values()), duty="short-writes", when=" after a short write")
        if not failed:
            pytest.skip("no write came out short: it does not write files")
        opened.safe(failed, "short-writes", " after a short write that was answered FAILED")
        claims_are_true(self, opened, failed, "short-writes")
        opened.store(failed)
        opened.expect(list(opened.held.values()), duty="short-writes", when=" once the medium took whole writes again")
        if opened.tier.capabilities.persistent:
            opened = self.reopen(opened)
            opened.expect(list(opened.held.values()), duty="short-writes", when=" after a restart")

    # ------------------------------------------------------------------ damage

    @pytest.mark.parametrize("how", ["flip", "truncate", "swap"])
    def test_damage(self, how: Damage) -> None:
        """Behind its back: whatever it answers, the seal tells, and others are served on."""
        opened = self.begin("damage")
        blocks = [self.block(length) for length in (SMALLEST, 4 * PAGE, 32 * PAGE) for _ in range(4)]
        opened.store(blocks)
        damaged, whole = blocks[::2], blocks[1::2]
        for number, block in enumerate(damaged):
            other = damaged[number ^ 1]
            if how == "swap" and number % 2:
                continue
            try:
                done = self.damage(
                    StoredBlock(block.key, block.group, block.length, block.slot, block.fill, other), how
                )
            except NotImplementedError:
                pytest.skip("damage is not given")
            if done is False:
                pytest.skip(f"this medium cannot suffer {how!r}")
        effect = self._damaged(opened, damaged, whole, how, "")
        if opened.tier.capabilities.persistent:
            self.close(opened)
            opened = self.open()
            effect |= self._damaged(opened, damaged, whole, how, " and a restart")
            if not effect:
                pytest.fail(f"damage({how!r}) has damaged nothing: all blocks are read whole, even after a restart")
        if "list" in opened.tier.powers:
            opened.listing()
        opened.store(damaged)
        opened.expect(blocks, duty="damage", when=" after damaged blocks were written again")

    def _damaged(
        self, opened: Opened, damaged: list[StoredBlock], whole: list[StoredBlock], how: str, when: str
    ) -> bool:
        effect = False
        for answer in opened.read(damaged):
            good = answer.status == OK and verified(answer.block, answer.data)
            effect |= not good
            if good:
                opened.right(answer, "damage", f" after {how}{when}")
            elif answer.status == OK and how == "truncate":
                self.broken(
                    "damage",
                    f"a block that was cut short on the medium is answered OK{when}: {answer.block}",
                    opened.tier,
                )
        opened.expect(whole, duty="damage", when=f" after others were damaged ({how}){when}")
        return effect


def claims_are_true(suite: Suite, opened: Opened, doubtful: list[StoredBlock], duty: str) -> None:
    """What probe or list say is held is read whole."""
    readable = {
        answer.block.name: answer.status == OK and verified(answer.block, answer.data)
        for answer in opened.read(doubtful)
    }
    if "probe" in opened.tier.powers:
        for block in doubtful:
            if opened.probe([block]) and not readable[block.name]:
                suite.broken(duty, f"probe claims a block that cannot be read: {block}", opened.tier)
    if "list" in opened.tier.powers:
        for key, group, length in opened.listing():
            if not readable.get((key, group), True):
                suite.broken(duty, f"list has a block that cannot be read: {key.hex()}, {group}, {length}", opened.tier)


def file_throughput(directory: Path, size: int = 32 << 20) -> tuple[float, float]:
    """MB/s of plain file I/O in a directory, for `medium_throughput`: one file, written and read in MiB pieces."""
    import time  # noqa: PLC0415

    path, piece = directory / "throughput.probe", os.urandom(1 << 20)
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size >> 20):
            file.write(piece)
    written, into = time.perf_counter() - begun, bytearray(1 << 20)
    begun = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(into):
            pass
    read = time.perf_counter() - begun
    path.unlink()
    return size / 1e6 / max(written, 1e-9), size / 1e6 / max(read, 1e-9)
