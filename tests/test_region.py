"""The host region: sharing, sizing, refusal, and that nothing is left behind."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flexkv_core.errors import HostMemoryError, LayoutError, StateError
from flexkv_core.layout import PAGE
from flexkv_core.region import HostRegion, MemoryLimit, check_memory, memory_limits

MIB = 1 << 20
GIB = 1 << 30
PLENTY = [MemoryLimit("plenty", 1 << 50, 1 << 50)]


def make(size: int = MIB, **options: object) -> HostRegion:
    return HostRegion.create(size, "off", limits=PLENTY, **options)  # type: ignore[arg-type]


def open_fds() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:flexkv")


def test_views_show_the_same_bytes() -> None:
    with make(PAGE + 1) as region:
        assert region.size == 2 * PAGE
        assert region.array.shape == (2 * PAGE,)
        assert region.array.dtype == np.uint8
        assert not region.array.any()
        region.buffer[5] = 7
        assert region.array[5] == 7
        region.array[-1] = 9
        assert region.buffer[-1] == 9
        assert not region.buffer.readonly
        assert region.address == region.array.ctypes.data
        assert region.address % PAGE == 0


def test_nothing_is_left_open_or_mapped() -> None:
    make().close()
    fds, maps = open_fds(), mappings()
    for _ in range(20):
        with make() as region, HostRegion.attach(region.fd, region.size) as other:
            other.array[0] = 1
        make()  # dropped without close
    assert open_fds() == fds
    assert mappings() == maps


def test_close_may_be_repeated_and_tolerates_views() -> None:
    maps = mappings()
    region = make()
    view, array = region.buffer, region.array
    region.close()
    region.close()
    array[3] = 4  # still mapped: a late reader must not crash
    assert view[3] == 4
    for name in ("fd", "array", "buffer", "address"):
        with pytest.raises(StateError, match="closed"):
            getattr(region, name)
    del view, array
    assert mappings() == maps


CHILD = """
import sys
from flexkv_core.region import HostRegion
region = HostRegion.attach(int(sys.argv[1]), int(sys.argv[2]))
region.array[:] = region.array[::-1].copy()
print("done", flush=True)
sys.stdin.read()
"""


def test_a_child_process_shares_it_and_may_be_killed() -> None:
    with make() as region:
        region.array[:] = np.arange(region.size) % 251
        expected = region.array[::-1].copy()
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(region.fd), str(region.size)],
            pass_fds=[region.fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"done\n"
            child.send_signal(signal.SIGKILL)
        np.testing.assert_array_equal(region.array, expected)


def test_is_private_and_of_fixed_size() -> None:
    with make() as region:
        assert os.fstat(region.fd).st_mode & 0o777 == 0o600
        assert not os.get_inheritable(region.fd)
        for size in (PAGE, 2 * MIB):
            with pytest.raises(PermissionError):
                os.ftruncate(region.fd, size)
        for size in (MIB - PAGE, MIB + PAGE, 0):
            with pytest.raises(LayoutError, match=f"size {size}:.*{MIB}"):
                HostRegion.attach(region.fd, size)


@pytest.mark.parametrize("threads", [1, 3, None])
def test_prefault_makes_every_page_present_and_reports_it(threads: int | None) -> None:
    size, seen = 300 * MIB + PAGE, []
    with make(size, threads=threads, progress=lambda done, total: seen.append((done, total))) as region:
        assert os.fstat(region.fd).st_blocks * 512 >= size
        rss = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssShmem" in line)
        assert int(rss.split()[1]) * 1024 >= size
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len(seen) > 1


def test_without_prefault_no_memory_is_taken() -> None:
    with make(64 * MIB, prefault=False) as region:
        assert os.fstat(region.fd).st_blocks == 0


def test_a_raising_progress_leaves_nothing_behind() -> None:
    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    fds, maps = open_fds(), mappings()
    with pytest.raises(KeyboardInterrupt):
        make(progress=interrupt)
    assert open_fds() == fds
    assert mappings() == maps


def reserved_huge_bytes() -> int:
    lines = [line.replace(":", " ").split() for line in Path("/proc/meminfo").read_text().splitlines()]
    info = {line[0]: int(line[1]) for line in lines}
    return info.get("HugePages_Free", 0) * info.get("Hugepagesize", 0) * 1024


def test_huge_pages_fall_back_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    size = reserved_huge_bytes() + MIB  # more than there is
    with (
        caplog.at_level(logging.WARNING, "flexkv.region"),
        HostRegion.create(size, "try", prefault=False, limits=PLENTY) as region,
    ):
        assert region.size == size
    assert [record.name for record in caplog.records] == ["flexkv.region"]
    with pytest.raises(HostMemoryError, match=r"vm\.nr_hugepages"):
        HostRegion.create(size, "require")


@pytest.mark.parametrize(
    ("size", "huge_pages", "message"),
    [(0, "off", "capacity 0"), (-5, "try", "capacity -5"), (PAGE, "yes", "huge_pages 'yes'")],
)
def test_bad_arguments(size: int, huge_pages: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        HostRegion.create(size, huge_pages)  # type: ignore[arg-type]


def test_refused_before_the_machine_would_run_out() -> None:
    fds = open_fds()
    with pytest.raises(HostMemoryError, match=r"capacity 1125899906842624 .*set capacity to at most \d+MiB"):
        HostRegion.create(1 << 50, "off")
    assert open_fds() == fds


def test_a_file_size_limit_is_an_error_with_the_reason() -> None:
    fds = open_fds()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(HostMemoryError, match="capacity 2097152: the system refuses"):
            make(2 * MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_fds() == fds


# --- where the limits come from: folders of the shape that the kernel shows ---------------------------------


def machine(root: Path, cgroup: str, files: dict[str, str]) -> list[MemoryLimit]:
    texts = {
        "proc/meminfo": "MemTotal:       65536000 kB\nMemFree: 1 kB\nMemAvailable:   32768000 kB\n",
        "proc/self/cgroup": cgroup,
    }
    for name, text in (texts | {f"cg/{k}": v for k, v in files.items()}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return memory_limits(root / "proc", root / "cg")


def test_machine_without_cgroup_limits(tmp_path: Path) -> None:
    limits = machine(tmp_path, "0::/\n", {"memory.stat": "anon 5\n"})
    assert limits == [MemoryLimit("MemAvailable", 65536000 * 1024, 32768000 * 1024)]
    usable = 32768000 * 1024 - int(65536000 * 1024 * 0.05)
    check_memory(usable, limits)
    with pytest.raises(HostMemoryError, match="MemAvailable"):
        check_memory(usable + 1, limits)


def test_cgroup_v2_is_walked_up_to_the_root(tmp_path: Path) -> None:
    limits = machine(
        tmp_path,
        "0::/kube/pod/app\n",
        {
            "kube/pod/app/memory.max": "max\n",
            "kube/pod/app/memory.current": "100\n",
            "kube/pod/memory.max": f"{8 * GIB}\n",
            "kube/pod/memory.current": f"{3 * GIB}\n",
            "kube/pod/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file 7\n",
            "kube/memory.max": f"{20 * GIB}\n",
            "kube/memory.current": f"{GIB}\n",
        },
    )
    assert [(x.total, x.available) for x in limits[1:]] == [(8 * GIB, 6 * GIB), (20 * GIB, 19 * GIB)]
    # 5% of 8 GiB is less than 512 MiB: that is the reserve.
    check_memory(6 * GIB - 512 * MIB, limits)
    with pytest.raises(HostMemoryError, match=r"kube/pod/memory.max leaves 6.00 GiB of 8.00 GiB.*5632MiB"):
        check_memory(6 * GIB - 512 * MIB + 1, limits)


def test_cgroup_v2_of_a_container_that_sees_the_host_s_path(tmp_path: Path) -> None:
    files = {"memory.max": f"{4 * GIB}", "memory.current": f"{GIB}"}
    assert machine(tmp_path, "0::/../../docker/abc\n", files)[1].available == 3 * GIB


def test_cgroup_v1(tmp_path: Path) -> None:
    limits = machine(
        tmp_path,
        "12:cpu,cpuacct:/docker/abc\n9:memory:/docker/abc\n1:name=systemd:/docker/abc\n",
        {
            "memory/docker/abc/memory.limit_in_bytes": f"{4 * GIB}\n",
            "memory/docker/abc/memory.usage_in_bytes": f"{2 * GIB}\n",
            "memory/docker/abc/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "5\n",
        },
    )
    assert limits[1].available == 3 * GIB
    with pytest.raises(HostMemoryError, match=r"memory\.limit_in_bytes"):
        check_memory(3 * GIB, limits)


def test_a_full_container_says_zero(tmp_path: Path) -> None:
    limits = machine(tmp_path, "0::/\n", {"memory.max": f"{GIB}", "memory.current": f"{GIB}"})
    with pytest.raises(HostMemoryError, match="at most 0MiB"):
        check_memory(PAGE, limits)


def test_this_machine_has_limits() -> None:
    limits = memory_limits()
    assert limits
    assert 0 < limits[0].available <= limits[0].total
