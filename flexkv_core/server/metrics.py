"""Prometheus: what the server's figures are called, and their text.

Owns the table of metrics (docs/server.md shows the same) and turns `Server.figures()` into it at each scrape. Does not
own the counts, nor HTTP (`metrics_endpoint.py`). Labels are names of tiers, operations and states: nothing that a
client says, and no secret.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from flexkv_core.server.latency import BUCKETS

Figures = Mapping[str, Any]
Kind = Literal["counter", "gauge", "histogram"]
Samples = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class Row:
    """A metric: its name as Prometheus shows it, and where in the figures its samples are.

    Attributes:
        read: figures -> (values of `labels`, value) of each sample; a histogram's are read by its operation's name.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    read: Callable[[Figures], Samples]


def _of(figures: Figures, path: str) -> Any:
    """The figure at "a.b"; None where there is none, as for breakers of the host tier."""
    value: Any = figures
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _one(name: str, kind: Kind, path: str, meaning: str) -> Row:
    """A single figure."""

    def read(figures: Figures) -> Samples:
        value = _of(figures, path)
        if value is not None:
            yield (), value

    return Row(f"flexkv_{name}", kind, (), meaning, read)


def _tier(name: str, kind: Kind, path: str, meaning: str, label: str | None = None) -> Row:
    """A figure of each tier; with `label` several, by its values."""

    def read(figures: Figures) -> Samples:
        for tier, its in figures.get("tiers", {}).items():
            value = _of(its, path)
            if label is not None:
                yield from (((tier, str(key)), count) for key, count in value.items())
            elif value is not None:
                yield (tier,), value

    return Row(f"flexkv_tier_{name}", kind, ("tier", *([label] if label else [])), meaning, read)


def _state(name: str, path: str, states: tuple[str, ...], meaning: str) -> Row:
    """1 for the state that a tier is in, 0 for the others."""

    def read(figures: Figures) -> Samples:
        for tier, its in figures.get("tiers", {}).items():
            yield from (((tier, state), float(state == its[path])) for state in states)

    return Row(f"flexkv_tier_{name}", "gauge", ("tier", "state"), f"{meaning}: {', '.join(states)}; {_PRESENT}", read)


def _breaker_states(figures: Figures) -> Samples:
    for tier, its in figures.get("tiers", {}).items():
        for operation in ("read", "write") if "breaker" in its else ():
            yield from (
                ((tier, operation, state), float(state == its["breaker"][operation])) for state in _BREAKER_STATES
            )


def _free_bytes(figures: Figures) -> Samples:
    for tier, its in figures.get("tiers", {}).items():
        if its["capacity_bytes"] is not None:
            yield (tier,), max(its["capacity_bytes"] - its["used_bytes"], 0)


def _clients(figures: Figures) -> Samples:
    yield (), sum(each["connected"] and each["role"] == "client" for each in figures["server"]["clients"])


def _agents(figures: Figures) -> Samples:
    yield (), sum(each["connected"] for each in figures["server"]["agents"])


def _ready(figures: Figures) -> Samples:
    yield (), float(figures["server"]["state"] == "ready")


def _info(figures: Figures) -> Samples:
    yield (figures["server"]["version"],), 1.0


def _latency(what: str, meaning: str) -> Row:
    return Row(f"flexkv_{what}_seconds", "histogram", (), meaning, lambda figures: ())


_PRESENT = "1 for the present one, 0 for the others"
_BREAKER_STATES = ("closed", "open", "half_open")
_TIER_COUNTERS = (
    ("hit_blocks", "hit_blocks", "blocks that fetches got from this tier"),
    ("miss_blocks", "miss_blocks", "blocks that fetches got neither from this tier nor from a faster one"),
    ("read_bytes", "bytes_read", "bytes read from it, seals included"),
    ("written_bytes", "bytes_written", "bytes written to it, seals included"),
    ("stored_blocks", "stored_blocks", "blocks that it took"),
    ("recovered_blocks", "recovered_blocks", "blocks found in it after a restart"),
    ("evicted_blocks", "evicted_blocks", "blocks that it gave up for room"),
    ("corrupt_blocks", "corrupt_blocks", "blocks read whose seal did not match: dropped"),
    ("failed_blocks", "failed_blocks", "blocks whose read or write failed, or died with its process"),
    ("missing_blocks", "missing_blocks", "blocks read that it did not have after all"),
    ("dropped_blocks", "dropped_blocks", "blocks not written: its queue was full, or it was away"),
    ("given_up_blocks", "given_up_blocks", "copies forgotten: three times in a row they could not be read"),
    ("probes", "probes", "probes that it answered"),
    ("probed_blocks", "probed_blocks", "blocks that probes found in it"),
    ("dropped_probes", "dropped_probes", "probes not made: there was no room for them"),
    ("admission_rejected_blocks", "rejected_blocks", "blocks that its admission policy did not take"),
    ("breaker_rejected_blocks", "breaker.rejected_blocks", "blocks it was not asked for: a breaker was open"),
    ("breaker_openings", "breaker.opened", "times that one of its breakers opened"),
    ("restarts", "restarts", "times that its process was started again"),
)
"""Name, where in a tier's figures, meaning."""

