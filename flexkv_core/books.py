"""From a stack to the planner's books: which tier is the host, which sizes, pools, presence records and columns.

The only place that turns a `StackConfig` into tiers. The manager and the simulation both start here.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexkv_core.config import Capacity, StackConfig, TierConfig
from flexkv_core.errors import StackConfigError
from flexkv_core.index.reference import ReferenceIndex
from flexkv_core.planner import Planner, TierBook
from flexkv_core.pool import SlotPool
from flexkv_core.presence import Presence

MIB = 1 << 20
EXTENT_BYTES = 32 * MIB
STAGING_BYTES = 256 * MIB
"""Host memory of a stack without a cpu tier: blocks pass through it on their way."""
UNBOUNDED_BLOCKS = 1 << 26
"""What a simulation takes for no bound at all: more blocks than a trace of a billion tokens has."""
SIMULATED_EXTENT_BLOCKS = 1 << 12
STAGING_NAME = "host"


@dataclass(frozen=True, slots=True)
class OpenedBooks:
    """Books of every tier, the host tier first, and what the host region needs.

    Attributes:
        lower: the configs of books[1:], in order.
    """

    books: list[TierBook]
    lower: list[TierConfig]
    host_bytes: int
    huge_pages: bool
    prefault: bool
    threads: int | None


def open_books(stack: StackConfig, *, simulated_slot_bytes: int | None = None) -> OpenedBooks:
    """Make the books of a stack.

    Args:
        simulated_slot_bytes: size of a block with its seal, for a simulation: capacities in blocks and
            `unbounded` are then allowed.

    Raises:
        StackConfigError: a capacity that needs a simulation, or none where the tier needs one.
    """
    tiers = list(stack.tiers)
    hosted = tiers.pop(0) if tiers and tiers[0].hosts else None
    extent = EXTENT_BYTES
    if simulated_slot_bytes is not None:
        extent = SIMULATED_EXTENT_BLOCKS * simulated_slot_bytes
    host_bytes = STAGING_BYTES
    if hosted is not None:
        host_bytes = _bytes(hosted, hosted.capacity, simulated_slot_bytes)
    name = hosted.name if hosted is not None else STAGING_NAME
    books = [TierBook(name, "cpu", 0, "slot", host_bytes, pool=SlotPool(host_bytes, extent), column=0)]
    policies = [hosted.eviction if hosted is not None else "lru"]
    for number, tier in enumerate(tiers, start=1):
        if tier.addressing == "slot":
            size = _bytes(tier, tier.capacity, simulated_slot_bytes)
            pool = SlotPool(size, extent)
            books.append(TierBook(tier.name, tier.backend, number, "slot", size, pool=pool, column=len(policies)))
            policies.append(tier.eviction)
        else:
            bound = _bytes(tier, tier.capacity, simulated_slot_bytes) if tier.capacity else None
            books.append(TierBook(tier.name, tier.backend, number, "key", bound, presence=Presence(bound)))
    for book, policy in zip((b for b in books if b.column is not None), policies, strict=True):
        book.policy = policy
    options = hosted.options if hosted is not None else None
    return OpenedBooks(
        books,
        tiers,
        host_bytes,
        huge_pages=bool(getattr(options, "huge_pages", False)),
        prefault=bool(getattr(options, "prefault", True)),
        threads=getattr(options, "threads", None),
    )


def make_planner(books: list[TierBook]) -> Planner:
    """A planner over an empty index."""
    policies = [book.policy for book in books if book.column is not None]
    return Planner(books, ReferenceIndex(len(policies), policies))


def _bytes(tier: TierConfig, capacity: Capacity | None, slot_bytes: int | None) -> int:
    if capacity is None:
        raise StackConfigError(f"tier {tier.name}: capacity is missing; write one, such as 32GiB")
    if capacity.bytes is not None:
        return capacity.bytes
    if slot_bytes is None:
        text = "unbounded" if capacity.unbounded else f"{capacity.blocks} blocks"
        raise StackConfigError(f"tier {tier.name}: capacity {text!r} is for simulations; write a size, such as 32GiB")
    return (capacity.blocks or UNBOUNDED_BLOCKS) * slot_bytes
