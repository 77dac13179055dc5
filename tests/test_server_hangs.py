"""Servers that hang, answer late, or cut a client off: nothing waits for them, and what was told them holds."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leaks import nothing_held
from server_rig import BLOCK_SIZE, SPEC, ServerProcess, agent, manager_of, serving, until

from flexkv_core.blocks import block_keys
from flexkv_core.errors import ServerAwayError, StateError
from flexkv_core.server import channel, client, connect, daemon
from flexkv_core.server.client import Client
from flexkv_core.server.daemon import Server

pytestmark = pytest.mark.usefixtures("leak_check")
COUNT = 8
DEADLINE_S = 0.5
"""Of tests in which a call runs into it; a busy machine must be able to answer the others."""
FIRST = np.arange(COUNT, dtype=np.int64)
BUSY = np.zeros((100_000, 32), np.uint8)
"""Keys that no socket takes in one piece."""


def keys(namespace: Any, seed: int = 1) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(0, 1 << 31, COUNT * BLOCK_SIZE, dtype=np.int32)
    return block_keys(tokens, BLOCK_SIZE, namespace.root)


def cut_off(server: Server, cache: Client) -> None:
    """The server closes the client's connection; its process lives on."""
    held = next(each for each in server._clients.values() if each.hello.engine == cache.engine)
    server._loop.call_soon_threadsafe(held._connection.close, "for a test")
    until(lambda: not cache.connected)


# ---------------------------------------------------------------- hanging


def test_nothing_waits_to_send_to_a_server_that_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_UNSENT_BYTES", 1 << 16)
    with ServerProcess(tmp_path / "s") as server, connect(tmp_path / "s") as cache:
        model = cache.register(SPEC)
        prefix = keys(model)
        with server.hanging(), monkeypatch.context() as patch:
            patch.setattr(channel.select, "poll", lambda: pytest.fail("a call waits"))
            while not cache.figures()["busy"]:
                cache.fetch(model, prefix).release()
            for _ in range(100):
                assert cache.fetch(model, prefix).why == "refused"
                assert cache.store(model, prefix, FIRST).error == client.BUSY
            assert cache.lookup(model, prefix).blocks == 0
        until(lambda: cache.fetch(model, prefix).wait(10) and cache.stats())
        figures = cache.figures()
        assert (figures["connections"], figures["timeouts"]) == (1, 0)


def test_a_fetch_that_nothing_is_said_of_is_done_at_its_deadline(tmp_path: Path) -> None:
    with (
        ServerProcess(tmp_path / "s") as server,
        agent(tmp_path / "s"),
        connect(tmp_path / "s", engine="e", deadline_s=DEADLINE_S) as cache,
    ):
        model = cache.register(SPEC)
        prefix = keys(model)
        assert cache.store(model, prefix, FIRST).wait(10)
        with server.hanging():
            first, second = cache.fetch(model, prefix, 0.0), cache.fetch(model, prefix, 0.3)
            until(lambda: first.done)
            assert second.wait(20)
            for fetch in (first, second):
                assert (fetch.ready, fetch.why, fetch.released) == (0, "server", True)
            before = cache.figures()
            assert before["timeouts"] == 2
            assert cache.load(first, FIRST).error == "the fetch was lost with the server"
            assert cache.lookup(model, prefix).blocks == 0
            assert cache.figures()["timeouts"] == 2, "the server is known to hang"
        until(lambda: cache.connected)
        assert cache.lookup(model, prefix[:3]).blocks == 3, "and no late answer is taken for another's"
        until(lambda: cache.stats()["pinned_fetches"] == 0)


def test_what_a_hanging_server_was_told_to_copy_is_not_done(tmp_path: Path) -> None:
    """When it awakes it copies: the device blocks are not the engine's before."""
    with (
        ServerProcess(tmp_path / "s") as server,
        agent(tmp_path / "s"),
        connect(tmp_path / "s", engine="e", deadline_s=DEADLINE_S) as cache,
    ):
        model = cache.register(SPEC)
        with server.hanging():
            transfer = cache.store(model, keys(model), FIRST)
            assert cache.lookup(model, keys(model)).blocks == 0
            assert not transfer.wait(0.1)
            late = cache.store(model, keys(model, 2), FIRST)
            assert (late.done, late.error) == (True, client.AWAY), "this one it was never told"
        assert transfer.wait(10)
        assert (transfer.blocks, transfer.error) == (COUNT, None)
        assert cache.lookup(model, keys(model, 2)).blocks == 0


def test_a_reset_that_is_answered_late_is_not_told_again(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "s") as server, connect(tmp_path / "s", deadline_s=DEADLINE_S) as cache:
        model = cache.register(SPEC)
        with server.hanging():
            fresh = cache.reset(model)
            assert cache.figures()["timeouts"] == 1
        until(lambda: cache.connected)
        with connect(tmp_path / "s", deadline_s=10) as other:
            epoch = other.register(SPEC).epoch
            assert epoch != model.epoch
            until(lambda: cache.fetch(fresh, keys(fresh)).why != "server")
            assert other.register(SPEC).epoch == epoch


