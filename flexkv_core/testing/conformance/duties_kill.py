"""The duty about kill -9: rounds of writing in a process that is killed at a seeded random time, then a look."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from concurrent.futures import Future

from flexkv_core.backend import PAGE, Batch
from flexkv_core.testing.conformance.blocks import SMALLEST, Slots, StoredBlock, content
from flexkv_core.testing.conformance.opened import OK, Opened
from flexkv_core.testing.conformance.suite import Suite
from flexkv_core.tier_link import Statuses

LENGTHS = (SMALLEST, SMALLEST, 16 * PAGE, 64 * PAGE, 256 * PAGE)


class KillDuties(Suite):
    """See the module's docstring."""

    def test_kill(self) -> None:
        """In half of the rounds the very answer of a write is followed by the kill, in the others a random wait.

        Blocks that were held before are written again meanwhile: they must stay.
        """
        opened = self.begin("kill")
        rounds = self.kill_rounds * (10 if self.soak else 1)
        for number in range(rounds):
            if number % 4 == 3 and opened.by_slot:  # its slots are used again
                self._slots = Slots(self.capacity)
                opened.held.clear()
            unanswered = self._write_until_killed(opened, at_once=number % 2 == 0)
            held = dict(opened.held)
            opened = self.open()
            opened.held = held
            when = f" after kill -9 number {number + 1}"
            if opened.tier.capabilities.persistent:
                opened.expect(self.shuffled(list(held.values())), duty="kill", when=when)
            else:
                opened.safe(list(held.values()), "kill", when)
                opened.held.clear()
            opened.safe(unanswered, "kill", f"{when}, which came while it was written")
            self._claims(opened, unanswered, when)

    def _write_until_killed(self, opened: Opened, *, at_once: bool) -> list[StoredBlock]:
        """Writes all the time, kills, notes what was answered OK. Returns the blocks of other writes."""
        tier, calls = opened.tier, list[tuple[list[StoredBlock], Future[Statuses]]]()
        wanted = self.random.randint(1, 4)
        answered = threading.Semaphore(0)
        count = [0]

        def on_answer(answer: Future[Statuses]) -> None:
            count[0] += 1
            if at_once and count[0] == wanted:  # on the loop, before anything else is heard of the process
                with contextlib.suppress(ProcessLookupError):
                    os.kill(tier.pid, signal.SIGKILL)
            answered.release()

        old = self.random.sample(list(opened.held.values()), min(4, len(opened.held)))
        room, prepared = self.region_bytes // 2, list[tuple[list[StoredBlock], Batch]]()
        for number in range(3 * wanted + 3 * tier.capabilities.concurrency):
            blocks = [
                self.block(self.random.choice(LENGTHS), group=number % 2) for _ in range(self.random.randint(1, 4))
            ]
            blocks = [*blocks, *old[:1]][: tier.capabilities.max_batch_blocks]
            old = old[1:]
            room -= sum(block.length + 3 * PAGE for block in blocks)
            if room < 0:
                break
            batch = opened.place(blocks)
            for block, offset in zip(blocks, batch.offsets.tolist(), strict=True):
                opened.host.put(offset, content(block))
            prepared.append((blocks, batch))
        for blocks, batch in prepared:  # in one go, so that the process always has more to do
            call = tier.begin("write", batch)
            calls.append((blocks, call))
            call.add_done_callback(on_answer)
        if not at_once:
            for _ in range(min(wanted, len(calls))):
                answered.acquire(timeout=self.deadline_s)
            time.sleep(self.random.uniform(0, 0.006))
        elif not _ends(calls[: wanted + 1], self.deadline_s):
            self.broken("kill", f"a write was not answered within {self.deadline_s:g} s", tier)
        tier.kill()
        unanswered: list[StoredBlock] = []
        for blocks, call in calls:
            for block, status in zip(blocks, call.result(self.deadline_s).tolist(), strict=True):
                if status == OK:
                    opened.held[block.name] = block
                elif block.name not in opened.held:
                    unanswered.append(block)
        return unanswered

    def _claims(self, opened: Opened, doubtful: list[StoredBlock], when: str) -> None:
        """What is claimed to be held after the kill can be read."""
        answers = opened.read(doubtful)
        readable = {answer.block.name for answer in answers if answer.status == OK}
        names = {block.name for block in doubtful}
        if "list" in opened.tier.powers:
            listed = opened.listing()
            for key, group, length in listed:
                if (key, group) in names and (key, group) not in readable:
                    self.broken("kill", f"list has a block of {length} bytes that cannot be read{when}", opened.tier)
            if opened.tier.capabilities.persistent:
                left_out = set(opened.held) - {(key, group) for key, group, _ in listed}
                if left_out:
                    self.broken("kill", f"list leaves out {len(left_out)} blocks that are held{when}", opened.tier)
        if "probe" in opened.tier.powers:
            for answer in answers:
                if opened.probe([answer.block]) and answer.status != OK:
                    self.broken("kill", f"probe claims a block that cannot be read{when}: {answer.block}", opened.tier)


def _ends(calls: list[tuple[list[StoredBlock], Future[Statuses]]], deadline_s: float) -> bool:
    until = time.monotonic() + deadline_s
    for _, call in calls:
        with contextlib.suppress(TimeoutError):
            call.result(max(0.0, until - time.monotonic()))
            continue
        return False
    return True
