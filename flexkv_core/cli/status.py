"""`flexkv status`: what a running server holds and how it does, as tables or as JSON.

Owns how figures are shown. Does not own what they mean (`KVCacheManager.stats`, `Server.figures`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexkv_core.cli.output import make_console, printable, write_json
from flexkv_core.cli.report import format_bytes
from flexkv_core.config import load_config
from flexkv_core.errors import ServerAwayError, ServerRefusedError
from flexkv_core.server.client import Client
from flexkv_core.server.latency import quantile
from flexkv_core.server.paths import socket_path

CONNECT_S = 2.0
ANSWER_S = 5.0
Figures = Mapping[str, Any]


@click.command("status")
@click.option("--socket", help="Path of the server's socket; default: FLEXKV_SERVER_RECV_PORT, else the private path.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures to this file.")
def status_command(socket: str | None, json_file: Path | None) -> None:
    """Show what a running server holds and how it does.

    Exit code 1 where no server answers.
    """
    path = socket_path(socket if socket is not None else load_config(None).settings.server.socket)
    figures = ask(path)
    write_json(json_file, figures)
    show(figures, make_console())


def ask(path: Path) -> Figures:
    """The figures of the server at this socket. Raises click's exception with exit code 1 where none gives them."""
    client = Client(path, role="observer", deadline_s=ANSWER_S)
    try:
        client.greet(CONNECT_S)
        figures = client.stats()
    except (ServerAwayError, ServerRefusedError) as error:
        detail = f": {error}" if isinstance(error, ServerRefusedError) else ""
        raise click.ClickException(f"no server answers at {path}{detail} (start one: flexkv serve)") from error
    finally:
        client.close()
    if not figures:
        raise click.ClickException(f"the server at {path} (process {_pid(client)}) has not said its figures in time")
    return figures


def _pid(client: Client) -> int | None:
    return client.welcome.pid if client.welcome is not None else None


def show(figures: Figures, console: Console) -> None:
    """Print the figures as tables."""
    server = figures["server"]
    console.print(
        _text(
            f"flexkv {server['version']}, process {server['pid']}, {server['state']}, at {server['socket']}, "
            f"stack {server['stack']}"
        )
    )
    for line in _notes(figures):
        console.print(_text(line))
    tables = (_holdings(figures), _service(figures), _troubles(figures))
    for table in (*tables, _latencies(server), _clients(server), _agents(server)):
        if table.row_count:
            console.print(table)


def _notes(figures: Figures) -> Iterator[str]:
    server = figures["server"]
    if server["metrics"] is not None:
        error = server["metrics"]["error"]
        yield f"metrics are not served: {error}" if error else f"metrics: {server['metrics']['url']}"
    if "tiers" not in figures:
        return
    asked = figures["asked_blocks"]
    yield (
        f"fetches asked for {asked:,} blocks, {_share(asked - figures['miss_blocks'], asked)} hits; "
        f"{figures['fetches']} fetches and {figures['pending_stores']} stores under way, "
        f"{format_bytes(figures['pinned_bytes'])} pinned by {figures['pinned_fetches']} fetches"
    )
    odd = {
        "fetches cut to the budget of pins": figures["truncated_fetches"],
        "fetches that lost their pins when their time was up": figures["expired_fetches"],
        "stores refused": figures["refused_stores"],
        "blocks of stores without room": figures["refused_blocks"],
    }
    told = [f"{count:,} {what}" for what, count in odd.items() if count]
    if told:
        yield "; ".join(told)
    if figures["epochs"]["error"]:
        yield f"the last reset is not on disk everywhere: {figures['epochs']['error']}"