def test_closing_ends_who_waits_for_a_server_that_hangs(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "s") as server, connect(tmp_path / "s", deadline_s=DEADLINE_S) as cache:
        model = cache.register(SPEC)
        with server.hanging():
            fetch = cache.fetch(model, keys(model), 3600)
            waiters = [threading.Thread(target=fetch.wait) for _ in range(3)]
            for waiter in waiters:
                waiter.start()
            until(lambda: cache._channel._polling)
            cache.close()
            for waiter in waiters:
                waiter.join(10)
                assert not waiter.is_alive()


# ---------------------------------------------------------------- many waiters


def test_waiters_without_a_limit_share_the_reading(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), agent(tmp_path / "s") as (_, device, _), connect(tmp_path / "s", engine="e") as cache:
        model = cache.register(SPEC)
        device.gate.clear()
        transfer = cache.store(model, keys(model), FIRST)
        results: list[bool] = []
        waiters = [threading.Thread(target=lambda: results.append(transfer.wait())) for _ in range(3)]
        for waiter in waiters:
            waiter.start()
        until(lambda: cache._channel._polling)
        device.gate.set()
        for waiter in waiters:
            waiter.join(10)
        assert results == [True] * 3


def test_a_long_message_goes_out_while_another_thread_reads(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s"),
        agent(tmp_path / "s") as (_, device, _),
        connect(tmp_path / "s", engine="e", deadline_s=10) as cache,
    ):
        model = cache.register(SPEC)
        device.gate.clear()
        transfer = cache.store(model, keys(model), FIRST)
        waiter = threading.Thread(target=transfer.wait)
        waiter.start()
        until(lambda: cache._channel._reading)
        assert cache.null(BUSY.tobytes())
        assert cache.lookup(model, BUSY).blocks == 0
        assert cache.figures()["timeouts"] == 0
        device.gate.set()
        waiter.join(10)


def test_what_no_message_can_hold_is_a_miss(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), connect(tmp_path / "s") as cache:
        model = cache.register(SPEC)
        many = np.zeros(((1 << 20) + 1, 32), np.uint8)
        assert cache.lookup(model, many).blocks == 0
        assert cache.fetch(model, many).why == "refused"
        assert cache.store(model, many, FIRST).error == client.BUSY
        assert cache.lookup(model, many[:COUNT]).blocks == 0
        assert cache.figures()["connections"] == 1


# ---------------------------------------------------------------- cut off, turned away, forked


def test_what_a_client_held_is_released_when_it_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if an attempt in between got nowhere."""
    with serving(tmp_path / "s") as server, agent(tmp_path / "s"), connect(tmp_path / "s", engine="c") as cache:
        with connect(tmp_path / "s", engine="e") as other:
            model = other.register(SPEC)
            assert other.store(model, keys(model), FIRST).wait(10)
        cache.register(SPEC)
        fetch = cache.fetch(model, keys(model))
        assert fetch.wait(10)
        with monkeypatch.context() as patch:
            patch.setattr(daemon, "MAX_CONNECTIONS", 0)
            cut_off(server, cache)
            assert fetch.why == "server"
            said = cache._session
            until(lambda: cache.stats() or cache._session != said)
        assert manager_of(server).stats()["pinned_fetches"] == 1, "its process lives: it might still load"
        until(cache.stats)
        nothing_held(manager_of(server))


def test_a_client_that_was_cut_off_stores_nothing_more(tmp_path: Path) -> None:
    """It was told that its store failed, so the device blocks may hold something else when they are copied."""
    with (
        serving(tmp_path / "s") as server,
        agent(tmp_path / "s") as (_, device, _),
        connect(tmp_path / "s", engine="e") as cache,
    ):
        model = cache.register(SPEC)
        device.gate.clear()
        transfer = cache.store(model, keys(model), FIRST)
        until(lambda: server.figures()["server"]["agents"][0]["jobs"] == 1)
        cut_off(server, cache)
        assert (transfer.done, transfer.error) == (True, client.AWAY)
        device.gate.set()
        until(lambda: not manager_of(server).stats()["pending_stores"])
        until(cache.stats)
        until(lambda: cache.fetch(model, keys(model)).wait(10) and cache._names.knows(model.root))
        assert cache.lookup(model, keys(model)).blocks == 0
        nothing_held(manager_of(server))


def test_a_server_that_is_stopping_is_away(tmp_path: Path) -> None:
    with serving(tmp_path / "s") as server:
        server.stopping = True
        with pytest.raises(ServerAwayError):
            connect(tmp_path / "s", connect_s=0.2)
        server.stopping = False
        connect(tmp_path / "s").close()


def test_a_forked_process_takes_no_answer_of_its_parents(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), agent(tmp_path / "s") as (_, device, _), connect(tmp_path / "s", engine="e") as cache:
        model = cache.register(SPEC)
        device.gate.clear()
        transfer, fetch = cache.store(model, keys(model), FIRST), cache.fetch(model, keys(model))
        until(lambda: fetch._client and cache.fetch(model, keys(model)).wait(10))
        uses = (
            lambda: transfer.done,
            lambda: transfer.wait(1),
            lambda: fetch.ready,
            fetch.release,
            lambda: cache.cancel(transfer),
            lambda: cache.connected,
            cache.stats,
        )
        pid = os.fork()
        if pid == 0:
            refused = 0
            for use in uses:
                try:
                    use()
                except StateError:
                    refused += 1
            cache.close()
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == len(uses)
        device.gate.set()
        assert transfer.wait(10)
        assert transfer.blocks == COUNT
