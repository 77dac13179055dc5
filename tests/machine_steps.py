"""What happens in a world of the manager's state machine: the operations, and how often each transition was taken."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from machine_fetches import Fetching
from machine_gates import KINDS, PATIENCE_S, Held
from machine_world import SLACK_S, SLOT, pick

from flexkv_core.errors import ManagerClosedError, UnknownNamespaceError

WEIGHTS = {
    "store": 7,
    "storm": 8,
    "fetch": 4,
    "prefetch": 2,
    "load": 7,
    "release": 4,
    "lookup": 4,
    "cancel": 5,
    "aim_fetch": 26,
    "aim_store": 10,
    "aim_load": 10,
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


class World(Fetching):
    """See `Base`; `step` takes one operation, `end` closes the world."""

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
            assert error or not store.overtaken, "a store of a namespace that was reset ended well"
            if "on purpose" in error:
                self.say("a rank fails to store")
            elif error:
                assert error in ("cancelled", "the namespace was reset", "the manager was closed"), error
                assert store.transfer.cancelled or store.reset or error == "the manager was closed"
        for load in self.loads:
            if load.transfer.done and "on purpose" in (load.transfer.error or ""):
                self.say("a device fails to load")
        super().reap()

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
        self.mortal |= {tier.name for tier in self.planner.tiers}  # what they had lost before is not known
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
