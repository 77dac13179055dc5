"""A tier in its own process: calls, deaths, returns. Real processes, real plug-ins found through entry points."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import Install
from leaks import Leaks, no_leaks

from flexkv_core.backend import Batch, Listing, Status
from flexkv_core.region import HostRegion
from flexkv_core.tier_inline import InlineLink
from flexkv_core.tier_link import LinkSettings, TierLink

pytestmark = pytest.mark.usefixtures("leak_check")
SIZE = 8192
MEMORY = """
    import ctypes, os, pathlib, threading, time
    import numpy as np
    import flexkv_core.backend as fk

    class Config(fk.BackendConfig):
        secret: str = ""
        opens: str = ""          # a file: counts opens, the first two fail
        opening: str = ""        # "hang" or "crash" on open
        crash: bool = False      # abort on write
        hang: bool = False       # never return from read
        hog: bool = False        # the same, holding the GIL
        wrong: str = ""          # which duty to break

    class Memory(fk.Backend):
        capabilities = fk.Capabilities(addressing="key", concurrency=3, max_batch_blocks=64)

        def __init__(self, config):
            self.config, self.blocks = config, {}

        def open(self, context):
            self.host, self.log = context.host, context.logger
            if self.config.opening == "hang":
                threading.Event().wait()
            if self.config.opening == "crash":
                os.abort()
            if self.config.opens:
                count = pathlib.Path(self.config.opens)
                times = int(count.read_text()) if count.exists() else 0
                count.write_text(str(times + 1))
                if times < 2:
                    raise RuntimeError("not yet")
            if self.config.wrong == "print":
                print("printed by a backend", flush=True)
            self.log.warning("memory is open")

        def read(self, batch):
            if self.config.hang:
                threading.Event().wait()
            if self.config.hog:
                ctypes.PyDLL(None).pause()
            if self.config.wrong == "count":
                return [fk.Status.OK]
            if self.config.wrong == "type":
                return ["fine"] * len(batch)
            statuses = []
            for key, offset, length in zip(batch.keys, batch.offsets, batch.lengths):
                held = self.blocks.get(key.tobytes())
                if held is not None:
                    self.host[offset:offset + length] = held
                statuses.append(fk.Status.MISSING if held is None else fk.Status.OK)
            return statuses

        def write(self, batch):
            if self.config.crash:
                os.abort()
            for key, offset, length in zip(batch.keys, batch.offsets, batch.lengths):
                self.blocks[key.tobytes()] = bytes(self.host[offset:offset + length])
            return [fk.Status.OK] * len(batch)

        def list(self):
            if self.config.wrong == "list":
                raise OSError("no list today")
            keys = b"".join(self.blocks)
            yield fk.listing(keys, [0] * len(self.blocks), [len(b) for b in self.blocks.values()])

        def probe(self, batch):
            held = [key.tobytes() in self.blocks for key in batch.keys]
            return [*held, False].index(False)

        def close(self):
            if self.config.wrong == "close":
                threading.Event().wait()

    @fk.hookimpl
    def flexkv_backend():
        return fk.BackendSpec("mem", Config, Memory, contract_version=1, addressing="key")
