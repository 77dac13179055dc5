"""The reference index: a radix tree in plain Python, the oracle that a native index is held against.

Written to be read: a node is one block. What may surprise:

- *Leaf first.* A copy may go only if no deeper position of its subtree has a copy in the same column (tier,
  group). Each node counts, by column, the children whose subtrees have one; the count changes its ancestors
  only when it becomes or stops being zero.
- *Stranded.* A node knows, for each `all`-coverage group, whether a hole lies above it. The flag is inherited by
  children and corrected downwards when a hole opens or closes.
- *Order.* Candidates wait in one heap for each (tier, slot class), ordered by (rank, policy order, group, key):
  rank 0 for retired namespaces, 1 for stranded copies, 2 for the rest. There are no ties. An entry is pushed
  whenever a copy becomes a candidate or its order changes; entries that no longer describe their copy are skipped
  when they come up, and the heap is rebuilt when most of it is stale.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import LayoutError, UnknownNamespaceError
from flexkv_core.index import NO_SLOT, NO_TIER, Evicted, GroupRule, Keys, Match, Slots
from flexkv_core.index.coverage import covered_prefix
from flexkv_core.policies import make_policy

Column = tuple[int, int]
"""(tier, group)"""

RETIRED, STRANDED, LIVE = 0, 1, 2


class _Copy:
    """One block's residency in one tier."""

    __slots__ = ("entry", "pins", "slot", "state")

    def __init__(self, slot: int, state: Any) -> None:
        self.slot = slot
        self.state = state
        self.pins = 0
        self.entry: Any = None  # the heap entry that describes this copy now


class _Node:
    """One position of a prefix."""

    __slots__ = ("branches", "children", "copies", "key", "parent", "stranded", "tree")

    def __init__(self, tree: _Tree, key: bytes, parent: _Node | None) -> None:
        self.tree = tree
        self.key = key
        self.parent = parent
        self.children: dict[bytes, _Node] = {}
        self.copies: dict[Column, _Copy] = {}
        self.branches: dict[Column, int] = {}  # children whose subtree has a copy in that column
        self.stranded = [False] * len(tree.rules)
        if parent is not None:
            self.stranded = [parent.stranded[g] or parent.is_hole(g) for g in range(len(tree.rules))]

    def is_hole(self, group: int) -> bool:
        """No tier holds this position of an `all`-coverage group. The root node is never one."""
        if self.parent is None or self.tree.rules[group].coverage.kind != "all":
            return False
        return all(held != group for _, held in self.copies)

    def populated(self, column: Column) -> bool:
        """This node or its subtree has a copy in the column."""
        return column in self.copies or column in self.branches


class _Tree:
    """One namespace."""

    __slots__ = ("retired", "root", "rules", "top")

    def __init__(self, root: bytes, rules: Sequence[GroupRule]) -> None:
        self.root = root
        self.rules = tuple(rules)
        self.retired = False
        self.top = _Node(self, b"", None)


