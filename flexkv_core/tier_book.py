"""A tier's books: what it is, what it has done, and how much should go when room is made.

Owns the figures of one tier and the arithmetic of `evict_ratio` and `evict_start_threshold`. Does not own which copies
go (`index/`, `presence.py`), nor the order of events (`planner.py`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flexkv_core._native import BlockSet
from flexkv_core.backend import Recovered
from flexkv_core.failures import RepeatedFailures
from flexkv_core.policies import Eviction
from flexkv_core.policies.admission import GuardedAdmission
from flexkv_core.pool import SlotPool
from flexkv_core.presence import Presence


@dataclass(slots=True)
class TierCounters:
    """What a tier has done since the manager was opened; blocks and bytes.

    Of the blocks that fetches asked for, `hit_blocks` came from this tier; `miss_blocks` neither from this one nor from
    a faster one. Prefetches count in neither.
    """

    hit_blocks: int = 0
    miss_blocks: int = 0
    stored_blocks: int = 0
    recovered_blocks: int = 0
    evicted_blocks: int = 0
    rejected_blocks: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    corrupt_blocks: int = 0
    failed_blocks: int = 0
    missing_blocks: int = 0
    dropped_blocks: int = 0
    given_up_blocks: int = 0
    probes: int = 0
    probed_blocks: int = 0
    dropped_probes: int = 0


@dataclass(slots=True)
class TierBook:
    """A tier's books: slot-addressed tiers have a pool and an index column, key-addressed ones a presence record.

    Attributes:
        eviction: the column's policy.
        evict_ratio: at least this share of the capacity goes at a time.
        evict_start_threshold: room is made when this share of the capacity would be passed.
        admission: what it takes of what it is offered; None: all.
        queued: blocks on their way down.
        turnover: slot class -> copies evicted since room last went from one class to another.
        failures: which of its copies could not be read lately.
        unclaimed: root -> what survived of a namespace that is not registered (yet), its slots adopted.
        reserved_bytes: being written to a key-addressed tier, not yet in its record.
        debris_bytes: out of the record but not yet deleted: corrupt copies, and evicted ones as far as nothing that is
            reserved waits for them.
        generation: grows when the tier's medium is lost; moves of an older one no longer count.
        available: what it holds can be read now; the scheduler says so. Lookups promise nothing of a tier that is away.
    """

    name: str
    backend: str
    number: int
    addressing: Literal["slot", "key"]
    capacity_bytes: int | None
    pool: SlotPool | None = None
    column: int | None = None
    presence: Presence | None = None
    eviction: Eviction = field(default_factory=Eviction)
    evict_ratio: float = 0.0
    evict_start_threshold: float = 1.0
    admission: GuardedAdmission | None = None
    counters: TierCounters = field(default_factory=TierCounters)
    queued: BlockSet = field(default_factory=BlockSet)
    failures: RepeatedFailures = field(default_factory=RepeatedFailures)
    turnover: dict[int, int] = field(default_factory=dict)
    unclaimed: dict[bytes, list[Recovered]] = field(default_factory=dict)
    reserved_bytes: int = 0
    debris_bytes: int = 0
    generation: int = 0
    available: bool = True

    @property
    def exact(self) -> bool:
        """Whether the books say what it holds. Those of a key-addressed tier that bounds itself only hint at it."""
        return self.presence is None or self.presence.capacity_bytes is not None

    @property
    def used_bytes(self) -> int:
        """Bytes that the tier's blocks take, seals included."""
        if self.pool is not None:
            return self.pool.used_bytes
        return self.presence.used_bytes if self.presence is not None else 0

    @property
    def used_blocks(self) -> int:
        """The tier's blocks; of a key-addressed one those that are known."""
        if self.pool is not None:
            return self.pool.used_slots
        return len(self.presence) if self.presence is not None else 0

    def figures(self) -> dict[str, Any]:
        """The tier's figures for `stats()`."""
        return {
            "backend": self.backend,
            "capacity_bytes": self.capacity_bytes,
            "used_bytes": self.used_bytes,
            "used_blocks": self.used_blocks,
            "free_blocks": self.pool.free_slots() if self.pool is not None else {},
            **asdict(self.counters),
        }

    def slots_to_evict(self, slot_class: int, slot_bytes: int, count: int) -> tuple[int, ...]:
        """How many copies of a class should go before `count` slots are allocated in a slot-addressed tier.

        Returns numbers to try in turn, from what is wished for down to what is needed; the last one is needed and
        may be 0, or negative where there is room. With the default options that is the only one.
        """
        if self.pool is None:
            return (0,)
        short = count - self.pool.available(slot_class)
        over = short
        if self.evict_start_threshold < 1:
            limit = self.evict_start_threshold * self.pool.capacity_bytes
            over = _ceil((self.pool.used_bytes + count * slot_bytes - limit) / slot_bytes)
            over = max(short, min(over, self.pool.allocated(slot_class)))
        if over <= 0 or (over == short and not self.evict_ratio):
            return (short,)
        share = min(_ceil(self.evict_ratio * self.pool.capacity(slot_class)), self.pool.allocated(slot_class))
        return tuple(dict.fromkeys((max(share, over), over, short)))

    def presses(self, slot_class: int) -> bool:
        """Whether a slot class should get room of another: all its copies have been replaced since it last did, while
        another class has kept most of its own."""
        if self.pool is None or self.turnover.get(slot_class, 0) < self.pool.allocated(slot_class):
            return False
        others = {number: self.pool.allocated(number) for number in self.pool.used_classes if number != slot_class}
        return any(held and 2 * self.turnover.get(number, 0) < held for number, held in others.items())

    def bytes_to_free(self, planned: int) -> int:
        """The room to make in an exclusive key-addressed tier before `planned` bytes are written.

        Counts from the capacity: `Presence.evict_for` of it lets as much go as the options say. `planned` includes
        what is reserved.
        """
        wanted = planned + self.debris_bytes
        if self.presence is None or self.presence.capacity_bytes is None:
            return wanted
        capacity = self.presence.capacity_bytes
        total = self.presence.used_bytes + wanted
        over = _ceil(total - self.evict_start_threshold * capacity)
        if over <= 0:
            return wanted
        going = max(over, _ceil(self.evict_ratio * capacity))
        return max(wanted, wanted + going - (total - capacity))


def _ceil(number: float) -> int:
    """Round up, but for what floating point has added: 0.07 of 100 is 7."""
    return math.ceil(number - 1e-12 * max(1.0, abs(number)))
