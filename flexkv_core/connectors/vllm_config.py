"""What is configured of vLLM's connector: `kv_connector_extra_config`, FLEXKV_CONFIG_PATH, FLEXKV_* variables.

Owns the keys of `kv_connector_extra_config` (docs/vllm.md has them all) and how the scheduler's half comes to its
client. Does not own what a stack says (`flexkv_core.config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from flexkv_core.config import LoadedConfig, load_config
from flexkv_core.config.flat_keys import FLAT
from flexkv_core.config.load import STACK_KEYS
from flexkv_core.config.places import Source
from flexkv_core.config.stack import validated
from flexkv_core.errors import StackConfigError
from flexkv_core.server import Client
from flexkv_core.server.launch import embedded
from flexkv_core.server.paths import socket_path

PLACE = "kv_connector_extra_config"


def _stack(value: Any) -> Any:
    if not isinstance(value, dict | str) or not value:
        raise ValueError("a stack is a mapping with the key tiers, or the path of a YAML or JSON file")
    return value


class ConnectorKeys(BaseModel):
    """The keys of `kv_connector_extra_config`; strict about types, so `"5"` is no number.

    Attributes:
        stack: an inline stack, or the path of a stack or flat file; None: FLEXKV_CONFIG_PATH, else FLEXKV_* variables.
        socket: the server's; None: FLEXKV_SERVER_RECV_PORT, else a private path of this user's.
        fetch_s: how long a request waits for blocks of lower tiers, at most.
        call_s: how long a call of the scheduler waits for the server, at most.
        load_or_compute: take no more of a hit than saves time; False: all of it, however slow its tier.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    stack: Annotated[dict[str, Any] | str | None, BeforeValidator(_stack)] = None
    socket: str | None = None
    fetch_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    call_s: Annotated[float, Field(gt=0, le=60)] = 0.2
    load_or_compute: bool = True


@dataclass(frozen=True, slots=True)
class ConnectorConfig:
    """keys: as given to the connector; loaded: the stack and all else that is configured; socket: the server's."""

    keys: ConnectorKeys
    loaded: LoadedConfig
    socket: Path

    @property
    def enabled(self) -> bool:
        """ENABLE_FLEXKV."""
        return self.loaded.settings.process.enabled

    def client(self, engine: str, *, notices: bool = False) -> Client:
        """The scheduler's, of the server at the socket; with `notices`, told of what comes and goes.

        Where the server is `embedded`, it is started if none is there, now and whenever it has gone. An `external` one
        may come later: until then nothing is found.

        Raises as `flexkv_core.server.launch.embedded`.
        """
        if self.loaded.settings.server.launch_mode == "external":
            digest = self.loaded.digest if self.loaded.source != "environment" else ""
            return Client(self.socket, engine=engine, deadline_s=self.keys.call_s, stack_digest=digest, notices=notices)
        return embedded(self.keys.stack, self.socket, engine=engine, deadline_s=self.keys.call_s, notices=notices)


def connector_config(extra: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> ConnectorConfig:
    """Read and validate everything.

    Args:
        extra: `kv_connector_extra_config`.
        environ: variables; default: the process's environment.

    Raises:
        StackConfigError: the text says file, line and key, or which key of `kv_connector_extra_config`.
        SocketPathError: for what cannot be a socket.
    """
    keys = _keys(extra)
    try:
        loaded = load_config(keys.stack, environ)
    except StackConfigError as error:
        if isinstance(keys.stack, dict) and error.file == "<mapping>":
            error.args = (f"{error} (the stack in {PLACE})",)
        raise
    setting = keys.socket if keys.socket is not None else loaded.settings.server.socket
    return ConnectorConfig(keys, loaded, socket_path(setting, environ))


def _keys(extra: Mapping[str, Any]) -> ConnectorKeys:
    source = Source(PLACE, dict(extra))
    known = ConnectorKeys.model_fields
    for name in extra:
        if name not in known and name in {*STACK_KEYS, *FLAT}:
            raise source.error((name,), "is a key of a stack: write it below the key stack", at_key=True)
    return validated(source, (), ConnectorKeys, dict(extra), known)
