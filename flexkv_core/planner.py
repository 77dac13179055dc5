"""What is where and what should move: every decision, no thread, no I/O, no bytes.

The planner owns the index, the slot pools and the presence records. Each method is one atomic step: it decides,
books slots and pins, and returns plans (`plans.py`) that the scheduler carries out and reports back. So a
simulation is this class with every plan succeeding at once (`simulate.py`).

It does not own queues, processes or copies (`scheduler.py`). The caller serialises all calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import UnknownNamespaceError
from flexkv_core.index import NO_SLOT, GroupRule, Index, Keys
from flexkv_core.index.coverage import covered_prefix, needed
from flexkv_core.layout import Coverage, KVGroup
from flexkv_core.plans import HOST, Deletion, FetchPlan, Move, Outcome, StorePlan
from flexkv_core.pool import SlotPool
from flexkv_core.presence import Presence

NOWHERE = -1


@dataclass(slots=True)
class TierCounters:
    """What a tier has done since the manager was opened; blocks and bytes."""

    hit_blocks: int = 0
    stored_blocks: int = 0
    evicted_blocks: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    corrupt_blocks: int = 0
    failed_blocks: int = 0
    missing_blocks: int = 0
    dropped_blocks: int = 0


@dataclass(slots=True)
class TierBook:
    """A tier's books: slot-addressed tiers have a pool and an index column, key-addressed ones a presence record."""

    name: str
    backend: str
    number: int
    addressing: Literal["slot", "key"]
    capacity_bytes: int | None
    pool: SlotPool | None = None
    column: int | None = None
    presence: Presence | None = None
    policy: str = "lru"
    counters: TierCounters = field(default_factory=TierCounters)
    queued: set[tuple[bytes, int]] = field(default_factory=set)  # (key, group) on its way down
    reserved_bytes: int = 0  # being written to a key-addressed tier, not yet in its record
    debris_bytes: int = 0  # corrupt copies there, out of the record but not yet deleted
    generation: int = 0  # grows when the tier's medium is lost; moves of an older one no longer count

    @property
    def used_bytes(self) -> int:
        """Bytes that the tier's blocks take, seals included."""
        if self.pool is not None:
            return self.pool.used_bytes
        return self.presence.used_bytes if self.presence is not None else 0

    def figures(self) -> dict[str, int | str | None]:
        """The tier's figures for `stats()`."""
        return {
            "backend": self.backend,
            "capacity_bytes": self.capacity_bytes,
            "used_bytes": self.used_bytes,
            **asdict(self.counters),
        }


@dataclass(slots=True)
class _Model:
    groups: tuple[KVGroup, ...]
    rules: list[GroupRule]
    classes: dict[int, list[int]]  # tier number -> slot class of each group
    retired: bool = False

    @property
    def coverages(self) -> list[Coverage]:
        return [rule.coverage for rule in self.rules]


