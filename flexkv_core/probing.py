"""Probes: asking key-addressed tiers what they hold of a path, behind the back of whoever wants to know.

Owns which probes are made, how many, and for how long their answers are believed. Whoever looks a path up says how
much of it is known, and goes on; the calls are made on the owner thread. Does not own what is asked or what an answer
means (`hints.py`), or which call of a tier comes next (`tier_queue.py`).

A tier is probed while it may hold what the presence record does not say: others write to it too, it cannot list, it
is still listing, or the record had to forget.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flexkv_core.index import Keys
from flexkv_core.planner import Planner
from flexkv_core.plans import Move, Outcome, Probe
from flexkv_core.tier_queue import TierQueue

MOST_PROBES = 64
"""Of one tier, waiting or under way; more are dropped, and counted."""
MOST_CALLS = 64
"""Of one probe. Only groups that do not need all blocks, or long paths that are held, take more than one or two."""
MOST_REMEMBERED = 1 << 14
"""Answers of one tier that are believed for a while."""


class _Asked:
    """What one tier was asked.

    Attributes:
        under_way: the last key of a path -> its probe.
        ended: when a key that ends a known prefix (`Hints.stop`) may be asked for again, in the order of asking.
    """

    def __init__(self, ttl_s: float) -> None:
        self.under_way: dict[bytes, Probe] = {}
        self._ttl_s = ttl_s
        self._ended: dict[bytes, float] = {}

    def remember(self, stop: bytes) -> None:
        self._ended.pop(stop, None)
        self._ended[stop] = time.monotonic() + self._ttl_s
        while len(self._ended) > MOST_REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def remembers(self, stop: bytes) -> bool:
        return self._ended.get(stop, 0.0) > time.monotonic()


class Probing:
    """See the module's docstring. Methods without a note are for the owner thread only.

    Args:
        queues: of the lower tiers, by number.
        lock: held around calls of the planner, and by callers of `want`.
        call: has the owner thread call something; any thread.
        progress: called when a tier has room for another call.
    """

    def __init__(
        self,
        planner: Planner,
        queues: dict[int, TierQueue],
        lock: threading.RLock,
        call: Callable[..., None],
        progress: Callable[[TierQueue], None],
    ) -> None:
        self._planner = planner
        self._queues = queues
        self._lock = lock
        self._call = call
        self._progress = progress
        self._asked: dict[int, _Asked] = {}

    def add_tier(self, number: int, ttl_s: float) -> None:
        """Make known a tier; `ttl_s`: for how long it is not asked again for what it did not have."""
        self._asked[number] = _Asked(ttl_s)

    # ---------------------------------------------------------------- what is wanted (any thread, under the lock)

    def want(self, root: bytes, keys: Keys, known: int) -> bool:
        """Someone would like to know what follows the `known` blocks of a path: see to it that it will be known.

        Returns whether a probe for it is under way, so that asking again gives a better answer.
        """
        begun = [self._begin(queue, root, keys, known) for queue in self._queues.values() if self._may_hold_more(queue)]
        return any(begun)

    def _may_hold_more(self, queue: TierQueue) -> bool:
        """Whether a tier can be asked, and may hold what its record does not say."""
        book, link = self._planner.tiers[queue.number], queue.link
        if book.presence is None or not book.available or "probe" not in link.powers or link.capabilities is None:
            return False
        forgets = book.presence.capacity_bytes is None and len(book.presence) >= book.presence.max_entries
        return link.capabilities.shared or not queue.listed or forgets

    def _begin(self, queue: TierQueue, root: bytes, keys: Keys, known: int) -> bool:
        asked, tail = self._asked[queue.number], keys[-1].tobytes()
        if tail in asked.under_way:
            return True
        if asked.remembers(self._planner.hints.stop(root, keys, known)):
            return False
        if len(asked.under_way) >= MOST_PROBES:
            self._planner.tiers[queue.number].counters.dropped_probes += 1
            return False
        asked.under_way[tail] = probe = self._planner.hints.begin(root, keys.copy(), known, queue.number)
        self._call(self._submit, queue, probe)
        return True

    # ---------------------------------------------------------------- calls

    def _submit(self, queue: TierQueue, probe: Probe) -> None:
        if queue.link.state != "ready":
            self._end(queue, probe, told=False)
            return
        queue.probes.append(probe)
        self._progress(queue)

    def start(self, queue: TierQueue, probe: Probe) -> None:
        """Ask what a probe that was taken from the tier's line wants to know next, if the tier may be asked at all."""
        with self._lock:
            question = self._planner.hints.ask(probe, queue.batch_blocks)
        if probe.calls == MOST_CALLS:
            question = None
        call = queue.health.begin("read", 0) if question is not None else None
        if question is None or call is None:
            self._end(queue, probe, told=question is None)
            return
        probe.calls += 1
        queue.probing += 1

        def done(held: int | None) -> None:
            call.answered()
            queue.probing -= 1
            outcome = Outcome.FAILED if held is None else Outcome.GOOD
            queue.health.end(call, np.full(len(question.positions), outcome, np.uint8))
            if held is None:
                self._end(queue, probe, told=True)
            else:
                with self._lock:
                    self._planner.tiers[queue.number].counters.probes += 1
                    self._planner.hints.answer(probe, question, held)
                queue.probes.append(probe)
            self._progress(queue)

        queue.link.probe(question.batch, done)

    def _end(self, queue: TierQueue, probe: Probe, *, told: bool) -> None:
        """A probe is over. `told`: the tier has said, or failed to say, what it holds; do not ask again at once."""
        asked, hints = self._asked[queue.number], self._planner.hints
        with self._lock:
            del asked.under_way[probe.keys[-1].tobytes()]
            if told and probe.known < len(probe.keys) and hints.wanted(probe):
                asked.remember(hints.stop(probe.root, probe.keys, probe.known))

    def missed(self, move: Move, outcome: npt.NDArray[np.uint8]) -> None:
        """A read did not find what the record had promised: a probe that claims it is not believed for a while."""
        lost = np.flatnonzero((outcome == Outcome.MISSING) | (outcome == Outcome.CORRUPT))
        if len(lost):
            with self._lock:
                self._asked[move.tier].remember(move.keys[int(move.positions[lost].min())].tobytes())

    def abandon(self, queue: TierQueue) -> None:
        """Give up all probes of a tier that wait."""
        waiting, queue.probes = queue.probes, deque()
        for probe in waiting:
            self._end(queue, probe, told=False)
