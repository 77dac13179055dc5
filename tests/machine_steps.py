"""What happens in a world of the manager's state machine: the operations, and how often each transition was taken."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
from machine_gates import KINDS, PATIENCE_S, Held, Name
from machine_world import PAGES, SLACK_S, SLOT, Base, Fetched, Load, Model, Store, pick

from flexkv_core.errors import ManagerClosedError, StateError, UnknownNamespaceError

WEIGHTS = {
    "store": 9,
    "storm": 8,
    "fetch": 6,
    "prefetch": 3,
    "load": 7,
    "release": 4,
    "lookup": 5,
    "cancel": 5,
    "aim_fetch": 22,
    "aim_store": 10,
    "aim_load": 7,
    "aim_write": 5,
    "shut": 2,
    "let_go": 6,
    "open": 8,
    "rest": 4,
    "reset": 1,
    "kill": 2,
    "return_": 4,
    "expire": 3,
    "strangers": 2,
    "figures": 2,
}
"""How often each operation comes, relatively."""

TRANSITIONS = (
    *(f"cancel a fetch: {phase}" for phase in ("queued", "read", "verify", "done")),
    *(f"cancel a store: {phase}" for phase in ("queued", "gather", "seal", "done")),
    *(f"cancel a load: {phase}" for phase in ("queued", "scatter", "done")),
    *(f"reset during a {what}" for what in ("store", "fetch", "load")),
    "release during a load",
    "kill during a fetch",
    "kill during a write",
    "a tier returns",
    "queue full",
    "deadline passes",
    "pin limit passes",
    "budget of pins truncates",
    "no room for a store",
    "a rank fails to store",
    "a device fails to load",
    "corrupt blocks dropped",
    "close with all under way",
    "opened again",
)
"""Each is taken at least 100 times in CI's run."""
PROCESS_TRANSITIONS = ("kill -9 during a fetch", "kill -9 during a write", "kill -9")
"""Of real tier processes, which take their time to start."""


