"""Eviction policies by name: what makes one copy go before another, and how third parties add their own.

Built-in policies are native (`native/index/policy.hpp`), and once more in Python for the reference index
(`reference.py`). A third party's policy is a Python class: a distribution with an entry point in the group
`flexkv.policies` whose value makes a `Policy`, or a call of `register_policy`. It runs at Python's speed, inside the
index, under its lock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from flexkv_core.errors import PolicyError
from flexkv_core.policies.registry import Registry

POLICY_ENTRY_POINTS = "flexkv.policies"
BUILT_IN = ("lru", "lfu", "slru", "fifo", "mru", "filo", "s3fifo")


class Policy(Protocol):
    """What a third party's policy implements. States and orders are integers of 64 bits, signed.

    `now` is a logical clock that only grows; all copies that one request inserts or hits have the same. Of copies
    with equal orders the deeper one goes first. An exception counts as order 0, or leaves the state as it is; it
    is reported, and never reaches an engine. Calls of the index from within are refused.
    """

    def insert(self, now: int) -> int:
        """The state of a copy that has just come in."""

    def hit(self, state: int, now: int) -> int:
        """The state after a hit."""

    def order(self, state: int) -> int:
        """A value that compares with those of all other copies; the lowest is evicted first."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """A tier's eviction policy with its options.

    Attributes:
        policy: a name of `policy_names()`.
        hit_reward_seconds: lru only: each hit moves the last access this much further into the future, from now
            or from where earlier rewards have moved it, whichever is later.
        slru_protected_threshold: slru only: hits that make a copy protected; unprotected ones go first.
    """

    policy: str = "lru"
    hit_reward_seconds: float = 0.0
    slru_protected_threshold: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.hit_reward_seconds <= 1e9:
            raise PolicyError(f"hit_reward_seconds {self.hit_reward_seconds}: must be from 0 to 1e9")
        if not 1 <= self.slru_protected_threshold <= 1 << 20:
            raise PolicyError(f"slru_protected_threshold {self.slru_protected_threshold}: must be from 1 to {1 << 20}")

    @property
    def reward_ticks(self) -> int:
        """`hit_reward_seconds` in ticks of a microsecond."""
        return round(self.hit_reward_seconds * 1e6)


_registry: Registry[Policy] = Registry(
    key="eviction",
    kind="eviction policy",
    entry_points=POLICY_ENTRY_POINTS,
    built_in=BUILT_IN,
    methods=("insert", "hit", "order"),
    protocol="flexkv_core.policies.Policy",
)


def policy_names() -> list[str]:
    """Names that a stack's `eviction:` may have, sorted."""
    return _registry.names()


def register_policy(name: str, factory: Callable[[], Policy]) -> None:
    """Make a third party's policy known by name. Raises PolicyError if the name is taken."""
    _registry.register(name, factory)


def check_policy(name: str) -> str:
    """Return the name if there is such a policy. Raises PolicyError naming the nearest known one."""
    return _registry.check(name)


def make_custom(name: str) -> Policy | None:
    """A new instance of a third party's policy; None for a built-in one.

    Raises PolicyError if there is none of that name, or it cannot be made; the text names what provides it.
    """
    return _registry.make(name)
