"""What routers are told of what is cached, without an engine: they know what the server holds, and nothing else.

A router is played by a set that refuses what contradicts it: a store that it knows, one without its parent, a removal
of what it does not know. The truth is read from the books of the server.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from events_rig import Engine, Form, Request, hash_of, held, prompt
from rig import PLAIN_SLOT
from server_rig import (
    BLOCK_SIZE,
    PAGES,
    PATIENCE_S,
    SPEC,
    ServerProcess,
    WorkerProcess,
    agent,
    introduced,
    manager_of,
    registered,
    serving,
    until,
)

from flexkv_core.connectors import vllm_events
from flexkv_core.connectors.vllm_events import CPU, STORAGE, Stored
from flexkv_core.device.cpu import CpuDevice
from flexkv_core.layout import Coverage, KVGroup, ModelSpec
from flexkv_core.server import DeviceAgent, client_notices, notices
from flexkv_core.server import messages as m
from flexkv_core.server.daemon import Server

pytestmark = pytest.mark.usefixtures("leak_check")
HOST_BLOCKS, FAR_BLOCKS, FILES_BLOCKS = 16, 24, 32
CPU_TIER = {"backend": "cpu", "capacity": f"{HOST_BLOCKS * PLAIN_SLOT}B", "prefault": False}


def test_a_block_is_announced_when_it_is_there_and_not_before(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), agent(tmp_path / "s") as (_, device, _), Engine(tmp_path / "s") as engine:
        device.gate.clear()
        transfer = engine.begin_store(prompt(1, 4))
        engine.client.null(b"")
        assert engine.events.take() == []
        device.gate.set()
        assert transfer.wait(PATIENCE_S)
        (event,) = engine.events.take()
        assert isinstance(event, Stored)
        assert (event.group, event.medium, event.blocks[0].parent_hash) == (0, CPU, None)
        assert [block.hash for block in event.blocks] == Form().hashes(Request(prompt(1, 4)), 0, 4)
        assert [token for block in event.blocks for token in block.tokens] == prompt(1, 4)


def test_a_store_that_fails_announces_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), agent(tmp_path / "s") as (_, device, _), Engine(tmp_path / "s") as engine:
        device.gate.clear()
        transfer = engine.begin_store(prompt(1, 4))
        engine.client.cancel(transfer)
        device.gate.set()
        assert transfer.wait(PATIENCE_S)
        assert transfer.error is not None
        assert engine.events.take() == []
        assert not engine.events._blocks
        assert not engine.events._waiting


def test_what_was_there_before_is_announced_when_it_is_loaded_or_stored(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), agent(tmp_path / "s"):
        with Engine(tmp_path / "s") as before:
            before.store(prompt(1, 4))
            before.store(prompt(2, 4))
        with Engine(tmp_path / "s") as engine:
            assert engine.listen().known == set()
            assert engine.load(prompt(1, 4)) == 4
            assert len(engine.listen().in_medium(CPU)) == 4
            assert engine.store(prompt(2, 4)).blocks == 0, "they are there"
            assert len(engine.listen().in_medium(CPU)) == 8
            told = engine.router.told
            engine.load(prompt(1, 4))
            assert engine.listen().told == told, "nothing new"


def test_an_eviction_takes_back_and_another_engines_is_passed_over(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s", {"tiers": [CPU_TIER]}) as server,
        agent(tmp_path / "s"),
        agent(tmp_path / "s", "other"),
        Engine(tmp_path / "s") as engine,
        Engine(tmp_path / "s", engine="other") as other,
    ):
        engine.store(prompt(1, 10))
        assert len(engine.listen().in_medium(CPU)) == 10
        other.store(prompt(2, 10))
        router = engine.listen()
        assert router.in_medium(CPU) == held(manager_of(server), engine, [prompt(1, 10)])[CPU]
        assert 0 < len(router.known) < 10
        assert len(other.listen().known) == 10
        assert set(engine.events._blocks) == {bytes(key) for key in engine.keys(prompt(1, len(router.known)))}
        other.store(prompt(3, HOST_BLOCKS))
        assert engine.listen().known == set()
        assert not engine.events._blocks, "the bound is what the server holds"


def test_what_sinks_is_announced_as_storage_and_stays_when_host_memory_has_let_go(tmp_path: Path) -> None:
    far = {"backend": "cpu", "name": "far", "capacity": f"{FAR_BLOCKS * PLAIN_SLOT}B", "write_queue": "1GiB"}
    with (
        serving(tmp_path / "s", {"tiers": [CPU_TIER, far]}) as server,
        agent(tmp_path / "s"),
        Engine(tmp_path / "s") as engine,
    ):
        until(lambda: manager_of(server).stats()["tiers"]["far"]["state"] == "ready")
        engine.store(prompt(1, 8))
        router = engine.listen()
        assert (len(router.in_medium(CPU)), len(router.in_medium(STORAGE))) == (8, 8)
        engine.store(prompt(2, HOST_BLOCKS))
        router = engine.listen()
        assert router.in_medium(CPU) == held(manager_of(server), engine, [prompt(2, HOST_BLOCKS)])[CPU]
        assert router.in_medium(STORAGE) == {*Form().hashes(Request(prompt(1, 8)), 0, 8), *router.in_medium(CPU)}
        os.kill(manager_of(server).stats()["tiers"]["far"]["pid"], signal.SIGKILL)
        until(lambda: manager_of(server).stats()["tiers"]["far"]["restarts"] == 1)
        assert engine.listen().in_medium(STORAGE) == set(), "it has lost its medium"
        assert len(router.in_medium(CPU)) == HOST_BLOCKS


def test_a_tier_that_bounds_itself_is_not_announced(tmp_path: Path) -> None:
    files = {"backend": "directory", "root": str(tmp_path / "files"), "write_queue": "1GiB"}
    with (
        serving(tmp_path / "s", {"tiers": [CPU_TIER, files]}) as server,
        agent(tmp_path / "s"),
        Engine(tmp_path / "s") as engine,
    ):
        until(lambda: manager_of(server).stats()["tiers"]["directory"]["state"] == "ready")
        engine.store(prompt(1, 8))
        router = engine.listen()
        assert manager_of(server).stats()["tiers"]["directory"]["stored_blocks"] == 8
        assert (len(router.in_medium(CPU)), len(router.in_medium(STORAGE))) == (8, 0)


def test_behind_a_hole_nothing_is_announced_until_the_hole_is_filled(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), agent(tmp_path / "s"), Engine(tmp_path / "s") as engine:
        engine.store(prompt(1, 12), first=8)
        assert engine.listen().known == set()
        engine.store(prompt(1, 12)[: 4 * BLOCK_SIZE])
        assert len(engine.listen().known) == 4
        engine.store(prompt(1, 12)[: 8 * BLOCK_SIZE], first=4)
        assert len(engine.listen().known) == 12
        assert not engine.events._behind


def test_groups_are_announced_apart(tmp_path: Path) -> None:
    half = KVGroup(1000, Coverage.window(2))
    spec = ModelSpec("two", BLOCK_SIZE, (KVGroup(1500), half))
    tensors = [np.zeros((PAGES, 1500), np.uint8), np.zeros((PAGES, 1000), np.uint8)]
    with serving(tmp_path / "s"):
        made = DeviceAgent(
            tmp_path / "s", engine="e", device=CpuDevice([[each] for each in tensors], threads=1), groups=2
        )
        try:
            assert made.wait_connected(PATIENCE_S)
            with Engine(tmp_path / "s", spec, whole=False) as engine:
                tokens, keys = prompt(1, 6), engine.keys(prompt(1, 6))
                blocks = [np.arange(6, dtype=np.int64), np.array([-1, -1, -1, -1, 4, 5], np.int64)]
                transfer = engine.client.store(engine.namespace, keys, blocks)
                engine.events.watch(transfer, Request(tokens), keys, 0)  # type: ignore[arg-type]
                assert transfer.wait(PATIENCE_S)
                router = engine.listen()
                hashes = Form().hashes(Request(tokens), 0, 6)
                assert router.known == {*((each, 0, CPU) for each in hashes), *((each, 1, CPU) for each in hashes[4:])}
        finally:
            made.close()


def test_a_reset_takes_back_all_and_what_is_under_way_is_not_announced(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), agent(tmp_path / "s") as (_, device, _), Engine(tmp_path / "s") as engine:
        engine.store(prompt(1, 4))
        assert len(engine.listen().known) == 4
        device.gate.clear()
        late = engine.begin_store(prompt(2, 4))
        engine.client.null(b"")
        engine.reset()
        device.gate.set()
        assert late.wait(PATIENCE_S)
        assert engine.listen().known == set()
        assert not engine.events._blocks
        engine.store(prompt(1, 4))
        assert len(engine.listen().known) == 4


def test_a_router_that_the_engine_has_cleared_is_told_again(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), agent(tmp_path / "s"), Engine(tmp_path / "s") as engine:
        engine.store(prompt(1, 4))
        engine.store(prompt(1, 4) + prompt(2, 4), first=4)
        engine.store(prompt(3, 2))
        known = set(engine.listen().known)
        assert len(known) == 10
        engine.form.was_reset = True
        engine.router.known.clear()
        assert engine.listen().known == known
        engine.form.was_reset = True
        engine.router.known.clear()
        engine.reset()
        assert engine.listen().told == engine.router.told
        assert engine.router.known == set()


def test_who_does_not_read_is_told_that_nothing_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "MAX_UNREAD_BYTES", 4096)
    with serving(tmp_path / "s") as server, introduced(tmp_path / "s", notices=True) as wire:
        namespace = registered(wire)
        keys = np.zeros((1000, 32), np.uint8)
        groups = np.zeros(len(keys), np.uint8)
        (session,) = server._clients.values()
        notes, connection = session._notices, session._connection
        assert notes is not None

        def commit() -> None:
            server._loop.call_soon_threadsafe(notes.committed, 0, namespace.root, keys, groups)

        def full() -> bool:
            commit()
            return notes._missed

        until(full)
        assert connection.unsent <= 4096 + 2 * keys.nbytes
        came: list[Any] = []
        while not (came and isinstance(came[-1], m.Cleared)):
            came.append(wire.receive())
        assert came[-1].tier is None
        assert {type(each) for each in came[:-1]} == {m.Committed}
        commit()
        assert isinstance(wire.receive(), m.Committed), "it is told again what comes"
        wire.send(m.Bye())


def test_notices_are_for_those_who_want_them_and_of_their_own_namespaces(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s") as server,
        agent(tmp_path / "s"),
        Engine(tmp_path / "s") as engine,
        introduced(tmp_path / "s", engine="deaf") as deaf,
        introduced(tmp_path / "s", engine="stranger", notices=True) as stranger,
        introduced(tmp_path / "s", engine="friend", notices=True) as friend,
    ):
        registered(deaf)
        registered(stranger, ModelSpec("another", BLOCK_SIZE, SPEC.groups))
        registered(friend)
        engine.store(prompt(1, 2))
        committed = friend.receive()
        assert isinstance(committed, m.Committed)
        assert committed == m.Committed(0, bytes(2), engine.keys(prompt(1, 2)).tobytes())
        assert deaf.quiet()
        assert stranger.quiet()
        changes = manager_of(server)._planner._ledger.changes
        assert len(changes._watchers) == 3
        for wire in (deaf, stranger, friend):
            wire.send(m.Bye())
        until(lambda: len(changes._watchers) == 1)
    assert not changes.watched


def test_a_client_that_does_not_take_its_notices_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_notices, "MAX_BYTES", 10 * 32)
    with serving(tmp_path / "s"), agent(tmp_path / "s"), Engine(tmp_path / "s") as engine:
        engine.store(prompt(1, 4))
        assert len(engine.listen().known) == 4
        for seed in (2, 3, 4):
            engine.store(prompt(seed, 4))
        assert engine.client._notices is not None
        assert engine.client._notices._bytes <= 10 * 32
        router = engine.listen()
        assert router.in_medium(CPU).isdisjoint(Form().hashes(Request(prompt(1, 4)), 0, 4)), "it may have been dropped"
        engine.store(prompt(1, 4))
        assert router.in_medium(CPU) < engine.listen().in_medium(CPU)


def test_there_is_a_bound_on_what_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_events, "MOST_BLOCKS", 6)
    with serving(tmp_path / "s"), agent(tmp_path / "s"), Engine(tmp_path / "s") as engine:
        engine.store(prompt(1, 4))
        engine.store(prompt(2, 4))
        assert len(engine.listen().known) == 6
        engine.store(prompt(3, 4))
        assert len(engine.listen().known) == 6


def test_a_killed_servers_blocks_are_taken_back(tmp_path: Path) -> None:
    with (
        ServerProcess(tmp_path / "s") as server,
        WorkerProcess(tmp_path, tmp_path / "s"),
        Engine(tmp_path / "s") as engine,
    ):
        until(lambda: engine.store(prompt(1, 4)).error is None)
        assert len(engine.listen().known) == 4
        server.kill()
        until(lambda: not engine.client.connected)
        assert engine.listen().known == set()
        assert not engine.events._blocks
        server.start()
        until(lambda: engine.store(prompt(1, 4)).error is None)
        until(lambda: engine.store(prompt(2, 2)).error is None)
        assert len(engine.listen().known) == 6


def ready(server: Server) -> bool:
    return all(tier["state"] == "ready" for tier in manager_of(server).stats()["tiers"].values())


def corrupt(folder: Path, choose: random.Random) -> None:
    """Damage a file of the tier behind its back."""
    files = sorted(folder.rglob("*.kv"))
    if files:
        file = choose.choice(files)
        try:
            file.write_bytes(bytes(file.stat().st_size))
        except FileNotFoundError:  # evicted meanwhile
            return


@pytest.mark.parametrize("seed", range(6))
def test_a_router_knows_what_the_server_holds(tmp_path: Path, seed: int) -> None:
    """Random stores, loads, evictions by another engine, damage, lost media, resets."""
    choose = random.Random(seed)
    folder = tmp_path / "files"
    far = {"backend": "cpu", "name": "far", "capacity": f"{FAR_BLOCKS * PLAIN_SLOT}B", "write_queue": "1GiB"}
    files = {
        "backend": "directory",
        "root": str(folder),
        "capacity": f"{FILES_BLOCKS * PLAIN_SLOT}B",
        "write_queue": "1GiB",
    }
    stack = {"tiers": [CPU_TIER, far, files]}
    trunks = [prompt(trunk, 6) for trunk in range(3)]
    prompts = [trunk + prompt(10 + branch, 6) for trunk in trunks for branch in range(4)]
    seen = {"announced": 0, "taken back": 0, CPU: 0, STORAGE: 0}

    def check(server: Any, engine: Engine) -> None:
        before = set(engine.router.known)
        router = engine.listen()
        seen["announced"] += len(router.known - before)
        seen["taken back"] += len(before - router.known)
        truth = held(manager_of(server), engine, prompts)
        for medium in (CPU, STORAGE):
            announced = router.in_medium(medium)
            seen[medium] += len(announced)
            assert announced <= truth[medium]
            for tokens in prompts:
                for at in range(len(tokens) // BLOCK_SIZE):
                    above, own = (hash_of(tokens[: (at + more) * BLOCK_SIZE]) for more in (0, 1))
                    if own in truth[medium] and (at == 0 or router.holds(above)):
                        assert own in announced, (at, medium)
        assert all(block.tiers for block in engine.events._blocks.values())
        assert not engine.events._waiting

    def act(server: Any, engine: Engine, other: Engine) -> None:
        tokens = choose.choice(prompts)[: choose.randint(1, 12) * BLOCK_SIZE]
        what = choose.randrange(20)
        if what < 8:
            engine.store(tokens, first=choose.choice([0, 0, choose.randrange(len(tokens) // BLOCK_SIZE)]))
        elif what < 12:
            engine.load(tokens)
        elif what < 15:
            other.store(prompt(choose.randrange(100, 120), choose.randint(1, 12)))
        elif what < 17:
            corrupt(folder, choose)
        elif what == 17:
            engine.form.was_reset = True
            engine.router.known.clear()
        elif what == 18:
            engine.reset()
        else:
            before = manager_of(server).stats()["tiers"]["far"]["restarts"]
            os.kill(manager_of(server).stats()["tiers"]["far"]["pid"], signal.SIGKILL)
            until(lambda: manager_of(server).stats()["tiers"]["far"]["restarts"] > before and ready(server))

    with serving(tmp_path / "s", stack) as server, agent(tmp_path / "s"), agent(tmp_path / "s", "other"):
        until(lambda: ready(server))
        spec = ModelSpec("other", BLOCK_SIZE, SPEC.groups)
        with Engine(tmp_path / "s") as engine, Engine(tmp_path / "s", spec, engine="other") as other:
            for _ in range(60):
                act(server, engine, other)
                check(server, engine)
    assert min(seen.values()) > 20, seen
