"""One world of the manager's state machine: a manager over some stack, models with devices, and what may be returned.

The model is small on purpose. `stored` names the blocks of stores that ended well; nothing else may ever be seen, but
for blocks of a store that is under way and has passed the gates of all ranks. What is seen has the bytes that its key
demands (`machine_gates.content`). Everything under way must end, and leave nothing behind.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from machine_gates import COPIES, PATIENCE_S, Complaints, Current, GatedDevice, Gates, Name, content, resources

from flexkv_core.blocks import block_keys
from flexkv_core.handles import Fetch, Transfer
from flexkv_core.layout import Coverage, KVGroup, ModelSpec
from flexkv_core.manager import KVCacheManager

PAGES, TOKENS, SLOT, POISON = 40, 2, 8192, 0xA5
SLACK_S = 10.0
"""What a call may take beyond its deadline on a machine that does much else."""

SHAPES: dict[str, tuple[int, tuple[KVGroup, ...]]] = {
    "plain": (1, (KVGroup(4096),)),
    "mixed": (1, (KVGroup(4096), KVGroup(2000, Coverage.window(2)), KVGroup(6000, Coverage("state")))),
    "halves": (2, (KVGroup(4096),)),
    "uneven": (
        2,
        (KVGroup(4000, shard_bytes=(1000, 3000)), KVGroup(3000, Coverage.window(3), shard_bytes=(0, 3000))),
    ),
    "same": (2, (KVGroup(4096, replicated=True), KVGroup(4096, Coverage.window(2)))),
}
"""Ranks and KV groups."""

FAULTS = {"error": 0.04, "corrupt": 0.12, "short": 0.03, "lost": 0.04, "delay": 0.02, "delay_s": 0.002}


def stack_of(kind: str, dice: random.Random, root: Path) -> dict[str, Any]:
    """A stack of small tiers with options by chance."""

    def tier(backend: str, name: str, **options: Any) -> dict[str, Any]:
        made = {"backend": backend, "name": name, "isolation": "none", "deadline_s": 30.0, **options}
        made["write_queue"] = dice.choice((4, 8, 64)) * SLOT
        made["in_flight"] = dice.choice((2, 8, 64)) * SLOT
        if backend.startswith("gate"):
            made |= {"tier": name, "concurrency": dice.choice((1, 2, 3)), "max_batch_blocks": dice.choice((2, 5, 32))}
        if dice.random() < 0.5 and not (backend == "cpu" or "faults" in options):
            made["faults"] = {**FAULTS, "seed": dice.randrange(1 << 30)}
        return made

    cpu = {"backend": "cpu", "name": "cpu", "capacity": dice.choice((24, 40)) * SLOT}
    kept = tier("gate-kept", "kept", capacity=dice.choice((60, 120)) * SLOT)
    keyed = tier("gate-keyed", "keyed", persistent=False)
    slots = tier("gate-slotted", "slots", capacity=64 * SLOT, persistent=dice.random() < 0.5)
    crash = {"crash": 0.01, "hang": 0.01, "delay": 0.6, "delay_s": 0.05, "corrupt": 0.05, "seed": dice.randrange(99)}
    directory = {"capacity": 100 * SLOT, "root": str(root / "kv")}
    process = {"isolation": "process", "deadline_s": 1.0, "faults": crash}
    tiers = {
        "kept": lambda: [cpu, kept],
        "kept+keyed": lambda: [cpu, kept, keyed],
        "slots+kept": lambda: [cpu, slots, kept],
        "staging": lambda: [kept, keyed],
        "directory": lambda: [cpu, tier("cpu", "second", capacity=48 * SLOT), tier("directory", "dir", **directory)],
        "process": lambda: [cpu, tier("directory", "dir", **directory, **process)],
    }[kind]()
    return {
        "tiers": tiers,
        "pin_budget": dice.choice((0.3, 0.6, 0.9)),
        "pin_limit_s": dice.choice((0.03, 600.0)),
        **({"state_directory": str(root / "state")} if kind.partition("+")[0] in ("kept", "slots", "staging") else {}),
    }


@dataclass(eq=False)
class Model:
    """A model and its devices: one array a rank and group."""

    shape: str
    spec: ModelSpec
    devices: list[GatedDevice]
    arrays: list[list[npt.NDArray[np.uint8] | None]]
    namespace: Any = None
    free: list[int] = field(default_factory=lambda: list(range(PAGES)))
    keys: dict[tuple[bytes, tuple[int, ...]], npt.NDArray[np.uint8]] = field(default_factory=dict)

    @classmethod
    def make(cls, shape: str, name: str) -> Model:
        ranks, groups = SHAPES[shape]
        arrays: list[list[npt.NDArray[np.uint8] | None]] = []
        devices = []
        for rank in range(ranks):
            sizes = [group.shards(ranks)[rank][1] for group in groups]
            arrays.append([np.full((PAGES, size), POISON, np.uint8) if size else None for size in sizes])
            devices.append(GatedDevice([[a] if a is not None else [] for a in arrays[-1]], threads=1))
            devices[-1].rank = rank
        return cls(shape, ModelSpec(name, TOKENS, groups, tensor_parallel=ranks), devices, arrays)

    @property
    def groups(self) -> tuple[KVGroup, ...]:
        return self.spec.groups

    def path(self, steps: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Keys of a path in a tree of prompts."""
        root = self.namespace.root
        if (root, steps) not in self.keys:
            tokens = np.repeat(np.array(steps, np.int32), TOKENS)
            self.keys[root, steps] = block_keys(tokens, TOKENS, root)
        return self.keys[root, steps]

    def shards(self, page: int, group: int) -> Iterable[tuple[npt.NDArray[np.uint8], slice]]:
        """Each rank's bytes of a device block, and which part of the block they are."""
        for arrays, (first, size) in zip(self.arrays, self.groups[group].shards(len(self.devices)), strict=True):
            array = arrays[group]
            if array is not None:
                yield array[page], slice(first, first + size)

    def fill(self, page: int, group: int, key: bytes) -> None:
        whole = content(key, group, self.groups[group].block_bytes)
        for place, part in self.shards(page, group):
            place[:] = whole[part]

    def poison(self, pages: Iterable[int]) -> None:
        for page in pages:
            for group in range(len(self.groups)):
                for place, _ in self.shards(page, group):
                    place[:] = POISON

    def right(self, page: int, group: int, key: bytes | None) -> bool:
        """Whether a device block holds what the key demands (None: nothing was copied there)."""
        whole = None if key is None else content(key, group, self.groups[group].block_bytes)
        return all(
            np.array_equal(place, whole[part]) if whole is not None else bool((place == POISON).all())
            for place, part in self.shards(page, group)
        )


