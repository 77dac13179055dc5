"""What happens to fetches and loads in a world of the manager's state machine."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
from machine_gates import PATIENCE_S
from machine_stores import Stores
from machine_world import SLACK_S, Fetched, Load, Model, Store, pick

from flexkv_core.errors import StateError


class Fetching(Stores):
    """Operations: fetch, prefetch, aim_fetch, release, expire, load, aim_load, cancel."""

    def fetch(self, *, keep: bool = True, deadline_s: float | None = None, aimed: bool = False) -> Fetched:
        dice, model = self.dice, self.dice.choice(self.models)
        keys = model.path(self.steps())
        for known, steps in dice.sample(self.sunk, len(self.sunk)) if aimed else ():
            found = self.manager.lookup(known.namespace, known.path(steps))
            if found.blocks > found.host_blocks:  # something that only lower tiers have
                model, keys = known, known.path(steps)
                break
        if deadline_s is None:
            deadline_s = dice.choice((0.0, 0.01, 600.0, 600.0, 600.0))
        return self._begin(model, keys, deadline_s, keep=keep)

    def _begin(self, model: Model, keys: npt.NDArray[np.uint8], deadline_s: float, *, keep: bool) -> Fetched:
        if len(self.fetches) > 7:
            self._release(self.fetches[0])
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
        act = dice.choices(("cancel", "kill", "reset", "deadline", "go"), (14, 10, 4, 5, 1))[0]
        if kind == "read" and dice.random() < 0.3:  # one before it, so that it has to wait
            self.fetch(aimed=True, deadline_s=600.0)
        deadline_s = 0.01 if act == "deadline" else 600.0
        fetched = self.fetch(aimed=True, deadline_s=deadline_s, keep=dice.random() < 0.8)
        if dice.random() < 0.3:  # another one waits for the same
            self._begin(fetched.model, fetched.keys, 600.0, keep=True)
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
        fails = dice.random() < 0.3
        if fails:
            self.gates.failing["scatter", dice.randrange(len(fetched.model.devices))] += 1
            self.scatter_fails = True
            for load in self.loads:
                load.may_fail = True
        made = self.load(fetched)
        if made is None:
            return
        if fails and dice.random() < 0.8:
            self.gates.open_copies()
            assert made.transfer.wait(PATIENCE_S), "a load does not end"
            return
        if dice.random() < 0.8:
            self.settle()
        act = dice.choices(("cancel", "release", "reset", "go"), (6, 2, 3, 1))[0]
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
