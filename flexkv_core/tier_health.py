"""How a lower tier is doing: whether it is asked at all, what its answers mean, and what `stats()` says of it.

Two circuit breakers, because media fail by direction: a full disk or a read-only bucket still serves hits. Owned by
the owner thread; other threads may read the figures. Does not own calls (`scheduler.py`) or processes.

A call is bad when at least half of its blocks failed or came back corrupt, or when it took longer than `slow_s`; a
block that the tier does not hold is an answer like any other. The death of the process (crash, kill at a deadline,
failure to open) counts once, however many calls it took along.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from flexkv_core.breaker import Breaker, BreakerConfig
from flexkv_core.plans import Outcome
from flexkv_core.tier_book import TierBook

logger = logging.getLogger("flexkv.tier")

Lane = Literal["read", "write"]
Health = Literal["ok", "degraded", "away"]


class Timer(Protocol):
    """What an event loop's `call_later` returns."""

    def cancel(self) -> None: ...


class Linked(Protocol):
    """What is asked of a tier's link."""

    @property
    def state(self) -> str: ...

    @property
    def last_error(self) -> str | None: ...


@dataclass(slots=True)
class Call:
    """A call that was made: say `answered` when its answer is there, and `TierHealth.end` when it is judged."""

    lane: Lane
    ticket: int
    began: float
    took_s: float | None = None

    def answered(self) -> None:
        self.took_s = time.monotonic() - self.began


class TierHealth:
    """See the module's docstring.

    Args:
        slow_s: a call that takes longer is bad.
        later: an event loop's `call_later`.
        lock: that lookups take, held to change `book.available`.
    """

    def __init__(
        self,
        book: TierBook,
        link: Linked,
        config: BreakerConfig,
        slow_s: float,
        later: Callable[[float, Callable[[], None]], Timer],
        lock: threading.RLock,
    ) -> None:
        self.rejected_blocks = 0
        self.last_trouble: str | None = None
        self._book = book
        self._link = link
        self._slow_s = slow_s
        self._later = later
        self._lock = lock
        self._lanes: dict[Lane, Breaker] = {"read": Breaker(config), "write": Breaker(config)}
        self._timer: Timer | None = None
        self._refresh()

    # ---------------------------------------------------------------- may it be asked

    def takes(self, lane: Lane) -> bool:
        """A call of this kind would be let through now; what is written to a tier that cannot be read is no use."""
        if lane == "write" and self._lanes["read"].state == "open":
            return False
        return self._lanes[lane].admits

    def begin(self, lane: Lane, blocks: int) -> Call | None:
        """Ask to make a call. None: it must not be made, and its blocks have been counted as rejected."""
        ticket = self._lanes[lane].begin() if self._link.state == "ready" and self.takes(lane) else None
        if ticket is None:
            self.rejected_blocks += blocks
            return None
        self._refresh()
        return Call(lane, ticket, time.monotonic())

    # ---------------------------------------------------------------- how it went

    def end(self, call: Call, outcome: npt.NDArray[np.uint8]) -> None:
        """Judge a call by what became of its blocks (an `Outcome` each)."""
        lane = self._lanes[call.lane]
        if self._link.state != "ready":
            lane.void(call.ticket)  # `link_changed` counts what took the tier away
        else:
            bad = int(np.count_nonzero((outcome == Outcome.FAILED.value) | (outcome == Outcome.CORRUPT.value)))
            slow = call.took_s is not None and call.took_s > self._slow_s
            if slow:
                self.last_trouble = f"a {call.lane} took {call.took_s:.3g} s"
            elif bad:
                self.last_trouble = f"a {call.lane} failed for {bad} of {len(outcome)} blocks"
            lane.end(call.ticket, good=not slow and 2 * bad < max(len(outcome), 1))
        self._refresh()

    def link_changed(self) -> None:
        """The tier's link has another state."""
        if self._link.state == "backoff":
            self.last_trouble = self._link.last_error
            for lane in self._lanes.values():
                lane.strike()
        self._refresh()

    # ---------------------------------------------------------------- what others see

    @property
    def health(self) -> Health:
        """away: nothing is read from it; degraded: it serves, but has failed lately or takes no writes."""
        if self._link.state != "ready" or self._lanes["read"].state == "open":
            return "away"
        return "degraded" if any(lane.troubled for lane in self._lanes.values()) else "ok"

    @property
    def sound(self) -> bool:
        """Its process is up and its reads are not known to fail: a block that does has failed alone."""
        return self._link.state == "ready" and self._lanes["read"].state == "closed"

    def figures(self) -> dict[str, Any]:
        """For `stats()`; any thread."""
        return {
            "health": self.health,
            "breaker": {
                **{name: lane.state for name, lane in self._lanes.items()},
                "opened": sum(lane.opened for lane in self._lanes.values()),
                "rejected_blocks": self.rejected_blocks,
                "last_trouble": self.last_trouble,
            },
        }

    def _refresh(self) -> None:
        """Tell lookups whether the tier can be read, and come again when a breaker's wait is over."""
        available = self._link.state == "ready" and self._lanes["read"].admits
        if available != self._book.available:
            with self._lock:
                self._book.available = available
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waits = [wait for lane in self._lanes.values() if (wait := lane.wait_s) > 0]
        if waits:
            self._timer = self._later(min(waits), self._refresh)
