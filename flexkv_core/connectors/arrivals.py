"""Hits of requests that have arrived: from the fetch that looks for them to the blocks that an engine is promised.

Owns who waits for a fetch and for how long, by the word of `load_or_compute.py`; and what becomes of what is not waited
for: it goes on behind the request, one prefetch a tier at a time, so that hot blocks still come up, and so that a tier
that has become fast again is noticed. No call waits longer than a fraction of a millisecond. Does not know engines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexkv_core.blocks import Keys, Namespace
from flexkv_core.connectors.load_or_compute import HERE, Choice, Held, LoadOrCompute
from flexkv_core.connectors.observations import Observations
from flexkv_core.server import Client, ClientFetch

FIRST_WAIT_S = 0.0003
"""What host memory takes to answer: a request that finds all there is scheduled in the step in which it is first asked
for. All that are first asked for in a step wait so long together."""
PROBE_AFTER_S = 1.0
"""A tier whose blocks were not waited for rests so long between two prefetches, and as long as the last one took."""
HOST_TIER = "cpu"
"""What host memory is called where the server has not said it."""
LOST = ("server", "refused", "expired")
"""Why a fetch may have ended that was not its caller's doing."""


@dataclass(slots=True, eq=False)
class Arrival:
    """A request's hit.

    Attributes:
        fetch: of `keys`, or, where `cut`, of the leading part of them that is taken.
        until: no wait is longer. asked: it was asked for, so that its fetch has been waited for.
        choice: what was decided while the fetch was under way, on a hit of `whole` blocks.
        ahead: blocks that were asked of each tier before, while its own are.
        avoid: tiers that were not read for it. held: where its blocks were, where `cut`: before they were fetched.
        counted: what became of it has been.
    """

    namespace: Namespace
    keys: Keys
    fetch: ClientFetch
    began: float
    until: float
    asked: bool = False
    whole: int = 0
    choice: Choice | None = None
    ahead: dict[str, int] | None = None
    avoid: Sequence[str] = ()
    held: Held = ()
    cut: bool = False
    counted: bool = False

    def tokens(self, first: int, last: int, block_size: int) -> dict[str, int]:
        """Tokens `first` to `last` of it by the tier that had them when it began; it is done."""
        host, tokens, at = next(iter(self.fetch.sources), HOST_TIER), dict[str, int](), 0
        for tier, blocks in (*(self.held if self.cut else self.fetch.held), (HERE, last)):
            begin, at = at, at + blocks * block_size
            count = min(at, last) - max(begin, first)
            if count > 0:
                tokens[tier or host] = tokens.get(tier or host, 0) + count
        return tokens


@dataclass(slots=True, eq=False)
class _Behind:
    """A prefetch of what was not waited for, of a tier."""

    fetch: ClientFetch
    began: float
    ahead: dict[str, int]


