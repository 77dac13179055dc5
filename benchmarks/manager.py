"""What control costs through the manager: stores and loads that copy nothing, in batches of 128 blocks.

The device's gather and scatter do nothing, blocks are not sealed, and a lower tier answers at once without touching a
byte: what is left is planning, books, index, queues, and the hand-overs between the caller, the owner thread, copy
threads and a tier process. One call at a time, from the call until the caller has its answer. Host memory is full, so
that a store evicts as much as it brings. "Drained" includes what sinks to the lower tier behind the calls.

References run beside it, in the caller's thread, without a manager: the same batch through the index alone, and a cache
that is a Python `OrderedDict` from bytes to slot. `presence` measures the record of a key-addressed tier.

    python benchmarks/manager.py [--json FILE]
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from harness import Benchmark

from flexkv_core import copying
from flexkv_core.index import GroupRule
from flexkv_core.index.native import NativeIndex
from flexkv_core.layout import Fragments, KVGroup, ModelSpec
from flexkv_core.manager import KVCacheManager
from flexkv_core.presence import Presence

BATCH = 128
HOST_BLOCKS = 16_384
CALLS = 100
RUNS = 7
WANTED_US = 5
PAYLOAD = 4096
SLOT = 2 * PAYLOAD
ROOMY = 8 << 30
RANDOM = np.random.default_rng(0)
BLOCKS = np.arange(BATCH, dtype=np.int64)
NO_SEALING = "flexkv_core.copying.seal_blocks replaced by a no-op"
INDEX_ALONE = (
    "flexkv_core.index.native.NativeIndex alone: evict, match, insert (store); match, touch, pin, unpin (load)"
)
DICTIONARY = "a Python OrderedDict from key bytes to slot: evict and insert (store); look up and move to the end (load)"

NULL_BACKEND = """
import numpy as np
import flexkv_core.backend as fk

class NullConfig(fk.BackendConfig):
    pass

class NullBackend(fk.Backend):
    capabilities = fk.Capabilities(addressing="key", persistent=True, concurrency=2)

    def __init__(self, config):
        pass

    def open(self, context):
        pass

    def read(self, batch):
        return np.zeros(len(batch), np.uint8)  # Status.OK

    write = delete = read

    def close(self):
        pass

@fk.hookimpl
def flexkv_backend():
    return fk.BackendSpec("null", NullConfig, NullBackend, contract_version=1, addressing="key")
