"""The two ways to serve a request of a trace: simulated, and with bytes on a CPU device.

Owns the order of calls on the cache for one request, their timing and the check of every byte. Does not own
the loop over requests (`replay.py`) or what is made of the results (`report.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flexkv_core.cli.content import BlockContent
from flexkv_core.errors import HostMemoryError, StateError
from flexkv_core.models import KVGeometry

Keys = npt.NDArray[np.uint8]

TRANSFER_TIMEOUT_S = 60.0
"""A copy between host memory and a CPU device that takes longer will not end: the replay stops then."""
DRAIN_TIMEOUT_S = 30.0
START_TIMEOUT_S = 30.0
START_ATTEMPTS = 5
"""Restarts (about 3 s with their back-off) after which a tier that has never opened is not waited for."""
FETCH_GRACE_S = 1.0
"""Waited beyond a fetch's own deadline, so that it is the manager that ends a slow fetch."""


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one request.

    Attributes:
        blocks: complete blocks of the request.
        hit_blocks: leading blocks that the cache supplied (with bytes: loaded to the device).
        hits_by_tier: the same by tier name.
        lookup_seconds: time of the lookup alone.
        wrong_blocks: loaded blocks with any byte other than its key demands.
        load_bytes, load_seconds, store_bytes, store_seconds: payload moved between host memory and the
            device, and the time from the call until the transfer had completed.
    """

    blocks: int
    hit_blocks: int
    hits_by_tier: Mapping[str, int]
    lookup_seconds: float
    wrong_blocks: int = 0
    load_bytes: int = 0
    load_seconds: float = 0.0
    store_bytes: int = 0
    store_seconds: float = 0.0


class Runner(Protocol):
    """Serves the requests of one namespace, one after another."""

    @property
    def root(self) -> bytes:
        """The namespace's root, which `block_keys` starts from."""

    @property
    def notes(self) -> list[str]:
        """What the reader of the report must know, such as a drain that was given up."""

    def serve(self, keys: Keys, at_s: float) -> Served:
        """Look up, load, check and store the blocks of one request.

        Args:
            keys: (n, 32) uint8, n >= 1.
            at_s: seconds of the trace when it came. A cache with bytes goes by the machine's clock instead.
        """

    def stats(self) -> Mapping[str, Any]:
        """The cache's counters, by tier under "tiers"."""


class SimulatedRunner:
    """Asks a `SimulatedCache`: the index and policies of the stack, without bytes."""

    def __init__(self, cache: Any, namespace: Any) -> None:
        self._cache = cache
        self.root: bytes = namespace.root
        self.notes: list[str] = []

    def serve(self, keys: Keys, at_s: float) -> Served:
        outcome = self._cache.request(self.root, keys, at_s)
        return Served(outcome.blocks, outcome.hit_blocks, dict(outcome.hits_by_tier), outcome.lookup_seconds)

    def stats(self) -> Mapping[str, Any]:
        stats: Mapping[str, Any] = self._cache.stats()
        return stats


@dataclass(slots=True)
class DevicePages:
    """Tensors of a CPU device, a layer each, and the order in which their pages are handed to requests.

    Pages are handed out scattered and differently for each request: a copy to the wrong page is seen.
    """

    tensors: list[npt.NDArray[Any]]
    content: BlockContent
    _order: npt.NDArray[np.int64] = field(init=False)
    _next: int = 0

    def __post_init__(self) -> None:
        self._order = np.random.default_rng(0).permutation(self.content.pages).astype(np.int64)

    @classmethod
    def allocate(cls, geometry: KVGeometry, block_size: int, pages: int) -> DevicePages:
        """Make (2, pages, tokens, heads, dim) tensors; HostMemoryError if the machine has not as much."""
        needed = geometry.block_bytes(block_size) * pages
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > machine:
            raise HostMemoryError(
                f"the device pages of the longest request, {pages} blocks, need {needed} bytes and the "
                f"machine has {machine}: use smaller blocks, --limit, or --simulate"
            )
        shape = geometry.tensor_shape(pages, block_size)
        tensors = [np.zeros(shape, geometry.storage_dtype) for _ in range(geometry.layers)]
        return cls(tensors, BlockContent(tensors))

    def take(self, count: int) -> npt.NDArray[np.int64]:
        """Return `count` different pages, as (count,) int64; the request before may have had them too."""
        taken = self._order[(self._next + np.arange(count)) % len(self._order)]
        self._next = (self._next + count) % len(self._order)
        return taken


