"""Values of flat keys: from what a YAML or JSON file holds, or a variable's text, to a typed value.

Each parser takes a plain value and returns the typed one, or raises ValueError that says what to write. The messages do
not repeat the value: the caller shows it, unless it is a secret.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from pydantic import SecretStr

from flexkv_core.config.sizes import parse_size
from flexkv_core.errors import PolicyError
from flexkv_core.policies import check_policy

Parse = Callable[[Any], Any]
GIB = 1 << 30
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18})([eE][+-]?[0-9]{1,2})?")
_FLAGS = {"0": False, "1": True, "false": False, "true": True, "no": False, "yes": True, "off": False, "on": True}


def flag(value: Any) -> bool:
    """0, 1, true, false, in any case; also yes, no, on and off."""
    found = _FLAGS.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None
    if found is None:
        raise ValueError("is neither on nor off: write 1 or 0, or true or false")
    return found


def whole(low: int, high: int) -> Parse:
    """A whole number within bounds, both included."""

    def parse(value: Any) -> int:
        if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return parse


def number(low: float, high: float, also: Callable[[float], str] = lambda _: "") -> Parse:
    """A number within bounds, decimals allowed; `also` returns what else is wrong with it, "" for nothing."""

    def parse(value: Any) -> float:
        if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"must be a number from {low:g} to {high:g}, without a unit")
        problem = also(float(value))
        if problem:
            raise ValueError(problem)
        return float(value)

    return parse


def choice(*names: str) -> Parse:
    """One of some names, in any case."""
    spelt = {name.lower(): name for name in names}

    def parse(value: Any) -> str:
        found = spelt.get(value.strip().lower()) if isinstance(value, str) else None
        if found is None:
            raise ValueError(f"must be one of {', '.join(names)}")
        return found

    return parse


def text(value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str):
        raise ValueError("must be text: put it in quotes")
    if not value.strip() or "\0" in value:
        raise ValueError("is empty or holds a NUL: write some text")
    return value


def secret(value: Any) -> SecretStr:
    """Text that is never shown."""
    return SecretStr(text(value))


def directories(value: Any) -> tuple[str, ...]:
    """Paths separated by ";", or a list of them; each once."""
    parts = value.split(";") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError('must be paths separated by ";", such as /data0/flexkv;/data1/flexkv')
    found = tuple(part.strip() for part in parts if part.strip())
    if not found or any("\0" in part for part in found):
        raise ValueError("names no directory: write a path, such as /data0/flexkv")
    if len(set(found)) < len(found):
        raise ValueError("names a directory twice: keep one")
    return found


def policy(value: Any) -> str:
    """The name of an eviction policy; built-in ones in any case."""
    if not isinstance(value, str):
        raise ValueError("must be the name of a policy, such as lru")
    name = value.strip()
    try:
        return check_policy(name.lower())
    except PolicyError as error:
        problem = str(error)
    try:
        return check_policy(name)
    except PolicyError:
        raise ValueError(problem) from None


def page_size(value: Any) -> int:
    """Bytes of a huge page: a power of two of at least 4 KiB, with or without a unit."""
    try:
        size = parse_size(int(value) if isinstance(value, str) and _WHOLE.fullmatch(value.strip()) else value)
    except ValueError:
        size = 0
    if size < 4096 or size & (size - 1):
        raise ValueError("must be a power of two of at least 4096 bytes, such as 2097152 or 2MiB")
    return size


def ports(value: Any) -> tuple[int, ...]:
    """TCP ports separated by commas, each once."""
    parts = value.split(",") if isinstance(value, str) else [value]
    parse = whole(1, 65535)
    try:
        found = tuple(parse(part) for part in parts)
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found):
        raise ValueError("must be different ports from 1 to 65535, separated by commas, such as 5556,5557,5558")
    return found


def socket_path(value: Any) -> str:
    """`ipc://` and an absolute path, or the path alone: a Unix socket. Returns the path."""
    path = value.strip().removeprefix("ipc://") if isinstance(value, str) else ""
    if not path.startswith("/") or "\0" in path:
        raise ValueError("must be a Unix socket, such as ipc:///tmp/flexkv_server: memory is shared on one machine")
    if len(path.encode(errors="replace")) > 107:
        raise ValueError("is longer than the 107 bytes that the path of a Unix socket may have: choose a shorter one")
    return path


def capacity_gib(*, none_allowed: bool) -> Parse:
    """GiB, decimals allowed, at least a page of 4 KiB; with `none_allowed` also 0."""

    def at_least_a_page(value: float) -> str:
        if value * GIB >= 4096 or (none_allowed and value == 0):
            return ""
        return f"must be {'0 (no such tier) or ' if none_allowed else ''}at least 4 KiB, which is 0.000004"

    return number(0, 1 << 30, at_least_a_page)


def file_gib(value: Any) -> float:
    """GiB of a file, decimals allowed; negative: no limit."""

    def limit(size: float) -> str:
        return "" if size < 0 or size * GIB >= 4096 else "must be at least 4 KiB, or -1 for no limit"

    parsed: float = number(-(1 << 30), 1 << 30, limit)(value)
    return parsed if math.copysign(1, parsed) > 0 else -1.0
