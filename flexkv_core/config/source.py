"""Reading a stack file: YAML to plain data, with the place of every key and value.

Only plain data is accepted: mappings, lists, strings, numbers, booleans, null. No tags, anchors or merges, so a file
can neither run code nor blow up. Knows nothing of what the keys mean (`stack.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flexkv_core.errors import StackConfigError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 16
Path_ = tuple[str | int, ...]
"""Where a value is: ("tiers", 1, "capacity")."""


@dataclass(frozen=True, slots=True)
class Position:
    """1-based line and column."""

    line: int
    column: int


@dataclass(slots=True)
class Source:
    """Plain data with the places that it came from.

    Attributes:
        name: the file's name for messages, or "<mapping>".
        data: the document.
        keys, values: place of each mapping key and of each value, by path; empty for mappings.
    """

    name: str
    data: Any
    keys: dict[Path_, Position] = field(default_factory=dict)
    values: dict[Path_, Position] = field(default_factory=dict)

    def error(self, path: Path_, problem: str, *, at_key: bool = False) -> StackConfigError:
        """An error about the value (or the key) at `path`; falls back to the nearest place known."""
        table = self.keys if at_key else self.values
        position = table.get(path) or self.keys.get(path)
        above = path
        while position is None and above:
            above = above[:-1]
            position = self.values.get(above) or self.keys.get(above)
        return located(self.name, position, spell(path), self.at(path), problem)

    def at(self, path: Path_) -> Any:
        """The value at a path, None if there is none."""
        value = self.data
        for step in path:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError):
                return None
        return value


def spell(path: Path_) -> str:
    """("tiers", 1, "capacity") as tiers[1].capacity."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text


def located(name: str, position: Position | None, key: str, value: Any, problem: str) -> StackConfigError:
    """A StackConfigError with its place in attributes and in its text."""
    place = f"{name}:{position.line}:{position.column}" if position else name
    error = StackConfigError(f"{place}: {f'{key}: ' if key else ''}{problem}")
    error.file, error.key, error.value = name, key, value
    error.line = position.line if position else None
    error.column = position.column if position else None
    return error


def read_source(source: str | Path | Mapping[str, Any]) -> Source:
    """Read a YAML file, or take a mapping as it is.

    Raises:
        StackConfigError: not readable, not UTF-8, too large, not YAML, or more than plain data.
    """
    if isinstance(source, Mapping):
        return Source("<mapping>", _plain(source))
    path = Path(source)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise located(str(path), None, "", None, f"cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise located(str(path), None, "", None, f"is larger than {MAX_FILE_BYTES} bytes: this is no stack file")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        raise located(str(path), Position(line, column), "", None, "is not UTF-8: save it as UTF-8") from error
    return read_text(text, str(path))


def read_text(text: str, name: str) -> Source:
    """Read YAML text; `name` stands for the file in messages. Raises StackConfigError as `read_source`."""
    try:
        loader = yaml.SafeLoader(text)
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AnchorToken | yaml.AliasToken | yaml.TagToken):
                mark = token.start_mark
                kind = "a tag" if isinstance(token, yaml.TagToken) else "an anchor or alias"
                problem = f"{kind} is not allowed here: write the value out"
                raise located(name, Position(mark.line + 1, mark.column + 1), "", None, problem)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        found = error.problem_mark or error.context_mark
        position = Position(found.line + 1, found.column + 1) if found else None
        problem = f"is not valid YAML: {error.problem or error.context}"
        raise located(name, position, "", None, problem) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        problem = f"has the character {text[error.position]!r}, which YAML does not allow"
        raise located(name, Position(line, column), "", None, problem) from error
    except RecursionError:
        raise located(name, None, "", None, f"is nested more than {MAX_DEPTH} deep") from None
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
    try:
        value = loader.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise located(source.name, position, spell(path), node.value, f"cannot be read: {error}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise located(source.name, position, spell(path), value, f"{node.value} is not a finite number")
    return value if isinstance(value, str | int | float | bool | None) else node.value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
