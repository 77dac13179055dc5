"""Prometheus: what is exposed is what the docs say and the server counts, and scraping harms nobody."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families as families_of
from server_rig import (
    BLOCK_SIZE,
    CPU_ONLY,
    PATIENCE_S,
    SPEC,
    agent,
    introduced,
    keys_of,
    manager_of,
    registered,
    serving,
    until,
)

from flexkv_core.blocks import block_keys
from flexkv_core.server import connect, metrics_endpoint
from flexkv_core.server import messages as m
from flexkv_core.server.daemon import Server
from flexkv_core.server.latency import BUCKETS
from flexkv_core.server.metrics import ROWS, exposition

DOCS = Path(__file__).parent.parent / "docs" / "server.md"
SOCKETS = pytest.mark.usefixtures("leak_check")
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def stack(tmp_path: Path, port: int) -> dict[str, Any]:
    lower = {"backend": "directory", "root": str(tmp_path / "d"), "capacity": "16MiB"}
    return {"tiers": [*CPU_ONLY["tiers"], lower], "enable_metrics": 1, "py_metrics_port": port}


@contextlib.contextmanager
def measured(tmp_path: Path, port: int, **options: Any) -> Iterator[Server]:
    with serving(tmp_path / "s", stack(tmp_path, port), **options) as server:
        yield server


def get(port: int, path: str = "/metrics", accept: str = "", method: str = "GET") -> tuple[int, str, str]:
    """(status, content type, text)."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", headers={"Accept": accept} if accept else {}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def samples_of(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families_of(text)
        for sample in family.samples
    }


def scraped(port: int) -> Samples:
    status, _, text = get(port)
    assert status == 200, text
    return samples_of(text)


def of(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, tuple(sorted(labels.items()))))


# ---------------------------------------------------------------- what is exposed


def documented() -> dict[str, tuple[str, tuple[str, ...], str]]:
    rows = re.findall(r"^\| `(flexkv_\w+)` \| (\w+) \| ([^|]*)\| (.*) \|$", DOCS.read_text(), flags=re.MULTILINE)
    found = {name: (kind, tuple(re.findall(r"`(\w+)`", labels)), meaning) for name, kind, labels, meaning in rows}
    assert len(found) == len(rows) > 40, "each once"
    return found


def test_the_docs_list_every_metric() -> None:
    assert documented() == {row.name: (row.kind, row.labels, row.meaning) for row in ROWS}


def test_names_go_by_prometheus_rules() -> None:
    for row in ROWS:
        assert re.fullmatch(r"flexkv_[a-z_]+", row.name)
        assert row.name.endswith("_total") == (row.kind == "counter"), row.name
        assert row.name.endswith("_seconds") == (row.kind == "histogram"), row.name


@SOCKETS
def test_the_endpoint_exposes_what_the_docs_list(tmp_path: Path, port: int) -> None:
    with measured(tmp_path, port) as server, agent(tmp_path / "s"), connect(tmp_path / "s", engine="e") as cache:
        use(cache)
        until(lambda: server.figures()["tiers"]["directory"]["state"] == "ready")
        found = {}
        for family in families_of(get(port)[2]):
            suffix = "_total" if family.type == "counter" else ""
            labels = {tuple(name for name in sample.labels if name != "le") for sample in family.samples}
            assert len({frozenset(each) for each in labels}) == 1, family.name
            found[family.name + suffix] = (family.type, set(labels.pop()), family.documentation)
        assert found == {name: (kind, set(labels), told) for name, (kind, labels, told) in documented().items()}


def use(cache: Any, blocks: int = 6, more: int = 2) -> None:
    """Look up, fetch, store, fetch again and load a prompt; the cache lacks its last blocks."""
    namespace = cache.register(SPEC)
    tokens = np.arange((blocks + more) * BLOCK_SIZE, dtype=np.int32)
    keys = block_keys(tokens, BLOCK_SIZE, namespace.root)
    for ready in (0, blocks):
        cache.lookup(namespace, keys)
        fetch = cache.fetch(namespace, keys)
        assert fetch.wait(PATIENCE_S)
        assert fetch.ready == ready
        if ready:
            assert cache.wait(cache.load(fetch, np.arange(ready)), PATIENCE_S)
        fetch.release()
        assert cache.wait(cache.store(namespace, keys[:blocks], np.arange(blocks)), PATIENCE_S)
    assert cache.prefetch(namespace, keys).wait(PATIENCE_S)
    assert cache.drain(PATIENCE_S)


