"""The directory backend by itself: a real directory, no core around it."""

from __future__ import annotations

import ast
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import flexkv_backend_directory as directory
import numpy as np
import pytest
from flexkv_backend_directory import DirectoryBackend, DirectoryConfig

from flexkv_core.backend import Batch, OpenContext, Status
from flexkv_core.errors import DirectoryInUseError

SIZE = 8192


def batch(numbers: list[int], slot: int = 0) -> Batch:
    keys = np.zeros((len(numbers), 32), np.uint8)
    keys[:, 0] = keys[:, 31] = numbers
    offsets = np.arange(slot, slot + len(numbers), dtype=np.int64) * SIZE
    return Batch(keys, np.zeros(len(numbers), np.uint8), offsets, np.full(len(numbers), SIZE, np.int64))


@pytest.fixture
def host() -> bytearray:
    return bytearray(os.urandom(16 * SIZE))


def opened(root: Path, host: bytearray, **options: bool) -> DirectoryBackend:
    backend = DirectoryBackend(DirectoryConfig(root=root, **options))
    backend.open(OpenContext(memoryview(host), (SIZE,), None, logging.getLogger("test")))
    return backend


@pytest.mark.parametrize("durable", [False, True])
def test_round_trip_and_restart(tmp_path: Path, host: bytearray, durable: bool) -> None:
    before = bytes(host)
    backend = opened(tmp_path / "kv", host, durable=durable)
    assert backend.write(batch([1, 2, 3])) == [Status.OK] * 3
    backend.close()
    backend = opened(tmp_path / "kv", host)
    assert backend.read(batch([3, 9, 1], slot=8)) == [Status.OK, Status.MISSING, Status.OK]
    assert host[8 * SIZE : 9 * SIZE] == before[2 * SIZE : 3 * SIZE]
    assert host[9 * SIZE : 10 * SIZE] == before[9 * SIZE : 10 * SIZE]
    assert host[10 * SIZE : 11 * SIZE] == before[:SIZE]
    assert backend.probe(batch([1, 2, 9, 3])) == 2
    backend.close()


def test_list_is_oldest_first_and_delete_forgets(tmp_path: Path, host: bytearray) -> None:
    backend = opened(tmp_path, host)
    for number in (5, 3, 4):
        backend.write(batch([number]))
        path = next(tmp_path.glob(f"{number:02x}/*.kv"))
        os.utime(path, ns=(0, (10 - number) * 10**9))
    (listing,) = backend.list()
    assert listing.keys[:, 0].tolist() == [5, 4, 3]
    assert listing.lengths.tolist() == [SIZE] * 3
    assert backend.delete(batch([4, 77])) == [Status.OK] * 2
    assert [len(piece.groups) for piece in backend.list()] == [2]
    backend.close()


def test_a_file_that_was_cut_short_is_failed(tmp_path: Path, host: bytearray) -> None:
    backend = opened(tmp_path, host)
    backend.write(batch([1]))
    os.truncate(next(tmp_path.glob("01/*.kv")), SIZE - 1)
    assert backend.read(batch([1])) == [Status.FAILED]
    backend.close()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, host: bytearray) -> None:
    backend = opened(tmp_path, host)
    shard = tmp_path / "02"
    shard.rmdir()
    assert backend.write(batch([1, 2, 3])) == [Status.OK, Status.FAILED, Status.OK]
    assert not list(tmp_path.rglob("*.tmp"))
    backend.close()


def test_files_are_private_and_leftovers_are_removed(tmp_path: Path, host: bytearray) -> None:
    root = tmp_path / "kv"
    backend = opened(root, host)
    backend.write(batch([1]))
    file = next(root.glob("01/*.kv"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    backend.close()
    leftover = root / "01" / "half.tmp"
    leftover.write_bytes(b"x")
    opened(root, host).close()
    assert not leftover.exists()


def test_two_servers_on_one_directory(tmp_path: Path, host: bytearray) -> None:
    backend = opened(tmp_path, host)
    with pytest.raises(DirectoryInUseError, match=rf"in use by process {os.getpid()}"):
        opened(tmp_path, host)
    backend.close()
    opened(tmp_path, host).close()


def test_the_lock_dies_with_its_process(tmp_path: Path, host: bytearray) -> None:
    code = (
        "import os, sys; from pathlib import Path; from flexkv_core.backend import DirectoryLock; "
        "lock = DirectoryLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(DirectoryInUseError, match=str(holder.pid)):
        opened(tmp_path, host)
    holder.kill()
    holder.wait()
    opened(tmp_path, host).close()


def test_it_is_the_example_of_the_docs() -> None:
    source = Path(directory.__file__).read_text()
    assert len(source.splitlines()) <= 82
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else name.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert {name for name in imported if name and name.startswith("flexkv")} == {"flexkv_core.backend"}
