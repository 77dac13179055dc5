"""Counting what may leak: before and after, in every test that kills something.

`no_leaks()` for a process: descriptors, threads, children, shared memory. `nothing_held(manager)` for a manager that
is open and quiet: slots, pins, queues. Fixtures of a file: ``pytestmark = pytest.mark.usefixtures("leak_check")``.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from flexkv_core.manager import KVCacheManager
from flexkv_core.plans import HOST

SETTLE_S = 10.0
"""Threads of a closed manager end on their own time, but soon."""


class Leaks:
    """What was there at first, and what a test says it leaves on purpose."""

    def __init__(self) -> None:
        self._before = resources()
        self._allowed: list[str] = []

    def allow(self, pattern: str) -> None:
        """Leave alone what this regular expression matches, such as a thread that hangs on purpose."""
        self._allowed.append(pattern)

    def found(self) -> dict[str, int]:
        """What is there now and was not before."""
        more = resources() - self._before
        return {name: count for name, count in more.items() if not any(re.search(p, name) for p in self._allowed)}


def resources() -> Counter[str]:
    """What this process holds of the machine, by name."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists
            found[f"fd {re.sub(r'[0-9]+', 'N', os.readlink(f'/proc/self/fd/{fd}'))}"] += 1
    for thread in threading.enumerate():
        found[f"thread {re.sub(r'[0-9]+', 'N', thread.name)}"] += 1
    for pid in children():
        found[f"child {pid}"] += 1
    for line in Path("/proc/self/maps").read_text().splitlines():
        name = line.split(maxsplit=5)[-1]
        if name.startswith(("/memfd:", "/dev/shm", "/dev/hugepages")):
            found[f"mapping {name}"] += 1
    for name in os.listdir("/dev/shm"):
        if "flexkv" in name:
            found[f"/dev/shm {name}"] += 1
    return found


def children() -> list[int]:
    """Children of this process, those not reaped included."""
    pids = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            pids += [int(pid) for pid in (task / "children").read_text().split()]
    return pids


@contextlib.contextmanager
def no_leaks() -> Iterator[Leaks]:
    """Fail if more is held after the block than before it. Nothing is said if the block itself fails."""
    leaks = Leaks()
    yield leaks
    deadline = time.monotonic() + SETTLE_S
    while (found := leaks.found()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not found, f"left behind: {found}"


def nothing_held(manager: KVCacheManager, timeout_s: float = 10.0) -> None:
    """Wait until nothing is under way; then every slot in use is a block's, and nothing is pinned, booked or queued.

    Needs fetches that were released and models whose blocks have one size.
    """
    deadline = time.monotonic() + timeout_s
    while (held := _held(manager)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not held, f"still held: {held}"


def _held(manager: KVCacheManager) -> dict[str, object]:
    stats = manager.stats()
    planner, held = (
        manager._planner,
        {name: stats[name] for name in ("fetches", "pinned_fetches", "pinned_bytes", "pending_stores")},
    )
    with manager._lock:
        index, pool = planner.index, planner.tiers[HOST].pool
        assert pool is not None
        held["pins"] = index.statistics()["pinned"]
        held["incoming"] = len(planner._incoming)
        sizes = {g.slot_bytes for model in planner._ledger.models.values() for g in model.groups}
        assert len(sizes) == 1, "models of one size"
        held["slots without a block"] = pool.used_bytes // sizes.pop() - index.count(HOST)
        for tier in planner.tiers[HOST + 1 :]:
            held[f"{tier.name}: queued"] = len(tier.queued)
            held[f"{tier.name}: reserved"] = tier.reserved_bytes
            held[f"{tier.name}: pins"] = tier.presence.pinned if tier.presence is not None else 0
    for queue in list(manager._scheduler.queues().values()):
        held[f"tier {queue.number}: traffic"] = (
            queue.in_flight + queue.settling + len(queue.reads) + len(queue.writes) + len(queue.prefetches)
        )
        held[f"tier {queue.number}: queued bytes"] = queue.queued_bytes
    return {name: count for name, count in held.items() if count}
