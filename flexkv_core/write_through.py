"""What sinks to the lower tiers: which blocks are written down, room for them, deletions and listings.

Owns the decisions about a lower tier's content. Does not own queues or calls of backends (`scheduler.py`), nor what
comes up again (`planner.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flexkv_core.index import NO_SLOT, Keys
from flexkv_core.ledger import NOWHERE, Ledger, Mask, Model, distinct, mask_of
from flexkv_core.plans import HOST, Deletion, Move
from flexkv_core.policies.admission import GuardedAdmission
from flexkv_core.tier_book import TierBook


class WriteThrough:
    """See the module's docstring. Shares the planner's ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._tiers = ledger.tiers

    # ---------------------------------------------------------------- what to write

    def plan(self, model: Model, root: bytes, keys: Keys, stored: Mask) -> list[Move]:
        """Plan, for each lower tier, writes of all that host memory holds of the path and the tier lacks and admits.

        Looking at the whole path, not only at what was just stored, repairs what an earlier full queue dropped. But an
        admission is asked about the latter only, (groups, n) bool: the stores of one growing request offer the same
        blocks again and again, and that says nothing of their use.
        """
        return self._plan(model, root, keys, self._ledger.lower, stored)

    def plan_hits(self, model: Model, root: bytes, keys: Keys, hits: Mask) -> list[Move]:
        """The same for blocks that a fetch has found, (groups, n) bool: what the tiers with an admission take now."""
        return self._plan(model, root, keys, [tier for tier in self._ledger.lower if tier.admission], hits)

    def _plan(self, model: Model, root: bytes, keys: Keys, tiers: Sequence[TierBook], touched: Mask) -> list[Move]:
        writes: list[Move] = []
        if not tiers:
            return writes
        sources, slots = self._ledger.locate(model, root, keys)
        here = sources == HOST
        for group, coverage in enumerate(model.coverages):
            holes = np.flatnonzero(sources[group] == NOWHERE)
            if coverage.kind == "all" and len(holes):
                here[group, holes[0] :] = False
        for tier in tiers:
            held = np.empty_like(here)
            for group in range(len(here)):
                held[group] = self._ledger.holds(tier, root, keys, group)
            lacking = here & ~held
            offered = lacking.copy()
            for group in range(len(here) if len(tier.queued) else 0):
                at = np.flatnonzero(offered[group])
                offered[group, at] = ~tier.queued.contains(keys[at], group)
            taken = offered
            if tier.admission is not None:
                there = held | (lacking & ~offered)
                taken = self._admitted(model, tier, tier.admission, keys, offered & touched, there)
            for group in range(len(here)):
                at = np.flatnonzero(taken[group])
                if len(at):
                    tier.queued.add_new(keys[at], group)
                    self._ledger.pin_host(root, keys, group, at)
                    writes.append(self._ledger.move(model, root, keys, tier, at, group, slots[group, at], None))
        return writes

    @staticmethod
    def _admitted(
        model: Model, tier: TierBook, admission: GuardedAdmission, keys: Keys, offered: Mask, there: Mask
    ) -> Mask:
        """Which of the offered blocks the tier takes: those that it admits and whose ancestors are there or come too.

        `offered` and `there` (held or queued) are (groups, n) bool.
        """
        taken = offered.copy()
        for group in range(len(offered)):
            at = np.flatnonzero(offered[group])
            if len(at):
                taken[group, at] = admission.admit(keys[at], group)
        for group, coverage in enumerate(model.coverages):
            if coverage.kind == "all":
                missing = np.flatnonzero(~(there[group] | taken[group]))
                taken[:, missing[0] if len(missing) else len(keys) :] = False
        tier.counters.rejected_blocks += int(offered.sum() - taken.sum())
        return taken

    # ---------------------------------------------------------------- writes

    def start_write(self, move: Move) -> tuple[Move | None, Deletion | None]:
        """Make room in the tier for a queued write.

        Returns the write to carry out (None: it does not fit and was dropped), and what to delete before it.
        """
        tier = self._tiers[move.tier]
        move.generation = tier.generation
        if self._ledger.live(move.root, move.epoch) is None:  # reset since: nobody will read it
            self.drop_write(move)
            return None, None
        if tier.presence is not None:
            if tier.presence.capacity_bytes is None:
                return move, None
            planned = tier.reserved_bytes + move.nbytes
            keys, groups, lengths = tier.presence.evict_for(tier.bytes_to_free(planned))
            self._ledger.changes.dropped(tier.number, None, keys, groups)
            fits = tier.presence.used_bytes + tier.debris_bytes + planned <= tier.presence.capacity_bytes
            excess = max(0, int(lengths.sum()) - move.nbytes * fits)
            deletion = Deletion(tier.number, keys, groups, lengths, excess) if len(groups) else None
            tier.debris_bytes += excess
            if not fits:
                self.drop_write(move)
                return None, deletion
            tier.reserved_bytes = planned
            return move, deletion
        model = self._ledger.models[move.root]  # known as long as the source is pinned in host memory
        booked = []
        for group in distinct(move.groups):
            wanted = len(move.groups[mask_of(move.groups, group)])
            got = self._ledger.book(tier, model, group, wanted)
            booked.append(np.concatenate([got, np.full(wanted - len(got), NO_SLOT, np.int64)]))
        move.tier_slots = np.concatenate(booked)
        fits = move.tier_slots != NO_SLOT
        if not fits.all():
            self.drop_write(move.part(~fits))
            move = move.part(fits)
        return (move if len(move) else None), None

    def finish_write(self, move: Move, ok: npt.NDArray[np.bool_]) -> None:
        """Commit in the tier what was written, give back the rest, release host memory."""
        tier, counters = self._tiers[move.tier], self._tiers[move.tier].counters
        done = move.part(ok)
        counters.bytes_written += done.nbytes
        counters.failed_blocks += len(move) - len(done)
        if tier.presence is not None:
            if tier.presence.capacity_bytes is not None:
                tier.reserved_bytes -= move.nbytes
            tier.presence.add(done.block_keys, done.groups, done.slot_bytes)
            if tier.exact and self._ledger.changes.watched:
                self._ledger.changes.committed(tier.number, move.root, done.block_keys, done.groups)
            counters.stored_blocks += len(done)
        elif move.generation != tier.generation:
            pass  # the medium is gone, and with it the slots
        elif tier.pool is not None and move.tier_slots is not None:
            self._ledger.commit(tier, done, move.tier_slots[ok])
            tier.pool.free(move.tier_slots[~ok])
        self._end_write(move)

    def drop_write(self, move: Move) -> None:
        """Give up a write that was not started; the caller drops its descendants too."""
        self._tiers[move.tier].counters.dropped_blocks += len(move)
        self._end_write(move)

    def _end_write(self, move: Move) -> None:
        self._tiers[move.tier].queued.discard(move.block_keys, move.groups)
        self._ledger.unpin_move(move)

    # ---------------------------------------------------------------- deletions and listings

    def finish_deletion(self, deletion: Deletion, ok: npt.NDArray[np.bool_]) -> None:
        """What could not be deleted still takes its room: back into the record, and tried again later."""
        tier = self._tiers[deletion.tier]
        tier.counters.evicted_blocks += int(ok.sum())
        tier.debris_bytes = max(0, tier.debris_bytes - deletion.excess)
        if tier.presence is not None and not ok.all():
            tier.presence.add(deletion.keys[~ok], deletion.groups[~ok], deletion.lengths[~ok])
            self._ledger.changes.committed(tier.number, None, deletion.keys[~ok], deletion.groups[~ok])

    def finish_removal(self, deletion: Deletion, ok: npt.NDArray[np.bool_]) -> None:
        """Corrupt copies were deleted; one that could not be takes room until the tier is listed again."""
        tier = self._tiers[deletion.tier]
        tier.debris_bytes = max(0, tier.debris_bytes - int(deletion.lengths[ok].sum()))

    def begin_listing(self, number: int) -> None:
        """A tier is about to say all that it holds, corrupt copies that could not be deleted included."""
        self._tiers[number].debris_bytes = 0

    def add_listing(
        self, number: int, keys: Keys, groups: npt.NDArray[np.uint8], lengths: npt.NDArray[np.int64]
    ) -> Deletion | None:
        """Record what a key-addressed tier already held at start; return what exceeds its capacity."""
        presence = self._tiers[number].presence
        if presence is None:
            return None
        presence.add(keys[::-1], groups[::-1], lengths[::-1])  # a listing gives the oldest first
        over_keys, over_groups, over_lengths = presence.overflow()
        self._ledger.changes.dropped(number, None, over_keys, over_groups)
        if not len(over_groups):
            return None
        excess = int(over_lengths.sum())
        self._tiers[number].debris_bytes += excess
        return Deletion(number, over_keys, over_groups, over_lengths, excess)