ROWS: tuple[Row, ...] = (
    *(_tier(f"{name}_total", "counter", path, meaning) for name, path, meaning in _TIER_COUNTERS),
    _tier("capacity_bytes", "gauge", "capacity_bytes", "what it may hold; absent where only its backend knows"),
    _tier("used_bytes", "gauge", "used_bytes", "what its blocks take, seals included"),
    Row("flexkv_tier_free_bytes", "gauge", ("tier",), "capacity less what is used", _free_bytes),
    _tier("used_blocks", "gauge", "used_blocks", "blocks in it; of a key-addressed tier those that are known"),
    _tier(
        "free_blocks",
        "gauge",
        "free_blocks",
        "blocks of this size, seals included, that it would take without eviction; slot-addressed tiers only",
        "slot_bytes",
    ),
    _tier("queued_blocks", "gauge", "queued_blocks", "blocks that wait for it: read, prefetch, write", "operation"),
    _state("state", "state", ("starting", "ready", "backoff", "closed"), "its process"),
    _state("health", "health", ("ok", "degraded", "away"), "how it does"),
    Row(
        "flexkv_tier_breaker_state",
        "gauge",
        ("tier", "operation", "state"),
        f"by read and write: {', '.join(_BREAKER_STATES)}; {_PRESENT}",
        _breaker_states,
    ),
    _one("asked_blocks_total", "counter", "asked_blocks", "blocks that fetches asked for; prefetches do not count"),
    _one("miss_blocks_total", "counter", "miss_blocks", "of these, blocks that they did not get"),
    _one("truncated_fetches_total", "counter", "truncated_fetches", "fetches cut to the budget of pins"),
    _one("expired_fetches_total", "counter", "expired_fetches", "fetches that lost their pins when their time was up"),
    _one("refused_stores_total", "counter", "refused_stores", "stores refused: too many were under way"),
    _one("refused_store_blocks_total", "counter", "refused_blocks", "blocks of stores: host memory had no room"),
    _one("fetches", "gauge", "fetches", "fetches under way"),
    _one("stores", "gauge", "pending_stores", "stores under way"),
    _one("pinned_fetches", "gauge", "pinned_fetches", "fetches that were not released yet"),
    _one("pinned_bytes", "gauge", "pinned_bytes", "host memory that fetches keep pinned"),
    Row("flexkv_clients", "gauge", (), "clients that are connected", _clients),
    Row("flexkv_agents", "gauge", (), "device agents that are connected", _agents),
    Row("flexkv_ready", "gauge", (), "1: clients are served; 0: the server starts or stops", _ready),
    Row("flexkv_server_info", "gauge", ("version",), "1, and the server's version", _info),
    _latency("lookup", "a lookup, in the server"),
    _latency("fetch", "a fetch, from its request until it is done; prefetches do not count"),
    _latency("load", "a load, from its request until all ranks have copied"),
    _latency("store", "a store, from its request until its blocks are committed"),
)


class _Collector:
    """Gives a registry the metrics of the figures as they are at this scrape."""

    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures

    def describe(self) -> list[Metric]:
        """Nothing: registering it asks for no figures."""
        return []

    def collect(self) -> Iterator[Metric]:
        figures = self._figures()
        for row in ROWS:
            yield _histogram(row, figures) if row.kind == "histogram" else _family(row, figures)


def _family(row: Row, figures: Figures) -> Metric:
    make = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
    family = make(row.name, row.meaning, labels=row.labels)
    for labels, value in row.read(figures):
        family.add_metric(labels, value)
    return family


def _histogram(row: Row, figures: Figures) -> Metric:
    family = HistogramMetricFamily(row.name, row.meaning)
    what = row.name.removeprefix("flexkv_").removesuffix("_seconds")
    its = figures["server"]["latencies"][what]
    buckets, seen = [], 0
    for bound, count in zip((*BUCKETS[what], math.inf), its["counts"], strict=True):
        seen += count
        buckets.append(("+Inf" if bound == math.inf else repr(bound), seen))
    family.add_metric([], buckets, its["seconds"])
    return family


def exposition(figures: Callable[[], Figures]) -> Callable[[str], tuple[bytes, str]]:
    """What answers a scrape: (value of the Accept header) -> (text, its content type). Raises what `figures` raises."""
    registry = CollectorRegistry()
    registry.register(_Collector(figures))

    def expose(accept: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    return expose
