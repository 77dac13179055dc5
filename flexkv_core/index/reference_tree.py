"""The reference index's trees: a node is one block; copies, branches, holes, orphans. No order, no eviction.

What may surprise:

- *Branches.* A copy may go only if no deeper position of its subtree has a copy in the same column (tier, group).
  Each node counts, by column, the children whose subtrees have one; the count changes its ancestors only when it
  becomes or stops being zero.
- *Stranded.* A node knows, for each group, whether its copies are stranded: a hole of that group lies above it (which
  only `all`-coverage groups have), or it belongs to an orphan. The flag is inherited by children and corrected
  downwards when a hole opens or closes, or an orphan joins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flexkv_core.index import GroupRule, Keys
from flexkv_core.policies.reference import State

Column = tuple[int, int]
"""(tier, group)"""


class Copy:
    """One block's residency in one tier."""

    __slots__ = ("entry", "pins", "slot", "state")

    def __init__(self, slot: int, state: State) -> None:
        self.slot = slot
        self.state = state
        self.pins = 0
        self.entry: Any = None  # the heap entry that describes this copy now


class Node:
    """One position of a prefix. `parent` is None for a tree's top and for the first block of an orphan."""

    __slots__ = ("branches", "children", "copies", "depth", "key", "parent", "parent_key", "stranded", "tree")

    def __init__(self, tree: Tree, key: bytes, parent_key: bytes, depth: int, parent: Node | None) -> None:
        self.tree = tree
        self.key = key
        self.parent_key = parent_key
        self.depth = depth
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.copies: dict[Column, Copy] = {}
        self.branches: dict[Column, int] = {}  # children whose subtree has a copy in that column
        self.stranded = [parent is None or parent.strands(group) for group in range(len(tree.rules))]

    def is_hole(self, group: int) -> bool:
        """No tier holds this position of an `all`-coverage group. A tree's top is never one."""
        if self.depth < 0 or self.tree.rules[group].coverage.kind != "all":
            return False
        return all(held != group for _, held in self.copies)

    def strands(self, group: int) -> bool:
        """Whether the children's copies of this group are stranded."""
        return self.stranded[group] or self.is_hole(group)

    def populated(self, column: Column) -> bool:
        """This node or its subtree has a copy in the column."""
        return column in self.copies or column in self.branches

    def may_go(self, column: Column) -> bool:
        """The copy in that column is not pinned and no deeper one holds it back."""
        return not self.copies[column].pins and column not in self.branches


class Tree:
    """One namespace. `top` stands for the root: at depth -1, never a position, never with copies."""

    __slots__ = ("copies", "orphans", "positions", "retired", "root", "rules", "top")

    def __init__(self, root: bytes, rules: Sequence[GroupRule]) -> None:
        self.root = root
        self.rules = tuple(rules)
        self.retired = False
        self.copies = 0
        self.positions: dict[bytes, Node] = {}
        self.orphans: dict[tuple[bytes, int], dict[bytes, Node]] = {}  # by (parent's key, depth), then key
        self.top = Node(self, root, b"", -1, None)
        self.top.stranded = [False] * len(self.rules)

    def place(self, key: bytes) -> Node | None:
        """The node of a key, or of the root; in the tree or in an orphan."""
        return self.top if key == self.root else self.positions.get(key)

    def walk(self, keys: Keys) -> list[Node]:
        """The nodes of the leading keys that have a place in the tree."""
        raw, path, node = np.ascontiguousarray(keys).tobytes(), [], self.top
        for at in range(0, len(raw), 32):
            child = node.children.get(raw[at : at + 32])
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def add(self, key: bytes, parent: Node) -> Node:
        """A new position below `parent`, without copies. Does not let orphans join: see `waiting_for`."""
        node = parent.children[key] = Node(self, key, parent.key, parent.depth + 1, parent)
        self.positions[key] = node
        return node

    def add_orphan(self, key: bytes, parent_key: bytes, depth: int) -> Node:
        """A new position whose parent has no place, without copies."""
        node = Node(self, key, parent_key, depth, None)
        self.positions[key] = self.orphans.setdefault((parent_key, depth), {})[key] = node
        return node

    def waiting_for(self, parent: Node) -> list[Node]:
        """Take out the orphans that wait for this position and make them its children."""
        joining = list(self.orphans.pop((parent.key, parent.depth + 1), {}).values())
        for node in joining:
            node.parent = parent
            parent.children[node.key] = node
            for column in {*node.copies, *node.branches}:
                count_branch(node, column, 1)
        return joining

    def prune(self, node: Node | None) -> None:
        """Take positions without copies and descendants out of the tree, from this one upwards."""
        while node is not None and node is not self.top and not node.copies and not node.children:
            if node.parent is not None:
                node.parent.children.pop(node.key, None)
            else:
                self._drop_orphan(node)
            if self.positions.get(node.key) is node:
                del self.positions[node.key]
            node = node.parent

    def _drop_orphan(self, node: Node) -> None:
        place = (node.parent_key, node.depth)
        waiting = self.orphans.get(place, {})
        if waiting.pop(node.key, None) is not None and not waiting:
            del self.orphans[place]

    def nodes(self) -> Iterator[Node]:
        """All positions, orphans included, parents before children."""
        for child in self.top.children.values():
            yield from subtree(child)
        for waiting in self.orphans.values():
            for orphan in waiting.values():
                yield from subtree(orphan)


def subtree(top: Node) -> Iterator[Node]:
    """All nodes below and including `top`, parents before children."""
    waiting = [top]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.children.values())


def count_branch(node: Node, column: Column, change: int) -> Node | None:
    """Tell the ancestors that a subtree has come to have, or no longer has, a copy in a column.

    Returns the nearest ancestor that has thereby become a leaf of the column, or None.
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


def restrand(node: Node, group: int) -> list[Node]:
    """Correct the inherited flag below a node; returns the nodes where it has changed."""
    changed, waiting = [], [node]
    while waiting:
        parent = waiting.pop()
        stranded = parent.strands(group)
        for child in parent.children.values():
            if child.stranded[group] != stranded:
                child.stranded[group] = stranded
                changed.append(child)
                waiting.append(child)
    return changed
