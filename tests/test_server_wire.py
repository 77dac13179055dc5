"""The server's side of the wire: handshakes, who is let in, what ends with whom, and that nobody delays another."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from leaks import nothing_held
from server_rig import (
    PAGES,
    SPEC,
    Wire,
    agent,
    hello,
    introduced,
    keys_of,
    manager_of,
    registered,
    serving,
    until,
)

from flexkv_core.framing import framed
from flexkv_core.layout import KVGroup, ModelSpec
from flexkv_core.server import client_session
from flexkv_core.server import messages as m
from flexkv_core.server.connection import MESSAGES_A_TURN, Connection

pytestmark = pytest.mark.usefixtures("leak_check")

BLOCKS = np.arange(4, dtype=np.int64).tobytes()


def test_the_socket_is_the_users_own(tmp_path: Path) -> None:
    with serving(tmp_path / "s"):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    assert not (tmp_path / "s").exists()


def test_another_version_is_refused_with_both(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), Wire(tmp_path / "s") as wire:
        answer = wire.ask(hello(protocol=999, version="9.9.9"))
        assert isinstance(answer, m.Refused)
        assert answer.kind == "version"
        assert "9.9.9" in answer.reason
        assert "999" in answer.reason
        assert f"protocol {m.PROTOCOL}" in answer.reason
        assert wire.hung_up()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in list(tmp_path.parents)[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    with serving(tmp_path / "s"):
        (tmp_path / "s").chmod(0o777)  # even then
        source = (
            "import os, socket, sys\n"
            "os.setuid(65534)\n"
            "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(bytes.fromhex(sys.argv[2]))\n"
            "print(s.recv(65536)[4:])\n"
        )
        said = subprocess.run(
            [sys.executable, "-c", source, str(tmp_path / "s"), m.encode(hello()).hex()],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
        assert "Refused" in said
        assert "user 65534" in said


def test_a_message_before_the_handshake_ends_the_connection(tmp_path: Path) -> None:
    with serving(tmp_path / "s"):
        for message in (m.Null(1, b""), m.Bye(), m.Store(1, b"", b"", [], "")):
            with Wire(tmp_path / "s") as wire:
                answer = wire.ask(message)
                assert isinstance(answer, m.Refused)
                assert wire.hung_up()
        with Wire(tmp_path / "s") as wire:
            wire.socket.sendall(framed(bytes(m.MAX_HELLO_BYTES + 1), m.MAX_MESSAGE_BYTES))
            assert wire.hung_up()


def test_whoever_says_nothing_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv_core.server.daemon.HANDSHAKE_S", 0.05)
    with serving(tmp_path / "s"), Wire(tmp_path / "s") as silent, Wire(tmp_path / "s") as half:
        half.socket.sendall(m.encode(hello())[:7])
        assert silent.hung_up()
        assert half.hung_up()


def test_requests_are_answered_once_and_mistakes_name_the_fix(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), introduced(tmp_path / "s") as wire:
        namespace = registered(wire)
        keys = keys_of(namespace, 1, 4)
        answer = wire.ask(m.Lookup(2, bytes(32), keys))
        assert (answer.id, answer.kind) == (2, "namespace")
        assert "register()" in answer.text
        answer = wire.ask(m.Store(3, namespace.root, keys, [BLOCKS], ""))
        assert (answer.id, answer.kind) == (3, "state")
        assert "DeviceAgent" in answer.text
        answer = wire.ask(m.Register(4, ModelSpec("too large", 4, (KVGroup(1 << 40),)), None))
        assert (answer.id, answer.kind) == (4, "input")
        assert wire.ask(m.Null(5, bytes(100))) == m.Ended(5, ok=True)
        assert wire.ask(m.Drain(6, 1.0)) == m.Ended(6, ok=True)
        assert wire.ask(m.Load(7, 99, [BLOCKS], "")) == m.Moved(7, 0, "the fetch was released")
        assert wire.quiet()


def test_malformed_arrays_end_the_connection_and_nothing_else(tmp_path: Path) -> None:
    with serving(tmp_path / "s") as server, introduced(tmp_path / "s") as good, agent(tmp_path / "s"):
        namespace = registered(good)
        keys = keys_of(namespace, 1, 4)
        for message in (
            m.Lookup(2, namespace.root, keys[:-1]),
            m.Fetch(2, namespace.root, keys + b"x", 1.0, True),
            m.Store(2, namespace.root, keys, [BLOCKS[:-1]], ""),
        ):
            with introduced(tmp_path / "s") as wire:
                assert registered(wire).root == namespace.root
                wire.send(message)
                assert wire.hung_up()
        assert good.ask(m.Lookup(3, namespace.root, keys)) == m.Found(3, 0, 0, pending=False)
        answer = good.ask(m.Store(4, namespace.root, keys, [np.full(4, PAGES, np.int64).tobytes()], ""))
        assert answer.kind == "input"
        assert "blocks 0 to 63" in answer.text
        nothing_held(manager_of(server))


def test_what_a_client_holds_ends_with_goodbye(tmp_path: Path) -> None:
    with serving(tmp_path / "s") as server, introduced(tmp_path / "s") as wire, agent(tmp_path / "s"):
        namespace = registered(wire)
        keys = keys_of(namespace, 1, 4)
        assert wire.ask(m.Store(2, namespace.root, keys, [BLOCKS], "")) == m.Moved(2, 4, None)
        assert wire.ask(m.Fetch(3, namespace.root, keys, 5.0, True)).ready == 4
        assert manager_of(server).stats()["pinned_fetches"] == 1
        wire.send(m.Bye())
        assert wire.hung_up()
        nothing_held(manager_of(server))
        assert server.figures()["server"]["clients"] == []


def test_a_closed_socket_is_not_a_dead_client(tmp_path: Path) -> None:
    """Its pins stay until its process is gone; when the same process comes back, they go."""
    with serving(tmp_path / "s") as server, agent(tmp_path / "s"):
        first = hello()
        wire = Wire(tmp_path / "s")
        assert isinstance(wire.ask(first), m.Welcome)
        namespace = registered(wire)
        keys = keys_of(namespace, 1, 4)
        wire.ask(m.Store(2, namespace.root, keys, [BLOCKS], ""))
        assert wire.ask(m.Fetch(3, namespace.root, keys, 5.0, True)).ready == 4
        wire.close()
        until(lambda: not server.figures()["server"]["clients"][0]["connected"])
        assert manager_of(server).stats()["pinned_fetches"] == 1
        with introduced(tmp_path / "s", previous=first.session):
            nothing_held(manager_of(server))
            assert len(server.figures()["server"]["clients"]) == 1


def test_a_killed_client_loses_its_pins(tmp_path: Path) -> None:
    with serving(tmp_path / "s") as server, agent(tmp_path / "s"), introduced(tmp_path / "s") as wire:
        namespace = registered(wire)
        keys = keys_of(namespace, 1, 4)
        wire.ask(m.Store(2, namespace.root, keys, [BLOCKS], ""))
        messages = [hello(), m.Register(1, SPEC, None), m.Fetch(3, namespace.root, keys, 5.0, True)]
        source = (
            "import socket, sys, time\n"
            "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(bytes.fromhex(sys.argv[2]))\n"
            "time.sleep(600)\n"
        )
        sent = b"".join(m.encode(message) for message in messages).hex()
        with subprocess.Popen([sys.executable, "-c", source, str(tmp_path / "s"), sent]) as process:
            until(lambda: manager_of(server).stats()["pinned_fetches"] == 1)
            process.kill()
        nothing_held(manager_of(server))


def test_a_dead_client_commits_nothing(tmp_path: Path) -> None:
    """Its device blocks may be another's by now, so a copy that was under way counts for nothing."""
    with (
        serving(tmp_path / "s") as server,
        agent(tmp_path / "s") as (_, device, _),
        introduced(tmp_path / "s") as wire,
        introduced(tmp_path / "s") as other,
    ):
        namespace = registered(wire)
        registered(other)
        keys = keys_of(namespace, 1, 4)
        device.gate.clear()
        wire.send(m.Store(2, namespace.root, keys, [BLOCKS], ""))
        until(lambda: server.figures()["server"]["agents"][0]["jobs"] == 1)
        wire.send(m.Bye())
        assert wire.hung_up()
        assert manager_of(server).stats()["pending_stores"] == 1, "the slots wait for the copy"
        device.gate.set()
        nothing_held(manager_of(server))
        assert other.ask(m.Lookup(3, namespace.root, keys)).blocks == 0


