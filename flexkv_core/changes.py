"""Who is told which copies come and go, tier by tier.

Owns the list of watchers and what a change looks like to them. Does not own the books that change (`ledger.py`,
`write_through.py`, `hints.py` report to it), nor what becomes of the news (`server/notices.py`). While nobody watches,
a change costs the caller one look at `watched`; else Python's cost is per batch and watcher.

What was there before it was watched is not told, nor what a restarted tier recovers or lists: a watcher learns of it
when it is used (`Ledger.held`).
"""

from __future__ import annotations

import itertools
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flexkv_core.index import Evicted, Keys

Groups = npt.NDArray[np.uint8]


class Watcher(Protocol):
    """Told of changes under the manager's lock, in the order in which they happen: it must not wait, nor raise.

    Keys are (n, 32) uint8 and groups (n,) uint8: the blocks. They lie in the namespace `root`; None: the tier does not
    know in which. `tier` is its number in the stack, 0 for host memory.
    """

    def committed(self, tier: int, root: bytes | None, keys: Keys, groups: Groups) -> None:
        """The tier holds these from now on. It may have held some before."""

    def dropped(self, tier: int, root: bytes | None, keys: Keys, groups: Groups) -> None:
        """The tier does not hold these any more. It may not have held some before."""

    def cleared(self, tier: int) -> None:
        """The tier holds nothing any more."""


class Changes:
    """See the module's docstring. The caller serialises all calls."""

    def __init__(self) -> None:
        self._watchers: list[Watcher] = []

    @property
    def watched(self) -> bool:
        """Whether anybody wants to know."""
        return bool(self._watchers)

    def add(self, watcher: Watcher) -> None:
        """Tell it from now on."""
        self._watchers.append(watcher)

    def remove(self, watcher: Watcher) -> None:
        """Tell it no more. Safe to call twice."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)

    def committed(self, tier: int, root: bytes | None, keys: Keys, groups: Groups) -> None:
        """As `Watcher.committed`."""
        for watcher in self._watchers if len(groups) else ():
            watcher.committed(tier, root, keys, groups)

    def dropped(self, tier: int, root: bytes | None, keys: Keys, groups: Groups) -> None:
        """As `Watcher.dropped`."""
        for watcher in self._watchers if len(groups) else ():
            watcher.dropped(tier, root, keys, groups)

    def evicted(self, tier: int, evicted: Evicted) -> None:
        """Copies of any namespaces have left a slot-addressed tier."""
        if not self._watchers or not len(evicted.groups):
            return
        starts = [0, *(np.flatnonzero((evicted.roots[1:] != evicted.roots[:-1]).any(axis=1)) + 1), len(evicted.groups)]
        for start, stop in itertools.pairwise(starts):
            root = evicted.roots[start].tobytes()
            self.dropped(tier, root, evicted.keys[start:stop], evicted.groups[start:stop])

    def cleared(self, tier: int) -> None:
        """As `Watcher.cleared`."""
        for watcher in self._watchers:
            watcher.cleared(tier)
