"""vLLM's plug-in: makes the in-tree name `FlexKVConnectorV1` mean this project's connector.

Loaded by vLLM in each of its processes, by the entry point `vllm.general_plugins`. Owns what stands in vLLM's registry
of connectors under `FlexKVConnectorV1` and `FlexKVConnector`. It imports no connector before vLLM asks for one, and
whatever goes wrong is logged: vLLM starts all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from flexkv_core.connectors.original import original_flexkv

logger = logging.getLogger("flexkv.vllm")

IN_TREE, OWN = "FlexKVConnectorV1", "FlexKVConnector"
BY_PATH = f'name "kv_connector": "{OWN}" with "kv_connector_module_path": "flexkv_core.connectors.vllm"'

Loader = Callable[[], type[Any]]


def register() -> None:
    """What the entry point names. May be called any number of times in a process; never raises."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415

        _register(KVConnectorFactory)
    except Exception as error:
        logger.error("FlexKV's connector is not registered with this vLLM: %s; %s", error, BY_PATH)


def _register(factory: Any) -> None:
    registry = _registry(factory)
    in_tree = registry.get(IN_TREE)
    if isinstance(in_tree, _Loader):
        return
    registry[OWN] = _Loader(None)
    registry[IN_TREE] = _Loader(in_tree, refused=original_flexkv())


def _registry(factory: Any) -> dict[str, Loader]:
    registry = getattr(factory, "_registry", None)
    if not isinstance(registry, dict) or not all(callable(loader) for loader in registry.values()):
        raise TypeError("its factory of connectors has no table of loaders by name")
    return registry


def name_own() -> None:
    """Have vLLM find the class by its own name, also where plug-ins are not loaded and a path led to it."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415

    _registry(KVConnectorFactory).setdefault(OWN, _Loader(None))


class _Loader:
    """Imports the connector when vLLM asks for it.

    Args:
        in_tree: what loads vLLM's own class, which serves where this project's does not know this vLLM.
        refused: why there must be none of either.
    """

    def __init__(self, in_tree: Loader | None, *, refused: str | None = None) -> None:
        self._in_tree = in_tree
        self._refused = refused

    def __call__(self) -> type[Any]:
        if self._refused is not None:
            raise ImportError(self._refused)
        try:
            from flexkv_core.connectors.vllm import FlexKVConnector  # noqa: PLC0415
        except ImportError as error:
            if self._in_tree is None:
                raise
            logger.error("FlexKV's connector does not know this vLLM, whose own class is used: %s", error)
            return self._in_tree()
        return FlexKVConnector
