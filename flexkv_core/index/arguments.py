"""What callers of an index may pass: each check raises before anything has changed, and says what to pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexkv_core.errors import KeyInputError, KeyTypeError, LayoutError
from flexkv_core.index import MAX_SLOT, NO_SLOT, NO_TIER, GroupRule
from flexkv_core.policies import Eviction

KEY_BYTES = 32
MAX_GROUPS = 255


def check_policies(tiers: int, policies: Sequence[str | Eviction] | None) -> list[Eviction]:
    """One Eviction a tier. Raises ValueError for a wrong number of tiers or policies."""
    given = ["lru"] * tiers if policies is None else list(policies)
    if len(given) != tiers or not 1 <= tiers < NO_TIER:
        raise ValueError(f"{len(given)} policies for {tiers} tiers: give one each, for 1 to {NO_TIER - 1} tiers")
    return [each if isinstance(each, Eviction) else Eviction(each) for each in given]


def check_root(root: bytes) -> None:
    """Raises KeyTypeError or KeyInputError for what is not 32 bytes."""
    if not isinstance(root, bytes):
        raise KeyTypeError(f"root is {type(root).__name__}: pass bytes")
    if len(root) != KEY_BYTES:
        raise KeyInputError(f"root has {len(root)} bytes: pass {KEY_BYTES}")


def check_groups(tiers: int, groups: Sequence[GroupRule]) -> tuple[GroupRule, ...]:
    """The rules with one slot class a tier each. Raises LayoutError."""
    if not 1 <= len(groups) <= MAX_GROUPS:
        raise LayoutError(f"{len(groups)} KV groups: a namespace has 1 to {MAX_GROUPS}")
    for group, rule in enumerate(groups):
        if not isinstance(rule.slot_class, int) and len(rule.slot_class) != tiers:
            raise LayoutError(
                f"group {group} has {len(rule.slot_class)} slot classes: give one, or one a tier ({tiers})"
            )
    rules = [GroupRule(rule.coverage, tuple(rule.class_in(tier) for tier in range(tiers))) for rule in groups]
    if any(rule.class_in(tier) < 0 for rule in rules for tier in range(tiers)):
        raise LayoutError("a slot class is negative: classes are numbers from 0")
    return tuple(rules)


def check_keys(keys: np.ndarray, name: str = "keys") -> None:
    """Raises KeyTypeError or KeyInputError for what is not a (n, 32) uint8 array."""
    if not isinstance(keys, np.ndarray) or keys.dtype != np.uint8:
        raise KeyTypeError(f"{name} are {getattr(keys, 'dtype', type(keys).__name__)}: pass a uint8 array (n, 32)")
    if keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
        raise KeyInputError(f"{name} have shape {keys.shape}: pass (n, {KEY_BYTES})")


def check_column(tiers: int, groups: int, tier: int, group: int) -> None:
    """Raises ValueError for a tier or group that there is not."""
    check_tier(tiers, tier)
    if not 0 <= group < groups:
        raise ValueError(f"group {group}: the namespace has groups 0 to {groups - 1}")


def check_tier(tiers: int, tier: int) -> None:
    """Raises ValueError for a tier that there is not."""
    if not 0 <= tier < tiers:
        raise ValueError(f"tier {tier}: the index has tiers 0 to {tiers - 1}")


def check_range(start: int, stop: int, keys: int) -> None:
    """Raises ValueError unless 0 <= start <= stop <= keys."""
    if not 0 <= start <= stop <= keys:
        raise ValueError(f"positions [{start}, {stop}) of {keys} keys: 0 <= start <= stop <= {keys} must hold")


def check_integers(values: np.ndarray, length: int, lowest: int, highest: int, name: str) -> None:
    """Raises ValueError for what is not an int64 array (length,) of values from lowest to highest."""
    if not isinstance(values, np.ndarray) or values.dtype != np.int64 or values.shape != (length,):
        what = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise ValueError(f"{name} are {what}: pass int64 ({length},)")
    if length and not (lowest <= int(values.min()) and int(values.max()) <= highest):
        raise ValueError(f"{name} from {values.min()} to {values.max()}: must be from {lowest} to {highest}")


def check_slots(slots: np.ndarray, length: int, lowest: int = NO_SLOT) -> None:
    """Raises ValueError for what is not an int64 array (length,) of slots; `lowest` 0 refuses NO_SLOT."""
    check_integers(slots, length, lowest, MAX_SLOT, "slots")
