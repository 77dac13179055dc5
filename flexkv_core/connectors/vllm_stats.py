"""vLLM's statistics of a connector: its figures from the scheduler's process to vLLM's log and its Prometheus metrics.

Owns the metrics' names (`vllm:flexkv_...`) and what vLLM's sources of hits mean here. Does not own what is counted
(`observations.py`). Only the scheduler's half has figures: it knows what became of every fetch, load and store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from flexkv_core.config import StackConfig
from flexkv_core.connectors.observations import COUNTS, DECISIONS, SECONDS, add, summary

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

PREFIX = "vllm:flexkv_"
BUCKETS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SECONDS_DOCUMENTATION = {
    "fetch": "What fetches of hits took until all that came was in host memory, by the server's clock.",
    "load": "What loads took from host memory into device blocks, until the scheduler knew.",
}


@dataclass
class FlexKVStats(KVConnectorStats):  # type: ignore[misc]
    """`data` is as `observations.Data`."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> FlexKVStats:
        add(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return summary(self.data)

    def is_empty(self) -> bool:
        return not self.data


class FlexKVPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """All of them exist from the start, but those of a tier: that comes with its first hit."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, histogram = metric_types[Counter], metric_types[Histogram]
        self._counts = {name: counter(PREFIX + name, text, labelnames) for name, text in COUNTS.items()}
        self._hit_tokens = counter(
            PREFIX + "hit_tokens",
            "Tokens that were loaded, by the tier that had them when their fetch began.",
            [*labelnames, "tier"],
        )
        self._decisions = counter(
            PREFIX + "hits",
            "Hits by what was taken of them (whole, cut, not_taken), and waits for one that ended at their limit "
            "(gave_up).",
            [*labelnames, "decision"],
        )
        self._seconds = {
            name: histogram(f"{PREFIX}{name}_seconds", SECONDS_DOCUMENTATION[name], labelnames, buckets=BUCKETS)
            for name in SECONDS
        }
        for labels in per_engine_labelvalues.values():
            for metric in (*self._counts.values(), *self._seconds.values()):
                metric.labels(*labels)
            for decision in DECISIONS:
                self._decisions.labels(*labels, decision)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, count in transfer_stats_data.get("counts", {}).items():
            self._counts[name].labels(*labels).inc(count)
        for tier, tokens in transfer_stats_data.get("hit_tokens", {}).items():
            self._hit_tokens.labels(*labels, tier).inc(tokens)
        for decision, count in transfer_stats_data.get("decisions", {}).items():
            self._decisions.labels(*labels, decision).inc(count)
        for name, samples in transfer_stats_data.get("seconds", {}).items():
            metric = self._seconds[name].labels(*labels)
            for seconds in samples:
                metric.observe(seconds)


def tier_kinds(stack: StackConfig) -> dict[str, str]:
    """What vLLM calls each tier: `host`, `disk` (slots of a medium of this machine's), or nothing (left out)."""
    kinds = {tier.name: "host" for tier in stack.tiers if tier.hosts}
    slots = (tier for tier in stack.tiers if not tier.hosts and tier.addressing == "slot" and tier.persistent)
    return kinds | {tier.name: "disk" for tier in slots}


def hit_sources(taken: Mapping[str, int], kinds: Mapping[str, str], tokens: int) -> dict[CacheHitSource, int]:
    """So many tokens by vLLM's sources; needs a vLLM that asks for them (0.32).

    `taken`: tokens by tier. `kinds`: as `tier_kinds`.
    """
    from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: PLC0415

    sources: dict[CacheHitSource, int] = {}
    unknown = CacheHitSource.EXTERNAL_UNSPECIFIED
    for tier, count in taken.items():
        source = CacheHitSource(kinds[tier]) if tier in kinds else unknown
        sources[source] = sources.get(source, 0) + count
    missing = tokens - sum(sources.values())
    if missing > 0:  # a load that could not begin
        sources[unknown] = sources.get(unknown, 0) + missing
    return sources
