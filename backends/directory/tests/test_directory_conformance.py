"""The directory backend does what the contract asks: on a real file system, full, damaged and killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkv_core.testing import BackendConformance, StoredBlock
from flexkv_core.testing.conformance.duties_medium import file_throughput


class TestDirectoryConformance(BackendConformance):
    backend = "directory"
    exclusive = True
    ordered_listing = True

    @pytest.fixture(autouse=True)
    def _unmount(self) -> Iterator[None]:
        self.mounted: list[Path] = []
        yield
        for directory in self.mounted:
            subprocess.run(["umount", "-l", directory], check=True)

    def make_config(self, directory: Path) -> dict[str, Any]:
        return {"root": directory}

    def make_full_config(self, directory: Path) -> dict[str, Any] | None:
        """A file system of its own, where this user may mount one."""
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.full_bytes}", "tmpfs", str(directory)]
        with contextlib.suppress(OSError):
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                self.mounted.append(directory)
                return {"root": directory}
        return None

    def damage(self, block: StoredBlock, how: str) -> None:
        path = self._path(block)
        data = bytearray(path.read_bytes())
        if how == "truncate":
            os.truncate(path, self.random.randrange(len(data)))
        elif how == "flip":
            data[self.random.randrange(len(data) - 4096)] ^= 1 << self.random.randrange(8)
            path.write_bytes(data)
        elif block.other is not None:
            other = self._path(block.other)
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)

    def _path(self, block: StoredBlock) -> Path:
        return self.directory / block.key.hex()[:2] / f"{block.key.hex()}.{block.group}.kv"

    def medium_throughput(self, directory: Path) -> tuple[float, float]:
        return file_throughput(directory)