"""


class Bench:
    """An owner loop on a thread, a region, and calls that wait for their answers."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.region = HostRegion.create(64 * SIZE, "off")
        self.links: list[TierLink | InlineLink] = []
        self.states: list[str] = []

    def link(self, **settings: Any) -> TierLink | InlineLink:
        made = replace(LinkSettings("mem", "mem", {}, backoff_s=0.02, backoff_max_s=0.1, seed=1), **settings)

        def start() -> TierLink | InlineLink:
            link: TierLink | InlineLink
            if made.isolation == "process":
                link = TierLink(made, self.loop, self.region.fd, self.region.size, self.note)
            else:
                link = InlineLink(made, self.loop, self.region.buffer, self.note)
            link.start()
            return link

        link: TierLink | InlineLink = self.on_loop(start)
        self.links.append(link)
        return link

    def note(self, link: TierLink | InlineLink) -> None:
        self.states.append(link.state)

    def on_loop(self, act: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return act()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def begin(self, link: TierLink | InlineLink, operation: Any, batch: Batch) -> list[list[int]]:
        """Start a call; its answers are appended to the list that is returned."""
        answers: list[list[int]] = []
        self.on_loop(lambda: link.submit(operation, batch, lambda statuses: answers.append(statuses.tolist())))
        return answers

    def call(self, link: TierLink | InlineLink, operation: Any, batch: Batch) -> list[int]:
        answers = self.begin(link, operation, batch)
        until(lambda: bool(answers))
        time.sleep(0.01)
        assert len(answers) == 1, "answered more than once"
        return answers[0]

    def close(self) -> None:
        for link in self.links:
            asyncio.run_coroutine_threadsafe(link.close(1.0), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.region.close()


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def batch(numbers: list[int], slot: int = 0) -> Batch:
    keys = np.zeros((len(numbers), 32), np.uint8)
    keys[:, 0] = numbers
    offsets = np.arange(slot, slot + len(numbers), dtype=np.int64) * SIZE
    return Batch(keys, np.zeros(len(numbers), np.uint8), offsets, np.full(len(numbers), SIZE, np.int64))


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture
def bench(install_plugin: Install) -> Iterator[Bench]:
    install_plugin("mem", MEMORY)
    made = Bench()
    yield made
    made.close()


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_bytes_go_through_the_region(bench: Bench, isolation: str) -> None:
    link = bench.link(isolation=isolation)
    until(lambda: link.state == "ready")
    content = np.random.default_rng(0).integers(0, 256, 4 * SIZE, dtype=np.uint8)
    bench.region.array[: 4 * SIZE] = content
    assert bench.call(link, "write", batch([1, 2, 3, 4])) == [Status.OK] * 4
    assert bench.call(link, "read", batch([4, 9, 1], slot=8)) == [Status.OK, Status.MISSING, Status.OK]
    assert (bench.region.array[8 * SIZE : 9 * SIZE] == content[3 * SIZE :]).all()
    assert (bench.region.array[10 * SIZE : 11 * SIZE] == content[:SIZE]).all()
    assert link.capabilities is not None
    assert (link.capabilities.concurrency, link.capabilities.max_batch_blocks) == (3, 64)
    assert link.powers == {"probe", "list"}
    counts: list[int] = []
    bench.on_loop(lambda: link.probe(batch([1, 2, 7]), counts.append))
    until(lambda: counts == [2])
    pieces: list[Listing] = []
    ends: list[bool] = []
    bench.on_loop(lambda: link.list(pieces.append, ends.append))
    until(lambda: ends == [True])
    assert sum(len(piece.groups) for piece in pieces) == 4
    assert bench.call(link, "delete", batch([1])) == [Status.FAILED], "it has no such power"


def test_many_calls_at_a_time(bench: Bench) -> None:
    link = bench.link()
    until(lambda: link.state == "ready")
    answers = [bench.begin(link, "write", batch([n], slot=n % 64)) for n in range(200)]
    until(lambda: all(answers))
    assert all(answer == [[Status.OK]] for answer in answers)


def test_no_config_in_argv_or_environment(bench: Bench) -> None:
    link = bench.link(config={"secret": "hunter2-hunter2"})
    until(lambda: link.state == "ready")
    for what in ("cmdline", "environ"):
        assert b"hunter2" not in Path(f"/proc/{link.pid}/{what}").read_bytes()


def test_what_it_prints_does_not_reach_stdout(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    link = bench.link(config={"wrong": "print"})
    until(lambda: link.state == "ready")
    found = capfd.readouterr()
    assert "printed by a backend" in found.err
    assert "printed by a backend" not in found.out


def test_its_log_records_arrive(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        link = bench.link()
        until(lambda: link.state == "ready")
        until(lambda: "mem: memory is open" in caplog.text)


def test_kill_9_fails_calls_once_and_only_after_the_process_is_reaped(bench: Bench) -> None:
    link = bench.link(config={"hang": True})
    until(lambda: link.state == "ready")
    pid = link.pid
    assert pid is not None
    seen: list[tuple[list[int], bool]] = []
    bench.on_loop(
        lambda: [link.submit("read", batch([n]), lambda s: seen.append((s.tolist(), alive(pid)))) for n in range(5)]
    )
    time.sleep(0.1)
    assert not seen
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(seen) == 5)
    assert seen == [([Status.FAILED], False)] * 5
    until(lambda: link.state == "ready")
    assert link.restarts == 1
    assert link.pid != pid
    assert bench.states == ["ready", "backoff", "ready"]


def test_a_call_made_by_the_answer_of_a_failed_one_is_answered_too(bench: Bench) -> None:
    link = bench.link(config={"hang": True}, deadline_s=3600.0)
    until(lambda: link.state == "ready")
    answers: list[list[int]] = []

    def again(statuses: npt.NDArray[np.uint8]) -> None:
        answers.append(statuses.tolist())
        link.submit("read", batch([2, 3]), lambda statuses: answers.append(statuses.tolist()))

    bench.on_loop(lambda: link.submit("read", batch([1]), again))
    assert link.pid is not None
    os.kill(link.pid, signal.SIGKILL)
    until(lambda: len(answers) == 2)
    assert answers == [[Status.FAILED], [Status.FAILED] * 2]
    assert bench.states[:2] == ["ready", "backoff"]


def test_an_answer_that_raises_keeps_nobody_elses_and_the_tier_returns(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    link = bench.link(config={"hang": True}, deadline_s=3600.0)
    until(lambda: link.state == "ready")

    def broken(statuses: npt.NDArray[np.uint8]) -> None:
        raise ZeroDivisionError

    bench.on_loop(lambda: link.submit("read", batch([1]), broken))
    answers = bench.begin(link, "read", batch([2]))
    assert link.pid is not None
    os.kill(link.pid, signal.SIGKILL)
    until(lambda: answers == [[Status.FAILED]])
    until(lambda: link.state == "ready" and link.restarts == 1)
    assert "taking an answer failed" in caplog.text


@pytest.mark.parametrize("config", [{"hang": True}, {"hog": True}], ids=["hangs", "hogs the GIL"])
def test_a_call_past_its_deadline_gets_the_process_killed(bench: Bench, config: dict[str, bool]) -> None:
    link = bench.link(config=config, deadline_s=0.3)
    until(lambda: link.state == "ready")
    pid = link.pid
    assert bench.call(link, "read", batch([1])) == [Status.FAILED]
    assert pid is not None
    assert not alive(pid)
    assert link.last_error == "a read was not answered within 0.3 s"
    until(lambda: link.state == "ready")


def test_a_stopped_process_never_blocks_the_owner(bench: Bench) -> None:
    link = bench.link(deadline_s=1.0)
    until(lambda: link.state == "ready")
    assert link.pid is not None
    os.kill(link.pid, signal.SIGSTOP)
    big = batch(list(range(60)))
    answers = [bench.begin(link, "write", big) for _ in range(400)]  # far more than a socket buffers
    assert bench.on_loop(lambda: "the owner answers") == "the owner answers"
    until(lambda: all(answers))
    assert all(answer == [[Status.FAILED] * 60] for answer in answers)
    until(lambda: link.state == "ready")


def test_a_crash_in_the_backend(bench: Bench) -> None:
    link = bench.link(config={"crash": True})
    until(lambda: link.state == "ready")
    assert bench.call(link, "write", batch([1, 2])) == [Status.FAILED] * 2
    assert link.last_error == "its process ended with SIGABRT"
    until(lambda: link.state == "ready")
    assert link.restarts == 1
    assert bench.call(link, "read", batch([1])) == [Status.MISSING]


def test_a_backend_that_opens_at_the_third_try(bench: Bench, tmp_path: Path) -> None:
    link = bench.link(config={"opens": str(tmp_path / "count")})
    until(lambda: link.state == "backoff")
    assert "not yet" in (link.last_error or "")
    assert bench.call(link, "read", batch([1])) == [Status.FAILED]
    until(lambda: link.state == "ready")
    assert link.restarts == 2


@pytest.mark.parametrize("isolation", ["process", "none"])
@pytest.mark.parametrize("wrong", ["count", "type"])
def test_broken_duties_are_named(
    bench: Bench, caplog: pytest.LogCaptureFixture, leak_check: Leaks, wrong: str, isolation: str
) -> None:
    if isolation == "none":
        leak_check.allow("memfd:flexkv")  # shown by the traceback that caplog keeps
    link = bench.link(config={"wrong": wrong}, isolation=isolation)
    until(lambda: link.state == "ready")
    assert bench.call(link, "read", batch([1, 2, 3])) == [Status.FAILED] * 3
    until(lambda: "duty broken: read returned" in caplog.text)


def test_a_listing_that_fails_is_not_complete(bench: Bench) -> None:
    link = bench.link(config={"wrong": "list"})
    until(lambda: link.state == "ready")
    ends: list[bool] = []
    bench.on_loop(lambda: link.list(lambda piece: None, ends.append))
    until(lambda: ends == [False])


def test_an_unknown_backend_is_an_error_and_tried_again(bench: Bench) -> None:
    link = bench.link(backend="nothing")
    until(lambda: link.state == "backoff")
    assert "nothing" in (link.last_error or "")


@pytest.mark.parametrize("config", [{"wrong": "close"}, {"hang": True}], ids=["close hangs", "a read hangs"])
def test_close_keeps_its_deadline(bench: Bench, config: dict[str, Any]) -> None:
    link = bench.link(config=config)
    until(lambda: link.state == "ready")
    pid, answers = link.pid, bench.begin(link, "read", batch([1]))
    start = time.monotonic()
    asyncio.run_coroutine_threadsafe(link.close(0.5), bench.loop).result(10)
    assert time.monotonic() - start < 5
    assert pid is not None
    assert not alive(pid)
    assert link.state == "closed"
    assert len(answers) == 1
    assert bench.call(link, "read", batch([1])) == [Status.FAILED]


def test_in_process_a_hang_is_left_alone(bench: Bench, leak_check: Leaks) -> None:
    leak_check.allow("thread flexkv-mem|memfd:flexkv")
    link = bench.link(config={"hang": True}, isolation="none", deadline_s=0.2)
    until(lambda: link.state == "ready")
    answers = bench.begin(link, "read", batch([1]))
    until(lambda: link.state == "backoff")
    assert not answers, "the thread may still write into host memory"
    assert bench.call(link, "read", batch([1])) == [Status.FAILED]


def test_the_process_dies_with_its_parent(install_plugin: Install) -> None:
    install_plugin("mem", MEMORY)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # a parent of its own, to be killed
        try:
            made = Bench()
            link = made.link()
            until(lambda: link.state == "ready")
            os.write(writer, str(link.pid).encode())
            signal.pause()
        finally:
            os._exit(1)
    pid = int(os.read(reader, 32))
    os.close(reader)
    os.close(writer)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until(lambda: not alive(pid) or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"config": {"opening": "crash"}}, "its process ended with SIGABRT"),
        ({"config": {"opening": "hang"}, "open_deadline_s": 0.4}, "its backend took too long to open"),
        ({"backend": "nothing"}, "its backend could not be opened"),
    ],
    ids=["crashes", "hangs", "raises"],
)
def test_a_tier_that_never_opens_is_tried_less_and_less_often(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], error: str
) -> None:
    waits: list[float] = []
    plain = TierLink._set_timer

    def noted(link: TierLink, delay_s: float, act: Callable[[], None]) -> None:
        if act == link._restart:
            waits.append(delay_s)
        plain(link, delay_s, act)

    monkeypatch.setattr(TierLink, "_set_timer", noted)
    link = bench.link(**settings)
    until(lambda: len(waits) >= 4)
    assert error in (link.last_error or "")
    for number, wait in enumerate(waits):
        longest = min(0.1, 0.02 * 2**number)
        assert longest / 2 <= wait <= longest
    assert "ready" not in bench.states
    assert link.restarts <= len(waits), "nothing but the timer starts it"
    assert bench.call(link, "read", batch([1])) == [Status.FAILED]


