"""vLLM's connector: the class that vLLM makes once a role, over the two halves. Needs vLLM 0.31 or a later 0.x.

    --kv-transfer-config '{"kv_connector": "FlexKVConnector", "kv_role": "kv_both",
                           "kv_connector_module_path": "flexkv_core.connectors.vllm"}'

Owns what each of vLLM's calls goes to. Does not own what is configured (`vllm_config.py`) or by what names vLLM finds
this class (`vllm_plugin.py`, `vllm_in_tree.py`). See docs/vllm.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from flexkv_core.connectors.hooks import Cost, timed
from flexkv_core.connectors.vllm_config import connector_config
from flexkv_core.connectors.vllm_ends import Ends
from flexkv_core.connectors.vllm_events import Announcements, VllmForm
from flexkv_core.connectors.vllm_model import model_spec, world_of
from flexkv_core.connectors.vllm_plugin import name_own
from flexkv_core.connectors.vllm_scheduler import SchedulerHalf
from flexkv_core.connectors.vllm_stats import FlexKVPromMetrics, FlexKVStats, hit_sources, tier_kinds
from flexkv_core.connectors.vllm_worker import WorkerHalf
from flexkv_core.errors import FlexKVError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
    from vllm.v1.request import Request

logger = logging.getLogger("flexkv.vllm")


@dataclass
class FlexKVMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """From scheduler to workers, each step."""

    ends: Ends = field(default_factory=Ends)


class FlexKVConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """See the module's docstring. A connector that cannot work is one that finds nothing: it says why, once.

    Attributes:
        costs: of the hooks that do something.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._form: VllmForm | None = None
        self._kinds: dict[str, str] = {}
        self.costs: dict[str, Cost] = {}
        if role == KVConnectorRole.WORKER:
            self._worker = WorkerHalf(kv_cache_config)
        try:
            self._begin(kv_cache_config)
        except (FlexKVError, OSError) as error:
            # Both halves find the same; the scheduler's says it.
            level = logging.ERROR if role == KVConnectorRole.SCHEDULER else logging.DEBUG
            logger.log(level, "FlexKV caches nothing for this engine: %s", error)

    def _begin(self, kv_cache_config: KVCacheConfig) -> None:
        config = connector_config(self._kv_transfer_config.kv_connector_extra_config or {})
        if not config.enabled:
            logger.info("ENABLE_FLEXKV is 0: nothing is cached")
            return
        spec = model_spec(self._vllm_config, kv_cache_config)
        engine = self._engine_name()
        if self._worker is not None:
            self._worker.serve(config.socket, engine, self._rank(), world_of(self._vllm_config))
            return
        for warning in config.loaded.warnings:
            logger.warning("%s", warning)
        routers = self._vllm_config.kv_events_config
        told = routers is not None and routers.enable_kv_cache_events
        client = config.client(engine, notices=told)
        self._kinds = tier_kinds(config.loaded.stack)
        if told:
            self._form = VllmForm(kv_cache_config, spec.block_size)
        self._scheduler = SchedulerHalf(
            client,
            spec,
            fetch_s=config.keys.fetch_s,
            load_or_compute=config.keys.load_or_compute,
            events=Announcements(client, spec, self._form) if self._form is not None else None,
        )

    def _engine_name(self) -> str:
        parallel = self._vllm_config.parallel_config
        return f"{self._kv_transfer_config.engine_id}/{getattr(parallel, 'data_parallel_rank', 0)}"

    def _rank(self) -> int:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group  # noqa: PLC0415

        tensor = self._vllm_config.parallel_config.tensor_parallel_size
        return int(get_pp_group().rank_in_group * tensor + get_tp_group().rank_in_group)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a store that is dropped is a later miss."""
        return False

    def shutdown(self) -> None:
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()

    # ---------------------------------------------------------------- workers

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._worker is not None:
            try:
                self._worker.register(kv_caches)
            except FlexKVError as error:
                logger.error("FlexKV caches nothing for this engine: %s", error)

    @timed
    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, FlexKVMetadata):
            self._worker.bind(connector_metadata.ends)

    @timed
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None and isinstance(kv_connector_metadata, FlexKVMetadata):
            self._worker.revoke(kv_connector_metadata.ends)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Loads were begun when blocks were given: nothing to do."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: whoever runs has its blocks."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Blocks are stored when their step's output has been processed."""

    def wait_for_save(self) -> None:
        """No step waits for a store."""

    @timed
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        saved, loaded, _ = self._worker.finished()
        return saved, loaded

    @timed
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        saved, loaded, failed = self._worker.finished()
        return KVConnectorTransferResults(finished_sending=saved, finished_recving=loaded, failed_recving=failed)

    # ---------------------------------------------------------------- the scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        if self._scheduler is not None:
            self._scheduler.bind(kv_cache_manager)
        if self._form is not None:
            self._form.bind(kv_cache_manager)

    @timed
    def on_new_request(self, request: Request) -> None:
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    @timed
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        found = self._scheduler.matched_tokens(request, num_computed_tokens)
        return found, bool(found)

    @timed
    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.after_alloc(request, blocks, num_external_tokens)

    @timed
    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        taken = self._scheduler.taken(request) if self._scheduler is not None else {}
        return hit_sources(taken, self._kinds, num_external_tokens)

    @timed
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> FlexKVMetadata:
        if self._scheduler is None:
            return FlexKVMetadata()
        return FlexKVMetadata(self._scheduler.step(scheduler_output))

    @timed
    def take_events(self) -> Iterable[KVCacheEvent]:
        """vLLM calls it when a step's output has been processed."""
        if self._scheduler is not None:
            self._scheduler.step_ended()
            return self._scheduler.take_events()
        return ()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    @timed
    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler is not None and self._scheduler.finished(request, block_ids), None

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.busy

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # ---------------------------------------------------------------- statistics

    @timed
    def get_kv_connector_stats(self) -> FlexKVStats | None:
        """What came since the last step; the scheduler's half has it all."""
        data = self._scheduler.seen.take() if self._scheduler is not None else None
        return FlexKVStats(data) if data else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> FlexKVStats:
        return FlexKVStats().aggregate(FlexKVStats(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> FlexKVPromMetrics:
        name_own()  # MultiConnector asks vLLM's registry for whose statistics it has got, in this process
        return FlexKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
