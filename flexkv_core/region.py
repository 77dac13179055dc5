"""The host region: the shared memory of the cpu tier, and the checks of what addresses into it.

Owns creating, sizing, pre-faulting, sharing and unmapping the region, and refusing one that the machine
cannot bear. Does not own slots (pool.py), nor what lies in them (seal.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from flexkv_core import _native
from flexkv_core.errors import HostMemoryError, LayoutError, StateError
from flexkv_core.layout import PAGE

HugePages = Literal["off", "try", "require"]
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as pre-faulting goes on, from the creating thread."""

RESERVE_SHARE = 0.05
RESERVE_BYTES = 512 << 20
"""What a region leaves to the rest of the machine or container: the larger of this and that share."""

_CHUNK = 256 << 20  # bytes pre-faulted between two calls of the progress callback
_log = logging.getLogger("flexkv.region")


# --- how much memory there is -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """One bound on memory.

    Attributes:
        name: what sets it, for people: "MemAvailable" or the cgroup's file.
        total: bytes that it allows in all.
        available: bytes of those not in use; caches that the kernel would give up count as available.
    """

    name: str
    total: int
    available: int

    @property
    def usable(self) -> int:
        """Bytes that a host region may take: what is available, less the reserve."""
        return self.available - max(int(self.total * RESERVE_SHARE), RESERVE_BYTES)


def memory_limits(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> list[MemoryLimit]:
    """Return the machine's limit and that of each cgroup (v2 and v1) above this process that has one.

    Args:
        proc: where procfs is mounted.
        cgroup: where the cgroup file systems are mounted.
    """
    info = _key_values(proc / "meminfo")
    limits = []
    if "MemTotal" in info and "MemAvailable" in info:
        limits.append(MemoryLimit("MemAvailable", info["MemTotal"] << 10, info["MemAvailable"] << 10))
    for line in _text(proc / "self" / "cgroup").splitlines():
        hierarchy, controllers, path = [*line.split(":", 2), "", ""][:3]
        if hierarchy == "0" and controllers == "":
            files = ("memory.max", "memory.current", "inactive_file")
            limits += _cgroup_limits(cgroup, path, *files)
            limits += _cgroup_limits(cgroup / "unified", path, *files)
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            limits += _cgroup_limits(cgroup / "memory", path, *files)
    return limits


def _cgroup_limits(root: Path, path: str, limit: str, usage: str, reclaimable: str) -> list[MemoryLimit]:
    """The limits from a process's cgroup up to the root. In a container the path may be the host's and not be
    here; the folders of it that exist, the root among them, are then the ones that bind."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    limits = []
    for depth in range(len(parts), -1, -1):
        folder = root.joinpath(*parts[:depth])
        bound, used = _text(folder / limit).strip(), _text(folder / usage).strip()
        if bound.isdigit() and used.isdigit():  # "max" is no limit
            cached = _key_values(folder / "memory.stat").get(reclaimable, 0)
            limits.append(MemoryLimit(str(folder / limit), int(bound), int(bound) - int(used) + cached))
    return limits


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _key_values(path: Path) -> dict[str, int]:
    """Lines such as "MemTotal:  123 kB" or "inactive_file 123"."""
    fields = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {field[0]: int(field[1]) for field in fields if len(field) >= 2 and field[1].isdigit()}


def check_memory(size_bytes: int, limits: list[MemoryLimit]) -> None:
    """Raise HostMemoryError if a region of this size would take what a limit reserves."""
    for limit in limits:
        if size_bytes > limit.usable:
            raise HostMemoryError(
                f"capacity {size_bytes} ({_size(size_bytes)}) of the cpu tier does not fit: {limit.name} "
                f"leaves {_size(limit.available)} of {_size(limit.total)}, "
                f"{_size(max(limit.usable, 0))} of that usable; "
                f"set capacity to at most {max(limit.usable, 0) >> 20}MiB, or free memory or raise the limit"
            )


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"


# --- the region ---------------------------------------------------------------------------------------------


