"""What happens to stores in a world of the manager's state machine, and to namespaces and tiers meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter, deque
from pathlib import Path

import numpy as np
from machine_gates import PATIENCE_S, Name
from machine_world import Base, Model, Store, pick


class Stores(Base):
    """Operations: store, storm, aim_store, aim_write, rest, reset, kill, return_."""

    def __init__(self, kind: str, dice: random.Random, root: Path, taken: Counter[str]) -> None:
        self.scatter_fails = False
        self.sunk: deque[tuple[Model, tuple[int, ...]]] = deque(maxlen=16)
        super().__init__(kind, dice, root, taken)

    def steps(self) -> tuple[int, ...]:
        """A path in the tree of prompts."""
        dice = self.dice
        rest = dice.choices((0, 1), (4, 1), k=dice.randrange(8))
        return (dice.randrange(7), *rest)

    def store(self, steps: tuple[int, ...] | None = None) -> Store | None:
        dice, model = self.dice, self.dice.choice(self.models)
        keys = model.path(steps or self.steps())
        if len(model.free) < len(keys):
            return None
        pages = [model.free.pop() for _ in keys]
        names: set[Name] = set()
        tables = []
        for group, spec in enumerate(model.groups):
            share = dice.choice((1.0, 1.0, 1.0, 0.7))
            table = np.array([page if dice.random() < share else -1 for page in pages], np.int64)
            above = None
            for key, page in zip(keys, table.tolist(), strict=True):
                if page >= 0:
                    names.add((key.tobytes(), group))
                    self.parents[key.tobytes()] = above
                    self.gates.sizes[key.tobytes(), group] = spec.block_bytes
                    model.fill(page, group, key.tobytes())
                above = key.tobytes()
            tables.append(table)
        transfer = self.manager.store(model.namespace, keys, tables if len(tables) > 1 else tables[0])
        store = Store(transfer, model, model.namespace.root, names, pages)
        self.stores.append(store)
        return store

    def storm(self) -> None:
        """Several prompts sink to the lower tiers: what is not pinned has to go from host memory."""
        self._all_return()
        self.rest()
        for _ in range(self.dice.randint(2, 4)):
            steps = self.steps()
            store = self.store(steps)
            if store is None:
                return
            assert store.transfer.wait(PATIENCE_S), "a store does not end"
            assert self.manager.drain(PATIENCE_S), "the manager does not come to rest"
            self.reap()
            self.sunk.append((store.model, steps))

    def aim_write(self) -> None:
        """A write that is held, and then what may happen to it."""
        self._all_return()
        self.gates.open_all()
        self.gates.shut.add("write")
        store = self.store()
        if store is None:
            return
        assert store.transfer.wait(PATIENCE_S), "a store does not end"
        self.settle(0.02)
        act = self.dice.choices(("kill", "reset", "go"), (5, 1, 1))[0]
        if act == "kill":
            self.kill("write")
        elif act == "reset":
            self._reset(store.model)
        if self.dice.random() < 0.5:
            self.gates.open("write")

    def aim_store(self) -> None:
        """A store that is held in some phase, and then what may happen to it."""
        dice = self.dice
        kind = dice.choice(("gather", "seal"))
        self.gates.shut.add(kind)
        if dice.random() < 0.25:
            self.gates.failing["gather", dice.randrange(2)] += 1
        store = self.store((dice.randrange(30, 1000), 0, 1)[: dice.randint(1, 3)])
        if store is None:
            self.gates.open_all()
            return
        if dice.random() < 0.8:
            self.settle()
        act = dice.choices(("cancel", "reset", "go"), (6, 2, 4))[0]
        if act == "cancel":
            self._cancel_store(store)
        elif act == "reset":
            self._reset(store.model)
        elif dice.random() < 0.4:
            self.gates.open_all()
            assert store.transfer.wait(PATIENCE_S), "a store does not end"
            self._cancel_store(store)
        if dice.random() < 0.5:
            self.gates.open(kind)

    def _phase(self, store: Store) -> str:
        places = {(id(device), page) for device in store.model.devices for page in store.pages}
        if store.transfer.done:
            return "done"
        for held in self.gates.waiting("gather", "seal"):
            if held.kind == "gather" and places & set(held.names):
                return "gather"
            if held.kind == "seal" and store.names & set(held.names):
                return "seal"
        return "queued"

    def _cancel_store(self, store: Store) -> None:
        phase = self._phase(store)
        self.manager.cancel(store.transfer)
        self.say(f"cancel a store: {phase}")

    def rest(self) -> None:
        """Everything goes on, and comes to its end."""
        self.gates.open_all()
        for entry in (*self.stores, *self.loads):
            assert entry.transfer.wait(PATIENCE_S), "a transfer does not end"
        self.scatter_fails = False
        if self.dice.random() < 0.5:
            assert self.manager.drain(PATIENCE_S), "the manager does not come to rest"

    # ---------------------------------------------------------------- resets, deaths

    def reset(self) -> None:
        self._reset(self.dice.choice(self.models))

    def _reset(self, model: Model) -> None:
        root = model.namespace.root
        self.reap()
        stores = [store for store in self.stores if store.root == root]
        fetches = [f for f in self.fetches if f.root == root]
        loads = [load for load in self.loads if load.of.root == root]
        under_way = {
            "store": any(not store.transfer.done for store in stores),
            "fetch": any(not f.fetch.done for f in fetches),
            "load": any(not load.transfer.done for load in loads),
        }
        for what in [what for what, is_so in under_way.items() if is_so]:
            self.say(f"reset during a {what}")
        for store in stores:
            store.reset = True
            store.overtaken = self._phase(store) == "gather"
        self.old.append(model.namespace)
        model.namespace = self.manager.reset(model.namespace)
        self.sync()
        for f in fetches:
            assert f.fetch.done, "a fetch of a namespace that was reset goes on"
            assert f.fetch.released

    def kill(self, during: str = "") -> None:
        """A tier dies; during a call of that kind, if there is one."""
        links = {number: link for number, link in self.links.items() if link.state == "ready"}
        named = {held.where for held in self.gates.waiting(during)} if during else set()
        called = [number for number in links if self.planner.tiers[number].name in named]
        number = pick(self.dice, called or list(links))
        if number is None:
            return
        link, book = links[number], self.planner.tiers[number]
        waiting = any(not f.fetch.done for f in self.fetches)
        self.mortal.add(book.name)
        if self.kind == "process":
            queue = self.scheduler.queues()[number]
            for _ in range(20 if during else 0):
                if queue.in_flight:
                    break
                time.sleep(0.001)
            reading = waiting and queue.in_flight
            writing = queue.in_flight and queue.queued_bytes
            if link.pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it has crashed by itself meanwhile
                    os.kill(link.pid, signal.SIGKILL)
                self.say("kill -9")
                self.taken["kill -9 during a fetch"] += bool(reading)
                self.taken["kill -9 during a write"] += bool(writing)
            return
        if waiting and self.gates.waiting("read", where=book.name):
            self.say("kill during a fetch")
        if self.gates.waiting("write", where=book.name):
            self.say("kill during a write")
        self.gates.dead.add(book.name)
        self.scheduler.ask(link.die)
        self.gates.let_go(self.gates.waiting(where=book.name), broken=True)
        self.until(lambda: link.calls == 0, "the end of the calls of a dead tier")
        if not link.capabilities.persistent and book.name in self.gates.media:
            self.gates.media[book.name].clear()
        self.scheduler.ask(link.died)

    def return_(self) -> None:
        """A tier that had died comes back."""
        number = pick(self.dice, self._away())
        if number is None:
            return
        link = self.links[number]
        self.gates.dead.discard(self.planner.tiers[number].name)
        self.scheduler.ask(link.restart)
        if self.dice.random() < 0.5:
            self.store()
        self.scheduler.ask(link.opened_again)
        self.say("a tier returns")

    def _away(self) -> list[int]:
        return [n for n, link in self.links.items() if link.state == "backoff" and self.kind != "process"]

    def _all_return(self) -> None:
        while self._away():
            self.return_()