def test_a_client_that_floods_is_bounded_and_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_session, "MAX_FETCHES", 16)
    monkeypatch.setattr(client_session, "MAX_TRANSFERS", 16)
    with (
        serving(tmp_path / "s"),
        agent(tmp_path / "s") as (_, device, _),
        introduced(tmp_path / "s") as flood,
        introduced(tmp_path / "s") as polite,
    ):
        namespace = registered(flood)
        registered(polite)
        keys = keys_of(namespace, 1, 4)
        device.gate.clear()
        for number in range(40):
            flood.send(m.Store(100 + number, namespace.root, keys_of(namespace, number, 4), [BLOCKS], ""))
        answers = [flood.receive() for _ in range(24)]
        assert {type(answer) for answer in answers} == {m.Failed}
        assert {answer.kind for answer in answers if isinstance(answer, m.Failed)} == {"busy"}
        device.gate.set()
        assert [type(flood.receive()) for _ in range(16)] == [m.Moved] * 16
        for number in range(40):
            flood.send(m.Fetch(200 + number, namespace.root, keys, 5.0, True))
        kinds = [type(flood.receive()) for _ in range(40)]
        assert (kinds.count(m.Progress), kinds.count(m.Failed)) == (16, 24)
        assert polite.ask(m.Lookup(9, namespace.root, keys)).blocks == 4