class World(Base):
    """See `Base`; `step` takes one operation, `end` closes the world."""

    def __init__(self, kind: str, dice: random.Random, root: Path, taken: Counter[str]) -> None:
        self.scatter_fails = False
        self.sunk: deque[tuple[Model, tuple[int, ...]]] = deque(maxlen=16)
        super().__init__(kind, dice, root, taken)

    def step(self, operation: str) -> None:
        self.log.append(operation)
        self.taken[operation] += 1
        began = time.monotonic()
        getattr(self, operation)()
        self.reap()
        self.check_pins()
        if self.dice.random() < 0.15:
            self.inspect()
        self._note_drops(operation)
        assert time.monotonic() - began < SLACK_S, f"{operation} took {time.monotonic() - began:.1f} s"

    def say(self, transition: str) -> None:
        self.taken[transition] += 1
        self.log.append(f"  {transition}")

    def _note_drops(self, operation: str) -> None:
        dropped = sum(tier.counters.dropped_blocks for tier in self.planner.tiers[1:])
        if dropped > self.dropped and operation != "kill":
            queues = self.scheduler.queues().values()
            full = [q for q in queues if q.link.state == "ready" and q.queued_bytes + 2 * SLOT > q.write_limit]
            if full:
                self.say("queue full")
        self.dropped = dropped

    def reap(self) -> None:
        for store in [store for store in self.stores if store.transfer.done]:
            error = store.transfer.error or ""
            if "on purpose" in error:
                self.say("a rank fails to store")
            elif error:
                assert error in ("cancelled", "the namespace was reset", "the manager was closed"), error
                assert store.transfer.cancelled or store.reset or error == "the manager was closed"
        for load in self.loads:
            if load.transfer.done and "on purpose" in (load.transfer.error or ""):
                self.say("a device fails to load")
        super().reap()

    # ---------------------------------------------------------------- stores

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
            for key, page in zip(keys, table.tolist(), strict=True):
                if page >= 0:
                    names.add((key.tobytes(), group))
                    self.gates.sizes[key.tobytes(), group] = spec.block_bytes
                    model.fill(page, group, key.tobytes())
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

    # ---------------------------------------------------------------- fetches

    def fetch(self, *, keep: bool = True, deadline_s: float | None = None, aimed: bool = False) -> Fetched:
        dice, model = self.dice, self.dice.choice(self.models)
        keys = model.path(self.steps())
        for known, steps in dice.sample(self.sunk, len(self.sunk)) if aimed else ():
            found = self.manager.lookup(known.namespace, known.path(steps))
            if found.blocks > found.host_blocks:  # something that only lower tiers have
                model, keys = known, known.path(steps)
                break
        if len(self.fetches) > 7:
            self._release(self.fetches[0])
        if deadline_s is None:
            deadline_s = dice.choice((0.0, 0.01, 600.0, 600.0, 600.0))
        begin = self.manager.fetch if keep else self.manager.prefetch
        fetched = Fetched(
            begin(model.namespace, keys, deadline_s),
            model,
            model.namespace.root,
            keys,
            deadline_s,
            time.monotonic(),
            keep,
        )
        self.fetches.append(fetched)
        return fetched

    def prefetch(self) -> None:
        self.fetch(keep=False, aimed=self.dice.random() < 0.5)

    def aim_fetch(self) -> None:
        """A fetch that is held in some phase, and then what may happen to it."""
        dice = self.dice
        kind = dice.choice(("read", "verify"))
        if dice.random() < 0.5:
            self.gates.open_all()
            self._all_return()
        self.gates.shut.add(kind)
        act = dice.choices(("cancel", "kill", "reset", "deadline", "go"), (9, 5, 3, 3, 1))[0]
        deadline_s = 0.01 if act == "deadline" else 600.0
        fetched = self.fetch(aimed=True, deadline_s=deadline_s, keep=dice.random() < 0.8)
        if dice.random() < 0.9:
            self.settle(0.02)
        else:
            self.sync()
        if act == "cancel":
            self._cancel_fetch(fetched)
        elif act == "kill":
            self.kill("read")
        elif act == "reset":
            self._reset(fetched.model)
        elif act == "deadline":
            waiting = not fetched.fetch.done
            assert fetched.fetch.wait(deadline_s + SLACK_S), "a fetch does not end at its deadline"
            if waiting:
                self.say("deadline passes")
        if dice.random() < 0.5:
            self.gates.open(kind)

    def _phases(self, fetched: Fetched) -> set[str]:
        plan = fetched.fetch.plan
        if fetched.fetch.done or plan is None:
            return {"done"}
        with self.manager._lock:
            awaited = {(plan.keys[at].tobytes(), group) for group, at in np.argwhere(plan.awaited).tolist()}
        held = {(name, held.kind) for held in self.gates.waiting("read", "verify") for name in held.names}
        found = {kind for name, kind in held if name in awaited}
        if awaited - {name for name, _ in held} and self.gated and held:
            found.add("queued")
        return found

    def _cancel_fetch(self, fetched: Fetched) -> None:
        for phase in self._phases(fetched):
            self.say(f"cancel a fetch: {phase}")
        self.manager.cancel(fetched.fetch)
        if self.dice.random() < 0.5:
            self.sync()
            assert fetched.fetch.done, "a cancelled fetch is not done"

    def release(self) -> None:
        fetched = pick(self.dice, self.fetches)
        if fetched is not None:
            self._release(fetched)

    def _release(self, fetched: Fetched) -> None:
        if any(load.of is fetched for load in self.loads):
            self.say("release during a load")
        for _ in range(self.dice.choice((1, 1, 2))):
            fetched.fetch.release()

    def expire(self) -> None:
        """Keep a fetch beyond the time limit of pins."""
        limit_s = self.config["pin_limit_s"]
        kept = [f for f in self.fetches if f.deadline_s < 1 and f.kept and not f.fetch.released]
        if limit_s > 1:
            return
        fetched = pick(self.dice, kept) or self.fetch(deadline_s=0.0)
        self.until(lambda: fetched.fetch.released, "the end of a fetch that was kept too long")
        self.until(lambda: fetched.fetch.done, "the end of a fetch")
        if fetched.fetch.why == "expired":
            self.say("pin limit passes")

    # ---------------------------------------------------------------- loads

    def load(self, fetched: Fetched | None = None) -> Load | None:
        dice = self.dice
        fetched = fetched or pick(dice, [f for f in self.fetches if f.fetch.done])
        if fetched is None:
            return None
        fetch, model, plan = fetched.fetch, fetched.model, fetched.fetch.plan
        blocks = min(fetch.ready, len(model.free))
        if dice.random() < 0.3:
            blocks = dice.randint(0, blocks)
        with self.manager._lock:
            pinned = None if plan is None else plan.pinned.copy()
        pages = [model.free.pop() for _ in range(blocks)]
        expected, tables, copied = [], [], 0
        for group in range(len(model.groups)):
            share = dice.choice((1.0, 1.0, 0.6))
            table = np.array([page if dice.random() < share else -1 for page in pages], np.int64)
            for at, page in enumerate(table.tolist()):
                chosen = page >= 0 and pinned is not None and bool(pinned[group, at])
                expected.append((pages[at], group, fetched.keys[at].tobytes() if chosen else None))
                copied += chosen
            tables.append(table)
        may_refuse = not fetched.kept or fetch.why in ("released", "cancelled")
        try:
            transfer = self.manager.load(fetch, tables if len(tables) > 1 else tables[0])
        except StateError:
            assert may_refuse, "a load was refused"
            model.free += pages
            return None
        load = Load(transfer, fetched, pages, expected, copied, may_fail=self.scatter_fails)
        self.loads.append(load)
        return load

    def aim_load(self) -> None:
        """A load that is held in some phase, and then what may happen to it."""
        dice = self.dice
        kept = [f for f in self.fetches if f.fetch.done and f.kept and not f.fetch.released and f.fetch.ready]
        fetched = pick(dice, kept)
        if fetched is None:
            self.gates.open_all()
            fetched = self.fetch(deadline_s=600.0)
            assert fetched.fetch.wait(PATIENCE_S), "a fetch does not end"
        for kind in ("gather", "seal", "verify") if dice.random() < 0.6 else ():
            self.gates.open(kind)
        self.gates.shut.add("scatter")
        if dice.random() < 0.4:
            self.gates.failing["scatter", dice.randrange(len(fetched.model.devices))] += 1
            self.scatter_fails = True
            for load in self.loads:
                load.may_fail = True
        made = self.load(fetched)
        if made is None:
            return
        if dice.random() < 0.8:
            self.settle()
        act = dice.choices(("cancel", "release", "reset", "go"), (6, 3, 2, 2))[0]
        if act == "cancel":
            self._cancel_load(made)
        elif act == "release":
            self._release(fetched)
        elif act == "reset":
            self._reset(fetched.model)
        if dice.random() < 0.5:
            self.gates.open("scatter")

    def _cancel_load(self, load: Load) -> None:
        places = {(id(device), page) for device in load.of.model.devices for page in load.pages}
        held = any(places & set(held.names) for held in self.gates.waiting("scatter"))
        self.say(f"cancel a load: {'done' if load.transfer.done else 'scatter' if held else 'queued'}")
        load.cancelled = True
        self.manager.cancel(load.transfer)

    def cancel(self) -> None:
        """Anything, in any phase."""
        entry = pick(self.dice, [*self.stores, *self.fetches, *self.loads])
        if isinstance(entry, Store):
            if self.dice.random() < 0.3:
                self.gates.open_all()
                assert entry.transfer.wait(PATIENCE_S), "a store does not end"
            self._cancel_store(entry)
        elif isinstance(entry, Fetched):
            self._cancel_fetch(entry)
        elif isinstance(entry, Load):
            if self.dice.random() < 0.3:
                self.gates.open_all()
                assert entry.transfer.wait(PATIENCE_S), "a load does not end"
            self._cancel_load(entry)

    # ---------------------------------------------------------------- gates

    def shut(self) -> None:
        self.gates.shut.add(self.dice.choice(KINDS))

    def let_go(self) -> None:
        """One call goes on."""
        held: Held | None = pick(self.dice, self.gates.waiting())
        if held is not None:
            self.gates.let_go([held])
        if self.dice.random() < 0.5:
            self.settle()

    def open(self) -> None:
        self.gates.open(self.dice.choice(KINDS))
        if self.dice.random() < 0.5:
            self.settle()

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
        if self.kind == "process":
            queue = self.scheduler.queues()[number]
            reading = waiting and queue.in_flight
            writing = queue.in_flight and queue.queued_bytes
            if link.pid is not None:
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

    # ---------------------------------------------------------------- what changes nothing

    def lookup(self) -> None:
        model = self.dice.choice(self.models)
        keys = model.path(self.steps())
        found = self.manager.lookup(model.namespace, keys)
        assert 0 <= found.host_blocks <= found.blocks <= len(keys)
        self.judge(self.names(model, keys, found.blocks) | self.names(model, keys, found.host_blocks))

    def strangers(self) -> None:
        """Namespaces that were reset are not known any more; registering one again gives that of its epoch."""
        model = self.dice.choice(self.models)
        assert self.manager.register(model.spec, model.devices).root == model.namespace.root
        old = pick(self.dice, self.old)
        if old is None:
            return
        keys = np.frombuffer(old.root, np.uint8).reshape(1, 32)
        for call in (self.manager.lookup, self.manager.reset):
            with pytest.raises(UnknownNamespaceError):
                call(old, *([keys] if call == self.manager.lookup else []))
        fetch = self.manager.fetch(old, keys)
        assert fetch.wait(PATIENCE_S)
        assert fetch.ready == 0

    def figures(self) -> None:
        figures = self.manager.stats()
        tiers = figures["tiers"].values()
        assert all(value >= 0 for tier in tiers for value in tier.values() if isinstance(value, int))
        assert figures["pinned_bytes"] <= self.config["pin_budget"] * self.manager._region.size
        assert figures["pending_stores"] <= len(self.stores)

    # ---------------------------------------------------------------- the end

    def end(self) -> None:
        """Close the world, in peace or with everything under way; perhaps open it again; nothing is left."""
        dice = self.dice
        self.log.append("end")
        if dice.random() < 0.5:
            self._close_under_way()
        else:
            self.calm()
            self._note_figures()
            self.close()
        with pytest.raises(ManagerClosedError):
            self.manager.stats() and self.manager.lookup(self.models[0].namespace, np.zeros((0, 32), np.uint8))
        self._leave()
        if dice.random() < 0.45:
            self._open_again()
            self._leave()
        self.gone()

    def _note_figures(self) -> None:
        figures = self.manager.stats()
        self.taken["budget of pins truncates"] += figures["truncated_fetches"]
        self.taken["no room for a store"] += figures["refused_blocks"]
        self.taken["corrupt blocks dropped"] += sum(t["corrupt_blocks"] for t in figures["tiers"].values())

    def _close_under_way(self) -> None:
        dice = self.dice
        for _ in range(dice.randrange(1, 4)):
            self.gates.shut.add(dice.choice(("gather", "read", "write", "verify")))
            self.store()
            self.fetch(aimed=True, deadline_s=600.0)
        if dice.random() < 0.7:
            self.settle()
        self._note_figures()
        if any(not entry.transfer.done for entry in self.stores) or any(not f.fetch.done for f in self.fetches):
            self.say("close with all under way")
        opener = threading.Timer(dice.choice((0.0, 0.02, 0.3)), self.gates.open_all)
        opener.start()
        self.close(dice.choice((0.05, 0.1, 0.2)))
        opener.join()

    def _leave(self) -> None:
        """After a close: nothing of it moves any more."""
        self.gates.open_all()
        self.gates.dead.clear()
        self.until(lambda: threading.active_count() <= self.before[0], "the end of all threads")
        for store in self.stores:
            if store.transfer.error in (None, "the manager was closed"):
                self.stored |= store.names  # it may have been committed
        self.fetches, self.loads, self.stores = [], [], []

    def _open_again(self) -> None:
        """What persistent tiers have kept is served right."""
        self.begin()
        self.say("opened again")
        self.old = []
        self.until(lambda: all(link.state in ("ready", "backoff") for link in self.links.values()), "a tier")
        self.sync()
        for _ in range(8):
            self.lookup()
            fetched = self.fetch(deadline_s=600.0)
            assert fetched.fetch.wait(PATIENCE_S), "a fetch does not end"
            self.check_pins()
            load = self.load(fetched)
            assert load is None or load.transfer.wait(PATIENCE_S)
            self.reap()
            fetched.fetch.release()
        self.store()
        self.calm()
        self.inspect()
        self.close()


__all__ = ["PAGES", "PROCESS_TRANSITIONS", "TRANSITIONS", "WEIGHTS", "World"]
