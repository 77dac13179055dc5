"""Handles of a client's fetches and transfers, like those of `flexkv_core.handles`.

Own what the server has said of them so far. They are changed by the client with its channel's condition held.
"""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

from flexkv_core.server import messages as m


class Waiter(Protocol):
    """What handles need of their client."""

    def pump(self) -> None:
        """Take in what has come."""

    def wait(self, target: Any, timeout_s: float | None = None) -> bool:
        """Wait until a handle is done."""

    def release(self, fetch: ClientFetch) -> None:
        """Unpin a fetch."""

    def give_up(self, fetch: ClientFetch) -> None:
        """End a fetch of which the server has said nothing in time."""


class ClientFetch:
    """As `flexkv_core.handles.Fetch`. Attributes are up to date whenever they are read.

    `why` may also be "server": it went away, and the pins with it, or it was silent at the fetch's `limit`, a time of
    the monotonic clock.

    Attributes:
        held: as of `Fetch`, as far as has been read; `steps` likewise: (ready blocks, seconds since it began on the
            server's clock) whenever there were more.
    """

    def __init__(self, client: Waiter, number: int, root: bytes, limit: float) -> None:
        self._client = client
        self.number = number
        self.root = root
        self.limit = limit
        self._ready = 0
        self._done = False
        self._sources: dict[str, int] = {}
        self._why = ""
        self.held: list[tuple[str, int]] = []
        self.steps: list[tuple[int, float]] = []

    @property
    def ready(self) -> int:
        """Leading blocks verified and pinned; grows until `done`."""
        self._refresh()
        return self._ready

    @property
    def ended(self) -> bool:
        """`done`, as far as has been read."""
        return self._done

    @property
    def done(self) -> bool:
        """Nothing more will come."""
        if not self._done:
            self._refresh()
        return self._done

    def _refresh(self) -> None:
        self._client.pump()
        if not self._done and time.monotonic() >= self.limit:
            self._client.give_up(self)

    @property
    def sources(self) -> dict[str, int]:
        """After `done`, tier name -> leading blocks that came from it."""
        return self._sources

    @property
    def released(self) -> bool:
        """Its pins are gone; `why` says what took them."""
        self._refresh()
        return bool(self._why)

    @property
    def why(self) -> str:
        return self._why

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until `done`; returns it."""
        return self._client.wait(self, timeout_s)

    def release(self) -> None:
        """Unpin. Safe to call twice."""
        self._client.release(self)

    def end(self, why: str) -> None:
        """It is over, by no word of the server's."""
        self._done = True
        self._why = self._why or why

    def take(self, message: m.Progress) -> None:
        if not self._done:
            self.held = message.held
            self.steps.append((message.ready, message.seconds))
        self._ready, self._done, self._sources = message.ready, message.done, message.sources
        self._why = self._why or message.why


class ClientTransfer:
    """As `flexkv_core.handles.Transfer`.

    It has no deadline: while the server hangs it is not done, since its copies may begin or go on when it awakes.
    """

    limit = math.inf

    def __init__(self, client: Waiter, number: int) -> None:
        self._client = client
        self.number = number
        self.blocks = 0
        self.error: str | None = None
        self._done = False

    @property
    def ended(self) -> bool:
        """`done`, as far as has been read."""
        return self._done

    @property
    def done(self) -> bool:
        """It has ended. If the server went away, a copy may still run in a worker."""
        if not self._done:
            self._client.pump()
        return self._done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until `done`; returns it."""
        return self._client.wait(self, timeout_s)

    def end(self, blocks: int, error: str | None) -> None:
        self.blocks, self.error, self._done = blocks, error, True