class ReferenceIndex:
    """See `flexkv_core.index.Index` for the meaning of every method."""

    def __init__(self, tiers: int, policies: Sequence[str] | None = None) -> None:
        names = list(policies) if policies is not None else ["lru"] * tiers
        if len(names) != tiers or not 1 <= tiers < NO_TIER:
            raise ValueError(f"{len(names)} policies for {tiers} tiers: give one each, for 1 to {NO_TIER - 1} tiers")
        self._policies = [make_policy(name) for name in names]
        self._trees: dict[bytes, _Tree] = {}
        self._heaps: dict[Column, list[Any]] = {}  # by (tier, slot class)
        self._counts = [0] * tiers
        self._clock = 0
        self._sequence = itertools.count()  # keeps heap entries comparable; decides nothing

    # ---------------------------------------------------------------- namespaces

    def add_namespace(self, root: bytes, groups: Sequence[GroupRule]) -> None:
        known = self._trees.get(root)
        if known is None:
            self._trees[root] = _Tree(root, groups)
        elif known.rules != tuple(groups):
            raise LayoutError(f"namespace {root.hex()[:16]}... was added with other groups: use another namespace")

    def retire_namespace(self, root: bytes) -> None:
        tree = self._tree(root)
        tree.retired = True
        for node in _subtree(tree.top):
            for column in node.copies:
                self._offer(node, column)

    def _tree(self, root: bytes) -> _Tree:
        tree = self._trees.get(root)
        if tree is None:
            raise UnknownNamespaceError(f"namespace {root.hex()[:16]}... is not in the index: add it first")
        return tree

    # ---------------------------------------------------------------- reading

    def match(self, root: bytes, keys: Keys) -> Match:
        tree = self._tree(root)
        path = [] if tree.retired else self._walk(tree, keys)
        groups = len(tree.rules)
        tiers = np.full((groups, len(path)), NO_TIER, np.uint8)
        slots = np.full((groups, len(path)), NO_SLOT, np.int64)
        for position, node in enumerate(path):
            for (tier, group), copy in node.copies.items():
                if tier < tiers[group, position]:
                    tiers[group, position] = tier
                    slots[group, position] = copy.slot
        return Match(covered_prefix(tiers != NO_TIER, [rule.coverage for rule in tree.rules]), tiers, slots)

    def residency(self, root: bytes, keys: Keys, tier: int, group: int) -> Slots:
        slots = np.full(len(keys), NO_SLOT, np.int64)
        for position, node in enumerate(self._walk(self._tree(root), keys)):
            copy = node.copies.get((tier, group))
            if copy is not None:
                slots[position] = copy.slot
        return slots

    def count(self, tier: int) -> int:
        return self._counts[tier]

    # ---------------------------------------------------------------- changing

    def touch(self, root: bytes, keys: Keys) -> None:
        path = self._walk(self._tree(root), keys)
        self._clock += len(path)
        for position, node in enumerate(path):
            for column, copy in node.copies.items():
                copy.state = self._policies[column[0]].hit(copy.state, self._clock - position)
                self._offer(node, column)

    def insert(self, root: bytes, keys: Keys, tier: int, group: int, slots: Slots) -> npt.NDArray[np.bool_]:
        tree = self._tree(root)
        if tree.retired:
            raise UnknownNamespaceError(f"namespace {root.hex()[:16]}... was reset: nothing can be added to it")
        if len(slots) != len(keys):
            raise ValueError(f"{len(slots)} slots for {len(keys)} keys: give one each")
        taken = np.zeros(len(keys), np.bool_)
        wanted = np.flatnonzero(np.asarray(slots) != NO_SLOT)
        if not len(wanted):
            return taken
        column, node = (tier, group), tree.top
        self._clock += len(keys)
        for position in range(int(wanted[-1]) + 1):
            key = keys[position].tobytes()
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = _Node(tree, key, node)
            node = child
            if slots[position] != NO_SLOT and column not in node.copies:
                state = self._policies[tier].insert(self._clock - position)
                self._attach(node, column, _Copy(int(slots[position]), state))
                taken[position] = True
        return taken

    def remove(self, root: bytes, keys: Keys, tier: int, group: int, start: int, stop: int) -> Slots:
        column = (tier, group)
        path = self._walk(self._tree(root), keys)[start:stop]
        if any(column in node.copies and node.copies[column].pins for node in path):
            raise ValueError(f"a copy in [{start}, {stop}) of tier {tier} is pinned: unpin it first")
        slots = np.full(stop - start, NO_SLOT, np.int64)
        for offset, node in enumerate(path):
            if column in node.copies:
                slots[offset] = self._detach(node, column).slot
        for node in reversed(path):
            _prune(node)
        return slots

    def pin(self, root: bytes, keys: Keys, tier: int, group: int, start: int, stop: int) -> None:
        for copy in self._copies(root, keys, (tier, group), start, stop):
            copy.pins += 1

    def unpin(self, root: bytes, keys: Keys, tier: int, group: int, start: int, stop: int) -> None:
        column = (tier, group)
        copies = self._copies(root, keys, column, start, stop)
        if not all(copy.pins for copy in copies):
            raise ValueError(f"a copy in [{start}, {stop}) of tier {tier} has no pin to take back")
        for node, copy in zip(self._walk(self._tree(root), keys)[start:stop], copies, strict=True):
            copy.pins -= 1
            self._offer(node, column)

    def _copies(self, root: bytes, keys: Keys, column: Column, start: int, stop: int) -> list[_Copy]:
        path = self._walk(self._tree(root), keys)[start:stop]
        if start < 0 or len(path) != stop - start or any(column not in node.copies for node in path):
            raise ValueError(f"positions [{start}, {stop}) are not all held by tier {column[0]}, group {column[1]}")
        return [node.copies[column] for node in path]

    def drop_tier(self, tier: int) -> None:
        for tree in self._trees.values():
            nodes = list(_subtree(tree.top))
            for node in reversed(nodes):
                for column in [c for c in node.copies if c[0] == tier]:
                    self._detach(node, column)
                _prune(node)

    # ---------------------------------------------------------------- eviction

    def evict(self, tier: int, count: int, slot_class: int = 0) -> Evicted | None:
        heap = self._heaps.setdefault((tier, slot_class), [])
        gone: list[tuple[_Node, Column, _Copy]] = []
        while len(gone) < count and heap:
            entry = heapq.heappop(heap)
            node, column = entry[-2:]
            copy = node.copies.get(column)
            if copy is None or copy.entry is not entry or not self._may_go(node, column):
                continue
            gone.append((node, column, self._detach(node, column)))
        if len(gone) < count:
            for node, column, copy in reversed(gone):
                self._attach(node, column, copy)
            return None
        for node, _, _ in gone:
            _prune(node)
        keys = np.frombuffer(b"".join(node.key for node, _, _ in gone), np.uint8).reshape(len(gone), 32)
        groups = np.array([column[1] for _, column, _ in gone], np.uint8)
        slots = np.array([copy.slot for _, _, copy in gone], np.int64)
        return Evicted([node.tree.root for node, _, _ in gone], keys, groups, slots)

    @staticmethod
    def _may_go(node: _Node, column: Column) -> bool:
        return not node.copies[column].pins and column not in node.branches

    def _order(self, node: _Node, column: Column) -> tuple[Any, ...]:
        tier, group = column
        rank = RETIRED if node.tree.retired else STRANDED if node.stranded[group] else LIVE
        return rank, self._policies[tier].order(node.copies[column].state), group, node.key, node.tree.root

    def _offer(self, node: _Node, column: Column) -> None:
        """Enter a copy among the candidates, with its present order, if it may go."""
        if not self._may_go(node, column):
            return
        copy = node.copies[column]
        heap = self._heaps.setdefault((column[0], node.tree.rules[column[1]].slot_class), [])
        copy.entry = (*self._order(node, column), next(self._sequence), node, column)
        heapq.heappush(heap, copy.entry)
        if len(heap) > 64 + 4 * self._counts[column[0]]:
            heap[:] = [e for e in heap if (c := e[-2].copies.get(e[-1])) is not None and c.entry is e]
            heapq.heapify(heap)

    # ---------------------------------------------------------------- the tree

    @staticmethod
    def _walk(tree: _Tree, keys: Keys) -> list[_Node]:
        """The nodes of the leading keys that have a place in the tree."""
        raw, path, node = np.ascontiguousarray(keys).tobytes(), [], tree.top
        for at in range(0, len(raw), 32):
            child = node.children.get(raw[at : at + 32])
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _attach(self, node: _Node, column: Column, copy: _Copy) -> None:
        was_hole, was_populated = node.is_hole(column[1]), node.populated(column)
        node.copies[column] = copy
        self._counts[column[0]] += 1
        if not was_populated:
            _count_branch(node, column, 1)
        if was_hole:
            self._strand_children(node, column[1])
        self._offer(node, column)

    def _detach(self, node: _Node, column: Column) -> _Copy:
        copy = node.copies.pop(column)
        self._counts[column[0]] -= 1
        if not node.populated(column):
            ancestor = _count_branch(node, column, -1)
            if ancestor is not None and column in ancestor.copies:
                self._offer(ancestor, column)
        if node.is_hole(column[1]):
            self._strand_children(node, column[1])
        return copy

    def _strand_children(self, node: _Node, group: int) -> None:
        """Correct the inherited flag below a hole that has opened or closed."""
        waiting = [node]
        while waiting:
            parent = waiting.pop()
            stranded = parent.stranded[group] or parent.is_hole(group)
            for child in parent.children.values():
                if child.stranded[group] != stranded:
                    child.stranded[group] = stranded
                    for column in child.copies:
                        if column[1] == group:
                            self._offer(child, column)
                    waiting.append(child)


def _count_branch(node: _Node, column: Column, change: int) -> _Node | None:
    """Tell the ancestors that a subtree has come to have, or no longer has, a copy in a column.

    Returns the nearest ancestor that holds a copy in it and has thereby become a leaf of the column, or None.
    """
    parent = node.parent
    while parent is not None:
        was_populated = parent.populated(column)
        count = parent.branches.get(column, 0) + change
        if count:
            parent.branches[column] = count
        else:
            del parent.branches[column]
        if parent.populated(column) == was_populated:
            return parent if not count else None
        parent = parent.parent
    return None


def _prune(node: _Node) -> None:
    """Take positions without copies and descendants out of the tree."""
    while node.parent is not None and not node.copies and not node.children:
        parent = node.parent
        parent.children.pop(node.key, None)
        node = parent


def _subtree(top: _Node) -> Iterator[_Node]:
    """All nodes below and including `top`, parents before children."""
    waiting = [top]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.children.values())
