"""`flexkv status`, latencies and summaries: what a server says of itself."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from server_rig import CPU_ONLY, PATIENCE_S, agent, introduced, keys_of, registered, serving, until
from test_server_metrics import use

from flexkv_core.cli import status
from flexkv_core.cli.main import main
from flexkv_core.server import connect
from flexkv_core.server import messages as m
from flexkv_core.server.latency import BUCKETS, Latencies, quantile

pytestmark = pytest.mark.usefixtures("leak_check")
ENGINE = "e[red]\x1b[31m\nforged"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["status", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def two_tiers(tmp_path: Path) -> dict[str, Any]:
    lower = {"backend": "directory", "root": str(tmp_path / "d"), "capacity": "16MiB"}
    return {"tiers": [*CPU_ONLY["tiers"], lower]}


def test_tables_and_json_of_a_running_server(tmp_path: Path) -> None:
    path, file = tmp_path / "s", tmp_path / "figures.json"
    with serving(path, two_tiers(tmp_path)) as server, agent(path, ENGINE), connect(path, engine=ENGINE) as cache:
        until(lambda: cache.stats()["tiers"]["directory"]["state"] == "ready")
        use(cache)
        output = run("--socket", f"ipc://{path}", "--json", file).output
        figures = json.loads(file.read_text())
        kept = server.figures()
    assert figures["tiers"].keys() == kept["tiers"].keys() == {"cpu", "directory"}
    assert figures["tiers"]["cpu"]["hit_blocks"] == kept["tiers"]["cpu"]["hit_blocks"] == 6
    rows = {line.split()[0]: [] for line in output.splitlines() if line.split()}
    for line in output.splitlines():
        if line.split():
            rows[line.split()[0]].append(line.split())
    assert rows["cpu"][0][1:] == ["cpu", "16.0", "MiB", "48.0", "KiB", "(0%)", "6", "6", "0", "0", "B", "0", "B"]
    assert rows["cpu"][1][1:] == ["ok", "ready", "6", "37.5%", "37.5%", "-", "-"]
    pid = str(figures["tiers"]["directory"]["pid"])
    assert rows["directory"][1][1:] == ["ok", "ready,", pid, "0", "0.0%", "0.0%", "0/0/0", "closed/closed"]
    assert "fetches asked for 16 blocks, 37.5% hits" in output
    assert [rows[what][0][1] for what in ("lookup", "fetch", "load", "store")] == ["2", "2", "1", "2"]
    assert f"{ENGINE[:6]}?[31m?forged" in output
    assert "\x1b" not in output
    assert "0 of 1   yes" in output
    assert str(path) in output.replace("\n", "")


def test_troubles_are_shown_where_there_are_any(tmp_path: Path) -> None:
    with serving(tmp_path / "s", two_tiers(tmp_path)) as server:
        figures = server.figures()
        figures["tiers"]["directory"].update(corrupt_blocks=7, restarts=3, health="away")
        figures["tiers"]["directory"]["breaker"].update(read="open", last_trouble="a read [b]took[/b] 9 s")
        figures["server"]["metrics"] = {"url": "http://x", "error": "port 1 is taken"}
        figures.update(expired_fetches=2, refused_stores=4, epochs={"error": "disk full"})
    output = io.StringIO()
    status.show(figures, Console(file=output, width=200))
    text = output.getvalue()
    for part in (
        "away",
        "open/closed",
        "a read [b]took[/b] 9 s",
        "metrics are not served: port 1 is taken",
        "2 fetches that lost their pins",
        "4 stores refused",
        "not on disk everywhere: disk full",
    ):
        assert part in text
    troubled = [line.split() for line in text.splitlines() if "took" in line]
    assert troubled[0][:9] == ["directory", "7", "0", "0", "0", "0", "0", "0", "3"]
    assert sum(line.split()[:1] == ["cpu"] for line in text.splitlines()) == 2, "nothing is wrong with it"


def test_a_server_that_starts(tmp_path: Path) -> None:
    with serving(tmp_path / "s") as server:
        figures = {"server": {**server.figures()["server"], "state": "starting"}}
    output = io.StringIO()
    status.show(figures, Console(file=output, width=200))
    assert "starting" in output.getvalue()


def test_no_server_is_said_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "CONNECT_S", 0.05)
    file = tmp_path / "figures.json"
    assert f"no server answers at {tmp_path / 'none'}" in run(
        "--socket", tmp_path / "none", "--json", file, code=1
    ).output.replace("\n", "")
    assert not file.exists()
    monkeypatch.setenv("FLEXKV_SERVER_RECV_PORT", f"ipc://{tmp_path}/of-the-variable")
    assert f"{tmp_path}/of-the-variable" in run(code=1).output.replace("\n", "")
    monkeypatch.delenv("FLEXKV_SERVER_RECV_PORT")
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    assert f"{tmp_path}/run/flexkv/server.sock" in run(code=1).output.replace("\n", "")
    assert "only local sockets" in run("--socket", "tcp://host:1", code=2).output


@contextlib.contextmanager
def impostor(path: Path, *answers: m.Message) -> Iterator[None]:
    """Answers the first message of a connection with these, and then nothing."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                for each in answers:
                    connection.sendall(m.encode(each))
                connection.settimeout(PATIENCE_S)
                while connection.recv(1 << 16):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            thread.join(PATIENCE_S)


