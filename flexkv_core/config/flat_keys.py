"""The table of flat keys: names, defaults, types, and what each means here.

The only list of them: files, variables, `flexkv validate`, errors and tests go by it. A new key is a row here and,
unless it is about tiers (`flat.py`), a field of `settings.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from flexkv_core.config.flat_values import (
    Parse,
    capacity_gib,
    choice,
    directories,
    file_gib,
    flag,
    number,
    page_size,
    policy,
    ports,
    secret,
    socket_path,
    text,
    whole,
)

PREFIX = "FLEXKV_"
CONFIG_PATH = "FLEXKV_CONFIG_PATH"
_MOST = (1 << 31) - 1
_REFERENCES = (directories, secret, socket_path, text)


@dataclass(frozen=True, slots=True)
class FlatKey:
    """One key.

    Attributes:
        name: in a file.
        default: typed.
        parse: plain value to typed value; ValueError says what to write.
        target: the field of `Settings` that it fills, such as "server.socket"; "" for what makes tiers.
        needs: what is missing for it to have an effect, or why it never has one; "" if it has one.
        does: what it does, where it has an effect and is about no tier.
        variables: environment variables that set it, the first one preferred.
        other_names: older names of it in files.
        in_file: whether files may have it.
    """

    name: str
    default: Any
    parse: Parse
    target: str = ""
    needs: str = ""
    does: str = ""
    variables: tuple[str, ...] = ()
    other_names: tuple[str, ...] = ()
    in_file: bool = True

    @property
    def secret(self) -> bool:
        return self.parse is secret

    @property
    def takes_references(self) -> bool:
        """Whether `${NAME}` may stand in its value: for secrets, paths and addresses."""
        return self.parse in _REFERENCES


_TRACE = "needs the request trace, which is not in this version"
_GPU = "needs transfers to and from GPUs, which are not in this version"
_LAYERWISE = "needs layerwise loading by a connector, which is not in this version"
_P2P = "needs the rdma backend, which is not in this version"
_MOONCAKE = "needs a Mooncake backend, which is not in this version"
_NIXL = "needs a NIXL backend, which is not in this version"
_CONNECTOR = "no engine connector of this version reads it"
_LAYOUT = "blocks are stored block-first, whatever it says"
_RANKS = "a block that all ranks share is written once, whatever it says"
_NODES = "needs tensor parallelism over several nodes, which is not in this version"
_SWA = "needs an engine connector: which KV groups a model has is what the engine registers"
_PORT = whole(1, 65535)
_MODES = choice("sharded", "rank_rotate", "all_write", "rank0_only", "layer_parallel")


def _layout(name: str) -> FlatKey:
    parse = choice("BLOCKFIRST", "LAYERFIRST")
    variable = f"{PREFIX}{name.upper()}"
    both = (variable, variable.removesuffix("_TYPE"))  # FlexKV reads FLEXKV_CPU_LAYOUT
    return FlatKey(name, "BLOCKFIRST", parse, f"layout.{name.split('_', maxsplit=1)[0]}", _LAYOUT, variables=both)


def _variable(name: str, default: Any, parse: Parse, target: str, needs: str = "", does: str = "") -> FlatKey:
    return FlatKey(name, default, parse, target, needs, does, (name,), in_file=False)


KEYS: tuple[FlatKey, ...] = (
    # tiers
    FlatKey("cpu_cache_gb", 16.0, capacity_gib(none_allowed=False)),
    FlatKey("ssd_cache_gb", 0.0, capacity_gib(none_allowed=True)),
    FlatKey("ssd_cache_dir", ("./flexkv_ssd",), directories),
    FlatKey("enable_gds", False, flag),
    FlatKey("use_hugepage_cpu_buffer", False, flag),
    FlatKey(
        "use_hugepage_tmp_buffer",
        False,
        flag,
        "layout.use_hugepage_tmp_buffer",
        "there is no temporary buffer: transfers go through the host region itself",
    ),
    FlatKey(
        "hugepage_size_bytes",
        2 << 20,
        page_size,
        "layout.hugepage_size_bytes",
        "the kernel's default size of huge pages is taken",
    ),
    FlatKey("eviction_policy", "lru", policy),
    FlatKey("evict_ratio", 0.0, number(0, 1)),
    FlatKey(
        "evict_start_threshold",
        1.0,
        number(0, 1, lambda share: "must be more than 0: eviction starts at this share in use" if share == 0 else ""),
    ),
    FlatKey("hit_reward_seconds", 0.0, number(0, 1e9)),
    FlatKey("slru_protected_threshold", 2, whole(1, 1 << 20)),
    FlatKey("max_file_size_gb", -1.0, file_gib),
    FlatKey("iouring_entries", 512, whole(0, 1 << 15)),
    FlatKey("iouring_flags", 0, whole(0, _MOST), "transfer.iouring_flags", "the ssd backend chooses the ring's flags"),
    FlatKey("ssd_io_opt", True, flag, "transfer.ssd_io_opt", "coalescing of I/O is the ssd backend's own decision"),
    FlatKey("index_accel", True, flag),
    # server
    FlatKey("server_client_mode", False, flag, "server.client_mode", _CONNECTOR),
    FlatKey("server_launch_mode", "embedded", choice("embedded", "external"), "server.launch_mode", _CONNECTOR),
    FlatKey(
        "server_recv_port", None, socket_path, "server.socket", does="the socket of flexkv serve and flexkv status"
    ),
    FlatKey("instance_num", 1, whole(1, 4096), "server.instance_num", _CONNECTOR),
    FlatKey("instance_id", 0, whole(0, 4095), "server.instance_id", _CONNECTOR),
    # layouts
    _layout("cpu_layout_type"),
    _layout("ssd_layout_type"),
    _layout("remote_layout_type"),
    _layout("gds_layout_type"),
    # transfers
    FlatKey("use_ce_transfer_h2d", False, flag, "transfer.use_ce_h2d", _GPU),
    FlatKey("use_ce_transfer_d2h", False, flag, "transfer.use_ce_d2h", _GPU),
    FlatKey("transfer_num_cta_h2d", 4, whole(1, 1024), "transfer.num_cta_h2d", _GPU),
    FlatKey("transfer_num_cta_d2h", 4, whole(1, 1024), "transfer.num_cta_d2h", _GPU),
    FlatKey(
        "kv_shared_across_ranks_mode",
        "sharded",
        _MODES,
        "transfer.kv_shared_across_ranks_mode",
        _RANKS,
        variables=("FLEXKV_KV_SHARED_ACROSS_RANKS_MODE", "FLEXKV_MLA_D2H_MODE"),
        other_names=("mla_d2h_mode",),
    ),
    FlatKey("enable_layerwise_transfer", False, flag, "transfer.layerwise", _LAYERWISE),
    FlatKey(
        "layerwise_notify_mode", "hostfunc", choice("hostfunc", "polling"), "transfer.layerwise_notify_mode", _LAYERWISE
    ),
    # metrics and trace
    FlatKey("enable_metrics", False, flag, "metrics.enabled", does="the server answers Prometheus at /metrics"),
    FlatKey(
        "py_metrics_port", 8080, _PORT, "metrics.py_port", does="port of the server's metrics, with enable_metrics"
    ),
    FlatKey(
        "cpp_metrics_port",
        8081,
        _PORT,
        "metrics.cpp_port",
        "native figures are served at py_metrics_port with all others",
    ),
    FlatKey("enable_trace", False, flag, "trace.enabled", _TRACE),
    FlatKey("trace_file_path", "./flexkv_trace.log", text, "trace.path", _TRACE),
    FlatKey("trace_max_file_size_mb", 100, whole(1, _MOST), "trace.max_file_size_mb", _TRACE),
    FlatKey("trace_max_files", 5, whole(1, 100_000), "trace.max_files", _TRACE),
    FlatKey("trace_flush_interval_ms", 1000, whole(1, _MOST), "trace.flush_interval_ms", _TRACE),
    # sharing between nodes
    FlatKey("enable_p2p_cpu", False, flag, "sharing.p2p_cpu", _P2P),
    FlatKey("enable_p2p_ssd", False, flag, "sharing.p2p_ssd", _P2P),
    FlatKey("enable_3rd_remote", False, flag, "sharing.third_party_remote", _P2P),
    FlatKey("redis_host", "127.0.0.1", text, "sharing.redis_host", _P2P),
    FlatKey("redis_port", 6379, _PORT, "sharing.redis_port", _P2P),
    FlatKey("redis_password", None, secret, "sharing.redis_password", _P2P),
    FlatKey("local_ip", "127.0.0.1", text, "sharing.local_ip", _P2P),
    FlatKey("local_zmq_ip", "127.0.0.1", text, "sharing.local_zmq_ip", _P2P),
    FlatKey("local_zmq_port", 5555, _PORT, "sharing.local_zmq_port", _P2P),
    FlatKey("node_ttl_seconds", 30, whole(1, _MOST), "sharing.node_ttl_seconds", _P2P),
    FlatKey("rebuild_interval_ms", 2000, whole(1, _MOST), "sharing.rebuild_interval_ms", _P2P),
    FlatKey("refresh_batch_size", 256, whole(1, _MOST), "sharing.refresh_batch_size", _P2P),
    FlatKey("idle_sleep_ms", 10, whole(0, _MOST), "sharing.idle_sleep_ms", _P2P),
    FlatKey("lease_ttl_ms", 30000, whole(1, _MOST), "sharing.lease_ttl_ms", _P2P),
    FlatKey("safety_ttl_ms", 100, whole(0, _MOST), "sharing.safety_ttl_ms", _P2P),
    FlatKey("renew_lease_ms", 4000, whole(1, _MOST), "sharing.renew_lease_ms", _P2P),
    FlatKey("use_mooncake_store_backend", False, flag, "sharing.use_mooncake_store_backend", _MOONCAKE),
    FlatKey("mooncake_store_config_path", None, text, "sharing.mooncake_store_config_path", _MOONCAKE),
    FlatKey("mooncake_config_path", None, text, "sharing.mooncake_config_path", _MOONCAKE),
    # parts that do not exist yet
    FlatKey("enable_nixl", None, flag, "sharing.enable_nixl", _NIXL),
    FlatKey("nixl_backend_plugin", None, text, "sharing.nixl_backend_plugin", _NIXL),
    FlatKey("nvcomp_batch_size", None, whole(0, _MOST), "transfer.nvcomp_batch_size", _GPU),
    FlatKey("enable_mps", None, flag, "transfer.enable_mps", _GPU),
    FlatKey("enable_collective_sync", None, flag, "transfer.enable_collective_sync", _GPU),
    FlatKey("swa_multi_group", None, flag, "transfer.swa_multi_group", _SWA),
    FlatKey("swa_multi_layer", None, flag, "transfer.swa_multi_layer", _SWA),
    FlatKey("enable_swa_transfer", None, flag, "transfer.enable_swa_transfer", _SWA),
    # variables only
    _variable("ENABLE_FLEXKV", True, flag, "process.enabled", does="0: engine connectors cache nothing"),
    _variable("DYNAMO_USE_FLEXKV", False, flag, "process.publish_kv_events", _CONNECTOR),
    _variable("TENSORRT_LLM_USE_FLEXKV", False, flag, "process.tensorrt_llm", _CONNECTOR),
    _variable(
        "FLEXKV_LOG_LEVEL",
        "INFO",
        choice("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "OFF"),
        "process.log_level",
        does="from which level on the server logs",
    ),
    _variable(
        "FLEXKV_LOGGING_PREFIX",
        "FLEXKV",
        text,
        "process.logging_prefix",
        does="the first word of the server's log lines",
    ),
    _variable(
        "FLEXKV_NUM_LOG_INTERVAL_REQUESTS",
        200,
        whole(1, _MOST),
        "process.log_interval_requests",
        does="fetches from one summary in the server's log to the next",
    ),
    _variable("FLEXKV_MASTER_HOST", "localhost", text, "process.master_host", _NODES),
    _variable("FLEXKV_MASTER_PORTS", (5556, 5557, 5558), ports, "process.master_ports", _NODES),
)


def variables_of(key: FlatKey) -> tuple[str, ...]:
    """The variables that set a key, the preferred one first."""
    return key.variables or (f"{PREFIX}{key.name.upper()}",)


FLAT = MappingProxyType({name: key for key in KEYS if key.in_file for name in (key.name, *key.other_names)})
"""Keys that a file may have, by every name."""
VARIABLES = MappingProxyType({name: key for key in KEYS for name in variables_of(key)})
"""Keys by the variables that set them."""
REFUSED_BESIDE_TIERS = ("cpu_cache_gb", "ssd_cache_gb", "ssd_cache_dir", "enable_gds")
"""What a stack says by its tiers; a flat key beside them would contradict."""
