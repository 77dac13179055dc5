"""Backends with `submit`: every batch is answered once, whenever and from wherever `done` is called."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from conftest import Install
from gates import until
from test_tier_link import Bench, batch

from flexkv_core import backend as fk
from flexkv_core.testing import wrap
from flexkv_core.tier_submit import Submissions

OK, FAILED = fk.Status.OK, fk.Status.FAILED


class Held(fk.SubmitBackend):
    """Keeps what is submitted until the test says what becomes of it."""

    capabilities = fk.Capabilities("key", concurrency=2)

    def __init__(self) -> None:
        self.batches: list[tuple[str, fk.Batch, fk.Done]] = []
        self.threads: set[int] = set()
        self.at_once: Callable[[fk.Batch, fk.Done], None] | None = None

    def open(self, context: fk.OpenContext) -> None:
        self.host = context.host

    def submit(self, operation: fk.SubmitOperation, batch: fk.Batch, done: fk.Done) -> None:
        self.threads.add(threading.get_ident())
        self.batches.append((operation, batch, done))
        if self.at_once is not None:
            self.at_once(batch, done)

    def close(self) -> None:
        pass


class Answers:
    def __init__(self) -> None:
        self.told: dict[int, list[tuple[list[int], bool]]] = {}

    def of(self, number: int) -> Callable[[Any, bool], None]:
        return lambda statuses, first: self.told.setdefault(number, []).append((statuses.tolist(), first))


def check(operation: str, batch: fk.Batch, answer: Sequence[fk.Status]) -> Any:
    if len(answer) != len(batch):
        raise ValueError("another number of statuses than of blocks")
    return np.array(answer, np.uint8)


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def submissions(held: Held) -> Iterator[Submissions]:
    made = Submissions(held, 2, check, logging.getLogger("test"))
    yield made
    made.stop()


def test_batches_end_in_any_order_on_any_thread_and_no_more_are_under_way_than_allowed(
    held: Held, submissions: Submissions
) -> None:
    answers = Answers()
    for number in range(5):
        submissions.add("read", batch([number]), answers.of(number))
    for ended in (1, 0, 3, 2, 4):
        until(lambda ended=ended: len(held.batches) > ended)
        assert len(held.batches) <= len(answers.told) + 2
        thread = threading.Thread(target=held.batches[ended][2], args=([OK],))
        thread.start()
        thread.join()
    assert answers.told == {number: [([OK], True)] for number in range(5)}
    assert list(answers.told) == [1, 0, 3, 2, 4]
    assert len(held.threads) == 1


def test_done_within_submit_does_not_nest(held: Held, submissions: Submissions) -> None:
    answers, depth, deepest = Answers(), [0], [0]

    def at_once(batch: fk.Batch, done: fk.Done) -> None:
        depth[0] += 1
        deepest[0] = max(deepest[0], depth[0])
        done([OK])
        depth[0] -= 1

    held.at_once = at_once
    for number in range(2000):
        submissions.add("write", batch([number % 200]), answers.of(number))
    until(lambda: len(answers.told) == 2000)
    assert deepest == [1]


def test_a_second_done_is_told_as_such_and_frees_no_place(held: Held, submissions: Submissions) -> None:
    answers = Answers()
    for number in range(4):
        submissions.add("read", batch([number]), answers.of(number))
    until(lambda: len(held.batches) == 2)
    for _ in range(3):
        held.batches[0][2]([OK])
    until(lambda: len(held.batches) == 3)
    assert answers.told[0] == [([OK], True), ([OK], False), ([OK], False)]
    assert len(held.batches) == 3


def test_what_raises_or_breaks_its_duty_has_failed(held: Held, submissions: Submissions) -> None:
    answers = Answers()

    def refuse(batch: fk.Batch, done: fk.Done) -> None:
        raise OSError("no ring")

    held.at_once = refuse
    submissions.add("read", batch([1, 2]), answers.of(0))
    until(lambda: answers.told)
    held.at_once = lambda batch, done: done([OK])
    submissions.add("read", batch([1, 2]), answers.of(1))
    until(lambda: len(answers.told) == 2)
    assert answers.told == {0: [([FAILED, FAILED], True)], 1: [([FAILED, FAILED], True)]}


def test_after_stop_nothing_is_submitted_and_what_is_left_fails(held: Held, submissions: Submissions) -> None:
    answers = Answers()
    for number in range(4):
        submissions.add("write", batch([number]), answers.of(number))
    until(lambda: len(held.batches) == 2)
    submissions.stop()
    held.batches[0][2]([OK])
    submissions.give_up()
    submissions.add("write", batch([9]), answers.of(9))
    assert len(held.batches) == 2
    assert answers.told == {0: [([OK], True)]} | {number: [([FAILED], True)] for number in (1, 2, 3, 9)}
    held.batches[1][2]([OK])
    assert answers.told[1] == [([FAILED], True), ([OK], False)]


def test_reading_is_submitting_and_waiting(held: Held) -> None:
    held.at_once = lambda batch, done: done([OK] * len(batch))
    assert held.read(batch([1, 2])) == [OK, OK]
    assert held.write(batch([1])) == [OK]


def test_faults_keep_the_power_and_go_through_done(held: Held) -> None:
    assert isinstance(wrap(held, {}), fk.SupportsSubmit)
    held.at_once = lambda batch, done: done([OK] * len(batch))
    told: list[list[fk.Status]] = []

    def one(**faults: Any) -> list[list[int]]:
        told.clear()
        made: Any = wrap(held, faults)
        made.open(fk.OpenContext(memoryview(bytearray(1 << 16)), (), None, logging.getLogger("test")))
        made.submit("write", batch([1, 2]), told.append)
        return [list(map(int, answer)) for answer in told]

    assert one() == [[OK, OK]]
    assert one(duplicate=1.0) == [[OK, OK]] * 2
    assert one(hang=1.0) == []
    held.batches.clear()
    assert one(lost=1.0) == [[OK, OK]]
    assert not held.batches
    assert len(one(miscount=1.0)[0]) in (1, 3)
    assert one(delay=1.0, delay_s=0.01) == []
    until(lambda: told)
    with pytest.raises(OSError, match="on purpose"):
        one(error=1.0)


SUBMITTING = """
    import threading
    import flexkv_core.backend as fk

    class Config(fk.BackendConfig):
        wrong: str = ""

    class Memory(fk.SubmitBackend):
        capabilities = fk.Capabilities(addressing="key", concurrency=2)

        def __init__(self, config):
            self.config, self.blocks = config, {}

        def open(self, context):
            self.host = context.host

        def submit(self, operation, batch, done):
            if self.config.wrong == "never":
                return
            statuses = []
            for key, at, size in zip(batch.keys, batch.offsets, batch.lengths):
                if operation == "write":
                    self.blocks[key.tobytes()] = bytes(self.host[at : at + size])
                held = self.blocks.get(key.tobytes())
                if held is not None:
                    self.host[at : at + size] = held
                statuses.append(fk.Status.MISSING if held is None else fk.Status.OK)
            threading.Timer(0.001, done, (statuses,)).start()
            if self.config.wrong == "twice":
                done(statuses)

        def close(self):
            pass

    @fk.hookimpl
    def flexkv_backend():
        return fk.BackendSpec("mem", Config, Memory, contract_version=1, addressing="key")
"""


@pytest.fixture
def bench(install_plugin: Install) -> Iterator[Bench]:
    install_plugin("mem", SUBMITTING)
    made = Bench()
    yield made
    made.close()


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_reads_and_writes_are_submitted(isolation: str, bench: Bench) -> None:
    link = bench.link(isolation=isolation)
    until(lambda: link.state == "ready")
    assert "submit" in link.powers
    assert bench.call(link, "write", batch([1, 2])) == [OK, OK]
    assert bench.call(link, "read", batch([1, 3])) == [OK, fk.Status.MISSING]
    assert link.unexpected_answers == 0


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_a_second_done_is_ignored_and_counted(isolation: str, bench: Bench) -> None:
    link = bench.link(isolation=isolation, config={"wrong": "twice"})
    until(lambda: link.state == "ready")
    assert bench.call(link, "write", batch([1])) == [OK]
    until(lambda: link.unexpected_answers == 1)
    assert link.state == "ready"


def test_a_done_that_never_comes_is_a_missed_deadline(bench: Bench) -> None:
    link = bench.link(config={"wrong": "never"}, deadline_s=0.3)
    until(lambda: link.state == "ready")
    assert bench.call(link, "read", batch([1])) == [FAILED]
    until(lambda: link.restarts >= 1)
