"""The device agent: copies one rank's part of blocks between its device and the server's host region.

Runs in the engine's worker process, which owns the device's memory. Owns the connection, the mapping of the host region
and the threads that copy. Does not own which blocks are copied: the server names slots that are ready for it, and they
stay so until the agent has answered.

When the server goes away, the agent lets the copies that run end and begins no others, since the client was told that
they failed. It keeps the region mapped and pinned, and connects again; a server that took over the same region finds
it mapped. It waits for messages and never polls.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import random
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from flexkv_core import __version__
from flexkv_core.device import Device
from flexkv_core.errors import LayoutError, ServerRefusedError
from flexkv_core.framing import Reader, WireError
from flexkv_core.ranks import Direction
from flexkv_core.region import HostRegion
from flexkv_core.server import messages as m

logger = logging.getLogger("flexkv.agent")

RECEIVE_BYTES = 1 << 18
BACKOFF_S = 0.05
BACKOFF_MAX_S = 1.0
ANSWER_S = 5.0
"""How long connecting may take, and one answer's way out; a server that does not read is away."""

MAX_REVOKED = 1 << 16
"""Tags that are remembered; a copy that was asked for so many revocations ago is long over."""


Copied = Callable[[str, Direction, str | None], None]


class DeviceAgent:
    """See the module's docstring. Begins to connect at once, in a thread of its own.

    Args:
        path: the server's socket.
        engine: the engine's name, the same as its client's.
        device: this rank's KV tensors; called from several threads at a time.
        groups: how many KV groups the model has; the device may have nothing of some.
        rank, ranks: this worker's number, and how many the engine has.
        threads: copies at a time.
        on_copied: called when each job has ended, begun or not, on its thread, with the client's tag, the direction and
            the error or None.

    Attributes:
        copies: made so far.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        engine: str,
        device: Device,
        groups: int = 1,
        rank: int = 0,
        ranks: int = 1,
        threads: int = 2,
        on_copied: Copied | None = None,
    ) -> None:
        self._path = os.fspath(path)
        self._engine = engine
        self._device = device
        self._shapes = [_shape(device, group) for group in range(groups)]
        self._rank, self._ranks = rank, ranks
        self._on_copied = on_copied
        self._copiers = concurrent.futures.ThreadPoolExecutor(threads, f"flexkv-copy-{rank}")
        self._session = b""
        self._region: HostRegion | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._running = 0
        self._tags: Counter[str] = Counter()  # of copies that run
        self._revoked: dict[str, None] = {}
        self._closing = False
        self._connected = False
        self._refused: ServerRefusedError | None = None
        self.copies = 0
        self._thread = threading.Thread(target=self._live, name=f"flexkv-agent-{rank}", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether the server sends jobs here now."""
        return self._connected

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until the server sends jobs here; False if the time is up first.

        Raises ServerRefusedError if the server does not take this agent; the text says why.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._connected or self._refused or self._closing, timeout_s)
            if self._refused is not None:
                raise self._refused
            return self._connected

    def revoke(self, tag: str) -> None:
        """Copy nothing of this tag any more: its device blocks are about to be others'.

        Returns when no copy of it runs; one that the server asks for later fails.
        """
        with self._changed:
            self._revoked[tag] = None
            while len(self._revoked) > MAX_REVOKED:
                del self._revoked[next(iter(self._revoked))]
            self._changed.wait_for(lambda: tag not in self._tags)

    def close(self) -> None:
        """Let copies end, say goodbye, unmap the region. Safe to call twice."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._copiers.shutdown()
        if self._region is not None:
            self._region.close()
        os.close(self._wake)

    # ---------------------------------------------------------------- the agent's thread

    def _live(self) -> None:
        wait_s = BACKOFF_S
        while not self._closing:
            try:
                connection = self._connect()
            except ServerRefusedError as error:
                if self._refused is None:
                    logger.error("rank %d: %s", self._rank, error)
                with self._changed:
                    self._refused = error
                    self._changed.notify_all()
            except (OSError, WireError) as error:
                logger.debug("rank %d cannot reach the server: %s", self._rank, error)
            else:
                wait_s = BACKOFF_S
                self._serve(*connection)
                continue
            if self._sleep(wait_s * random.uniform(0.8, 1.2)):
                return
            wait_s = min(2 * wait_s, BACKOFF_MAX_S)

    def _sleep(self, seconds: float) -> bool:
        """Wait; True if the agent is being closed."""
        return bool(select.select([self._wake], [], [], seconds)[0])

    def _connect(self) -> tuple[socket.socket, Reader, list[bytes]]:
        """Introduce this agent and map the region. Raises OSError, WireError, ServerRefusedError."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        fds: list[int] = []
        try:
            connection.settimeout(ANSWER_S)
            connection.connect(self._path)
            session = os.urandom(16)
            hello = m.Hello(
                m.PROTOCOL,
                __version__,
                "agent",
                self._engine,
                session,
                previous=self._session,
                rank=self._rank,
                ranks=self._ranks,
                shapes=self._shapes,
                region=self._region.inode if self._region is not None else 0,
            )
            connection.sendall(m.encode(hello))
            reader = Reader(m.MAX_MESSAGE_BYTES)
            bodies: list[bytes] = []
            while not bodies:
                if self._wake in select.select([connection.fileno(), self._wake], [], [])[0]:
                    raise OSError("the agent is being closed")
                data, came, _, _ = socket.recv_fds(connection, RECEIVE_BYTES, 4)
                fds += came
                if not data:
                    raise OSError("the server hung up")
                bodies += reader.feed(data)
            answer = m.parse_from_server(bodies.pop(0))
            if isinstance(answer, m.Refused):
                raise ServerRefusedError(answer.reason)
            if not isinstance(answer, m.Welcome) or len(fds) != 1:
                raise WireError(f"{type(answer).__name__} with {len(fds)} descriptors is no welcome for an agent")
            self._session = session  # that the server knows; another answer has not ended the one before
            self._map(fds[0], answer)
        except BaseException:
            connection.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)
        with self._changed:
            self._connected, self._refused = True, None
            self._changed.notify_all()
        return connection, reader, bodies

    def _map(self, fd: int, welcome: m.Welcome) -> None:
        """Map the server's region, unless it is the one that is mapped."""
        if self._region is not None and self._region.inode == welcome.region:
            return
        try:
            region = HostRegion.attach(fd, welcome.region_bytes)
        except LayoutError as error:
            raise WireError(str(error)) from error
        self._device.attach(region.buffer)
        old, self._region = self._region, region
        if old is not None:
            old.close()

    def _serve(self, connection: socket.socket, reader: Reader, bodies: list[bytes]) -> None:
        """Take jobs until the server is gone or the agent is closed; then until all copies have ended."""
        try:
            while True:
                for body in bodies:
                    message = m.parse_from_server(body)
                    if not isinstance(message, m.Copy):
                        raise WireError(f"{type(message).__name__} is not for agents")
                    with self._changed:
                        self._running += 1
                    self._copiers.submit(self._copy, connection, message)
                if self._wake in select.select([connection.fileno(), self._wake], [], [])[0]:
                    break
                data = connection.recv(RECEIVE_BYTES)
                if not data:
                    break
                bodies = reader.feed(data)
        except (OSError, WireError) as error:
            logger.warning("rank %d has lost the server: %s", self._rank, error)
        with self._changed:
            self._connected = False
            self._changed.wait_for(lambda: not self._running)
        if self._closing:
            with contextlib.suppress(OSError):
                connection.sendall(m.encode(m.Bye()))
        connection.close()

    # ---------------------------------------------------------------- copy threads

    def _copy(self, connection: socket.socket, job: m.Copy) -> None:
        error, began = None, False
        try:
            with self._changed:
                if job.tag in self._revoked:
                    raise WireError("its device blocks are not its own any more")
                if not (self._connected or self._closing):
                    raise WireError("the server went away before the copy began")
                self._tags[job.tag] += 1
                began = True
            region = self._region
            assert region is not None
            move = self._device.gather if job.direction == "gather" else self._device.scatter
            for group, offsets, blocks in job.parts:
                move(region.buffer, m.numbers_of(offsets), m.numbers_of(blocks), group)
            with self._changed:
                self.copies += 1
        except WireError as caught:
            error = str(caught)
        except Exception as caught:
            logger.exception("rank %d could not copy", self._rank)
            error = str(caught) or type(caught).__name__
        with self._changed:
            if began:
                self._tags[job.tag] -= 1
                if not self._tags[job.tag]:
                    del self._tags[job.tag]
                    self._changed.notify_all()
        if self._on_copied is not None:
            try:
                self._on_copied(job.tag, job.direction, error)
            except Exception:
                logger.exception("on_copied raised")
        try:
            with self._sending:
                connection.sendall(m.encode(m.Copied(job.job, error)))
        except OSError as caught:  # gone, or it does not read: half a message may be out
            logger.debug("an answer was lost: %s", caught)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        with self._changed:
            self._running -= 1
            self._changed.notify_all()


def _shape(device: Device, group: int) -> tuple[int, int]:
    """(bytes of the device's part of a block, device blocks); (0, 0) where it has nothing of the group."""
    try:
        fragments = device.fragments(group)
    except LayoutError:
        return 0, 0
    return fragments.block_bytes, fragments.pages
