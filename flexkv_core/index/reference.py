"""The reference index: plain Python, the oracle that the native index is held against.

Written to be read; `reference_tree.py` has the trees, `policies/reference.py` the states and orders. Owns time,
candidates and what the methods do in which order. What may surprise:

- *Candidates* wait in heaps, one for each (tier, slot class, queue), ordered by (rank, policy's order, -depth, group,
  key, root): rank 0 for retired namespaces, 1 for stranded copies, 2 for the rest. There are no ties. An entry is
  pushed whenever a copy becomes a candidate or its order changes; entries that no longer describe their copy are
  dropped when they come up, and a heap is rebuilt when most of it is stale. All policies but S3-FIFO have one queue;
  S3-FIFO has its small and main ones, and one for ranks 0 and 1.
- *Evictions do not fail midway.* How many copies could go is counted first: all but those that are pinned or have a
  pinned one below them.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import LayoutError, StateError, UnknownNamespaceError
from flexkv_core.index import MAX_DEPTH, NO_SLOT, NO_TIER, Copies, Evicted, GroupRule, Keys, Match, Removed, Slots
from flexkv_core.index import arguments as check
from flexkv_core.index.coverage import covered_prefix
from flexkv_core.index.reference_tree import Column, Copy, Node, Tree, count_branch, restrand, subtree
from flexkv_core.policies import Eviction
from flexkv_core.policies.reference import MAIN, SMALL, Block, Custom, S3Fifo, make_policy

RETIRED_STRANDED, RETIRED, STRANDED, LIVE = range(4)
_FIRST = 0  # the queue of S3-FIFO's retired and stranded copies, and the only one of other policies


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _public(
    method: Callable[Concatenate[ReferenceIndex, _P], _R],
) -> Callable[Concatenate[ReferenceIndex, _P], _R]:
    """Refuse calls from within a third party's policy."""

    @functools.wraps(method)
    def checked(self: ReferenceIndex, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if any(custom.running == threading.get_ident() for custom in self._customs):
            raise StateError(f"{method.__name__} was called by an eviction policy, from within the index")
        return method(self, *args, **kwargs)

    return cast("Callable[Concatenate[ReferenceIndex, _P], _R]", checked)


class ReferenceIndex:
    """See `flexkv_core.index.Index` for the meaning of every method.

    What is wrong is told in this order: an unknown namespace, keys, tier and group, other arguments, pins.
    """

    def __init__(self, tiers: int, policies: Sequence[str | Eviction] | None = None) -> None:
        self._policies = [make_policy(each) for each in check.check_policies(tiers, policies)]
        self._customs = [policy for policy in self._policies if isinstance(policy, Custom)]
        self._tiers = tiers
        self._trees: dict[bytes, Tree] = {}
        self._tick = 0
        self._recovery_tick = 0  # 0: nothing is being recovered
        self._heaps: dict[tuple[int, int, int], list[Any]] = {}  # by (tier, slot class, queue)
        self._held: Counter[tuple[int, int]] = Counter()  # copies by (tier, slot class)
        self._small: Counter[tuple[int, int]] = Counter()  # of these, in S3-FIFO's small queue
        self._pinned: dict[tuple[Node, Column], None] = {}
        self._visited = 0
        self._sequence = itertools.count()  # keeps heap entries comparable; decides nothing

    # ---------------------------------------------------------------- time and namespaces

    @_public
    def advance(self, tick: int) -> None:
        self._tick = max(self._tick, tick)

    @_public
    def add_namespace(self, root: bytes, groups: Sequence[GroupRule]) -> None:
        check.check_root(root)
        rules = check.check_groups(self._tiers, groups)
        known = self._trees.get(root)
        if known is None:
            self._trees[root] = Tree(root, rules)
            return
        _refuse_retired(known)
        if known.rules != rules:
            raise LayoutError(f"namespace {root.hex()[:16]}... was added with other groups: use another namespace")

    @_public
    def retire_namespace(self, root: bytes) -> None:
        tree = self._tree(root)
        if not tree.retired:
            tree.retired = True
            for node in tree.nodes():
                self._offer_all(node, node.copies)
            self._forget_if_empty(tree)

    @_public
    def has_namespace(self, root: bytes) -> bool:
        return root in self._trees

    @_public
    def has_copies(self, root: bytes) -> bool:
        return bool(self._tree(root).copies)

    def _tree(self, root: bytes) -> Tree:
        tree = self._trees.get(root)
        if tree is None:
            raise UnknownNamespaceError(f"namespace {root.hex()[:16]}... is not in the index: add it first")
        return tree

    def _forget_if_empty(self, tree: Tree) -> None:
        if tree.retired and not tree.copies:
            self._trees.pop(tree.root, None)

    # ---------------------------------------------------------------- reading

    @_public
    def match(self, root: bytes, keys: Keys) -> Match:
        tree = self._tree(root)
        check.check_keys(keys)
        path = [] if tree.retired else tree.walk(keys)
        groups = len(tree.rules)
        tiers = np.full((groups, len(path)), NO_TIER, np.uint8)
        slots = np.full((groups, len(path)), NO_SLOT, np.int64)
        for position, node in enumerate(path):
            for (tier, group), copy in node.copies.items():
                if tier < tiers[group, position]:
                    tiers[group, position] = tier
                    slots[group, position] = copy.slot
        return Match(covered_prefix(tiers != NO_TIER, [rule.coverage for rule in tree.rules]), tiers, slots)

    @_public
    def residency(self, root: bytes, keys: Keys, tier: int, group: int) -> Slots:
        tree = self._column(root, keys, tier, group)
        slots = np.full(len(keys), NO_SLOT, np.int64)
        for position, node in enumerate(tree.walk(keys)):
            copy = node.copies.get((tier, group))
            if copy is not None:
                slots[position] = copy.slot
        return slots

    @_public
    def count(self, tier: int) -> int:
        check.check_tier(self._tiers, tier)
        return self._copies_of(tier)

    @_public
    def copies(self, root: bytes, tier: int, group: int) -> Copies:
        tree = self._tree(root)
        check.check_column(self._tiers, len(tree.rules), tier, group)
        nodes = [node for node in tree.nodes() if (tier, group) in node.copies]
        return Copies(
            _keys(node.key for node in nodes),
            _keys(node.parent_key for node in nodes),
            np.array([node.depth for node in nodes], np.int64),
            np.array([node.copies[tier, group].slot for node in nodes], np.int64),
        )

    @_public
    def statistics(self) -> dict[str, int]:
        trees = self._trees.values()
        positions = sum(len(tree.positions) for tree in trees)
        return {
            "namespaces": len(trees),
            "positions": positions,
            "orphans": sum(len(waiting) for tree in trees for waiting in tree.orphans.values()),
            "copies": self._held.total(),
            "pinned": len(self._pinned),
            "visited": self._visited,
            "nodes": positions,
            "memory_bytes": 0,
        }

    def _column(self, root: bytes, keys: Keys, tier: int, group: int) -> Tree:
        """The tree of a column, its arguments checked."""
        tree = self._tree(root)
        check.check_keys(keys)
        check.check_column(self._tiers, len(tree.rules), tier, group)
        return tree

    def _copies_of(self, tier: int) -> int:
        return sum(held for (each, _), held in self._held.items() if each == tier)

    # ---------------------------------------------------------------- coming in

    @_public
    def touch(self, root: bytes, keys: Keys) -> None:
        tree = self._tree(root)
        check.check_keys(keys)
        self._tick += 1
        for node in tree.walk(keys):
            for column, copy in node.copies.items():
                copy.state = self._policies[column[0]].hit(copy.state, self._tick)
                self._offer(node, column)

    @_public
    def insert(self, root: bytes, keys: Keys, tier: int, group: int, slots: Slots) -> npt.NDArray[np.bool_]:
        tree = self._column(root, keys, tier, group)
        _refuse_retired(tree)
        check.check_slots(slots, len(keys))
        self._tick += 1
        taken = np.zeros(len(keys), np.bool_)
        wanted = np.flatnonzero(slots != NO_SLOT)
        node = tree.top
        for position in range(int(wanted[-1]) + 1 if len(wanted) else 0):
            key = keys[position].tobytes()
            node = node.children.get(key) or self._settled(tree.add(key, node))
            if slots[position] != NO_SLOT:
                taken[position] = self._take(node, (tier, group), int(slots[position]), self._tick)
        return taken

    @_public
    def recover(
        self,
        root: bytes,
        tier: int,
        group: int,
        keys: Keys,
        parents: Keys,
        depths: npt.NDArray[np.int64],
        slots: Slots,
    ) -> npt.NDArray[np.bool_]:
        tree = self._column(root, keys, tier, group)
        _refuse_retired(tree)
        check.check_keys(parents, "parents")
        if len(parents) != len(keys):
            raise ValueError(f"{len(parents)} parents for {len(keys)} keys: give one each")
        check.check_integers(depths, len(keys), 0, MAX_DEPTH, "depths")
        check.check_slots(slots, len(keys), lowest=0)
        if not self._recovery_tick:
            self._tick += 1
            self._recovery_tick = self._tick
        taken = np.zeros(len(keys), np.bool_)
        for i in np.argsort(depths, kind="stable").tolist():
            node = self._recovered(tree, keys[i].tobytes(), parents[i].tobytes(), int(depths[i]))
            if node is not None:
                taken[i] = self._take(node, (tier, group), int(slots[i]), self._recovery_tick)
        return taken

    @_public
    def end_recovery(self) -> None:
        self._recovery_tick = 0  # nothing to drop: this index can always find a position by its key

    def _recovered(self, tree: Tree, key: bytes, parent_key: bytes, depth: int) -> Node | None:
        """The position of a recovered copy, made where there is none; None if the copy contradicts the tree."""
        node = tree.place(key)
        if node is not None:
            return node if (node.parent_key, node.depth) == (parent_key, depth) else None
        parent = tree.place(parent_key)
        if parent is not None:
            return self._settled(tree.add(key, parent)) if parent.depth == depth - 1 else None
        return self._settled(tree.add_orphan(key, parent_key, depth)) if depth else None

    def _settled(self, node: Node) -> Node:
        """A new position, after the orphans that waited for it have joined."""
        if node.tree.waiting_for(node):
            for group in range(len(node.tree.rules)):
                self._restrand(node, group)
        return node

    def _take(self, node: Node, column: Column, slot: int, now: int) -> bool:
        """Give a position a new copy, unless it has one in that column."""
        if column in node.copies:
            return False
        state = self._policies[column[0]].insert(now, _block(node, column))
        self._attach(node, column, Copy(slot, state))
        return True

    # ---------------------------------------------------------------- pins and removal

    @_public
    def pin(self, root: bytes, keys: Keys, tier: int, group: int, start: int, stop: int) -> None:
        column = (tier, group)
        for node in self._held_range(root, keys, column, start, stop):
            node.copies[column].pins += 1
            self._pinned[node, column] = None

    @_public
    def unpin(self, root: bytes, keys: Keys, tier: int, group: int, start: int, stop: int) -> None:
        column = (tier, group)
        nodes = self._held_range(root, keys, column, start, stop)
        if not all(node.copies[column].pins for node in nodes):
            raise ValueError(f"a copy in [{start}, {stop}) of tier {tier} has no pin to take back")
        for node in nodes:
            node.copies[column].pins -= 1
            if not node.copies[column].pins:
                del self._pinned[node, column]
                self._offer(node, column)

    def _held_range(self, root: bytes, keys: Keys, column: Column, start: int, stop: int) -> list[Node]:
        tree = self._column(root, keys, *column)
        check.check_range(start, stop, len(keys))
        path = tree.walk(keys)[start:stop]
        if len(path) != stop - start or any(column not in node.copies for node in path):
            raise ValueError(f"positions [{start}, {stop}) are not all held by tier {column[0]}, group {column[1]}")
        return path

    @_public
    def remove(self, root: bytes, keys: Keys, tier: int, group: int, start: int, stop: int) -> Slots:
        tree, column = self._column(root, keys, tier, group), (tier, group)
        check.check_range(start, stop, len(keys))
        path = tree.walk(keys)[start:stop]
        if any((node, column) in self._pinned for node in path):
            raise ValueError(f"a copy in [{start}, {stop}) of tier {tier} is pinned: unpin it first")
        slots = np.full(stop - start, NO_SLOT, np.int64)
        for offset, node in enumerate(path):
            if column in node.copies:
                slots[offset] = self._detach(node, column).slot
        for node in reversed(path):
            tree.prune(node)
        self._forget_if_empty(tree)
        return slots

    @_public
    def remove_subtree(self, root: bytes, keys: Keys) -> Removed:
        tree = self._tree(root)
        check.check_keys(keys)
        path = tree.walk(keys)
        nodes: list[Node] = []
        if not len(keys):
            nodes = list(tree.nodes())
        elif len(path) == len(keys):
            nodes = list(subtree(path[-1]))
        if any((node, column) in self._pinned for node in nodes for column in node.copies):
            raise ValueError("a copy of the subtree is pinned: unpin it first")
        gone = self._clear(nodes, lambda column: True)
        self._forget_if_empty(tree)
        return Removed(
            np.array([tier for _, (tier, _), _ in gone], np.uint8),
            _keys(node.key for node, _, _ in gone),
            np.array([group for _, (_, group), _ in gone], np.uint8),
            np.array([copy.slot for _, _, copy in gone], np.int64),
        )

    @_public
    def drop_tier(self, tier: int) -> None:
        check.check_tier(self._tiers, tier)
        for tree in list(self._trees.values()):
            self._clear(list(tree.nodes()), lambda column: column[0] == tier)
            self._forget_if_empty(tree)

    def _clear(self, nodes: Sequence[Node], which: Callable[[Column], bool]) -> list[tuple[Node, Column, Copy]]:
        """Take those copies from nodes that are given parents first."""
        gone = []
        for node in reversed(nodes):
            gone += [(node, column, self._detach(node, column)) for column in list(node.copies) if which(column)]
            node.tree.prune(node)
        return gone

    # ---------------------------------------------------------------- eviction

    @_public
    def evict(self, tier: int, count: int, slot_class: int = 0) -> Evicted | None:
        check.check_tier(self._tiers, tier)
        if count < 0:
            raise ValueError(f"count {count}: must be 0 or more")
        if count > self._evictable(tier, slot_class):
            return None
        policy, before = self._policies[tier], self._copies_of(tier)
        gone: list[tuple[Node, Column, Copy]] = []
        for _ in range(count):
            node, column = (
                self._s3fifo_victim(policy, tier, slot_class)
                if isinstance(policy, S3Fifo)
                else self._first(tier, slot_class, _FIRST)[-2:]
            )
            gone.append((node, column, self._detach(node, column)))
        if isinstance(policy, S3Fifo) and count:
            policy.forget(before)
        for node, _, _ in gone:
            node.tree.prune(node)
            self._forget_if_empty(node.tree)
        return _evicted(gone)

    @_public
    def evict_range(self, tier: int, start: int, stop: int, count: int) -> Evicted | None:
        check.check_tier(self._tiers, tier)
        nodes = [node for tree in self._trees.values() for node in tree.nodes()]
        chosen = [
            (node, column)
            for node in nodes
            for column, copy in node.copies.items()
            if column[0] == tier and start <= copy.slot < stop
        ]
        if len(chosen) != count or any(node.copies[column].pins for node, column in chosen):
            return None
        gone = [(node, column, self._detach(node, column)) for node, column in chosen]
        for node, _, _ in gone:
            node.tree.prune(node)
            self._forget_if_empty(node.tree)
        return _evicted(gone)

    def _evictable(self, tier: int, slot_class: int) -> int:
        """How many copies of a slot class can go: those that are neither pinned nor above a pinned one."""
        kept = 0
        seen: set[tuple[Node, Column]] = set()
        for node, column in self._pinned:
            if column[0] != tier or node.tree.rules[column[1]].class_in(tier) != slot_class:
                continue
            above: Node | None = node
            while above is not None and (above, column) not in seen:
                seen.add((above, column))
                kept += column in above.copies
                above = above.parent
        return self._held[tier, slot_class] - kept

    def _s3fifo_victim(self, policy: S3Fifo, tier: int, slot_class: int) -> tuple[Node, Column]:
        """The copy that S3-FIFO lets go, after the second chances of those that it passes over."""
        while True:
            entry = self._first(tier, slot_class, _FIRST)
            if entry is not None:
                return entry[-2], entry[-1]
            small, main = self._first(tier, slot_class, SMALL), self._first(tier, slot_class, MAIN)
            enough = 10 * self._small[tier, slot_class] >= self._held[tier, slot_class]
            node, column = (small if small is not None and (enough or main is None) else main)[-2:]
            copy = node.copies[column]
            state = policy.second_chance(copy.state, self._tick + 1)
            if state is None:
                if policy.queue(copy.state) == SMALL:
                    policy.learn(_block(node, column))
                return node, column
            self._tick += 1
            self._small[tier, slot_class] -= policy.queue(copy.state) == SMALL
            copy.state = state
            self._offer(node, column)

    def _first(self, tier: int, slot_class: int, queue: int) -> Any:
        """The entry of the first candidate of a queue, left where it is; None if there is none."""
        heap = self._heaps.get((tier, slot_class, queue), [])
        while heap:
            self._visited += 1
            node, column = heap[0][-2:]
            copy = node.copies.get(column)
            if copy is not None and copy.entry is heap[0] and node.may_go(column):
                return heap[0]
            heapq.heappop(heap)
        return None

    def _offer(self, node: Node, column: Column) -> None:
        """Enter a copy among the candidates, with its present order, if it may go."""
        if not node.may_go(column):
            return
        (tier, group), copy, policy = column, node.copies[column], self._policies[column[0]]
        stranded, retired = node.stranded[group], node.tree.retired
        rank = (RETIRED_STRANDED if stranded else RETIRED) if retired else STRANDED if stranded else LIVE
        order = rank, policy.order(copy.state), -node.depth, group, node.key, node.tree.root
        copy.entry = (*order, next(self._sequence), node, column)
        queue = policy.queue(copy.state) if rank == LIVE else _FIRST
        heap = self._heaps.setdefault((tier, node.tree.rules[group].class_in(tier), queue), [])
        heapq.heappush(heap, copy.entry)
        if len(heap) > 64 + 4 * self._copies_of(tier):
            heap[:] = [e for e in heap if (c := e[-2].copies.get(e[-1])) is not None and c.entry is e]
            heapq.heapify(heap)

    def _offer_all(self, node: Node, columns: Iterable[Column]) -> None:
        for column in columns:
            self._offer(node, column)

    # ---------------------------------------------------------------- copies in the tree

    def _attach(self, node: Node, column: Column, copy: Copy) -> None:
        was_hole, was_populated = node.is_hole(column[1]), node.populated(column)
        node.copies[column] = copy
        self._tally(node, column, copy, 1)
        if not was_populated:
            count_branch(node, column, 1)
        if was_hole:
            self._restrand(node, column[1])
        self._offer(node, column)

    def _detach(self, node: Node, column: Column) -> Copy:
        copy = node.copies.pop(column)
        self._pinned.pop((node, column), None)
        self._tally(node, column, copy, -1)
        if not node.populated(column):
            ancestor = count_branch(node, column, -1)
            if ancestor is not None and column in ancestor.copies:
                self._offer(ancestor, column)
        if node.is_hole(column[1]):
            self._restrand(node, column[1])
        return copy

    def _tally(self, node: Node, column: Column, copy: Copy, change: int) -> None:
        tier, group = column
        where = (tier, node.tree.rules[group].class_in(tier))
        self._held[where] += change
        self._small[where] += change * (self._policies[tier].queue(copy.state) == SMALL)
        node.tree.copies += change

    def _restrand(self, node: Node, group: int) -> None:
        for below in restrand(node, group):
            self._offer_all(below, [column for column in below.copies if column[1] == group])


def _refuse_retired(tree: Tree) -> None:
    if tree.retired:
        raise UnknownNamespaceError(f"namespace {tree.root.hex()[:16]}... was reset: nothing can be added to it")


def _evicted(gone: Sequence[tuple[Node, Column, Copy]]) -> Evicted:
    return Evicted(
        _keys(node.tree.root for node, _, _ in gone),
        _keys(node.key for node, _, _ in gone),
        np.array([group for _, (_, group), _ in gone], np.uint8),
        np.array([copy.slot for _, _, copy in gone], np.int64),
    )


def _block(node: Node, column: Column) -> Block:
    return node.key[:8], column[1]


def _keys(keys: Iterable[bytes]) -> Keys:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
