"""Writes to the lower tiers: what waits to be written, its calls, and the deletions that make room.

Owns the path of a planned write from its line until the planner knows which blocks the tier holds, and that what
continues a dropped block is dropped too: without its ancestors it would never be found. Runs on the owner thread. Does
not own what sinks or what is deleted (`write_through.py`), or which call of a tier comes next (`tier_queue.py`).

A tier's line of writes is bounded in bytes: what does not fit is dropped with its descendants. While a tier is away
its line is dropped too, so that a dead tier holds no host memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flexkv_core.backend import Batch, Status
from flexkv_core.plans import Deletion, Move
from flexkv_core.tier_queue import TierQueue
from flexkv_core.write_through import WriteThrough

DEEPEST_FIRST = slice(None, None, -1)
"""Order of blocks within a write, so that a medium that remembers only when a block was written makes leaves older
than their ancestors after a restart."""


class Writing:
    """See the module's docstring.

    Args:
        down: the planner's side of it.
        queues: of the lower tiers, by number.
        lock: held around calls of `down`.
        progress: called when a tier has room for another call, or has ended one.
    """

    def __init__(
        self,
        down: WriteThrough,
        queues: dict[int, TierQueue],
        lock: threading.RLock,
        progress: Callable[[TierQueue], None],
    ) -> None:
        self._down = down
        self._queues = queues
        self._lock = lock
        self._progress = progress

    # ---------------------------------------------------------------- lines

    def submit(self, writes: list[Move]) -> None:
        """Queue the writes of one path; what a full line or an absent tier cannot take is dropped, with what continues
        it in the groups after it."""
        cut: dict[int, int] = {}  # tier -> the first position that was dropped
        for move in writes:
            queue = self._queues[move.tier]
            if move.tier in cut and (beyond := move.positions > cut[move.tier]).any():
                self._drop(move.part(beyond))
                move = move.part(~beyond)  # noqa: PLW2901
                if not len(move):
                    continue
            if queue.link.state not in ("ready", "starting") or not queue.health.takes("write"):
                queue.health.rejected_blocks += len(move)
                self._drop(move)
                continue
            room = queue.room_for(move.owner)
            if move.nbytes > room:
                fits = np.cumsum(move.slot_bytes) <= room
                dropped = move.part(~fits)
                cut[move.tier] = int(dropped.positions[0])
                self._drop(dropped)
                move = move.part(fits)  # noqa: PLW2901
            if len(move):
                queue.writes.append(move)
                queue.count_write(move, move.nbytes)
                self._progress(queue)

    def abandon(self, queue: TierQueue) -> None:
        """Give up all writes to a tier that have not been started."""
        for move in queue.writes.clear():
            queue.count_write(move, -move.nbytes)
            self._drop(move)

    def _drop(self, move: Move) -> None:
        with self._lock:
            self._down.drop_write(move)

    def _drop_descendants(self, queue: TierQueue, failed: Move) -> None:
        """Drop queued writes that continue a prefix whose block did not reach the tier."""
        if not queue.writes or not len(failed):
            return
        at = int(failed.positions.min())
        key = failed.keys[at]

        def rest_of(move: Move) -> Move | None:
            if move.root != failed.root or len(move.keys) <= at or (move.keys[at] != key).any():
                return move
            after = move.positions > at
            if not after.any():
                return move
            dropped = move.part(after)
            queue.count_write(dropped, -dropped.nbytes)
            self._down.drop_write(dropped)
            return None if after.all() else move.part(~after)

        with self._lock:
            queue.writes.sift(rest_of)

    # ---------------------------------------------------------------- calls

    def start(self, queue: TierQueue, move: Move) -> None:
        """Have the tier write what was taken from its line, when there is room for it."""
        if not queue.health.takes("write"):
            self._reject(queue, move)
            return
        with self._lock:
            started, deletion = self._down.start_write(move)
        queue.count_write(move, (started.nbytes if started is not None else 0) - move.nbytes)
        if started is not None and len(started) < len(move):
            self._drop_descendants(queue, move.part(slice(len(started), None)))
        if started is None:
            self._drop_descendants(queue, move)
            if deletion is not None:
                self.delete(queue, deletion)
            return
        write: Move = started
        call = queue.health.begin("write", len(write))
        queue.begin(write)

        def room_made(ok: bool) -> None:
            if ok:
                queue.link.submit("write", write.batch(DEEPEST_FIRST), done)
            else:
                done(np.full(len(write), Status.FAILED, np.uint8))

        def done(statuses: npt.NDArray[np.uint8]) -> None:
            if call is not None:
                call.answered()
                queue.health.end(call, statuses)
            queue.end(write)
            queue.count_write(write, -write.nbytes)
            written = statuses[DEEPEST_FIRST] == Status.OK
            with self._lock:
                self._down.finish_write(write, written)
            if not written.all():
                self._drop_descendants(queue, write.part(~written))
            self._progress(queue)

        if deletion is None:
            room_made(True)
        else:
            self.delete(queue, deletion, room_made)

    def _reject(self, queue: TierQueue, move: Move) -> None:
        """Drop a queued write that the tier must not be asked for, with its descendants."""
        queue.health.rejected_blocks += len(move)
        queue.count_write(move, -move.nbytes)
        self._drop(move)
        self._drop_descendants(queue, move)

    # ---------------------------------------------------------------- deletions

    def delete(self, queue: TierQueue, deletion: Deletion, then: Callable[[bool], None] = lambda ok: None) -> None:
        """Delete in the tier so that it stays within its capacity; `then(True)` if everything went."""
        total, size = len(deletion.groups), queue.batch_blocks
        pieces = [slice(at, min(at + size, total)) for at in range(0, total, size)]
        answers: dict[int, npt.NDArray[np.bool_]] = {}

        def answered(number: int, statuses: npt.NDArray[np.uint8]) -> None:
            answers[number] = statuses != Status.FAILED
            if len(answers) == len(pieces):
                ok = np.concatenate([answers[i] for i in range(len(pieces))])
                with self._lock:
                    self._down.finish_deletion(deletion, ok)
                then(bool(ok.all()))

        for number, piece in enumerate(pieces):
            batch = _deletion_batch(deletion, piece)
            queue.link.submit("delete", batch, lambda statuses, n=number: answered(n, statuses))  # type: ignore[misc]

    def remove(self, queue: TierQueue, corrupt: Deletion) -> None:
        """Have the tier delete corrupt copies; they are out of its record already."""
        if "delete" not in queue.link.powers or not queue.health.takes("write"):
            return

        def removed(statuses: npt.NDArray[np.uint8]) -> None:
            queue.removals -= 1
            with self._lock:
                self._down.finish_removal(corrupt, statuses != Status.FAILED)
            self._progress(queue)

        queue.removals += 1
        queue.link.submit("delete", _deletion_batch(corrupt, slice(None)), removed)


def _deletion_batch(deletion: Deletion, chosen: slice) -> Batch:
    lengths = deletion.lengths[chosen]
    return Batch(deletion.keys[chosen], deletion.groups[chosen], np.zeros_like(lengths), lengths)
