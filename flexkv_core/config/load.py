"""From a file, a mapping or the environment to a validated stack. The only module that reads FlexKV's variables.

`load_stack` is for stacks alone. `load_config` is what a program starts with: it finds the file, takes flat files and
variables, and says where every value came from. `load_to_open` takes either kind of file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexkv_core.config.flat import (
    FlatValue,
    Notice,
    apply,
    check_together,
    flat_document,
    gather,
    unknown_key,
    unknown_variables,
)
from flexkv_core.config.flat_keys import CONFIG_PATH, FLAT, KEYS, REFUSED_BESIDE_TIERS, VARIABLES
from flexkv_core.config.places import Path_, Source, located
from flexkv_core.config.references import resolve
from flexkv_core.config.secrets import secrets_in
from flexkv_core.config.settings import Settings, settings_of
from flexkv_core.config.source import read_source
from flexkv_core.config.stack import StackConfig, StackKeys, stack_of
from flexkv_core.errors import StackConfigError

STACK_KEYS = tuple(StackKeys.model_fields)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A stack, everything else that was configured, and how it came about. Nothing in it shows a secret.

    Attributes:
        stack: the tiers.
        settings: what is no tier.
        source: the file's name, "<mapping>", "<text>", or "environment" if there was no file.
        flat: the tiers were made from flat keys.
        document: the stack as plain data: what the file says and what flat keys and variables added; references as
            `${NAME}`, secrets masked.
        values: every flat key's value and origin, by name.
        notices: what was given and is accepted without effect.
        warnings: what should be looked at, such as unknown variables.
    """

    stack: StackConfig
    settings: Settings
    source: str
    flat: bool
    document: Mapping[str, Any]
    values: Mapping[str, FlatValue]
    notices: tuple[Notice, ...]
    warnings: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Names the stack: equal for equal documents, references unresolved and secrets masked."""
        text = json.dumps(self.document, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def secrets(self) -> frozenset[str]:
        """What was configured as a secret, in the clear: to keep it out of logs. Never show it."""
        found = [tier.options.model_dump(mode="python") for tier in self.stack.tiers]
        return frozenset(secrets_in([*found, self.settings.sharing.redis_password]))


def load_stack(source: str | Path | Mapping[str, Any], environ: Mapping[str, str] | None = None) -> StackConfig:
    """Read and validate a stack, which has the key `tiers`. Variables set nothing here; use `load_config` for that.

    Args:
        source: path of a YAML or JSON file, JSON text (a string that begins with "{"), or a mapping.
        environ: for `${NAME}` references; default: the process's environment.

    Raises:
        StackConfigError: with attributes file, line, column, key and value; its text says what to write instead.
    """
    return load_stack_config(source, environ).stack


def load_stack_config(source: str | Path | Mapping[str, Any], environ: Mapping[str, str] | None = None) -> LoadedConfig:
    """As `load_stack`, with what else the stack's file says. Raises StackConfigError."""
    read = _resolved(read_source(source), environ)
    if isinstance(read.data, dict) and "tiers" not in read.data:
        raise read.error((), "the key tiers is missing (flexkv validate --config reads flat files)")
    return _load(read, {})


def load_config(
    source: str | Path | Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> LoadedConfig:
    """Read and validate everything that is configured: a stack or flat file, and variables.

    Args:
        source: as for `load_stack`, or a flat file; None: the file that FLEXKV_CONFIG_PATH names, else no file.
        environ: variables; default: the process's environment. An empty variable counts as not set.

    Raises:
        StackConfigError: as `load_stack`; for a variable `file` is "environment" and `key` its name.
    """
    variables = os.environ if environ is None else environ
    if source is not None:
        return _load(_resolved(read_source(source), variables), variables)
    path = variables.get(CONFIG_PATH, "").strip()
    if not path:
        return _load(None, variables)
    try:
        read = read_source(Path(path))
    except StackConfigError as error:
        if error.line is None:
            error.args = (f"{error} (the file that {CONFIG_PATH} names)",)
        raise
    return _load(_resolved(read, variables), variables)


def load_to_open(source: str | Path | Mapping[str, Any], environ: Mapping[str, str] | None = None) -> LoadedConfig:
    """What a manager is opened with: a stack, as `load_stack`, or a flat file, as `load_config`, with its variables.

    A mapping is a stack: variables would set what its author did not mean. Raises StackConfigError.
    """
    if isinstance(source, Mapping):
        return load_stack_config(source, environ)
    variables = os.environ if environ is None else environ
    read = _resolved(read_source(source), variables)
    flat = isinstance(read.data, dict) and "tiers" not in read.data
    return _load(read, variables if flat else {})


def _resolved(source: Source, environ: Mapping[str, str] | None) -> Source:
    return resolve(source, os.environ if environ is None else environ)


def _load(source: Source | None, environ: Mapping[str, str]) -> LoadedConfig:
    """Both kinds of file, or none; `environ` is empty where variables shall set nothing."""
    if source is not None and not isinstance(source.data, dict):
        raise source.error((), "a stack is a mapping with the key tiers: see README.md")
    flat = source is None or "tiers" not in source.data
    if source is not None:
        _check_names(source, flat=flat)
    if source is not None and not flat:
        _refuse_mixing(source, environ)
    values = gather(source, environ)
    check_together(values)
    name = source.name if source is not None else "environment"
    document = flat_document(name, values) if source is None or flat else _without_flat(source)
    notices = apply(document, values, flat=flat)
    stack = stack_of(document)
    return LoadedConfig(
        stack=stack,
        settings=settings_of({key.target: values[key.name].value for key in KEYS if key.target}),
        source=name,
        flat=flat,
        document={**document.data, "tiers": [dict(tier.written) for tier in stack.tiers]},
        values=values,
        notices=tuple(notices),
        warnings=tuple(unknown_variables(environ)),
    )


def _check_names(source: Source, *, flat: bool) -> None:
    known = set(FLAT) if flat else {*FLAT, *STACK_KEYS}
    for name in source.data:
        if name not in known:
            others = STACK_KEYS if not flat else ("tiers",)
            if flat and name in STACK_KEYS:
                raise source.error((name,), "is a key of a stack, which needs the key tiers too", at_key=True)
            raise unknown_key(source, name, others)


def _refuse_mixing(source: Source, environ: Mapping[str, str]) -> None:
    for name in REFUSED_BESIDE_TIERS:
        if name in source.data:
            problem = "is a key of a flat file, and this file has tiers: say it in a tier, or leave tiers out"
            raise source.error((name,), problem, at_key=True)
        for variable, key in VARIABLES.items():
            if key.name == name and environ.get(variable, "").strip():
                problem = f"is for flat configs, and {source.name} has tiers: unset it, and say it in a tier"
                raise located("environment", None, variable, environ[variable], problem)


def _without_flat(source: Source) -> Source:
    """The stack's own part of a stack file."""

    def own(path: Path_) -> bool:
        return not path or path[0] not in FLAT

    return Source(
        source.name,
        {key: _copied(value) for key, value in source.data.items() if key not in FLAT},
        source.keys,
        source.values,
        {key: _copied(value) for key, value in source.resolved.items() if key not in FLAT},
        {path for path in source.referenced if own(path)},
    )


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
