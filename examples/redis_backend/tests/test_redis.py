"""The Redis backend against a real redis-server."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

redis = pytest.importorskip("redis")

from flexkv_core.testing import BackendConformance, StoredBlock  # noqa: E402


class Server:
    """A redis-server of the test's own, on a Unix socket."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.socket = directory / "redis.sock"
        command = [
            "redis-server",
            "--port",
            "0",
            "--unixsocket",
            str(self.socket),
            "--save",
            "",
            "--dir",
            str(directory),
        ]
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
        self.url = f"unix://{self.socket}"
        self.client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.client.ping()
                return
            except redis.ConnectionError:
                assert time.monotonic() < deadline, "redis-server does not answer"
                time.sleep(0.02)

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    made = Server(tmp_path_factory.mktemp("redis"))
    yield made
    made.close()


class TestRedisConformance(BackendConformance):
    backend = "redis"
    many = 150
    full_bytes = 4 << 20

    @pytest.fixture(autouse=True)
    def _servers(self, server: Server, tmp_path: Path) -> Iterator[None]:
        self.server, self.full = server, None
        yield
        if self.full is not None:
            self.full.close()
        server.client.flushall()

    def make_config(self, directory: Path) -> dict[str, Any]:
        return {"url": self.server.url, "prefix": hashlib.sha256(str(directory).encode()).hexdigest()[:16]}

    def make_full_config(self, directory: Path) -> dict[str, Any]:
        options = ["--maxmemory", f"{self.full_bytes + (2 << 20)}", "--maxmemory-policy", "noeviction"]
        self.full = Server(directory, *options)
        return {"url": self.full.url}

    def damage(self, block: StoredBlock, how: str) -> None:
        client, name = self.server.client, self._name(block)
        value = bytearray(client.get(name))
        if how == "truncate":
            client.set(name, bytes(value[: self.random.randrange(len(value))]))
        elif how == "flip":
            value[self.random.randrange(len(value) - 4096)] ^= 1 << self.random.randrange(8)
            client.set(name, bytes(value))
        elif block.other is not None:
            other = self._name(block.other)
            client.mset({name: client.get(other), other: bytes(value)})

    def _name(self, block: StoredBlock) -> bytes:
        return self.make_config(self.directory)["prefix"].encode() + b":" + block.key + bytes([block.group])


def test_a_dead_server_is_refused_at_once(tmp_path: Path) -> None:
    """One attempt, no back-off: redis-py's own way tries several times."""
    backend_module = pytest.importorskip("flexkv_backend_redis")
    attempts = []
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    original = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        attempts.append(address)
        original(self, address)

    backend = backend_module.RedisBackend(backend_module.RedisConfig(url=f"redis://127.0.0.1:{port}/0"))
    from flexkv_core.backend import OpenContext  # noqa: PLC0415

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        with pytest.raises(redis.ConnectionError):
            backend.open(OpenContext(memoryview(bytearray(8192)), (8192,), None, None))
    assert len(attempts) == 1
