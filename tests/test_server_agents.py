"""Engines' workers and the server as real processes: every shard gets its own bytes, who dies takes down nobody."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leaks import nothing_held
from server_rig import (
    BLOCK_BYTES,
    BLOCK_SIZE,
    PAGES,
    PATIENCE_S,
    SPEC,
    GatedCpuDevice,
    ServerProcess,
    Wire,
    WorkerProcess,
    agent,
    agents_of,
    figures_of,
    hello,
    introduced,
    keys_of,
    manager_of,
    registered,
    serving,
    until,
)

from flexkv_core.device.cpu import CpuDevice
from flexkv_core.errors import ServerRefusedError
from flexkv_core.layout import KVGroup, ModelSpec
from flexkv_core.server import connect
from flexkv_core.server import messages as m
from flexkv_core.server.agent import DeviceAgent
from flexkv_core.server.reattach import holders, label_of

pytestmark = pytest.mark.usefixtures("leak_check")

COUNT = 8
FIRST = np.arange(COUNT, dtype=np.int64).tobytes()
SECOND = np.arange(COUNT, 2 * COUNT, dtype=np.int64).tobytes()


def persistent(folder: Path) -> dict[str, Any]:
    return {
        "tiers": [
            {"backend": "cpu", "capacity": "16MiB", "prefault": False},
            {"backend": "directory", "root": str(folder / "blocks"), "capacity": "64MiB"},
        ]
    }


def parallel(ranks: int) -> ModelSpec:
    return ModelSpec("tp", BLOCK_SIZE, (KVGroup(BLOCK_BYTES * ranks),), tensor_parallel=ranks)


def fill(workers: list[WorkerProcess], seed: int) -> None:
    for worker in workers:
        worker.tensor[:] = np.random.default_rng(seed + worker.pid).integers(0, 256, worker.tensor.shape, np.uint8)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_processes_are_real_and_every_rank_gets_its_own_bytes(tmp_path: Path, ranks: int) -> None:
    path = tmp_path / "s"
    with ServerProcess(path, persistent(tmp_path)) as server, introduced(path) as wire:
        workers = [WorkerProcess(tmp_path, path, rank=rank, ranks=ranks) for rank in range(ranks)]
        try:
            until(lambda: len(agents_of(wire)) == ranks)
            tiers = [tier["pid"] for tier in figures_of(wire)["tiers"].values() if tier["pid"] is not None]
            pids = [os.getpid(), server.pid, *tiers, *agents_of(wire).values()]
            assert len(set(pids)) == 2 + 1 + ranks == len(pids)
            assert agents_of(wire) == {rank: worker.pid for rank, worker in enumerate(workers)}
            namespace = registered(wire, parallel(ranks))
            keys = keys_of(namespace, 1, COUNT)
            fill(workers, 1)
            assert wire.ask(m.Store(2, namespace.root, keys, [FIRST], "")) == m.Moved(2, COUNT, None)
            assert wire.ask(m.Fetch(3, namespace.root, keys, 5.0, True)).ready == COUNT
            assert wire.ask(m.Load(4, 3, [SECOND], "")) == m.Moved(4, COUNT, None)
            for worker in workers:
                assert np.array_equal(worker.tensor[COUNT : 2 * COUNT], worker.tensor[:COUNT])
                assert len(np.unique(worker.tensor[:COUNT])) > 100
        finally:
            for worker in workers:
                worker.__exit__()


def test_a_killed_server_is_survived_and_its_memory_taken_over(tmp_path: Path) -> None:
    """The agent stays mapped; the index of host memory is empty; the persistent tier serves."""
    path = tmp_path / "s"
    server = ServerProcess(path, persistent(tmp_path))
    server.start()
    with agent(path) as (made, device, tensor):
        wire = introduced(path)
        namespace = registered(wire)
        keys = keys_of(namespace, 1, COUNT)
        assert wire.ask(m.Store(2, namespace.root, keys, [FIRST], "")) == m.Moved(2, COUNT, None)
        assert wire.ask(m.Drain(3, 10.0)) == m.Ended(3, ok=True)
        assert made._region is not None
        before = made._region.inode
        server.kill()
        assert wire.hung_up()
        wire.close()
        until(lambda: not made.connected)
        server.start()
        assert made.wait_connected(10)
        assert (made._region.inode, device.attached) == (before, 1), "no second copy of the memory, no second pinning"
        with introduced(path) as wire:
            assert registered(wire).root == namespace.root
            until(lambda: wire.ask(m.Lookup(4, namespace.root, keys)) == m.Found(4, COUNT, 0, pending=False))
            answer = wire.ask(m.Fetch(5, namespace.root, keys, 10.0, True))
            while not answer.done:
                answer = wire.receive()
            assert (answer.ready, answer.sources["directory"]) == (COUNT, COUNT)
            assert wire.ask(m.Load(6, 5, [SECOND], "")) == m.Moved(6, COUNT, None)
            assert np.array_equal(tensor[COUNT : 2 * COUNT], tensor[:COUNT])
        assert server.stop() == 0
    until(lambda: not holders(label_of(path)))


def test_memory_that_a_worker_may_still_touch_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = ServerProcess(path, prelude="daemon.STILL_S = 0.3")
    server.start()
    with WorkerProcess(tmp_path, path) as worker:
        with introduced(path) as wire:
            until(lambda: agents_of(wire) == {0: worker.pid})
        (old,) = holders(label_of(path))
        worker.process.send_signal(signal.SIGSTOP)
        server.kill()
        server.start()
        regions = holders(label_of(path))
        assert regions[old] == {worker.pid}
        assert {server.pid} in regions.values(), "the new server has memory of its own"
        worker.process.send_signal(signal.SIGCONT)
        with introduced(path) as wire:
            until(lambda: agents_of(wire) == {0: worker.pid})
        until(lambda: set(holders(label_of(path))) == set(regions) - {old})  # the worker has moved on
    assert server.stop() == 0


def test_a_worker_that_is_killed_gives_its_store_up_and_its_slots_back(tmp_path: Path) -> None:
    path = tmp_path / "s"
    hang = "import time; device.gather = lambda *a, **k: time.sleep(600)"
    with (
        serving(path) as server,
        introduced(path) as wire,
        WorkerProcess(tmp_path, path, rank=0, ranks=2),
        WorkerProcess(tmp_path, path, rank=1, ranks=2, prelude=hang) as hung,
    ):
        until(lambda: len(agents_of(wire)) == 2)
        namespace = registered(wire, parallel(2))
        keys = keys_of(namespace, 1, COUNT)
        wire.send(m.Store(2, namespace.root, keys, [FIRST], ""))
        assert wire.quiet(0.2)
        assert manager_of(server).stats()["pending_stores"] == 1
        hung.kill()
        answer = wire.receive()
        assert isinstance(answer, m.Moved)
        assert answer.error is not None
        assert f"process {hung.pid} of rank 1 has ended" in answer.error
        assert wire.ask(m.Lookup(3, namespace.root, keys)).blocks == 0, "no rank's part is a block"
        nothing_held(manager_of(server))
        answer = wire.ask(m.Store(4, namespace.root, keys, [FIRST], ""))
        assert "no worker of rank 1" in answer.text
        with WorkerProcess(tmp_path, path, rank=1, ranks=2):  # comes back
            until(lambda: len(agents_of(wire)) == 2)
            assert wire.ask(m.Store(5, namespace.root, keys, [FIRST], "")) == m.Moved(5, COUNT, None)


def test_a_worker_whose_socket_closed_keeps_its_slots(tmp_path: Path) -> None:
    """Its process lives, so its copy may go on: the store ends when the copy has."""
    with (
        serving(tmp_path / "s") as server,
        introduced(tmp_path / "s") as wire,
        agent(tmp_path / "s") as (made, device, _),
    ):
        namespace = registered(wire)
        keys = keys_of(namespace, 1, COUNT)
        device.gate.clear()
        wire.send(m.Store(2, namespace.root, keys, [FIRST], ""))
        until(lambda: server.figures()["server"]["agents"][0]["jobs"] == 1)
        session = next(iter(server._agents.values()))
        server._loop.call_soon_threadsafe(session._connection.close, "a test")
        until(lambda: not made.connected)
        assert wire.quiet(0.2)
        assert manager_of(server).stats()["pending_stores"] == 1
        device.gate.set()  # it connects again when the copy has ended
        answer = wire.receive()
        assert isinstance(answer, m.Moved)
        assert answer.error == "its process has connected anew"
        assert made.wait_connected(10)
        assert wire.ask(m.Store(3, namespace.root, keys, [FIRST], "")) == m.Moved(3, COUNT, None)
        nothing_held(manager_of(server))


def test_agents_that_do_not_fit_are_refused_with_the_reason(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), agent(tmp_path / "s"):
        device = CpuDevice([[np.zeros((PAGES, BLOCK_BYTES), np.uint8)]])
        for changes, reason in (
            ({"rank": 0}, "rank 0 of engine 'e' is held by process"),
            ({"rank": 1, "ranks": 2}, "engine 'e' has 1 ranks, not 2"),
            ({"rank": 3, "ranks": 2}, "rank 3 of 2"),
        ):
            second = DeviceAgent(tmp_path / "s", engine="e", device=device, **changes)
            with pytest.raises(ServerRefusedError, match=reason):
                second.wait_connected(10)
            second.close()
        with Wire(tmp_path / "s") as wire:
            answer = wire.ask(hello("agent", "other", shapes=[(-1, 4)]))
            assert isinstance(answer, m.Refused)


def test_an_engine_of_other_shapes_is_told_so(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), introduced(tmp_path / "s") as wire, agent(tmp_path / "s"):
        namespace = registered(wire, ModelSpec("other", BLOCK_SIZE, (KVGroup(4096),)))
        answer = wire.ask(m.Store(2, namespace.root, keys_of(namespace, 1, COUNT), [FIRST], ""))
        assert answer.kind == "input"
        assert "the device's blocks have 3000 bytes, the model's 4096" in answer.text


def test_two_engines_share_hits_and_load_into_their_own_devices(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s"),
        agent(tmp_path / "s", "one") as (_, _, mine),
        agent(tmp_path / "s", "two") as (_, _, theirs),
        introduced(tmp_path / "s", engine="one") as one,
        introduced(tmp_path / "s", engine="two") as two,
    ):
        namespace = registered(one)
        assert registered(two).root == namespace.root
        keys = keys_of(namespace, 1, COUNT)
        theirs[:] = 0
        assert one.ask(m.Store(2, namespace.root, keys, [FIRST], "")) == m.Moved(2, COUNT, None)
        assert two.ask(m.Fetch(3, namespace.root, keys, 5.0, True)).ready == COUNT
        assert two.ask(m.Load(4, 3, [SECOND], "")) == m.Moved(4, COUNT, None)
        assert np.array_equal(theirs[COUNT : 2 * COUNT], mine[:COUNT])
        assert not theirs[:COUNT].any()


def test_tags_reach_the_agent_that_copied(tmp_path: Path) -> None:
    seen: list[tuple[str, str, str | None]] = []
    device = CpuDevice([[np.zeros((PAGES, BLOCK_BYTES), np.uint8)]])
    with serving(tmp_path / "s"), introduced(tmp_path / "s") as wire:
        made = DeviceAgent(tmp_path / "s", engine="e", device=device, on_copied=lambda *what: seen.append(what))
        assert made.wait_connected(10)
        namespace = registered(wire)
        keys = keys_of(namespace, 1, COUNT)
        assert wire.ask(m.Store(2, namespace.root, keys, [FIRST], "request-7")) == m.Moved(2, COUNT, None)
        assert wire.ask(m.Fetch(3, namespace.root, keys, 5.0, True)).ready == COUNT
        assert wire.ask(m.Load(4, 3, [SECOND], "request-8")) == m.Moved(4, COUNT, None)
        assert seen == [("request-7", "gather", None), ("request-8", "scatter", None)]
        assert made.copies == 2
        made.close()


def test_waiting_for_a_server_uses_no_time(tmp_path: Path) -> None:
    """An agent whose server is away tries a few times a second, and one that is connected wakes for jobs only."""
    with serving(tmp_path / "s"), agent(tmp_path / "s") as (made, _, _):
        ticks = thread_ticks(made._thread.native_id or 0)
        time.sleep(0.5)
        assert thread_ticks(made._thread.native_id or 0) - ticks <= 1


def thread_ticks(thread: int) -> int:
    """Hundredths of a second that a thread has run for."""
    fields = Path(f"/proc/self/task/{thread}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_copies_of_a_server_that_is_gone_do_not_begin(tmp_path: Path) -> None:
    """Its client was told that they failed, and may have given the device blocks to others."""
    told: list[tuple[str, str | None]] = []
    device = GatedCpuDevice([np.zeros((PAGES, BLOCK_BYTES), np.uint8)])
    made = DeviceAgent(
        tmp_path / "s", engine="e", device=device, threads=1, on_copied=lambda tag, _, error: told.append((tag, error))
    )
    try:
        with ServerProcess(tmp_path / "s") as server, connect(tmp_path / "s", engine="e") as cache:
            assert made.wait_connected(PATIENCE_S)
            model = cache.register(SPEC)
            device.gate.clear()
            for number in range(4):
                cache.store(
                    model,
                    np.frombuffer(keys_of(model, number, 1), np.uint8).reshape(1, 32),
                    np.array([number]),
                    tag=str(number),
                )
            until(lambda: cache.stats()["server"]["agents"][0]["jobs"] == 4)
            until(lambda: made._running == 4)
            server.kill()
            until(lambda: not made.connected)
            device.gate.set()
            until(lambda: len(told) == 4)
        assert made.copies == 1
        assert [error is None for _, error in told] == [True, False, False, False]
    finally:
        device.gate.set()
        made.close()