def _holdings(figures: Figures) -> Table:
    table = _table("tier", "backend")
    for name in ("capacity", "used", "blocks", "stored", "evicted", "read", "written"):
        table.add_column(name, justify="right")
    for name, tier in figures.get("tiers", {}).items():
        table.add_row(
            _text(name),
            _text(tier["backend"]),
            "-" if tier["capacity_bytes"] is None else format_bytes(tier["capacity_bytes"]),
            format_bytes(tier["used_bytes"]) + _percent_of(tier["used_bytes"], tier["capacity_bytes"]),
            *(f"{tier[field]:,}" for field in ("used_blocks", "stored_blocks", "evicted_blocks")),
            *(format_bytes(tier[field]) for field in ("bytes_read", "bytes_written")),
        )
    return table


def _service(figures: Figures) -> Table:
    """Hits: of all that was asked for, and of what the faster tiers had left for this one."""
    table = _table("tier", "health", "process")
    for name in ("hits", "of all", "of its own", "waiting r/p/w"):
        table.add_column(name, justify="right")
    table.add_column("breakers r/w")
    asked = figures.get("asked_blocks", 0)
    for name, tier in figures.get("tiers", {}).items():
        breaker, hits = tier.get("breaker"), tier["hit_blocks"]
        table.add_row(
            _text(name),
            tier["health"],
            tier["state"] if tier["pid"] is None else f"{tier['state']}, {tier['pid']}",
            f"{hits:,}",
            _share(hits, asked),
            _share(hits, hits + tier["miss_blocks"]),
            "/".join(f"{count:,}" for count in tier["queued_blocks"].values()) or "-",
            f"{breaker['read']}/{breaker['write']}" if breaker else "-",
        )
    return table


def _troubles(figures: Figures) -> Table:
    """What went wrong, for the tiers where something did."""
    table = _table("tier")
    columns = ("corrupt", "failed", "missing", "dropped", "given up", "not admitted", "not asked", "restarts")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("last trouble")
    for name, tier in figures.get("tiers", {}).items():
        breaker = tier.get("breaker", {"rejected_blocks": 0, "last_trouble": None})
        fields = ("corrupt_blocks", "failed_blocks", "missing_blocks", "dropped_blocks", "given_up_blocks")
        counts = [*(tier[field] for field in fields), tier["rejected_blocks"], breaker["rejected_blocks"]]
        counts.append(tier["restarts"])
        last = breaker["last_trouble"] or tier["last_error"]
        if any(counts) or last:
            table.add_row(_text(name), *(f"{count:,}" for count in counts), _text(last or "-"))
    return table


def _latencies(server: Figures) -> Table:
    table = _table("operation")
    for column in ("count", "mean", "p50 at most", "p99 at most"):
        table.add_column(column, justify="right")
    for what, its in server["latencies"].items():
        count = sum(its["counts"])
        if count:
            table.add_row(
                what, f"{count:,}", *map(_time, (its["seconds"] / count, quantile(its, 0.5), quantile(its, 0.99)))
            )
    return table


def _clients(server: Figures) -> Table:
    table = _table("client", "engine", "role", "connected")
    for column in ("requests", "fetches", "transfers", "namespaces"):
        table.add_column(column, justify="right")
    for each in server["clients"]:
        counts = (f"{each[name]:,}" for name in ("requests", "fetches", "transfers", "namespaces"))
        table.add_row(str(each["pid"]), _text(each["engine"]), each["role"], _yes(each["connected"]), *counts)
    return table


def _agents(server: Figures) -> Table:
    table = _table("agent", "engine", "rank", "connected")
    table.add_column("copies", justify="right")
    for each in sorted(server["agents"], key=lambda each: (each["engine"], each["rank"])):
        rank = f"{each['rank']} of {each['ranks']}"
        table.add_row(str(each["pid"]), _text(each["engine"]), rank, _yes(each["connected"]), f"{each['jobs']:,}")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table


def _text(text: Any) -> Text:
    """What others chose: neither markup nor control characters."""
    return Text(printable(text))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def _percent_of(part: int, whole: int | None) -> str:
    return f" ({100 * part / whole:.0f}%)" if whole else ""


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds == math.inf:
        return "longer"
    return (
        f"{seconds * 1e6:.3g} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.3g} ms"
        if seconds < 1
        else f"{seconds:.3g} s"
    )
