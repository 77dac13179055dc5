"""What server, clients and device agents say to each other: messages in msgpack, nothing executable.

Owns the types, their limits and the protocol's version. Does not own sockets (`connection.py`, `channel.py`) nor what a
request does. Both sides bound what they read; arrays travel as raw bytes and are checked on arrival.

A connection begins with `Hello` and `Welcome` (or `Refused`, and it is closed). A request has an `id` that the client
chose, and is answered exactly once with the same `id`, by what its docstring names or by `Failed`; a fetch is answered
by `Progress`, often. Requests without an answer say so. Notices come unasked, to a client whose `Hello` wants them.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from flexkv_core.framing import WireError, framed
from flexkv_core.layout import ModelSpec

PROTOCOL = 2
"""Grows with every change of these messages: both sides must speak the same."""
MAX_MESSAGE_BYTES = 32 << 20
"""Keys of half a million blocks, with their device blocks, fit."""
MAX_HELLO_BYTES = 64 << 10
"""Before the other side is known."""

Role = Literal["client", "agent", "observer"]


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Base of all messages."""


# ---------------------------------------------------------------- the handshake


class Hello(Message, frozen=True):
    """First, from whoever connects.

    Attributes:
        protocol, version: `PROTOCOL`, and the package's version, for the error that names both.
        role: a client (an engine's scheduler), an agent (an engine's worker), or an observer (asks for figures only).
        engine: names the engine that client and agents belong to; whoever says the same name is the same engine.
        session: 16 random bytes, new with every connection.
        previous: the session that this one takes over from: it is over, and nothing of it runs any more.
        stack: digest of the stack that the client would have started; "" if it does not care.
        rank, ranks: of an agent: its number among the engine's ranks, and how many there are.
        shapes: of an agent, by KV group: (bytes of its part of a block, device blocks); no bytes: it has nothing of it.
        region: of an agent: inode of the host region that it has mapped; its descriptor comes along. 0: none.
        notices: of a client: it wants to be told which blocks of its namespaces come and go.
    """

    protocol: int
    version: str
    role: Role
    engine: str
    session: bytes
    previous: bytes = b""
    stack: str = ""
    rank: int = 0
    ranks: int = 1
    shapes: list[tuple[int, int]] = []
    region: int = 0
    notices: bool = False


class Welcome(Message, frozen=True):
    """The other side may go on.

    Attributes:
        pid: of the server. stack: digest of its stack. block_size: tokens a block that the stack names; 0: any.
        ready: False while host memory is being prepared: requests fail until then.
        region_bytes, region: to an agent: size and inode of the host region, whose descriptor comes along.
    """

    protocol: int
    version: str
    pid: int
    stack: str
    block_size: int
    ready: bool
    region_bytes: int = 0
    region: int = 0


class Refused(Message, frozen=True):
    """The connection is closed after this. `kind`: "version" (says both), "engine" (rank taken or of another layout),
    "full" (too many connections), "protocol" (unreadable), "stopping"."""

    kind: str
    reason: str


# ---------------------------------------------------------------- requests of clients


class Register(Message, frozen=True):
    """Answer: `Registered`. `epoch`: None for the namespace's present one; else this one, after a reconnection."""

    id: int
    model: ModelSpec
    epoch: bytes | None


class Unregister(Message, frozen=True):
    """This client needs the namespace no more; its blocks stay. No answer."""

    root: bytes


class Lookup(Message, frozen=True):
    """Answer: `Found`. `keys`: n * 32 bytes."""

    id: int
    root: bytes
    keys: bytes


class Fetch(Message, frozen=True):
    """Answers: `Progress`. `keep`: False for a prefetch. `avoid`: names of tiers that are not to be read."""

    id: int
    root: bytes
    keys: bytes
    deadline_s: float
    keep: bool
    avoid: list[str] = []


class Release(Message, frozen=True):
    """Unpin the fetch of that id. No answer."""

    fetch: int


class Cancel(Message, frozen=True):
    """Give up the fetch, load or store of that id. No answer but that one's own."""

    target: int


class Load(Message, frozen=True):
    """Answer: `Moved`. `blocks`: by KV group, (m,) int64 as bytes; `tag`: the agents are told it."""

    id: int
    fetch: int
    blocks: list[bytes]
    tag: str


class Store(Message, frozen=True):
    """Answer: `Moved`."""

    id: int
    root: bytes
    keys: bytes
    blocks: list[bytes]
    tag: str


class Reset(Message, frozen=True):
    """Answer: `Registered`, with the fresh epoch."""

    id: int
    root: bytes


class Stats(Message, frozen=True):
    """Answer: `Figures`."""

    id: int


class Drain(Message, frozen=True):
    """Answer: `Ended`; `ok`: all was written down in that time."""

    id: int
    timeout_s: float


class Null(Message, frozen=True):
    """Answer: `Ended`, at once: what a message of this size costs."""

    id: int
    data: bytes


