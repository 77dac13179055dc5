"""What a mutant is."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One way to break a file: `old`, which occurs in it exactly once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    breaks: str

    def applied(self, text: str) -> str:
        """The broken text. ValueError if the file has changed so that the mutant no longer says where it belongs."""
        if (times := text.count(self.old)) != 1:
            raise ValueError(f"mutant {self.name}: its text occurs {times} times in {self.file}: adapt it")
        return text.replace(self.old, self.new)
