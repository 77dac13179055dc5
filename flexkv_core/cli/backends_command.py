"""`flexkv backends`: which plug-ins are installed and whether they can be used; `new` writes one (`new_backend.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from flexkv_core.cli.new_backend import new_backend_command
from flexkv_core.cli.replay import OutputError


@click.group("backends", short_help="List the installed tier backends; write a new one.", invoke_without_command=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the list to this file.")
@click.pass_context
def backends_command(context: click.Context, json_file: Path | None) -> None:
    """List installed tier backends: name, distribution, version, and why one cannot be used."""
    if context.invoked_subcommand is not None:
        return
    from flexkv_core.plugins import list_backends  # noqa: PLC0415 - imports every plug-in

    rows = [
        {"name": row.name, "distribution": row.distribution, "version": row.version, "error": row.error}
        for row in list_backends()
    ]
    table = Table()
    for heading in ("backend", "distribution", "version", "state"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(row["name"], row["distribution"], row["version"], row["error"] or "ok")
    Console().print(table)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"--json {json_file}: cannot be written: {error.strerror}") from error


backends_command.add_command(new_backend_command)