class BytesRunner:
    """Moves bytes: lookup, fetch, load, check, fill the rest as a model would, store, drain."""

    def __init__(self, manager: Any, namespace: Any, pages: DevicePages, fetch_deadline_s: float) -> None:
        """`manager`: a `KVCacheManager` on which `namespace` was registered with the tensors of `pages`."""
        self._manager = manager
        self._namespace = namespace
        self._pages = pages
        self._fetch_deadline_s = fetch_deadline_s
        self._draining = True
        self.root: bytes = namespace.root
        self.notes: list[str] = []

    def serve(self, keys: Keys, at_s: float) -> Served:
        content = self._pages.content
        pages = self._pages.take(len(keys))
        started = time.perf_counter()
        lookup = self._manager.lookup(self._namespace, keys)
        lookup_seconds = time.perf_counter() - started
        content.poison(pages)
        ready, load_seconds = 0, 0.0
        sources: dict[str, int] = {}
        if lookup.blocks:
            ready, sources, load_seconds = self._load(keys, pages)
        wrong = content.wrong(keys[:ready], pages[:ready])
        # what was wrong is put right, so that one lost byte is counted once and not stored again
        refill = np.concatenate([np.flatnonzero(wrong), np.arange(ready, len(keys))])
        content.fill(keys[refill], pages[refill])
        stored, store_seconds = self._store(keys, pages)
        return Served(
            blocks=len(keys),
            hit_blocks=ready,
            hits_by_tier=sources,
            lookup_seconds=lookup_seconds,
            wrong_blocks=int(wrong.sum()),
            load_bytes=ready * content.block_bytes,
            load_seconds=load_seconds,
            store_bytes=stored * content.block_bytes,
            store_seconds=store_seconds if stored else 0.0,
        )

    def stats(self) -> Mapping[str, Any]:
        stats: Mapping[str, Any] = self._manager.stats()
        return stats

    def _load(self, keys: Keys, pages: npt.NDArray[np.int64]) -> tuple[int, dict[str, int], float]:
        fetch = self._manager.fetch(self._namespace, keys, deadline_s=self._fetch_deadline_s)
        try:
            fetch.wait(self._fetch_deadline_s + FETCH_GRACE_S)
            ready = int(fetch.ready)
            sources = dict(fetch.sources)
            if not ready:
                return 0, {}, 0.0
            started = time.perf_counter()
            transfer = self._manager.load(fetch, pages[:ready])
            self._finish(transfer, f"load of {ready} blocks")
            return ready, sources, time.perf_counter() - started
        finally:
            fetch.release()

    def _store(self, keys: Keys, pages: npt.NDArray[np.int64]) -> tuple[int, float]:
        """Offer all blocks; returns how many were copied (those not held yet) and how long that took."""
        started = time.perf_counter()
        transfer = self._manager.store(self._namespace, keys, pages)
        self._finish(transfer, f"store of {len(keys)} blocks")
        seconds = time.perf_counter() - started
        if self._draining and not self._manager.drain(DRAIN_TIMEOUT_S):
            self._draining = False
            self.notes.append(
                f"a lower tier did not take all writes within {DRAIN_TIMEOUT_S:.0f} s; the replay went on "
                "without waiting, so hits may differ from a simulated replay"
            )
        return int(transfer.blocks), seconds

    def _finish(self, transfer: Any, what: str) -> None:
        if not self._manager.wait(transfer, TRANSFER_TIMEOUT_S):
            raise StateError(f"{what} did not complete within {TRANSFER_TIMEOUT_S:.0f} s")
        if transfer.error is not None:
            raise StateError(f"{what} failed: {transfer.error}")


def _why(tier: Mapping[str, Any]) -> str:
    return str(tier["last_error"] or "its backend has not answered yet")


def await_tiers(manager: Any, timeout_s: float = START_TIMEOUT_S) -> list[str]:
    """Wait until every tier's backend has opened, so that no early write is dropped.

    Returns a note for each tier that has not, at the timeout or after `START_ATTEMPTS` failed restarts. The replay
    goes on without it; it may still come up.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        tiers = manager.stats()["tiers"]
        away = {name: tier for name, tier in tiers.items() if tier["state"] != "ready"}
        if not away:
            return []
        if time.monotonic() > deadline or all(tier["restarts"] >= START_ATTEMPTS for tier in away.values()):
            return [f"tier {name} does not open and is a miss: {_why(tier)}" for name, tier in away.items()]
        time.sleep(0.01)
