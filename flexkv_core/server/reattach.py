"""Host memory of a killed server: finding it, and making sure that nothing touches it any more.

The host region is a memfd, so it lives as long as a process maps it: after a server was killed, the engines' workers
do, pinned. The next server takes it over rather than allocating a second one. Its tier processes die with it, but not
at once; a worker may still be copying. So the region is taken over only when every process that maps it is known to be
still: it has ended, or it is an agent that has connected anew, which it does when its old copies have ended.

Owns the search in /proc and the waiting. Does not own the region (`flexkv_core/region.py`) or connections.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from flexkv_core.errors import LayoutError
from flexkv_core.region import HostRegion

logger = logging.getLogger("flexkv.server")

STEP_S = 0.01
"""Between two looks at /proc, while waiting at start-up only."""


def label_of(path: Path) -> str:
    """What the host region of the server at this socket is called in /proc."""
    return "flexkv-" + hashlib.sha256(os.fsencode(path)).hexdigest()[:12]


def holders(label: str, proc: Path = Path("/proc")) -> dict[int, set[int]]:
    """Find memfds of that label: inode -> processes of this user, other than this one, that map it."""
    found: dict[int, set[int]] = {}
    for entry in proc.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            maps = (entry / "maps").read_text(errors="replace")
        except OSError:  # gone, or not ours
            continue
        for line in maps.splitlines() if f"/memfd:{label} " in maps else ():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith(f"/memfd:{label} "):
                found.setdefault(int(fields[4]), set()).add(int(entry.name))
    return found


def open_through(pid: int, inode: int, proc: Path = Path("/proc")) -> HostRegion | None:
    """Map a memfd that another process has open; None where that is not allowed, or it has closed it."""
    try:
        links = list((proc / str(pid) / "fd").iterdir())
    except OSError:
        return None
    for link in links:
        try:
            if not os.readlink(link).startswith("/memfd:") or link.stat().st_ino != inode:
                continue
            fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            return HostRegion.attach(fd, os.fstat(fd).st_size)
        except (LayoutError, OSError):
            return None
        finally:
            os.close(fd)
    return None


def take_over(
    label: str, size_bytes: int, still: Callable[[int, int], bool], timeout_s: float, proc: Path = Path("/proc")
) -> HostRegion | None:
    """The region that an earlier server of this label left in its workers' hands, or None.

    Args:
        size_bytes: what the stack needs; a region of fewer bytes, or of over a sixteenth more, is not taken.
        still: (pid, inode) -> whether this process has said that it touches the region no more.
        timeout_s: how long to wait for all who map it to be still.
    """
    left = holders(label, proc)
    if not left:
        return None
    inode, pids = max(left.items(), key=lambda item: len(item[1]))
    region = None
    for pid in pids:
        region = open_through(pid, inode, proc)
        if region is not None:
            break
    if region is None:
        logger.warning("host memory of an earlier server is held by processes %s, but cannot be opened", sorted(pids))
        return None
    if not size_bytes <= region.size <= size_bytes + max(size_bytes // 16, 4 << 20):
        logger.warning(
            "host memory of an earlier server has %d bytes, %d are needed: not reused", region.size, size_bytes
        )
        region.close()
        return None
    end = time.monotonic() + timeout_s
    while True:
        restless = [pid for pid in holders(label, proc).get(inode, ()) if not still(pid, inode)]
        if not restless:
            logger.info("took over %d bytes of host memory of an earlier server", region.size)
            return region
        if time.monotonic() >= end:
            logger.warning("processes %s may still write to host memory of an earlier server: not reused", restless)
            region.close()
            return None
        time.sleep(STEP_S)
