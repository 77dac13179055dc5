"""The flat configuration: every key and variable, by file and by environment; what it means for tiers."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Install
from pydantic import SecretStr
from ssd_plugin import SSD

from flexkv_core.books import make_index, open_books
from flexkv_core.config import Capacity, LoadedConfig, load_config, load_stack
from flexkv_core.config.flat_keys import KEYS
from flexkv_core.errors import StackConfigError
from flexkv_core.index.native import NativeIndex
from flexkv_core.index.reference import ReferenceIndex
from flexkv_core.policies import Eviction

GIB = 1 << 30


@dataclass
class Row:
    """A key of the table: its default, good values with what they are read as, bad ones, and where it ends up."""

    key: str
    default: Any
    good: list[tuple[Any, Any]]
    bad: list[Any]
    setting: str = ""
    variable: str = ""
    names: list[str] = field(default_factory=list)

    @property
    def variables(self) -> list[str]:
        return [self.variable] if self.variable else [f"FLEXKV_{name.upper()}" for name in self.names or [self.key]]


FLAGS: list[tuple[Any, Any]] = [
    (0, False), (1, True), ("0", False), ("1", True), (True, True), (False, False), ("TRUE", True), ("false", False)
]  # fmt: skip
NO_FLAGS = [2, -1, "maybe", 1.0, "1.0"]
PORTS: list[tuple[Any, Any]] = [(1, 1), ("65535", 65535)]
NO_PORTS = [0, 65536, -1, "http", 80.5, True]


def flag(key: str, default: bool | None = False, setting: str = "", variable: str = "") -> Row:
    return Row(key, default, FLAGS, NO_FLAGS, setting, variable)


def whole(key: str, default: int | None, low: int, setting: str, high: int = 2**31 - 1, variable: str = "") -> Row:
    good = [(low, low), (str(high), high), (f" {low + 1} ", low + 1)]
    return Row(key, default, good, [low - 1, high + 1, "many", low + 0.5, True, "1e3"], setting, variable)


def text(key: str, default: str | None, setting: str, variable: str = "") -> Row:
    return Row(key, default, [("a b/c.d", "a b/c.d")], [7, True, ["x"], "\0x", "\0"], setting, variable)


def layout(key: str, setting: str) -> Row:
    good = [("blockfirst", "BLOCKFIRST"), ("LAYERFIRST", "LAYERFIRST")]
    return Row(key, "BLOCKFIRST", good, ["first", 1, True], setting)


ROWS = [
    Row("cpu_cache_gb", 16.0, [(32, 32.0), ("0.5", 0.5), (1.5, 1.5), (".5", 0.5)], [0, -1, "16GB", True, "nan", 1e10]),
    Row("ssd_cache_gb", 0.0, [(0, 0.0), ("32", 32.0), (16.5, 16.5)], [-1, "1TiB", True, "inf", 16]),
    Row(
        "ssd_cache_dir",
        ("./flexkv_ssd",),
        [("/a", ("/a",)), ("/a; /b;", ("/a", "/b"))],
        [";", "/a;/a", 7],
    ),
    flag("enable_gds"),
    flag("use_hugepage_cpu_buffer"),
    flag("use_hugepage_tmp_buffer", setting="layout.use_hugepage_tmp_buffer"),
    Row(
        "hugepage_size_bytes",
        2 << 20,
        [(1 << 30, 1 << 30), ("2097152", 2 << 20), ("1GiB", 1 << 30)],
        [0, 2048, 3 << 20, "big", -4096, True],
        "layout.hugepage_size_bytes",
    ),
    Row(
        "eviction_policy",
        "lru",
        [(name, name) for name in ("lru", "lfu", "slru", "fifo", "mru", "filo")] + [("LFU", "lfu")],
        ["lur", 1, True],
    ),
    Row("evict_ratio", 0.0, [(0, 0.0), ("0.05", 0.05), (1, 1.0)], [-0.1, 1.1, "5%", True]),
    Row("evict_start_threshold", 1.0, [("0.7", 0.7), (1, 1.0)], [0, -1, 70, "high", True]),
    Row("hit_reward_seconds", 0.0, [(0, 0.0), ("1.5", 1.5), (60, 60.0)], [-1, "long", 2e9, True]),
    whole("slru_protected_threshold", 2, 1, "", 1 << 20),
    flag("server_client_mode", setting="server.client_mode"),
    Row(
        "server_launch_mode",
        "embedded",
        [("external", "external"), ("EMBEDDED", "embedded")],
        ["child", 1],
        "server.launch_mode",
    ),
    Row(
        "server_recv_port",
        None,
        [("ipc:///tmp/flexkv_server", "/tmp/flexkv_server"), ("/run/x.sock", "/run/x.sock")],
        ["tcp://1.2.3.4:5", "ipc://relative", 5555, "/" + "x" * 107],
        "server.socket",
    ),
    whole("instance_num", 1, 1, "server.instance_num", 4096),
    Row("instance_id", 0, [(0, 0), ("0", 0)], [-1, 1, "first", True, 4096], "server.instance_id"),
    Row(
        "max_file_size_gb",
        -1.0,
        [(-1, -1.0), ("-1", -1.0), ("0.5", 0.5), (32, 32.0), (-7.5, -1.0)],
        [0, "32GB", True, "nan"],
    ),
    whole("iouring_entries", 512, 0, "", 1 << 15),
    whole("iouring_flags", 0, 0, "transfer.iouring_flags"),
    flag("ssd_io_opt", True, "transfer.ssd_io_opt"),
    layout("cpu_layout_type", "layout.cpu"),
    layout("ssd_layout_type", "layout.ssd"),
    layout("remote_layout_type", "layout.remote"),
    layout("gds_layout_type", "layout.gds"),
    flag("use_ce_transfer_h2d", setting="transfer.use_ce_h2d"),
    flag("use_ce_transfer_d2h", setting="transfer.use_ce_d2h"),
    whole("transfer_num_cta_h2d", 4, 1, "transfer.num_cta_h2d", 1024),
    whole("transfer_num_cta_d2h", 4, 1, "transfer.num_cta_d2h", 1024),
    Row(
        "kv_shared_across_ranks_mode",
        "sharded",
        [(name, name) for name in ("sharded", "rank_rotate", "all_write", "rank0_only", "layer_parallel")],
        ["none", 0],
        "transfer.kv_shared_across_ranks_mode",
        names=["kv_shared_across_ranks_mode", "mla_d2h_mode"],
    ),
    flag("enable_layerwise_transfer", setting="transfer.layerwise"),
    Row(
        "layerwise_notify_mode",
        "hostfunc",
        [("polling", "polling"), ("HostFunc", "hostfunc")],
        ["signal", 1],
        "transfer.layerwise_notify_mode",
    ),
    flag("index_accel", True),
    flag("enable_metrics", setting="metrics.enabled"),
    Row("py_metrics_port", 8080, PORTS, NO_PORTS, "metrics.py_port"),
    Row("cpp_metrics_port", 8081, PORTS, NO_PORTS, "metrics.cpp_port"),
    flag("enable_trace", setting="trace.enabled"),
    text("trace_file_path", "./flexkv_trace.log", "trace.path"),
    whole("trace_max_file_size_mb", 100, 1, "trace.max_file_size_mb"),
    whole("trace_max_files", 5, 1, "trace.max_files", 100_000),
    whole("trace_flush_interval_ms", 1000, 1, "trace.flush_interval_ms"),
    flag("enable_p2p_cpu", setting="sharing.p2p_cpu"),
    flag("enable_p2p_ssd", setting="sharing.p2p_ssd"),
    flag("enable_3rd_remote", setting="sharing.third_party_remote"),
    text("redis_host", "127.0.0.1", "sharing.redis_host"),
    Row("redis_port", 6379, PORTS, NO_PORTS, "sharing.redis_port"),
    Row(
        "redis_password",
        None,
        [("a b", SecretStr("a b")), ("0", SecretStr("0"))],
        [7, True, "\0x"],
        "sharing.redis_password",
    ),
    text("local_ip", "127.0.0.1", "sharing.local_ip"),
    text("local_zmq_ip", "127.0.0.1", "sharing.local_zmq_ip"),
    Row("local_zmq_port", 5555, PORTS, NO_PORTS, "sharing.local_zmq_port"),
    whole("node_ttl_seconds", 30, 1, "sharing.node_ttl_seconds"),
    whole("rebuild_interval_ms", 2000, 1, "sharing.rebuild_interval_ms"),
    whole("refresh_batch_size", 256, 1, "sharing.refresh_batch_size"),
    whole("idle_sleep_ms", 10, 0, "sharing.idle_sleep_ms"),
    whole("lease_ttl_ms", 30000, 1, "sharing.lease_ttl_ms"),
    whole("safety_ttl_ms", 100, 0, "sharing.safety_ttl_ms"),
    whole("renew_lease_ms", 4000, 1, "sharing.renew_lease_ms"),
    flag("use_mooncake_store_backend", setting="sharing.use_mooncake_store_backend"),
    text("mooncake_store_config_path", None, "sharing.mooncake_store_config_path"),
    text("mooncake_config_path", None, "sharing.mooncake_config_path"),
    flag("enable_nixl", None, "sharing.enable_nixl"),
    text("nixl_backend_plugin", None, "sharing.nixl_backend_plugin"),
    whole("nvcomp_batch_size", None, 0, "transfer.nvcomp_batch_size"),
    flag("enable_mps", None, "transfer.enable_mps"),
    flag("enable_collective_sync", None, "transfer.enable_collective_sync"),
    flag("swa_multi_group", None, "transfer.swa_multi_group"),
    flag("swa_multi_layer", None, "transfer.swa_multi_layer"),
    flag("enable_swa_transfer", None, "transfer.enable_swa_transfer"),
]
VARIABLES_ONLY = [
    flag("ENABLE_FLEXKV", True, "process.enabled", "ENABLE_FLEXKV"),
    flag("DYNAMO_USE_FLEXKV", False, "process.publish_kv_events", "DYNAMO_USE_FLEXKV"),
    flag("TENSORRT_LLM_USE_FLEXKV", False, "process.tensorrt_llm", "TENSORRT_LLM_USE_FLEXKV"),
    Row(
        "FLEXKV_LOG_LEVEL",
        "INFO",
        [("debug", "DEBUG"), ("WARNING", "WARNING"), ("ERROR", "ERROR"), ("CRITICAL", "CRITICAL"), ("OFF", "OFF")],
        ["LOUD", "1"],
        "process.log_level",
        "FLEXKV_LOG_LEVEL",
    ),
    text("FLEXKV_LOGGING_PREFIX", "FLEXKV", "process.logging_prefix", "FLEXKV_LOGGING_PREFIX"),
    whole(
        "FLEXKV_NUM_LOG_INTERVAL_REQUESTS",
        200,
        1,
        "process.log_interval_requests",
        variable="FLEXKV_NUM_LOG_INTERVAL_REQUESTS",
    ),
    text("FLEXKV_MASTER_HOST", "localhost", "process.master_host", "FLEXKV_MASTER_HOST"),
    Row(
        "FLEXKV_MASTER_PORTS",
        (5556, 5557, 5558),
        [("1, 2,3", (1, 2, 3)), ("80", (80,))],
        ["0", "1,1", "a,b", ","],
        "process.master_ports",
        "FLEXKV_MASTER_PORTS",
    ),
]  # fmt: skip


@pytest.fixture
def ssd(install_plugin: Install) -> None:
    install_plugin("ssd", SSD)


@pytest.fixture(autouse=True)
def ssd_where_a_row_needs_it(request: pytest.FixtureRequest) -> None:
    row = getattr(request.node, "callspec", None) and request.node.callspec.params.get("row")
    if row is not None and row.key == "ssd_cache_gb":
        request.getfixturevalue("ssd")


def of(loaded: LoadedConfig, row: Row) -> Any:
    return attrgetter(row.setting)(loaded.settings) if row.setting else loaded.values[row.key].value


def cases(which: str, rows: list[Row]) -> list[Any]:
    return [
        pytest.param(row, one, id=f"{row.key}={one[0] if which == 'good' else one}")
        for row in rows
        for one in getattr(row, which)
    ]


def as_variable(value: Any) -> str:
    return str(value)


def written(tmp_path: Path, kind: str, mapping: dict[str, Any]) -> Path:
    file = tmp_path / f"flexkv.{kind}"
    file.write_text(json.dumps(mapping) if kind == "json" else yaml.safe_dump(mapping))
    return file


def test_every_row_is_here() -> None:
    assert len(ROWS + VARIABLES_ONLY) == len(KEYS)
    assert {row.key for row in ROWS + VARIABLES_ONLY} == {key.name for key in KEYS}
    assert {key.name for key in KEYS if not key.in_file} == {row.key for row in VARIABLES_ONLY}
    assert len(ROWS) == 68
    assert {row.setting for row in ROWS + VARIABLES_ONLY if row.setting} == {key.target for key in KEYS if key.target}


@pytest.mark.parametrize("row", ROWS + VARIABLES_ONLY, ids=lambda row: row.key)
def test_defaults(row: Row) -> None:
    loaded = load_config(None, {})
    assert of(loaded, row) == row.default
    assert loaded.values[row.key].origin.kind == "default"
    empty = load_config(None, dict.fromkeys(row.variables[:1], ""))
    assert of(empty, row) == row.default, "an empty variable is as good as none"


@pytest.mark.parametrize("kind", ["yaml", "json"])
@pytest.mark.parametrize(("row", "value"), cases("good", ROWS))
def test_good_values_in_files(row: Row, value: tuple[Any, Any], kind: str, tmp_path: Path) -> None:
    for name in row.names or [row.key]:
        loaded = load_config(written(tmp_path, kind, {name: value[0]}), {})
        assert of(loaded, row) == value[1]
        assert type(of(loaded, row)) is type(value[1])
        origin = loaded.values[row.key].origin
        assert (origin.kind, origin.key) == ("file", name)


@pytest.mark.parametrize(("row", "value"), cases("good", ROWS + VARIABLES_ONLY))
def test_good_values_in_variables(row: Row, value: tuple[Any, Any]) -> None:
    for variable in row.variables:
        loaded = load_config(None, {variable: as_variable(value[0])})
        assert of(loaded, row) == value[1]
        origin = loaded.values[row.key].origin
        assert (origin.kind, origin.key) == ("environment", variable)
        assert loaded.warnings == ()


@pytest.mark.parametrize(("row", "value"), cases("bad", ROWS))
def test_bad_values_in_files(row: Row, value: Any, tmp_path: Path) -> None:
    file = written(tmp_path, "json", {row.key: value})
    with pytest.raises(StackConfigError) as caught:
        load_config(file, {})
    error = caught.value
    assert (error.file, error.key, error.line, error.column) == (str(file), row.key, 1, len(row.key) + 6)
    assert str(error).startswith(f"{file}:1:{len(row.key) + 6}: {row.key}: ")
    if row.key != "redis_password":
        assert json.dumps(value) in str(error) or repr(value)[:50] in str(error) or str(value) in str(error)


def wrong_as_text(row: Row, value: Any) -> bool:
    """Keys that take any text refuse only other types, and a variable has none."""
    takes_text = row.good[0][0] in ("a b/c.d", "a b", "/a")
    return isinstance(value, str) or not takes_text


BAD_VARIABLES = [case for case in cases("bad", ROWS + VARIABLES_ONLY) if wrong_as_text(*case.values)]


@pytest.mark.parametrize(("row", "value"), BAD_VARIABLES)
def test_bad_values_in_variables(row: Row, value: Any) -> None:
    with pytest.raises(StackConfigError) as caught:
        load_config(None, {row.variables[0]: as_variable(value)})
    error = caught.value
    assert (error.file, error.key, error.line) == ("environment", row.variables[0], None)
    assert str(error).startswith(f"environment: {row.variables[0]}: ")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_file_before_environment_before_default(row: Row, tmp_path: Path) -> None:
    (first, read), (second, other) = row.good[0], row.good[-1]
    file = written(tmp_path, "yaml", {row.key: first})
    variables = {row.variables[0]: as_variable(second)}
    assert of(load_config(file, variables), row) == read
    bad = {row.variables[0]: as_variable(row.bad[0])}
    assert of(load_config(file, bad), row) == read, "a variable that the file overrides is not even read"
    file = written(tmp_path, "yaml", {})
    assert of(load_config(file, variables), row) == other
    assert of(load_config(file, {}), row) == row.default


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_misspelt_names_are_told_with_the_nearest(row: Row, tmp_path: Path) -> None:
    wrong = row.key[:-2] + row.key[-1] + row.key[-2] + "x"
    with pytest.raises(StackConfigError, match=r"unknown key .*did you mean") as caught:
        load_config(written(tmp_path, "yaml", {wrong: 1}), {})
    assert (caught.value.key, caught.value.line, caught.value.column) == (wrong, 1, 1)
    loaded = load_config(None, {f"FLEXKV_{wrong.upper()}": "secret-looking-value"})
    (warning,) = loaded.warnings
    assert warning.startswith(f"unknown variable FLEXKV_{wrong.upper()}: did you mean FLEXKV_")
    assert "secret-looking-value" not in warning


def test_older_names_of_layout_variables_are_taken() -> None:
    for which in ("cpu", "ssd", "remote", "gds"):
        loaded = load_config(None, {f"FLEXKV_{which.upper()}_LAYOUT": "layerfirst"})
        assert getattr(loaded.settings.layout, which) == "LAYERFIRST"
        assert loaded.warnings == ()


# ------------------------------------------------------------------------- what is accepted without effect

TAKEN = {
    "cpu_cache_gb", "ssd_cache_gb", "ssd_cache_dir", "enable_gds", "use_hugepage_cpu_buffer", "eviction_policy",
    "evict_ratio", "evict_start_threshold", "hit_reward_seconds", "max_file_size_gb", "iouring_entries", "index_accel",
}  # fmt: skip
"""Keys with an effect in a flat file with an ssd tier; slru_protected_threshold needs eviction_policy: slru."""


@pytest.mark.usefixtures("ssd")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_keys_without_effect_are_listed_with_a_reason(row: Row, tmp_path: Path) -> None:
    base = {"cpu_cache_gb": 1, "ssd_cache_gb": 32}
    given = row.good[-1][0]
    loaded = load_config(written(tmp_path, "json", {**base, row.key: given}), {})
    notices = {notice.key: notice.reason for notice in loaded.notices}
    if row.key in TAKEN:
        assert notices == {}
    else:
        assert set(notices) == {row.key}
        assert len(notices[row.key]) > 15
    through_variable = load_config(None, {row.variables[0]: as_variable(given), "FLEXKV_SSD_CACHE_GB": "32"})
    if row.key not in TAKEN:
        assert [notice.key for notice in through_variable.notices] == [row.variables[0]]


@pytest.mark.usefixtures("ssd")
@pytest.mark.parametrize(
    ("mapping", "without"),
    [
        ({"ssd_cache_dir": "/x"}, ["ssd_cache_dir"]),
        ({"enable_gds": 1}, ["enable_gds"]),
        ({"iouring_entries": 8}, ["iouring_entries"]),
        ({"max_file_size_gb": 8}, ["max_file_size_gb"]),
        ({"eviction_policy": "slru", "hit_reward_seconds": 5}, ["hit_reward_seconds"]),
        ({"eviction_policy": "slru", "slru_protected_threshold": 5}, []),
        ({"ssd_cache_gb": 32, "enable_gds": 1, "iouring_entries": 8}, ["iouring_entries"]),
        ({}, []),
    ],
)
def test_what_has_no_effect_beside_what(mapping: dict[str, Any], without: list[str]) -> None:
    assert [notice.key for notice in load_config(mapping, {}).notices] == without


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
    readers = set()
    for path in [*root.glob("flexkv_core/**/*.py"), *root.glob("backends/*/src/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
            if name in ("environ", "environb", "getenv"):
                readers.add(str(path.relative_to(root)))
    seeds = "flexkv_core/testing/conformance/suite.py"  # FLEXKV_SEED and FLEXKV_SOAK: of tests
    assert readers == {"flexkv_core/config/load.py", seeds}
