"""vLLM's scheduler half: which requests find blocks, which blocks are loaded and stored, and when each has ended.

Owns what is known of each request. It is called by the scheduler's thread only, and never waits for the server beyond a
fraction of a millisecond. The worker half only repeats to vLLM what this half says has ended (`Ends`), so there is one
truth about transfers, and a server that dies leaves no request waiting.

A load is promised only for blocks that are in host memory, verified and pinned. A store names only blocks whose step's
output has been processed, and is given up when the request loses its blocks before it has ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from flexkv_core.blocks import GrowingKeys, Namespace
from flexkv_core.connectors.arrivals import Arrival, Arrivals
from flexkv_core.connectors.load_or_compute import LoadOrCompute
from flexkv_core.connectors.observations import Counts, Observations
from flexkv_core.connectors.vllm_blocks import DeviceBlocks, DeviceTables, rows
from flexkv_core.connectors.vllm_ends import NOTHING, Ends
from flexkv_core.connectors.vllm_events import Announcements
from flexkv_core.connectors.vllm_model import Namespaces, cacheable, extras_of
from flexkv_core.errors import FlexKVError, ServerAwayError, UnknownNamespaceError
from flexkv_core.layout import ModelSpec
from flexkv_core.server import Client, ClientTransfer

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger("flexkv.vllm")

STORE_BLOCKS = 8
"""A decoding request stores so many blocks at a time, or as many as the shortest window has."""
IDLE_WAIT_S = 0.001
"""An engine that has nothing to compute waits so long for a load, a step."""
STORE_S = 10.0
"""Device blocks are held for their stores no longer than this."""
REGISTER_AGAIN_S = 1.0
"""Between two attempts to register a namespace while the server is away."""


@dataclass(slots=True, eq=False)
class _Store:
    transfer: ClientTransfer
    tag: str


@dataclass(slots=True, eq=False)
class _Tracked:
    """A request.

    Attributes:
        keys: of its prefix, extended as it grows; epoch: which reset of the engine they belong to.
        arrival: its hit, until it is loaded or given up.
        matched: blocks that were promised last. local: tokens that vLLM had itself then.
        taken: tokens of its last load, by tier.
        load_failed: it is computed: the next load would fail as this one did.
        load_began, load_step: when its load began, and how many steps had computed something then.
        due: some later step looks whether it has blocks to store.
        stored: leading blocks that are, or are being, cached.
    """

    request: Request
    namespace: Namespace
    keys: GrowingKeys
    epoch: int
    arrival: Arrival | None = None
    matched: int = 0
    local: int = 0
    load: ClientTransfer | None = None
    load_tag: str = ""
    taken: Mapping[str, int] = field(default_factory=dict)
    load_failed: bool = False
    load_began: float = 0.0
    load_step: int = 0
    due: bool = False
    stored: int = 0
    stores: list[_Store] = field(default_factory=list)


class SchedulerHalf:
    """See the module's docstring.

    Args:
        spec: of the engine's model.
        fetch_s: how long a request waits for blocks of lower tiers, at most.
        load_or_compute: take of a hit only what is faster than computing it.
        events: what routers are told; None: nothing.
    """

    def __init__(
        self,
        client: Client,
        spec: ModelSpec,
        *,
        fetch_s: float,
        load_or_compute: bool = True,
        events: Announcements | None = None,
    ) -> None:
        self._client = client
        self._spec = spec
        self._namespaces = Namespaces(spec)
        self._registered: dict[ModelSpec, Namespace] = {}
        self._retry_at: dict[ModelSpec, float] = {}
        self.judge = LoadOrCompute(
            spec.block_size,
            sum(group.block_bytes for group in spec.groups),
            longest_s=fetch_s,
            clock=time.monotonic,
            enabled=load_or_compute,
        )
        self.seen = Observations(self.judge.decisions)
        self.counts = self.seen.counts
        self._arrivals = Arrivals(client, self.judge, self.seen, fetch_s=fetch_s, clock=time.monotonic)
        self._tracked: dict[str, _Tracked] = {}
        self._loading: dict[str, _Tracked] = {}
        self._finishing: dict[str, tuple[_Tracked, float]] = {}
        self._blocks = DeviceBlocks(spec.groups, hold_s=STORE_S)
        windows = [max(1, group.coverage.blocks) for group in spec.groups if group.coverage.kind != "all"]
        self._store_blocks = min([STORE_BLOCKS, *windows])
        self._ends = Ends()
        self._epoch = 0
        self._transfers = 0
        self._steps = self._busy_steps = 0
        self._most_tokens = 1  # that a step gives a request whose prompt is computed
        self._due: dict[int, list[_Tracked]] = {}  # by step
        self._events = events

    def bind(self, manager: KVCacheManager) -> None:
        """vLLM's own block tables."""
        self._blocks.bind(manager)

    # ---------------------------------------------------------------- requests

    def _namespace(self, spec: ModelSpec) -> Namespace | None:
        """Registered, or None while the server is away."""
        known = self._registered.get(spec)
        if known is not None:
            return known
        now = time.monotonic()
        if now < self._retry_at.get(spec, 0.0):
            return None
        try:
            self._registered[spec] = self._client.register(spec)
        except (FlexKVError, OSError) as error:
            self._retry_at[spec] = now + REGISTER_AGAIN_S
            level = logging.DEBUG if isinstance(error, ServerAwayError) else logging.ERROR
            logger.log(level, "no cache for now: %s", error)
            return None
        return self._registered[spec]

    def _track(self, request: Request) -> _Tracked | None:
        """What is known of a request, its keys up to date; None if it is not cached."""
        tracked = self._tracked.get(request.request_id)
        if tracked is not None and tracked.epoch != self._epoch:
            return None  # computed with what was reset
        if tracked is None:
            if not cacheable(request):
                return None
            try:
                spec = self._namespaces.spec_of(request)
            except OSError as error:
                logger.warning("request %s is not cached: its adapter cannot be read: %s", request.request_id, error)
                return None
            namespace = self._namespace(spec)
            if namespace is None:
                return None
            keys = GrowingKeys(namespace.root, spec.block_size)
            tracked = _Tracked(request, namespace, keys, self._epoch)
            self._tracked[request.request_id] = tracked
        return tracked

    def _extend(self, tracked: _Tracked, tokens: int) -> None:
        """Hash the request's tokens up to so many; none is hashed twice."""
        keys, size = tracked.keys, self._spec.block_size
        if tokens <= keys.tokens:
            return
        new = np.asarray(tracked.request.all_token_ids[keys.tokens : tokens], np.int64)
        first, complete = keys.tokens // size, tokens // size - keys.tokens // size
        keys.extend(new, extras_of(tracked.request, first, complete, size))

    def on_new_request(self, request: Request) -> None:
        """Begin to fetch what the request may find."""
        self.counts.requests += 1
        if request.skip_reading_prefix_cache:
            return
        tracked = self._track(request)
        if tracked is not None:
            self._fetch(tracked)

    def _fetch(self, tracked: _Tracked) -> None:
        """All blocks but the one with the last token, which vLLM computes in any case."""
        request, size = tracked.request, self._spec.block_size
        blocks = (request.num_tokens - 1) // size
        self._extend(tracked, blocks * size)
        if blocks:
            try:
                tracked.arrival = self._arrivals.begin(tracked.namespace, tracked.keys.keys[:blocks])
            except UnknownNamespaceError:
                self._registered.pop(self._namespaces.spec_of(request), None)

    def _let_go(self, tracked: _Tracked) -> None:
        """Unpin its hit."""
        if tracked.arrival is not None:
            self._arrivals.end(tracked.arrival)
            tracked.arrival = None

    def matched_tokens(self, request: Request, computed: int) -> int | None:
        """Tokens beyond `computed` that can be loaded; None: ask again, a fetch is under way."""
        if request.skip_reading_prefix_cache:
            return 0
        tracked = self._track(request)
        if tracked is None or tracked.load is not None or tracked.load_failed:
            return 0
        if tracked.arrival is None or tracked.arrival.fetch.released:
            self._let_go(tracked)
            self._fetch(tracked)
            if tracked.arrival is None:
                return 0
        blocks = self._arrivals.found(tracked.arrival, computed // self._spec.block_size)
        if blocks is None:
            return None
        tracked.matched, tracked.local = blocks, computed
        extra = blocks * self._spec.block_size - computed
        if extra <= 0:
            self._let_go(tracked)
            tracked.matched = 0
        return max(extra, 0)

    def after_alloc(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """vLLM has given the request its device blocks: load into them."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.load is not None:
            return
        if external <= 0:
            self._let_go(tracked)
            return
        size = self._spec.block_size
        first, last = tracked.local // size, (tracked.local + external) // size
        arrival = tracked.arrival
        tracked.load_tag, tracked.taken = self._tag(request), {}
        if arrival is None or arrival.fetch.ready < last:  # it was lost since: the workers say so
            self._ends.failed[request.request_id] = tracked.load_tag
            self.counts.failed_loads += 1
            tracked.load_failed = True
            return
        table = rows(blocks.get_block_ids(), first, last)
        tracked.load = self._client.load(arrival.fetch, table, tag=tracked.load_tag)
        tracked.taken = arrival.tokens(tracked.local, tracked.local + external, size)
        tracked.load_began, tracked.load_step = time.monotonic(), self._busy_steps
        self._loading[request.request_id] = tracked
        if self._events is not None:
            self._events.watch(tracked.load, request, tracked.keys.keys[:last], 0)
        self.counts.loads += 1

    def taken(self, request: Request) -> Mapping[str, int]:
        """Tokens of the load that was begun for it last, by tier."""
        tracked = self._tracked.get(request.request_id)
        return tracked.taken if tracked is not None else {}

    def _tag(self, request: Request) -> str:
        self._transfers += 1
        return f"{request.request_id}/{self._transfers}"

    # ---------------------------------------------------------------- a step

    def step(self, output: SchedulerOutput) -> Ends:
        """Store what has been computed since; return what has ended, for the workers."""
        self._begin_step(output)
        if self._loading and not output.total_num_scheduled_tokens:
            # Nothing else to do: leave the processor to the copies, rather than come again at once.
            self._client.wait(next(load for each in self._loading.values() if (load := each.load)), IDLE_WAIT_S)
        elif self._loading or self._finishing or self._blocks.holding:
            self._client.pump()
        if self._loading:
            self._end_loads()
        for request_id in output.preempted_req_ids or ():
            self._preempted(request_id)
        self._store_due(output)
        if self._finishing:
            self._end_stores()
        for tag, store in self._blocks.release():
            self._client.cancel(store)
            self._ends.revoked.append(tag)
        self._arrivals.step()
        if not self._ends:
            return NOTHING
        ends, self._ends = self._ends, Ends()
        return ends

    def _begin_step(self, output: SchedulerOutput) -> None:
        """Note what the engine is going to compute."""
        scheduled, total = output.num_scheduled_tokens, output.total_num_scheduled_tokens
        drafts = output.scheduled_spec_decode_tokens
        if drafts:
            self._most_tokens = max(self._most_tokens, 1 + max(map(len, drafts.values())))
        prompt_tokens = 0
        if total > len(scheduled):
            prompt_tokens = sum(n for key, n in scheduled.items() if n > 1 + len(drafts.get(key, ())))
        self._steps += 1
        self._busy_steps += total > 0
        self.judge.prefill.began(prompt_tokens, computes=total > 0)

    def step_ended(self) -> None:
        """The oldest step that was begun has ended."""
        self.judge.prefill.ended()

    def _store_due(self, output: SchedulerOutput) -> None:
        """Look at those requests that may have filled enough blocks by now, and not at all that run."""
        for new in output.scheduled_new_reqs:
            tracked = self._tracked.get(new.req_id)
            if tracked is not None:
                self._blocks.note(new.req_id)
                if not tracked.due:
                    tracked.due = True
                    self._due.setdefault(self._steps + 1, []).append(tracked)
        for tracked in self._due.pop(self._steps, ()):
            request = tracked.request
            if self._tracked.get(request.request_id) is not tracked:
                continue
            wait = 1
            if tracked.load is None and request.request_id in output.num_scheduled_tokens:
                self._store(tracked, self._store_blocks)
                self._blocks.note(request.request_id)
                computed = request.num_computed_tokens - request.num_in_flight_tokens
                if computed >= request.num_prompt_tokens:
                    missing = (tracked.stored + self._store_blocks) * self._spec.block_size - computed
                    wait = max(1, -(-missing // self._most_tokens))
            self._due.setdefault(self._steps + wait, []).append(tracked)

    def _end_loads(self) -> None:
        for request_id, tracked in list(self._loading.items()):
            load = tracked.load
            if load is None or not load.ended:
                continue
            del self._loading[request_id]
            if load.error is None:
                took = time.monotonic() - tracked.load_began
                self.seen.loaded(took, tracked.taken)
                if tracked.load_step == self._busy_steps:  # else what it took is what the engine's steps took
                    self.judge.copied(load.blocks, took)
                tracked.stored = max(tracked.stored, tracked.matched)
                self._ends.loaded.add(request_id)
            else:
                logger.warning("a load of request %s failed: %s", request_id, load.error)
                self.counts.failed_loads += 1
                self._ends.failed[request_id] = tracked.load_tag
                tracked.load_failed = True
            tracked.load = None
            self._let_go(tracked)

    def _preempted(self, request_id: str) -> None:
        """Its device blocks are another's from this step on: copies of them must have ended before."""
        tracked = self._tracked.get(request_id)
        if tracked is not None:
            self._give_up(tracked)
            self._blocks.forget(request_id)
            tracked.stored = 0

    def _give_up(self, tracked: _Tracked) -> None:
        self._client.pump()
        self._forget_ended(tracked)
        self.counts.failed_stores += len(tracked.stores)
        for store in tracked.stores:
            self._client.cancel(store.transfer)
            self._ends.revoked.append(store.tag)
        tracked.stores.clear()

    def _forget_ended(self, tracked: _Tracked) -> None:
        """Keep only stores that have not ended; count those that failed."""
        self.counts.failed_stores += sum(store.transfer.error is not None for store in tracked.stores)
        tracked.stores = [store for store in tracked.stores if not store.transfer.ended]

    def _store(self, tracked: _Tracked, least: int, device_blocks: DeviceTables | None = None) -> None:
        """Store full blocks whose step's output has been processed, if they are so many or the prompt is done.

        `device_blocks`: the request's, by KV group; None: those in vLLM's tables, if it has shown them.
        """
        request, size = tracked.request, self._spec.block_size
        if tracked.epoch != self._epoch:
            return
        computed = min(request.num_computed_tokens - request.num_in_flight_tokens, len(request.all_token_ids))
        full = computed // size
        prompt_done = computed >= request.num_prompt_tokens and tracked.stored < request.num_prompt_tokens // size
        if full <= tracked.stored or (full - tracked.stored < least and not prompt_done):
            return
        if device_blocks is None:
            device_blocks = self._blocks.of(request.request_id)
            if device_blocks is None:
                return
        self._extend(tracked, full * size)
        tables = self._blocks.stored(request.request_id, device_blocks, tracked.stored, full)
        tag = self._tag(request)
        try:
            transfer = self._client.store(tracked.namespace, tracked.keys.keys[:full], tables, tag=tag)
        except UnknownNamespaceError:
            return
        self._blocks.hold(tag, transfer, tables)
        if self._events is not None:
            self._events.watch(transfer, request, tracked.keys.keys[:full], tracked.stored)
        self.counts.stores += 1
        self.counts.stored_blocks += full - tracked.stored
        tracked.stored = full
        self._forget_ended(tracked)
        tracked.stores.append(_Store(transfer, tag))

    def finished(self, request: Request, device_blocks: DeviceTables) -> bool:
        """The request, which has these device blocks, has ended. True: hold them until `Ends.saved` names it."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return False
        del self._tracked[request.request_id]
        if tracked.load is not None:  # vLLM holds its blocks until the load has ended
            self._client.cancel(tracked.load)
            self._blocks.forget(request.request_id)
            return False
        self._let_go(tracked)
        self._store(tracked, 1, device_blocks)
        self._blocks.forget(request.request_id)
        if tracked.stores:
            self._client.pump()
            self._forget_ended(tracked)
        if not tracked.stores:
            return False
        self._finishing[request.request_id] = (tracked, time.monotonic() + STORE_S)
        return True

    def _end_stores(self) -> None:
        now = time.monotonic()
        for request_id, (tracked, until) in list(self._finishing.items()):
            pending = [store for store in tracked.stores if not store.transfer.ended]
            if pending and now < until:
                continue
            self._give_up(tracked)
            del self._finishing[request_id]
            self._ends.saved.add(request_id)

    @property
    def busy(self) -> bool:
        """Whether vLLM must go on stepping, though it has nothing to compute."""
        return bool(self._finishing or self._loading or self._blocks.holding)

    # ---------------------------------------------------------------- resets, figures, end

    def reset(self) -> None:
        """Weights may have changed: nothing that was computed before is found or stored any more."""
        self._epoch += 1
        if self._events is not None:
            self._events.reset()
        for spec, namespace in list(self._registered.items()):
            try:
                self._registered[spec] = self._client.reset(namespace)
            except FlexKVError as error:
                logger.warning("a namespace is registered anew: %s", error)
                del self._registered[spec]
        for tracked in self._tracked.values():
            if tracked.load is None:
                self._let_go(tracked)

    def take_events(self) -> list[Any]:
        """What routers are to be told, as the engine's events."""
        return self._events.take() if self._events is not None else []

    def figures(self) -> Mapping[str, Any]:
        """Counts, and the client's own."""
        counts = {name: getattr(self.counts, name) for name in Counts.__slots__}
        choices = {f"choice_{name}": value for name, value in self.judge.figures().items()}
        return {**counts, **choices, **{f"client_{name}": value for name, value in self._client.figures().items()}}

    def close(self) -> None:
        self._client.close()
