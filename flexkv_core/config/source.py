"""Reading a config file: YAML or JSON to plain data, with the place of every key and value.

Only plain data is accepted: mappings, lists, strings, numbers, booleans, null. No tags, anchors, aliases, merges or
includes, so a file can neither run code nor blow up. Knows nothing of what the keys mean (`stack.py`, `flat_keys.py`).

Errors are raised outside of `except` clauses: the parser's own carry pieces of the file, which may hold secrets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flexkv_core.config.json_text import looks_like_json, read_json
from flexkv_core.config.places import Path_, Position, Source, located, spell
from flexkv_core.errors import StackConfigError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 16


def read_source(source: str | Path | Mapping[str, Any]) -> Source:
    """Read a YAML or JSON file, or take a mapping as it is. A string that begins with "{" is JSON text.

    Raises:
        StackConfigError: not readable, not UTF-8, too large, not YAML or JSON, or more than plain data.
    """
    if isinstance(source, Mapping):
        return Source("<mapping>", _plain(source, ()))
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return read_json(source, "<text>", MAX_DEPTH)
    path = Path(source)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise located(str(path), None, "", None, problem) from error
    if len(raw) > MAX_FILE_BYTES:
        raise located(str(path), None, "", None, f"is larger than {MAX_FILE_BYTES} bytes: this is no stack file")
    try:
        text, bad = raw.decode("utf-8"), -1
    except UnicodeDecodeError as error:
        text, bad = "", error.start
    if bad >= 0:
        line = raw.count(b"\n", 0, bad) + 1
        column = bad - (raw.rfind(b"\n", 0, bad) + 1) + 1
        raise located(str(path), Position(line, column), "", None, "is not UTF-8: save it as UTF-8")
    return read_text(text, str(path))


def read_text(text: str, name: str) -> Source:
    """Read YAML text, or JSON text if the name ends so or the text is JSON; `name` stands for the file in messages.

    Raises StackConfigError as `read_source`.
    """
    if name.endswith(".json"):
        return read_json(text, name, MAX_DEPTH)
    if looks_like_json(text):
        try:
            return read_json(text, name, MAX_DEPTH)
        except StackConfigError:
            pass  # a YAML flow mapping, then
    return _read_yaml(text, name)


def _read_yaml(text: str, name: str) -> Source:
    problem: StackConfigError | None = None
    try:
        loader = yaml.SafeLoader(text)
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AnchorToken | yaml.AliasToken | yaml.TagToken):
                mark = token.start_mark
                kind = "a tag" if isinstance(token, yaml.TagToken) else "an anchor or alias"
                told = f"{kind} is not allowed here: write the value out"
                raise located(name, Position(mark.line + 1, mark.column + 1), "", None, told)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        found = error.problem_mark or error.context_mark
        position = Position(found.line + 1, found.column + 1) if found else None
        problem = located(name, position, "", None, f"is not valid YAML: {error.problem or error.context}")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        told = f"has the character {text[error.position]!r}, which YAML does not allow"
        problem = located(name, Position(line, column), "", None, told)
    except RecursionError:
        problem = located(name, None, "", None, f"is nested more than {MAX_DEPTH} deep")
    if problem is not None:
        raise problem
    source = Source(name, None)
    if node is not None:
        source.data = _build(loader, node, (), source)
    return source


def _build(loader: yaml.SafeLoader, node: yaml.Node, path: Path_, source: Source) -> Any:
    position = Position(node.start_mark.line + 1, node.start_mark.column + 1)
    source.values[path] = position
    if len(path) > MAX_DEPTH:
        raise located(source.name, position, spell(path), None, f"is nested more than {MAX_DEPTH} deep")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = Position(key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                raise located(source.name, place, spell(path), None, "has a key that is not a plain name")
            key = key_node.value
            if key in result:
                first = source.keys[(*path, key)]
                problem = f"is given twice, first in line {first.line}: keep one"
                raise located(source.name, place, spell((*path, key)), None, problem)
            source.keys[(*path, key)] = place
            result[key] = _build(loader, value_node, (*path, key), source)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, child, (*path, number), source) for number, child in enumerate(node.value)]
    told = ""
    try:
        value = loader.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        value, told = None, str(error)
    if told:
        raise located(source.name, position, spell(path), None, f"cannot be read: {told}: put quotes around text")
    if isinstance(value, float) and not math.isfinite(value):
        raise located(source.name, position, spell(path), None, f"{node.value} is not a finite number")
    return value if isinstance(value, str | int | float | bool | None) else node.value


def _plain(value: Any, path: Path_) -> Any:
    if len(path) > MAX_DEPTH:
        raise located("<mapping>", None, spell(path), None, f"is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        result: dict[str, Any] = {}
        for key, item in value.items():
            name = str(key)
            if name in result:
                raise located("<mapping>", None, spell((*path, name)), None, "is given twice: keep one")
            result[name] = _plain(item, (*path, name))
        return result
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, number)) for number, item in enumerate(value)]
    return value
