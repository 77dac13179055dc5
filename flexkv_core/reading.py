"""Reads of the lower tiers: what waits to be read, its calls, the check of its seals, and their ends.

Owns the path of a planned read from its line until the planner knows what became of each block. Runs on the owner
thread. Does not own which blocks are read (`planner.py`), who waits for them (`fetching.py`), or which call of a tier
comes next (`tier_queue.py`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core.backend import PAGE, Status
from flexkv_core.errors import ManagerClosedError
from flexkv_core.planner import Planner
from flexkv_core.plans import FetchPlan, Move, Outcome
from flexkv_core.probing import Probing
from flexkv_core.region import HostRegion
from flexkv_core.seal import SealFault, verify_blocks
from flexkv_core.tier_queue import TierQueue
from flexkv_core.writing import Writing

logger = logging.getLogger("flexkv.scheduler")

RunCopy = Callable[[Callable[[], Any], Callable[[Any, BaseException | None], None]], None]
"""Runs its first argument on a copy thread, then the second with (result, error) on the owner thread."""


class Reading:
    """See the module's docstring.

    Args:
        queues: of the lower tiers, by number.
        lock: held around calls of the planner.
        verify: check seals.
        run_copy: where seals are checked.
        progress: called when a tier has room for another call, or has ended one.

    Attributes:
        on_read: called when the planner knows what became of a read.
    """

    def __init__(
        self,
        planner: Planner,
        queues: dict[int, TierQueue],
        writing: Writing,
        probing: Probing,
        lock: threading.RLock,
        region: HostRegion,
        *,
        verify: bool,
        run_copy: RunCopy,
        progress: Callable[[TierQueue], None],
    ) -> None:
        self._planner = planner
        self._queues = queues
        self._writing = writing
        self._probing = probing
        self._lock = lock
        self._region = region
        self._verify = verify
        self._run_copy = run_copy
        self._progress = progress
        self.on_read: Callable[[Move], None] = lambda move: None

    # ---------------------------------------------------------------- lines

    def submit(self, fetch: FetchPlan, *, urgent: bool) -> None:
        """Start the reads that a fetch has planned. Urgent: somebody waits. Then they pass prefetches, and so do
        prefetches of what it waits for too."""
        for move in fetch.reads:
            queue = self._queues[move.tier]
            (queue.reads if urgent else queue.prefetches).append(move)
            self._progress(queue)
        if urgent and fetch.awaited.any():
            for queue in self._queues.values():
                queue.prefetches.sift(lambda move, queue=queue: self._promoted(queue, fetch, move))  # type: ignore[misc]

    def withdraw(self) -> None:
        """Drop the reads that have not been started and that no fetch waits for any more."""
        for queue in self._queues.values():
            with self._lock:
                queue.reads.sift(self._wanted)
                queue.prefetches.sift(self._wanted)
            self._progress(queue)

    def _promoted(self, queue: TierQueue, fetch: FetchPlan, move: Move) -> Move | None:
        """Queue a prefetch's move among the reads if the fetch waits for some of it; else it stays."""
        if move.root != fetch.root or not self._planner.awaits(fetch, move).any():
            return move
        queue.reads.append(move)
        return None

    def _wanted(self, move: Move) -> Move | None:
        """Of a move, what some fetch waits for."""
        unwanted = self._planner.unwanted(move)
        if not unwanted.any():
            return move
        self._planner.drop_read(move.part(unwanted))
        return None if unwanted.all() else move.part(~unwanted)

    def abandon(self, queue: TierQueue) -> None:
        """Give up all reads of a tier that have not been started."""
        for move in [*queue.reads.clear(), *queue.prefetches.clear()]:
            self._settle(queue, move, np.full(len(move), Outcome.UNREAD, np.uint8))

    # ---------------------------------------------------------------- calls

    def start(self, queue: TierQueue, move: Move) -> None:
        """Have the tier read what was taken from its lines, if it may be asked at all."""
        call = queue.health.begin("read", len(move))
        if call is None:
            self._settle(queue, move, np.full(len(move), Outcome.UNREAD, np.uint8))
            return
        queue.begin(move)

        def done(statuses: npt.NDArray[np.uint8]) -> None:
            call.answered()
            queue.end(move)
            queue.settling += 1
            if self._verify and (statuses == Status.OK).any():
                self._run_copy(lambda: self._verified(move, statuses), settle)
            else:
                settle(statuses.astype(np.uint8), None)
            self._progress(queue)

        def settle(outcome: npt.NDArray[np.uint8] | None, error: BaseException | None) -> None:
            queue.settling -= 1
            if outcome is None:
                if not isinstance(error, ManagerClosedError):
                    logger.error("verifying blocks failed", exc_info=error)
                outcome = np.full(len(move), Outcome.FAILED, np.uint8)
            queue.health.end(call, outcome)
            if not queue.health.sound:
                outcome[outcome == Outcome.FAILED] = Outcome.UNREAD
            self._settle(queue, move, outcome)
            self._progress(queue)

        queue.link.submit("read", move.batch(), done)

    def _verified(self, move: Move, statuses: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Turn statuses into outcomes: OK only counts where the seal holds."""
        outcome = statuses.astype(np.uint8)
        came = statuses == Status.OK
        part = move.part(came)
        faults = verify_blocks(
            self._region.buffer,
            part.host_slots * PAGE,
            part.payload_bytes,
            part.block_keys,
            part.groups,
            root=part.root,
        )
        outcome[came] = np.where(faults == SealFault.GOOD, Outcome.GOOD, Outcome.CORRUPT)
        return outcome

    def _settle(self, queue: TierQueue, move: Move, outcome: npt.NDArray[np.uint8]) -> None:
        with self._lock:
            corrupt = self._planner.finish_read(move, outcome)
        self._probing.missed(move, outcome)
        if corrupt is not None:
            logger.warning(
                "tier %s: %d blocks that are corrupt or cannot be read were dropped",
                self._planner.tiers[queue.number].name,
                len(corrupt.groups),
            )
            self._writing.remove(queue, corrupt)
        self.on_read(move)
