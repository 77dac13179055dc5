"""The table of flat keys and variables as the tests know it, written out once more: defaults, good and bad values."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr


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


def written(tmp_path: Path, kind: str, mapping: dict[str, Any]) -> Path:
    file = tmp_path / f"flexkv.{kind}"
    file.write_text(json.dumps(mapping) if kind == "json" else yaml.safe_dump(mapping))
    return file
