"""The built-in policies in Python, as README.md's table has them; and a third party's, kept from doing harm.

Owns what a copy's state and order are. Does not own candidates or their heaps, nor which of S3-FIFO's queues an
eviction takes from: `flexkv_core.index.reference`. Nothing here is shared with the native policies.
"""

from __future__ import annotations

import logging
import operator
import threading

from flexkv_core.policies import Eviction, Policy, make_custom

State = tuple[int, ...]
Order = tuple[int, ...]
Block = tuple[bytes, int]
"""First 8 bytes of a key, and the group: what a ghost remembers a block by."""

MOST_USES = (1 << 30) - 1
"""Where counts of uses and hits stop."""
LATEST = 1 << 62
"""Where rewards of lru stop."""
SMALL, MAIN = 1, 2
"""S3-FIFO's queues."""
_S3_MOST_USES = 3

_log = logging.getLogger(__name__)


class ReferencePolicy:
    """One tier's policy; this one is lru, with `reward` ticks a hit. The others change what differs."""

    def __init__(self, reward: int = 0) -> None:
        self._reward = reward

    def insert(self, now: int, block: Block) -> State:
        """The state of a copy of `block` that has just come in."""
        return (now,)

    def hit(self, state: State, now: int) -> State:
        """The state after a hit."""
        return (min(max(state[0], now) + self._reward, LATEST),) if self._reward else (now,)

    def order(self, state: State) -> Order:
        """What compares with the other copies of the tier: the lowest goes first."""
        return state

    def queue(self, state: State) -> int:
        """Which of S3-FIFO's queues the copy is in; 0 for all other policies."""
        return 0


class _Mru(ReferencePolicy):
    def order(self, state: State) -> Order:
        return (-state[0],)


class _Fifo(ReferencePolicy):
    def hit(self, state: State, now: int) -> State:
        return state


class _Filo(_Fifo):
    def order(self, state: State) -> Order:
        return (-state[0],)


class _Lfu(ReferencePolicy):
    """State: (uses, tick)."""

    def insert(self, now: int, block: Block) -> State:
        return 1, now

    def hit(self, state: State, now: int) -> State:
        return min(state[0] + 1, MOST_USES), now


class _Slru(_Lfu):
    """State: (hits, tick)."""

    def __init__(self, threshold: int) -> None:
        super().__init__()
        self._threshold = threshold

    def insert(self, now: int, block: Block) -> State:
        return 0, now

    def order(self, state: State) -> Order:
        return int(state[0] >= self._threshold), state[1]


class S3Fifo(ReferencePolicy):
    """State: (queue, uses, tick). Orders compare within one queue, and among copies that go before both."""

    def __init__(self) -> None:
        super().__init__()
        self.ghost: dict[Block, None] = {}  # a set in order of entry

    def insert(self, now: int, block: Block) -> State:
        if block not in self.ghost:
            return SMALL, 0, now
        del self.ghost[block]
        return MAIN, 0, now

    def hit(self, state: State, now: int) -> State:
        queue, uses, tick = state
        return queue, min(uses + 1, _S3_MOST_USES), tick

    def order(self, state: State) -> Order:
        return (state[2],)

    def queue(self, state: State) -> int:
        return state[0]

    def second_chance(self, state: State, now: int) -> State | None:
        """The state of a first candidate that is kept at `now` after all, or None: it goes."""
        queue, uses, _ = state
        if queue == SMALL:
            return (MAIN, 0, now) if uses > 1 else None
        return (MAIN, uses - 1, now) if uses else None

    def learn(self, block: Block) -> None:
        """Remember a block that left the small queue."""
        self.ghost.setdefault(block)

    def forget(self, entries: int) -> None:
        """Keep the youngest `entries` of the ghost."""
        while len(self.ghost) > entries:
            del self.ghost[next(iter(self.ghost))]


class Custom(ReferencePolicy):
    """A third party's policy: exceptions, and what is no integer of 64 bits, are logged and never come out.

    Attributes:
        running: the thread that is in the third party's code now, or None.
    """

    def __init__(self, name: str, policy: Policy) -> None:
        super().__init__()
        self._name, self._policy = name, policy
        self.running: int | None = None

    def insert(self, now: int, block: Block) -> State:
        return (self._call("insert", 0, now),)

    def hit(self, state: State, now: int) -> State:
        return (self._call("hit", state[0], state[0], now),)

    def order(self, state: State) -> Order:
        return (self._call("order", 0, state[0]),)

    def _call(self, method: str, otherwise: int, *arguments: int) -> int:
        self.running = threading.get_ident()
        try:
            value = operator.index(getattr(self._policy, method)(*arguments))
            if not -(1 << 63) <= value < 1 << 63:
                raise OverflowError(f"{value} does not fit in 64 bits")
        except Exception:
            _log.exception("eviction policy %r: %s%s failed; taken as %d", self._name, method, arguments, otherwise)
            return otherwise
        finally:
            self.running = None
        return value


def make_policy(eviction: Eviction) -> ReferencePolicy:
    """A new instance for one tier. Raises PolicyError if there is none of that name, or it cannot be made."""
    custom = make_custom(eviction.policy)
    if custom is not None:
        return Custom(eviction.policy, custom)
    if eviction.policy == "lru":
        return ReferencePolicy(eviction.reward_ticks)
    if eviction.policy == "slru":
        return _Slru(eviction.slru_protected_threshold)
    return _PLAIN[eviction.policy]()


_PLAIN: dict[str, type[ReferencePolicy]] = {"mru": _Mru, "fifo": _Fifo, "filo": _Filo, "lfu": _Lfu, "s3fifo": S3Fifo}
