"""Eviction policies: what makes one copy go before another. Registered by name.

A policy sees one copy at a time and keeps a small immutable state for it. The index asks `order` and evicts,
among the copies that may go (leaf first, unpinned), the one that compares lowest. It never scans: it keeps its
candidates in a heap and asks again only when a copy's state has changed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, Protocol

from flexkv_core.errors import PolicyError


class Policy(Protocol):
    """What a third party's policy implements. `now` is a logical clock that only grows."""

    def insert(self, now: int) -> Any:
        """The state of a copy that has just come in."""

    def hit(self, state: Any, now: int) -> Any:
        """The state after a hit."""

    def order(self, state: Any) -> Any:
        """A value that compares with those of all other copies; the lowest is evicted first."""


class _Lru:
    """Least recently used: the copy whose last hit is longest ago."""

    def insert(self, now: int) -> int:
        return now

    def hit(self, state: int, now: int) -> int:
        return now

    def order(self, state: int) -> int:
        return state


class _Mru(_Lru):
    """Most recently used first."""

    def order(self, state: int) -> int:
        return -state


class _Fifo(_Lru):
    """First in, first out: hits do not matter."""

    def hit(self, state: int, now: int) -> int:
        return state


class _Filo(_Fifo):
    """Last in, first out."""

    def order(self, state: int) -> int:
        return -state


class _Lfu:
    """Least frequently used; among equals the least recently used. The state is (uses, last use)."""

    def insert(self, now: int) -> tuple[int, int]:
        return 1, now

    def hit(self, state: tuple[int, int], now: int) -> tuple[int, int]:
        return state[0] + 1, now

    def order(self, state: tuple[int, int]) -> tuple[int, int]:
        return state


_POLICIES: dict[str, Callable[[], Policy]] = {"lru": _Lru, "mru": _Mru, "fifo": _Fifo, "filo": _Filo, "lfu": _Lfu}


def policy_names() -> list[str]:
    """Names that `make_policy` knows, sorted."""
    return sorted(_POLICIES)


def register_policy(name: str, factory: Callable[[], Policy]) -> None:
    """Make a third party's policy known by name. Raises PolicyError if the name is taken."""
    if name in _POLICIES:
        raise PolicyError(f"eviction policy {name!r} is registered already: choose another name")
    _POLICIES[name] = factory


def make_policy(name: str) -> Policy:
    """A new policy of that name. Raises PolicyError naming the nearest known one."""
    factory = _POLICIES.get(name)
    if factory is None:
        near = difflib.get_close_matches(name, _POLICIES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known ones are {', '.join(policy_names())}"
        raise PolicyError(f"eviction {name!r} is not a known policy: {hint}")
    return factory()
