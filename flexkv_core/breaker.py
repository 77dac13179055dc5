"""A circuit breaker: whether calls should be made at all, from how the last ones went.

Pure logic with a clock that is passed in; no thread, no I/O, no timer. Does not know what a call is or when one has
failed (`tier_health.py`).

    closed     calls are made. `failures` bad ones in a row, or half of the calls within `window_s`, open it.
    open       no call is made until the back-off is over; then it is
    half_open  one call at a time is made: a good one closes it, a bad one opens it with twice the back-off.

The back-off starts at its shortest again when the breaker had been closed for `window_s` before it opened.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

BreakerState = Literal["closed", "open", "half_open"]
Seconds = Annotated[float, Field(gt=0, le=86400, strict=True)]

RATE_CALLS = 20
"""Fewer calls than this within the window say nothing about a rate."""
RATE_OF_BAD = 0.5
WINDOW_CALLS = 256
"""At most so many calls are remembered."""


class BreakerConfig(BaseModel):
    """When a tier is left alone, and for how long: the key `breaker` of a tier.

    Attributes:
        failures: bad calls in a row that open the breaker.
        window_s: time over which the share of bad calls counts.
        backoff_s, backoff_max_s: first and longest time that an open breaker waits before it tries one call.
        slow_s: a call that takes longer is a bad one, whatever it returns; None: half of the tier's `deadline_s`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    failures: Annotated[int, Field(ge=1, le=10_000, strict=True)] = 5
    window_s: Seconds = 30.0
    backoff_s: Seconds = 1.0
    backoff_max_s: Seconds = 60.0
    slow_s: Seconds | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.backoff_s > self.backoff_max_s:
            raise ValueError(f"backoff_s {self.backoff_s:g} is more than backoff_max_s {self.backoff_max_s:g}")
        return self


class Breaker:
    """See the module's docstring. Changed by one thread; `state`, `wait_s` and `troubled` may be read by others.

    Args:
        clock: seconds, never going back.
        seed: of the jitter, which takes up to half off a back-off.

    Attributes:
        opened: how often it has opened.
    """

    def __init__(
        self, config: BreakerConfig, clock: Callable[[], float] = time.monotonic, seed: int | None = None
    ) -> None:
        self.opened = 0
        self._config = config
        self._clock = clock
        self._jitter = random.Random(seed)
        self._until: float | None = None  # None: closed
        self._ticket = 0  # of the calls whose answers count; changes when it opens or closes
        self._probing = False
        self._level = 0
        self._closed_at: float | None = None
        self._last_bad: float | None = None
        self._in_a_row = 0
        self._calls: deque[tuple[float, bool]] = deque()
        self._bad = 0

    @property
    def state(self) -> BreakerState:
        """What it is now."""
        until = self._until
        if until is None:
            return "closed"
        return "open" if self._clock() < until else "half_open"

    @property
    def wait_s(self) -> float:
        """Seconds until an open breaker is half open; 0 in other states."""
        until = self._until
        return 0.0 if until is None else max(0.0, until - self._clock())

    @property
    def admits(self) -> bool:
        """A call may be made now."""
        state = self.state
        return state == "closed" or (state == "half_open" and not self._probing)

    @property
    def troubled(self) -> bool:
        """It is not closed, or something was bad within the window."""
        last = self._last_bad
        return self._until is not None or (last is not None and self._clock() - last < self._config.window_s)

    def begin(self) -> int | None:
        """Ask to make a call. Returns a ticket to `end` it with, exactly once; None: do not make it."""
        if not self.admits:
            return None
        self._probing = self._until is not None
        return self._ticket

    def end(self, ticket: int, *, good: bool) -> None:
        """Say how a call went. Calls that began before the breaker last opened or closed decide nothing."""
        if ticket == self._ticket:
            self._count(good)

    def void(self, ticket: int) -> None:
        """End a call that says nothing, good or bad."""
        if ticket == self._ticket:
            self._probing = False

    def strike(self) -> None:
        """Count something bad that is not the end of one call, such as the death of a process."""
        if self.state != "open":
            self._count(False)

    def _count(self, good: bool) -> None:
        now = self._clock()
        if not good:
            self._last_bad = now
        if self._until is not None:
            if good:
                self._close(now)
            else:
                self._level += 1
                self._open(now)
            return
        self._in_a_row = 0 if good else self._in_a_row + 1
        self._calls.append((now, good))
        self._bad += not good
        while len(self._calls) > WINDOW_CALLS or now - self._calls[0][0] >= self._config.window_s:
            self._bad -= not self._calls.popleft()[1]
        often = len(self._calls) >= RATE_CALLS and self._bad >= RATE_OF_BAD * len(self._calls)
        if self._in_a_row >= self._config.failures or often:
            steady = self._closed_at is None or now - self._closed_at >= self._config.window_s
            self._level = 0 if steady else self._level + 1
            self._open(now)

    def _open(self, now: float) -> None:
        longest = self._config.backoff_max_s
        wait = min(longest, self._config.backoff_s * 2 ** min(self._level, 30))
        self._until = now + wait * self._jitter.uniform(0.5, 1.0)
        self.opened += 1
        self._turn()

    def _close(self, now: float) -> None:
        self._until = None
        self._closed_at = now
        self._turn()

    def _turn(self) -> None:
        self._ticket += 1
        self._probing = False
        self._in_a_row = self._bad = 0
        self._calls.clear()
