"""What a flat file means for tiers, and what flat keys and variables mean beside a stack."""

from __future__ import annotations

import ast
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from flat_rows import written

from flexkv_core.books import make_index, open_books
from flexkv_core.config import Capacity, load_config, load_stack
from flexkv_core.errors import StackConfigError
from flexkv_core.index.native import NativeIndex
from flexkv_core.index.reference import ReferenceIndex
from flexkv_core.manager import KVCacheManager
from flexkv_core.policies import Eviction

GIB = 1 << 30

# ------------------------------------------------------------------------- what flat files mean for tiers


def test_defaults_are_sixteen_gib_of_host_memory() -> None:
    loaded = load_config(None, {})
    assert loaded.flat
    assert loaded.source == "environment"
    assert loaded.stack == load_stack({"tiers": [{"backend": "cpu", "capacity": "16GiB"}]})
    assert loaded.document == {"tiers": [{"backend": "cpu", "capacity": "16GiB"}]}


@pytest.mark.usefixtures("ssd")
def test_a_whole_flat_file(tmp_path: Path) -> None:
    file = tmp_path / "flexkv_config.yaml"
    file.write_text(
        "cpu_cache_gb: 32\nssd_cache_gb: 1024\nssd_cache_dir: /data0/flexkv/;/data1/flexkv/\nenable_gds: false\n"
        "eviction_policy: slru\nslru_protected_threshold: 3\nuse_hugepage_cpu_buffer: 1\n"
    )
    variables = {"FLEXKV_EVICT_RATIO": "0.05", "FLEXKV_MAX_FILE_SIZE_GB": "0.5", "FLEXKV_CPU_CACHE_GB": "64"}
    loaded = load_config(None, {**variables, "FLEXKV_CONFIG_PATH": str(file)})
    cpu, ssd = loaded.stack.tiers
    assert (cpu.backend, cpu.capacity, cpu.hosts) == ("cpu", Capacity(bytes=32 * GIB), True)
    assert cpu.options.model_dump()["huge_pages"] is True
    assert (ssd.backend, ssd.capacity, ssd.addressing) == ("ssd", Capacity(bytes=1024 * GIB), "slot")
    assert ssd.options.model_dump(mode="json") == {
        "directories": ["/data0/flexkv", "/data1/flexkv"],
        "engine": "io_uring",
        "queue_depth": 512,
        "segment_size": GIB // 2,
    }
    for tier in (cpu, ssd):
        assert tier.eviction == Eviction("slru", slru_protected_threshold=3)
        assert (tier.evict_ratio, tier.evict_start_threshold) == (0.05, 1.0)
    assert loaded.notices == ()
    assert {name: value.origin.kind for name, value in loaded.values.items() if value.given} == {
        **dict.fromkeys(["cpu_cache_gb", "ssd_cache_gb", "ssd_cache_dir", "enable_gds", "eviction_policy"], "file"),
        **dict.fromkeys(["slru_protected_threshold", "use_hugepage_cpu_buffer"], "file"),
        **dict.fromkeys(["evict_ratio", "max_file_size_gb"], "environment"),
    }


@pytest.mark.usefixtures("ssd")
@pytest.mark.parametrize(
    ("mapping", "options"),
    [
        ({}, {"engine": "io_uring", "queue_depth": 512, "segment_size": None, "directories": ["flexkv_ssd"]}),
        ({"enable_gds": True}, {"engine": "gds", "queue_depth": 128}),
        ({"iouring_entries": 64}, {"engine": "io_uring", "queue_depth": 64}),
        ({"iouring_entries": 0}, {"engine": "threads", "queue_depth": 128}),
        ({"max_file_size_gb": -1}, {"segment_size": None}),
        ({"max_file_size_gb": 2}, {"segment_size": 2 * GIB}),
    ],
)
def test_options_of_the_ssd_tier(mapping: dict[str, Any], options: dict[str, Any]) -> None:
    tier = load_config({"ssd_cache_gb": 32, **mapping}, {}).stack.tiers[1]
    found = tier.options.model_dump(mode="json")
    assert {key: found[key] for key in options} == options


def test_the_missing_ssd_plug_in_is_told_with_the_flat_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv_core.plugins._entry_points", list)  # nothing is installed
    with pytest.raises(StackConfigError, match="backend 'cpu' is not installed: pip install") as caught:
        load_config(None, {})
    assert (caught.value.file, caught.value.key) == ("default", "cpu_cache_gb")


