"""Plain data with the place of every key and value, and errors that name it.

Owns `Source` and the wording of places. Does not own how files are read (`source.py`, `json_text.py`), nor what keys
mean (`stack.py`, `flat_keys.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from flexkv_core.config.secrets import SHOWN_SECRET, is_secret_name
from flexkv_core.errors import StackConfigError

MAX_SHOWN = 200
"""Characters of a value that an error shows."""
Path_ = tuple[str | int, ...]
"""Where a value is: ("tiers", 1, "capacity")."""


@dataclass(frozen=True, slots=True)
class Position:
    """1-based line and column."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value that a flat key or a variable has set comes from.

    Attributes:
        kind: what gave it.
        key: the flat key, or for `environment` the variable.
        place: the file's name; "environment" or "default" for the other two.
        position: in the file, where known.
    """

    kind: Literal["file", "environment", "default"]
    key: str
    place: str
    position: Position | None = None


@dataclass(slots=True)
class Source:
    """Plain data with the places that it came from.

    Attributes:
        name: the file's name for messages, or "<mapping>".
        data: the document as written: references are `${NAME}`. What may be shown.
        keys, values: place of each mapping key and of each value, by path; empty for mappings.
        resolved: the document with references replaced; what is validated, never shown.
        referenced: paths of the strings that hold references.
        origins: paths that did not stand in the file as they are, but come from a flat key or variable.
    """

    name: str
    data: Any
    keys: dict[Path_, Position] = field(default_factory=dict)
    values: dict[Path_, Position] = field(default_factory=dict)
    resolved: Any = field(default=None, repr=False)
    referenced: set[Path_] = field(default_factory=set)
    origins: dict[Path_, Origin] = field(default_factory=dict)

    def error(self, path: Path_, problem: str, *, at_key: bool = False) -> StackConfigError:
        """An error about the value (or the key) at `path`; falls back to the nearest place known."""
        above: Path_ = path
        value = None if at_key else self.shown(path)  # what an unknown key has may be a secret
        while True:
            origin = self.origins.get(above)
            if origin is not None:
                return located(origin.place, origin.position, origin.key, value, problem)
            tables = (self.keys, self.values) if at_key and above == path else (self.values, self.keys)
            position = tables[0].get(above) or tables[1].get(above)
            if position is not None or not above:
                return located(self.name, position, spell(path), value, problem)
            above = above[:-1]

    def at(self, path: Path_) -> Any:
        """The value at a path as written, None if there is none."""
        return _at(self.data, path)

    def shown(self, path: Path_) -> Any:
        """The value at a path, for eyes: literal secrets are masked, None for a mapping or list."""
        if isinstance(self.at(path), dict | list):
            return None
        if any(is_secret_name(str(step)) for step in path) and path not in self.referenced:
            return None if self.at(path) is None else SHOWN_SECRET
        return self.at(path)

    def hides(self, path: Path_) -> bool:
        """Whether the value at a path, something in it or something around it must not be shown resolved."""
        if any(is_secret_name(str(step)) for step in path):
            return True
        return any(path[: len(each)] == each or each[: len(path)] == path for each in self.referenced)


def _at(value: Any, path: Path_) -> Any:
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def masked(value: Any) -> Any:
    """A copy of plain data in which values under names of secrets are masked, unless they are references."""
    if isinstance(value, dict):
        return {
            key: SHOWN_SECRET
            if is_secret_name(str(key)) and item is not None and not is_reference(item)
            else masked(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [masked(item) for item in value]
    return value


def is_reference(value: Any) -> bool:
    """Whether a value as written is one reference and nothing else, so that it tells no secret."""
    return isinstance(value, str) and value[:2] == "${" and value[-1:] == "}" and "}" not in value[2:-1]


def show(value: Any) -> str:
    """A value's repr for a message, cut at `MAX_SHOWN` characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "that number"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


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