def _runs(positions: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Split ascending positions into [start, stop) ranges without gaps."""
    if not len(positions):
        return
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    for piece in np.split(positions, breaks):
        yield int(piece[0]), int(piece[-1]) + 1


class Planner:
    """See the module's docstring. `tiers[0]` is the host tier."""

    def __init__(self, tiers: Sequence[TierBook], index: Index) -> None:
        self.tiers = list(tiers)
        self.index = index
        self._host = tiers[HOST]
        self._lower = self.tiers[1:]
        self._by_column = {tier.column: tier.number for tier in tiers if tier.column is not None}
        self._models: dict[bytes, _Model] = {}
        self._fetches: set[FetchPlan] = set()
        self._incoming: set[tuple[bytes, int]] = set()  # (key, group) on its way from a lower tier to host memory
        self.refused_blocks = 0

    # ---------------------------------------------------------------- models

    def add_model(self, root: bytes, groups: Sequence[KVGroup]) -> None:
        """Make known a namespace and its slot classes. Raises LayoutError if a block fits in no tier."""
        classes = {t.number: [t.pool.slot_class(g.slot_bytes) for g in groups] for t in self.tiers if t.pool}
        rules = [GroupRule(g.coverage, c) for g, c in zip(groups, classes[HOST], strict=True)]
        self.index.add_namespace(root, rules)
        self._models[root] = _Model(tuple(groups), rules, classes)

    def retire(self, root: bytes) -> None:
        """End an epoch: nothing of it matches or commits any more; O(1)."""
        self._model(root).retired = True
        self.index.retire_namespace(root)

    def groups(self, root: bytes) -> tuple[KVGroup, ...]:
        """The KV groups of a registered namespace."""
        return self._model(root).groups

    def _model(self, root: bytes) -> _Model:
        model = self._models.get(root)
        if model is None or model.retired:
            raise UnknownNamespaceError("this namespace is not registered or was reset: call register() again")
        return model

    # ---------------------------------------------------------------- lookup

    def lookup(self, root: bytes, keys: Keys) -> tuple[int, int]:
        """Return (leading blocks that some tier holds, leading blocks in host memory). Changes nothing."""
        model = self._model(root)
        sources = self._locate(model, root, keys)[0]
        coverages = model.coverages
        return (
            covered_prefix(sources != NOWHERE, coverages),
            covered_prefix(sources == HOST, coverages),
        )

    def _locate(self, model: _Model, root: bytes, keys: Keys) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """Return the number of the fastest tier that holds each block, and its slot: (groups, n) arrays."""
        match = self.index.match(root, keys)
        known = match.tiers.shape[1]
        sources = np.full((len(model.groups), len(keys)), NOWHERE, np.int16)
        slots = np.full(sources.shape, NO_SLOT, np.int64)
        for column, number in self._by_column.items():
            sources[:, :known][match.tiers == column] = number
        slots[:, :known] = match.slots
        for tier in self._lower:
            if tier.presence is None:
                continue
            for group in range(len(model.groups)):
                open_ = np.flatnonzero((sources[group] == NOWHERE) | (sources[group] > tier.number))
                if len(open_) and len(tier.presence):
                    held = open_[tier.presence.held(keys[open_], group)]
                    sources[group, held] = tier.number
        return sources, slots

    # ---------------------------------------------------------------- fetch

    def begin_fetch(self, root: bytes, keys: Keys) -> FetchPlan:
        """Pin what host memory holds of the prefix, and plan reads for the rest into newly booked slots."""
        model = self._model(root)
        sources, slots = self._locate(model, root, keys)
        blocks = covered_prefix(sources != NOWHERE, model.coverages)
        keys, sources, slots = keys[:blocks], sources[:, :blocks].copy(), slots[:, :blocks]
        want = needed(model.coverages, blocks)
        nothing = np.full(want.shape, NO_SLOT, np.int64)
        plan = FetchPlan(root, keys, blocks, want, np.zeros_like(want), np.zeros_like(want), nothing, sources)
        self._touch(root, keys, len(model.groups))
        for group in range(len(model.groups)):
            here = np.flatnonzero(want[group] & (sources[group] == HOST))
            self._pin_host(plan, group, here, slots[group, here])
        for group in range(len(model.groups)):
            missing = np.flatnonzero(want[group] & (sources[group] > HOST))
            ids = [(keys[p].tobytes(), group) for p in missing]
            shared = np.fromiter((i in self._incoming for i in ids), np.bool_, len(ids))
            plan.awaited[group, missing[shared]] = True
            own = missing[~shared]
            host_slots = self._book(self._host, model.classes[HOST][group], len(own))
            own = own[: len(host_slots)]
            plan.awaited[group, own] = True
            self._incoming.update((keys[p].tobytes(), group) for p in own)
            for tier in self._lower:
                chosen = sources[group, own] == tier.number
                if chosen.any():
                    at = own[chosen]
                    plan.reads.append(
                        self._move(model, root, keys, tier, at, group, host_slots[chosen], slots[group, at])
                    )
                    self._hold(tier, root, keys, group, at)
        self._fetches.add(plan)
        return plan

    def finish_read(self, move: Move, outcome: npt.NDArray[np.uint8]) -> Deletion | None:
        """Commit what came back good, forget what was not there or corrupt; feed the fetches that wait.

        `outcome` holds an `Outcome` a block. Returns what a key-addressed tier should delete (corrupt copies).
        """
        tier, counters = self.tiers[move.tier], self.tiers[move.tier].counters
        good, corrupt = outcome == Outcome.GOOD, outcome == Outcome.CORRUPT
        gone = corrupt | (outcome == Outcome.MISSING)
        counters.bytes_read += int(move.slot_bytes[good | corrupt].sum())
        counters.corrupt_blocks += int(corrupt.sum())
        counters.missing_blocks += int((outcome == Outcome.MISSING).sum())
        counters.failed_blocks += int((outcome == Outcome.FAILED).sum())
        for key, group in zip(move.block_keys, move.groups, strict=True):
            self._incoming.discard((key.tobytes(), int(group)))
        self._release_source(tier, move)
        self._forget(tier, move.part(gone))
        self._commit(self._host, move.part(good), move.host_slots[good])
        self._host_pool.free(move.host_slots[~good])
        for fetch in self._fetches:
            self._feed(fetch, move)
        if tier.presence is None or not corrupt.any():
            return None
        bad = move.part(corrupt)
        tier.debris_bytes += bad.nbytes
        return Deletion(move.tier, bad.block_keys, bad.groups, bad.slot_bytes)

    def _feed(self, fetch: FetchPlan, move: Move) -> None:
        """Move a fetch's awaited blocks that this read has settled to pinned, or to nothing."""
        if fetch.root != move.root or not fetch.awaited.any():
            return
        for group in np.unique(move.groups):
            at = move.positions[(move.groups == group) & (move.positions < fetch.blocks)]
            at = at[fetch.awaited[group, at]]
            at = at[(fetch.keys[at] == move.keys[at]).all(axis=1)]
            fetch.awaited[group, at] = False
            if fetch.open and len(at):
                slots = self.index.residency(fetch.root, fetch.keys, HOST, int(group))[at]
                here = slots != NO_SLOT
                self._pin_host(fetch, int(group), at[here], slots[here])

    def ready(self, fetch: FetchPlan) -> int:
        """Leading blocks that are verified and pinned in host memory."""
        return covered_prefix(fetch.pinned, self._models[fetch.root].coverages)

    def close_fetch(self, fetch: FetchPlan) -> dict[int, int]:
        """Pin nothing more for it and count its hits; what is still on its way commits without a pin.

        Returns, by number of the tier, how many of the ready blocks came from there.
        """
        if not fetch.open:
            return {}
        fetch.open = False
        fetch.awaited[:] = False
        self._fetches.discard(fetch)
        ready = self.ready(fetch)
        served = np.where(fetch.pinned[:, :ready], fetch.sources[:, :ready], NOWHERE).max(axis=0, initial=NOWHERE)
        hits = {tier.number: int((served == tier.number).sum()) for tier in self.tiers}
        for tier in self.tiers:
            tier.counters.hit_blocks += hits[tier.number]
        return hits

    def release(self, fetch: FetchPlan) -> None:
        """Take back the fetch's pins. Safe to call twice."""
        self.close_fetch(fetch)
        self._unpin_host(fetch.root, fetch.keys, fetch.pinned)
        fetch.pinned[:] = False

    # ---------------------------------------------------------------- store

    def begin_store(self, root: bytes, keys: Keys, offered: npt.NDArray[np.bool_]) -> StorePlan:
        """Book host slots for the offered blocks that host memory does not hold.

        `offered`: (groups, n) bool. Where there is no room for all, the leading ones get it.
        """
        model = self._model(root)
        held = np.zeros(offered.shape, np.bool_)
        for group in range(len(model.groups)):
            held[group] = self.index.residency(root, keys, HOST, group) != NO_SLOT
            for start, stop in _runs(np.flatnonzero(held[group])):
                self.index.pin(root, keys, HOST, group, start, stop)
        positions, groups, slots, sizes, refused = [], [], [], [], 0
        for group, spec in enumerate(model.groups):
            at = np.flatnonzero(offered[group] & ~held[group])
            booked = self._book(self._host, model.classes[HOST][group], len(at))
            refused += len(at) - len(booked)
            positions.append(at[: len(booked)])
            groups.append(np.full(len(booked), group, np.uint8))
            slots.append(booked)
            sizes.append(np.full(len(booked), spec.block_bytes, np.int64))
        self.refused_blocks += refused
        return StorePlan(
            root,
            keys,
            np.concatenate(positions),
            np.concatenate(groups),
            np.concatenate(slots),
            np.concatenate(sizes),
            held,
            refused,
        )

    def commit_store(self, plan: StorePlan) -> list[Move]:
        """Make the stored blocks visible; return the writes that bring the lower tiers up to date."""
        model = self._models[plan.root]
        stored = self._move(model, plan.root, plan.keys, self._host, plan.positions, plan.groups, plan.slots, None)
        self._commit(self._host, stored, plan.slots)
        writes = [] if model.retired else self._write_through(model, plan)
        self._unpin_host(plan.root, plan.keys, plan.kept)
        return writes

    def abort_store(self, plan: StorePlan) -> None:
        """Give back what the store had booked; nothing becomes visible."""
        self._host_pool.free(plan.slots)
        self._unpin_host(plan.root, plan.keys, plan.kept)

    def _write_through(self, model: _Model, plan: StorePlan) -> list[Move]:
        """Plan, for each lower tier, writes of all that host memory holds of the path and the tier lacks.

        Looking at the whole path, not only at what was just stored, repairs what an earlier full queue dropped.
        """
        writes: list[Move] = []
        if not self._lower:
            return writes
        root, keys = plan.root, plan.keys
        sources, slots = self._locate(model, root, keys)
        for group, rule in enumerate(model.rules):
            here = np.flatnonzero(sources[group] == HOST)
            holes = np.flatnonzero(sources[group] == NOWHERE)
            if rule.coverage.kind == "all" and len(holes):
                here = here[here < holes[0]]
            for tier in self._lower:
                at = here[~self._tier_holds(tier, root, keys, group, here)]
                ids = [(keys[p].tobytes(), group) for p in at]
                fresh = np.fromiter((i not in tier.queued for i in ids), np.bool_, len(ids))
                at = at[fresh]
                if not len(at):
                    continue
                tier.queued.update(ids)
                for start, stop in _runs(at):
                    self.index.pin(root, keys, HOST, group, start, stop)
                writes.append(self._move(model, root, keys, tier, at, group, slots[group, at], None))
        return writes

    def _tier_holds(
        self, tier: TierBook, root: bytes, keys: Keys, group: int, at: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        if tier.presence is not None:
            return tier.presence.held(keys[at], group)
        assert tier.column is not None
        slots = self.index.residency(root, keys, tier.column, group)[at]
        return np.not_equal(slots, NO_SLOT)

    # ---------------------------------------------------------------- writes to lower tiers

    def start_write(self, move: Move) -> tuple[Move | None, Deletion | None]:
        """Make room in the tier for a queued write.

        Returns the write to carry out (None: it does not fit and was dropped), and what to delete before it.
        """
        tier = self.tiers[move.tier]
        move.generation = tier.generation
        if tier.presence is not None:
            if tier.presence.capacity_bytes is None:
                return move, None
            planned = tier.reserved_bytes + move.nbytes
            keys, groups, lengths = tier.presence.evict_for(planned + tier.debris_bytes)
            deletion = Deletion(tier.number, keys, groups, lengths) if len(groups) else None
            if tier.presence.used_bytes + tier.debris_bytes + planned > tier.presence.capacity_bytes:
                self.drop_write(move)
                return None, deletion
            tier.reserved_bytes = planned
            return move, deletion
        classes = self._models[move.root].classes[tier.number]
        booked = []
        for group in np.unique(move.groups):  # ascending, as the groups of a move are
            wanted = int((move.groups == group).sum())
            got = self._book(tier, classes[int(group)], wanted)
            booked.append(np.concatenate([got, np.full(wanted - len(got), NO_SLOT, np.int64)]))
        move.tier_slots = np.concatenate(booked)
        fits = move.tier_slots != NO_SLOT
        if not fits.all():
            self.drop_write(move.part(~fits))
            move = move.part(fits)
        return (move if len(move) else None), None

    def finish_write(self, move: Move, ok: npt.NDArray[np.bool_]) -> None:
        """Commit in the tier what was written, give back the rest, release host memory."""
        tier, counters = self.tiers[move.tier], self.tiers[move.tier].counters
        done = move.part(ok)
        counters.bytes_written += done.nbytes
        counters.failed_blocks += int((~ok).sum())
        if tier.presence is not None:
            if tier.presence.capacity_bytes is not None:
                tier.reserved_bytes -= move.nbytes
            tier.presence.add(done.block_keys, done.groups, done.slot_bytes)
            counters.stored_blocks += len(done)
        elif move.generation != tier.generation:
            pass  # the medium is gone, and with it the slots
        elif tier.pool is not None and move.tier_slots is not None:
            self._commit(tier, done, move.tier_slots[ok])
            tier.pool.free(move.tier_slots[~ok])
        self._end_write(move)

    def drop_write(self, move: Move) -> None:
        """Give up a write that was not started; the caller drops its descendants too."""
        self.tiers[move.tier].counters.dropped_blocks += len(move)
        self._end_write(move)

    def _end_write(self, move: Move) -> None:
        queued = self.tiers[move.tier].queued
        for key, group in zip(move.block_keys, move.groups, strict=True):
            queued.discard((key.tobytes(), int(group)))
        self._each_run(move, lambda group, a, b: self.index.unpin(move.root, move.keys, HOST, group, a, b))

    # ---------------------------------------------------------------- deletions and listings

    def finish_deletion(self, deletion: Deletion, ok: npt.NDArray[np.bool_]) -> None:
        """What could not be deleted still takes its room: back into the record, and tried again later."""
        tier = self.tiers[deletion.tier]
        tier.counters.evicted_blocks += int(ok.sum())
        if tier.presence is not None and not ok.all():
            tier.presence.add(deletion.keys[~ok], deletion.groups[~ok], deletion.lengths[~ok])

    def finish_removal(self, deletion: Deletion, ok: npt.NDArray[np.bool_]) -> None:
        """Corrupt copies were deleted; one that could not be takes room until the tier is listed again."""
        tier = self.tiers[deletion.tier]
        tier.debris_bytes = max(0, tier.debris_bytes - int(deletion.lengths[ok].sum()))

    def begin_listing(self, number: int) -> None:
        """A tier is about to say all that it holds, corrupt copies that could not be deleted included."""
        self.tiers[number].debris_bytes = 0

    def add_listing(
        self, number: int, keys: Keys, groups: npt.NDArray[np.uint8], lengths: npt.NDArray[np.int64]
    ) -> Deletion | None:
        """Record what a key-addressed tier already held at start; return what exceeds its capacity."""
        presence = self.tiers[number].presence
        if presence is None:
            return None
        presence.add(keys[::-1], groups[::-1], lengths[::-1])  # a listing gives the oldest first
        over_keys, over_groups, over_lengths = presence.overflow()
        return Deletion(number, over_keys, over_groups, over_lengths) if len(over_groups) else None

    def lose_tier(self, number: int) -> None:
        """A tier that is not persistent has lost its medium: forget all that it held."""
        tier = self.tiers[number]
        tier.generation += 1
        if tier.presence is not None:
            tier.presence.clear()
        elif tier.pool is not None and tier.column is not None:
            self.index.drop_tier(tier.column)
            tier.pool.clear()

    # ---------------------------------------------------------------- helpers

    @property
    def _host_pool(self) -> SlotPool:
        assert self._host.pool is not None
        return self._host.pool

    def _book(self, tier: TierBook, slot_class: int, count: int) -> npt.NDArray[np.int64]:
        """Allocate up to `count` slots, evicting as needed; fewer when pins leave no room."""
        pool = tier.pool
        assert pool is not None
        assert tier.column is not None
        while count:
            short = count - pool.available(slot_class)
            if short <= 0:
                break
            evicted = self.index.evict(tier.column, short, slot_class)
            if evicted is not None:
                pool.free(evicted.slots)
                tier.counters.evicted_blocks += len(evicted.slots)
                break
            count -= (short + 1) // 2
        slots = pool.allocate(slot_class, count) if count else None
        return np.zeros(0, np.int64) if slots is None else slots

    def _move(
        self,
        model: _Model,
        root: bytes,
        keys: Keys,
        tier: TierBook,
        positions: npt.NDArray[np.int64],
        group: int | npt.NDArray[np.uint8],
        host_slots: npt.NDArray[np.int64],
        tier_slots: npt.NDArray[np.int64] | None,
    ) -> Move:
        groups = np.full(len(positions), group, np.uint8) if isinstance(group, int) else group
        payload = np.array([g.block_bytes for g in model.groups], np.int64)[groups]
        total = np.array([g.slot_bytes for g in model.groups], np.int64)[groups]
        addressed = tier_slots if tier.addressing == "slot" else None
        return Move(root, keys, tier.number, positions, groups, host_slots, addressed, payload, total, tier.generation)

    def _commit(self, tier: TierBook, move: Move, slots: npt.NDArray[np.int64]) -> None:
        """Insert copies into a slot-addressed tier's column; duplicates and old epochs give their slots back."""
        assert tier.pool is not None
        assert tier.column is not None
        if not len(move):
            return
        if self._models[move.root].retired:
            tier.pool.free(slots)
            return
        for group in np.unique(move.groups):
            chosen = move.groups == group
            at, mine = move.positions[chosen], slots[chosen]
            spread = np.full(int(at.max()) + 1, NO_SLOT, np.int64)
            spread[at] = mine
            taken = self.index.insert(move.root, move.keys[: len(spread)], tier.column, int(group), spread)[at]
            tier.pool.free(mine[~taken])
            tier.counters.stored_blocks += int(taken.sum())

    def _touch(self, root: bytes, keys: Keys, groups: int) -> None:
        self.index.touch(root, keys)
        for tier in self._lower:
            if tier.presence is not None and len(tier.presence):
                for group in range(groups):
                    tier.presence.touch(keys, group)

    @staticmethod
    def _each_run(move: Move, act: Callable[[int, int, int], None]) -> None:
        for group in np.unique(move.groups):
            for start, stop in _runs(move.positions[move.groups == group]):
                act(int(group), start, stop)

    def _hold(self, tier: TierBook, root: bytes, keys: Keys, group: int, at: npt.NDArray[np.int64]) -> None:
        """Keep a lower tier's copies while they are read."""
        if tier.presence is not None:
            tier.presence.pin(keys[at], np.full(len(at), group, np.uint8))
        elif tier.column is not None:
            for start, stop in _runs(at):
                self.index.pin(root, keys, tier.column, group, start, stop)

    def _release_source(self, tier: TierBook, move: Move) -> None:
        if move.generation != tier.generation:
            return
        if tier.presence is not None:
            tier.presence.unpin(move.block_keys, move.groups)
        elif tier.column is not None:
            column = tier.column
            self._each_run(move, lambda g, a, b: self.index.unpin(move.root, move.keys, column, g, a, b))

    def _forget(self, tier: TierBook, move: Move) -> None:
        """Drop a lower tier's copies that were missing or corrupt."""
        if move.generation != tier.generation:
            return
        if tier.presence is not None:
            tier.presence.discard(move.block_keys, move.groups)
            return
        pool, column = tier.pool, tier.column
        assert pool is not None
        assert column is not None

        def drop(group: int, start: int, stop: int) -> None:
            slots = self.index.remove(move.root, move.keys, column, group, start, stop)
            pool.free(slots[slots != NO_SLOT])

        self._each_run(move, drop)

    def _pin_host(self, fetch: FetchPlan, group: int, at: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]) -> None:
        for start, stop in _runs(at):
            self.index.pin(fetch.root, fetch.keys, HOST, group, start, stop)
        fetch.pinned[group, at] = True
        fetch.slots[group, at] = slots

    def _unpin_host(self, root: bytes, keys: Keys, pinned: npt.NDArray[np.bool_]) -> None:
        for group in range(len(pinned)):
            for start, stop in _runs(np.flatnonzero(pinned[group])):
                self.index.unpin(root, keys, HOST, group, start, stop)
