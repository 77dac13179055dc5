"""What the manager hands to its callers: the results of lookups and the handles of fetches and transfers.

Handles are made and settled by the manager's owner thread and may be waited on by any thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass

from flexkv_core.plans import FetchPlan


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a prefix would find now.

    Attributes:
        blocks: leading blocks that some tier holds; a hint where a tier is key-addressed.
        host_blocks: leading blocks ready in host memory.
        pending: True while a tier is starting, or is being asked whether it holds more of this prefix (a probe): ask
            again for a better answer. Never True where all blocks are held.
    """

    blocks: int
    host_blocks: int
    pending: bool


class Fetch:
    """A prefix on its way into host memory, pinned there until `release`.

    Attributes:
        ready: leading blocks verified and pinned; grows until `done`.
        done: nothing more will come (complete, failed in part, past the deadline, cancelled).
        sources: after `done`, tier name -> leading blocks that came from it.
        held: where its blocks were when it began, once that is known: (tier name, blocks), from the first block on;
            "" stands for host memory. Empty where all of them were in host memory.
        released: its pins are gone, or go when its last load ends; `why` says what took them: "released",
            "cancelled", "expired" (kept beyond the time limit), "reset" (of its namespace) or "refused" (the log says
            why it could not be planned); "" before.
    """

    __slots__ = (
        "_event",
        "_release",
        "_watcher",
        "done",
        "held",
        "keep",
        "loads",
        "plan",
        "ready",
        "released",
        "sources",
        "timers",
        "why",
    )

    def __init__(self, release: Callable[[Fetch], None], *, keep: bool = True) -> None:
        self.ready = 0
        self.done = False
        self.sources: dict[str, int] = {}
        self.held: list[tuple[str, int]] = []
        self.plan: FetchPlan | None = None
        self.loads = 0
        self.released = False
        self.why = ""
        self.keep = keep  # False: nobody waits for it, so it is released when it is done
        self.timers: list[asyncio.TimerHandle] = []
        self._release = release
        self._watcher: Callable[[Fetch], None] | None = None
        self._event = threading.Event()

    def watch(self, watcher: Callable[[Fetch], None]) -> None:
        """Have `watcher(fetch)` called on the owner thread whenever `ready`, `done` or `released` has changed."""
        self._watcher = watcher

    def changed(self) -> None:
        """Tell the watcher (owner thread)."""
        if self._watcher is not None:
            self._watcher(self)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until `done`; returns it."""
        return self._event.wait(timeout_s)

    def release(self) -> None:
        """Unpin; blocks being loaded stay pinned until their load has ended. Safe to call twice."""
        self._release(self)

    def settle(self) -> None:
        """Mark done (owner thread)."""
        self.done = True
        self._event.set()
        self.changed()


class Transfer:
    """A load or a store under way.

    Attributes:
        done: it has ended: nothing of it will touch device or host memory any more.
        blocks: after `done`, device blocks copied (a store that found all blocks held copies none).
        error: why it failed ("cancelled", say), or None.
        cancelled: `KVCacheManager.cancel` was called for it before it ended.
        tag: the caller's name for it, which workers in other processes are told too.
        owner: whose it is, see `flexkv_core.plans.Move`.
    """

    __slots__ = ("_event", "_settling", "_then", "blocks", "cancelled", "done", "error", "owner", "tag")

    def __init__(self, tag: str = "", owner: int = 0) -> None:
        self.tag = tag
        self.owner = owner
        self._then: Callable[[Transfer], None] | None = None
        self.done = False
        self.blocks = 0
        self.error: str | None = None
        self.cancelled = False
        self._event = threading.Event()
        self._settling = threading.Lock()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until `done`; returns it."""
        return self._event.wait(timeout_s)

    def then(self, act: Callable[[Transfer], None]) -> None:
        """Have `act(transfer)` called once when it is done, on the thread that settles it; at once if it is."""
        with self._settling:
            if not self.done:
                self._then = act
                return
        act(self)

    def settle(self, blocks: int, error: str | None = None) -> None:
        """Mark done, by the owner thread or the thread that copied; the first call counts."""
        with self._settling:
            if self.done:
                return
            self.blocks, self.error, self.done = blocks, error, True
        self._event.set()
        if self._then is not None:
            self._then(self)
