"""A client of the server: its requests, and what it has under way.

Owns a client's fetches, transfers and namespaces, which end with it. Each request is answered exactly once, whatever
happens. A client whose socket closed may still have its engine running: what it holds is released when its process is
gone (by pidfd), when it said goodbye, or when the same process came back; it is over at once if it holds nothing.
Does not own agents (`agent_session.py`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flexkv_core import handles
from flexkv_core.blocks import Namespace
from flexkv_core.errors import (
    FlexKVError,
    KeyInputError,
    KeyTypeError,
    LayoutError,
    ManagerClosedError,
    StateError,
    UnknownNamespaceError,
)
from flexkv_core.framing import WireError
from flexkv_core.index import Keys
from flexkv_core.layout import ModelSpec
from flexkv_core.manager import KVCacheManager
from flexkv_core.server import messages as m
from flexkv_core.server.agent_session import Engine
from flexkv_core.server.connection import Connection
from flexkv_core.server.notices import Notices
from flexkv_core.server.peers import Peer

logger = logging.getLogger("flexkv.server")

MAX_FETCHES = 1024
MAX_TRANSFERS = 512
MAX_NAMESPACES = 1 << 16
"""What one client may have under way, or registered."""
KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (UnknownNamespaceError, "namespace"),
    (KeyInputError, "input"),
    (KeyTypeError, "input"),
    (LayoutError, "input"),
    (ManagerClosedError, "stopping"),
    (StateError, "state"),
)


class BusyError(FlexKVError):
    """This client has too much under way."""


class Shell(Protocol):
    """What a session needs of the server."""

    @property
    def manager(self) -> KVCacheManager | None:
        """None while host memory is being prepared."""

    @property
    def stopping(self) -> bool: ...

    def figures(self) -> dict[str, Any]:
        """The manager's figures and the server's own."""

    def on_owner(self, act: Callable[[], None]) -> None:
        """Call on the owner's thread."""

    def observe(self, what: str, seconds: float) -> None:
        """A lookup, a fetch that is no prefetch, a load or a store has taken so long."""

    def drain(self, timeout_s: float, answer: Callable[[bool], None]) -> None:
        """Have all written down, off the owner's thread."""

    def reset(self, namespace: Namespace, session: ClientSession) -> Namespace:
        """Begin a fresh epoch for one client."""

    def unused(self, namespace: Namespace) -> None:
        """A client uses it no more."""


