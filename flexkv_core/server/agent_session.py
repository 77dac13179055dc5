"""The server's side of device agents: the workers of an engine's ranks, in their own processes.

Owns which agents an engine has and their jobs under way. A job ends when the agent says so, or when nothing of it can
run any more: its process is gone (by pidfd, not because a socket closed), it said goodbye, or the same process came
back and its old session is over. Until then its slots stay as they are. Does not own what is copied (`copying.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from flexkv_core.errors import LayoutError, StateError
from flexkv_core.framing import WireError
from flexkv_core.layout import KVGroup, ModelSpec
from flexkv_core.ranks import CopyPart, Direction, Ranks, WorkerLostError
from flexkv_core.server.connection import Connection
from flexkv_core.server.messages import Bye, Copied, Copy, Hello, parse_from_client
from flexkv_core.server.peers import Peer

logger = logging.getLogger("flexkv.server")

Done = Callable[[BaseException | None], None]


class AgentSession:
    """One agent, as a `flexkv_core.ranks.RemoteWorker`. On the owner's thread.

    Args:
        on_over: called once, when nothing of this session runs any more.
    """

    def __init__(
        self,
        connection: Connection,
        peer: Peer,
        hello: Hello,
        loop: asyncio.AbstractEventLoop,
        on_over: Callable[[AgentSession], None],
    ) -> None:
        self.hello = hello
        self.peer = peer
        self.over = False
        self._connection = connection
        self._loop = loop
        self._on_over = on_over
        self._jobs: dict[int, Done] = {}
        self._next_job = 0
        connection.trust(self._on_message, self._on_closed)
        peer.watch(loop, lambda: self.end(f"process {peer.pid} of rank {hello.rank} has ended"))

    @property
    def where(self) -> str:
        return f"rank {self.hello.rank} of engine {self.hello.engine!r} (process {self.peer.pid})"

    @property
    def connected(self) -> bool:
        return self._connection.open

    @property
    def jobs(self) -> int:
        """Under way."""
        return len(self._jobs)

    def shape(self, group: int) -> tuple[int, int]:
        """(bytes of this rank's part of a block, device blocks). Raises LayoutError where it has nothing of it."""
        if group >= len(self.hello.shapes) or not self.hello.shapes[group][0]:
            raise LayoutError(f"{self.where} has no tensors of group {group}")
        return self.hello.shapes[group]

    def start(self, direction: Direction, parts: Sequence[CopyPart], tag: str, done: Done) -> None:
        """Send a job; see `RemoteWorker.start`."""
        if not self.connected:
            done(WorkerLostError(f"{self.where} is away"))
            return
        self._next_job += 1
        self._jobs[self._next_job] = done
        listed = [(part.group, part.offsets.tobytes(), part.device_blocks.tobytes()) for part in parts]
        self._connection.send(Copy(self._next_job, direction, listed, tag))

    def _on_message(self, connection: Connection, body: bytes) -> None:
        message = parse_from_client(body)
        if isinstance(message, Copied):
            done = self._jobs.pop(message.job, None)
            if done is None:
                raise WireError(f"an answer to job {message.job}, which is not under way")
            done(RuntimeError(message.error) if message.error is not None else None)
        elif isinstance(message, Bye):
            self.end(f"{self.where} has said goodbye")
        else:
            raise WireError(f"{type(message).__name__} is not for agents")

    def _on_closed(self, connection: Connection, reason: str) -> None:
        if not self.over:
            logger.warning("%s is away: %s", self.where, reason)

    def end(self, reason: str) -> None:
        """Nothing of it runs any more: its jobs have failed. Safe to call twice."""
        if self.over:
            return
        self.over = True
        self.peer.forget(self._loop)
        self._connection.close(reason)
        jobs, self._jobs = self._jobs, {}
        for done in jobs.values():
            done(WorkerLostError(reason))
        self._on_over(self)


class Engine:
    """An engine by its name: its clients, and the agents of its ranks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clients = 0
        self.ranks = 0
        self.agents: dict[int, AgentSession] = {}
        self._made: dict[tuple[tuple[KVGroup, ...], int], Ranks] = {}

    def takes(self, hello: Hello) -> str | None:
        """Why an agent cannot join, or None."""
        if not 0 <= hello.rank < hello.ranks or hello.ranks > 4096 or len(hello.shapes) > 255:
            return f"rank {hello.rank} of {hello.ranks} with {len(hello.shapes)} KV groups is none"
        if any(size < 0 or (size and pages < 1) for size, pages in hello.shapes):
            return f"shapes {hello.shapes}: bytes of a block and device blocks are positive"
        held = self.agents.get(hello.rank)
        if held is not None and held.connected and not held.over:
            return f"rank {hello.rank} of engine {self.name!r} is held by process {held.peer.pid}"
        if self.agents and self.ranks != hello.ranks:
            return f"engine {self.name!r} has {self.ranks} ranks, not {hello.ranks}"
        return None

    def join(self, agent: AgentSession) -> None:
        """An agent has come; what it takes over from is over, or its process will be seen to end."""
        self.ranks = agent.hello.ranks
        self.agents[agent.hello.rank] = agent
        self._made.clear()

    def leave(self, agent: AgentSession) -> None:
        if self.agents.get(agent.hello.rank) is agent:
            del self.agents[agent.hello.rank]
            self._made.clear()

    @property
    def empty(self) -> bool:
        return not self.clients and not self.agents

    def ranks_of(self, model: ModelSpec) -> Ranks:
        """Who copies for a model. Raises StateError while a rank is away, LayoutError where the shapes do not fit."""
        layout = model.tensor_parallel * model.pipeline_parallel
        key = (model.groups, layout)
        made = self._made.get(key)
        if made is not None and all(agent.connected for agent in self.agents.values()):
            return made
        wanted = self.ranks or layout
        away = [rank for rank in range(wanted) if rank not in self.agents or not self.agents[rank].connected]
        if away:
            listed = ", ".join(map(str, away))
            raise StateError(
                f"engine {self.name!r}: no worker of rank {listed} is connected: start a DeviceAgent there"
            )
        self._made[key] = Ranks.of([self.agents[rank] for rank in range(wanted)], model)
        return self._made[key]