@SOCKETS
def test_a_scrape_says_what_the_server_counts(tmp_path: Path, port: int) -> None:
    with (
        measured(tmp_path, port),
        agent(tmp_path / "s"),
        introduced(tmp_path / "s", engine="a client's own words"),
        introduced(tmp_path / "s", role="observer"),
    ):
        with connect(tmp_path / "s", engine="e") as cache:
            until(lambda: cache.stats()["tiers"]["directory"]["state"] == "ready")
            use(cache)
            stats, text = cache.stats(), get(port)[2]
        found = samples_of(text)
        for tier, hits, misses in (("cpu", 6, 10), ("directory", 0, 10)):
            assert of(found, "flexkv_tier_hit_blocks_total", tier=tier) == hits
            assert of(found, "flexkv_tier_miss_blocks_total", tier=tier) == misses
            assert of(found, "flexkv_tier_stored_blocks_total", tier=tier) == 6
            assert of(found, "flexkv_tier_used_bytes", tier=tier) == stats["tiers"][tier]["used_bytes"] > 0
            assert of(found, "flexkv_tier_health", tier=tier, state="ok") == 1
            assert of(found, "flexkv_tier_health", tier=tier, state="away") == 0
        assert of(found, "flexkv_asked_blocks_total") == 16
        assert of(found, "flexkv_miss_blocks_total") == 10
        written = stats["tiers"]["directory"]["bytes_written"]
        assert of(found, "flexkv_tier_written_bytes_total", tier="directory") == written > 0
        ((slot, free),) = stats["tiers"]["cpu"]["free_blocks"].items()
        assert of(found, "flexkv_tier_free_blocks", tier="cpu", slot_bytes=slot) == free > 0
        assert of(found, "flexkv_tier_breaker_state", tier="directory", operation="read", state="closed") == 1
        assert of(found, "flexkv_tier_breaker_state", tier="cpu", operation="read", state="closed") is None
        assert (of(found, "flexkv_clients"), of(found, "flexkv_agents"), of(found, "flexkv_ready")) == (2, 1, 1)
        for what, count in (("lookup", 2), ("fetch", 2), ("load", 1), ("store", 2)):
            assert of(found, f"flexkv_{what}_seconds_count") == count, "a prefetch is no fetch"
            assert of(found, f"flexkv_{what}_seconds_bucket", le="+Inf") == count
            assert (of(found, f"flexkv_{what}_seconds_sum") or 0) > 0
        assert "own words" not in text


@SOCKETS
def test_states_and_buckets_of_given_figures(tmp_path: Path, port: int) -> None:
    with measured(tmp_path, port) as server:
        figures = server.figures()
    figures["tiers"]["directory"]["breaker"].update(read="half_open", write="open")
    figures["tiers"]["directory"].update(health="away", capacity_bytes=None)
    figures["server"]["latencies"]["lookup"].update(
        counts=[5, 0, 2] + [0] * (len(BUCKETS["lookup"]) - 3) + [1], seconds=9.5
    )
    found = samples_of(exposition(lambda: figures)("")[0].decode())
    states = {
        (operation, state): of(found, "flexkv_tier_breaker_state", tier="directory", operation=operation, state=state)
        for operation in ("read", "write")
        for state in ("closed", "open", "half_open")
    }
    assert [name for name, value in states.items() if value] == [("read", "half_open"), ("write", "open")]
    assert of(found, "flexkv_tier_health", tier="directory", state="away") == 1
    assert of(found, "flexkv_tier_capacity_bytes", tier="directory") is None
    assert of(found, "flexkv_tier_free_bytes", tier="directory") is None
    assert of(found, "flexkv_lookup_seconds_bucket", le="2e-05") == 5
    assert of(found, "flexkv_lookup_seconds_bucket", le="0.0001") == 7
    assert of(found, "flexkv_lookup_seconds_bucket", le="1.0") == 7
    assert of(found, "flexkv_lookup_seconds_bucket", le="+Inf") == of(found, "flexkv_lookup_seconds_count") == 8
    assert of(found, "flexkv_lookup_seconds_sum") == 9.5
    starting = samples_of(exposition(lambda: {"server": {**figures["server"], "state": "starting"}})("")[0].decode())
    assert of(starting, "flexkv_ready") == 0
    assert of(starting, "flexkv_asked_blocks_total") is None


# ---------------------------------------------------------------- HTTP


@SOCKETS
def test_what_is_answered(tmp_path: Path, port: int) -> None:
    with measured(tmp_path, port):
        status, kind, text = get(port)
        assert (status, kind.startswith("text/plain")) == (200, True)
        assert get(port, "/")[0] == get(port, "/metrics?name[]=x")[0] == 200
        status, kind, text = get(port, accept="application/openmetrics-text; version=1.0.0")
        assert kind.startswith("application/openmetrics-text")
        assert text.endswith("# EOF\n")
        assert get(port, "/etc/passwd")[0] == 404
        assert get(port, method="POST")[0] == 501