class HostRegion:
    """Shared memory that every process of a FlexKV server maps: the hub of all transfers.

    It is a memfd, so nothing is left behind when its processes die, however they die. It is sealed against
    resizing, so that no holder can turn another's access into a SIGBUS. The creator hands `fd` to children
    (inheritance or SCM_RIGHTS); they `attach`. Memory goes back to the machine when the last one has closed
    it.

    `fd` belongs to the region and is not inheritable by itself. Views from `buffer` and `array` stay valid
    until they are dropped, even after `close`, which then only gives up this object's hold.
    """

    def __init__(self, fd: int, size: int) -> None:
        """Map `size` bytes of a memfd and take ownership of `fd`. Use `create` or `attach`."""
        self._fd = fd
        self._size = size
        self._map: mmap.mmap | None = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._array: npt.NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8)

    @classmethod
    def create(
        cls,
        size_bytes: int,
        huge_pages: HugePages = "try",
        *,
        prefault: bool = True,
        progress: Progress | None = None,
        threads: int | None = None,
        limits: list[MemoryLimit] | None = None,
        label: str = "flexkv",
    ) -> HostRegion:
        """Make a region.

        Args:
            size_bytes: rounded up to a page (`PAGE`; with huge pages to one of those): see `size`.
            huge_pages: "off"; "try": take reserved huge pages if there are enough, else ask for
                transparent ones and say so in the log; "require": reserved ones or an error.
            prefault: make all pages present now, so that the first transfers do not pay for it.
            progress: called as pre-faulting goes on.
            threads: that pre-fault; default: the processors that this process may use, at most 8.
            limits: memory limits to obey; default: what `memory_limits()` finds.
            label: its name in /proc/PID/maps.

        Raises:
            HostMemoryError: it does not fit; nothing has been allocated.
            LayoutError: a size that is not positive, or an unknown `huge_pages`.
        """
        if size_bytes <= 0:
            raise LayoutError(f"capacity {size_bytes}: must be a positive number of bytes")
        if huge_pages not in ("off", "try", "require"):
            raise LayoutError(f"huge_pages {huge_pages!r}: use 'off', 'try' or 'require'")
        if huge_pages != "off":
            region = cls._create_huge(size_bytes, prefault, progress, threads, huge_pages == "require", label)
            if region is not None:
                return region
        size = -(-size_bytes // PAGE) * PAGE
        check_memory(size, memory_limits() if limits is None else limits)
        region = cls._allocate(size, 0, label)
        try:
            if huge_pages == "try" and not _native.advise_huge_pages(region.address, size):
                _log.info("transparent huge pages are not to be had either")
            if prefault:
                region._prefault(progress, threads)
        except BaseException:
            region.close()
            raise
        return region

    @classmethod
    def _create_huge(
        cls, size_bytes: int, prefault: bool, progress: Progress | None, threads: int | None, required: bool, label: str
    ) -> HostRegion | None:
        """A region of reserved huge pages, or None if there are too few. They are outside MemAvailable."""
        info = _key_values(Path("/proc/meminfo"))
        page = info.get("Hugepagesize", 0) << 10
        free = (info.get("HugePages_Free", 0) - info.get("HugePages_Rsvd", 0)) * page
        try:
            if page == 0 or free < size_bytes:
                raise HostMemoryError(f"capacity {size_bytes}: {free} bytes of reserved huge pages are free")
            region = cls._allocate(-(-size_bytes // page) * page, os.MFD_HUGETLB, label)
            try:
                if prefault:
                    region._prefault(progress, threads)
            except BaseException:
                region.close()
                raise
        except HostMemoryError as error:
            if required:
                raise HostMemoryError(f"{error}; raise vm.nr_hugepages or set huge_pages to 'try'") from error
            _log.warning("no reserved huge pages, normal ones are used: %s", error)
            return None
        return region

    @classmethod
    def _allocate(cls, size: int, flags: int, label: str) -> HostRegion:
        try:
            fd = os.memfd_create(label, flags | os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise HostMemoryError(f"capacity {size}: no shared memory is to be had: {error}") from error
        try:
            os.fchmod(fd, 0o600)
            space = os.fstatvfs(fd)
            if space.f_blocks > 0 and space.f_bavail * space.f_frsize < size and not flags:
                raise HostMemoryError(
                    f"capacity {size}: shared memory has {space.f_bavail * space.f_frsize} bytes free; "
                    "lower capacity or raise the limit of the shared-memory file system"
                )
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, size)
        except OSError as error:
            os.close(fd)
            raise HostMemoryError(
                f"capacity {size}: the system refuses: {error}; lower capacity, or see ulimit -f and -v"
            ) from error
        except BaseException:
            os.close(fd)
            raise

    def _prefault(self, progress: Progress | None, threads: int | None) -> None:
        threads = threads if threads is not None else min(8, len(os.sched_getaffinity(0)))
        for start in range(0, self._size, _CHUNK):
            length = min(_CHUNK, self._size - start)
            error = _native.populate(self.address + start, length, threads)
            if error:
                raise HostMemoryError(
                    f"capacity {self._size}: {os.strerror(error)} after {start} bytes; lower capacity or free memory"
                )
            if progress is not None:
                progress(start + length, self._size)

    @classmethod
    def attach(cls, fd: int, size: int) -> HostRegion:
        """Map a region that another process made.

        Args:
            fd: its file descriptor, received from that process; it is duplicated and stays the caller's.
            size: the creator's `size`.

        Raises:
            LayoutError: the file is not of this size.
        """
        actual = os.fstat(fd).st_size
        if size <= 0 or size != actual:
            raise LayoutError(f"size {size}: the host region of fd {fd} has {actual} bytes")
        copy = os.dup(fd)
        try:
            return cls(copy, size)
        except BaseException:
            os.close(copy)
            raise

    @property
    def fd(self) -> int:
        """The memfd; StateError after `close`."""
        self._opened()
        return self._fd

    @property
    def size(self) -> int:
        """Bytes mapped: what was asked for, rounded up to pages."""
        return self._size

    @property
    def inode(self) -> int:
        """The memfd's inode: the same in every process that maps this region."""
        return os.fstat(self.fd).st_ino

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The whole region, (size,) uint8, writable; StateError after `close`."""
        return self._opened()

    @property
    def buffer(self) -> memoryview:
        """The whole region as a writable memoryview of bytes; StateError after `close`."""
        self._opened()
        return memoryview(cast(mmap.mmap, self._map))

    @property
    def address(self) -> int:
        """Where this process maps it; StateError after `close`."""
        return int(self._opened().ctypes.data)

    def _opened(self) -> npt.NDArray[np.uint8]:
        if self._array is None:
            raise StateError("the host region is closed")
        return self._array

    def close(self) -> None:
        """Give up the mapping and the file descriptor. May be called again. Memory that views still show
        stays mapped until they are dropped."""
        if self._map is None:
            return
        mapping, self._map, self._array = self._map, None, None
        os.close(self._fd)
        try:
            mapping.close()
        except BufferError:
            _log.debug("the host region is unmapped when its last view is dropped")

    def __enter__(self) -> HostRegion:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_map", None) is not None:
            with contextlib.suppress(OSError):
                self.close()


# --- checks of what addresses into it -----------------------------------------------------------------------


def host_bytes(host: Any) -> npt.NDArray[np.uint8]:
    """View a buffer (memoryview, bytearray, mmap, contiguous array) as a (size,) uint8 array, without a copy.

    The view is read-only if the buffer is. LayoutError for what is not one contiguous run of bytes.
    """
    try:
        return np.frombuffer(host, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise LayoutError(f"host {type(host).__name__}: must be a contiguous buffer of bytes ({error})") from error


def int64_vector(name: str, values: Any) -> npt.NDArray[np.int64]:
    """Return `values` as a C-contiguous (n,) int64 array; LayoutError naming `name` for anything else."""
    array = np.asarray(values)
    if array.dtype != np.int64 or array.ndim != 1:
        raise LayoutError(f"{name}: must be an int64 array of shape (n,), not {array.dtype} of shape {array.shape}")
    return np.ascontiguousarray(array)


def check_spans(host_size: int, offsets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64] | int) -> None:
    """Raise LayoutError naming index and value unless each [offset, offset + length) is in the host."""
    wrong = (offsets < 0) | (offsets > np.subtract(host_size, lengths))
    if wrong.any():
        i = int(np.argmax(wrong))
        length = int(np.broadcast_to(lengths, offsets.shape)[i])
        raise LayoutError(
            f"offsets[{i}] = {int(offsets[i])}: {length} bytes from there are not within the host region's "
            f"{host_size} bytes"
        )


def check_disjoint(offsets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64] | int) -> None:
    """Raise LayoutError naming index and value if two of the spans to be written overlap."""
    order = np.argsort(offsets, kind="stable")
    starts = offsets[order]
    ends = starts + np.broadcast_to(lengths, offsets.shape)[order]
    overlap = ends[:-1] > starts[1:]
    if overlap.any():
        at = int(np.argmax(overlap))
        i, j = int(order[at]), int(order[at + 1])
        raise LayoutError(f"offsets[{j}] = {int(offsets[j])}: overlaps the block of offsets[{i}] = {int(offsets[i])}")
