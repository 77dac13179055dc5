"""Discovery of backends: entry points in the group `flexkv.backends`, loaded one by one with pluggy.

Each plug-in is loaded on its own and only when it is asked for, so a broken one takes no other down. Everything
about it is validated before it is registered. Owns discovery and its errors; knows nothing of stacks or tiers.
"""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType

import pluggy

from flexkv_core import backend as contract
from flexkv_core.backend import CONTRACT_VERSION, ENTRY_POINT_GROUP, BackendConfig, BackendSpec
from flexkv_core.errors import BackendLoadError, BackendNotFoundError

INSTALL_HINTS = MappingProxyType(
    {
        "cpu": "pip install flexkv-backend-cpu",
        "directory": "pip install flexkv-backend-directory",
        "ssd": "pip install flexkv-backend-ssd",
        "s3": "pip install flexkv-backend-s3",
        "rdma": "pip install flexkv-backend-rdma",
    }
)
"""Backends that this project knows of, and what provides them."""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """One installed plug-in: `spec` if it can be used, else `error` says why not."""

    name: str
    distribution: str
    version: str
    spec: BackendSpec | None
    error: str | None


def load_backend(name: str) -> BackendSpec:
    """Load the plug-in of that name.

    Raises:
        BackendNotFoundError: none is installed; the text says what to install, or the nearest name.
        BackendLoadError: it is installed but cannot be used; the text names it and the reason.
    """
    found = [entry for entry in _entry_points() if entry.name == name]
    if not found:
        raise BackendNotFoundError(_not_found(name))
    if len({_origin(entry) for entry in found}) > 1:
        both = " and ".join(sorted({_origin(entry) for entry in found}))
        raise BackendLoadError(f"backend {name!r} is provided by {both}: uninstall one of them")
    return _load(found[0])


def list_backends() -> list[BackendInfo]:
    """Every installed plug-in, sorted by name, each loaded on its own."""
    infos = []
    for entry in sorted(_entry_points(), key=lambda e: (e.name, _origin(e))):
        spec, error = None, None
        try:
            spec = load_backend(entry.name)
        except (BackendLoadError, BackendNotFoundError) as caught:
            error = str(caught)
        distribution, version = _provider(entry)
        infos.append(BackendInfo(entry.name, distribution, version, spec, error))
    return infos


def forget_loaded() -> None:
    """Have the next call look at the installed distributions again."""
    _load.cache_clear()


def _entry_points() -> list[metadata.EntryPoint]:
    return list(metadata.entry_points(group=ENTRY_POINT_GROUP))


def _provider(entry: metadata.EntryPoint) -> tuple[str, str]:
    if entry.dist is None:
        return "unknown", "unknown"
    return entry.dist.name, entry.dist.version


def _origin(entry: metadata.EntryPoint) -> str:
    return "{} {}".format(*_provider(entry))


def _not_found(name: str) -> str:
    if name in INSTALL_HINTS:
        return f"backend {name!r} is not installed: {INSTALL_HINTS[name]}"
    known = sorted({entry.name for entry in _entry_points()} | set(INSTALL_HINTS))
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known ones are {', '.join(known)}"
    return f"backend {name!r} is not installed, and no distribution is known to provide it: {hint}"


@functools.cache
def _load(entry: metadata.EntryPoint) -> BackendSpec:
    who = f"backend {entry.name!r} of {_origin(entry)}"
    try:
        plugin = entry.load()
    except Exception as error:
        raise BackendLoadError(f"{who} cannot be imported: {type(error).__name__}: {error}") from error
    manager = pluggy.PluginManager("flexkv")
    manager.add_hookspecs(contract)
    try:
        manager.register(plugin, name=entry.name)
        specs = manager.hook.flexkv_backend()
    except Exception as error:
        raise BackendLoadError(f"{who} failed in its hook: {type(error).__name__}: {error}") from error
    if len(specs) != 1:
        raise BackendLoadError(f"{who} has no hook flexkv_backend: decorate it with flexkv_core.backend.hookimpl")
    return _validated(specs[0], entry.name, who)


def _validated(spec: object, name: str, who: str) -> BackendSpec:
    if not isinstance(spec, BackendSpec):
        raise BackendLoadError(f"{who} returned a {type(spec).__name__} from its hook: return a BackendSpec")
    if spec.contract_version != CONTRACT_VERSION:
        older = isinstance(spec.contract_version, int) and spec.contract_version < CONTRACT_VERSION
        fix = "upgrade the plug-in" if older else "upgrade flexkv-core"
        raise BackendLoadError(
            f"{who} is written for version {spec.contract_version} of the backend contract, "
            f"this flexkv-core speaks version {CONTRACT_VERSION}: {fix}"
        )
    if spec.name != name:
        raise BackendLoadError(f"{who} calls itself {spec.name!r}: entry point and spec must have one name")
    if not (isinstance(spec.config_model, type) and issubclass(spec.config_model, BackendConfig)):
        raise BackendLoadError(f"{who}: config_model must be a subclass of flexkv_core.backend.BackendConfig")
    if not callable(spec.factory):
        raise BackendLoadError(f"{who}: factory must be callable with the config")
    if spec.addressing not in ("slot", "key"):
        raise BackendLoadError(f"{who}: addressing {spec.addressing!r} must be 'slot' or 'key'")
    return spec