@SOCKETS
def test_nothing_is_served_unless_it_is_asked_for(tmp_path: Path, port: int) -> None:
    with serving(tmp_path / "s", {**stack(tmp_path, port), "enable_metrics": 0}) as server:
        assert server.figures()["server"]["metrics"] is None
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


@SOCKETS
def test_a_busy_server_fails_the_scrape_and_later_ones_succeed(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_endpoint, "FIGURES_S", 0.05)
    with measured(tmp_path, port) as server:
        busy, asked = threading.Event(), []
        figures = server.figures
        monkeypatch.setattr(server, "figures", lambda: asked.append(1) or figures())
        server._loop.call_soon_threadsafe(busy.wait, PATIENCE_S)
        assert get(port)[0] == 503
        busy.set()
        manager_of(server)._scheduler.ask(lambda: None)
        assert not asked, "nobody waits for them any more"
        until(lambda: get(port)[0] == 200)


@SOCKETS
def test_figures_that_cannot_be_had_are_an_error_in_the_log(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with measured(tmp_path, port) as server:
        monkeypatch.setattr(server, "figures", lambda: 1 / 0)
        status, _, text = get(port)
        assert (status, "division" in text) == (500, False)
        assert "division by zero" in caplog.text


@SOCKETS
def test_silent_connections_hinder_neither_clients_nor_the_end(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_endpoint, "SCRAPE_S", 10 * PATIENCE_S)  # nobody is hung up on for being slow

    def scrapes() -> int:
        return sum(thread.name == "flexkv-scrape" for thread in threading.enumerate())

    with contextlib.ExitStack() as silent, measured(tmp_path, port):
        first, *_ = [
            silent.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE_S))
            for _ in range(metrics_endpoint.MAX_SCRAPES)
        ]
        until(lambda: scrapes() == metrics_endpoint.MAX_SCRAPES)
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as more:
            assert more.recv(1) == b"", "one too many: hung up on"
        with introduced(tmp_path / "s") as wire:
            namespace = registered(wire)
            assert isinstance(wire.ask(m.Lookup(2, namespace.root, keys_of(namespace, 1, 4))), m.Found)
        first.close()
        until(lambda: scrapes() < metrics_endpoint.MAX_SCRAPES)
        assert get(port)[0] == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


# ---------------------------------------------------------------- what may be in the way


@SOCKETS
def test_a_port_that_is_taken_is_named_and_serving_goes_on(
    tmp_path: Path, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    with measured(tmp_path, port):
        other = {**stack(tmp_path, port), "tiers": CPU_ONLY["tiers"]}
        with serving(tmp_path / "t", other) as second:
            told = second.figures()["server"]["metrics"]
            assert f"port {port} of 127.0.0.1 is taken" in told["error"]
            assert "FLEXKV_PY_METRICS_PORT" in told["error"]
            assert [r.levelno for r in caplog.records if told["error"] in r.getMessage()] == [logging.ERROR]
            with connect(tmp_path / "t") as cache:
                assert cache.register(SPEC)
        assert get(port)[0] == 200


@SOCKETS
def test_two_servers_on_two_ports(tmp_path: Path, port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        another = int(listening.getsockname()[1])
    with (
        measured(tmp_path, port),
        serving(tmp_path / "t", {**stack(tmp_path, another), "tiers": CPU_ONLY["tiers"]}),
        connect(tmp_path / "t"),
    ):
        assert (of(scraped(port), "flexkv_clients"), of(scraped(another), "flexkv_clients")) == (0, 1)


@SOCKETS
@pytest.mark.parametrize("host", ["203.0.113.1", "x" * 70])
def test_an_address_that_is_not_this_machines(tmp_path: Path, port: int, host: str) -> None:
    with measured(tmp_path, port, metrics_host=host) as server:
        told = server.figures()["server"]["metrics"]
        assert told["url"] == f"http://{host}:{port}/metrics"
        assert told["error"].startswith(f"cannot listen on port {port} of '{host}'")


@SOCKETS
def test_an_address_of_version_six(tmp_path: Path, port: int) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    with measured(tmp_path, port, metrics_host="::1") as server:
        url = server.figures()["server"]["metrics"]["url"]
        assert url == f"http://[::1]:{port}/metrics"
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            assert answer.status == 200


@SOCKETS
def test_without_the_library_it_is_named_and_serving_goes_on(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "flexkv_core.server.metrics")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with measured(tmp_path, port) as server:
        assert "pip install 'flexkv-core[metrics]'" in server.figures()["server"]["metrics"]["error"]
        assert "pip install 'flexkv-core[metrics]'" in caplog.text
        with connect(tmp_path / "s") as cache:
            assert cache.register(SPEC)
