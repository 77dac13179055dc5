"""One engine's scheduler for the test of kills: stores, fetches and loads, compares every byte, times every call.

    python kill_client.py SOCKET ENGINE TENSOR PAGES BLOCK_BYTES SEED REPORT

Runs until SIGTERM. Each line of REPORT is JSON: {"wrong": n, "late": [...], "loaded": n, "calls": n}, appended now and
then, so that a client that is killed has said what it saw.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from flexkv_core.blocks import block_keys
from flexkv_core.layout import KVGroup, ModelSpec
from flexkv_core.server import connect

DEADLINE_S = 1.0
GRACE_S = 0.2
BLOCK_SIZE, BLOCKS = 4, 8
PROMPTS = 12
"""So few that engines share prefixes, which each of them may have stored."""


def content(key: np.ndarray, size: int) -> np.ndarray:
    return np.frombuffer(hashlib.shake_128(key.tobytes()).digest(size), np.uint8)


class Engine:
    def __init__(self, socket: str, name: str, tensor: str, pages: int, size: int, seed: int, report: str) -> None:
        self.random = random.Random(seed)
        self.size, self.pages = size, pages
        self.tensor = np.memmap(tensor, np.uint8, "r+", shape=(pages, size))
        self.report = Path(report)
        self.seen: dict[str, Any] = {"wrong": 0, "late": [], "loaded": 0, "calls": 0, "stored": 0}
        self.next_page = 0
        self.client = connect(socket, engine=name, deadline_s=DEADLINE_S)
        spec = ModelSpec("kills", BLOCK_SIZE, (KVGroup(size),))
        self.namespace = self.client.register(spec)

    def timed(self, what: str, limit_s: float, call: Any, *arguments: Any) -> Any:
        started = time.monotonic()
        result = call(*arguments)
        took = time.monotonic() - started
        self.seen["calls"] += 1
        if took > limit_s + GRACE_S:
            self.seen["late"].append([what, round(took, 3)])
        return result

    def take_pages(self, count: int) -> np.ndarray:
        """Pages that no copy of before can touch: they go round, and copies end long before."""
        if self.next_page + count > self.pages:
            self.next_page = 0
        pages = np.arange(self.next_page, self.next_page + count, dtype=np.int64)
        self.next_page += count
        return pages

    def step(self) -> None:
        tokens = np.random.default_rng(self.random.randrange(PROMPTS)).integers(0, 1 << 31, BLOCKS * BLOCK_SIZE)
        keys = block_keys(tokens.astype(np.int32), BLOCK_SIZE, self.namespace.root)
        keys = keys[: self.random.randrange(1, BLOCKS + 1)]
        if self.random.random() < 0.4:
            self.store(keys)
        else:
            self.load(keys)

    def store(self, keys: np.ndarray) -> None:
        pages = self.take_pages(len(keys))
        for page, key in zip(pages, keys, strict=True):
            self.tensor[page] = content(key, self.size)
        transfer = self.timed("store", DEADLINE_S, self.client.store, self.namespace, keys, pages)
        self.timed("wait", DEADLINE_S, self.client.wait, transfer, DEADLINE_S)
        if not transfer.done:
            self.client.cancel(transfer)
        elif transfer.error is None:
            self.seen["stored"] += transfer.blocks

    def load(self, keys: np.ndarray) -> None:
        found = self.timed("lookup", DEADLINE_S, self.client.lookup, self.namespace, keys)
        fetch = self.timed("fetch", DEADLINE_S, self.client.fetch, self.namespace, keys, DEADLINE_S)
        self.timed("wait", DEADLINE_S, self.client.wait, fetch, DEADLINE_S)
        if fetch.done and fetch.ready:
            pages = self.take_pages(fetch.ready)
            self.tensor[pages] = 0xEE
            transfer = self.timed("load", DEADLINE_S, self.client.load, fetch, pages)
            self.timed("wait", DEADLINE_S, self.client.wait, transfer, DEADLINE_S)
            if transfer.done and transfer.error is None:
                self.seen["loaded"] += len(pages)
                for page, key in zip(pages, keys, strict=False):
                    self.seen["wrong"] += not np.array_equal(self.tensor[page], content(key, self.size))
        self.timed("release", DEADLINE_S, fetch.release)
        del found

    def tell(self) -> None:
        with self.report.open("a") as file:
            file.write(json.dumps(self.seen) + "\n")
        self.seen = {"wrong": 0, "late": [], "loaded": 0, "calls": 0, "stored": 0}


def main() -> None:
    socket, name, tensor, pages, size, seed, report = sys.argv[1:]
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    engine = Engine(socket, name, tensor, int(pages), int(size), int(seed), report)
    steps = 0
    while not ended:
        engine.step()
        steps += 1
        if steps % 10 == 0:
            engine.tell()
        time.sleep(engine.random.uniform(0, 0.01))
    engine.tell()
    engine.client.close()
    os._exit(0)


if __name__ == "__main__":
    main()
