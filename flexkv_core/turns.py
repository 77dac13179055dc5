"""A line of moves in which owners take turns: an engine that queues much does not stand before one that queues little.

Within an owner the order is that of arrival. Owns nothing but the order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from flexkv_core.plans import Move


class Turns:
    """A queue of moves, by `Move.owner`. The owner at the front has its turn; taking a move ends it.

    Attributes:
        blocks: in all moves; any thread may read it.
    """

    def __init__(self) -> None:
        self.blocks = 0
        self._lines: dict[int, deque[Move]] = {}  # in order of turns; none is empty

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __iter__(self) -> Iterator[Move]:
        """All moves, by owner."""
        for line in self._lines.values():
            yield from line

    def owners(self) -> int:
        """How many have moves here."""
        return len(self._lines)

    def append(self, move: Move) -> None:
        """Queue a move behind its owner's others."""
        self._lines.setdefault(move.owner, deque()).append(move)
        self.blocks += len(move)

    def head(self) -> Move:
        """The move whose turn it is. Raises IndexError where there is none."""
        for line in self._lines.values():
            return line[0]
        raise IndexError("no moves are queued")

    def take(self, blocks: int) -> Move:
        """Take at most so many blocks of the move whose turn it is; what is left stays at the head of its owner's line.
        Raises IndexError where there is none."""
        move = self.head()
        line = self._lines.pop(move.owner)
        line.popleft()
        if len(move) > blocks:
            line.appendleft(move.part(slice(blocks, None)))
            move = move.part(slice(0, blocks))
        self.blocks -= len(move)
        if line:
            self._lines[move.owner] = line  # its next turn is after everyone else's
        return move

    def sift(self, keep: Callable[[Move], Move | None]) -> None:
        """Replace each move by what `keep` returns for it, None: nothing; turns stay as they are."""
        for owner, line in list(self._lines.items()):
            kept = deque(left for move in line if (left := keep(move)) is not None)
            if kept:
                self._lines[owner] = kept
            else:
                del self._lines[owner]
        self.blocks = sum(map(len, self))

    def clear(self) -> list[Move]:
        """Empty it; what was in it."""
        moves = list(self)
        self._lines.clear()
        self.blocks = 0
        return moves