def test_index_accel_chooses_the_index() -> None:
    slow = load_config({"index_accel": 0}, {}).stack
    assert slow.index == "reference"
    assert load_config({"index_accel": 1}, {}).stack.index == load_config({}, {}).stack.index == "native"
    policies = [book.eviction for book in open_books(slow).books]
    assert isinstance(make_index(policies, slow.index), ReferenceIndex)
    assert isinstance(make_index(policies), NativeIndex)


# ------------------------------------------------------------------------- beside a stack

CPU = {"backend": "cpu", "capacity": "1GiB"}
DIRECTORY = {"backend": "directory", "root": "/x", "capacity": "1GiB"}
SSD_TIER = {"backend": "ssd", "capacity": "2GiB", "directories": ["/d"]}


@pytest.mark.usefixtures("ssd")
def test_flat_keys_and_variables_set_options_of_a_stack_unless_it_has_them() -> None:
    stack = {"tiers": [{**CPU, "eviction": "fifo"}, SSD_TIER, DIRECTORY], "evict_ratio": 0.1, "enable_metrics": 1}
    variables = {
        "FLEXKV_EVICTION_POLICY": "lfu",
        "FLEXKV_EVICT_RATIO": "0.9",
        "FLEXKV_EVICT_START_THRESHOLD": "0.7",
        "FLEXKV_IOURING_ENTRIES": "32",
        "FLEXKV_INDEX_ACCEL": "0",
        "FLEXKV_USE_HUGEPAGE_CPU_BUFFER": "1",
        "FLEXKV_PY_METRICS_PORT": "9000",
    }
    loaded = load_config(stack, variables)
    cpu, ssd, directory = loaded.stack.tiers
    assert [tier.eviction.policy for tier in (cpu, ssd, directory)] == ["fifo", "lfu", "lru"]
    assert {tier.evict_ratio for tier in (cpu, ssd, directory)} == {0.1}, "the file's flat key beats the variable"
    assert {tier.evict_start_threshold for tier in (cpu, ssd, directory)} == {0.7}
    assert ssd.options.model_dump()["queue_depth"] == 32
    assert cpu.options.model_dump()["huge_pages"] is True
    assert loaded.stack.index == "reference"
    assert (loaded.settings.metrics.enabled, loaded.settings.metrics.py_port) == (True, 9000)
    assert not loaded.flat
    assert stack["tiers"][0] == {**CPU, "eviction": "fifo"}, "what the caller passed is not changed"
    assert load_stack(stack, {}).tiers[1].eviction.policy == "lru", "variables set nothing for load_stack"
    assert load_stack(stack, {}).tiers[1].evict_ratio == 0.1
    shown = load_config({"tiers": loaded.document["tiers"], "index": "reference"}, {}).stack
    assert shown == loaded.stack, "the document that is shown means the same"


@pytest.mark.usefixtures("ssd")
def test_rewards_and_thresholds_go_to_tiers_of_their_policy() -> None:
    stack = {"tiers": [{**CPU, "eviction": "slru"}, SSD_TIER, DIRECTORY]}
    loaded = load_config(stack, {"FLEXKV_HIT_REWARD_SECONDS": "5", "FLEXKV_SLRU_PROTECTED_THRESHOLD": "7"})
    assert loaded.stack.tiers[0].eviction == Eviction("slru", slru_protected_threshold=7)
    assert loaded.stack.tiers[1].eviction == Eviction("lru", hit_reward_seconds=5.0)
    assert loaded.stack.tiers[2].eviction == Eviction("lru")
    assert loaded.notices == ()


def test_options_that_every_tier_has_itself_are_without_effect() -> None:
    stack = {"tiers": [{**CPU, "eviction": "fifo", "evict_ratio": 0.5, "huge_pages": False}], "index": "native"}
    variables = {
        "FLEXKV_EVICTION_POLICY": "lfu",
        "FLEXKV_EVICT_RATIO": "0.9",
        "FLEXKV_USE_HUGEPAGE_CPU_BUFFER": "1",
        "FLEXKV_INDEX_ACCEL": "0",
    }
    loaded = load_config(stack, variables)
    assert {notice.key for notice in loaded.notices} == set(variables)
    assert (loaded.stack.tiers[0].eviction.policy, loaded.stack.index) == ("fifo", "native")


