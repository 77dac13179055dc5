"""What survived a restart in slot-addressed tiers: back into pools and index, or kept for a model that may still come.

Owns which recovered blocks count. Does not own how a backend knows them (`backend.SupportsRecover`), nor whether their
bytes are right: seals are verified when a block is read.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flexkv_core.backend import PAGE, Recovered
from flexkv_core.ledger import Ledger, Mask, Model
from flexkv_core.tier_book import TierBook


class Recovery:
    """Shares the planner's ledger. The caller serialises all calls."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def add(self, number: int, found: Recovered) -> None:
        """Take up a piece of what a tier still has.

        Blocks of registered namespaces enter the index. Those of others keep their slots and wait for `claim`; when
        room is needed they go first. What contradicts the tier's geometry or other blocks is passed over.
        """
        tier = self._ledger.tiers[number]
        if tier.pool is None or not len(found):
            return
        roots, inverse = np.unique(found.namespaces, axis=0, return_inverse=True)
        for at, root in enumerate(roots):
            part = _part(found, inverse.ravel() == at)
            adopted = self._adopt(tier, part)
            part = _part(part, adopted)
            tier.unclaimed.setdefault(root.tobytes(), []).append(part)
            self.claim(root.tobytes())

    def _adopt(self, tier: TierBook, found: Recovered) -> Mask:
        """Take their slots; returns which could be taken."""
        assert tier.pool is not None
        taken = np.zeros(len(found), np.bool_)
        good = (found.lengths >= 2 * PAGE) & (found.lengths % PAGE == 0) & (found.lengths <= tier.pool.capacity_bytes)
        sizes = {tier.pool.slot_class(size): size for size in np.unique(found.lengths[good]).tolist()}
        for slot_class in sorted(sizes, key=tier.pool.run_extents):  # short runs first
            at = np.flatnonzero(found.lengths == sizes[slot_class])
            taken[at] = tier.pool.adopt(found.slots[at], slot_class)
        return taken

    def claim(self, root: bytes) -> None:
        """A namespace is registered: what survived of it can be found from now on."""
        model = self._ledger.live(root)
        if model is None:
            return
        for tier in self._ledger.lower:
            for part in tier.unclaimed.pop(root, []):
                self._enter(tier, model, root, part)
        self._ledger.index.end_recovery()

    def _enter(self, tier: TierBook, model: Model, root: bytes, found: Recovered) -> None:
        assert tier.pool is not None
        assert tier.column is not None
        taken = np.zeros(len(found), np.bool_)
        for number, group in enumerate(model.groups):
            at = np.flatnonzero((found.groups == number) & (found.lengths == group.slot_bytes))
            if len(at):
                taken[at] = self._ledger.index.recover(
                    root,
                    tier.column,
                    number,
                    np.ascontiguousarray(found.keys[at]),
                    np.ascontiguousarray(found.parents[at]),
                    found.depths[at],
                    found.slots[at],
                )
        tier.counters.recovered_blocks += int(taken.sum())
        tier.pool.free(found.slots[~taken])


def _part(found: Recovered, chosen: npt.NDArray[np.bool_]) -> Recovered:
    return Recovered(
        found.namespaces[chosen],
        found.keys[chosen],
        found.parents[chosen],
        found.depths[chosen],
        found.groups[chosen],
        found.lengths[chosen],
        found.slots[chosen],
    )
