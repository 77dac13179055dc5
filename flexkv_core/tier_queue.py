"""One lower tier's traffic: the lines of moves that wait, and how much is under way.

Owns the lines, the order in which moves leave them, and every figure that bounds them. Changed by the owner thread
only; others may read the figures. Does not own what a move does (`reading.py`, `writing.py`) or when the next one is
due (`scheduler.py`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from flexkv_core.plans import Move
from flexkv_core.tier_health import Lane, TierHealth
from flexkv_core.tier_inline import InlineLink
from flexkv_core.tier_link import TierLink

DEFAULT_BATCH_BLOCKS = 128
"""Until the tier has said how many blocks a call may carry."""

Link = TierLink | InlineLink


@dataclass(slots=True)
class TierQueue:
    """See the module's docstring.

    Attributes:
        health: whether it may be called, from how it has answered.
        reads, prefetches, writes: moves not yet started; in this order they are.
        write_limit: bytes that may be queued or being written: all of it is pinned in host memory.
        queued_bytes: how many are.
        in_flight: calls that the tier has not answered; in_flight_bytes: what they move.
        most_in_flight: bytes that calls under way may move; only a single block may exceed it.
        recovering: the tier is saying what survived a restart; nothing else is asked of it. recovered: it has.
        settling: reads that came back and are being verified.
        listings: under way, of a tier whose capacity we keep: writes wait until it is known what it holds.
    """

    number: int
    link: Link
    health: TierHealth
    write_limit: int
    most_in_flight: int
    reads: deque[Move] = field(default_factory=deque)
    prefetches: deque[Move] = field(default_factory=deque)
    writes: deque[Move] = field(default_factory=deque)
    queued_bytes: int = 0
    in_flight: int = 0
    in_flight_bytes: int = 0
    recovering: bool = False
    recovered: bool = False
    settling: int = 0
    listings: int = 0

    @property
    def idle(self) -> bool:
        return not (self.reads or self.prefetches or self.writes or self.in_flight or self.settling)

    @property
    def queued_blocks(self) -> int:
        return sum(len(move) for move in self.writes)

    @property
    def batch_blocks(self) -> int:
        """How many blocks one call may carry."""
        return self.link.capabilities.max_batch_blocks if self.link.capabilities else DEFAULT_BATCH_BLOCKS

    # ---------------------------------------------------------------- what comes next

    def take(self) -> tuple[Lane, Move] | None:
        """Take what the tier has room for now: reads first, then prefetches, then writes; None where there is none."""
        concurrency = self.link.capabilities.concurrency if self.link.capabilities else 1
        if self.recovering or self.in_flight >= concurrency:
            return None
        line = self.reads or self.prefetches
        if not line and self.link.state == "ready" and not self.listings:
            line = self.writes
        room = self.most_in_flight - self.in_flight_bytes
        if not line or (self.in_flight and line[0].slot_bytes[0] > room):
            return None
        return "write" if line is self.writes else "read", self._head(line, room)

    def _head(self, line: deque[Move], room: int) -> Move:
        """Take from the head of a line at most one call's blocks and `room` bytes, but one block at least."""
        move = line.popleft()
        fit = int(np.searchsorted(np.cumsum(move.slot_bytes), room, side="right"))
        size = min(self.batch_blocks, max(1, fit))
        if len(move) > size:
            line.appendleft(move.part(slice(size, None)))
            move = move.part(slice(0, size))
        return move

    # ---------------------------------------------------------------- what is under way

    def begin(self, move: Move) -> None:
        """A call that moves these blocks is under way."""
        self.in_flight += 1
        self.in_flight_bytes += move.nbytes

    def end(self, move: Move) -> None:
        """It was answered."""
        self.in_flight -= 1
        self.in_flight_bytes -= move.nbytes