"""

bench = Benchmark("manager")


class NullDevice:
    """Blocks of the right size that nobody copies."""

    def fragments(self, group: int) -> Fragments:
        zero, size = np.zeros(1, np.int64), np.array([PAYLOAD], np.int64)
        return Fragments(np.zeros(1, np.uint64), size, size, zero, PAYLOAD, BATCH)

    def gather(self, host: Any, offsets: np.ndarray, device_blocks: np.ndarray, group: int = 0) -> None:
        pass

    scatter = gather


@contextmanager
def null_backend() -> Iterator[None]:
    """Installs the null backend as pip would, for this process and tier processes."""
    with tempfile.TemporaryDirectory() as site:
        (Path(site) / "flexkv_null.py").write_text(NULL_BACKEND)
        info = Path(site) / "flexkv_null-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flexkv-null\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[flexkv.backends]\nnull = flexkv_null\n")
        sys.path.insert(0, site)
        try:
            yield
        finally:
            sys.path.remove(site)


def no_sealing(*arguments: Any, **options: Any) -> None:
    pass


@contextmanager
def opened(below: str, capacity: int = ROOMY) -> Iterator[tuple[KVCacheManager, Any]]:
    """A manager whose host memory is full; `below`: "nothing", or the isolation of the null tier of that
    capacity."""
    tiers: list[dict[str, Any]] = [{"backend": "cpu", "capacity": HOST_BLOCKS * SLOT}]
    if below != "nothing":
        queue = HOST_BLOCKS * SLOT
        tiers.append({"backend": "null", "capacity": capacity, "isolation": below, "write_queue": queue})
    seal, copying.seal_blocks = copying.seal_blocks, no_sealing
    try:
        with null_backend(), KVCacheManager.open({"tiers": tiers}, verify=False) as manager:
            namespace = manager.register(ModelSpec("null", 16, (KVGroup(PAYLOAD),)), NullDevice())
            while any(tier["state"] != "ready" for tier in manager.stats()["tiers"].values()):
                time.sleep(0.01)
            for _ in range(HOST_BLOCKS // BATCH + 1):
                store(manager, namespace, random_keys())
                assert manager.drain(60)
            yield manager, namespace
    finally:
        copying.seal_blocks = seal


def random_keys(n: int = BATCH) -> np.ndarray:
    """Keys are digests: random bytes are as good."""
    return RANDOM.integers(0, 256, (n, 32), dtype=np.uint8)


def store(manager: KVCacheManager, namespace: Any, keys: np.ndarray) -> None:
    transfer = manager.store(namespace, keys, BLOCKS)
    assert transfer.wait(10)
    assert transfer.blocks == BATCH


def load(manager: KVCacheManager, namespace: Any, keys: np.ndarray) -> None:
    fetch = manager.fetch(namespace, keys)
    assert fetch.wait(10)
    transfer = manager.load(fetch, BLOCKS)
    assert transfer.wait(10)
    fetch.release()
    assert transfer.blocks == BATCH


class Timed:
    """Microseconds of single calls, all kept for percentiles."""

    def __init__(self, act: Callable[[np.ndarray], None], batches: Callable[[], list[np.ndarray]]) -> None:
        self.act = act
        self.batches = batches
        self.all: list[float] = []

    def __call__(self) -> float:
        """Microseconds a block: of the median call of one run, because this process does not have the machine alone."""
        batches = self.batches()
        took = []
        for keys in batches:
            start = time.perf_counter()
            self.act(keys)
            took.append((time.perf_counter() - start) * 1e6)
        self.all += took
        return statistics.median(took) / BATCH


def fresh() -> list[np.ndarray]:
    return [random_keys() for _ in range(CALLS)]


def rested(manager: KVCacheManager) -> list[np.ndarray]:
    """The same, once the tiers have nothing to do: what a run queues fits in host memory."""
    assert manager.drain(60)
    return fresh()


# ---------------------------------------------------------------- references


class IndexAlone:
    """The same batches through the index, without slots, books or threads."""

    root = hashlib.sha256(b"benchmark").digest()

    def __init__(self) -> None:
        self.index = NativeIndex(1, ["lru"])
        self.index.add_namespace(self.root, [GroupRule()])
        self.kept: list[np.ndarray] = []
        for at in range(0, HOST_BLOCKS, BATCH):
            self.kept.append(random_keys())
            self.index.insert(self.root, self.kept[-1], 0, 0, np.arange(at, at + BATCH))

    def store(self, keys: np.ndarray) -> None:
        gone = self.index.evict(0, BATCH)
        assert gone is not None
        self.index.match(self.root, keys)
        self.index.insert(self.root, keys, 0, 0, gone.slots)

    def load(self, keys: np.ndarray) -> None:
        assert self.index.match(self.root, keys).blocks == BATCH
        self.index.touch(self.root, keys)
        self.index.pin(self.root, keys, 0, 0, 0, BATCH)
        self.index.unpin(self.root, keys, 0, 0, 0, BATCH)


class Dictionary:
    """What a cache written in Python does: an object a block."""

    def __init__(self) -> None:
        self.slots: OrderedDict[bytes, int] = OrderedDict()
        self.kept: list[np.ndarray] = []
        for at in range(0, HOST_BLOCKS, BATCH):
            self.kept.append(random_keys())
            self.slots.update((key.tobytes(), at + i) for i, key in enumerate(self.kept[-1]))

    def store(self, keys: np.ndarray) -> None:
        for key in keys:
            name = key.tobytes()
            if name not in self.slots:
                _, slot = self.slots.popitem(last=False)
                self.slots[name] = slot

    def load(self, keys: np.ndarray) -> None:
        for key in keys:
            name = key.tobytes()
            assert name in self.slots
            self.slots.move_to_end(name)


# ---------------------------------------------------------------- the manager


def add_percentiles(rows: Benchmark, name: str, params: dict[str, object], took: list[float]) -> None:
    for percent in (50, 99):
        figure = float(np.percentile(took, percent))
        rows.add_row(f"{name} p{percent}", params | {"calls": len(took)}, "us/call", [figure])


def measure(rows: Benchmark, below: str) -> None:
    params: dict[str, object] = {"blocks": BATCH, "below": below, "sealing": NO_SEALING, "wanted_us": WANTED_US}
    with opened(below) as (manager, namespace):
        stores = Timed(lambda keys: store(manager, namespace, keys), lambda: rested(manager))
        for kind, reference in ((IndexAlone, INDEX_ALONE), (Dictionary, DICTIONARY)):
            beside = kind()
            apart = Timed(beside.store, stores.batches)
            rows.compare("store", params, "us/block", stores, reference, apart, runs=RUNS)
        assert manager.drain(60)
        add_percentiles(rows, "store", params, stores.all)

        kept = fresh()[: HOST_BLOCKS // BATCH // 2]
        for keys in kept:
            store(manager, namespace, keys)
        assert manager.drain(60)
        loads = Timed(lambda keys: load(manager, namespace, keys), lambda: kept)
        for kind, reference in ((IndexAlone, INDEX_ALONE), (Dictionary, DICTIONARY)):
            beside = kind()
            half = beside.kept[: len(kept)]
            rows.compare(
                "fetch and load", params, "us/block", loads, reference, Timed(beside.load, lambda: half), runs=RUNS
            )
        add_percentiles(rows, "fetch and load", params, loads.all)

        if below == "nothing":
            return

        def drained(clock: Callable[[], float]) -> float:
            batches = rested(manager)
            start = clock()
            for keys in batches:
                store(manager, namespace, keys)
            assert manager.drain(60)
            return (clock() - start) * 1e6 / CALLS / BATCH

        rows.add_row("store, drained", params, "us/block", [drained(time.perf_counter) for _ in range(RUNS)])
        cpu = [drained(time.process_time) for _ in range(RUNS)]
        rows.add_row("store, drained, this process's processor time", params, "us CPU/block", cpu)
        lower = fresh()
        for keys in [*lower, *fresh(), *fresh()]:  # the last ones push the first out of host memory
            store(manager, namespace, keys)
            assert manager.drain(60)
        reads = Timed(lambda keys: load(manager, namespace, keys), lambda: lower)
        reads()
        found = manager.stats()["tiers"]["null"]
        assert found["hit_blocks"] == CALLS * BATCH, found
        rows.add_row("fetch from below and load", params, "us/block", [statistics.median(reads.all) / BATCH])
        add_percentiles(rows, "fetch from below and load", params, reads.all)
        assert found["dropped_blocks"] == found["failed_blocks"] == found["evicted_blocks"] == 0, found


@bench.part
def host_memory_only(rows: Benchmark) -> None:
    measure(rows, "nothing")


@bench.part
def over_a_tier_in_process(rows: Benchmark) -> None:
    measure(rows, "none")


@bench.part
def over_a_tier_process(rows: Benchmark) -> None:
    measure(rows, "process")


@bench.part
def over_a_full_tier(rows: Benchmark) -> None:
    """Each store also deletes in the tier what it brings."""
    params: dict[str, object] = {"blocks": BATCH, "below": "process", "sealing": NO_SEALING}
    with opened("process", HOST_BLOCKS * SLOT) as (manager, namespace):
        stores = Timed(lambda keys: store(manager, namespace, keys), lambda: rested(manager))
        rows.add_row("store, tier full", params, "us/block", [stores() for _ in range(RUNS)])
        add_percentiles(rows, "store, tier full", params, stores.all)
        assert manager.drain(60)
        assert manager.stats()["tiers"]["null"]["evicted_blocks"] >= RUNS * CALLS * BATCH


@bench.part
def hand_over(rows: Benchmark) -> None:
    """What one wake-up of another thread costs here: an event there and an event back, halved."""
    there, back, end = threading.Event(), threading.Event(), threading.Event()

    def answer() -> None:
        while there.wait() and not end.is_set():
            there.clear()
            back.set()

    thread = threading.Thread(target=answer)
    thread.start()

    def run() -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            back.clear()
            there.set()
            back.wait()
        return (time.perf_counter() - start) * 1e6 / CALLS / 2

    rows.add_row("hand-over between two threads", {}, "us", [run() for _ in range(RUNS)])
    end.set()
    there.set()
    thread.join()


# ---------------------------------------------------------------- the record of a key-addressed tier


@bench.part
def presence(rows: Benchmark) -> None:
    entries = 10**6
    record, beside = Presence(entries * SLOT, entries), OrderedDict[bytes, int]()
    keys, groups, lengths = random_keys(entries), np.zeros(BATCH, np.uint8), np.full(BATCH, SLOT)
    batches = [keys[at : at + BATCH] for at in range(0, entries - entries % BATCH, BATCH)]
    grown = []
    for batch in batches:
        start = time.thread_time()  # of the processor: that another process had it says nothing of the record
        record.add(batch, groups, lengths)
        grown.append((time.thread_time() - start) * 1e6)
        beside.update((key.tobytes(), SLOT) for key in batch)
    params: dict[str, object] = {"entries": entries, "blocks": BATCH}
    rows.add_row("presence: growing to a million", params, "us CPU/block", [sum(grown) / len(grown) / BATCH])
    rows.add_row("presence: growing to a million, worst call", params, "us CPU", [max(grown)])
    rows.add_row("presence: memory", params | {"wanted_bytes": 64}, "bytes/entry", [record.memory_bytes / len(record)])

    def some() -> list[np.ndarray]:
        return [batches[i] for i in RANDOM.integers(0, len(batches), 300)]

    def touch(names: np.ndarray) -> None:
        for key in names:
            beside.move_to_end(key.tobytes())

    def turn(names: np.ndarray) -> None:
        record.evict_for(BATCH * SLOT)
        record.add(names, groups, lengths)

    def turn_beside(names: np.ndarray) -> None:
        for key in names:
            beside.popitem(last=False)
            beside[key.tobytes()] = SLOT

    def held_beside(names: np.ndarray) -> None:
        np.fromiter((key.tobytes() in beside for key in names), np.bool_, len(names))

    reference = "a Python OrderedDict from key bytes to length"
    unit = "us/block"

    def held_native(names: np.ndarray) -> None:
        record.held(names, 0)

    held = Timed(held_native, some)
    rows.compare("presence: held", params, unit, held, reference, Timed(held_beside, some), runs=RUNS)
    used = Timed(lambda names: record.touch(names, 0), some)
    rows.compare("presence: touch", params, unit, used, reference, Timed(touch, some), runs=RUNS)
    turned = Timed(turn, lambda: [random_keys() for _ in range(300)])
    rows.compare(
        "presence: evict and add", params, unit, turned, reference, Timed(turn_beside, turned.batches), runs=RUNS
    )


if __name__ == "__main__":
    raise SystemExit(bench.main())
