"""What the server tells a client unasked: which blocks of its namespaces come and go.

Owns the way of one client's notices to its connection, and their bound: a client that does not read is told, when it
does again, that nothing it knew counts any more. A notice is sent the moment something changes, so it is ahead of every
answer that was given later. Does not own what changes (`flexkv_core.changes`). All on the owner's thread, where the
manager makes its changes.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import numpy as np
import numpy.typing as npt

from flexkv_core.index import Keys
from flexkv_core.server import messages as m
from flexkv_core.server.connection import Connection

MAX_UNREAD_BYTES = 1 << 20
"""Beyond what the socket takes: a client that has left so much unread is told no more until it has read that."""
BLOCKS_A_NOTICE = 8192


class Notices:
    """A `flexkv_core.changes.Watcher` for one client.

    Args:
        namespaces: roots that the client has registered.
        on_owner: calls on the owner's thread, at once if this is it.
    """

    def __init__(
        self, connection: Connection, namespaces: Container[bytes], on_owner: Callable[[Callable[[], None]], None]
    ) -> None:
        self._connection = connection
        self._namespaces = namespaces
        self._on_owner = on_owner
        self._missed = False
        connection.on_drained = self._drained

    def committed(self, tier: int, root: bytes | None, keys: Keys, groups: npt.NDArray[np.uint8]) -> None:
        """As `Watcher.committed`."""
        self._blocks(m.Committed, tier, root, keys, groups)

    def dropped(self, tier: int, root: bytes | None, keys: Keys, groups: npt.NDArray[np.uint8]) -> None:
        """As `Watcher.dropped`."""
        self._blocks(m.Dropped, tier, root, keys, groups)

    def cleared(self, tier: int) -> None:
        """As `Watcher.cleared`."""
        self._on_owner(lambda: self._send(m.Cleared(tier)))

    def _blocks(
        self,
        kind: type[m.Committed | m.Dropped],
        tier: int,
        root: bytes | None,
        keys: Keys,
        groups: npt.NDArray[np.uint8],
    ) -> None:
        if root is not None and root not in self._namespaces:
            return
        for at in range(0, len(groups), BLOCKS_A_NOTICE):
            piece = slice(at, at + BLOCKS_A_NOTICE)
            notice = kind(tier, groups[piece].tobytes(), keys[piece].tobytes())
            self._on_owner(lambda notice=notice: self._send(notice))  # type: ignore[misc]

    def _send(self, notice: m.Committed | m.Dropped | m.Cleared) -> None:
        self._missed = self._missed or self._connection.unsent > MAX_UNREAD_BYTES
        if not self._missed:
            self._connection.send(notice)

    def _drained(self) -> None:
        """The client has read all that it was sent."""
        if self._missed:
            self._missed = False
            self._connection.send(m.Cleared(None))
