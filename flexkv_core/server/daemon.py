"""The server: a manager in a process of its own, shared by the engines of this machine.

Owns the process's life: the listening socket, the handshake, who is connected, starting and stopping. The manager's
owner thread runs everything that answers clients; the main thread starts, waits, and stops. Requests are handled in
`client_session.py`, device agents in `agent_session.py`. Does not own the socket's path or lock (`paths.py`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flexkv_core import __version__
from flexkv_core.blocks import Namespace
from flexkv_core.books import host_bytes_of
from flexkv_core.config import LoadedConfig
from flexkv_core.errors import UnknownNamespaceError
from flexkv_core.framing import WireError
from flexkv_core.manager import KVCacheManager
from flexkv_core.server import messages as m
from flexkv_core.server.agent_session import AgentSession, Engine
from flexkv_core.server.client_session import ClientSession
from flexkv_core.server.connection import Connection
from flexkv_core.server.latency import Latencies
from flexkv_core.server.metrics_endpoint import DEFAULT_HOST, Metrics
from flexkv_core.server.paths import server_lock
from flexkv_core.server.peers import Peer
from flexkv_core.server.reattach import label_of, take_over
from flexkv_core.server.summary import Summary

logger = logging.getLogger("flexkv.server")

MAX_CONNECTIONS = 1024
HANDSHAKE_S = 5.0
"""A connection that has not said who it is by then is closed."""
STILL_S = 5.0
"""How long workers of a killed server may take to come back, for its host memory to be used again."""
STOP_S = 10.0
"""For draining and closing; the tiers get most of it."""


class Server:
    """See the module's docstring. `run` is called once, from the main thread.

    Args:
        path: of the socket; the caller holds its lock.
        linger_s: stop so long after the last client or agent has gone; None: never.
        metrics_host: where to listen for Prometheus, if the config wants that.
    """

    def __init__(
        self, config: LoadedConfig, path: Path, linger_s: float | None = None, metrics_host: str = DEFAULT_HOST
    ) -> None:
        self._config = config
        self._path = path
        self._linger_s = linger_s
        self._digest = config.digest
        self._label = label_of(path)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="flexkv-owner", daemon=True)
        self._listening: socket.socket | None = None
        self._connections: dict[Connection, asyncio.TimerHandle] = {}  # not yet introduced
        self._clients: dict[bytes, ClientSession] = {}
        self._agents: dict[bytes, AgentSession] = {}
        self._engines: dict[str, Engine] = {}
        self._waiting: list[Callable[[], None]] = []  # agents that are welcomed when there is host memory
        self._linger: asyncio.TimerHandle | None = None
        self._stop = threading.Event()
        self._drains = 0
        self._numbers = itertools.count(1)
        self._latencies = Latencies()
        self._summary = Summary(config.settings.process.log_interval_requests, self.figures)
        self._metrics = Metrics(config.settings.metrics, metrics_host, self.ask_figures)
        self.stopping = False
        self.manager: KVCacheManager | None = None

    # ---------------------------------------------------------------- life (main thread)

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop` is called or the linger is over. Raises what starting raises, with nothing left behind."""
        self._listen()
        self._thread.start()
        try:
            self._open()
            self._metrics.open()
            logger.info("serving on %s (process %d)", self._path, os.getpid())
            on_ready()
            self._stop.wait()
        finally:
            self._close()

    def stop(self, *_: Any) -> None:
        """Have `run` drain and return. Any thread, and signal handlers."""
        self._stop.set()

    @contextlib.contextmanager
    def stopped_by(self, *signals: signal.Signals) -> Iterator[None]:
        """Stop when one of these comes.

        The system may hand a signal to any thread, and Python's handlers run in the main one, which sleeps: so it is
        the owner thread that is told, through a socket.
        """
        told, telling = socket.socketpair()
        with told, telling:
            told.setblocking(False)
            telling.setblocking(False)

            def came() -> None:
                if set(told.recv(64)) & set(signals):
                    self.stop()

            self._loop.call_soon_threadsafe(self._loop.add_reader, told, came)
            for number in signals:
                signal.signal(number, lambda *_: None)
            before = signal.set_wakeup_fd(telling.fileno())
            try:
                yield
            finally:
                signal.set_wakeup_fd(before)

    def _listen(self) -> None:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listening.setblocking(False)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()  # of a killed server: we hold the lock
        before = os.umask(0o177)
        try:
            listening.bind(os.fspath(self._path))
        finally:
            os.umask(before)
        listening.listen(128)
        self._listening = listening
        self._loop.call_soon(self._loop.add_reader, listening, self._accept)

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _open(self) -> None:
        """Get host memory, an earlier server's where there is some, and open the manager on it."""
        stack = self._config.stack
        region = take_over(self._label, host_bytes_of(stack), self._is_still, STILL_S)
        manager = KVCacheManager(stack, region=region, region_label=self._label, loop=self._loop)

        def opened() -> None:
            self.manager = manager
            waiting, self._waiting = self._waiting, []
            for welcome in waiting:
                welcome()
            self._rearm()

        self._loop.call_soon_threadsafe(opened)

    def _is_still(self, pid: int, inode: int) -> bool:
        """Whether a process is an agent that has come back, so that nothing of its old copies runs."""
        return any(agent.peer.pid == pid and agent.hello.region == inode for agent in list(self._agents.values()))

    def _close(self) -> None:
        self.stopping = True
        self._metrics.close()
        if self._listening is not None:
            self._loop.call_soon_threadsafe(self._loop.remove_reader, self._listening)
        if self.manager is not None:
            self.manager.close(STOP_S)
        ended = threading.Event()

        def end() -> None:
            for client in list(self._clients.values()):
                client.end("the server has stopped")
            for agent in list(self._agents.values()):
                agent.end("the server has stopped")
            for connection in list(self._connections):
                connection.close("the server has stopped")
            ended.set()

        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(end)
            ended.wait(STOP_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(STOP_S)
            if not self._thread.is_alive():
                self._loop.close()
        if self._listening is not None:
            self._listening.close()
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
        logger.info("stopped")

    # ---------------------------------------------------------------- connections (owner thread from here on)

    def _accept(self) -> None:
        assert self._listening is not None
        try:
            connected, _ = self._listening.accept()
        except OSError as error:  # nobody waits after all, or no descriptors are left
            if not isinstance(error, BlockingIOError | InterruptedError):
                logger.warning("a connection could not be accepted: %s", error)
            return
        if len(self._connections) + len(self._clients) + len(self._agents) >= MAX_CONNECTIONS:
            logger.warning("a connection is refused: there are %d", MAX_CONNECTIONS)
            connected.close()
            return
        connection = Connection(connected, self._loop, self._introduced, self._not_introduced)
        self._connections[connection] = self._loop.call_later(
            HANDSHAKE_S, connection.close, f"it has not said who it is in {HANDSHAKE_S:g} s"
        )

    def _not_introduced(self, connection: Connection, reason: str) -> None:
        self._forget(connection)
        logger.debug("a connection was closed before it was introduced: %s", reason)

    def _forget(self, connection: Connection) -> None:
        timer = self._connections.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def _refuse(self, connection: Connection, kind: str, reason: str) -> None:
        level = logging.DEBUG if kind == "protocol" else logging.WARNING  # whoever sends rubbish fills no log
        logger.log(level, "a connection is refused: %s", reason)
        connection.send(m.Refused(kind, reason))
        connection.end()

    def _introduced(self, connection: Connection, body: bytes) -> None:
        """The first message of a connection."""
        try:
            hello = m.parse_from_client(body)
        except WireError as error:
            self._refuse(connection, "protocol", str(error))
            return
        if not isinstance(hello, m.Hello) or len(hello.session) != 16 or len(hello.engine) > 256:
            self._refuse(connection, "protocol", "a connection begins with a Hello")
            return
        try:
            peer = Peer(connection.socket)
        except OSError:
            connection.close("its process is gone")
            return
        problem = self._problem_of(peer, hello)
        if problem is not None:
            peer.forget(self._loop)
            self._refuse(connection, *problem)
            return
        self._end_previous(hello, peer)
        engine = self._engines.setdefault(hello.engine, Engine(hello.engine))
        if hello.role == "agent":
            reason = engine.takes(hello)
            if reason is not None:
                peer.forget(self._loop)
                self._refuse(connection, "engine", reason)
                self._drop(engine)
                return
            self._forget(connection)
            agent = AgentSession(connection, peer, hello, self._loop, lambda agent: self._agent_over(engine, agent))
            self._agents[hello.session] = agent
            engine.join(agent)
            self._when_ready(lambda: self._welcome_agent(connection))
        else:
            self._forget(connection)
            self._clients[hello.session] = ClientSession(
                self,
                engine,
                connection,
                peer,
                hello,
                self._loop,
                next(self._numbers),
                lambda client: self._client_over(engine, client),
            )
            if hello.role == "observer":
                connection.send(self._welcome())
            else:
                self._when_ready(lambda: connection.send(self._welcome()))
        self._rearm()

    def _problem_of(self, peer: Peer, hello: m.Hello) -> tuple[str, str] | None:
        if peer.uid != os.geteuid():
            return "user", f"user {peer.uid} is not the server's user {os.geteuid()}: start a server of your own"
        if peer.pid <= 0:
            return "user", "the process is of another pid namespace: share the server's, so that its end can be seen"
        if hello.protocol != m.PROTOCOL:
            return "version", (
                f"the server is flexkv {__version__} with protocol {m.PROTOCOL}, the client flexkv {hello.version} "
                f"with protocol {hello.protocol}: install the same version in both"
            )
        if self.stopping:
            return "stopping", "the server is stopping"
        if hello.session in self._clients or hello.session in self._agents:
            return "protocol", "this session exists already"
        return None

    def _end_previous(self, hello: m.Hello, peer: Peer) -> None:
        """What a process says of its own earlier session is true; of others' it can say nothing."""
        for earlier in (self._clients.get(hello.previous), self._agents.get(hello.previous)):
            if earlier is not None and earlier.peer.pid == peer.pid:
                earlier.end("its process has connected anew")

    def _welcome(self, **region: int) -> m.Welcome:
        block_size = self._config.stack.block_size or 0
        ready = self.manager is not None
        return m.Welcome(m.PROTOCOL, __version__, os.getpid(), self._digest, block_size, ready, **region)

    def _welcome_agent(self, connection: Connection) -> None:
        assert self.manager is not None
        region = self.manager.region
        connection.send(self._welcome(region_bytes=region.size, region=region.inode), [region.fd])

    def _when_ready(self, act: Callable[[], None]) -> None:
        if self.manager is not None:
            act()
        else:
            self._waiting.append(act)

    def _client_over(self, engine: Engine, client: ClientSession) -> None:
        self._clients.pop(client.hello.session, None)
        self._drop(engine)
        self._rearm()

    def _agent_over(self, engine: Engine, agent: AgentSession) -> None:
        self._agents.pop(agent.hello.session, None)
        engine.leave(agent)
        self._drop(engine)
        self._rearm()

    def _drop(self, engine: Engine) -> None:
        if engine.empty:
            self._engines.pop(engine.name, None)

    def _rearm(self) -> None:
        """Count down to the end while nobody is there."""
        users = any(client.hello.role != "observer" for client in self._clients.values()) or self._agents
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if not users and self._linger_s is not None and self.manager is not None:
            self._linger = self._loop.call_later(self._linger_s, self.stop)

    # ---------------------------------------------------------------- what sessions need

    def figures(self) -> dict[str, Any]:
        """The manager's figures, and `server`: process, engines, clients, agents, `latencies` (`latency.py`) and
        `metrics`, where Prometheus finds them."""
        figures = self.manager.stats() if self.manager is not None else {}
        figures["server"] = {
            "pid": os.getpid(),
            "version": __version__,
            "socket": str(self._path),
            "stack": self._digest,
            "state": "stopping" if self.stopping else "ready" if self.manager is not None else "starting",
            "clients": [client.figures() for client in self._clients.values()],
            "agents": [
                {
                    "pid": agent.peer.pid,
                    "engine": agent.hello.engine,
                    "rank": agent.hello.rank,
                    "ranks": agent.hello.ranks,
                    "connected": agent.connected,
                    "jobs": agent.jobs,
                }
                for agent in self._agents.values()
            ],
            "latencies": self._latencies.figures(),
            "metrics": self._metrics.figures(),
        }
        return figures

    def ask_figures(self, timeout_s: float) -> dict[str, Any]:
        """`figures`, from another thread. Raises TimeoutError if the owner's has no time for it until then."""
        answer: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()

        def run() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(self.figures())
                except Exception as error:
                    answer.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        try:
            return answer.result(timeout_s)
        finally:
            answer.cancel()

    def on_owner(self, act: Callable[[], None]) -> None:
        """Call now if this is the owner's thread, else soon from there: closing settles handles from others."""
        if threading.get_ident() == self._thread.ident:
            act()
        else:
            self._loop.call_soon_threadsafe(act)

    def observe(self, what: str, seconds: float) -> None:
        """A lookup, fetch, load or store has taken so long."""
        self._latencies.observe(what, seconds)
        if what == "fetch":
            self._summary.fetched()

    def drain(self, timeout_s: float, answer: Callable[[bool], None]) -> None:
        """Have all written down; off the owner's thread, which does the writing."""
        manager = self.manager
        assert manager is not None
        limit = min(max(timeout_s, 0.0), 3600.0)

        def run() -> None:
            ok = manager.drain(limit)
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(ended, ok)

        def ended(ok: bool) -> None:
            self._drains -= 1
            answer(ok)

        if self._drains >= MAX_DRAINS:
            answer(False)
            return
        self._drains += 1
        threading.Thread(target=run, name="flexkv-drain", daemon=True).start()

    def reset(self, namespace: Namespace, session: ClientSession) -> Namespace:
        """Begin a fresh epoch for one client; others who use the namespace go on in the old one."""
        assert self.manager is not None
        others = any(namespace.root in client.namespaces for client in self._clients.values() if client is not session)
        return self.manager.reset(namespace, retire=not others)

    def unused(self, namespace: Namespace) -> None:
        """A client uses it no more; when none does, the manager may forget it with its last block."""
        used = any(namespace.root in client.namespaces for client in self._clients.values())
        if self.manager is not None and not used and not self.stopping:
            with contextlib.suppress(UnknownNamespaceError):
                self.manager.unregister(namespace)


MAX_DRAINS = 16
"""Drains waited for at a time, each in a thread."""


def run(
    config: LoadedConfig,
    path: Path,
    *,
    linger_s: float | None,
    lock_fd: int | None = None,
    metrics_host: str = DEFAULT_HOST,
) -> int:
    """Serve until SIGTERM, SIGINT or the end of the linger; the exit code.

    `lock_fd`: the lock of this socket (`server_lock`), where whoever starts this process has taken it.

    Raises DirectoryInUseError, naming the process, where a server is there already, and what opening the stack raises.
    """
    for warning in config.warnings:
        logger.warning("%s", warning)
    with server_lock(path, lock_fd):
        server = Server(config, path, linger_s, metrics_host)
        began = time.monotonic()
        with server.stopped_by(signal.SIGTERM, signal.SIGINT):
            server.run(lambda: logger.info("ready in %.2f s", time.monotonic() - began))
    return 0
