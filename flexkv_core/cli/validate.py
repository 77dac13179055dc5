"""`flexkv validate`: the stack that a file and the environment mean, where it comes from, and what it holds.

What it prints is YAML: the stack itself, and everything else as comments, so that the output is a stack file. Secrets
are `${NAME}` or `***`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from flexkv_core.cli.output import printable, write_json

DEFAULT_BLOCK_SIZE = 16
_TIER_KEYS_SHOWN = ("cpu_cache_gb", "ssd_cache_gb")
"""Shown with their origin even when nothing sets them."""


@click.command("validate", short_help="Check a configuration and print the stack it means.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="A stack or a flat FlexKV file, YAML or JSON; FLEXKV_* variables count. Default: FLEXKV_CONFIG_PATH, or none.",
)
@click.option("--stack", "stack_file", type=click.Path(path_type=Path), help="A stack alone; variables set nothing.")
@click.option("--model", help="Say what the tiers hold of this model: a well-known name, a config.json, or its folder.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the same to this file.")
def validate_command(
    config_file: Path | None, stack_file: Path | None, model: str | None, json_file: Path | None
) -> None:
    """Check a configuration: print the resulting stack, where each value comes from, and what has no effect.

    Exit code 2 with file, line, column, key, value and the fix for a configuration that cannot be used.
    """
    if config_file is not None and stack_file is not None:
        raise click.UsageError("--config and --stack: give one, --stack is the same without variables")
    from flexkv_core.config import load_config  # noqa: PLC0415 - takes long to import
    from flexkv_core.config.load import load_stack_config  # noqa: PLC0415

    loaded = load_stack_config(stack_file) if stack_file is not None else load_config(config_file)
    report: dict[str, Any] = {
        "source": loaded.source,
        "flat": loaded.flat,
        "stack": loaded.document,
        "values": {
            name: {"value": value.written, "from": value.origin.kind, "key": value.origin.key}
            for name, value in loaded.values.items()
        },
        "server": [
            {"key": value.origin.key, "does": value.key.does}
            for value in loaded.values.values()
            if value.given and value.key.does
        ],
        "without_effect": [{"key": each.key, "reason": each.reason} for each in loaded.notices],
        "warnings": list(loaded.warnings),
        "model": None,
    }
    if model is not None:
        report["model"] = _model_report(loaded.stack, model)
    for line in _lines(report):
        click.echo(line)
    for warning in loaded.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    write_json(json_file, report)


def _model_report(stack: Any, name: str) -> dict[str, Any]:
    from flexkv_core.cli.holdings import holdings  # noqa: PLC0415
    from flexkv_core.model_groups import describe_model  # noqa: PLC0415

    model = describe_model(name)
    block_size = stack.block_size or DEFAULT_BLOCK_SIZE
    spec = model.model_spec(block_size)
    return {
        "name": model.name,
        "dtype": model.dtype,
        "block_size": block_size,
        "block_size_from": "stack" if stack.block_size else "default",
        "groups": [
            {
                "what": layers.what,
                "layers": layers.layers,
                "window_tokens": layers.window,
                "block_bytes": group.block_bytes,
                "slot_bytes": group.slot_bytes,
            }
            for layers, group in zip(model.groups, spec.groups, strict=True)
        ],
        "tiers": [
            {
                "name": each.tier,
                "capacity_bytes": each.capacity_bytes,
                "blocks": each.blocks,
                "tokens": each.tokens,
                "group_blocks": list(each.group_blocks),
            }
            for each in holdings(stack, spec)
        ],
    }


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as YAML, all but the stack in comments."""
    import yaml  # noqa: PLC0415

    yield f"# {printable(report['source'])}: ok, {len(report['stack']['tiers'])} tier(s)"
    yield yaml.safe_dump(report["stack"], sort_keys=False, allow_unicode=True, width=1 << 20).rstrip("\n")
    given = {
        name: value
        for name, value in report["values"].items()
        if value["from"] != "default" or (report["flat"] and name in _TIER_KEYS_SHOWN)
    }
    if given:
        yield "\n# where values come from:"
    for name, value in given.items():
        text = ";".join(value["value"]) if name == "ssd_cache_dir" else str(value["value"])
        where = "default" if value["from"] == "default" else f"{value['from']}, {value['key']}"
        yield f"#   {name}: {printable(text)}  ({where})"
    if report["server"]:
        yield "\n# for the server and engines:"
    for setting in report["server"]:
        yield f"#   {printable(setting['key'])}: {setting['does']}"
    if report["without_effect"]:
        yield "\n# accepted, no effect yet:"
    for notice in report["without_effect"]:
        yield f"#   {printable(notice['key'])}: {notice['reason']}"
    if report["model"] is not None:
        yield from _model_lines(report["model"])


def _model_lines(model: dict[str, Any]) -> Iterator[str]:
    how = "" if model["block_size_from"] == "stack" else ", as engines choose where the stack does not say"
    yield f"\n# {printable(model['name'])}, {model['dtype']}, blocks of {model['block_size']} tokens{how}:"
    for group in model["groups"]:
        yield (
            f"#   {group['layers']} layers of {group['what']}: {group['block_bytes']:,} bytes a block, "
            f"{group['slot_bytes']:,} with padding and seal"
        )
    for tier in model["tiers"]:
        if tier["blocks"] is None:
            yield f"#   {tier['name']}: as much as its backend allows"
            continue
        alone = ""
        if len(tier["group_blocks"]) > 1:
            alone = f" (by itself, each group: {', '.join(f'{count:,}' for count in tier['group_blocks'])} blocks)"
        yield f"#   {tier['name']}: {tier['blocks']:,} blocks, {tier['tokens']:,} tokens{alone}"
