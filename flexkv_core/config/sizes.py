"""Sizes as people write them, and capacities of tiers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    UNITS[_letter + "b"] = 1000**_power
    UNITS[_letter + "ib"] = 1024**_power
MAX_BYTES = 1 << 62
MAX_BLOCKS = 1 << 40
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)
_BLOCKS = re.compile(r"([0-9]{1,30})\s*blocks?", re.IGNORECASE | re.ASCII)


def parse_size(value: Any) -> int:
    """Bytes of 4096, "32GiB", "1.5 TiB" or "500GB" (units of 1024 with an i, of 1000 without).

    Raises ValueError that says how to write it.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is not a size: write a number with a unit, such as 32GiB")
    if isinstance(value, int):
        size = value
    else:
        found = _SIZE.fullmatch(value.strip())
        unit = UNITS.get(found[2].lower()) if found else None
        if found is None or unit is None:
            raise ValueError(f"{value!r} is not a size: write a number with a unit, such as 32GiB")
        size = int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit
    if not 0 < size <= MAX_BYTES:
        raise ValueError(f"{value!r} must be more than 0 and at most {MAX_BYTES} bytes")
    return size


Size = Annotated[int, BeforeValidator(parse_size)]
"""A pydantic field type: a positive number of bytes, written with or without a unit."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """A tier's capacity: bytes, or for simulations blocks, or (both None) unbounded."""

    bytes: int | None = None
    blocks: int | None = None

    @property
    def unbounded(self) -> bool:
        return self.bytes is None and self.blocks is None

    def __str__(self) -> str:
        if self.unbounded:
            return "unbounded"
        return f"{self.bytes} bytes" if self.bytes is not None else f"{self.blocks} blocks"


def parse_capacity(value: Any) -> Capacity:
    """A size, "10000 blocks" or "unbounded". Raises ValueError that says how to write it."""
    if isinstance(value, Capacity):
        return value
    if isinstance(value, str):
        if value.strip().lower() == "unbounded":
            return Capacity()
        found = _BLOCKS.fullmatch(value.strip())
        if found:
            if int(found[1]) < 1:
                raise ValueError(f"{value!r} must be at least 1 block")
            if int(found[1]) > MAX_BLOCKS:
                raise ValueError(f"{value!r} must be at most {MAX_BLOCKS} blocks")
            return Capacity(blocks=int(found[1]))
    return Capacity(bytes=parse_size(value))