class Arrivals:
    """See the module's docstring. One thread.

    Args:
        seen: is told of fetches.
        fetch_s: the deadline of fetches.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        client: Client,
        judge: LoadOrCompute,
        seen: Observations,
        *,
        fetch_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._seen = seen
        self._judge = judge
        self._fetch_s = fetch_s
        self._clock = clock
        self._asked: Counter[str] = Counter()  # blocks that are waited for, by tier
        self._behind: dict[str, _Behind] = {}
        self._rest_until: dict[str, float] = {}
        self._first_until: float | None = None

    def begin(self, namespace: Namespace, keys: Keys) -> Arrival:
        """Look for a prefix. Raises UnknownNamespaceError."""
        now = self._clock()
        avoid = self._judge.too_slow(len(keys))
        fetch = self._client.fetch(namespace, keys, self._fetch_s, avoid=avoid)
        until = now + min(self._fetch_s, self._judge.compute_s(len(keys)) or self._fetch_s)
        return Arrival(namespace, keys, fetch, now, until, avoid=avoid)

    def found(self, arrival: Arrival, local: int) -> int | None:
        """Leading blocks that are in hand, `arrival.fetch` done, and worth loading; None: ask again.

        `local`: leading blocks that the engine has itself; no more than these: the hit has been given up.
        """
        while True:
            fetch = arrival.fetch
            if not arrival.asked:
                arrival.asked = True
                self._first_wait(fetch)
            if fetch.done:
                return self._in_hand(arrival, local)
            if arrival.choice is None and fetch.held:
                self._decide(arrival, local)
            choice, take = arrival.choice, fetch.ready
            if choice is not None and choice.blocks < arrival.whole and take >= min(choice.blocks, len(arrival.keys)):
                take = choice.blocks
            elif self._clock() < arrival.until:
                return None
            else:
                self._judge.decisions.gave_up += 1
            if take <= local or arrival.cut:
                self._leave(arrival, local)
                return local
            self._cut(arrival, take)

    def end(self, arrival: Arrival) -> None:
        """It is over, or its blocks are on the device. Safe to call twice."""
        self._settle(arrival)
        arrival.fetch.release()

    def _first_wait(self, fetch: ClientFetch) -> None:
        now = self._clock()
        if self._first_until is None:
            self._first_until = now + FIRST_WAIT_S
        if now < self._first_until and not fetch.done:
            fetch.wait(self._first_until - now)

    def step(self) -> None:
        """A step is over: take note of what has come behind the requests."""
        self._first_until = None
        if not self._behind:
            return
        for tier, behind in list(self._behind.items()):
            if behind.fetch.done:
                del self._behind[tier]
                now = self._clock()
                self._rest_until[tier] = now + max(PROBE_AFTER_S, now - behind.began)
                self._learn(behind.fetch, behind.ahead, now - behind.began)

    # ---------------------------------------------------------------- decisions

    def _decide(self, arrival: Arrival, local: int) -> None:
        """It is known now where the blocks are."""
        fetch, now = arrival.fetch, self._clock()
        arrival.whole = sum(blocks for _, blocks in fetch.held)
        arrival.ahead = dict(self._asked)
        arrival.choice = self._judge.choose(fetch.held, local, ahead=self._asked, waited_s=now - arrival.began)
        arrival.until = min(arrival.until, now + arrival.choice.limit_s)
        self._asked.update(_by_tier(fetch))

    def _in_hand(self, arrival: Arrival, local: int) -> int:
        """The fetch is done: what it has is in host memory."""
        self._settle(arrival)
        if not arrival.counted:
            arrival.whole = max(arrival.whole, sum(blocks for _, blocks in arrival.fetch.held))
            if arrival.whole > arrival.fetch.ready and not arrival.cut:
                self._follow(arrival)
            self._observe(arrival)
        choice = self._judge.choose([(HERE, arrival.fetch.ready)], local)
        self._count(arrival, choice, local)
        if choice.blocks <= local:
            arrival.fetch.release()
        return choice.blocks

    def _cut(self, arrival: Arrival, blocks: int) -> None:
        """Take the leading blocks that are there, which a fetch of their own has at once; wait for no more."""
        now = self._clock()
        fetch = self._client.fetch(arrival.namespace, arrival.keys[:blocks], self._fetch_s)
        self._abandon(arrival)
        arrival.held = arrival.fetch.held
        arrival.fetch, arrival.cut = fetch, True
        arrival.keys, arrival.asked = arrival.keys[:blocks], False
        arrival.until = now + (self._judge.compute_s(blocks) or self._fetch_s)

    def _leave(self, arrival: Arrival, local: int) -> None:
        """Take nothing."""
        self._abandon(arrival)
        self._count(arrival, self._judge.choose([], local), local)

    def _abandon(self, arrival: Arrival) -> None:
        """Give up the fetch; its reads that are queued change hands, if what they bring comes behind the request."""
        self._follow(arrival)
        self._settle(arrival)
        self._client.cancel(arrival.fetch)

    def _follow(self, arrival: Arrival) -> None:
        """Have what was not taken come behind the request, where that is due."""
        fetch, now = arrival.fetch, self._clock()
        tier = next((tier for tier, _ in reversed(fetch.held) if tier != HERE), None)
        if tier is not None and tier not in self._behind and now >= self._rest_until.get(tier, now):
            follower = self._client.prefetch(arrival.namespace, arrival.keys, self._fetch_s)
            self._behind[tier] = _Behind(follower, now, dict(self._asked))
            self._judge.decisions.probes += 1

    def _count(self, arrival: Arrival, choice: Choice, local: int) -> None:
        if not arrival.counted:
            arrival.counted = True
            self._judge.decided(choice, max(arrival.whole, arrival.fetch.ready), local)

    # ---------------------------------------------------------------- measurements

    def _observe(self, arrival: Arrival) -> None:
        """Tell of its fetch, which is done."""
        fetch, expected = arrival.fetch, len(arrival.keys) if arrival.cut else 0
        for tier, blocks in fetch.held if not arrival.cut else ():
            if tier in arrival.avoid:
                break
            expected += blocks
        failed = fetch.why in LOST or fetch.ready < expected
        if failed or fetch.ready:
            self._seen.fetched(fetch.steps[-1][1] if fetch.steps else self._clock() - arrival.began, failed=failed)

    def _settle(self, arrival: Arrival) -> None:
        """Its fetch is waited for no more."""
        if arrival.ahead is not None:
            self._asked.subtract(_by_tier(arrival.fetch))
            self._learn(arrival.fetch, arrival.ahead, self._clock() - arrival.began)
            arrival.ahead = None

    def _learn(self, fetch: ClientFetch, ahead: dict[str, int], elapsed_s: float) -> None:
        """Measure tiers by when, on the server's clock, the last block of each run of theirs was there."""
        at, before = 0, 0.0
        asked = Counter(ahead)
        if fetch.done and fetch.steps:
            elapsed_s = fetch.steps[-1][1]
        for tier, blocks in fetch.held:
            at += blocks
            if tier == HERE:
                continue
            asked[tier] += blocks
            came = next((seconds for ready, seconds in fetch.steps if ready >= at), None)
            if came is None:
                self._judge.did_not_come(tier, asked[tier], elapsed_s)
                return
            if came > before:  # else it was there before, and waited for others
                self._judge.came(tier, asked[tier], came)
            before = came


def _by_tier(fetch: ClientFetch) -> Counter[str]:
    blocks: Counter[str] = Counter()
    for tier, count in fetch.held:
        if tier != HERE:
            blocks[tier] += count
    return blocks
