"""`flexkv backends`: which plug-ins are installed and whether they can be used; `new` writes one (`new_backend.py`)."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from flexkv_core.cli.new_backend import new_backend_command
from flexkv_core.cli.output import write_json


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
    write_json(json_file, rows)


backends_command.add_command(new_backend_command)