def test_a_server_that_hangs_or_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "CONNECT_S", 0.1)
    monkeypatch.setattr(status, "ANSWER_S", 0.1)
    with impostor(tmp_path / "a"):
        assert "no server answers at" in run("--socket", tmp_path / "a", code=1).output
    with impostor(tmp_path / "b", m.Refused("version", "install the same version in both")):
        output = run("--socket", tmp_path / "b", code=1).output
        assert "install the same version in both" in output.replace("\n", " ")
    with impostor(tmp_path / "c", m.Welcome(m.PROTOCOL, "1", 4711, "", 0, ready=True)):
        output = run("--socket", tmp_path / "c", code=1).output
        assert "(process 4711) has not said its figures in time" in output.replace("\n", " ")


# ---------------------------------------------------------------- latencies


def test_each_latency_is_in_its_bucket() -> None:
    latencies = Latencies()
    bounds = BUCKETS["fetch"]
    for seconds in (0.0, bounds[0], bounds[0] * 1.001, bounds[-1], bounds[-1] * 1.001):
        latencies.observe("fetch", seconds)
    figures = latencies.figures()["fetch"]
    counts = figures["counts"]
    assert (counts[0], counts[1], counts[-2], counts[-1], sum(counts)) == (2, 1, 1, 1, 5)
    assert figures["seconds"] == pytest.approx(2.001 * bounds[0] + 2.001 * bounds[-1])
    assert (BUCKETS["lookup"][0], bounds[0], bounds[-1]) == (20e-6, 100e-6, 60.0)
    assert all(list(each) == sorted(set(each)) for each in BUCKETS.values())


def test_quantiles_are_bounds_of_buckets() -> None:
    figures = {"bounds": [1.0, 2.0, 3.0], "counts": [0, 50, 49, 1]}
    assert [quantile(figures, share) for share in (0.0, 0.5, 0.51, 0.99, 0.995)] == [2.0, 2.0, 3.0, 3.0, float("inf")]
    assert quantile({"bounds": [1.0], "counts": [0, 0]}, 0.5) is None


# ---------------------------------------------------------------- summaries


def test_a_summary_every_so_many_fetches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flexkv.summary")
    environ = {"FLEXKV_NUM_LOG_INTERVAL_REQUESTS": "3"}

    def fetch(wire: Any, number: int, root: bytes, keys: bytes, keep: bool = True) -> None:
        progress = wire.ask(m.Fetch(number, root, keys, 5.0, keep))
        while not progress.done:
            progress = wire.receive()
        wire.send(m.Release(number))

    def told() -> list[Any]:
        return [record for record in caplog.records if record.name == "flexkv.summary"]

    with (
        serving(tmp_path / "s", two_tiers(tmp_path), environ=environ),
        agent(tmp_path / "s"),
        introduced(tmp_path / "s") as one,
        introduced(tmp_path / "s") as two,
        connect(tmp_path / "s", engine="e") as cache,
    ):
        until(lambda: cache.stats()["tiers"]["directory"]["state"] == "ready")
        namespace = registered(one)
        registered(two)
        for number in range(2):
            fetch(one, 10 + number, namespace.root, keys_of(namespace, 1, 4))
            fetch(one, 20 + number, namespace.root, keys_of(namespace, 1, 4), keep=False)
        assert not told(), "prefetches do not count"
        fetch(two, 30, namespace.root, keys_of(namespace, 2, 4))
        (first,) = told()
        assert first.getMessage() == "3 fetches of 12 blocks: 0.0% hits"
        use(cache)
        assert len(told()) == 1
        fetch(two, 31, namespace.root, keys_of(namespace, 2, 4))
        second = told()[1]
    expected = {
        "requests": 3,
        "blocks": 20,
        "hit_rate": 0.3,
        "hit_rate_cpu": 0.3,
        "hit_rate_directory": 0.0,
        "stored_cpu": 6,
        "stored_directory": 6,
        "queued_directory": 0,
        "degraded": "none",
    }
    assert {name: getattr(second, name) for name in expected} == expected
