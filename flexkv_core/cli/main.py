"""The command line's entry point: the group of subcommands, and how their errors end."""

from __future__ import annotations

from typing import Any

import click

from flexkv_core import __version__
from flexkv_core.cli.backends_command import backends_command
from flexkv_core.cli.replay import replay_command
from flexkv_core.cli.serve import serve_command
from flexkv_core.cli.status import status_command
from flexkv_core.cli.validate import validate_command
from flexkv_core.errors import FlexKVError


class _OneLineError(click.ClickException):
    exit_code = 2


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Errors that FlexKV raises on purpose end in one line on stderr and exit code 2; others are bugs."""
        try:
            return super().invoke(ctx)
        except FlexKVError as error:
            raise _OneLineError(" ".join(str(error).split())) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flexkv")
def main() -> None:
    """FlexKV: a verified KV-cache store for LLM inference, on a stack of storage tiers."""


main.add_command(replay_command)
main.add_command(backends_command)
main.add_command(validate_command)
main.add_command(serve_command)
main.add_command(status_command)
