"""Load or compute: how much of a hit to take, so that no tier makes a request slower than no cache.

Owns the decision and what it is made from: what tiers took for earlier fetches, copies into device blocks for earlier
loads, the engine for the tokens of prompts. Pure: no engine, no server, no thread, and a clock that is given. Does not
own fetches or who waits for them (`arrivals.py`).

Taking k blocks of a hit costs the longest wait for any of them and their copy, and saves their tokens' computing. Waits
grow from tier to tier and within one at the same pace, so only the ends of runs of one tier are worth a look. Where a
tier's pace is not known yet, it counts as nothing, and the wait is bounded by a share of what it may save; a wait that
is expected is bounded too, so that a tier that has become slow since costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexkv_core.connectors.estimates import Line, PrefillSpeed

HERE = ""
"""Stands for host memory where tiers are named."""
Held = Sequence[tuple[str, int]]
"""A prefix by where it is: (tier, blocks), from its first block on."""

CAUTION = 4 / 3
"""Waits count for so many times what is expected: what is as slow as computing, give or take, is computed, since a wait
in vain costs as much as one that was worth it saves."""
PATIENCE = 4.0
"""A wait may take so many times what was expected."""
UNKNOWN_SHARE = 0.5
"""Of what the blocks of a tier of which nothing is known save: how long they are waited for."""
UNDONE = 2.0
"""What has not come after some time is expected to take so many times as long: with `UNKNOWN_SHARE`, one wait in vain
for a tier of which nothing was known is enough."""
LEAST_SHARE = 0.125
"""Of what they save: how long blocks are waited for, however fast they were expected."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do with a hit.

    Attributes:
        blocks: how many leading ones to take, those that the engine has itself included.
        limit_s: how long to wait for them, at most.
        load_s: what they are expected to take: the wait and the copy. compute_s: what computing them would.
        known: False where that is a guess.
    """

    blocks: int
    limit_s: float
    load_s: float
    compute_s: float
    known: bool


@dataclass(slots=True)
class Decisions:
    """Counts since the start, and what they rested on.

    Attributes:
        whole, cut, not_taken: hits of which all blocks, leading ones, or none were taken.
        gave_up: waits that ended at their limit, whatever was taken then.
        probes: fetches of what was not taken, behind the request.
        taken_tokens, left_tokens: of these hits, beyond what the engine had itself.
        load_s, compute_s: sums of what was expected: of what was taken, and of computing that.
    """

    whole: int = 0
    cut: int = 0
    not_taken: int = 0
    gave_up: int = 0
    probes: int = 0
    taken_tokens: int = 0
    left_tokens: int = 0
    load_s: float = 0.0
    compute_s: float = 0.0


class LoadOrCompute:
    """See the module's docstring. One thread.

    Args:
        block_tokens, block_bytes: of one block, all KV groups and ranks.
        longest_s: no wait is longer.
        clock: seconds, never going back.
    """

    def __init__(
        self, block_tokens: int, block_bytes: int, *, longest_s: float, clock: Callable[[], float], enabled: bool = True
    ) -> None:
        self.block_tokens = block_tokens
        self.decisions = Decisions()
        self.prefill = PrefillSpeed(clock)
        self._block_bytes = block_bytes
        self._longest_s = longest_s
        self._enabled = enabled
        self._copies = Line()
        self._tiers: dict[str, Line] = {}

    # ---------------------------------------------------------------- measurements

    def copied(self, blocks: int, seconds: float) -> None:
        """A load of so many blocks took so long, until the engine knew."""
        if blocks > 0:
            self._copies.observe(blocks * self._block_bytes, seconds)

    def came(self, tier: str, blocks: int, seconds: float) -> None:
        """So many blocks, those that were ahead of them included, have come from a tier in that time."""
        if blocks > 0:
            self._tiers.setdefault(tier, Line()).observe(blocks * self._block_bytes, seconds)

    def did_not_come(self, tier: str, blocks: int, seconds: float) -> None:
        """They have not come in that time: as long again may be expected."""
        if blocks > 0 and UNDONE * seconds > (self.wait_s(tier, blocks) or 0.0):
            self.came(tier, blocks, UNDONE * seconds)

    def wait_s(self, tier: str, blocks: int) -> float | None:
        """What so many blocks are expected to take from a tier; None: nothing is known of it."""
        if tier == HERE or not blocks:
            return 0.0
        line = self._tiers.get(tier)
        return None if line is None else line.predict(blocks * self._block_bytes)

    def compute_s(self, blocks: int) -> float | None:
        """What computing so many blocks takes; None: not known, or of no interest."""
        token_s = self.prefill.token_s if self._enabled else None
        return None if token_s is None else max(blocks, 0) * self.block_tokens * token_s

    def too_slow(self, blocks: int) -> list[str]:
        """Tiers from which no hit of that many blocks or fewer is worth waiting for: as latency and rate are what they
        are, a shorter one is worth less."""
        compute_s = self.compute_s(blocks)
        if compute_s is None:
            return []
        return [tier for tier in self._tiers if CAUTION * (self.wait_s(tier, blocks) or 0.0) >= compute_s]

    # ---------------------------------------------------------------- the decision

    def choose(
        self, held: Held, local: int, *, ahead: Mapping[str, int] | None = None, waited_s: float = 0.0
    ) -> Choice:
        """Decide on a hit.

        Args:
            held: where its blocks are. local: leading blocks that the engine has itself.
            ahead: blocks that were asked of each tier before. waited_s: how long these have been on their way.
        """
        whole, block_s = sum(blocks for _, blocks in held), self.compute_s(1)
        if whole <= local:
            return Choice(local, 0.0, 0.0, 0.0, known=True)
        if block_s is None:
            return Choice(whole, self._longest_s, 0.0, 0.0, known=False)
        best = free = Choice(local, 0.0, 0.0, 0.0, known=True)
        at, wait, known = 0, 0.0, True
        asked = dict(ahead or {})
        for tier, blocks in held:
            at += blocks
            asked[tier] = asked.get(tier, 0) + blocks
            took = self.wait_s(tier, asked[tier])
            known = known and took is not None
            wait = max(wait, CAUTION * (took or 0.0) - waited_s)
            saved = (at - local) * block_s
            load_s = wait + self._copy_s(max(at - local, 0))
            if saved - load_s > best.compute_s - best.load_s:
                best = Choice(at, self._limit(wait, saved - load_s + wait, free, known=known), load_s, saved, known)
            if wait == 0.0 and known:
                free = best
        return best

    def _copy_s(self, blocks: int) -> float:
        return self._copies.predict(blocks * self._block_bytes) or 0.0

    def _limit(self, wait: float, gain: float, free: Choice, *, known: bool) -> float:
        """How long to wait for what saves `gain` seconds but for the wait, where `free` can be had without."""
        gain -= free.compute_s - free.load_s
        limit = max(PATIENCE * wait, LEAST_SHARE * gain) if known else UNKNOWN_SHARE * gain
        return min(limit, gain, self._longest_s)

    def decided(self, choice: Choice, whole: int, local: int) -> None:
        """Count what became of a hit of `whole` blocks."""
        if whole <= local:
            return
        counts, taken = self.decisions, max(choice.blocks - local, 0)
        if taken == 0:
            counts.not_taken += 1
        elif choice.blocks < whole:
            counts.cut += 1
        else:
            counts.whole += 1
        counts.taken_tokens += taken * self.block_tokens
        counts.left_tokens += (whole - local - taken) * self.block_tokens
        counts.load_s += choice.load_s
        counts.compute_s += choice.compute_s

    def figures(self) -> dict[str, Any]:
        """Counts, and what is expected now: seconds a token computed, and a block of each tier and of the copy."""
        return {
            **{name: getattr(self.decisions, name) for name in Decisions.__slots__},
            "token_s": self.prefill.token_s,
            "copy_block_s": self._copies.predict(self._block_bytes),
            "tier_block_s": {tier: line.predict(self._block_bytes) for tier, line in self._tiers.items()},
        }
