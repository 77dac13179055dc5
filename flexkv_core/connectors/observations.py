"""What a connector has done: counts since the start, and what came since an engine last asked, as a plain mapping.

Owns the figures' names, and how such mappings are added up and summed up. A mapping holds text, numbers and lists only,
so that it can go from process to process, and only what is not 0. Does not know engines, nor where figures are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from flexkv_core.connectors.load_or_compute import Decisions

Data = dict[str, dict[str, Any]]
"""`counts` and `decisions`: numbers by name; `hit_tokens`: by tier; `seconds`: lists by name (`fetch`, `load`)."""

COUNTS = {
    "stores": "Stores that were begun.",
    "stored_blocks": "Blocks that stores were begun for.",
    "failed_stores": "Stores that failed or were given up.",
    "failed_loads": "Loads that failed: their requests were computed.",
    "failed_fetches": "Fetches that did not bring all that they were to bring.",
    "left_tokens": "Tokens of hits that were computed, since that was expected to be faster than to load them.",
}
"""By name, what is counted."""
DECISIONS = ("whole", "cut", "not_taken", "gave_up")
"""Of `Decisions`."""
SECONDS = ("fetch", "load")
MOST_SAMPLES = 1024
"""Of seconds that are kept until somebody asks."""


@dataclass(slots=True)
class Counts:
    """Since the start: requests, tokens and blocks.

    Attributes:
        hit_tokens: that were loaded. loads: that were begun. fetches: that are over and found something.
    """

    requests: int = 0
    hit_tokens: int = 0
    fetches: int = 0
    failed_fetches: int = 0
    loads: int = 0
    failed_loads: int = 0
    stores: int = 0
    stored_blocks: int = 0
    failed_stores: int = 0


_COUNTED = ("fetches", "hit_tokens", *(name for name in COUNTS if name in Counts.__slots__))
_DECIDED = ("left_tokens", *DECISIONS)
_counted, _decided = attrgetter(*_COUNTED), attrgetter(*_DECIDED)


class Observations:
    """Counts, and what was observed since the last `take`. `decisions` are counted by their owner."""

    def __init__(self, decisions: Decisions) -> None:
        self.counts = Counts()
        self._decisions = decisions
        self._before = self._now()
        self._tokens: dict[str, int] = {}
        self._seconds: dict[str, list[float]] = {}

    def _now(self) -> tuple[int, ...]:
        return (*_counted(self.counts), *_decided(self._decisions))

    def fetched(self, seconds: float, *, failed: bool) -> None:
        """A fetch that found something is over."""
        self.counts.fetches += 1
        self.counts.failed_fetches += failed
        self._observe("fetch", seconds)

    def loaded(self, seconds: float, tokens: Mapping[str, int]) -> None:
        """A load has brought so many tokens of each tier."""
        self.counts.hit_tokens += sum(tokens.values())
        _add(self._tokens, tokens)
        self._observe("load", seconds)

    def _observe(self, name: str, seconds: float) -> None:
        samples = self._seconds.setdefault(name, [])
        if len(samples) < MOST_SAMPLES:
            samples.append(seconds)

    def take(self) -> Data | None:
        """What came since the last time; None, quickly, if nothing did."""
        now = self._now()
        if now == self._before:
            return None
        pairs = zip((*_COUNTED, *_DECIDED), now, self._before, strict=True)
        more = {name: new - old for name, new, old in pairs if new != old}
        self._before = now
        data: Data = {
            "counts": {name: more[name] for name in COUNTS if name in more},
            "decisions": {name: more[name] for name in DECISIONS if name in more},
            "hit_tokens": self._tokens,
            "seconds": self._seconds,
        }
        self._tokens, self._seconds = {}, {}
        return {name: values for name, values in data.items() if values}


def _add(to: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, list):
            to.setdefault(name, []).extend(value)
        else:
            to[name] = to.get(name, 0) + value


def add(to: Data, more: Mapping[str, Mapping[str, Any]]) -> None:
    """Add up; nothing of `more` is shared with `to` afterwards."""
    for name, values in more.items():
        _add(to.setdefault(name, {}), values)


def summary(data: Mapping[str, Mapping[str, Any]]) -> dict[str, int | float]:
    """As a line of a log has it: means of seconds."""
    figures: dict[str, int | float] = {f"hit tokens of {tier}": n for tier, n in data.get("hit_tokens", {}).items()}
    for name, samples in data.get("seconds", {}).items():
        figures[f"{name}s"] = len(samples)
        figures[f"mean {name} s"] = round(sum(samples) / len(samples), 6)
    figures |= {name.replace("_", " "): value for name, value in data.get("counts", {}).items()}
    return figures | {f"hits {name.replace('_', ' ')}": n for name, n in data.get("decisions", {}).items()}
