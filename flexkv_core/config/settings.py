"""What flat keys and variables say about everything that is no tier: server, metrics, trace, transfers, sharing.

Values are validated when they are read, and later parts take them from here. Defaults stand in `flat_keys.py`; a field
`x` of `settings.server` is filled by the key whose target is "server.x".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import SecretStr


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """launch_mode: a child of the engine, or `flexkv serve`; socket: its path, None: a private path per user."""

    client_mode: bool
    launch_mode: Literal["embedded", "external"]
    socket: str | None
    instance_num: int
    instance_id: int


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """The Prometheus endpoint; one serves both the Python and the native figures."""

    enabled: bool
    py_port: int
    cpp_port: int


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """The request trace for `flexkv replay`."""

    enabled: bool
    path: str
    max_file_size_mb: int
    max_files: int
    flush_interval_ms: int


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """Copies between device and host; ssd_io_opt: coalescing of SSD I/O."""

    use_ce_h2d: bool
    use_ce_d2h: bool
    num_cta_h2d: int
    num_cta_d2h: int
    kv_shared_across_ranks_mode: str
    layerwise: bool
    layerwise_notify_mode: Literal["hostfunc", "polling"]
    ssd_io_opt: bool
    iouring_flags: int
    enable_mps: bool | None
    enable_collective_sync: bool | None
    nvcomp_batch_size: int | None
    swa_multi_group: bool | None
    swa_multi_layer: bool | None
    enable_swa_transfer: bool | None


@dataclass(frozen=True, slots=True)
class MemoryLayoutSettings:
    """How FlexKV of before laid out bytes and pages; blocks are stored block-first here."""

    cpu: str
    ssd: str
    remote: str
    gds: str
    use_hugepage_tmp_buffer: bool
    hugepage_size_bytes: int


@dataclass(frozen=True, slots=True)
class SharingSettings:
    """Sharing between nodes, its metadata in Redis, the distributed index; NIXL and Mooncake."""

    p2p_cpu: bool
    p2p_ssd: bool
    third_party_remote: bool
    redis_host: str
    redis_port: int
    redis_password: SecretStr | None
    local_ip: str
    local_zmq_ip: str
    local_zmq_port: int
    node_ttl_seconds: int
    rebuild_interval_ms: int
    refresh_batch_size: int
    idle_sleep_ms: int
    lease_ttl_ms: int
    safety_ttl_ms: int
    renew_lease_ms: int
    use_mooncake_store_backend: bool
    mooncake_store_config_path: str | None
    mooncake_config_path: str | None
    enable_nixl: bool | None
    nixl_backend_plugin: str | None


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """Of the processes that use the cache; set by variables only.

    Attributes:
        enabled: 0 turns the connectors into no-ops.
        publish_kv_events: for Dynamo.
        log_interval_requests: requests between two lines of figures.
    """

    enabled: bool
    publish_kv_events: bool
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "OFF"]
    logging_prefix: str
    log_interval_requests: int
    tensorrt_llm: bool
    master_host: str
    master_ports: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that is no tier."""

    server: ServerSettings
    metrics: MetricsSettings
    trace: TraceSettings
    transfer: TransferSettings
    layout: MemoryLayoutSettings
    sharing: SharingSettings
    process: ProcessSettings


SECTIONS: Mapping[str, Any] = {
    "server": ServerSettings,
    "metrics": MetricsSettings,
    "trace": TraceSettings,
    "transfer": TransferSettings,
    "layout": MemoryLayoutSettings,
    "sharing": SharingSettings,
    "process": ProcessSettings,
}


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Put values, by target ("server.socket"), into their sections; each field must be there."""
    made = {
        name: section(**{each.name: values[f"{name}.{each.name}"] for each in fields(section)})
        for name, section in SECTIONS.items()
    }
    return Settings(**made)