def test_a_stack_without_a_host_tier_takes_what_it_can() -> None:
    loaded = load_config({"tiers": [{"backend": "directory", "root": "/x"}]}, {"FLEXKV_EVICTION_POLICY": "lfu"})
    assert [notice.key for notice in loaded.notices] == ["FLEXKV_EVICTION_POLICY"]


def test_an_explicit_file_beats_the_variable(tmp_path: Path) -> None:
    other = written(tmp_path, "json", {"cpu_cache_gb": 3})
    assert load_config(other, {"FLEXKV_CONFIG_PATH": "/nowhere"}).stack.tiers[0].capacity == Capacity(bytes=3 * GIB)


def test_nothing_else_reads_the_environment() -> None:
    root = Path(__file__).parents[1]
    load, seeds = "flexkv_core/config/load.py", "flexkv_core/testing/conformance/suite.py"
    place = "flexkv_core/server/paths.py"
    readers: Counter[str] = Counter()
    for path in [*root.glob("flexkv_core/**/*.py"), *root.glob("backends/*/src/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
            if name in ("environ", "environb", "getenv"):
                readers[str(path.relative_to(root))] += 1
    # Beside the configuration: FLEXKV_SEED and FLEXKV_SOAK, of tests; and once XDG_RUNTIME_DIR, which is the system's
    # word for where this user's sockets lie, and no setting of FlexKV: a client without any configuration needs it.
    assert set(readers) == {load, seeds, place}
    assert readers[place] == 1
    text = (root / place).read_text()
    assert text.count("variables.") == text.count('variables.get("XDG_RUNTIME_DIR", "")') == 1
    assert "FLEXKV_" not in text


# ------------------------------------------------------------------------- opened


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FLEXKV_")]:
        monkeypatch.delenv(name)


def opened(source: Any) -> dict[str, Any]:
    """By name, the capacities of the tiers that a manager has."""
    with KVCacheManager.open(source) as manager:
        return {name: tier["capacity_bytes"] for name, tier in manager.stats()["tiers"].items()}


@pytest.mark.usefixtures("no_variables", "ssd")
@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_manager_is_opened_with_a_flat_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = {"cpu_cache_gb": 0.0625, "ssd_cache_gb": 0.125, "ssd_cache_dir": str(tmp_path / "ssd")}
    file = written(tmp_path, kind, flat)
    for source in (file, str(file)):
        assert opened(source) == {"cpu": GIB // 16, "ssd": GIB // 8}
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "0.03125")
    assert opened(file)["cpu"] == GIB // 16, "the file goes before the variable"
    file = written(tmp_path, kind, {"evict_ratio": 0.5})
    assert opened(file) == {"cpu": GIB // 32}, "the variable before the default"


@pytest.mark.usefixtures("no_variables")
def test_variables_set_nothing_beside_a_stack_that_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = {"tiers": [{"backend": "cpu", "capacity": "1MiB"}]}
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "1")
    monkeypatch.setenv("FLEXKV_EVICT_RATIO", "nonsense")
    for source in (stack, json.dumps(stack), written(tmp_path, "yaml", stack)):
        assert opened(source) == {"cpu": 1 << 20}


@pytest.mark.usefixtures("no_variables")
def test_what_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StackConfigError, match="the key tiers is missing"):
        KVCacheManager.open({"cpu_cache_gb": 1})
    for mapping, says in (
        ({"cpu_cahce_gb": 1}, "did you mean 'cpu_cache_gb'"),
        ({"teirs": []}, "did you mean 'tiers'"),
        ({"block_size": 16}, "is a key of a stack, which needs the key tiers too"),
        ({"cpu_cache_gb": "much"}, "cpu_cache_gb"),
    ):
        with pytest.raises(StackConfigError, match=says) as caught:
            KVCacheManager.open(written(tmp_path, "yaml", mapping))
        assert (caught.value.file, caught.value.line) == (str(tmp_path / "flexkv.yaml"), 1)
    monkeypatch.setenv("FLEXKV_CPU_CAHCE_GB", "1")
    opened(written(tmp_path, "yaml", {"cpu_cache_gb": 0.0625}))
    assert "FLEXKV_CPU_CACHE_GB" in caplog.text, "an unknown variable is a warning, with the nearest one"