class ClientSession:
    """See the module's docstring. On the owner's thread.

    Args:
        number: of this client, the owner of its reads and writes.
        on_over: called once, when the client is gone and holds nothing any more.
    """

    def __init__(
        self,
        shell: Shell,
        engine: Engine,
        connection: Connection,
        peer: Peer,
        hello: m.Hello,
        loop: asyncio.AbstractEventLoop,
        number: int,
        on_over: Callable[[ClientSession], None],
    ) -> None:
        self.number = number
        self.hello = hello
        self.peer = peer
        self.over = False
        self.requests = 0
        self.since = time.time()
        self.namespaces: dict[bytes, tuple[Namespace, ModelSpec]] = {}
        self._shell = shell
        self._engine = engine
        self._connection = connection
        self._loop = loop
        self._on_over = on_over
        self._fetches: dict[int, handles.Fetch] = {}
        self._transfers: dict[int, handles.Transfer] = {}
        self._notices = Notices(connection, self.namespaces, shell.on_owner) if hello.notices else None
        self._watching = False
        self._handlers: dict[type, Callable[[KVCacheManager, Any], None]] = {
            m.Lookup: self._lookup,
            m.Fetch: self._fetch,
            m.Load: self._load,
            m.Store: self._store,
            m.Register: self._register,
            m.Reset: self._reset,
            m.Drain: self._drain,
        }
        engine.clients += 1
        connection.trust(self._on_message, self._on_closed)
        peer.watch(loop, lambda: self.end(f"process {peer.pid} has ended"))

    @property
    def connected(self) -> bool:
        return self._connection.open

    def figures(self) -> dict[str, Any]:
        """What it has under way, as plain data."""
        return {
            "pid": self.peer.pid,
            "role": self.hello.role,
            "engine": self.hello.engine,
            "connected": self.connected,
            "since": self.since,
            "requests": self.requests,
            "fetches": len(self._fetches),
            "transfers": len(self._transfers),
            "namespaces": len(self.namespaces),
        }

    # ---------------------------------------------------------------- life

    def _on_closed(self, connection: Connection, reason: str) -> None:
        if self.over:
            return
        logger.info("client %s of engine %r: %s", self.peer.pid, self.hello.engine, reason)
        self._cancel_all(self._transfers)  # its client has given them up, and may use the device blocks again
        self._end_if_idle()

    def _cancel_all(self, under_way: Mapping[int, handles.Fetch | handles.Transfer]) -> None:
        manager = self._shell.manager
        if manager is not None:
            for target in list(under_way.values()):
                manager.cancel(target)

    def _end_if_idle(self) -> None:
        """A client that is away, and holds nothing, is forgotten."""
        if not (self.connected or self._fetches or self._transfers):
            self.end("it is away and holds nothing")

    def end(self, reason: str) -> None:
        """Release all that it holds. Safe to call twice."""
        if self.over:
            return
        self.over = True
        self.peer.forget(self._loop)
        self._connection.close(reason)
        self._cancel_all(self._transfers)
        self._cancel_all(self._fetches)
        self._fetches.clear()
        self._transfers.clear()
        if self._notices is not None and self._shell.manager is not None:
            self._shell.manager.unwatch(self._notices)
        self._engine.clients -= 1
        self._on_over(self)
        namespaces = list(self.namespaces.values())
        self.namespaces.clear()
        for namespace, _ in namespaces:
            self._shell.unused(namespace)

    # ---------------------------------------------------------------- messages

    def _on_message(self, connection: Connection, body: bytes) -> None:
        message = m.parse_from_client(body)
        self.requests += 1
        if isinstance(message, m.Release):
            fetch = self._fetches.pop(message.fetch, None)
            if fetch is not None:
                fetch.release()
        elif isinstance(message, m.Cancel):
            self._cancel(message)
        elif isinstance(message, m.Unregister):
            known = self.namespaces.pop(message.root, None)
            if known is not None:
                self._shell.unused(known[0])
        elif isinstance(message, m.Bye):
            self.end("goodbye")
        elif isinstance(message, m.Null):
            self._send(m.Ended(message.id, ok=True))
        elif isinstance(message, m.Stats):
            self._answer(
                message.id, lambda: self._send(m.Figures(message.id, json.dumps(self._shell.figures()).encode()))
            )
        else:
            self._request(message)

    def _request(self, message: m.FromClient) -> None:
        handler = self._handlers.get(type(message))
        if handler is None or self.hello.role == "observer":
            raise WireError(f"{type(message).__name__} is not for a {self.hello.role}")
        number: int = message.id  # type: ignore[union-attr]
        manager = self._shell.manager
        if manager is None or self._shell.stopping:
            kind = "starting" if manager is None else "stopping"
            self._send(m.Failed(number, kind, f"the server is {kind}"))
            return
        self._answer(number, lambda: handler(manager, message))

    def _answer(self, number: int, act: Callable[[], None]) -> None:
        """Carry out a request; whatever goes wrong is an answer too."""
        try:
            act()
        except WireError:
            raise
        except BusyError as error:
            self._send(m.Failed(number, "busy", str(error)))
        except Exception as error:
            kind = next((kind for kinds, kind in KINDS if isinstance(error, kinds)), "internal")
            if kind == "internal":
                logger.exception("a request of client %s failed", self.peer.pid)
            self._send(m.Failed(number, kind, str(error) or type(error).__name__))

    def _send(self, message: m.FromServer) -> None:
        self._connection.send(message)

    def _known(self, root: bytes) -> tuple[Namespace, ModelSpec]:
        known = self.namespaces.get(root)
        if known is None:
            raise UnknownNamespaceError("this namespace is not registered or was reset: call register() again")
        return known

    # ---------------------------------------------------------------- models

    def _register(self, manager: KVCacheManager, message: m.Register) -> None:
        if len(self.namespaces) >= MAX_NAMESPACES:
            raise BusyError(f"{MAX_NAMESPACES} namespaces are registered: unregister those that are not used")
        if self._notices is not None and not self._watching:
            self._watching = True
            manager.watch(self._notices)
        namespace = manager.register(message.model, epoch=message.epoch)
        self.namespaces[namespace.root] = (namespace, message.model)
        self._send(m.Registered(message.id, namespace.epoch))

    def _reset(self, manager: KVCacheManager, message: m.Reset) -> None:
        namespace, model = self._known(message.root)
        for fetch in [each for each in self._fetches.values() if each.plan and each.plan.root == message.root]:
            manager.cancel(fetch)  # where others go on in the old epoch, the manager lets it be
        fresh = self._shell.reset(namespace, self)
        del self.namespaces[message.root]
        self.namespaces[fresh.root] = (fresh, model)
        self._send(m.Registered(message.id, fresh.epoch))

    # ---------------------------------------------------------------- lookups and fetches

    def _lookup(self, manager: KVCacheManager, message: m.Lookup) -> None:
        started = time.perf_counter()
        namespace, _ = self._known(message.root)
        found = manager.lookup(namespace, m.keys_of(message.keys))
        self._send(m.Found(message.id, found.blocks, found.host_blocks, found.pending))
        self._shell.observe("lookup", time.perf_counter() - started)

    def _fetch(self, manager: KVCacheManager, message: m.Fetch) -> None:
        number = message.id
        if number in self._fetches:
            raise WireError(f"fetch {number} is under way already")
        if len(self._fetches) >= MAX_FETCHES:
            raise BusyError(f"{MAX_FETCHES} fetches are under way or not released")
        namespace, _ = self._known(message.root)
        started = time.perf_counter()
        keys = m.keys_of(message.keys)
        if message.keep:
            fetch = manager.fetch(namespace, keys, message.deadline_s, owner=self.number, avoid=message.avoid)
        else:
            fetch = manager.prefetch(namespace, keys, message.deadline_s, owner=self.number)
        self._fetches[number] = fetch
        told_done = False

        def tell(fetch: handles.Fetch) -> None:
            nonlocal told_done
            took = time.perf_counter() - started
            if fetch.done and not told_done:
                told_done = True
                if message.keep:
                    self._shell.observe("fetch", took)
            if self._fetches.get(number) is not fetch:
                return
            self._send(m.Progress(number, fetch.ready, fetch.done, fetch.sources, fetch.why, fetch.held, took))
            if fetch.done and not fetch.ready:
                fetch.release()  # there is nothing to load: it holds nothing
            if fetch.done and (fetch.released or not fetch.ready):
                del self._fetches[number]
                self._end_if_idle()

        fetch.watch(lambda fetch: self._shell.on_owner(lambda: tell(fetch)))

    def _cancel(self, message: m.Cancel) -> None:
        manager = self._shell.manager
        target = self._fetches.get(message.target) or self._transfers.get(message.target)
        if manager is not None and target is not None:
            manager.cancel(target)

    # ---------------------------------------------------------------- copies

    def _blocks(self, raw: list[bytes]) -> list[npt.NDArray[np.int64]]:
        return [m.numbers_of(each) for each in raw]

    def _load(self, manager: KVCacheManager, message: m.Load) -> None:
        fetch = self._fetches.get(message.fetch)
        if fetch is None or fetch.plan is None:
            self._send(m.Moved(message.id, 0, "the fetch was released"))
            return
        namespace, model = self._known(fetch.plan.root)
        ranks = self._engine.ranks_of(model)
        self._move(
            message.id,
            "load",
            lambda: manager.load(fetch, self._blocks(message.blocks), ranks=ranks, tag=message.tag),
            (namespace, fetch.plan.keys[: fetch.ready], 0),
        )

    def _store(self, manager: KVCacheManager, message: m.Store) -> None:
        namespace, model = self._known(message.root)
        ranks = self._engine.ranks_of(model)
        keys, blocks = m.keys_of(message.keys), self._blocks(message.blocks)
        self._move(
            message.id,
            "store",
            lambda: manager.store(namespace, keys, blocks, ranks=ranks, tag=message.tag, owner=self.number),
            (namespace, keys, min(_first_offered(each) for each in blocks)),
        )

    def _move(
        self, number: int, what: str, begin: Callable[[], handles.Transfer], named: tuple[Namespace, Keys, int]
    ) -> None:
        """Begin a load or a store. `named`: namespace, path and first position of the blocks that it names."""
        if number in self._transfers:
            raise WireError(f"transfer {number} is under way already")
        if len(self._transfers) >= MAX_TRANSFERS:
            raise BusyError(f"{MAX_TRANSFERS} loads and stores are under way")
        started = time.perf_counter()
        transfer = begin()
        self._transfers[number] = transfer

        def tell(transfer: handles.Transfer) -> None:
            self._shell.observe(what, time.perf_counter() - started)
            if self._transfers.pop(number, None) is not None:
                if self._notices is not None and self._shell.manager is not None and transfer.error is None:
                    self._shell.manager.tell_held(*named, self._notices)
                self._send(m.Moved(number, transfer.blocks, transfer.error))
                self._end_if_idle()

        transfer.then(lambda transfer: self._shell.on_owner(lambda: tell(transfer)))

    def _drain(self, manager: KVCacheManager, message: m.Drain) -> None:
        self._shell.drain(message.timeout_s, lambda ok: self._send(m.Ended(message.id, ok=ok)))


def _first_offered(blocks: npt.NDArray[np.int64]) -> int:
    """The first position that has a device block; the number of positions where none has."""
    offered = np.flatnonzero(blocks >= 0)
    return int(offered[0]) if len(offered) else len(blocks)
