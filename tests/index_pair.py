"""Two indexes driven side by side: every operation that the state machine knows, on random arguments.

Owns the operations, what the arguments are made of, and the comparison. Both sides must answer the same, arrays to the
last element, and raise errors of the same type. What does not depend on either side is checked too: which pins are
legal, and that the slots that come out are those that went in.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from flexkv_core.blocks import block_keys
from flexkv_core.index import MAX_SLOT, NO_SLOT, GroupRule, Index
from flexkv_core.layout import Coverage
from flexkv_core.policies import Eviction

MakeIndex = Callable[[int, Sequence[str | Eviction]], Index]
Path = tuple[int, ...]

TOKENS = 3
MOST_COPIES = 400
"""Of a tier: above it, inserts make room first, so that trees stay small and change much."""
COVERAGES = [Coverage(), Coverage(), Coverage.window(1), Coverage.window(3), Coverage("state")]
UNORDERED = ("copies", "remove_subtree")
STATISTICS = ("namespaces", "positions", "orphans", "copies", "pinned")


@dataclass
class Space:
    """A namespace, and the paths that were used in it."""

    root: bytes
    rules: list[GroupRule]
    retired: bool = False
    paths: deque[Path] = field(default_factory=deque)

    def keys(self, path: Path) -> np.ndarray:
        return block_keys(np.array(path, np.int32), 1, self.root)


@dataclass
class Piece:
    """Arguments of one call of recover."""

    space: Space
    tier: int
    group: int
    keys: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    slots: np.ndarray
    refused: np.ndarray
    """(n,) bool: contradicts the tree whatever has happened in between."""


class Pair:
    """The indexes and just enough knowledge of them to choose arguments that matter."""

    def __init__(self, left: MakeIndex, right: MakeIndex, policies: Sequence[str | Eviction], dice: Random) -> None:
        self.tiers = len(policies)
        self.sides = (left(self.tiers, policies), right(self.tiers, policies))
        self.taken: Counter[str] = Counter()
        self.log: deque[str] = deque(maxlen=25)
        self.spaces: list[Space] = []
        self.forgotten: deque[Space] = deque(maxlen=3)
        self.held: list[set[int]] = [set() for _ in range(self.tiers)]
        self.pins: Counter[tuple[bytes, bytes, int, int]] = Counter()  # (root, key, tier, group)
        self.pending: list[Piece] = []
        self.made = 0
        self.known_paths = dice.choice((3, 8, 30))  # few: the same blocks leave and come back
        moods = [weight * dice.choice((0.3, 1, 1, 3)) for weight in WEIGHTS.values()]
        self.moods = dict(zip(WEIGHTS, moods, strict=True))
        self.new_namespace(dice)

    # ---------------------------------------------------------------- comparison

    def call(self, method: str, *arguments: Any) -> Any:
        """Call both sides and compare; returns the left's answer, or its exception."""
        self.log.append(f"{method}{_brief(arguments)}")
        left, right = (_outcome(side, method, arguments) for side in self.sides)
        if isinstance(left, Exception) or isinstance(right, Exception):
            assert type(left) is type(right), f"{left!r} and {right!r}"
            return left
        _same(method, _normal(method, left), _normal(method, right))
        return left

    def good(self, method: str, *arguments: Any) -> Any:
        """A call that must not raise."""
        answer = self.call(method, *arguments)
        if isinstance(answer, Exception):
            raise AssertionError(f"{method} raised {answer!r}") from answer
        return answer

    def step(self, operation: str, dice: Random) -> None:
        """One transition, and what must hold after each."""
        self.log.append(f"-- {operation}")
        self.taken[operation] += 1
        orphans = self.sides[0].statistics()["orphans"]
        getattr(self, operation)(dice)
        self.settle()
        self.taken["orphans joined"] += "insert" in operation and self.sides[0].statistics()["orphans"] < orphans

    def settle(self) -> None:
        """Compare figures, and forget what the indexes have forgotten."""
        figures = [{name: side.statistics()[name] for name in STATISTICS} for side in self.sides]
        assert figures[0] == figures[1]
        assert figures[0]["pinned"] == len(self.pins)
        for tier in range(self.tiers):
            assert self.good("count", tier) == len(self.held[tier])
        assert figures[0]["copies"] == sum(map(len, self.held))
        for space in [each for each in self.spaces if each.retired]:
            if not self.good("has_namespace", space.root):
                self.taken["forgotten"] += 1
                self.spaces.remove(space)
                self.forgotten.append(space)
        assert figures[0]["namespaces"] == len(self.spaces)

    def drain(self) -> None:
        """Take all pins back and evict everything one by one: the whole order is compared."""
        classes = self.classes()
        for space in self.spaces:
            for tier in range(self.tiers):
                for group in range(len(space.rules)):
                    self.good("copies", space.root, tier, group)
        if self.pins:
            for tier in {tier for _, _, tier, _ in self.pins}:
                self._drop(tier)
        for tier in range(self.tiers):
            for slot_class in classes:
                while (gone := self.good("evict", tier, 1, slot_class)) is not None:
                    self._went(tier, gone.slots)
            assert not self.held[tier]
        self.settle()
        assert self.sides[0].statistics()["positions"] == 0

    # ---------------------------------------------------------------- choosing

    def space(self, dice: Random) -> Space:
        """Mostly one that lives, at times one that is retired or forgotten."""
        if dice.random() < 0.02 and self.forgotten:
            return dice.choice(list(self.forgotten))
        living = [each for each in self.spaces if not each.retired]
        if dice.random() < 0.1 or not living:
            living = self.spaces or list(self.forgotten)
        return dice.choice(living)

    def path(self, dice: Random, space: Space, deep: bool = False) -> Path:
        """A known path, a part of one, or one that leaves a known one somewhere; of 1 to 40 tokens, or up to 200."""
        known: Path = dice.choice(list(space.paths)) if space.paths and dice.random() < 0.85 else ()
        if known and dice.random() < 0.3:
            return known if dice.random() < 0.5 else known[: dice.randint(1, len(known))]
        kept = known[: dice.randint(0, len(known))]
        length = dice.randint(1, 200 if deep and dice.random() < 0.03 else 40 if dice.random() < 0.4 else 9)
        # long runs of one token are shared by many paths
        token = dice.randrange(TOKENS)
        more = [token if dice.random() < 0.7 else dice.randrange(TOKENS) for _ in range(length)]
        return (*kept, *more)[:200]

    def column(self, dice: Random, space: Space) -> tuple[int, int]:
        return dice.randrange(self.tiers), dice.randrange(len(space.rules))

    def classes(self) -> list[int]:
        return sorted(
            {rule.class_in(tier) for space in self.spaces for rule in space.rules for tier in range(self.tiers)}
        )

    def slot(self, dice: Random) -> int:
        """Unique; most are small, some lie beyond 2^32 and near the largest."""
        self.made += 1
        return (self.made, self.made + (1 << 33), MAX_SLOT - self.made)[dice.choice((0, 0, 0, 1, 2))]

    def range(self, dice: Random, length: int) -> tuple[int, int]:
        if dice.random() < 0.3:
            return 0, length
        start = dice.randint(0, length)
        return start, dice.randint(start, length)

    # ---------------------------------------------------------------- inserting and reading

    def insert(self, dice: Random) -> None:
        self._insert(dice, 1.0, 0)

    def insert_with_gaps(self, dice: Random) -> None:
        self._insert(dice, dice.choice((0.1, 0.5, 0.9)), 0)

    def insert_deeper_part(self, dice: Random) -> None:
        """Leaves holes before it, unless another column or an earlier insert has filled them."""
        self._insert(dice, 1.0, dice.randint(1, 12))

    def _insert(self, dice: Random, share: float, first: int) -> None:
        space = self.space(dice)
        path, (tier, group) = self.path(dice, space, deep=True), self.column(dice, space)
        if len(self.held[tier]) + len(path) > MOST_COPIES:
            self._make_room(dice, tier)
        keys = space.keys(path)
        wanted = [at >= min(first, len(path) - 1) and dice.random() < share for at in range(len(path))]
        slots = np.array([self.slot(dice) if want else NO_SLOT for want in wanted], np.int64)
        mask = self.call("insert", space.root, keys, tier, group, slots)
        if isinstance(mask, Exception):
            assert space.retired or space in self.forgotten, mask
            self.taken["insert refused"] += 1
            return
        space.paths.append(path)
        self._came(tier, slots[mask])

    def _make_room(self, dice: Random, tier: int) -> None:
        for slot_class in self.classes():
            for count in (80, 20, 5):
                gone = self.good("evict", tier, count, slot_class)
                if gone is not None:
                    self._went(tier, gone.slots)
        if len(self.held[tier]) > MOST_COPIES:
            self.taken["make room by drop"] += 1
            self._drop(tier)

    def match(self, dice: Random) -> None:
        space = self.space(dice)
        found = self.call("match", space.root, space.keys(self.path(dice, space)))
        if space in self.forgotten:
            assert isinstance(found, KeyError)
        elif space.retired:
            assert found.blocks == found.tiers.shape[1] == 0

    def residency(self, dice: Random) -> None:
        space = self.space(dice)
        self.call("residency", space.root, space.keys(self.path(dice, space)), *self.column(dice, space))

    def touch(self, dice: Random) -> None:
        space = self.space(dice)
        path = self.path(dice, space)
        part = path if dice.random() < 0.5 else path[: dice.randint(0, len(path))]
        for _ in range(dice.choice((1, 1, 1, 3, 4))):
            self.call("touch", space.root, space.keys(part))

    def copies(self, dice: Random) -> None:
        space = self.space(dice)
        self.call("copies", space.root, *self.column(dice, space))

    def advance(self, dice: Random) -> None:
        self.good("advance", dice.randint(0, 4 * self.made))

    # ---------------------------------------------------------------- pins and removal

    def pin(self, dice: Random) -> None:
        space = self.space(dice)
        keys, (tier, group) = space.keys(self.path(dice, space)), self.column(dice, space)
        if space in self.forgotten:
            return
        slots = self.good("residency", space.root, keys, tier, group)
        start, stop = self.range(dice, len(keys))
        if (runs := _runs(np.flatnonzero(slots != NO_SLOT).tolist())) and dice.random() < 0.8:
            first, last = dice.choice(runs)
            start = dice.randint(first, last - 1)
            stop = dice.randint(start + 1, last)
        legal = bool((slots[start:stop] != NO_SLOT).all())
        error = self.call("pin", space.root, keys, tier, group, start, stop)
        assert (error is None) == legal, error
        self.taken["pin of copies" if legal and start < stop else "pin of nothing" if legal else "pin refused"] += 1
        if legal:
            self.pins.update((space.root, key.tobytes(), tier, group) for key in keys[start:stop])

    def unpin(self, dice: Random) -> None:
        """Pins that there are, mostly."""
        space = self.space(dice)
        if space in self.forgotten:
            return
        path = self.path(dice, space)
        for known in dice.sample(list(space.paths), len(space.paths)) if dice.random() < 0.9 else ():
            if any(pinned[1] == key.tobytes() for pinned in self.pins for key in space.keys(known)[-1:]):
                path = known
        keys, (tier, group) = space.keys(path), self.column(dice, space)
        names = [(space.root, key.tobytes()) for key in keys]
        ranges = [self.range(dice, len(keys))]
        if dice.random() < 0.9:
            columns = [(t, g) for t in range(self.tiers) for g in range(len(space.rules))]
            for t, g in dice.sample(columns, len(columns)):
                if held := [at for at, name in enumerate(names) if (*name, t, g) in self.pins]:
                    tier, group = t, g
                    ranges = _runs(held)
                    break
        for start, stop in ranges:
            pinned = [(*name, tier, group) for name in names[start:stop]]
            legal = all(name in self.pins for name in pinned)
            error = self.call("unpin", space.root, keys, tier, group, start, stop)
            assert (error is None) == legal, error
            self.taken["unpin of copies" if legal and pinned else "unpin of nothing" if legal else "unpin refused"] += 1
            if legal:
                self.pins -= Counter(pinned)

    def remove(self, dice: Random) -> None:
        space = self.space(dice)
        keys, (tier, group) = space.keys(self.path(dice, space)), self.column(dice, space)
        start, stop = self.range(dice, len(keys))
        if dice.random() < 0.6:
            stop = min(stop, start + dice.randint(0, 3))
        gone = self.call("remove", space.root, keys, tier, group, start, stop)
        if isinstance(gone, Exception):
            self.taken["remove refused"] += 1
        else:
            self._went(tier, gone[gone != NO_SLOT])

    def remove_subtree(self, dice: Random) -> None:
        space = self.space(dice)
        path = self.path(dice, space)
        gone = self.call("remove_subtree", space.root, space.keys(() if dice.random() < 0.08 else path))
        if isinstance(gone, Exception):
            self.taken["remove_subtree refused"] += 1
            return
        for tier in range(self.tiers):
            self._went(tier, gone.slots[gone.tiers == tier])

    # ---------------------------------------------------------------- evicting

    def evict(self, dice: Random) -> None:
        tier = dice.randrange(self.tiers)
        slot_class = dice.choice([*self.classes(), 7]) if dice.random() < 0.1 else dice.choice(self.classes() or [0])
        held = len(self.held[tier])
        count = dice.choice((0, 1, 1, dice.randint(1, 5), dice.randint(1, 30), dice.randint(0, held), held + 1))
        gone = self.good("evict", tier, count, slot_class)
        if gone is None:
            self.taken["evict none"] += 1
            return
        assert len(gone.slots) == count
        retired = {space.root for space in self.spaces if space.retired}
        self.taken["evicted of a retired one"] += any(root.tobytes() in retired for root in gone.roots)
        self._went(tier, gone.slots)

    def drop_tier(self, dice: Random) -> None:
        self._drop(dice.randrange(self.tiers))

    def _drop(self, tier: int) -> None:
        self.good("drop_tier", tier)
        self.held[tier].clear()
        for name in [name for name in self.pins if name[2] == tier]:
            del self.pins[name]

    # ---------------------------------------------------------------- namespaces

    def new_namespace(self, dice: Random) -> None:
        if sum(not each.retired for each in self.spaces) >= 3:
            known = dice.choice(self.spaces)  # again, with the same groups or with others
            rules = [*known.rules, GroupRule()] if dice.random() < 0.5 else list(known.rules)
            error = self.call("add_namespace", known.root, rules)
            assert (error is None) == (not known.retired and rules == known.rules)
            return
        self.made += 1
        root = hashlib.sha256(b"namespace %d" % self.made).digest()
        rules = []
        for _ in range(dice.randint(1, 3)):
            classes = tuple(dice.randrange(2) for _ in range(self.tiers))
            rules.append(GroupRule(dice.choice(COVERAGES), classes if dice.random() < 0.4 else classes[0]))
        self.good("add_namespace", root, rules)
        self.spaces.append(Space(root, rules, paths=deque(maxlen=self.known_paths)))

    def retire_namespace(self, dice: Random) -> None:
        space = self.space(dice)
        error = self.call("retire_namespace", space.root)
        assert (error is None) == (space in self.spaces)
        space.retired = True
        if not any(not each.retired for each in self.spaces):
            self.settle()
            self.new_namespace(dice)

    # ---------------------------------------------------------------- recovery

    def recover(self, dice: Random) -> None:
        """The next piece of a recovery, or the first of a new one."""
        if not self.pending:
            self.pending = self._records(dice)
        piece = self.pending.pop()
        slots = piece.slots
        mask = self.call(
            "recover", piece.space.root, piece.tier, piece.group, piece.keys, piece.parents, piece.depths, slots
        )
        if isinstance(mask, Exception):
            assert piece.space.retired or piece.space in self.forgotten, mask
            self.taken["recover refused"] += 1
            return
        assert not mask[piece.refused].any()
        self.taken["recovered a copy"] += bool(mask.any())
        self._came(piece.tier, slots[mask])
        if not self.pending:
            self.end_recovery(dice)

    def end_recovery(self, dice: Random) -> None:
        self.good("end_recovery")

    def _records(self, dice: Random) -> list[Piece]:
        """Parts of some paths, shuffled and cut into pieces; parents may be missing, and some records are wrong."""
        space = self.space(dice)
        tier, group = self.column(dice, space)
        if len(self.held[tier]) > MOST_COPIES:
            self._make_room(dice, tier)
        rows: dict[bytes, tuple[bytes, int, bool]] = {}
        for _ in range(dice.randint(1, 3)):
            path, share = self.path(dice, space), dice.choice((0.3, 0.8, 1.0))
            space.paths.append(path)
            chain = [space.root, *(key.tobytes() for key in space.keys(path))]
            first = dice.randint(0, len(path) - 1) if dice.random() < 0.5 else 0
            for depth in range(first, len(path)):
                if dice.random() < share:
                    rows[chain[depth + 1]] = (chain[depth], depth, False)
        order = list(rows.items())
        dice.shuffle(order)
        if dice.random() < 0.3:
            order += [self._wrong(dice, space) for _ in range(3)]
            dice.shuffle(order)
        order += [row for row in order if dice.random() < 0.03]  # twice
        pieces, at = [], 0
        while at < len(order) or not pieces:
            part = order[at : at + dice.randint(1, 30)]
            at += len(part)
            pieces.append(
                Piece(
                    space,
                    tier,
                    group,
                    _rows([key for key, _ in part]),
                    _rows([parent for _, (parent, _, _) in part]),
                    np.array([depth for _, (_, depth, _) in part], np.int64),
                    np.array([self.slot(dice) for _ in part], np.int64),
                    np.array([refused for _, (_, _, refused) in part], bool),
                )
            )
            if not part:
                break
        return pieces

    def _wrong(self, dice: Random, space: Space) -> tuple[bytes, tuple[bytes, int, bool]]:
        """A record that contradicts itself, or may contradict the tree; its key is no path's."""
        self.made += 1
        key = hashlib.sha256(b"stray %d" % self.made).digest()
        path = self.path(dice, space)
        parent = space.keys(path)[-1].tobytes()
        return dice.choice(
            [
                (key, (parent, len(path) + dice.choice((-1, 1, 2, 1000)), False)),  # waits in vain, or is refused
                (key, (parent, 0, True)),  # a first block below another
                (key, (space.root, dice.randint(1, 5), True)),  # a later block below the root
                (key, (parent, len(path), False)),  # a new child, or an orphan
            ]
        )

    def recover_contradictions(self, dice: Random) -> None:
        """Records of positions that there are, with another parent or another depth: none may be taken."""
        space = dice.choice(self.spaces)
        known = self.good("copies", space.root, *self.column(dice, space))
        if space.retired or not len(known.keys):
            return
        chosen = dice.sample(range(len(known.keys)), min(3, len(known.keys)))
        keys, parents, depths = known.keys[chosen], known.parents[chosen], known.depths[chosen]
        if dice.random() < 0.5:
            depths = depths + dice.choice((1, 2, 1 << 20))
        else:
            parents = dice.choice((keys, np.zeros_like(keys)))
        slots = np.array([self.slot(dice) for _ in chosen], np.int64)
        mask = self.good("recover", space.root, *self.column(dice, space), keys, parents, depths, slots)
        assert not mask.any()

    # ---------------------------------------------------------------- bad arguments

    def bad_arguments(self, dice: Random) -> None:
        """One thing wrong at a time; both must raise the same, and nothing may change."""
        space = dice.choice(self.spaces)
        keys = space.keys(self.path(dice, space))
        n, tier = len(keys), dice.randrange(self.tiers)
        slots = np.arange(n, dtype=np.int64) + (1 << 39)
        depths = np.arange(n, dtype=np.int64)
        high, low = slots.copy(), slots.copy()
        high[-1], low[0] = MAX_SLOT + 1, -2
        column = dice.choice([(self.tiers, 0), (-1, 0), (tier, len(space.rules)), (tier, -1)])
        start, stop = dice.choice([(-1, n), (n, n - 1), (0, n + 1), (n + 1, n + 1)])
        bad_keys = dice.choice([keys.astype(np.int8), keys[:, :31], keys.reshape(-1), keys.tobytes()])
        root, stranger = space.root, bytes(32)
        calls: list[tuple[Any, ...]] = [(name, root, bad_keys) for name in ("match", "touch", "remove_subtree")]
        calls += [(name, stranger, keys) for name in ("match", "touch", "remove_subtree")]
        calls += [(name, root, bad_keys, tier, 0, 0, 0) for name in ("pin", "unpin", "remove")]
        calls += [(name, stranger, keys, tier, 0, 0, n) for name in ("pin", "unpin", "remove")]
        calls += [(name, root, keys, *column, 0, n) for name in ("pin", "unpin", "remove")]
        calls += [(name, root, keys, tier, 0, start, stop) for name in ("pin", "unpin", "remove")]
        calls += [
            ("residency", root, bad_keys, tier, 0),
            ("residency", root, keys, *column),
            ("residency", stranger, keys, tier, 0),
            ("copies", root, *column),
            ("copies", stranger, tier, 0),
            ("retire_namespace", stranger),
            ("evict", self.tiers, 1),
            ("evict", -1, 1),
            ("evict", tier, -1),
            ("count", self.tiers),
            ("count", -1),
            ("drop_tier", self.tiers),
            ("drop_tier", -1),
            ("add_namespace", root[:31], [GroupRule()]),
        ]
        if not space.retired:
            calls += [("insert", root, bad_keys, tier, 0, slots), ("insert", root, keys, *column, slots)]
            calls += [("insert", root, keys, tier, 0, bad) for bad in (high, low, slots[1:], slots.astype(np.int32))]
            calls += [
                ("recover", root, tier, 0, bad_keys, keys, depths, slots),
                ("recover", root, tier, 0, keys, bad_keys, depths, slots),
                ("recover", root, *column, keys, keys, depths, slots),
                ("recover", root, tier, 0, keys, keys, depths - 1, slots),
                ("recover", root, tier, 0, keys, keys, depths[1:], slots),
                ("recover", root, tier, 0, keys, keys, depths.astype(np.int32), slots),
                ("recover", root, tier, 0, keys, keys, depths, high),
                ("recover", root, tier, 0, keys, keys, depths, low),
                ("recover", root, tier, 0, keys, keys, depths, np.full(n, NO_SLOT, np.int64)),
                ("recover", root, tier, 0, keys, keys, depths, slots[1:]),
            ]
        error = self.call(*dice.choice(calls))
        assert isinstance(error, (ValueError, TypeError, KeyError)), error

    # ---------------------------------------------------------------- slots

    def _came(self, tier: int, slots: np.ndarray) -> None:
        self.held[tier].update(slots.tolist())

    def _went(self, tier: int, slots: np.ndarray) -> None:
        gone = set(slots.tolist())
        assert len(gone) == len(slots), "a slot came out twice"
        assert gone <= self.held[tier], "a slot came out that had not gone in"
        self.held[tier] -= gone


