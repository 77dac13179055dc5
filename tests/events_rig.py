"""What plays an engine and a router where events are tested: see test_events.py."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from server_rig import (
    BLOCK_SIZE,
    PATIENCE_S,
    SPEC,
)

from flexkv_core.blocks import Namespace, block_keys
from flexkv_core.connectors.vllm_events import CPU, STORAGE, Announcements, Removed, Stored
from flexkv_core.index import NO_SLOT
from flexkv_core.layout import ModelSpec
from flexkv_core.manager import KVCacheManager
from flexkv_core.server import Client, ClientTransfer, connect


@dataclass
class Request:
    all_token_ids: list[int]
    lora_request: Any = None


def hash_of(tokens: Sequence[int]) -> int:
    """The "engine's" hash of a block: of all tokens up to its end, and no function of its key."""
    return int.from_bytes(hashlib.md5(repr(list(tokens)).encode()).digest()[:8], "big")


class Form:
    """The engine's form, which is ours here."""

    def __init__(self) -> None:
        self.was_reset = False

    def hashes(self, request: Any, first: int, stop: int) -> list[int]:
        return [hash_of(request.all_token_ids[: (at + 1) * BLOCK_SIZE]) for at in range(first, stop)]

    def extras(self, request: Any, first: int, stop: int) -> list[None]:
        return [None] * (stop - first)

    def engine_reset(self) -> bool:
        was, self.was_reset = self.was_reset, False
        return was

    def stored(self, stored: Stored) -> Stored:
        return stored

    def removed(self, removed: Removed) -> Removed:
        return removed


class Router:
    """(hash, KV group, medium) of all that is announced, and what each is."""

    def __init__(self, *, whole: bool = True) -> None:
        self.known: set[tuple[int, int, int]] = set()
        self.told = 0
        self._whole = whole

    def take(self, events: Sequence[Any]) -> None:
        for event in events:
            self.told += 1
            if isinstance(event, Removed):
                for digest in event.hashes:
                    self.known.remove((digest, event.group, event.medium))
                continue
            parent = event.blocks[0].parent_hash
            for block in event.blocks:
                assert block.parent_hash == parent
                assert not self._whole or parent is None or self.holds(parent), "its parent is not known"
                assert len(block.tokens) == BLOCK_SIZE
                assert (block.hash, event.group, event.medium) not in self.known, "told twice"
                self.known.add((block.hash, event.group, event.medium))
                parent = block.hash

    def holds(self, digest: int) -> bool:
        return any((digest, 0, medium) in self.known for medium in (CPU, STORAGE))

    def in_medium(self, medium: int) -> set[int]:
        return {digest for digest, _, where in self.known if where == medium}


class Engine:
    """A client, what it announces, and a router that listens."""

    def __init__(self, path: Path, spec: ModelSpec = SPEC, *, engine: str = "e", whole: bool = True) -> None:
        self.client: Client = connect(path, engine=engine, notices=True)
        self.spec = spec
        self.form = Form()
        self.events = Announcements(self.client, spec, self.form)  # type: ignore[arg-type]
        self.router = Router(whole=whole)
        self.namespace: Namespace = self.client.register(spec)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def keys(self, tokens: Sequence[int]) -> np.ndarray:
        return block_keys(np.asarray(tokens, np.int32), BLOCK_SIZE, self.namespace.root)

    def begin_store(self, tokens: list[int], first: int = 0) -> ClientTransfer:
        keys = self.keys(tokens)
        blocks = np.arange(len(keys), dtype=np.int64)
        blocks[:first] = -1
        transfer = self.client.store(self.namespace, keys, [blocks] * len(self.spec.groups))
        self.events.watch(transfer, Request(tokens), keys, first)  # type: ignore[arg-type]
        return transfer

    def store(self, tokens: list[int], first: int = 0) -> ClientTransfer:
        transfer = self.begin_store(tokens, first)
        assert transfer.wait(PATIENCE_S)
        return transfer

    def load(self, tokens: list[int]) -> int:
        """Fetch and load what there is; how many blocks."""
        fetch = self.client.fetch(self.namespace, self.keys(tokens), PATIENCE_S)
        assert fetch.wait(PATIENCE_S)
        if fetch.ready:
            transfer = self.client.load(fetch, [np.arange(fetch.ready, dtype=np.int64)] * len(self.spec.groups))
            keys = self.keys(tokens)[: fetch.ready]
            self.events.watch(transfer, Request(tokens), keys, 0)  # type: ignore[arg-type]
            assert transfer.wait(PATIENCE_S)
        fetch.release()
        return fetch.ready

    def reset(self) -> None:
        self.events.reset()
        self.namespace = self.client.reset(self.namespace)

    def listen(self) -> Router:
        """What was said so far has been taken in."""
        self.client.drain(PATIENCE_S)
        self.client.null(b"")
        self.router.take(self.events.take())
        return self.router


def prompt(seed: int, blocks: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 1 << 31, blocks * BLOCK_SIZE)]


def held(manager: KVCacheManager, engine: Engine, prompts: Sequence[list[int]]) -> dict[int, set[int]]:
    """Medium -> hashes of the blocks of these prompts that the books say it holds."""
    found: dict[int, set[int]] = {CPU: set(), STORAGE: set()}
    with manager._lock:
        for tokens in prompts:
            keys = engine.keys(tokens)
            for tier in manager._planner.tiers:
                if tier.presence is not None:
                    there = tier.presence.held(keys, 0)
                else:
                    assert tier.column is not None
                    there = manager._planner.index.residency(engine.namespace.root, keys, tier.column, 0) != NO_SLOT
                for at in np.flatnonzero(there):
                    found[STORAGE if tier.number else CPU].add(hash_of(tokens[: (int(at) + 1) * BLOCK_SIZE]))
    return found
