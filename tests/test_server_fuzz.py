"""Whatever is sent to the socket: the server lives, its memory stays bounded, and nothing of it is executed.

100,000 messages, half of them on connections that have shaken hands. The seed is printed.
"""

from __future__ import annotations

import os
import pickle
import random
import re
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
from server_rig import SPEC, ServerProcess, Wire, hello, introduced, keys_of, registered

from flexkv_core.layout import KVGroup, ModelSpec
from flexkv_core.server import messages as m

pytestmark = pytest.mark.usefixtures("leak_check")
GROWTH_BYTES = 96 << 20
"""What the server may grow by: the largest message, twice, and the allocator's slack."""


def resident(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) << 10


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


class Fuzzer:
    def __init__(self, seed: int, trap: Path, root: bytes, keys: bytes) -> None:
        self.random = random.Random(seed)
        self.trap = pickle.dumps(Trap(trap))
        self.root, self.keys = root, keys

    def number(self) -> int:
        return self.random.choice([0, 1, 2, 7, 255, 2**31, 2**63 - 1, -1, -(2**63), self.random.getrandbits(32)])

    def raw(self) -> bytes:
        kind = self.random.randrange(5)
        if kind == 0:
            return self.keys[: 32 * self.random.randrange(9)]
        if kind == 1:
            return self.random.randbytes(self.random.randrange(300))
        if kind == 2:
            return np.array([self.number() % 2**63 for _ in range(self.random.randrange(9))], np.int64).tobytes()
        return b"" if kind == 3 else self.trap

    def spec(self) -> ModelSpec:
        sizes = [1, 3000, 4096, 1 << 20, 1 << 50]
        groups = tuple(KVGroup(self.random.choice(sizes)) for _ in range(self.random.choice([1, 1, 2, 255])))
        size = self.random.choice([1, 4, 2**20])
        return SPEC if self.random.random() < 0.5 else ModelSpec(self.random.choice("ab"), size, groups)

    def message(self) -> m.Message:
        root = self.random.choice([self.root, self.root, bytes(32), self.raw()])
        pick = self.random.randrange(15)
        blocks = [self.raw() for _ in range(self.random.randrange(3))]
        deadline = self.random.choice([0.0, -1.0, 1e-3, 1e308, float("nan"), float("inf")])
        number = self.number()
        return [
            lambda: m.Register(number, self.spec(), self.random.choice([None, b"", self.raw()])),
            lambda: m.Unregister(root),
            lambda: m.Lookup(number, root, self.raw()),
            lambda: m.Fetch(number, root, self.raw(), deadline, self.random.random() < 0.5),
            lambda: m.Release(self.number()),
            lambda: m.Cancel(self.number()),
            lambda: m.Load(number, self.number(), blocks, "t"),
            lambda: m.Store(number, root, self.raw(), blocks, "t"),
            lambda: m.Reset(number, root),
            lambda: m.Stats(number),
            lambda: m.Drain(number, deadline if deadline < 1 else 0.0),
            lambda: m.Null(number, self.raw()),
            lambda: m.Copied(number, None),
            hello,
            m.Bye,
        ][pick]()

    def frame(self) -> bytes:
        kind = self.random.randrange(8)
        if kind < 3:
            try:
                return m.encode(self.message())
            except (msgspec.MsgspecError, OverflowError, ValueError):  # a number that msgpack has no room for
                return b"\0\0\0\0"
        body = bytearray(m.encode(m.Null(1, b"")) if kind == 3 else self.random.randbytes(self.random.randrange(64)))
        if kind == 4:  # a valid message, broken
            body = bytearray(m.encode(m.Lookup(1, self.root, self.keys))[4:])
            for _ in range(self.random.randrange(1, 4)):
                body[self.random.randrange(len(body))] = self.random.randrange(256)
        elif kind == 5:
            body = bytearray(self.trap)
        elif kind == 6:  # nested beyond reason
            body = bytearray(b"\x91" * self.random.randrange(1, 5000))
        elif kind == 7:  # a length that lies
            return struct.pack("<I", self.random.choice([0, 1, 2**16, 2**25, 2**32 - 1])) + bytes(body)
        return struct.pack("<I", len(body)) + bytes(body)


def test_fuzzed_messages_harm_nobody(tmp_path: Path) -> None:
    count = 100_000
    seed = int(os.environ.get("FLEXKV_SEED", random.randrange(1 << 31)))
    print(f"seed {seed}")
    trap = tmp_path / "executed"
    with ServerProcess(tmp_path / "s") as server, introduced(tmp_path / "s") as good:
        namespace = registered(good)
        keys = keys_of(namespace, 1, 8)
        fuzzer = Fuzzer(seed, trap, namespace.root, keys)
        warm = 0
        sent = ended = 0
        wire: Wire | None = None
        while sent < count:
            if wire is None:
                wire = Wire(tmp_path / "s")
                if fuzzer.random.random() < 0.5:
                    wire.send(hello(engine=fuzzer.random.choice("ef")))
                wire.socket.settimeout(0.001)
            try:
                wire.socket.sendall(b"".join(fuzzer.frame() for _ in range(8)))
                sent += 8
                wire.socket.recv(1 << 20)
            except TimeoutError:
                if fuzzer.random.random() < 0.2:
                    wire.close()
                    wire = None
            except OSError:
                ended += 1
                wire.close()
                wire = None
            if sent % 4000 < 8:
                assert good.ask(m.Null(1, b"still there?")) == m.Ended(1, ok=True)
                warm = warm or resident(server.pid)
        if wire is not None:
            wire.close()
        print(f"{sent} messages, {ended} connections ended by the server, seed {seed}")
        assert good.ask(m.Lookup(2, namespace.root, keys)) == m.Found(2, 0, 0, pending=False)
        assert resident(server.pid) - warm < GROWTH_BYTES
        assert server.stop() == 0
    assert not trap.exists()


def test_the_fuzzer_makes_valid_messages_too() -> None:
    """Else it would only prove that rubbish is refused."""
    fuzzer = Fuzzer(1, Path("x"), bytes(32), bytes(256))
    kinds: set[str] = set()
    for _ in range(2000):
        try:
            kinds.add(type(m.parse_from_client(m.encode(fuzzer.message())[4:])).__name__)
        except (OverflowError, m.WireError):
            continue
    assert len(kinds) == 15, kinds