WEIGHTS = {
    "insert": 16,
    "insert_with_gaps": 8,
    "insert_deeper_part": 6,
    "match": 6,
    "residency": 3,
    "touch": 14,
    "copies": 2,
    "advance": 2,
    "pin": 6,
    "unpin": 7,
    "remove": 5,
    "remove_subtree": 1.5,
    "evict": 12,
    "drop_tier": 0.3,
    "new_namespace": 2,
    "retire_namespace": 0.7,
    "recover": 9,
    "recover_contradictions": 1,
    "end_recovery": 1,
    "bad_arguments": 2,
}
"""How often each transition is chosen, by name of the method."""


def _outcome(side: Index, method: str, arguments: tuple[Any, ...]) -> Any:
    try:
        return getattr(side, method)(*arguments)
    except Exception as error:
        return error


def _normal(method: str, answer: Any) -> list[Any]:
    """The answer as a list of arrays and plain values; of unordered ones the rows are sorted by slot."""
    parts = list(answer) if isinstance(answer, tuple) else [answer]
    if method in UNORDERED:
        order = np.argsort(answer.slots, kind="stable")
        parts = [part[order] for part in parts]
    return parts


def _same(method: str, left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right), method
    for one, other in zip(left, right, strict=True):
        assert type(one) is type(other), (method, one, other)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, (method, one.dtype, other.dtype)
            assert one.shape == other.shape, (method, one.shape, other.shape)
            assert (one == other).all(), (method, one, other)
        else:
            assert one == other, (method, one, other)


def _runs(positions: list[int]) -> list[tuple[int, int]]:
    """Ascending positions as ranges [start, stop)."""
    runs: list[tuple[int, int]] = []
    for at in positions:
        if runs and runs[-1][1] == at:
            runs[-1] = (runs[-1][0], at + 1)
        else:
            runs.append((at, at + 1))
    return runs


def _rows(keys: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)


def _brief(arguments: tuple[Any, ...]) -> str:
    """Arguments for the log: arrays of keys by length and last key."""
    shown = []
    for each in arguments:
        if isinstance(each, np.ndarray) and each.ndim == 2:
            shown.append(f"<{len(each)} keys{' ..' + each[-1, :3].tobytes().hex() if len(each) else ''}>")
        elif isinstance(each, bytes):
            shown.append(each.hex()[:6])
        else:
            shown.append(repr(each)[:80].replace("\n", ""))
    return f"({', '.join(shown)})"
