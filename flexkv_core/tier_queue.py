"""One lower tier's traffic: the lines of moves that wait, and how much is under way.

Owns the lines, the order in which moves leave them, and every figure that bounds them. Changed by the owner thread
only; others may read the figures. Does not own what a move does (`reading.py`, `writing.py`) or when the next one is
due (`scheduler.py`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from flexkv_core.plans import Move, Probe
from flexkv_core.tier_health import Lane, TierHealth
from flexkv_core.tier_inline import InlineLink
from flexkv_core.tier_link import TierLink
from flexkv_core.turns import Turns

DEFAULT_BATCH_BLOCKS = 128
"""Until the tier has said how many blocks a call may carry."""

Link = TierLink | InlineLink


@dataclass(slots=True)
class TierQueue:
    """See the module's docstring.

    Attributes:
        health: whether it may be called, from how it has answered.
        reads, probes, prefetches, writes: what is not yet started; in this order it is, and within each line of
            moves their owners in turns.
        write_limit: bytes that may be queued or being written: all of it is pinned in host memory.
        queued_bytes: how many are; writes_of: by owner.
        in_flight: calls that the tier has not answered; in_flight_bytes: what they move.
        most_in_flight: bytes that calls under way may move; only a single block may exceed it.
        probing: probes under way: at most half of the calls that the tier takes at a time, so that one that hangs
            stops no read where there is another place.
        recovering: the tier is saying what survived a restart; nothing else is asked of it. recovered: it has.
        settling: reads that came back and are being verified.
        listings: under way, of a tier whose capacity we keep: writes wait until it is known what it holds.
        removals: of corrupt copies, under way: writes wait, one of the same block would be deleted with the old one.
        listed: it has said all that it holds since it came up.
    """

    number: int
    link: Link
    health: TierHealth
    write_limit: int
    most_in_flight: int
    reads: Turns = field(default_factory=Turns)
    probes: deque[Probe] = field(default_factory=deque)
    prefetches: Turns = field(default_factory=Turns)
    writes: Turns = field(default_factory=Turns)
    queued_bytes: int = 0
    writes_of: dict[int, int] = field(default_factory=dict)
    in_flight: int = 0
    in_flight_bytes: int = 0
    probing: int = 0
    recovering: bool = False
    recovered: bool = False
    settling: int = 0
    listings: int = 0
    removals: int = 0
    listed: bool = False

    @property
    def idle(self) -> bool:
        """No move waits or is under way. Probes do not count: they hold nothing."""
        return not (self.reads or self.prefetches or self.writes or self.in_flight or self.settling)

    @property
    def queued_blocks(self) -> dict[str, int]:
        """Blocks of moves not yet started; any thread."""
        return {"read": self.reads.blocks, "prefetch": self.prefetches.blocks, "write": self.writes.blocks}

    @property
    def batch_blocks(self) -> int:
        """How many blocks one call may carry."""
        return self.link.capabilities.max_batch_blocks if self.link.capabilities else DEFAULT_BATCH_BLOCKS

    # ---------------------------------------------------------------- bytes that wait to be written

    def room_for(self, owner: int) -> int:
        """Bytes that an owner may still queue. The limit is shared in equal parts by those who have writes queued or
        under way, so that one who stores much leaves room for others; alone it may have it all."""
        owners = len(self.writes_of.keys() | {owner})
        return min(self.write_limit - self.queued_bytes, self.write_limit // owners - self.writes_of.get(owner, 0))

    def count_write(self, move: Move, nbytes: int) -> None:
        """So many bytes more, or less, of the move's owner are queued or being written."""
        self.queued_bytes += nbytes
        left = self.writes_of.get(move.owner, 0) + nbytes
        if left:
            self.writes_of[move.owner] = left
        else:
            self.writes_of.pop(move.owner, None)

    # ---------------------------------------------------------------- what comes next

    def take(self) -> tuple[Lane, Move] | Probe | None:
        """Take what the tier has room for now, None if nothing: reads first, then probes, prefetches, writes."""
        concurrency = self.link.capabilities.concurrency if self.link.capabilities else 1
        if self.recovering or self.in_flight + self.probing >= concurrency:
            return None
        if self.probes and not self.reads and self.probing < max(1, concurrency // 2):
            return self.probes.popleft()
        line = self.reads or self.prefetches
        if not line and self.link.state == "ready" and not (self.listings or self.removals):
            line = self.writes
        room = self.most_in_flight - self.in_flight_bytes
        if not line or (self.in_flight and line.head().slot_bytes[0] > room):
            return None
        return "write" if line is self.writes else "read", self._head(line, room)

    def _head(self, line: Turns, room: int) -> Move:
        """Take from the head of a line at most one call's blocks and `room` bytes, but one block at least."""
        head, size = line.head(), self.batch_blocks
        if head.nbytes > room:
            size = min(size, max(1, int(np.searchsorted(np.cumsum(head.slot_bytes), room, side="right"))))
        return line.take(size)

    # ---------------------------------------------------------------- what is under way

    def begin(self, move: Move) -> None:
        """A call that moves these blocks is under way."""
        self.in_flight += 1
        self.in_flight_bytes += move.nbytes

    def end(self, move: Move) -> None:
        """It was answered."""
        self.in_flight -= 1
        self.in_flight_bytes -= move.nbytes
