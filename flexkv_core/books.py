"""From a stack to the planner's books: which tier is the host, which sizes, pools, presence records and columns.

The only place that turns a `StackConfig` into tiers. The manager and the simulation both start here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexkv_core.config import Capacity, StackConfig, TierConfig
from flexkv_core.config.stack import IndexName
from flexkv_core.epochs import Epochs
from flexkv_core.errors import PolicyError, StackConfigError
from flexkv_core.index import Index
from flexkv_core.index.native import NativeIndex
from flexkv_core.index.reference import ReferenceIndex
from flexkv_core.ledger import Clock, monotonic_microseconds
from flexkv_core.planner import Planner
from flexkv_core.plans import HOST
from flexkv_core.policies import Eviction
from flexkv_core.policies.admission import GuardedAdmission, make_admission
from flexkv_core.pool import SlotPool
from flexkv_core.presence import Presence
from flexkv_core.tier_book import TierBook

MIB = 1 << 20
EXTENT_BYTES = 32 * MIB
"""Of a large tier. A small one has extents of about a 16th of its capacity, so that several slot classes find room."""
SMALLEST_EXTENT_BYTES = MIB // 16
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


def host_bytes_of(stack: StackConfig, simulated_slot_bytes: int | None = None) -> int:
    """Bytes of host memory that a stack asks for. Raises StackConfigError for a capacity that needs a simulation."""
    first = stack.tiers[0] if stack.tiers and stack.tiers[0].hosts else None
    return _bytes(first, first.capacity, simulated_slot_bytes) if first is not None else STAGING_BYTES


def open_books(stack: StackConfig, *, simulated_slot_bytes: int | None = None) -> OpenedBooks:
    """Make the books of a stack.

    Args:
        simulated_slot_bytes: size of a block with its seal, for a simulation: capacities in blocks and
            `unbounded` are then allowed.

    Raises:
        StackConfigError: a capacity that needs a simulation, or none where the tier needs one; a third party's
            admission that cannot be made.
    """
    tiers = list(stack.tiers)
    hosted = tiers.pop(0) if tiers and tiers[0].hosts else None

    def pool_of(tier: TierConfig | None, capacity: int, name: str) -> SlotPool:
        """Slots for a tier; one whose capacity is a number of blocks (of a simulation) has exactly so many."""
        in_blocks = tier is not None and tier.capacity is not None and tier.capacity.bytes is None
        if in_blocks and simulated_slot_bytes is not None:
            return SlotPool(capacity, SIMULATED_EXTENT_BLOCKS * simulated_slot_bytes, name)
        return SlotPool(capacity, extent_bytes(capacity), name)

    host_bytes = host_bytes_of(stack, simulated_slot_bytes)
    name = hosted.name if hosted is not None else STAGING_NAME
    while name in [tier.name for tier in tiers]:
        name += "-memory"
    books = [TierBook(name, "cpu", 0, "slot", host_bytes, pool=pool_of(hosted, host_bytes, name), column=0)]
    columns = 1
    for number, tier in enumerate(tiers, start=1):
        if tier.addressing == "slot":
            size = _bytes(tier, tier.capacity, simulated_slot_bytes)
            pool = pool_of(tier, size, tier.name)
            books.append(TierBook(tier.name, tier.backend, number, "slot", size, pool=pool, column=columns))
            columns += 1
        else:
            bound = _bytes(tier, tier.capacity, simulated_slot_bytes) if tier.capacity else None
            books.append(TierBook(tier.name, tier.backend, number, "key", bound, presence=Presence(bound)))
        books[-1].admission = _admission(tier)
    for book, config in zip(books, [hosted, *tiers], strict=True):
        if config is not None:
            book.eviction = config.eviction
            book.evict_ratio = config.evict_ratio
            book.evict_start_threshold = config.evict_start_threshold
    options = hosted.options if hosted is not None else None
    return OpenedBooks(
        books,
        tiers,
        host_bytes,
        huge_pages=bool(getattr(options, "huge_pages", False)),
        prefault=bool(getattr(options, "prefault", True)),
        threads=getattr(options, "threads", None),
    )


def open_epochs(directory: Path | None, opened: OpenedBooks) -> tuple[Epochs, list[int]]:
    """Open the record of resets, in `directory` and on the media of the lower tiers.

    Returns it, and the numbers of the tiers whose blocks it does not live as long as, if they outlive this process.

    Raises DirectoryInUseError if another process holds `directory`.
    """
    media, forgetful = [], []
    for number, tier in enumerate(opened.lower, HOST + 1):
        if (medium := tier.options.epoch_directory()) is not None:
            media.append(medium)
        elif tier.persistent and directory is None:
            forgetful.append(number)
    return Epochs(directory and directory / "epochs", media), forgetful


def extent_bytes(capacity: int) -> int:
    """The unit by which a tier's capacity is divided among slot classes: a power of two."""
    share = 1 << max(0, (capacity // 16).bit_length() - 1)
    return min(EXTENT_BYTES, max(SMALLEST_EXTENT_BYTES, share))


def make_index(policies: Sequence[Eviction], name: IndexName = "native") -> Index:
    """An empty index with a column for each policy: the one place that chooses the implementation."""
    if name == "reference":
        return ReferenceIndex(len(policies), policies)
    return NativeIndex(len(policies), policies)


def make_planner(
    books: list[TierBook],
    clock: Clock = monotonic_microseconds,
    *,
    pin_budget_bytes: int | None = None,
    index: IndexName = "native",
) -> Planner:
    """A planner over an empty index of that name; other arguments as for `Planner`."""
    policies = [book.eviction for book in books if book.column is not None]
    return Planner(books, make_index(policies, index), clock, pin_budget_bytes)


def _admission(tier: TierConfig) -> GuardedAdmission | None:
    try:
        return make_admission(tier.admission)
    except PolicyError as error:
        raise StackConfigError(f"tier {tier.name}: {error}") from error


def _bytes(tier: TierConfig, capacity: Capacity | None, slot_bytes: int | None) -> int:
    if capacity is None:
        raise StackConfigError(f"tier {tier.name}: capacity is missing; write one, such as 32GiB")
    if capacity.bytes is not None:
        return capacity.bytes
    if slot_bytes is None:
        text = "unbounded" if capacity.unbounded else f"{capacity.blocks} blocks"
        raise StackConfigError(f"tier {tier.name}: capacity {text!r} is for simulations; write a size, such as 32GiB")
    return (capacity.blocks or UNBOUNDED_BLOCKS) * slot_bytes
