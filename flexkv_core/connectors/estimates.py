"""What things take, from what they took: seconds by size, of a tier, of a copy, of an engine's prefill.

Owns how measurements become an estimate that one outlier does not spoil and that follows when a medium has changed.
Pure arithmetic: what is measured, and by which clock, is for others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

DECAY = 0.8
"""A measurement counts so much less with each that comes after it."""
FAR = 4.0
"""Measurements that are so many times more or less than expected are outliers, or a new state of what is measured."""
SPREAD = 0.25
"""Sizes whose deviation is less than this share of their mean do not tell a latency from a rate."""
LEAST_S = 1e-9
"""Nothing takes less: estimates may be divided by."""
EVERY = 8
"""Of steps without a prompt, one of so many is measured: there are many, and all are delayed by it."""
MOST_STEPS = 16
"""Steps of an engine that are under way at a time, at most."""


class Line:
    """Seconds as a latency and a rate: by least squares over sizes, the latest counting most.

    What is known of sizes that are all alike is used carefully: less takes as long, more takes in proportion. No
    estimate is outside of that: neither latency nor rate is ever negative. A measurement far off the estimate counts as
    `FAR` times off; with the second in a row on the same side, all before them are forgotten.
    """

    def __init__(self) -> None:
        self._outlier: tuple[float, float, bool] | None = None  # the last measurement, if far off: and above?
        self._forget()

    def _forget(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, size: float, seconds: float) -> None:
        """So much has taken so long; sizes above 0."""
        seconds = max(seconds, LEAST_S)
        expected = self.predict(size)
        outlier, self._outlier = self._outlier, None
        if expected is not None and not expected / FAR <= seconds <= expected * FAR:
            above = seconds > expected
            if outlier is not None and outlier[2] == above:
                self._forget()
                self._add(*outlier[:2])
            else:
                self._outlier = (size, seconds, above)
                seconds = expected * FAR if above else expected / FAR
        self._add(size, seconds)

    def _add(self, size: float, seconds: float) -> None:
        self._n = DECAY * self._n + 1
        self._x = DECAY * self._x + size
        self._y = DECAY * self._y + seconds
        self._xx = DECAY * self._xx + size * size
        self._xy = DECAY * self._xy + size * seconds

    def predict(self, size: float) -> float | None:
        """Seconds for so much; None: nothing is known. Never less for more."""
        if not self._n:
            return None
        x, y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - x * x
        if variance <= (SPREAD * x) ** 2:
            return y * max(1.0, size / x)
        slope = (self._xy / self._n - x * y) / variance
        slope = min(max(slope, 0.0), y / x)
        return max(y + slope * (size - x), LEAST_S)


class Proportional(Line):
    """Seconds in proportion to size: large measurements count more than small ones."""

    def predict(self, size: float) -> float | None:
        per_unit = self.per_unit
        return None if per_unit is None else size * per_unit

    @property
    def per_unit(self) -> float | None:
        return max(self._y / self._x, LEAST_S) if self._n else None


class PrefillSpeed:
    """What an engine takes to compute a token of a prompt, beyond what a step takes without any.

    Steps may overlap, as they do where the next is scheduled before the last has ended: a step has the engine to itself
    from the end of the one before.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, int, bool]] = deque(maxlen=MOST_STEPS)
        self._last_end = 0.0
        self._tokens = Proportional()
        self._rest = Proportional()
        self._plain = 0

    def began(self, prompt_tokens: int, *, computes: bool) -> None:
        """A step begins, with so many tokens of prompts. `computes`: it has some token at all."""
        self._steps.append((self._clock(), prompt_tokens, computes))

    def ended(self) -> None:
        """The oldest step that has not ended has."""
        if not self._steps:
            return
        now = self._clock()
        began, tokens, computes = self._steps.popleft()
        seconds = now - max(began, self._last_end)
        self._last_end = now
        if not computes or seconds <= 0:
            return
        if not tokens:
            if self._plain % EVERY == 0:
                self._rest.observe(1, seconds)
            self._plain += 1
            return
        rest = self._rest.per_unit or 0.0
        if seconds >= 2 * rest:  # else what the prompts took is lost in the noise of the rest
            self._tokens.observe(tokens, seconds - rest)

    @property
    def token_s(self) -> float | None:
        """Seconds a token; None until it was seen."""
        return self._tokens.per_unit
