"""`flexkv serve`: a server in the foreground, until SIGTERM or Ctrl-C."""

from __future__ import annotations

from pathlib import Path

import click

from flexkv_core import logs
from flexkv_core.config import load_config
from flexkv_core.server.daemon import run
from flexkv_core.server.metrics_endpoint import DEFAULT_HOST
from flexkv_core.server.paths import socket_path


@click.command("serve")
@click.option(
    "--stack",
    "source",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Stack or flat file; default: what FLEXKV_CONFIG_PATH names, else the variables.",
)
@click.option("--socket", help="Path of the socket; default: FLEXKV_SERVER_RECV_PORT, else a private path.")
@click.option("--linger", "linger_s", type=click.FloatRange(min=0), help="End so many seconds after the last client.")
@click.option(
    "--metrics-host", default=DEFAULT_HOST, show_default=True, help="Address for Prometheus, with enable_metrics."
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Of the lines on stderr.",
)
def serve_command(
    source: Path | None, socket: str | None, linger_s: float | None, metrics_host: str, log_format: logs.Format
) -> None:
    """Serve the cache to the engines of this machine."""
    config = load_config(source)
    process = config.settings.process
    logs.configure(process.log_level, process.logging_prefix, log_format, secrets=config.secrets)
    path = socket_path(socket if socket is not None else config.settings.server.socket)
    raise SystemExit(run(config, path, linger_s=linger_s, metrics_host=metrics_host))