@dataclass(eq=False)
class Store:
    transfer: Transfer
    model: Model
    root: bytes
    names: set[Name]
    pages: list[int]
    reset: bool = False
    overtaken: bool = False  # by a reset, before its copy had ended


@dataclass(eq=False)
class Fetched:
    fetch: Fetch
    model: Model
    root: bytes
    keys: npt.NDArray[np.uint8]
    deadline_s: float
    began: float
    kept: bool


@dataclass(eq=False)
class Load:
    transfer: Transfer
    of: Fetched
    pages: list[int]
    expected: list[tuple[int, int, bytes | None]]  # page, group, key
    copied: int
    cancelled: bool = False
    may_fail: bool = False


class Base:
    """What a world is made of, and what must hold in it at any time; `machine_steps.World` adds what happens."""

    def __init__(self, kind: str, dice: random.Random, root: Path, taken: Counter[str]) -> None:
        self.kind, self.dice, self.taken = kind, dice, taken
        self.log: list[str] = []
        self.gates = Current.gates = Gates()
        self.stored: set[Name] = set()
        self.parents: dict[bytes, bytes | None] = {}  # of keys
        self.mortal: set[str] = set()  # tiers that have been killed, or were there before
        self.before = resources()
        self.complaints = Complaints(self.gates)
        for name in ("flexkv", "asyncio"):
            logging.getLogger(name).addHandler(self.complaints)
        self.config = stack_of(kind, dice, root)
        self.models = [Model.make(dice.choice(list(SHAPES)), f"model {number}") for number in range(2)]
        self.old: list[Any] = []
        self.begin()

    def begin(self) -> None:
        self.manager = KVCacheManager.open(self.config)
        self.killed: set[int] = set()
        self.stores: list[Store] = []
        self.fetches: list[Fetched] = []
        self.loads: list[Load] = []
        self.dropped = 0
        for model in self.models:
            model.namespace = self.manager.register(model.spec, model.devices)
            model.free = list(range(PAGES))
            model.poison(model.free)
        self.scheduler: Any = self.manager._scheduler
        self.planner: Any = self.manager._planner
        self.scheduler.ask(self.scheduler.loop.set_exception_handler, self._raised)

    def _raised(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        trace = "".join(traceback.format_exception(error)) if error else ""
        self.gates.complain(f"on the owner thread: {context['message']} {trace}")

    @property
    def links(self) -> dict[int, Any]:
        return {number: queue.link for number, queue in self.scheduler.queues().items()}

    @property
    def gated(self) -> bool:
        return self.kind not in ("directory", "process")

    def say(self, transition: str) -> None:
        self.taken[transition] += 1
        self.log.append(f"  {transition}")

    # ---------------------------------------------------------------- coming to rest

    def sync(self) -> None:
        """What was called so far has reached the owner thread."""
        for _ in range(2):
            self.scheduler.ask(lambda: None, timeout_s=PATIENCE_S)

    def settle(self, limit_s: float = 0.05) -> None:
        """Wait until whatever is under way is at a gate, or ended; not for long, since faults delay."""
        deadline = time.monotonic() + limit_s
        while True:
            self.sync()
            held = self.gates.waiting()
            copies = sum(h.kind in COPIES for h in held)
            flights = sum(queue.in_flight for queue in self.scheduler.queues().values())
            if (flights <= len(held) - copies and min(self.scheduler._jobs, 2) == copies) or not self.gated:
                return
            if time.monotonic() > deadline:
                return
            time.sleep(0.0005)

    def until(self, true: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < deadline, f"{what}: it never came"
            time.sleep(0.001)

    # ---------------------------------------------------------------- what has ended

    def reap(self) -> None:
        """Take note of what has ended, and check it."""
        assert not self.gates.broken, "\n".join(self.gates.broken)
        for store in [store for store in self.stores if store.transfer.done]:
            self.stores.remove(store)
            if store.transfer.error is None:
                self.stored |= store.names
            self._give_back(store.model, store.pages)
        for load in [load for load in self.loads if load.transfer.done]:
            self.loads.remove(load)
            self._check_load(load)
            self._give_back(load.of.model, load.pages)
        for fetched in [f for f in self.fetches if f.fetch.done and f.fetch.released]:
            self.fetches.remove(fetched)

    def _give_back(self, model: Model, pages: list[int]) -> None:
        model.poison(pages)
        model.free += pages

    def _check_load(self, load: Load) -> None:
        transfer, fetch = load.transfer, load.of.fetch
        if transfer.error is None:
            assert transfer.blocks == load.copied
            for page, group, key in load.expected:
                assert load.of.model.right(page, group, key), f"a load brought wrong bytes ({key is not None})"
        elif "on purpose" in transfer.error:
            assert load.may_fail, "a load failed on a device that does not fail"
        elif transfer.error == "cancelled":
            assert load.cancelled
        else:  # rule 8: a load cannot fail, unless its fetch has lost its pins
            assert fetch.released, f"a load failed: {transfer.error}"
            assert fetch.why in transfer.error

    # ---------------------------------------------------------------- rules at any time

    def judge(self, seen: set[Name]) -> None:
        """Rules 2 and 7: these blocks are visible; may they be?"""
        self.reap()
        unknown = seen - self.stored
        if not unknown:
            return
        gathering = {name for held in self.gates.waiting("gather") for name in held.names}
        sealing = [set(held.names) for held in self.gates.waiting("seal")]
        for name in unknown:
            possible = [store for store in self.stores if name in store.names]
            held = sum(
                any((id(device), page) in gathering for device in store.model.devices for page in store.pages)
                for store in possible
            ) + sum(name in names for names in sealing)
            assert len(possible) > held, f"a block is visible that nobody has stored: {name[0].hex()[:8]} {name[1]}"

    def needed(self, model: Model, blocks: int) -> list[tuple[int, int]]:
        """(position, group) of what a prefix of so many blocks needs."""
        found = []
        for group, spec in enumerate(model.groups):
            first = {"all": 0, "window": blocks - spec.coverage.blocks, "state": blocks - 1}[spec.coverage.kind]
            found += [(position, group) for position in range(max(0, first), blocks)]
        return found

    def names(self, model: Model, keys: npt.NDArray[np.uint8], blocks: int) -> set[Name]:
        return {(keys[position].tobytes(), group) for position, group in self.needed(model, blocks)}

    def check_pins(self) -> None:
        """Rules 1, 3 and 8: what is pinned is right, and what is promised is pinned."""
        host = self.manager._region.array
        seen: set[Name] = set()
        with self.manager._lock:
            for fetched in self.fetches:
                fetch, plan = fetched.fetch, fetched.fetch.plan
                if plan is None or not plan.pinned.any():
                    continue
                for group, position in np.argwhere(plan.pinned).tolist():
                    key = plan.keys[position].tobytes()
                    start = int(plan.slots[group, position]) * 4096
                    whole = content(key, group, fetched.model.groups[group].block_bytes)
                    assert np.array_equal(host[start : start + len(whole)], whole), "a pinned slot has other bytes"
                    seen.add((key, group))
                if fetch.done and not fetch.released:
                    promised = self.needed(fetched.model, fetch.ready)
                    assert all(plan.pinned[group, position] for position, group in promised), "promised, not pinned"
                    assert np.array_equal(plan.keys[: fetch.ready], fetched.keys[: fetch.ready])
            self._check_bounds()
        self.judge(seen)

    def _check_bounds(self) -> None:
        """Rule 5. The caller holds the lock."""
        budget = self.planner._pins.budget
        assert 0 <= self.planner.pinned_bytes <= budget, f"{self.planner.pinned_bytes} pinned of {budget}"
        for number, queue in self.scheduler.queues().items():
            book = self.planner.tiers[number]
            assert queue.queued_bytes <= queue.write_limit, "a write queue beyond its limit"
            if book.presence is not None:
                assert len(book.presence) <= book.presence.max_entries
        for book in self.planner.tiers:
            if book.pool is not None:
                assert book.pool.used_bytes <= book.capacity_bytes

    def inspect(self) -> None:
        """Everything that host memory holds and lookups could see: the right bytes, of committed stores."""
        seen: set[Name] = set()
        host, index = self.manager._region.array, self.planner.index
        with self.manager._lock:
            for model in self.models:
                for group, spec in enumerate(model.groups):
                    copies = index.copies(model.namespace.root, 0, group)
                    for key, slot in zip(copies.keys, copies.slots.tolist(), strict=True):
                        name = (key.tobytes(), group)
                        whole = content(*name, spec.block_bytes)
                        assert np.array_equal(host[slot * 4096 :][: len(whole)], whole), "a copy has other bytes"
                        seen.add(name)
        self.judge(seen)

    # ---------------------------------------------------------------- the end

    def calm(self) -> None:
        """Let everything end, give everything back; then nothing may be left."""
        self.gates.open_all()
        for fetched in self.fetches:
            assert fetched.fetch.wait(PATIENCE_S)
        self.check_pins()
        for entry in (*self.stores, *self.loads):
            assert entry.transfer.wait(PATIENCE_S)
        for fetched in self.fetches:
            fetched.fetch.release()
        assert self.manager.drain(PATIENCE_S), "the manager does not come to rest"
        self.sync()
        self.until(lambda: not self.gates.waiting() and not any(self.gates.running.values()), "a call")
        self.reap()
        self.inspect()
        with self.manager._lock:
            self._check_nothing_left()

    def _check_nothing_left(self) -> None:
        planner, index = self.planner, self.planner.index
        assert index.statistics()["pinned"] == 0, "pins leaked"
        assert planner.pinned_bytes == 0
        assert planner._pins.coming == 0
        assert not planner._incoming
        assert not planner._fetches
        figures = self.manager.stats()
        assert not any(figures[name] for name in ("fetches", "pinned_fetches", "pinned_bytes", "pending_stores"))
        assert not self.manager._copies._transfers
        for book in planner.tiers:
            if book.pool is not None:
                used = sum(book.pool.allocated(number) for number in book.pool.classes)
                assert used == index.count(book.column), f"{book.name}: slots leaked"
            if book.presence is not None:
                assert not book.presence.pinned
                self._check_ancestors(book)
            assert not book.queued
            assert book.reserved_bytes == 0
        for queue in self.scheduler.queues().values():
            assert queue.idle
            assert queue.queued_bytes == queue.in_flight_bytes == 0

    def _check_ancestors(self, book: Any) -> None:
        """A dropped write has dropped its descendants' writes: a tier that lost nothing else holds whole prefixes."""
        counters = book.counters
        if counters.evicted_blocks or counters.missing_blocks or counters.corrupt_blocks or counters.given_up_blocks:
            return
        if counters.failed_blocks and self.links[book.number].capabilities.concurrency > 1:
            return  # what continues a block may have been on its way beside it
        alone = len(self.planner.tiers) == 2  # else another one may have the ancestors
        if book.name in self.mortal or not self.parents or not alone or self.kind == "process":
            return
        keys = np.frombuffer(b"".join(self.parents), np.uint8).reshape(-1, 32)
        held = {key for key, is_there in zip(self.parents, book.presence.held(keys, 0), strict=True) if is_there}
        assert all(self.parents[key] in held for key in held if self.parents[key]), f"{book.name}: a prefix with a hole"

    def close(self, deadline_s: float = 5.0) -> None:
        began = time.monotonic()
        self.manager.close(deadline_s)
        assert time.monotonic() - began < deadline_s + SLACK_S, "close took longer than its deadline"
        for entry in (*self.stores, *self.loads):
            assert entry.transfer.wait(0), "a transfer that nobody will end"
        for fetched in self.fetches:
            assert fetched.fetch.wait(0), "a fetch that nobody will end"

    def deaf(self) -> None:
        for name in ("flexkv", "asyncio"):
            logging.getLogger(name).removeHandler(self.complaints)

    def gone(self) -> None:
        """Nothing of the manager is left in this process."""
        self.gates.open_all()
        self.deaf()
        del self.manager, self.scheduler, self.planner
        self.fetches, self.loads, self.stores = [], [], []
        deadline = time.monotonic() + SLACK_S
        while np.any(np.greater(now := resources(), self.before)):
            gc.collect()
            if time.monotonic() > deadline:
                files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
                names = [thread.name for thread in threading.enumerate()]
                raise AssertionError(f"threads, files, children: {self.before} before, {now} after: {names} {files}")
            time.sleep(0.01)
        assert not self.gates.broken, "\n".join(self.gates.broken)


def pick(dice: random.Random, among: Sequence[Any]) -> Any:
    """One of them, or None."""
    return dice.choice(among) if among else None
