"""What moves where: the plain data that planner, scheduler and manager pass to each other. No behaviour.

Words: a *path* is a namespace root with the keys from its first block on; positions count along it. Arrays of one
plan are parallel: element i of each speaks of the same block.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from flexkv_core.backend import PAGE, Batch
from flexkv_core.index import Keys, Slots
from flexkv_core.layout import Coverage

HOST = 0
"""Number of the host tier: the first slot-addressed column of the index."""


class Outcome(enum.IntEnum):
    """What became of one block that was read: the backend's status, then the core's own verdict."""

    GOOD = 0
    MISSING = 1
    FAILED = 2
    CORRUPT = 3
    UNREAD = 4
    """It was not asked for, or the tier itself was failing: that says nothing of the block."""


@dataclass(slots=True, eq=False)
class Move:
    """Blocks of one path to move between the host region and one lower tier.

    Attributes:
        root, keys: the path, from position 0.
        tier: number of the lower tier in the stack.
        positions: (m,) int64, ascending within a group.
        groups: (m,) uint8, ascending.
        host_slots: (m,) int64, in units of `PAGE` bytes of the host region.
        tier_slots: (m,) int64 for slot-addressed tiers, else None.
        payload_bytes, slot_bytes: (m,) int64, without and with padding and seal.
        epoch: of the namespace's registration; after a reset the move commits nothing.
        generation: of the tier when the move was planned; a tier that lost its medium since has a newer one.
        owner: whose move it is, where several share a manager: owners take turns. 0: whoever calls in process.
        nbytes: sum of slot_bytes, which queues ask for again and again.
    """

    root: bytes
    keys: Keys
    tier: int
    positions: npt.NDArray[np.int64]
    groups: npt.NDArray[np.uint8]
    host_slots: Slots
    tier_slots: Slots | None
    payload_bytes: npt.NDArray[np.int64]
    slot_bytes: npt.NDArray[np.int64]
    epoch: int
    generation: int = 0
    owner: int = 0
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = int(self.slot_bytes.sum())

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def block_keys(self) -> Keys:
        """(m, 32) uint8: the keys of the moved blocks; a view where they lie next to each other. Not to be changed."""
        count = len(self.positions)
        if count and self.groups[0] == self.groups[-1]:
            first, last = int(self.positions[0]), int(self.positions[-1])
            if last - first + 1 == count:
                return self.keys[first : last + 1]
        return self.keys[self.positions]

    def batch(self, order: slice = slice(None)) -> Batch:
        """This move as a backend sees it, its blocks in that order."""
        slots = None if self.tier_slots is None else self.tier_slots[order]
        offsets = self.host_slots[order] * PAGE
        return Batch(self.block_keys[order], self.groups[order], offsets, self.slot_bytes[order], slots)

    def part(self, chosen: slice | npt.NDArray[np.bool_]) -> Move:
        """The chosen blocks of this move: itself where a mask chooses all."""
        if isinstance(chosen, np.ndarray) and chosen.all():
            return self
        return Move(
            self.root,
            self.keys,
            self.tier,
            self.positions[chosen],
            self.groups[chosen],
            self.host_slots[chosen],
            None if self.tier_slots is None else self.tier_slots[chosen],
            self.payload_bytes[chosen],
            self.slot_bytes[chosen],
            self.epoch,
            self.generation,
            self.owner,
        )


@dataclass(slots=True)
class Deletion:
    """Blocks that a key-addressed tier must forget so that it stays within its capacity.

    Attributes:
        excess: bytes that they take beyond what is reserved for the write that waits for them: no other write may have
            that room before they are gone.
    """

    tier: int
    keys: Keys
    groups: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int64]
    excess: int = 0


@dataclass(slots=True, eq=False)
class FetchPlan:
    """One fetch: what it holds pinned in host memory and what it still waits for.

    Attributes:
        coverages: the rules of the model's groups.
        slot_sizes: bytes of a block of each group, with its seal.
        blocks: length of the prefix that this fetch tries to supply.
        needed, pinned, awaited: (groups, blocks) bool; pinned and awaited are subsets of needed.
        slots: (groups, blocks) int64: host slots of the pinned blocks, `NO_SLOT` elsewhere.
        sources: (groups, blocks) int16: the stack's tier that each needed block was found in, -1 for none.
        reads: moves to start; the planner has allocated their host slots.
        open: False once nothing more may be pinned for it (deadline, release).
        truncated: the prefix was held further than the budget of pins, or the caller, allows.
        found: (tier, blocks) along all of the held prefix: the slowest tier that a block would come from. Empty where
            all of it is in host memory.
        counted: its blocks are hits: somebody will use them. False for a prefetch.
        asked: blocks that it was asked for; those that it does not supply are misses.
        epoch: of the namespace's registration.
    """

    root: bytes
    keys: Keys
    epoch: int
    coverages: tuple[Coverage, ...]
    slot_sizes: tuple[int, ...]
    blocks: int
    needed: npt.NDArray[np.bool_]
    pinned: npt.NDArray[np.bool_]
    awaited: npt.NDArray[np.bool_]
    slots: Slots
    sources: npt.NDArray[np.int16]
    reads: list[Move] = field(default_factory=list)
    open: bool = True
    truncated: bool = False
    counted: bool = True
    asked: int = 0
    found: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Probe:
    """What a key-addressed tier is asked about one path.

    Attributes:
        tier: its number in the stack.
        missing: (groups, n) bool: what the tier has said that it does not hold.
        known: leading blocks that some tier holds, as of the last question.
        epoch: of the namespace's registration; after a reset the answers go nowhere.
        generation: of the tier; after the loss of its medium neither.
        calls: made so far.
    """

    root: bytes
    keys: Keys
    tier: int
    missing: npt.NDArray[np.bool_]
    known: int
    epoch: int
    generation: int
    calls: int = 0


@dataclass(slots=True, eq=False)
class StorePlan:
    """One store: host slots for the blocks that the host tier does not hold.

    Attributes:
        positions, groups, slots: (m,) arrays: where each block's bytes go.
        kept: (groups, n) bool: blocks already in host memory, pinned until the store ends.
        refused: blocks for which there was no room.
        epoch: of the namespace's registration; after a reset the store commits nothing.
    """

    root: bytes
    keys: Keys
    positions: npt.NDArray[np.int64]
    groups: npt.NDArray[np.uint8]
    slots: Slots
    payload_bytes: npt.NDArray[np.int64]
    kept: npt.NDArray[np.bool_]
    refused: int
    epoch: int

    @property
    def parents(self) -> Keys:
        """(m, 32) uint8: the keys before the stored blocks; the root before a first one."""
        above = self.keys[np.maximum(self.positions - 1, 0)]
        above[self.positions == 0] = np.frombuffer(self.root, np.uint8)
        return above