def test_a_process_that_cannot_be_started_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    troubles = [OSError("too many open files")] * 2
    plain = os.pidfd_open

    def pidfd_open(pid: int) -> int:
        if troubles:
            raise troubles.pop()
        return plain(pid)

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    link = bench.link()
    until(lambda: link.state == "ready")
    assert link.restarts == 2
    assert link.last_error == "its process could not be started: too many open files"


def test_an_answer_that_comes_twice_counts_once(bench: Bench) -> None:
    link = bench.link(faults={"duplicate": 1.0})
    until(lambda: link.state == "ready")
    for number in range(20):
        assert bench.call(link, "write", batch([number])) == [Status.OK]
    answers = [bench.begin(link, "read", batch([number])) for number in range(20)]
    until(lambda: all(answers))
    until(lambda: link.unexpected_answers == 40)
    assert answers == [[[Status.OK]]] * 20
    assert (link.state, link.restarts) == ("ready", 0)


def test_nothing_leaks(install_plugin: Install) -> None:
    """Over several lives in one process: a leak per restart would be too small to see in one of them."""
    install_plugin("mem", MEMORY)

    def round_trip() -> None:
        made = Bench()
        link = made.link(config={"crash": True})
        until(lambda: link.state == "ready")
        assert made.call(link, "write", batch([1])) == [Status.FAILED]
        until(lambda: link.state == "ready")
        made.close()

    round_trip()
    with no_leaks():
        for _ in range(3):
            round_trip()
