"""Two indexes driven side by side: every operation that the state machine knows, on random arguments.

Owns the operations, what the arguments are made of, and the comparison. Both sides must answer the same, arrays to the
last element, and raise errors of the same type. What does not depend on either side is checked too: which pins are
legal, and that the slots that come out are those that went in.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
from index_calls import (
    WEIGHTS,
    Path,
    Piece,
    Pinned,
    Range,
    Space,
    bad_calls,
    brief,
    normal,
    outcome,
    rows_of,
    runs_of,
    same,
)

from flexkv_core.index import MAX_SLOT, NO_SLOT, GroupRule, Index
from flexkv_core.layout import Coverage
from flexkv_core.policies import Eviction

MakeIndex = Callable[[int, Sequence[str | Eviction]], Index]

TOKENS = 3
MOST_COPIES = 400
"""Of a tier: above it, inserts make room first, so that trees stay small and change much."""
COVERAGES = [Coverage(), Coverage(), Coverage.window(1), Coverage.window(3), Coverage("state")]
STATISTICS = ("namespaces", "positions", "orphans", "copies", "pinned")


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
        self.pins: Counter[Pinned] = Counter()
        self.pinned_ranges: deque[Range] = deque(maxlen=20)
        self.pending: list[Piece] = []
        self.made = 0
        self.known_paths = dice.choice((3, 8, 30))  # few: the same blocks leave and come back
        moods = [weight * dice.choice((0.3, 1, 1, 3)) for weight in WEIGHTS.values()]
        self.moods = dict(zip(WEIGHTS, moods, strict=True))
        self.new_namespace(dice)

    # ---------------------------------------------------------------- comparison

    def call(self, method: str, *arguments: Any) -> Any:
        """Call both sides and compare; returns the left's answer, or its exception."""
        self.log.append(f"{method}{brief(arguments)}")
        left, right = (outcome(side, method, arguments) for side in self.sides)
        if isinstance(left, Exception) or isinstance(right, Exception):
            assert type(left) is type(right), f"{left!r} and {right!r}"
            return left
        same(method, normal(method, left), normal(method, right))
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
        for space in self.spaces:
            if self.good("has_namespace", space.root):
                self.taken["empty"] += not self.good("has_copies", space.root)
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
        for (space, path, tier, group), times in self.pins.items():
            for _ in range(times):
                self.good("unpin", space.root, space.keys(path), tier, group, len(path) - 1, len(path))
        self.pins.clear()
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
        wanted = [at >= min(first, len(path) - 1) and dice.random() < share for at in range(len(path))]
        slots = np.array([self.slot(dice) if want else NO_SLOT for want in wanted], np.int64)
        self._commit(space, path, tier, group, slots)

    def _commit(self, space: Space, path: Path, tier: int, group: int, slots: np.ndarray) -> None:
        mask = self.call("insert", space.root, space.keys(path), tier, group, slots)
        if isinstance(mask, Exception):
            assert space.retired or space not in self.spaces, mask
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
        if space not in self.spaces:
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

    def hits_for_all(self, dice: Random) -> None:
        """Little but single blocks with hits, and few new ones: under s3fifo the main queue becomes the larger one."""
        space = self.space(dice)
        tier, group = self.column(dice, space)
        slot_class = space.rules[group].class_in(tier)
        for count in (100, 30, 10, 3, 1):
            while self._evict(tier, count, slot_class):
                pass
        paths = [(TOKENS + number,) for number in range(dice.randint(10, 25))]
        for path in paths:
            self._commit(space, path, tier, group, np.array([self.slot(dice)], np.int64))
        for path in paths[dice.randint(1, 3) :] * 2:
            self.call("touch", space.root, space.keys(path))
        for _ in range(dice.randint(1, 9)):
            self._evict(tier, 1, slot_class)

    def copies(self, dice: Random) -> None:
        space = self.space(dice)
        self.call("copies", space.root, *self.column(dice, space))

    def advance(self, dice: Random) -> None:
        self.good("advance", dice.randint(0, 4 * self.made))

    # ---------------------------------------------------------------- pins and removal

    def pin(self, dice: Random) -> None:
        space = self.space(dice)
        path, (tier, group) = self.path(dice, space), self.column(dice, space)
        if space not in self.spaces:
            return
        keys = space.keys(path)
        slots = self.good("residency", space.root, keys, tier, group)
        start, stop = self.range(dice, len(keys))
        if (runs := runs_of(np.flatnonzero(slots != NO_SLOT).tolist())) and dice.random() < 0.8:
            first, last = dice.choice(runs)
            start = dice.randint(first, last - 1)
            stop = dice.randint(start + 1, last)
        legal = bool((slots[start:stop] != NO_SLOT).all())
        error = self.call("pin", space.root, keys, tier, group, start, stop)
        assert (error is None) == legal, error
        self.taken["pin of copies" if legal and start < stop else "pin of nothing" if legal else "pin refused"] += 1
        if legal and start < stop:
            self.pinned_ranges.append(Range(space, path, tier, group, start, stop))
            self.pins.update(self.pinned_ranges[-1].positions(start, stop))

    def unpin(self, dice: Random) -> None:
        """Pins that were made and may be there yet, mostly; of those at times a part."""
        at = self.some_range(dice, pinned=0.85)
        if at in self.pinned_ranges and dice.random() < 0.8:
            self.pinned_ranges.remove(at)
        start, stop = at.start, at.stop
        if dice.random() < 0.2:
            start = dice.randint(start, stop)
        if at.space not in self.spaces:
            return
        keys = at.space.keys(at.path)
        pinned = at.positions(start, stop)
        legal = all(name in self.pins for name in pinned)
        error = self.call("unpin", at.space.root, keys, at.tier, at.group, start, stop)
        assert (error is None) == legal, error
        self.taken["unpin of copies" if legal and pinned else "unpin of nothing" if legal else "unpin refused"] += 1
        if legal:
            self.pins -= Counter(pinned)

    def some_range(self, dice: Random, pinned: float) -> Range:
        """A range that was pinned, with that probability and if there is one; else any."""
        if self.pinned_ranges and dice.random() < pinned:
            return dice.choice(list(self.pinned_ranges))
        space = self.space(dice)
        path = self.path(dice, space)
        return Range(space, path, *self.column(dice, space), *self.range(dice, len(path)))

    def remove(self, dice: Random) -> None:
        at = self.some_range(dice, pinned=0.1)
        start, stop, keys = at.start, at.stop, at.space.keys(at.path)
        if dice.random() < 0.6:
            stop = min(stop, start + dice.randint(0, 3))
        gone = self.call("remove", at.space.root, keys, at.tier, at.group, start, stop)
        if at.space not in self.spaces:
            return
        pinned = any(position in self.pins for position in at.positions(start, stop))
        assert isinstance(gone, Exception) == pinned, gone
        if pinned:
            self.taken["remove refused"] += 1
        else:
            self._went(at.tier, gone[gone != NO_SLOT])

    def remove_subtree(self, dice: Random) -> None:
        at = self.some_range(dice, pinned=0.15)
        path = () if dice.random() < 0.08 else at.path
        gone = self.call("remove_subtree", at.space.root, at.space.keys(path))
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
        self._evict(tier, count, slot_class)

    def _evict(self, tier: int, count: int, slot_class: int) -> bool:
        gone = self.good("evict", tier, count, slot_class)
        if gone is None:
            self.taken["evict none"] += 1
            return False
        assert len(gone.slots) == count
        retired = {space.root for space in self.spaces if space.retired}
        self.taken["evicted of a retired one"] += any(root.tobytes() in retired for root in gone.roots)
        self._went(tier, gone.slots)
        return True

    def evict_range(self, dice: Random) -> None:
        """Slots that lie together, as an extent's do; the count is right, mostly."""
        tier = dice.randrange(self.tiers)
        held = sorted(self.held[tier])
        first = dice.choice(held) if held else 0
        stop = first + dice.choice((1, 5, 40))
        within = sum(first <= slot < stop for slot in held)
        gone = self.good("evict_range", tier, first, stop, within + (dice.random() < 0.1))
        if gone is not None:
            assert sorted(gone.slots.tolist()) == [slot for slot in held if first <= slot < stop]
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
            assert piece.space.retired or piece.space not in self.spaces, mask
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
                    rows_of([key for key, _ in part]),
                    rows_of([parent for _, (parent, _, _) in part]),
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
        error = self.call(*dice.choice(bad_calls(dice, space, keys, self.tiers)))
        assert isinstance(error, (ValueError, TypeError, KeyError)), error

    # ---------------------------------------------------------------- slots

    def _came(self, tier: int, slots: np.ndarray) -> None:
        self.held[tier].update(slots.tolist())

    def _went(self, tier: int, slots: np.ndarray) -> None:
        gone = set(slots.tolist())
        assert len(gone) == len(slots), "a slot came out twice"
        assert gone <= self.held[tier], "a slot came out that had not gone in"
        self.held[tier] -= gone
