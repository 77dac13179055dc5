"""A server in a thread of this process, and a client that speaks the protocol by hand, for what a well-behaved client
never does."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexkv_core import __version__
from flexkv_core.blocks import Namespace, block_keys
from flexkv_core.config import load_config
from flexkv_core.device.cpu import CpuDevice
from flexkv_core.framing import Reader
from flexkv_core.layout import KVGroup, ModelSpec
from flexkv_core.manager import KVCacheManager
from flexkv_core.server import messages as m
from flexkv_core.server.agent import DeviceAgent
from flexkv_core.server.daemon import Server

PATIENCE_S = 30.0
CPU_ONLY = {"tiers": [{"backend": "cpu", "capacity": "16MiB", "prefault": False}]}
BLOCK_SIZE, BLOCK_BYTES, PAGES = 4, 3000, 64
SPEC = ModelSpec("rig", BLOCK_SIZE, (KVGroup(BLOCK_BYTES),))


@contextlib.contextmanager
def serving(
    path: Path,
    stack: Mapping[str, Any] = CPU_ONLY,
    linger_s: float | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[Server]:
    """A server that is ready; stopped at the end."""
    server = Server(load_config(stack, environ or {}), path, linger_s, **options)
    ready, failed = threading.Event(), []

    def run() -> None:
        try:
            server.run(ready.set)
        except BaseException as error:
            failed.append(error)
            raise
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    assert ready.wait(PATIENCE_S)
    assert not failed, failed
    while server.manager is None:
        time.sleep(0.001)
    try:
        yield server
    finally:
        server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def manager_of(server: Server) -> KVCacheManager:
    assert server.manager is not None
    return server.manager


def hello(role: m.Role = "client", engine: str = "e", **changes: Any) -> m.Hello:
    fields = {"protocol": m.PROTOCOL, "version": __version__, "role": role, "engine": engine, "session": os.urandom(16)}
    return m.Hello(**{**fields, **changes})


class Wire:
    """A connection of bytes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(os.fspath(path))
        self._reader = Reader(m.MAX_MESSAGE_BYTES)
        self._came: list[m.FromServer] = []

    def send(self, message: m.Message) -> None:
        self.socket.sendall(m.encode(message))

    def receive(self) -> m.FromServer | None:
        """The next message; None when the server has hung up."""
        while not self._came:
            try:
                data = self.socket.recv(1 << 18)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._came += [m.parse_from_server(body) for body in self._reader.feed(data)]
        return self._came.pop(0)

    def ask(self, message: m.Message) -> Any:
        self.send(message)
        return self.receive()

    def quiet(self, seconds: float = 0.05) -> bool:
        """Nothing comes for a while."""
        return not self._came and not select.select([self.socket], [], [], seconds)[0]

    def hung_up(self) -> bool:
        """The server has closed it, whatever it said before."""
        while self.receive() is not None:
            pass
        return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def introduced(path: Path, **changes: Any) -> Wire:
    wire = Wire(path)
    assert isinstance(wire.ask(hello(**changes)), m.Welcome)
    return wire


def registered(wire: Wire, spec: ModelSpec = SPEC) -> Namespace:
    answer = wire.ask(m.Register(1, spec, None))
    assert isinstance(answer, m.Registered), answer
    return Namespace.of(spec, answer.epoch)


def keys_of(namespace: Namespace, seed: int, blocks: int) -> bytes:
    tokens = np.random.default_rng(seed).integers(0, 1 << 31, blocks * BLOCK_SIZE, dtype=np.int32)
    return block_keys(tokens, BLOCK_SIZE, namespace.root).tobytes()


class GatedCpuDevice(CpuDevice):
    """Copies wait while the gate is shut."""

    def __init__(self, tensors: list[Any]) -> None:
        super().__init__([tensors], threads=1)
        self.gate = threading.Event()
        self.gate.set()
        self.attached = 0

    def attach(self, host: Any) -> None:
        self.attached += 1

    def gather(self, *args: Any, **kwargs: Any) -> None:
        assert self.gate.wait(PATIENCE_S)
        super().gather(*args, **kwargs)

    def scatter(self, *args: Any, **kwargs: Any) -> None:
        assert self.gate.wait(PATIENCE_S)
        super().scatter(*args, **kwargs)


