"""A cache without bytes: the planner with every move succeeding at once.

What it reports is what a real stack would do whose tiers never fail and whose queues are always empty: the same
index, the same policies, the same decisions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexkv_core.blocks import Namespace
from flexkv_core.books import make_planner, open_books
from flexkv_core.config import StackConfig
from flexkv_core.errors import StateError
from flexkv_core.index import Keys
from flexkv_core.layout import ModelSpec
from flexkv_core.planner import Planner
from flexkv_core.plans import Deletion, Move, Outcome
from flexkv_core.tier_book import TierBook


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """What one request found.

    Attributes:
        blocks: complete blocks of the request.
        hit_blocks: leading blocks that the cache supplied.
        hits_by_tier: tier name -> hit blocks.
        lookup_seconds: time of the lookup alone.
    """

    blocks: int
    hit_blocks: int
    hits_by_tier: dict[str, int]
    lookup_seconds: float


class SimulatedCache:
    """One model's requests against a stack, no bytes moved. Capacities may be given in blocks or be unbounded."""

    def __init__(self, stack: StackConfig) -> None:
        self._stack = stack
        self._books: list[TierBook] = []
        self._planner: Planner | None = None
        self._now_us = 0

    def register(self, model: ModelSpec) -> Namespace:
        """Size the tiers for this model. Once only: capacities in blocks are of one block size."""
        if self._planner is not None:
            raise StateError("a simulated cache serves one model: make another one for the next")
        sizes = {group.slot_bytes for group in model.groups}
        opened = open_books(self._stack, simulated_slot_bytes=max(sizes))
        self._books = opened.books
        self._planner = make_planner(
            opened.books,
            lambda: self._now_us,
            pin_budget_bytes=int(self._stack.pin_budget * opened.host_bytes),
            index=self._stack.index,
        )
        namespace = Namespace.of(model)
        self._planner.add_model(namespace.root, model.groups)
        return namespace

    def request(self, root: bytes, keys: Keys, at_s: float = 0.0) -> RequestOutcome:
        """Serve one request: look up, fetch what is there, store the rest, write through.

        Args:
            at_s: when it came, in seconds from any start; for policies that count in seconds.
        """
        self._now_us = round(at_s * 1e6)
        planner = self._planner
        if planner is None:
            raise StateError("register a model first")
        start = time.perf_counter()
        planner.lookup(root, keys)
        seconds = time.perf_counter() - start
        fetch = planner.begin_fetch(root, keys)
        for move in fetch.reads:
            planner.finish_read(move, np.full(len(move), Outcome.GOOD, np.uint8))
        served = planner.close_fetch(fetch)
        hits = planner.ready(fetch)
        for move in planner.sink_hits(fetch):
            self._write(planner, move)
        planner.release(fetch)
        offered = np.ones((len(fetch.pinned), len(keys)), np.bool_)
        for move in planner.commit_store(planner.begin_store(root, keys, offered)):
            self._write(planner, move)
        by_tier = {self._books[number].name: blocks for number, blocks in served.items()}
        return RequestOutcome(len(keys), hits, by_tier, seconds)

    @staticmethod
    def _write(planner: Planner, move: Move) -> None:
        write, deletion = planner.down.start_write(move)
        if deletion is not None:
            _succeed(planner, deletion)
        if write is not None:
            planner.down.finish_write(write, np.ones(len(write), np.bool_))

    def stats(self) -> dict[str, Any]:
        """The figures of `KVCacheManager.stats` that mean something without bytes."""
        return {"tiers": {book.name: {**book.figures(), "state": "simulated"} for book in self._books}}


def _succeed(planner: Planner, deletion: Deletion) -> None:
    planner.down.finish_deletion(deletion, np.ones(len(deletion.groups), np.bool_))