def test_messages_of_two_clients_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst of one is not served whole before another's single request."""
    sent: list[type] = []
    send = Connection.send
    with serving(tmp_path / "s"), introduced(tmp_path / "s") as burst, introduced(tmp_path / "s") as one:

        def recorded(self: Connection, message: m.FromServer, fds: Sequence[int] = ()) -> None:
            if not sent:  # the burst is being served
                one.send(m.Null(1, b""))
            sent.append(type(message))
            send(self, message, fds)

        monkeypatch.setattr(Connection, "send", recorded)
        count = 2000
        burst.socket.sendall(b"".join(m.encode(m.Stats(number)) for number in range(count)))
        for _ in range(count):
            assert isinstance(burst.receive(), m.Figures)
        assert isinstance(one.receive(), m.Ended)
        assert sent.index(m.Ended) <= 3 * MESSAGES_A_TURN


def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv_core.server.connection.MAX_OUTGOING_BYTES", 1 << 20)
    with serving(tmp_path / "s") as server, introduced(tmp_path / "s") as deaf, introduced(tmp_path / "s") as good:
        deaf.socket.setblocking(False)
        data = b"".join(m.encode(m.Stats(number)) for number in range(64))
        for _ in range(10_000):
            try:
                deaf.socket.send(data)
            except BlockingIOError:
                assert isinstance(good.ask(m.Null(1, b"")), m.Ended)
            except OSError:
                break
        until(lambda: len(server.figures()["server"]["clients"]) == 1)
        assert isinstance(good.ask(m.Null(2, b"")), m.Ended)


def test_resets_move_one_client_and_leave_others_where_they_are(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s"),
        agent(tmp_path / "s"),
        introduced(tmp_path / "s") as one,
        introduced(tmp_path / "s") as two,
    ):
        namespace = registered(one)
        assert registered(two).root == namespace.root
        keys = keys_of(namespace, 1, 4)
        one.ask(m.Store(2, namespace.root, keys, [BLOCKS], ""))
        assert one.ask(m.Fetch(3, namespace.root, keys, 5.0, True)).ready == 4
        one.send(m.Reset(4, namespace.root))
        answers = [one.receive(), one.receive()]
        ended = next(answer for answer in answers if isinstance(answer, m.Progress))
        fresh = next(answer for answer in answers if isinstance(answer, m.Registered))
        assert ended.why == "cancelled"
        assert fresh.epoch
        assert one.ask(m.Lookup(5, namespace.root, keys)).kind == "namespace"
        assert two.ask(m.Lookup(6, namespace.root, keys)).blocks == 4
        assert registered(one).epoch == fresh.epoch
        answer = two.ask(m.Reset(7, namespace.root))
        assert answer.epoch not in (b"", fresh.epoch)
        assert two.ask(m.Lookup(8, namespace.root, keys)).kind == "namespace"


def test_the_linger_begins_when_the_last_has_gone(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s", linger_s=0.2) as server,
        introduced(tmp_path / "s") as wire,
        introduced(tmp_path / "s", role="observer") as observer,
    ):
        assert not server._stop.wait(0.5)
        wire.send(m.Bye())
        assert server._stop.wait(10), "an observer keeps no server alive"
        assert observer.hung_up()
    assert not (tmp_path / "s").exists()


def test_an_observer_sees_figures_and_may_do_nothing(tmp_path: Path) -> None:
    with serving(tmp_path / "s"), introduced(tmp_path / "s", role="observer") as wire:
        answer = wire.ask(m.Stats(1))
        assert b'"state": "ready"' in answer.figures
        wire.send(m.Register(2, SPEC, None))
        assert wire.hung_up()


def test_namespaces_that_no_client_uses_are_forgotten_with_their_blocks(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s") as server,
        agent(tmp_path / "s"),
        introduced(tmp_path / "s") as one,
        introduced(tmp_path / "s") as two,
    ):
        namespace = registered(one)
        registered(two)
        empty = registered(one, ModelSpec("never stored", 4, SPEC.groups))
        keys = keys_of(namespace, 1, 4)
        one.ask(m.Store(2, namespace.root, keys, [BLOCKS], ""))
        assert manager_of(server)._planner.namespaces == 2
        one.send(m.Bye())
        until(lambda: manager_of(server)._planner.namespaces == 1)
        assert two.ask(m.Lookup(3, namespace.root, keys)).blocks == 4, "another client uses it"
        two.send(m.Unregister(namespace.root))
        assert registered(two).root == namespace.root
        assert two.ask(m.Lookup(4, namespace.root, keys)).blocks == 4, "its blocks are still there"
        del empty
