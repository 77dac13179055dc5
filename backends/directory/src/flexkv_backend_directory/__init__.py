"""A tier that keeps each block in a file of its own, named by its key, below one directory."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import flexkv_core.backend as fk


class DirectoryConfig(fk.BackendConfig):
    root: Path
    durable: bool = False  # fsync each file before it becomes visible

    def epoch_directory(self) -> Path:
        return self.root / "epochs"


class DirectoryBackend(fk.Backend):
    capabilities = fk.Capabilities(addressing="key", persistent=True, concurrency=4)

    def __init__(self, config: DirectoryConfig) -> None:
        self.root, self.durable = config.root, config.durable

    def open(self, context: fk.OpenContext) -> None:
        self.host, self.log, self.lock = context.host, context.logger, fk.DirectoryLock(self.root)
        for shard in (self.root / f"{number:02x}" for number in range(256)):
            shard.mkdir(mode=0o700, exist_ok=True)
            for leftover in shard.glob("*.tmp"):
                leftover.unlink()

    def read(self, batch: fk.Batch) -> Sequence[fk.Status]:
        return [self._read(*block) for block in self._blocks(batch)]

    def write(self, batch: fk.Batch) -> Sequence[fk.Status]:
        return [self._write(*block) for block in self._blocks(batch)]

    def close(self) -> None:
        self.lock.release()

    def probe(self, batch: fk.Batch) -> int:
        return [*(path.exists() for path, _ in self._blocks(batch)), False].index(False)

    def delete(self, batch: fk.Batch) -> Sequence[fk.Status]:
        for path, _ in self._blocks(batch):
            path.unlink(missing_ok=True)
        return [fk.Status.OK] * len(batch)

    def list(self) -> Iterator[fk.Listing]:
        stats = sorted((f.stat().st_mtime_ns, f.stat().st_size, f.name) for f in self.root.glob("??/*.kv"))
        keys = bytes.fromhex("".join(name[:64] for _, _, name in stats))
        yield fk.listing(keys, [int(name[65:-3]) for _, _, name in stats], [size for _, size, _ in stats])

    def _blocks(self, batch: fk.Batch) -> Iterator[tuple[Path, memoryview]]:
        for key, group, start, length in zip(batch.keys, batch.groups, batch.offsets, batch.lengths, strict=True):
            name = key.tobytes().hex()
            yield self.root / name[:2] / f"{name}.{group}.kv", self.host[start : start + length]

    def _read(self, path: Path, block: memoryview) -> fk.Status:
        try:
            with path.open("rb", buffering=0) as file:
                return fk.Status.OK if file.readinto(block) == len(block) else fk.Status.FAILED
        except FileNotFoundError:
            return fk.Status.MISSING

    def _write(self, path: Path, block: memoryview) -> fk.Status:
        temporary = path.with_suffix(".tmp")  # the core never writes one block twice at a time
        try:
            with open(temporary, "wb", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                if file.write(block) < len(block):
                    raise OSError("short write")
                os.fsync(file) if self.durable else None
            temporary.rename(path)
            return fk.Status.OK
        except OSError as error:
            self.log.warning("%s was not written: %s", path, error)
            temporary.unlink(missing_ok=True)
            return fk.Status.FAILED


@fk.hookimpl
def flexkv_backend() -> fk.BackendSpec:
    return fk.BackendSpec("directory", DirectoryConfig, DirectoryBackend, contract_version=1, addressing="key")
