"""JSON text to plain data with the place of every key and value.

The standard library's parser forgets places and takes a repeated key without a word; this one does neither. Strings and
escapes are read by `json.decoder.scanstring`.
"""

from __future__ import annotations

import json
import math
import re
from json.decoder import scanstring  # type: ignore[attr-defined]  # not in its stubs
from typing import Any, NoReturn

from flexkv_core.config.places import Path_, Position, Source, located, spell

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORD = re.compile(r"[A-Za-z_]+|.", re.DOTALL)
_LITERALS = {"true": True, "false": False, "null": None}
MAX_DIGITS = 4000


def looks_like_json(text: str) -> bool:
    """Whether text begins as a JSON object does; a YAML flow mapping may, too."""
    return re.match(r"\s*\{\s*[\"}]", text) is not None


class _Reader:
    def __init__(self, text: str, name: str, max_depth: int) -> None:
        self.text, self.source, self.max_depth = text, Source(name, None), max_depth
        self.line, self.line_start, self.counted = 1, 0, 0

    def position(self, at: int) -> Position:
        """Places are asked for in ascending order but for errors, so lines are counted once."""
        if at < self.counted:
            self.line, self.line_start, self.counted = 1, 0, 0
        self.line += self.text.count("\n", self.counted, at)
        newline = self.text.rfind("\n", self.counted, at)
        if newline >= 0:
            self.line_start = newline + 1
        self.counted = at
        return Position(self.line, at - self.line_start + 1)

    def fail(self, at: int, problem: str) -> NoReturn:
        raise located(self.source.name, self.position(at), "", None, f"is not valid JSON: {problem}")

    def skip(self, at: int) -> int:
        found = _SPACE.match(self.text, at)
        return found.end() if found else at

    def value(self, at: int, path: Path_) -> tuple[Any, int]:
        """The value that begins at or after `at`, and where it ends."""
        at = self.skip(at)
        self.source.values[path] = self.position(at)
        if len(path) > self.max_depth:
            problem = f"is nested more than {self.max_depth} deep"
            raise located(self.source.name, self.position(at), spell(path), None, problem)
        start = self.text[at : at + 1]
        if start == "{":
            return self.mapping(at + 1, path)
        if start == "[":
            return self.sequence(at + 1, path)
        if start == '"':
            return self.string(at)
        number = _NUMBER.match(self.text, at)
        if number is not None:
            return self.number(number, path), number.end()
        word = _WORD.match(self.text, at)
        if word is None:
            self.fail(at, "it ends where a value should be")
        if word[0] not in _LITERALS:
            self.fail(at, f"{word[0][:40]!r} is no value: write text in double quotes, a number, true, false or null")
        return _LITERALS[word[0]], word.end()

    def string(self, at: int) -> tuple[str, int]:
        broken: tuple[int, str] | None = None
        try:
            text, end = scanstring(self.text, at + 1, True)
        except json.JSONDecodeError as error:
            broken = (error.pos, error.msg[:1].lower() + error.msg[1:])
        if broken is not None:
            self.fail(*broken)
        return text, end

    def number(self, found: re.Match[str], path: Path_) -> int | float:
        if len(found[0]) > MAX_DIGITS:
            raise located(self.source.name, self.position(found.start()), spell(path), None, "has too many digits")
        value = int(found[0]) if found[1] is None and found[2] is None else float(found[0])
        if not math.isfinite(value if isinstance(value, float) else 0.0):
            problem = f"{found[0]} is not a finite number"
            raise located(self.source.name, self.position(found.start()), spell(path), None, problem)
        return value

    def mapping(self, at: int, path: Path_) -> tuple[dict[str, Any], int]:
        result: dict[str, Any] = {}
        at = self.skip(at)
        if self.text[at : at + 1] == "}":
            return result, at + 1
        while True:
            at = self.skip(at)
            if self.text[at : at + 1] != '"':
                self.fail(at, "a key in double quotes must be here")
            place, (key, end) = self.position(at), self.string(at)
            if key in result:
                first = self.source.keys[(*path, key)]
                problem = f"is given twice, first in line {first.line}: keep one"
                raise located(self.source.name, place, spell((*path, key)), None, problem)
            self.source.keys[(*path, key)] = place
            at = self.skip(end)
            if self.text[at : at + 1] != ":":
                self.fail(at, "a colon must be here, after the key")
            result[key], at = self.value(at + 1, (*path, key))
            at = self.skip(at)
            end_mark = self.text[at : at + 1]
            if end_mark == "}":
                return result, at + 1
            if end_mark != ",":
                self.fail(at, "a comma or } must be here")
            at += 1

    def sequence(self, at: int, path: Path_) -> tuple[list[Any], int]:
        result: list[Any] = []
        at = self.skip(at)
        if self.text[at : at + 1] == "]":
            return result, at + 1
        while True:
            item, at = self.value(at, (*path, len(result)))
            result.append(item)
            at = self.skip(at)
            end_mark = self.text[at : at + 1]
            if end_mark == "]":
                return result, at + 1
            if end_mark != ",":
                self.fail(at, "a comma or ] must be here")
            at += 1


def read_json(text: str, name: str, max_depth: int) -> Source:
    """Read JSON text; `name` stands for the file in messages.

    Raises StackConfigError for what is no JSON, for repeated keys, numbers that are not finite, and nesting of more
    than `max_depth`.
    """
    reader = _Reader(text.removeprefix("\ufeff"), name, max_depth)
    reader.source.data, end = reader.value(0, ())
    end = reader.skip(end)
    if end < len(reader.text):
        reader.fail(end, "something follows the end of the document")
    return reader.source
