"""What a lookup finds, what a fetch brings up and what a store takes in: decisions, no thread, no I/O, no bytes.

Each method is one atomic step: it decides, books slots and pins (`ledger.py`), and returns plans (`plans.py`) that
the scheduler carries out and reports back. So a simulation is this class with every plan succeeding at once
(`simulate.py`). What sinks to lower tiers is decided in `write_through.py`, here under the name `down`.

It does not own queues, processes or copies (`scheduler.py`). The caller serialises all calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flexkv_core._native import BlockSet
from flexkv_core.changes import Watcher
from flexkv_core.hints import Hints
from flexkv_core.index import NO_SLOT, Index, Keys
from flexkv_core.index.coverage import covered_prefix, needed
from flexkv_core.layout import KVGroup
from flexkv_core.ledger import NOWHERE, Clock, Ledger, Model, Positions, distinct, monotonic_microseconds
from flexkv_core.pins import PinBudget, pin_costs
from flexkv_core.plans import HOST, Deletion, FetchPlan, Move, Outcome, StorePlan
from flexkv_core.recovery import Recovery
from flexkv_core.tier_book import TierBook
from flexkv_core.write_through import WriteThrough


class Planner:
    """See the module's docstring.

    Args:
        tiers: books of the stack's tiers; `tiers[0]` is the host tier.
        index: with a column for each slot-addressed tier.
        clock: microseconds, for policies that count in seconds.
        pin_budget_bytes: what all fetches together may keep pinned in host memory; None: no bound.

    Attributes:
        down: what sinks to the lower tiers. recovery: what survived in them. hints: what probes ask and tell.
        refused_blocks: of stores, for want of room.
        asked_blocks: that fetches asked for, and miss_blocks, of these, that they did not get; prefetches do not count.
        truncated_fetches: prefixes that were cut to the budget of pins.
    """

    def __init__(
        self,
        tiers: Sequence[TierBook],
        index: Index,
        clock: Clock = monotonic_microseconds,
        pin_budget_bytes: int | None = None,
    ) -> None:
        self._ledger = Ledger(tiers, index, clock)
        self._pins = PinBudget(pin_budget_bytes)
        self.index = index
        self.tiers = self._ledger.tiers
        self.down = WriteThrough(self._ledger)
        self.recovery = Recovery(self._ledger)
        self.hints = Hints(self._ledger)
        self.refused_blocks = 0
        self.asked_blocks = self.miss_blocks = 0
        self.truncated_fetches = 0
        self._fetches: set[FetchPlan] = set()
        self._incoming = BlockSet()  # on their way from a lower tier to host memory

    # ---------------------------------------------------------------- models

    def add_model(self, root: bytes, groups: Sequence[KVGroup]) -> None:
        """Make known a namespace and its slot classes. Raises LayoutError if a block does not fit in some tier."""
        self._ledger.add_model(root, groups)
        self.recovery.claim(root)

    def retire(self, root: bytes) -> None:
        """End an epoch: nothing of it matches or commits any more; O(1)."""
        self._ledger.retire(root)

    def leave(self, root: bytes) -> None:
        """Nobody uses a namespace any more: forgotten when nothing of it is left, unless it is added again before."""
        self._ledger.leave(root)

    def is_live(self, root: bytes, epoch: int | None = None) -> bool:
        """Whether a namespace is in use, and was not reset since `epoch`."""
        return self._ledger.live(root, epoch) is not None

    def groups(self, root: bytes) -> tuple[KVGroup, ...]:
        """The KV groups of a registered namespace."""
        return self._ledger.model(root).groups

    @property
    def pinned_bytes(self) -> int:
        """What fetches keep pinned in host memory, seals included; a block that several have pinned counts once."""
        return self._pins.used

    @property
    def namespaces(self) -> int:
        """How many are known: in use, or reset or left with copies that have not been evicted yet."""
        return len(self._ledger.models)

    def watch(self, watcher: Watcher) -> None:
        """Tell it which copies come and go, from now on, of the tiers whose books are exact."""
        self._ledger.changes.add(watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """Tell it no more. Safe to call twice."""
        self._ledger.changes.remove(watcher)

    def tell_held(self, root: bytes, keys: Keys, first: int, watcher: Watcher) -> None:
        """Tell it which blocks of a path are held, from position `first` on."""
        self._ledger.held(root, keys, first, watcher)

    def lose_tier(self, number: int) -> None:
        """A tier that is not persistent has lost its medium: forget all that it held."""
        self._ledger.lose_tier(number)

    # ---------------------------------------------------------------- lookup

    def lookup(self, root: bytes, keys: Keys) -> tuple[int, int]:
        """Return (leading blocks that some tier can give, leading blocks in host memory). Changes nothing."""
        model = self._ledger.model(root)
        sources = self._ledger.reachable(model, root, keys)[0]
        coverages = model.coverages
        return (
            covered_prefix(sources != NOWHERE, coverages),
            covered_prefix(sources == HOST, coverages),
        )

    # ---------------------------------------------------------------- fetch

    def begin_fetch(self, root: bytes, keys: Keys, avoid: Sequence[int] = ()) -> FetchPlan:
        """Pin what host memory holds of the prefix, and plan reads for the rest into newly booked slots.

        `avoid`: tiers that are not to be read: the prefix ends before the first block that only they have.
        """
        model = self._ledger.model(root)
        model.plans += 1
        asked = len(keys)
        sources, slots = self._ledger.reachable(model, root, keys)
        held = wanted = covered_prefix(sources != NOWHERE, model.coverages)
        found = _runs(sources[:, :held], needed(model.coverages, held)) if (sources[:, :held] > HOST).any() else []
        if avoid:
            wanted = covered_prefix((sources != NOWHERE) & ~np.isin(sources, avoid), model.coverages)
        blocks = self._within_budget(model, keys, sources[:, :wanted], slots[:, :wanted])
        self.truncated_fetches += blocks < wanted
        keys, sources, slots = keys[:blocks], sources[:, :blocks].copy(), slots[:, :blocks]
        want = needed(model.coverages, blocks)
        plan = FetchPlan(
            root,
            keys,
            model.epoch,
            model.coverages,
            tuple(group.slot_bytes for group in model.groups),
            blocks,
            want,
            np.zeros_like(want),
            np.zeros_like(want),
            np.full(want.shape, NO_SLOT, np.int64),
            sources,
            truncated=blocks < held,
            asked=asked,
            found=found,
        )
        self._ledger.touch(model, root, keys)
        for group in range(len(model.groups)):
            here = np.flatnonzero(want[group] & (sources[group] == HOST))
            self._pin(plan, group, here, slots[group, here])
        for group in range(len(model.groups)):
            self._plan_reads(plan, model, group, slots[group])
        self._fetches.add(plan)
        return plan

    def _within_budget(self, model: Model, keys: Keys, sources: npt.NDArray[np.int16], slots: Positions) -> int:
        """How many blocks of a held prefix can be pinned within the budget; (groups, n) arrays of what is where.

        What others have pinned, or is on its way already, costs nothing.
        """
        blocks = int(sources.shape[1])
        if self._pins.budget is None or not blocks:
            return blocks
        if blocks * sum(group.slot_bytes for group in model.groups) <= self._pins.left:
            return blocks
        sizes = np.array([group.slot_bytes for group in model.groups], np.int64)
        new = sizes[:, None] * ~((sources == HOST) & self._pins.counted(slots))
        cost = pin_costs(new, model.coverages)
        if self._pins.coming and cost[blocks] > self._pins.left:
            for group in range(len(new)):
                at = np.flatnonzero((sources[group] > HOST) & (new[group] > 0))
                new[group, at[self._incoming.contains(keys[at], group)]] = 0
            cost = pin_costs(new, model.coverages)
        while blocks and cost[blocks] > self._pins.left:
            blocks = min(blocks - 1, int(np.flatnonzero(cost[:blocks] <= self._pins.left)[-1]))
            blocks = covered_prefix(np.not_equal(sources[:, :blocks], NOWHERE), model.coverages)
        return blocks

    def _plan_reads(self, plan: FetchPlan, model: Model, group: int, slots: Positions) -> None:
        """Plan the reads of one group; `slots`: where the lower tiers have the blocks. Some may be on their way."""
        ledger, keys, sources = self._ledger, plan.keys, plan.sources[group]
        missing = np.flatnonzero(plan.needed[group] & (sources > HOST))
        shared = self._incoming.contains(keys[missing], group)
        plan.awaited[group, missing[shared]] = True
        own = missing[~shared]
        host_slots = ledger.book(ledger.host, model, group, len(own))
        own = own[: len(host_slots)]
        plan.awaited[group, own] = True
        self._incoming.add_new(keys[own], group)
        self._pins.coming += len(own) * plan.slot_sizes[group]
        for tier in ledger.lower:
            chosen = sources[own] == tier.number
            if chosen.any():
                at = own[chosen]
                plan.reads.append(ledger.move(model, plan.root, keys, tier, at, group, host_slots[chosen], slots[at]))
                ledger.hold(tier, plan.root, keys, group, at)

    def unwanted(self, move: Move) -> npt.NDArray[np.bool_]:
        """Which blocks of a read that has not been started no fetch waits for: (len(move),) bool."""
        wanted = np.zeros(len(move), np.bool_)
        for fetch in self._fetches:
            if fetch.root == move.root:
                wanted |= self.awaits(fetch, move)
        return ~wanted

    @staticmethod
    def awaits(fetch: FetchPlan, move: Move) -> npt.NDArray[np.bool_]:
        """Which blocks of a move of the fetch's namespace it waits for: (len(move),) bool."""
        within = move.positions < fetch.blocks
        at, groups = move.positions[within], move.groups[within]
        found = np.zeros(len(move), np.bool_)
        found[within] = fetch.awaited[groups, at] & (fetch.keys[at] == move.keys[at]).all(axis=1)
        return found

    def drop_read(self, move: Move) -> None:
        """Give up a read that was not started and that nobody waits for."""
        self._arrived(move)
        self._ledger.let_go(self.tiers[move.tier], move)
        self._ledger.host_pool.free(move.host_slots)

    def _arrived(self, move: Move) -> None:
        """A read has ended, or will not begin."""
        self._incoming.discard(move.block_keys, move.groups)
        self._pins.coming -= move.nbytes

    def finish_read(self, move: Move, outcome: npt.NDArray[np.uint8]) -> Deletion | None:
        """Commit what came back good, forget what was not there, corrupt or given up; feed the fetches that wait.

        `outcome` holds an `Outcome` a block. Returns what a key-addressed tier should delete: corrupt copies, and
        those that were given up if its capacity is ours.
        """
        ledger, tier = self._ledger, self.tiers[move.tier]
        counters = tier.counters
        good, corrupt = outcome == Outcome.GOOD.value, outcome == Outcome.CORRUPT.value
        failed = outcome == Outcome.FAILED.value
        given_up = tier.failures.note(move.block_keys, move.groups, good, failed)
        gone = corrupt | given_up | (outcome == Outcome.MISSING.value)
        counters.bytes_read += move.part(good | corrupt).nbytes
        self._arrived(move)
        ledger.let_go(tier, move)
        if not good.all():
            counters.corrupt_blocks += int(corrupt.sum())
            counters.missing_blocks += int((outcome == Outcome.MISSING.value).sum())
            counters.failed_blocks += int((failed | (outcome == Outcome.UNREAD.value)).sum())
            counters.given_up_blocks += int(given_up.sum())
            ledger.forget(tier, move.part(gone))
        ledger.commit(ledger.host, move.part(good), move.host_slots[good])
        if not good.all():
            ledger.host_pool.free(move.host_slots[~good])
        for fetch in self._fetches:
            self._feed(fetch, move)
        if tier.presence is None or move.generation != tier.generation:
            return None
        bad = move.part(corrupt | given_up if tier.presence.capacity_bytes is not None else corrupt)
        if not len(bad):
            return None
        tier.debris_bytes += bad.nbytes
        return Deletion(move.tier, bad.block_keys, bad.groups, bad.slot_bytes)

    def _feed(self, fetch: FetchPlan, move: Move) -> None:
        """Move a fetch's awaited blocks that this read has settled to pinned, or to nothing."""
        if fetch.root != move.root or not fetch.awaited.any():
            return
        waited = self.awaits(fetch, move)
        for group in distinct(move.groups[waited]):
            at = move.positions[waited & (move.groups == group)]
            fetch.awaited[group, at] = False
            if fetch.open:
                slots = self._ledger.host_slots(fetch.root, fetch.keys, int(group))[at]
                here = slots != NO_SLOT
                self._pin(fetch, int(group), at[here], slots[here])

    def _pin(self, fetch: FetchPlan, group: int, at: Positions, slots: Positions) -> None:
        self._ledger.pin_host(fetch.root, fetch.keys, group, at)
        fetch.pinned[group, at] = True
        fetch.slots[group, at] = slots
        self._pins.add(slots, fetch.slot_sizes[group])

    def ready(self, fetch: FetchPlan) -> int:
        """Leading blocks that are verified and pinned in host memory."""
        return covered_prefix(fetch.pinned, fetch.coverages)

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
        hits = {tier.number: int(np.count_nonzero(served == tier.number)) for tier in self.tiers}
        if fetch.counted:
            self._count(fetch.asked, ready, hits)
        self._ledger.end_plan(fetch.root, fetch.epoch)
        return hits

    def _count(self, asked: int, ready: int, hits: dict[int, int]) -> None:
        """Count hits and misses; what no KV group needs of the ready blocks, before a window or a state, is neither."""
        self.asked_blocks += asked
        self.miss_blocks += asked - ready
        passed = asked - ready + sum(hits.values())
        for tier in self.tiers:
            passed -= hits[tier.number]
            tier.counters.hit_blocks += hits[tier.number]
            tier.counters.miss_blocks += passed

    def sink_hits(self, fetch: FetchPlan) -> list[Move]:
        """The blocks of a fetch that was closed were used: return the writes to lower tiers that admit them for it.

        To be called once, before `release`.
        """
        model = self._ledger.live(fetch.root, fetch.epoch)
        ready = self.ready(fetch) if fetch.counted else 0
        if model is None or not ready:
            return []
        return self.down.plan_hits(model, fetch.root, fetch.keys[:ready], fetch.pinned[:, :ready])

    def release(self, fetch: FetchPlan) -> None:
        """Take back the fetch's pins. Safe to call twice."""
        self.close_fetch(fetch)
        self._ledger.unpin_host(fetch.root, fetch.keys, fetch.pinned)
        for group, pinned in enumerate(fetch.pinned):
            self._pins.take(fetch.slots[group, pinned], fetch.slot_sizes[group])
        fetch.pinned[:] = False

    # ---------------------------------------------------------------- store

    def begin_store(self, root: bytes, keys: Keys, offered: npt.NDArray[np.bool_]) -> StorePlan:
        """Book host slots for the offered blocks that host memory does not hold.

        `offered`: (groups, n) bool. Where there is no room for all, the leading ones get it.
        """
        ledger = self._ledger
        model = ledger.model(root)
        model.plans += 1
        held = np.zeros(offered.shape, np.bool_)
        for group in range(len(model.groups)):
            held[group] = ledger.holds(ledger.host, root, keys, group)
            ledger.pin_host(root, keys, group, np.flatnonzero(held[group]))
        positions, groups, slots, sizes, refused = [], [], [], [], 0
        for group, spec in enumerate(model.groups):
            at = np.flatnonzero(offered[group] & ~held[group])
            booked = ledger.book(ledger.host, model, group, len(at))
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
            model.epoch,
        )

    def commit_store(self, plan: StorePlan) -> list[Move]:
        """Make the stored blocks visible; return the writes that bring the lower tiers up to date."""
        ledger = self._ledger
        model = ledger.live(plan.root, plan.epoch)
        if model is None:  # reset since
            self.abort_store(plan)
            return []
        stored = ledger.move(model, plan.root, plan.keys, ledger.host, plan.positions, plan.groups, plan.slots, None)
        new = ledger.commit(ledger.host, stored, plan.slots)
        touched = np.zeros_like(plan.kept)
        touched[plan.groups[new], plan.positions[new]] = True
        writes = self.down.plan(model, plan.root, plan.keys, touched)
        ledger.unpin_host(plan.root, plan.keys, plan.kept)
        ledger.end_plan(plan.root, plan.epoch)
        return writes

    def abort_store(self, plan: StorePlan) -> None:
        """Give back what the store had booked; nothing becomes visible."""
        self._ledger.host_pool.free(plan.slots)
        self._ledger.unpin_host(plan.root, plan.keys, plan.kept)
        self._ledger.end_plan(plan.root, plan.epoch)


def _runs(sources: npt.NDArray[np.int16], needed: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(tier, blocks) along a path; (groups, n) arrays: where blocks are, which are needed at all."""
    slowest = np.where(needed, sources, HOST).max(axis=0, initial=HOST)
    ends = np.append(np.flatnonzero(np.diff(slowest)) + 1, len(slowest))
    return list(zip(slowest[ends - 1].tolist(), np.diff(ends, prepend=0).tolist(), strict=True))
