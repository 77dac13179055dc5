"""The client: the manager's methods, answered by a server. In the engine's scheduler process.

Owns what is asked and not yet answered, and that an engine never waits for a server that does not answer: a call that
runs into its deadline is a miss, and from then on calls are misses at once until the server speaks again. When the
server went away, what was under way ends, calls are misses at once, and later calls connect anew by themselves. Does
not own the connection (`channel.py`), what the server is told of namespaces (`client_names.py`) or starting a server
(`launch.py`).

`lookup` and the others take keys, not tokens: hashing happens here, in the engine's process, by `block_keys`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flexkv_core import __version__
from flexkv_core.arguments import DeviceBlocks, by_group, checked_keys, seconds
from flexkv_core.blocks import Keys, Namespace
from flexkv_core.errors import FlexKVError, LayoutError, ServerAwayError, StateError, UnknownNamespaceError
from flexkv_core.handles import Lookup
from flexkv_core.layout import ModelSpec
from flexkv_core.server import messages as m
from flexkv_core.server.channel import Channel
from flexkv_core.server.client_handles import ClientFetch, ClientTransfer
from flexkv_core.server.client_names import Names
from flexkv_core.server.client_notices import Notice, NoticeBox
from flexkv_core.server.starter import Starter

logger = logging.getLogger("flexkv.client")

CALL_DEADLINE_S = 1.0
FETCH_DEADLINE_S = 10.0
FETCH_GRACE_S = 0.2
"""How long after a fetch's deadline the server's word of it is waited for."""
MAX_UNDER_WAY = 4096
"""Fetches and transfers that have not ended; beyond, new ones end at once."""
AWAY = "the server went away"
BUSY = "too much is under way"
WHY = {"server": "lost with the server"}
_ERRORS: dict[str, Callable[[str], FlexKVError]] = {
    "namespace": UnknownNamespaceError,
    "input": LayoutError,
    "state": StateError,
}


class Client:
    """See the module's docstring. Use `connect`; a context manager; any thread, of the process that made it.

    Args:
        path: of the server's socket.
        engine: the engine's name, shared with its `DeviceAgent`s; default: a random one.
        deadline_s: of calls that have none of their own.
        stack_digest: of the stack that this client would have started; a server with another is only warned about.
        role: "observer" for one who asks for figures only.
        starter: called in a thread of its own, now and then, while the server is away: it should start one.
        notices: be told which blocks of its namespaces come and go (`take_notices`).

    Attributes:
        engine: its name.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        engine: str | None = None,
        deadline_s: float = CALL_DEADLINE_S,
        stack_digest: str = "",
        role: m.Role = "client",
        starter: Callable[[], object] | None = None,
        notices: bool = False,
    ) -> None:
        self._starter = Starter(starter) if starter is not None else None
        self.engine = engine if engine is not None else os.urandom(8).hex()
        self._deadline_s = deadline_s
        self._digest = stack_digest
        self._role = role
        self._session = self._welcomed_session = b""
        self._numbers = itertools.count(1)
        self._answers: dict[int, m.FromServer | None] = {}
        self._fetches: dict[int, ClientFetch] = {}
        self._transfers: dict[int, ClientTransfer] = {}
        self._names = Names(lambda: next(self._numbers))
        self._notices = NoticeBox() if notices else None
        self._suspect = False
        self._heard_at = 0.0
        self._counts = dict.fromkeys(("calls", "away", "timeouts", "busy"), 0)
        self.welcome: m.Welcome | None = None
        self._channel = Channel(os.fspath(path), self._hello, self._received, self._welcomed, self._lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------- the connection (condition held)

    def _hello(self) -> m.Hello:
        self._session = os.urandom(16)
        return m.Hello(
            m.PROTOCOL,
            __version__,
            self._role,
            self.engine,
            self._session,
            previous=self._welcomed_session,  # the last that can hold anything
            stack=self._digest,
            notices=self._notices is not None,
        )

    def _welcomed(self, welcome: m.Welcome) -> None:
        if self._digest and welcome.stack != self._digest and (self.welcome is None or self.welcome != welcome):
            logger.warning("the server (process %d) has another stack than this engine's config", welcome.pid)
        self.welcome = welcome
        self._welcomed_session = self._session
        self._suspect = False
        if self._starter is not None:
            self._starter.succeeded()

    def _lost(self, reason: str) -> None:
        """Nothing that was under way will be answered."""
        self._names.lost()
        if self._notices is not None:
            self._notices.forget()
        self._answers.clear()
        self._suspect = False
        fetches, self._fetches = self._fetches, {}
        transfers, self._transfers = self._transfers, {}
        for fetch in fetches.values():
            fetch.end("server")
        for transfer in transfers.values():
            transfer.end(0, AWAY)

    def _received(self, message: m.FromServer) -> None:
        self._suspect = False
        self._heard_at = time.monotonic()
        if isinstance(message, Notice):
            if self._notices is not None:
                self._notices.put(message)
        elif isinstance(message, m.Progress):
            fetch = self._fetches.get(message.id)
            if fetch is not None:
                fetch.take(message)
                if message.done and (message.why or not message.ready):
                    del self._fetches[message.id]
        elif isinstance(message, (m.Moved, m.Failed)) and message.id in self._transfers:
            transfer = self._transfers.pop(message.id)
            if isinstance(message, m.Moved):
                transfer.end(message.blocks, message.error)
            else:
                transfer.end(0, message.text)
        elif isinstance(message, m.Failed) and message.id in self._fetches:
            self._fetches.pop(message.id).end("reset" if message.kind == "namespace" else "refused")
        elif hasattr(message, "id") and message.id in self._answers:
            self._answers[message.id] = message
        else:
            self._names.answered(message)
        if isinstance(message, m.Failed) and message.kind == "namespace":
            self._names.lost()  # the server has forgotten some: say them again

    # ---------------------------------------------------------------- calls

    def _check(self) -> None:
        self._channel.check_process()
        if self._channel.state == "closed":
            raise StateError("this client was closed: connect() again")

    def pump(self) -> None:
        """Take in what has come. Never waits."""
        self._channel.pump()

    def _usable(self) -> bool:
        """Whether the server may be asked now, as far as is known; begins to connect where it is time."""
        self._counts["calls"] += 1
        self._channel.pump()
        if self._channel.state != "open":
            self._channel.connect()
            self._channel.pump()
        if self._channel.state == "open" and not self._suspect:
            with self._channel.changed:
                for message in self._names.to_say():
                    self._channel.send(message, request=False)
            return True
        self._counts["away"] += 1
        if self._starter is not None and self._channel.state == "away":
            self._starter.ask()
        return False

    def _usable_for(self, root: bytes) -> bool:
        self._names.model(root)  # raises for one that is not in use
        return self._usable() and self._names.knows(root)

    def _call(self, number: int, message: m.Message, deadline_s: float) -> m.FromServer | None:
        """Ask and wait for the answer; None: there was none in time, or the server is gone."""
        deadline, answers = time.monotonic() + deadline_s, self._answers
        with self._channel.changed:
            answers[number] = None
            if not self._channel.send(message):
                del answers[number]
                return None
        self._channel.wait(lambda: number not in answers or answers[number] is not None, deadline)
        with self._channel.changed:
            answer = answers.pop(number, None)
            if answer is None and self._channel.state == "open":
                self._suspect = True  # until the answer comes after all, or any other
                self._counts["timeouts"] += 1
        return answer

    # ---------------------------------------------------------------- models

    def register(self, model: ModelSpec, *, epoch: bytes | None = None) -> Namespace:
        """As `KVCacheManager.register`; devices are the engine's agents'.

        Raises LayoutError where the stack cannot serve the model, ServerAwayError where no server says what epoch it
        is: try again later, and do without the cache until then.
        """
        self._check()
        if not self._usable():
            raise ServerAwayError("the server is away: the namespace is not known without it")
        number = next(self._numbers)
        answer = self._call(number, m.Register(number, model, epoch), self._deadline_s)
        if not isinstance(answer, m.Registered):
            raise self._error(answer)
        namespace = Namespace.of(model, answer.epoch)
        with self._channel.changed:
            self._names.add(model, namespace, known=True)
        return namespace

    def unregister(self, namespace: Namespace) -> None:
        """This client uses the namespace no more; its blocks stay cached."""
        self._check()
        with self._channel.changed:
            self._names.remove(namespace.root)
        if self._usable():
            self._channel.send(m.Unregister(namespace.root), request=False)

    def reset(self, namespace: Namespace) -> Namespace:
        """As `KVCacheManager.reset`, for this client. While the server is away, the fresh epoch is made here, and the
        server is told when it is back.

        Raises UnknownNamespaceError for a namespace that is not registered here.
        """
        self._check()
        with self._channel.changed:
            model, known = self._names.model(namespace.root), self._names.knows(namespace.root)
            self._names.remove(namespace.root)
            for fetch in [fetch for fetch in self._fetches.values() if fetch.root == namespace.root]:
                fetch.end("reset")  # the server releases it
                del self._fetches[fetch.number]
        answer, number, connection = None, None, self._channel.connections
        if self._usable() and known:
            number = next(self._numbers)
            answer = self._call(number, m.Reset(number, namespace.root), self._deadline_s)
            if isinstance(answer, m.Failed):
                logger.error("the server has not reset: this client goes on in an epoch of its own: %s", answer.text)
        with self._channel.changed:
            if isinstance(answer, m.Registered):
                fresh = dataclasses.replace(namespace, epoch=answer.epoch)
            else:
                fresh = dataclasses.replace(namespace, epoch=os.urandom(16))
                late = answer is None and self._suspect and connection == self._channel.connections
                self._names.reset_without_server(model, namespace, number if late else None)
            self._names.add(model, fresh, known=isinstance(answer, m.Registered))
        return fresh

    @staticmethod
    def _error(answer: m.FromServer | None) -> FlexKVError:
        if not isinstance(answer, m.Failed):
            return ServerAwayError("the server did not answer in time")
        return _ERRORS.get(answer.kind, ServerAwayError)(answer.text)

    # ---------------------------------------------------------------- lookups and fetches

    def lookup(self, namespace: Namespace, keys: Keys) -> Lookup:
        """As `KVCacheManager.lookup`; nothing is found while the server is away."""
        self._check()
        keys = checked_keys(keys)
        if self._usable_for(namespace.root):
            number = next(self._numbers)
            answer = self._call(number, m.Lookup(number, namespace.root, keys.tobytes()), self._deadline_s)
            if isinstance(answer, m.Found):
                return Lookup(answer.blocks, answer.host_blocks, answer.pending)
        return Lookup(0, 0, pending=False)

    def fetch(
        self, namespace: Namespace, keys: Keys, deadline_s: float = FETCH_DEADLINE_S, *, avoid: Sequence[str] = ()
    ) -> ClientFetch:
        """As `KVCacheManager.fetch`; done with nothing while the server is away."""
        return self._start(namespace, keys, deadline_s, keep=True, avoid=avoid)

    def prefetch(self, namespace: Namespace, keys: Keys, deadline_s: float = FETCH_DEADLINE_S) -> ClientFetch:
        """As `KVCacheManager.prefetch`."""
        return self._start(namespace, keys, deadline_s, keep=False)

    def _start(
        self, namespace: Namespace, keys: Keys, deadline_s: float, *, keep: bool, avoid: Sequence[str] = ()
    ) -> ClientFetch:
        self._check()
        keys, deadline_s = checked_keys(keys), seconds(deadline_s)
        limit = time.monotonic() + max(deadline_s + FETCH_GRACE_S, self._deadline_s)
        fetch = ClientFetch(self, next(self._numbers), namespace.root, limit)
        if not self._usable_for(namespace.root):
            fetch.end("server")
            return fetch
        with self._channel.changed:
            if self._take(m.Fetch(fetch.number, namespace.root, keys.tobytes(), deadline_s, keep, list(avoid))):
                self._fetches[fetch.number] = fetch
            else:
                fetch.end("refused" if self._channel.state == "open" else "server")
        return fetch

    def _take(self, message: m.Message) -> bool:
        """Send what begins a fetch or a transfer, if there is room for one more (condition held)."""
        full = len(self._fetches) + len(self._transfers) >= MAX_UNDER_WAY
        taken = not full and self._channel.send(message)
        self._counts["busy"] += not taken and self._channel.state == "open"
        return taken

    def give_up(self, fetch: ClientFetch) -> None:
        """The server has said nothing of a fetch that should be done: it is done without it."""
        with self._channel.changed:
            if fetch.ended:
                return
            self._counts["timeouts"] += 1
            if self._heard_at < fetch.limit - self._deadline_s:
                self._suspect = True  # what it says of this fetch clears it
        self._give_back(fetch, "server", m.Cancel(fetch.number))

    def release(self, fetch: ClientFetch) -> None:
        """As `Fetch.release`."""
        self._give_back(fetch, "released", m.Release(fetch.number))

    def _give_back(self, fetch: ClientFetch, why: str, message: m.Message) -> None:
        self._channel.check_process()
        with self._channel.changed:
            known = self._fetches.pop(fetch.number, None) is not None
            fetch.end(why)
        if known:
            self._channel.send(message, request=False)

    # ---------------------------------------------------------------- copies

    def load(self, fetch: ClientFetch, device_blocks: DeviceBlocks, *, tag: str = "") -> ClientTransfer:
        """As `KVCacheManager.load`. `tag`: the agents are told it."""
        self._check()
        if not fetch.done or fetch.why in ("released", "cancelled"):
            raise StateError("load needs a fetch that is done and not released: call fetch.wait() first")
        transfer = ClientTransfer(self, next(self._numbers))
        usable = self._usable()
        if fetch.why:
            transfer.end(0, f"the fetch was {WHY.get(fetch.why, fetch.why)}")
            return transfer
        groups = len(self._names.model(fetch.root).groups)
        blocks = by_group(device_blocks, groups, fetch.ready, "device_blocks")
        return self._move(transfer, m.Load(transfer.number, fetch.number, _raw(blocks), tag), usable=usable)

    def store(self, namespace: Namespace, keys: Keys, device_blocks: DeviceBlocks, *, tag: str = "") -> ClientTransfer:
        """As `KVCacheManager.store`. `tag`: the agents are told it."""
        self._check()
        keys = checked_keys(keys)
        groups = len(self._names.model(namespace.root).groups)
        blocks = by_group(device_blocks, groups, len(keys), "device_blocks")
        transfer = ClientTransfer(self, next(self._numbers))
        message = m.Store(transfer.number, namespace.root, keys.tobytes(), _raw(blocks), tag)
        return self._move(transfer, message, usable=self._usable_for(namespace.root))

    def _move(self, transfer: ClientTransfer, message: m.Message, *, usable: bool) -> ClientTransfer:
        if not usable:
            transfer.end(0, AWAY)
            return transfer
        with self._channel.changed:
            if self._take(message):
                self._transfers[transfer.number] = transfer
            else:
                transfer.end(0, BUSY if self._channel.state == "open" else AWAY)
        return transfer

    def cancel(self, target: ClientTransfer | ClientFetch) -> None:
        """As `KVCacheManager.cancel`. A transfer is done when the server says so: until then it may still copy."""
        message = m.Cancel(target.number)
        if isinstance(target, ClientFetch):
            self._give_back(target, "cancelled", message)
        elif not target.done:
            self._channel.send(message, request=False)

    # ---------------------------------------------------------------- what comes and goes

    def take_notices(self) -> list[Notice]:
        """What the server has said since the last call, in order. What happened before a transfer's end, as its handle
        tells it, is among them or was taken before. `Cleared(None)` too where the connection was lost. Never waits."""
        self._channel.pump()
        with self._channel.changed:
            return self._notices.take() if self._notices is not None else []

    # ---------------------------------------------------------------- waiting, figures, end

    def wait(self, target: ClientTransfer | ClientFetch, timeout_s: float | None = None) -> bool:
        """Wait until a transfer or fetch is done; False if the time is up first."""
        deadline = time.monotonic() + (seconds(timeout_s) if timeout_s is not None else float("inf"))
        return self._channel.wait(lambda: target.ended, min(deadline, target.limit)) or target.done

    def drain(self, timeout_s: float) -> bool:
        """As `KVCacheManager.drain`, of the whole server; False while it is away."""
        self._check()
        if not self._usable():
            return False
        number, timeout_s = next(self._numbers), seconds(timeout_s)
        answer = self._call(number, m.Drain(number, timeout_s), timeout_s + self._deadline_s)
        return isinstance(answer, m.Ended) and answer.ok

    def null(self, data: bytes) -> bool:
        """Send bytes and wait for the server's answer, which does nothing: what a call of that size costs."""
        self._check()
        if not self._usable():
            return False
        number = next(self._numbers)
        return isinstance(self._call(number, m.Null(number, data), self._deadline_s), m.Ended)

    def stats(self) -> dict[str, Any]:
        """The server's figures: as `KVCacheManager.stats`, and `server`; empty while it is away."""
        self._check()
        if self._usable():
            number = next(self._numbers)
            answer = self._call(number, m.Stats(number), self._deadline_s)
            if isinstance(answer, m.Figures):
                figures: dict[str, Any] = json.loads(answer.figures)
                return figures
        return {}

    def figures(self) -> dict[str, int]:
        """This client's own: calls; of these away: answered as misses at once; timeouts; busy: refused because too much
        was under way; connections that were opened."""
        return {**self._counts, "connections": self._channel.connections}

    @property
    def connected(self) -> bool:
        """Whether the server answers, as far as is known."""
        self._channel.pump()
        return self._channel.state == "open" and not self._suspect

    def greet(self, timeout_s: float) -> None:
        """Wait until a server has let this client in.

        Raises ServerRefusedError if it does not, ServerAwayError if none answers in time.
        """
        deadline = time.monotonic() + timeout_s
        channel = self._channel
        while channel.state != "open":
            channel.connect()
            if channel.refused is not None:
                raise channel.refused
            left = deadline - time.monotonic()
            if left <= 0:
                raise ServerAwayError(f"no server has answered within {timeout_s:g} s")
            if channel.state == "away":
                time.sleep(min(left, CONNECT_STEP_S))
            else:
                channel.wait(lambda: channel.state != "greeting", deadline)

    def close(self) -> None:
        """Say goodbye: what this client holds is released. Safe to call twice.

        In a process that was forked from the client's, it closes that one's copy of the connection only.
        """
        channel = self._channel
        with contextlib.suppress(StateError):
            channel.send(m.Bye(), request=False)
            deadline = 0.0 if self._suspect else time.monotonic() + self._deadline_s
            channel.wait(lambda: not channel.unsent, deadline)
        channel.close()


def connect(
    path: str | Path,
    *,
    engine: str | None = None,
    deadline_s: float = CALL_DEADLINE_S,
    connect_s: float = 10.0,
    stack_digest: str = "",
    starter: Callable[[], object] | None = None,
    notices: bool = False,
) -> Client:
    """A client of the server at `path`, once it has answered; arguments as for `Client`.

    Raises:
        ServerAwayError: no server answers within `connect_s` seconds.
        ServerRefusedError: it does not take this client, for being of another version, say.
    """
    client = Client(
        path, engine=engine, deadline_s=deadline_s, stack_digest=stack_digest, starter=starter, notices=notices
    )
    try:
        client.greet(connect_s)
    except BaseException:
        client.close()
        raise
    return client


CONNECT_STEP_S = 0.01
"""Between two attempts of `Client.greet` while there is no socket."""


def _raw(blocks: Sequence[npt.NDArray[np.int64]]) -> list[bytes]:
    return [array.tobytes() for array in blocks]