@contextlib.contextmanager
def agent(path: Path, engine: str = "e") -> Iterator[tuple[DeviceAgent, GatedCpuDevice, Any]]:
    """An agent in this process, with its device and tensor of (PAGES, BLOCK_BYTES) random bytes."""
    tensor = np.random.default_rng(5).integers(0, 256, (PAGES, BLOCK_BYTES), dtype=np.uint8)
    device = GatedCpuDevice([tensor])
    made = DeviceAgent(path, engine=engine, device=device)
    try:
        assert made.wait_connected(PATIENCE_S)
        yield made, device, tensor
    finally:
        device.gate.set()
        made.close()


def until(true: Callable[[], Any]) -> None:
    """Wait for something that will come."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)


MAIN = """
import json, logging, os, sys
import flexkv_core.server.daemon as daemon
exec(sys.argv[3])
from pathlib import Path
from flexkv_core.config import load_config
from flexkv_core.server.daemon import run
logging.basicConfig(level=os.environ.get("FLEXKV_LOG_LEVEL", "WARNING"))
sys.exit(run(load_config(json.loads(sys.argv[2]), {}), Path(sys.argv[1]), linger_s=None))
"""


def _stopped(task: Path) -> bool:
    return (task / "stat").read_text().rpartition(") ")[2][0] == "T"


class ServerProcess:
    """A server in a process of its own, that can be killed and started again."""

    def __init__(self, path: Path, stack: Mapping[str, Any] = CPU_ONLY, prelude: str = "") -> None:
        self.path = path
        self.prelude = prelude  # Python, run first
        self._stack = json.dumps(stack)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Returns when it serves."""
        self.process = subprocess.Popen([sys.executable, "-c", MAIN, os.fspath(self.path), self._stack, self.prelude])
        until(self._ready)

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, "the server has ended"
        try:
            with Wire(self.path) as wire:
                welcome = wire.ask(hello("observer"))
                return isinstance(welcome, m.Welcome) and welcome.ready and welcome.pid == self.process.pid
        except OSError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """It does nothing, and then goes on. A stop takes a thread at a time: this waits for the last."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            until(lambda: all(_stopped(task) for task in Path(f"/proc/{self.pid}/task").iterdir()))
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()


WORKER = """
import logging, signal, sys
import numpy as np
from flexkv_core.device.cpu import CpuDevice
from flexkv_core.server.agent import DeviceAgent
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
logging.basicConfig(level="ERROR")
path, engine, rank, ranks, tensor, pages, size, prelude = sys.argv[1:]
tensor = np.memmap(tensor, np.uint8, "r+", shape=(int(pages), int(size)))
device = CpuDevice([[tensor]], threads=1)
exec(prelude)
agent = DeviceAgent(path, engine=engine, device=device, rank=int(rank), ranks=int(ranks))
signal.sigwait([signal.SIGTERM])
agent.close()
"""


class WorkerProcess:
    """An engine's worker in a process of its own; its device's memory is a file that the test sees.

    Attributes:
        tensor: (pages, size) uint8.
    """

    def __init__(
        self,
        folder: Path,
        path: Path,
        *,
        engine: str = "e",
        rank: int = 0,
        ranks: int = 1,
        pages: int = PAGES,
        size: int = BLOCK_BYTES,
        prelude: str = "",
    ) -> None:
        file = folder / f"device-{engine}-{rank}"
        if not file.exists():
            file.write_bytes(bytes(pages * size))
        self.tensor = np.memmap(file, np.uint8, "r+", shape=(pages, size))
        arguments = [path, engine, rank, ranks, file, pages, size, prelude]
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, *map(str, arguments)])

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(PATIENCE_S)


def figures_of(wire: Wire) -> dict[str, Any]:
    """What the server says of itself; for a connection with nothing else under way."""
    answer = wire.ask(m.Stats(1 << 40))
    assert isinstance(answer, m.Figures), answer
    figures: dict[str, Any] = json.loads(answer.figures)
    return figures


def agents_of(wire: Wire) -> dict[int, int]:
    """Connected agents: rank -> pid."""
    return {agent["rank"]: agent["pid"] for agent in figures_of(wire)["server"]["agents"] if agent["connected"]}
