"""The in-tree door: what vLLM's own `FlexKVConnectorV1` delegates to, where plug-ins are not loaded.

Owns what that class does not hand on. It keeps the KV cache config and each step's metadata to itself, so they are read
from it; it takes no word of failed loads but their device blocks, so these are told; it does not say that running
requests lose their blocks, so a request is stored when it has finished, from blocks that vLLM holds until the store has
ended. All else is `FlexKVConnector`'s.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from flexkv_core.connectors.original import original_flexkv
from flexkv_core.connectors.vllm import FlexKVConnector, FlexKVMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger("flexkv.vllm")

LESS = (
    "through vLLM's own FlexKVConnectorV1, requests are stored only when they have finished, hybrid models have one KV "
    "group, and vLLM shows no figures: let vLLM load the plug-in flexkv (VLLM_PLUGINS), and all is there"
)


@dataclass
class InTreeMetadata(FlexKVMetadata):
    """failed_blocks: device blocks that were to be loaded, of the requests whose load failed."""

    failed_blocks: set[int] = field(default_factory=set)


class FlexKVConnectorV1Impl(FlexKVConnector):
    """See the module's docstring. Made by vLLM's class, in its constructor.

    Raises:
        ImportError: the original FlexKV is installed too.
        TypeError: it is not made by a connector of vLLM's, or by one of another shape.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole) -> None:
        problem = original_flexkv()
        if problem is not None:
            raise ImportError(problem)
        # vLLM's class hands on neither its KV cache config nor itself: they are its constructor's.
        self._door: Any = sys._getframe(1).f_locals.get("self")
        if not isinstance(self._door, KVConnectorBase_V1) or not hasattr(self._door, "_kv_cache_config"):
            raise TypeError("this is for vLLM's FlexKVConnectorV1, of a shape that is known: let vLLM load the plug-in")
        self._computed: dict[str, int] = {}
        self._loading: dict[str, list[int]] = {}
        self._failed: set[int] = set()
        super().__init__(vllm_config, role, self._door._kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            # vLLM's class takes a reset for itself, and then KV of other weights would be found.
            self._door.reset_cache = self.reset_cache
            logger.warning(LESS)

    # ---------------------------------------------------------------- workers

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._door.has_connector_metadata():
            metadata = self._door._get_connector_metadata()
            self.bind_connector_metadata(metadata)
            self._failed = set(metadata.failed_blocks)
        return super().get_finished(finished_req_ids)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    # ---------------------------------------------------------------- the scheduler

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        self._computed[request.request_id] = num_computed_tokens
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int, *more: Any
    ) -> None:
        """`more`: what some builds of vLLM add."""
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        computed = self._computed.pop(request.request_id, 0)
        if num_external_tokens > 0:
            size = self._vllm_config.cache_config.block_size
            loaded = slice(computed // size, (computed + num_external_tokens) // size)
            self._loading[request.request_id] = list(blocks.get_block_ids()[0][loaded])

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> InTreeMetadata:
        if self._form is not None and self._door._kv_cache_manager is not None:
            # For the hashes of events only: the scheduler's half would store from running requests.
            self._form.bind(self._door._kv_cache_manager)
        ends = super().build_connector_meta(scheduler_output).ends
        failed = {block for each in ends.failed for block in self._loading.get(each, ())}
        for each in (*ends.loaded, *ends.failed):
            self._loading.pop(each, None)
        return InTreeMetadata(ends, failed)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._computed.pop(request.request_id, None)
        return super().request_finished(request, block_ids)

    def get_kv_connector_stats(self) -> None:
        """None: vLLM's class cannot make sense of them."""
