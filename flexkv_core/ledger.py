"""What is accounted for: models, the tiers' books, the index, and who has booked or pinned which slot.

Owns the steps that every decision is made of (find, book, commit, pin, forget), so that slots, copies and namespaces
add up whoever takes them. Does not decide what moves: `planner.py` (lookups, fetches, stores) and `write_through.py`
(what sinks to lower tiers) share one ledger. The caller serialises all calls.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from flexkv_core.changes import Changes, Watcher
from flexkv_core.errors import UnknownNamespaceError
from flexkv_core.index import NO_SLOT, Evicted, GroupRule, Index, Keys, Slots
from flexkv_core.layout import Coverage, KVGroup
from flexkv_core.plans import HOST, Move
from flexkv_core.pool import SlotPool
from flexkv_core.tier_book import TierBook

NOWHERE = -1

Positions = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Clock = Callable[[], int]
"""Microseconds, from any start; going back does no harm."""


def monotonic_microseconds() -> int:
    """This machine's clock."""
    return time.monotonic_ns() // 1000


@dataclass(slots=True)
class Model:
    """A registered namespace.

    Attributes:
        classes: number of a slot-addressed tier -> the slot class there of each group.
        epoch: differs from that of every other registration, also of the same root: what was planned before a reset
            commits to nothing that came after it.
        plans: fetches and stores under way.
    """

    groups: tuple[KVGroup, ...]
    classes: dict[int, list[int]]
    epoch: int
    retired: bool = False
    plans: int = 0
    coverages: tuple[Coverage, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.coverages = tuple(group.coverage for group in self.groups)


def runs(positions: Positions) -> Iterator[tuple[int, int]]:
    """Split ascending positions into [start, stop) ranges without gaps."""
    if not len(positions):
        return
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 == len(positions):
        yield first, last + 1
        return
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    for piece in np.split(positions, breaks):
        yield int(piece[0]), int(piece[-1]) + 1


def distinct(groups: npt.NDArray[np.uint8]) -> list[int]:
    """The numbers in an ascending array, as the groups of moves and stores are."""
    if not len(groups):
        return []
    if groups[0] == groups[-1]:
        return [int(groups[0])]
    numbers: list[int] = np.unique(groups).tolist()
    return numbers


def mask_of(groups: npt.NDArray[np.uint8], group: int) -> slice | Mask:
    """Where an ascending array says `group`, as an index: everything, where it says nothing else."""
    if groups[0] == groups[-1] == group:
        return slice(None)
    return np.equal(groups, group)


def each_run(move: Move, act: Callable[[int, int, int], None]) -> None:
    """Call `act(group, start, stop)` for each range of a move's positions."""
    for group in distinct(move.groups):
        for start, stop in runs(move.positions[mask_of(move.groups, group)]):
            act(group, start, stop)


class Ledger:
    """See the module's docstring. `tiers[0]` is the host tier.

    Args:
        clock: asked only where a tier's policy counts in seconds.

    Attributes:
        changes: whoever wants to know which copies come and go, of the tiers whose books are exact.
    """

    def __init__(self, tiers: Sequence[TierBook], index: Index, clock: Clock = monotonic_microseconds) -> None:
        self.tiers = list(tiers)
        self.index = index
        self.host = self.tiers[HOST]
        self.lower = self.tiers[1:]
        self.models: dict[bytes, Model] = {}
        self.changes = Changes()
        self._columns = sorted((t for t in tiers if t.column is not None), key=lambda t: t.column or 0)
        self._retired: set[bytes] = set()
        self._leaving: set[bytes] = set()
        self._epochs = itertools.count(1)
        self._clock = clock
        self._timed = any(tier.eviction.hit_reward_seconds for tier in tiers)

    @property
    def host_pool(self) -> SlotPool:
        assert self.host.pool is not None
        return self.host.pool

    # ---------------------------------------------------------------- models

    def add_model(self, root: bytes, groups: Sequence[KVGroup]) -> None:
        """Make known a namespace and its slot classes.

        Raises LayoutError if a block does not fit in some tier, or the namespace has other groups.
        """
        classes = {t.number: [t.pool.slot_class(g.slot_bytes) for g in groups] for t in self.tiers if t.pool}
        columns = [classes[tier.number] for tier in self._columns]
        rules = [GroupRule(group.coverage, tuple(c[i] for c in columns)) for i, group in enumerate(groups)]
        self.index.add_namespace(root, rules)
        if root not in self.models:
            self.models[root] = Model(tuple(groups), classes, next(self._epochs))
        self._leaving.discard(root)
        smallest = min(group.slot_bytes for group in groups)
        for tier in self.lower:
            if tier.admission is not None and tier.capacity_bytes is not None:
                tier.admission.set_capacity(tier.capacity_bytes // smallest)

    def retire(self, root: bytes) -> None:
        """End an epoch: nothing of it matches or commits any more. Forgotten when its last copy is gone."""
        self.model(root).retired = True
        self.index.retire_namespace(root)
        self._leaving.discard(root)
        self._retired.add(root)
        self._drop_forgotten((root,))

    def leave(self, root: bytes) -> None:
        """Nobody uses a namespace any more: it is forgotten when its last copy is gone, and its last plan.

        Until then it is as it was, and adding it again takes this back.
        """
        if self.live(root) is not None:
            self._leaving.add(root)
            self._drop_forgotten((root,))

    def end_plan(self, root: bytes, epoch: int) -> None:
        """A fetch or a store has ended that was counted in `Model.plans`."""
        model = self.models.get(root)
        if model is not None and model.epoch == epoch:
            model.plans -= 1
            self._drop_forgotten((root,))

    def model(self, root: bytes) -> Model:
        """The model of a namespace in use. Raises UnknownNamespaceError for others."""
        model = self.live(root)
        if model is None:
            raise UnknownNamespaceError("this namespace is not registered or was reset: call register() again")
        return model

    def live(self, root: bytes, epoch: int | None = None) -> Model | None:
        """The same; None where the namespace was reset, if only since `epoch`."""
        model = self.models.get(root)
        if model is None or model.retired or epoch not in (None, model.epoch):
            return None
        return model

    def _drop_forgotten(self, roots: Iterable[bytes]) -> None:
        """Of these namespaces, drop those that were retired or left, and of which nothing is left."""
        for root in roots:
            if root in self._leaving and not (self.models[root].plans or self.index.has_copies(root)):
                self.retire(root)
            elif root in self._retired and not self.index.has_namespace(root):
                self._retired.discard(root)
                del self.models[root]

    # ---------------------------------------------------------------- what is where

    def locate(self, model: Model, root: bytes, keys: Keys) -> tuple[npt.NDArray[np.int16], Slots]:
        """Return the number of the fastest tier that holds each block, and its slot: (groups, n) arrays."""
        match = self.index.match(root, keys)
        known = match.tiers.shape[1]
        sources = np.full((len(model.groups), len(keys)), NOWHERE, np.int16)
        slots = np.full(sources.shape, NO_SLOT, np.int64)
        for tier in self._columns:
            sources[:, :known][match.tiers == tier.column] = tier.number
        slots[:, :known] = match.slots
        for tier in self.lower:
            if tier.presence is None:
                continue
            for group in range(len(model.groups)):
                open_ = np.flatnonzero((sources[group] == NOWHERE) | (sources[group] > tier.number))
                if len(open_) and len(tier.presence):
                    held = open_[tier.presence.held(keys[open_], group)]
                    sources[group, held] = tier.number
        return sources, slots

    def reachable(self, model: Model, root: bytes, keys: Keys) -> tuple[npt.NDArray[np.int16], Slots]:
        """As `locate`, of the tiers that can be read now."""
        sources, slots = self.locate(model, root, keys)
        away = [tier.number for tier in self.lower if not tier.available]
        if not away:
            return sources, slots
        lost = np.isin(sources, away)
        sources[lost], slots[lost] = NOWHERE, NO_SLOT
        for tier in self.lower:
            for group in np.flatnonzero(lost.any(axis=1)) if tier.available else ():
                held = lost[group] & self.holds(tier, root, keys, int(group))
                sources[group, held] = tier.number
                if tier.column is not None:
                    slots[group, held] = self.index.residency(root, keys, tier.column, int(group))[held]
                lost[group] &= ~held
        return sources, slots

    def holds(self, tier: TierBook, root: bytes, keys: Keys, group: int) -> Mask:
        """(n,) bool: which blocks of a path a tier holds, as far as we know."""
        if tier.presence is not None:
            return tier.presence.held(keys, group)
        assert tier.column is not None
        return np.not_equal(self.index.residency(root, keys, tier.column, group), NO_SLOT)

    def held(self, root: bytes, keys: Keys, first: int, watcher: Watcher) -> None:
        """Tell a watcher which blocks of a path, from position `first` on, the tiers with exact books hold."""
        model = self.live(root)
        for tier in self.tiers if model is not None else ():
            for group in range(len(model.groups) if model is not None and tier.exact else 0):
                mine = keys[first:][self.holds(tier, root, keys, group)[first:]]
                if len(mine):
                    watcher.committed(tier.number, root, mine, np.full(len(mine), group, np.uint8))

    def host_slots(self, root: bytes, keys: Keys, group: int) -> Slots:
        """(n,) int64: the slots in host memory along a path, also of a namespace that was reset or forgotten."""
        if not self.index.has_namespace(root):
            return np.full(len(keys), NO_SLOT, np.int64)
        return self.index.residency(root, keys, HOST, group)

    def touch(self, model: Model, root: bytes, keys: Keys) -> None:
        """Count a use of these blocks in all tiers."""
        self._tell_time()
        self.index.touch(root, keys)
        for tier in self.lower:
            if tier.presence is not None and len(tier.presence):
                for group in range(len(model.groups)):
                    tier.presence.touch(keys, group)

    def _tell_time(self) -> None:
        if self._timed:
            self.index.advance(self._clock())

    # ---------------------------------------------------------------- slots

    def book(self, tier: TierBook, model: Model, group: int, count: int) -> Slots:
        """Allocate up to `count` slots, evicting as the tier's options say; fewer when pins leave no room.

        A slot class takes room of another where it cannot help itself, or has turned over while the other stood still.
        """
        pool, slot_class = tier.pool, model.classes[tier.number][group]
        assert pool is not None
        while count:
            numbers = tier.slots_to_evict(slot_class, model.groups[group].slot_bytes, count)
            if numbers[-1] > 0 and tier.unclaimed:  # what survived of a model that nobody uses any more
                for part in tier.unclaimed.pop(next(iter(tier.unclaimed))):
                    pool.free(part.slots)
                    tier.counters.evicted_blocks += len(part)
                continue
            if numbers[-1] > 0 and tier.presses(slot_class):
                runs_wanted = min(4, max(1, pool.extents(slot_class) // 8))  # each looks at every copy
                if sum(self._take_room(tier, slot_class) for _ in range(runs_wanted)):
                    continue
            if any(number > 0 and self._evict(tier, number, slot_class) for number in numbers) or numbers[-1] <= 0:
                break
            if not self._take_room(tier, slot_class):
                count -= (numbers[-1] + 1) // 2
        slots = pool.allocate(slot_class, count) if count else None
        return np.zeros(0, np.int64) if slots is None else slots

    def _evict(self, tier: TierBook, count: int, slot_class: int) -> bool:
        """Evict so many copies, or none."""
        assert tier.column is not None
        evicted = self.index.evict(tier.column, count, slot_class)
        if evicted is None:
            return False
        tier.turnover[slot_class] = tier.turnover.get(slot_class, 0) + count
        self._evicted(tier, evicted)
        return True

    def _take_room(self, tier: TierBook, slot_class: int) -> bool:
        """Empty extents of other slot classes, so that this one can have a run."""
        assert tier.pool is not None
        assert tier.column is not None
        for start, stop, used in tier.pool.room_of_others(slot_class):
            evicted = self.index.evict_range(tier.column, start, stop, used)
            if evicted is not None:
                tier.turnover.clear()
                self._evicted(tier, evicted)
                return True
        return False

    def _evicted(self, tier: TierBook, evicted: Evicted) -> None:
        assert tier.pool is not None
        tier.pool.free(evicted.slots)
        tier.counters.evicted_blocks += len(evicted.slots)
        self.changes.evicted(tier.number, evicted)
        if (self._retired or self._leaving) and len(evicted.roots):
            changes = np.flatnonzero((evicted.roots[1:] != evicted.roots[:-1]).any(axis=1)) + 1
            self._drop_forgotten({evicted.roots[at].tobytes() for at in (0, *changes)})

    def move(
        self,
        model: Model,
        root: bytes,
        keys: Keys,
        tier: TierBook,
        positions: Positions,
        group: int | npt.NDArray[np.uint8],
        host_slots: Slots,
        tier_slots: Slots | None,
    ) -> Move:
        """Describe blocks that move between host memory and a tier."""
        groups = np.full(len(positions), group, np.uint8) if isinstance(group, int) else group
        payload, total = np.empty(len(groups), np.int64), np.empty(len(groups), np.int64)
        for number in distinct(groups):
            chosen = mask_of(groups, number)
            payload[chosen], total[chosen] = model.groups[number].block_bytes, model.groups[number].slot_bytes
        addressed = tier_slots if tier.addressing == "slot" else None
        return Move(
            root,
            keys,
            tier.number,
            positions,
            groups,
            host_slots,
            addressed,
            payload,
            total,
            model.epoch,
            tier.generation,
        )

    def commit(self, tier: TierBook, move: Move, slots: Slots) -> Mask:
        """Insert copies into a slot-addressed tier's column; duplicates and old epochs give their slots back.

        Returns (len(move),) bool: which are new.
        """
        assert tier.pool is not None
        assert tier.column is not None
        new = np.zeros(len(move), np.bool_)
        if not len(move):
            return new
        if self.live(move.root, move.epoch) is None:
            tier.pool.free(slots)
            return new
        self._tell_time()
        for group in distinct(move.groups):
            chosen = mask_of(move.groups, group)
            at, mine = move.positions[chosen], slots[chosen]
            spread = np.full(int(at[-1]) + 1, NO_SLOT, np.int64)
            spread[at] = mine
            taken = self.index.insert(move.root, move.keys[: len(spread)], tier.column, group, spread)[at]
            if not taken.all():
                tier.pool.free(mine[~taken])
            new[chosen] = taken
        tier.counters.stored_blocks += int(np.count_nonzero(new))
        if self.changes.watched:
            fresh = move.part(new)
            self.changes.committed(tier.number, move.root, fresh.block_keys, fresh.groups)
        return new

    def forget(self, tier: TierBook, move: Move) -> None:
        """Drop a lower tier's copies that were missing, corrupt or given up."""
        if move.generation != tier.generation:
            return
        if tier.exact and self.changes.watched:
            self.changes.dropped(tier.number, move.root, move.block_keys, move.groups)
        if tier.presence is not None:
            tier.presence.discard(move.block_keys, move.groups)
            return
        pool, column = tier.pool, tier.column
        assert pool is not None
        assert column is not None

        def drop(group: int, start: int, stop: int) -> None:
            if self.index.has_namespace(move.root):
                slots = self.index.remove(move.root, move.keys, column, group, start, stop)
                pool.free(slots[slots != NO_SLOT])

        each_run(move, drop)
        self._drop_forgotten((move.root,))

    def lose_tier(self, number: int) -> None:
        """A tier that is not persistent has lost its medium: forget all that it held."""
        tier = self.tiers[number]
        tier.generation += 1
        tier.debris_bytes = 0
        tier.failures.clear()
        self.changes.cleared(number)
        if tier.presence is not None:
            tier.presence.clear()
        elif tier.pool is not None and tier.column is not None:
            self.index.drop_tier(tier.column)
            tier.pool.clear()
            tier.unclaimed.clear()
            self._drop_forgotten([*self._retired, *self._leaving])

    # ---------------------------------------------------------------- pins

    def pin_host(self, root: bytes, keys: Keys, group: int, at: Positions) -> None:
        """Keep copies in host memory; `at` ascending."""
        for start, stop in runs(at):
            self.index.pin(root, keys, HOST, group, start, stop)

    def unpin_host(self, root: bytes, keys: Keys, pinned: Mask) -> None:
        """Take back a pin of each; `pinned`: (groups, n) bool."""
        for group in range(len(pinned)):
            for start, stop in runs(np.flatnonzero(pinned[group])):
                self.index.unpin(root, keys, HOST, group, start, stop)

    def unpin_move(self, move: Move) -> None:
        """Take back the pins in host memory of a write."""
        each_run(move, lambda group, a, b: self.index.unpin(move.root, move.keys, HOST, group, a, b))

    def hold(self, tier: TierBook, root: bytes, keys: Keys, group: int, at: Positions) -> None:
        """Keep a lower tier's copies while they are read."""
        if tier.presence is not None:
            tier.presence.pin(keys[at], np.full(len(at), group, np.uint8))
        elif tier.column is not None:
            for start, stop in runs(at):
                self.index.pin(root, keys, tier.column, group, start, stop)

    def let_go(self, tier: TierBook, move: Move) -> None:
        """The read of a lower tier's copies has ended."""
        if tier.presence is not None:  # its pins outlive a medium that is lost
            tier.presence.unpin(move.block_keys, move.groups)
        elif tier.column is not None and move.generation == tier.generation:
            column = tier.column
            each_run(move, lambda g, a, b: self.index.unpin(move.root, move.keys, column, g, a, b))
