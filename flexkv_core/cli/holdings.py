"""What the tiers of a stack hold of a model: blocks and tokens, by the same arithmetic as the slot pools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flexkv_core.books import EXTENT_BYTES
from flexkv_core.config import StackConfig, TierConfig
from flexkv_core.errors import LayoutError
from flexkv_core.layout import ModelSpec
from flexkv_core.pool import SlotPool


@dataclass(frozen=True, slots=True)
class Holding:
    """What one tier holds.

    Attributes:
        capacity_bytes: None: not given in bytes (a simulation's), or the backend bounds itself.
        group_blocks: blocks of each KV group, if it had the tier to itself; empty without a capacity in bytes.
        blocks: positions of a prefix, each with its block of every group; None without a capacity.
        tokens: of those positions.
    """

    tier: str
    addressing: Literal["slot", "key"]
    capacity_bytes: int | None
    group_blocks: tuple[int, ...]
    blocks: int | None
    tokens: int | None


def holdings(stack: StackConfig, model: ModelSpec) -> list[Holding]:
    """What every tier holds of a model, seals and the waste in extents included.

    Raises LayoutError, naming the tier, for a capacity that holds no block.
    """
    return [_holding(tier, model) for tier in stack.tiers]


def _holding(tier: TierConfig, model: ModelSpec) -> Holding:
    sizes = [group.slot_bytes for group in model.groups]
    capacity = tier.capacity.bytes if tier.capacity is not None else None
    if capacity is None:
        blocks = tier.capacity.blocks if tier.capacity is not None else None
        tokens = None if blocks is None else blocks * model.block_size
        return Holding(tier.name, tier.addressing, None, (), blocks, tokens)
    if tier.addressing == "slot":
        pool = SlotPool(capacity, EXTENT_BYTES, tier.name)
        classes = [pool.slot_class(size) for size in sizes]
        alone, together = tuple(pool.capacity(number) for number in classes), pool.capacity_together(classes)
    else:
        alone, together = tuple(capacity // size for size in sizes), capacity // sum(sizes)
    if not together:
        raise LayoutError(
            f"tier {tier.name}: capacity {capacity} bytes cannot hold a block of each of the {len(sizes)} KV groups, "
            f"which take {sum(sizes)} bytes in extents of {EXTENT_BYTES}: make it larger"
        )
    return Holding(tier.name, tier.addressing, capacity, alone, together, together * model.block_size)
