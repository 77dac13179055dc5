"""A slot-addressed tier that survives: what it held is found again, its capacity holds, nothing is wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Install
from helpers import BLOCK_SIZE, SLOT_BYTES, Engine, prompt

from flexkv_core.manager import KVCacheManager

PLUGIN = '''
import mmap
import os
from pathlib import Path
import numpy as np
import flexkv_core.backend as fk


class Config(fk.BackendConfig):
    file: Path


class SlotFile(fk.Backend):
    """Slots in one file, recovered by their seals."""

    capabilities = fk.Capabilities(addressing="slot", persistent=True, concurrency=2)

    def __init__(self, config):
        self.path = config.file

    def open(self, context):
        self.host, self.size = context.host, context.capacity
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self.fd, self.size)

    def read(self, batch):
        return [self._move(os.preadv, *row) for row in self._rows(batch)]

    def write(self, batch):
        return [self._move(os.pwritev, *row) for row in self._rows(batch)]

    def close(self):
        os.close(self.fd)

    def recover(self):
        with mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ) as medium:
            found = fk.find_seals(medium)
        payload = -(-found.lengths // fk.PAGE) * fk.PAGE
        slots = (found.pages - payload) // fk.PAGE
        yield fk.Recovered(found.roots, found.keys, found.parents, found.depths, found.groups, payload + fk.PAGE, slots)

    def _rows(self, batch):
        return zip(batch.offsets.tolist(), (batch.slots * fk.PAGE).tolist(), batch.lengths.tolist())

    def _move(self, call, host, place, length):
        whole = call(self.fd, [self.host[host : host + length]], place) == length
        return fk.Status.OK if whole else fk.Status.FAILED


@fk.hookimpl
def flexkv_backend():
    return fk.BackendSpec("slotfile", Config, SlotFile, contract_version=1, addressing="slot")
'''


@pytest.fixture(autouse=True)
def _plugin(install_plugin: Install) -> None:
    install_plugin("slotfile", PLUGIN)


def stack(tmp_path: Path, host_blocks: int = 16, blocks: int = 200, **tier: Any) -> dict[str, Any]:
    file = {"backend": "slotfile", "file": str(tmp_path / "slots"), "capacity": blocks * SLOT_BYTES, **tier}
    host = {"backend": "cpu", "capacity": host_blocks * SLOT_BYTES}
    return {"block_size": BLOCK_SIZE, "tiers": [host, {**file, "write_queue": host_blocks * SLOT_BYTES}]}


def settled(manager: KVCacheManager, blocks: int) -> dict[str, Any]:
    """Wait until the tier has said what survived."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        figures: dict[str, Any] = manager.stats()["tiers"]["slotfile"]
        if figures["state"] == "ready" and figures["recovered_blocks"] >= blocks and manager.drain(10):
            return figures
        time.sleep(0.01)
    raise AssertionError(manager.stats())


@pytest.mark.parametrize("isolation", ["process", "none"])
def test_blocks_of_before_the_restart_are_found_and_right(tmp_path: Path, isolation: str) -> None:
    with KVCacheManager.open(stack(tmp_path, isolation=isolation)) as manager:
        engine = Engine(manager)
        long, short = engine.keys(prompt(1, 12)), engine.keys(prompt(2, 5))
        branch = engine.keys(np.concatenate([prompt(1, 6), prompt(3, 4)]))
        for keys in (long, short, branch):
            engine.store(keys)
            assert manager.drain(10)
        stored = manager.stats()["tiers"]["slotfile"]["stored_blocks"]
        assert stored == 12 + 5 + 4
    with KVCacheManager.open(stack(tmp_path, isolation=isolation)) as manager:
        engine = Engine(manager)
        figures = settled(manager, stored)
        assert figures["recovered_blocks"] == stored
        assert figures["used_bytes"] == stored * SLOT_BYTES
        for keys in (long, branch, short):
            assert manager.lookup(engine.namespace, keys).blocks == len(keys)
            ready, wrong, sources = engine.load(keys)
            assert (ready, wrong) == (len(keys), 0)
            assert sources["slotfile"] > 0


def test_the_capacity_holds_across_restarts(tmp_path: Path) -> None:
    for life in range(3):
        with KVCacheManager.open(stack(tmp_path, blocks=40)) as manager:
            engine = Engine(manager)
            settled(manager, 20 if life else 0)
            for number in range(12):
                keys = engine.keys(prompt(100 * life + number, 6))
                engine.store(keys)
                assert manager.drain(10)
            figures = manager.stats()["tiers"]["slotfile"]
            assert figures["used_bytes"] <= 40 * SLOT_BYTES
            assert figures["stored_blocks"] == 72, "there is room for what is new"
            assert engine.load(keys)[:2] == (6, 0)


def test_what_nobody_claims_goes_first(tmp_path: Path) -> None:
    with KVCacheManager.open(stack(tmp_path, blocks=40)) as manager:
        engine = Engine(manager, model="old")
        for number in range(6):
            engine.store(engine.keys(prompt(number, 6)))
            assert manager.drain(10)
    with KVCacheManager.open(stack(tmp_path, blocks=40)) as manager:
        engine = Engine(manager, model="new")
        deadline = time.monotonic() + 20
        while manager.stats()["tiers"]["slotfile"]["used_bytes"] < 36 * SLOT_BYTES and time.monotonic() < deadline:
            time.sleep(0.01)
        assert manager.stats()["tiers"]["slotfile"]["used_bytes"] == 36 * SLOT_BYTES, "kept for a model that may come"
        for number in range(6):
            engine.store(engine.keys(prompt(50 + number, 6)))
            assert manager.drain(10)
        figures = manager.stats()["tiers"]["slotfile"]
        assert (figures["stored_blocks"], figures["dropped_blocks"]) == (36, 0)
        assert engine.load(engine.keys(prompt(50, 6)))[:2] == (6, 0)


def test_a_damaged_block_is_a_miss(tmp_path: Path) -> None:
    with KVCacheManager.open(stack(tmp_path)) as manager:
        engine = Engine(manager)
        keys = engine.keys(prompt(1, 10))
        engine.store(keys)
        assert manager.drain(10)
    file = tmp_path / "slots"
    content = bytearray(file.read_bytes())
    slot = content.index(keys[4].tobytes()) // 4096 * 4096  # its seal's page
    content[slot - 100] ^= 1  # its payload
    file.write_bytes(content)
    with KVCacheManager.open(stack(tmp_path)) as manager:
        engine = Engine(manager)
        settled(manager, 10)
        assert manager.lookup(engine.namespace, keys).blocks == 10
        assert engine.load(keys)[:2] == (4, 0)
        assert manager.stats()["tiers"]["slotfile"]["corrupt_blocks"] == 1
        assert manager.lookup(engine.namespace, keys).blocks == 4
