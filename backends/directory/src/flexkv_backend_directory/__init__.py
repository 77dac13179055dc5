"""A tier that keeps each block in a file of its own, named by its key, below one directory."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from flexkv_core.backend import Backend, BackendConfig, BackendSpec, Batch, Capabilities, Listing
from flexkv_core.backend import OpenContext, Status, hookimpl


class DirectoryConfig(BackendConfig):
    root: Path
    durable: bool = False  # fsync each file before it becomes visible


class DirectoryBackend(Backend):
    capabilities = Capabilities(addressing="key", persistent=True, concurrency=4)

    def __init__(self, config: DirectoryConfig) -> None:
        self.root, self.durable = config.root, config.durable

    def open(self, context: OpenContext) -> None:
        self.host = context.host
        for shard in range(256):
            (self.root / f"{shard:02x}").mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root.chmod(0o700)
        self.lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self.lock, 20).decode() or "another process"
            os.close(self.lock)
            raise RuntimeError(f"{self.root} is in use by process {holder}: give each server its own") from None
        os.pwrite(self.lock, f"{os.getpid():<20}".encode(), 0)
        for leftover in self.root.glob("??/*.tmp"):
            leftover.unlink()

    def read(self, batch: Batch) -> Sequence[Status]:
        return [self._read(*block) for block in self._blocks(batch)]

    def write(self, batch: Batch) -> Sequence[Status]:
        return [self._write(*block) for block in self._blocks(batch)]

    def close(self) -> None:
        os.close(self.lock)

    def probe(self, batch: Batch) -> int:
        held = [path.exists() for path, _ in self._blocks(batch)]
        return (held + [False]).index(False)

    def delete(self, batch: Batch) -> Sequence[Status]:
        for path, _ in self._blocks(batch):
            path.unlink(missing_ok=True)
        return [Status.OK] * len(batch)

    def list(self) -> Iterator[Listing]:
        files = sorted(self.root.glob("??/*.kv"), key=lambda file: file.stat().st_mtime_ns)
        keys = np.frombuffer(bytes.fromhex("".join(file.name[:64] for file in files)), np.uint8)
        groups = np.array([int(file.name[65:-3]) for file in files], np.uint8)
        lengths = np.array([file.stat().st_size for file in files], np.int64)
        yield Listing(keys.reshape(-1, 32), groups, lengths)

    def _blocks(self, batch: Batch) -> Iterator[tuple[Path, memoryview]]:
        for key, group, offset, length in zip(batch.keys, batch.groups, batch.offsets, batch.lengths, strict=True):
            name = key.tobytes().hex()
            yield self.root / name[:2] / f"{name}.{group}.kv", self.host[offset : offset + length]

    def _read(self, path: Path, block: memoryview) -> Status:
        try:
            with path.open("rb", buffering=0) as file:
                return Status.OK if file.readinto(block) == len(block) else Status.FAILED
        except FileNotFoundError:
            return Status.MISSING

    def _write(self, path: Path, block: memoryview) -> Status: ...
