"""What an engine's calls of a connector cost it: counts and seconds by hook, measured inside.

Owns the measuring. Does not own what a hook does, nor where the figures go.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

Hook = TypeVar("Hook", bound=Callable[..., Any])


@dataclass(slots=True)
class Cost:
    """Of one hook since the start."""

    calls: int = 0
    seconds: float = 0.0


class Hooked(Protocol):
    """Who has hooks. `costs`: by name of the hook."""

    costs: dict[str, Cost]


def timed(hook: Hook) -> Hook:
    """Count a hook's calls and their time in the `costs` of whose method it is."""
    name = hook.__name__
    clock = time.perf_counter

    @functools.wraps(hook)
    def measured(self: Hooked, *args: Any, **kwargs: Any) -> Any:
        began = clock()
        try:
            return hook(self, *args, **kwargs)
        finally:
            cost = self.costs.setdefault(name, Cost())
            cost.calls += 1
            cost.seconds += clock() - began

    return cast(Hook, measured)
