"""The client: answers like the manager's, never late, and none of a server's troubles reaches the engine."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leaks import nothing_held
from server_rig import BLOCK_SIZE, PAGES, SPEC, ServerProcess, agent, manager_of, serving, until

from flexkv_core.blocks import block_keys
from flexkv_core.errors import (
    KeyInputError,
    KeyTypeError,
    LayoutError,
    ServerAwayError,
    ServerRefusedError,
    StateError,
    UnknownNamespaceError,
)
from flexkv_core.layout import KVGroup, ModelSpec
from flexkv_core.server import Client, client, connect
from flexkv_core.server import messages as m

pytestmark = pytest.mark.usefixtures("leak_check")
COUNT = 8
FIRST, SECOND = np.arange(COUNT, dtype=np.int64), np.arange(COUNT, 2 * COUNT, dtype=np.int64)


def keys(namespace: Any, seed: int = 1, blocks: int = COUNT) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(0, 1 << 31, blocks * BLOCK_SIZE, dtype=np.int32)
    return block_keys(tokens, BLOCK_SIZE, namespace.root)


def persistent(folder: Path) -> dict[str, Any]:
    tier = {"backend": "directory", "root": str(folder / "blocks"), "capacity": "64MiB"}
    return {"tiers": [{"backend": "cpu", "capacity": "16MiB", "prefault": False}, tier]}


def test_a_prefix_goes_in_and_comes_back(tmp_path: Path) -> None:
    with serving(tmp_path / "s") as server, agent(tmp_path / "s") as (_, _, tensor):
        with connect(tmp_path / "s", engine="e") as cache:
            model = cache.register(SPEC)
            prefix = keys(model)
            assert cache.lookup(model, prefix).blocks == 0
            transfer = cache.store(model, prefix, FIRST)
            assert cache.wait(transfer, 10)
            assert (transfer.blocks, transfer.error) == (COUNT, None)
            assert cache.lookup(model, prefix) == (found := cache.lookup(model, prefix))
            assert (found.blocks, found.host_blocks, found.pending) == (COUNT, COUNT, False)
            fetch = cache.fetch(model, prefix)
            assert fetch.wait(10)
            assert (fetch.ready, fetch.sources, fetch.why, fetch.released) == (COUNT, {"cpu": COUNT}, "", False)
            transfer = cache.load(fetch, SECOND)
            assert transfer.wait(10)
            assert (transfer.blocks, transfer.error) == (COUNT, None)
            assert np.array_equal(tensor[SECOND], tensor[FIRST])
            fetch.release()
            fetch.release()
            assert fetch.why == "released"
            assert cache.drain(5)
            assert cache.stats()["tiers"]["cpu"]["hit_blocks"] == COUNT
            with pytest.raises(StateError):
                cache.load(fetch, SECOND)
            prefetch = cache.prefetch(model, prefix)
            assert prefetch.wait(10)
            until(lambda: prefetch.released)
            assert prefetch.why == "released"
        nothing_held(manager_of(server))


def test_mistakes_are_told_like_the_managers(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), agent(tmp_path / "s"), connect(tmp_path / "s", engine="e") as cache:
        model = cache.register(SPEC)
        prefix = keys(model)
        with pytest.raises(KeyTypeError):
            cache.lookup(model, prefix.astype(np.int64))
        with pytest.raises(KeyInputError):
            cache.fetch(model, prefix[:, :16])
        with pytest.raises(KeyInputError):
            cache.store(model, prefix, np.arange(COUNT + 1, dtype=np.int64))
        with pytest.raises(LayoutError, match="cannot hold one slot"):
            cache.register(ModelSpec("huge", 4, (KVGroup(1 << 40),)))
        transfer = cache.store(model, prefix, np.full(COUNT, PAGES, np.int64))
        assert transfer.wait(10)
        assert "blocks 0 to 63" in (transfer.error or "")
        fresh = cache.reset(model)
        with pytest.raises(UnknownNamespaceError):
            cache.lookup(model, prefix)
        assert cache.lookup(fresh, keys(fresh)).blocks == 0
        cache.unregister(fresh)
        with pytest.raises(UnknownNamespaceError):
            cache.fetch(fresh, keys(fresh))
    with pytest.raises(StateError, match="closed"):
        cache.lookup(fresh, prefix)


def test_no_server_is_said_by_connect_only(tmp_path: Path) -> None:
    with pytest.raises(ServerAwayError, match=r"within 0\.1 s"):
        connect(tmp_path / "s", connect_s=0.1)
    with Client(tmp_path / "s") as cache:
        assert not cache.connected
        assert cache.stats() == {}
        assert not cache.drain(1)
        with pytest.raises(ServerAwayError):
            cache.register(SPEC)


def test_another_version_is_told_with_both(tmp_path: Path) -> None:
    prelude = "import flexkv_core.server.messages as m; m.PROTOCOL = 999; daemon.__version__ = '9.9.9'"
    server = ServerProcess(tmp_path / "s", prelude=prelude)
    server._ready = (tmp_path / "s").exists  # type: ignore[method-assign]
    with (
        server,
        pytest.raises(ServerRefusedError, match=rf"9\.9\.9 with protocol 999, .*0\.1\.0 with protocol {m.PROTOCOL}"),
    ):
        connect(tmp_path / "s")


def test_another_version_after_a_restart_is_said_once_and_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = ServerProcess(tmp_path / "s")
    with server, connect(tmp_path / "s") as cache:
        model = cache.register(SPEC)
        server.kill()
        server.prelude = "import flexkv_core.server.messages as m; m.PROTOCOL = 999"
        server._ready = (tmp_path / "s").exists  # type: ignore[method-assign]
        (tmp_path / "s").unlink()
        server.start()
        tried: set[bytes] = set()

        def misses() -> bool:
            assert cache.lookup(model, keys(model)).blocks == 0
            assert cache.fetch(model, keys(model)).why == "server"
            tried.add(cache._session)
            return len(tried) > 3

        until(misses)
        assert caplog.text.count("protocol 999") == 1


def test_a_server_that_hangs_costs_one_deadline(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "s") as server, connect(tmp_path / "s", deadline_s=0.2) as cache:
        model = cache.register(SPEC)
        prefix = keys(model)
        with server.hanging():
            before = cache.figures()
            assert cache.lookup(model, prefix).blocks == 0
            assert cache.figures()["timeouts"] == before["timeouts"] + 1
            for _ in range(100):
                assert cache.lookup(model, prefix).blocks == 0
                fetch = cache.fetch(model, prefix)
                assert (fetch.done, fetch.ready, fetch.why) == (True, 0, "server")
                assert cache.store(model, prefix, FIRST).error is not None
            figures = cache.figures()
            assert figures["timeouts"] == before["timeouts"] + 1, "no more than one call has waited"
            assert figures["away"] - before["away"] == 300
        until(lambda: cache.connected)  # its late answer has come
        assert cache.fetch(model, prefix).wait(10)
        assert cache.figures()["connections"] == 1


def test_a_server_that_was_killed_is_missed_at_once_and_found_again(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "s", persistent(tmp_path))
    server.start()
    with agent(tmp_path / "s") as (made, _, tensor), connect(tmp_path / "s", engine="e") as cache:
        model = cache.register(SPEC)
        prefix = keys(model)
        assert cache.store(model, prefix, FIRST).wait(10)
        assert cache.drain(10)
        fetch = cache.fetch(model, prefix)
        assert fetch.wait(10)
        server.kill()
        until(lambda: fetch.released)
        assert fetch.why == "server"
        transfer = cache.load(fetch, SECOND)
        assert (transfer.done, transfer.error) == (True, "the fetch was lost with the server")
        assert cache.lookup(model, prefix).blocks == 0
        assert cache.fetch(model, prefix).done
        assert cache.store(model, prefix, FIRST).error == client.AWAY
        server.start()
        assert made.wait_connected(10)
        until(lambda: cache.lookup(model, prefix).blocks == COUNT)  # the same namespace, without another register()
        fetch = cache.fetch(model, prefix)
        assert fetch.wait(10)
        assert fetch.sources["directory"] == COUNT
        assert cache.load(fetch, SECOND).wait(10)
        assert np.array_equal(tensor[SECOND], tensor[FIRST])
        assert cache.figures()["connections"] == 2
    assert server.stop() == 0


def test_a_reset_without_a_server_holds_when_it_is_back(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "s", persistent(tmp_path))
    server.start()
    with agent(tmp_path / "s") as (made, _, _), connect(tmp_path / "s", engine="e") as cache:
        model = cache.register(SPEC)
        assert cache.store(model, keys(model), FIRST).wait(10)
        assert cache.drain(10)
        server.kill()
        until(lambda: not cache.connected)
        fresh = cache.reset(model)
        assert fresh.root != model.root
        with pytest.raises(UnknownNamespaceError):
            cache.lookup(model, keys(model))
        server.start()
        assert made.wait_connected(10)
        until(lambda: cache.store(fresh, keys(fresh), FIRST).wait(10) and cache.lookup(fresh, keys(fresh)).blocks)
        with connect(tmp_path / "s") as other:
            late = other.register(SPEC)
            assert late.epoch not in (model.epoch, fresh.epoch), "whoever comes later does not get the old one either"
            assert other.lookup(late, keys(late)).blocks == 0
    assert server.stop() == 0


def test_many_threads_share_a_client(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), agent(tmp_path / "s"), connect(tmp_path / "s", engine="e", deadline_s=10) as cache:
        model = cache.register(SPEC)
        wrong: list[object] = []

        def work(seed: int) -> None:
            for step in range(30):
                prefix = keys(model, 100 * seed + step, 2)
                blocks = np.array([2 * seed, 2 * seed + 1], np.int64)
                transfer = cache.store(model, prefix, blocks)
                if not transfer.wait(10) or transfer.error:
                    wrong.append(transfer.error)
                fetch = cache.fetch(model, prefix)
                if not fetch.wait(10) or fetch.ready != 2 or cache.lookup(model, prefix).blocks != 2:
                    wrong.append((fetch.ready, fetch.why))
                fetch.release()

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong
        assert cache.figures()["timeouts"] == 0


def test_a_waiter_that_gives_up_hands_over(tmp_path: Path) -> None:
    """Whoever reads leaves at its own deadline; another who still waits takes over."""
    with serving(tmp_path / "s"), agent(tmp_path / "s") as (_, device, _), connect(tmp_path / "s", engine="e") as cache:
        model = cache.register(SPEC)
        device.gate.clear()
        transfer = cache.store(model, keys(model), FIRST)
        results: list[bool] = []
        short = threading.Thread(target=lambda: results.append(transfer.wait(0.2)))
        long = threading.Thread(target=lambda: results.append(transfer.wait(10)))
        short.start()
        time.sleep(0.05)
        long.start()
        short.join(10)
        assert results == [False]
        device.gate.set()
        long.join(10)
        assert results == [False, True]


def test_what_is_under_way_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_UNDER_WAY", 4)
    with serving(tmp_path / "s"), agent(tmp_path / "s") as (_, device, _), connect(tmp_path / "s", engine="e") as cache:
        model = cache.register(SPEC)
        device.gate.clear()
        transfers = [cache.store(model, keys(model, seed), FIRST) for seed in range(6)]
        assert ["under way" in (transfer.error or "") for transfer in transfers] == [False] * 4 + [True] * 2
        assert cache.fetch(model, keys(model)).why == "refused"
        device.gate.set()
        assert all(transfer.wait(10) for transfer in transfers)
        assert cache.figures()["busy"] == 3


def test_a_cancelled_store_ends_when_its_copy_has(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s") as server,
        agent(tmp_path / "s") as (_, device, _),
        connect(tmp_path / "s", engine="e") as cache,
    ):
        model = cache.register(SPEC)
        device.gate.clear()
        transfer = cache.store(model, keys(model), FIRST)
        until(lambda: server.figures()["server"]["agents"][0]["jobs"] == 1)
        cache.cancel(transfer)
        assert not transfer.wait(0.1), "its device blocks are still being read"
        device.gate.set()
        assert transfer.wait(10)
        assert transfer.error == "cancelled"
        assert cache.lookup(model, keys(model)).blocks == 0


def test_another_process_needs_its_own_client(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), connect(tmp_path / "s") as cache:
        model = cache.register(SPEC)
        pid = os.fork()
        if pid == 0:
            try:
                cache.lookup(model, keys(model))
            except StateError as error:
                os._exit(0 if "connect() in this one" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert cache.lookup(model, keys(model)).blocks == 0


def test_a_socket_of_another_user_is_told_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path / "s"):
        monkeypatch.setattr("flexkv_core.server.channel.os.geteuid", lambda: 4242)
        with pytest.raises(ServerAwayError):
            connect(tmp_path / "s", connect_s=0.2)
        monkeypatch.undo()
        connect(tmp_path / "s").close()
