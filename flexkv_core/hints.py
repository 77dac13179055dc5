"""Hints at what key-addressed tiers hold: what a probe asks next, and what its answers put into the presence record.

Owns both decisions. A hint is never more than that: the read decides, and a block that is missing then leaves the
record. Does not own calls of backends, nor when a probe is worth one (`probing.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexkv_core.backend import Batch
from flexkv_core.index import Keys
from flexkv_core.index.coverage import covered_prefix, needed
from flexkv_core.ledger import NOWHERE, Ledger, Positions
from flexkv_core.plans import Probe


@dataclass(frozen=True, slots=True)
class Question:
    """Blocks of a probe's path, in the order in which the tier is to count the leading ones that it holds."""

    positions: Positions
    groups: npt.NDArray[np.uint8]
    batch: Batch


class Hints:
    """See the module's docstring. Shares the planner's ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._tiers = ledger.tiers

    def begin(self, root: bytes, keys: Keys, known: int, number: int) -> Probe:
        """A probe of a tier for what it holds of a path beyond the `known` blocks. Raises UnknownNamespaceError."""
        model = self._ledger.model(root)
        missing = np.zeros((len(model.groups), len(keys)), np.bool_)
        return Probe(root, keys, number, missing, known, model.epoch, self._tiers[number].generation)

    def stop(self, root: bytes, keys: Keys, known: int) -> bytes:
        """The key that stands for what ends a known prefix that is shorter than the path.

        Where every group needs all blocks, the next block ends it, whatever comes behind; else the path as a whole.
        """
        coverages = self._ledger.model(root).coverages
        at = known if all(coverage.kind == "all" for coverage in coverages) else -1
        return bytes(keys[at])

    def ask(self, probe: Probe, most: int) -> Question | None:
        """What to ask next, at most so many blocks; None when the tier can tell nothing more.

        The longest prefix is sought that the tier may complete, as far as it has not said otherwise: groups that need
        all blocks from the front, the others from the end. A block that is not there rules out every prefix that
        needs it, and the next longest is tried.
        """
        if not self.wanted(probe):
            return None
        model = self._ledger.models[probe.root]
        there = np.not_equal(self._ledger.reachable(model, probe.root, probe.keys)[0], NOWHERE)
        probe.known = covered_prefix(there, model.coverages)
        goal = covered_prefix(there | ~probe.missing, model.coverages)
        groups, at = np.nonzero(needed(model.coverages, goal) & ~there[:, :goal])
        if goal <= probe.known or not len(at):
            return None
        from_front = np.array([coverage.kind == "all" for coverage in model.coverages])[groups]
        order = np.lexsort((groups, np.where(from_front, at, -at), ~from_front))[:most]
        at, chosen = at[order], groups[order].astype(np.uint8)
        nothing = np.zeros(len(at), np.int64)
        return Question(at, chosen, Batch(np.ascontiguousarray(probe.keys[at]), chosen, nothing, nothing))

    def wanted(self, probe: Probe) -> bool:
        """Whether its answers still mean anything: no reset, no loss of the medium since, and the tier is there."""
        tier = self._tiers[probe.tier]
        live = self._ledger.live(probe.root, probe.epoch) is not None
        return live and tier.available and probe.generation == tier.generation

    def answer(self, probe: Probe, question: Question, held: int) -> None:
        """The tier says that it holds so many leading blocks of a question.

        A tier whose capacity we keep gets only hints that fit: no block is deleted because of a hint.
        """
        tier = self._tiers[probe.tier]
        if tier.presence is None or not self.wanted(probe):
            return
        at, groups = question.positions, question.groups
        sizes = np.array([group.slot_bytes for group in self._ledger.models[probe.root].groups], np.int64)[groups]
        taken = held
        if tier.presence.capacity_bytes is not None:
            room = tier.presence.capacity_bytes - tier.presence.used_bytes - tier.reserved_bytes - tier.debris_bytes
            taken = min(held, int(np.searchsorted(np.cumsum(sizes), room, side="right")))
        order = np.argsort(at[:taken], kind="stable")  # in the order of the path, as the record wants it
        tier.presence.add(question.batch.keys[order], groups[order], sizes[order])
        if tier.exact:
            self._ledger.changes.committed(tier.number, probe.root, question.batch.keys[order], groups[order])
        tier.counters.probed_blocks += taken
        probe.missing[groups[taken : held + 1], at[taken : held + 1]] = True