class Bye(Message, frozen=True):
    """The client or agent ends by itself: nothing of it runs any more. No answer, the connection is closed."""


# ---------------------------------------------------------------- answers


class Registered(Message, frozen=True):
    id: int
    epoch: bytes


class Found(Message, frozen=True):
    """As `flexkv_core.handles.Lookup`."""

    id: int
    blocks: int
    host_blocks: int
    pending: bool


class Progress(Message, frozen=True):
    """As `flexkv_core.handles.Fetch`: it is known where its blocks are (`held`), `ready` has grown, it is done, or its
    pins are gone (`why`). `seconds`: since it began."""

    id: int
    ready: int
    done: bool
    sources: dict[str, int]
    why: str
    held: list[tuple[str, int]]
    seconds: float


class Moved(Message, frozen=True):
    """As `flexkv_core.handles.Transfer`."""

    id: int
    blocks: int
    error: str | None


class Figures(Message, frozen=True):
    """Figures as JSON text."""

    id: int
    figures: bytes


class Ended(Message, frozen=True):
    id: int
    ok: bool


class Failed(Message, frozen=True):
    """The request could not be carried out. `kind`: "namespace" (not registered, or reset), "input", "state", "busy"
    (this client has too much under way), "starting", "stopping" or "internal"."""

    id: int
    kind: str
    text: str


# ---------------------------------------------------------------- notices


class Committed(Message, frozen=True):
    """A tier holds these blocks of the client's namespaces from now on, or still: told when that begins, and of what a
    store or a load of the client named when that has ended, before its `Moved`.

    Attributes:
        tier: its number in the stack, 0 for host memory. groups: n bytes. keys: n * 32 bytes.
    """

    tier: int
    groups: bytes
    keys: bytes


class Dropped(Message, frozen=True):
    """A tier does not hold these blocks any more; likewise. The client may never have been told of them, and they may
    be another's."""

    tier: int
    groups: bytes
    keys: bytes


class Cleared(Message, frozen=True):
    """A tier does not hold anything any more. None: the client has not read for long, and missed what has changed
    since: nothing that it was told before counts."""

    tier: int | None


# ---------------------------------------------------------------- device agents


class Copy(Message, frozen=True):
    """Server to agent: copy blocks between the device and slots that are ready for it. Answer: `Copied`.

    Attributes:
        direction: "gather": device to host memory; "scatter": back.
        parts: by KV group: (group, offsets, device blocks), both (m,) int64 as bytes; offsets in the host region.
        tag: the client's name for the transfer.
    """

    job: int
    direction: Literal["gather", "scatter"]
    parts: list[tuple[int, bytes, bytes]]
    tag: str


class Copied(Message, frozen=True):
    """Agent to server: no byte of the job moves any more."""

    job: int
    error: str | None


FromClient = (
    Hello
    | Register
    | Unregister
    | Lookup
    | Fetch
    | Release
    | Cancel
    | Load
    | Store
    | Reset
    | Stats
    | Drain
    | Null
    | Bye
    | Copied
)
FromServer = (
    Welcome
    | Refused
    | Registered
    | Found
    | Progress
    | Moved
    | Figures
    | Ended
    | Failed
    | Committed
    | Dropped
    | Cleared
    | Copy
)
_from_client = msgspec.msgpack.Decoder(FromClient)
_from_server = msgspec.msgpack.Decoder(FromServer)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """A message as a frame, ready to send. Raises WireError if it is too long."""
    return framed(_encoder.encode(message), MAX_MESSAGE_BYTES)


def parse_from_client(body: bytes) -> FromClient:
    """Decode what a client or an agent sent. Raises WireError."""
    try:
        message: FromClient = _from_client.decode(body)
        return message
    except (msgspec.MsgspecError, RecursionError, ValueError, TypeError) as error:
        raise WireError(f"unreadable message: {error}") from error


def parse_from_server(body: bytes) -> FromServer:
    """Decode what the server sent. Raises WireError."""
    try:
        message: FromServer = _from_server.decode(body)
        return message
    except (msgspec.MsgspecError, RecursionError, ValueError, TypeError) as error:
        raise WireError(f"unreadable message: {error}") from error


def keys_of(raw: bytes) -> npt.NDArray[np.uint8]:
    """(n, 32) uint8, read-only. Raises WireError for a length that is no multiple of 32."""
    if len(raw) % 32:
        raise WireError(f"{len(raw)} bytes of keys: must be a multiple of 32")
    return np.frombuffer(raw, np.uint8).reshape(-1, 32)


def numbers_of(raw: bytes) -> npt.NDArray[np.int64]:
    """(n,) int64, read-only. Raises WireError for a length that is no multiple of 8."""
    if len(raw) % 8:
        raise WireError(f"{len(raw)} bytes of numbers: must be a multiple of 8")
    return np.frombuffer(raw, np.int64)
