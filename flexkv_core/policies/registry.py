"""Names of one kind of policy: built-in ones, registered ones, and those of installed distributions.

Owns discovery and its errors, once for eviction (`__init__.py`) and admission (`admission.py`). Does not know what a
policy does. Entry points are loaded only when a stack asks for them, so a broken one takes no other down.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Generic, TypeVar

from flexkv_core.errors import PolicyError

Made = TypeVar("Made")


class Registry(Generic[Made]):
    """Third parties' policies of one kind by name.

    Args:
        key: the tier's key in a stack, which errors name.
        kind: what errors call such a policy.
        entry_points: group of entry points; the value of each makes an instance when called without arguments.
        built_in: names that third parties cannot take.
        methods: what an instance must have.
        protocol: the class to read about it.
    """

    def __init__(
        self,
        *,
        key: str,
        kind: str,
        entry_points: str,
        built_in: Sequence[str],
        methods: Sequence[str],
        protocol: str,
    ) -> None:
        self._key, self._kind, self._group = key, kind, entry_points
        self._built_in, self._methods, self._protocol = tuple(built_in), tuple(methods), protocol
        self._registered: dict[str, Callable[[], Made]] = {}

    def names(self) -> list[str]:
        """Names that a stack may give, sorted."""
        return sorted({*self._built_in, *self._registered, *(entry.name for entry in self._entry_points())})

    def register(self, name: str, factory: Callable[[], Made]) -> None:
        """Make a policy known by name. Raises PolicyError if the name is taken."""
        if name in self.names():
            raise PolicyError(f"{self._kind} {name!r} is registered already: choose another name")
        self._registered[name] = factory

    def check(self, name: str) -> str:
        """Return the name if there is such a policy. Raises PolicyError naming the nearest known one."""
        known = self.names()
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known ones are {', '.join(known)}"
            raise PolicyError(f"{self._key} {name!r} is not a known policy: {hint}")
        return name

    def make(self, name: str) -> Made | None:
        """A new instance of a third party's policy; None for a built-in one.

        Raises PolicyError if there is none of that name, two distributions provide it, or it cannot be made; the
        text names what provides it.
        """
        if name in self._built_in:
            return None
        self.check(name)
        where = f"{self._kind} {name!r}"
        factory: Callable[[], Any] | None = self._registered.get(name)
        try:
            if factory is None:
                entry = self._entry_point(name)
                where = f"{where} of {entry.dist.name if entry.dist else 'unknown'}"
                factory = entry.load()
            made: Any = factory()
        except PolicyError:
            raise
        except Exception as error:
            raise PolicyError(f"{where} cannot be made: {type(error).__name__}: {error}") from error
        missing = [method for method in self._methods if not callable(getattr(made, method, None))]
        if missing:
            raise PolicyError(f"{where} has no method {', '.join(missing)}: see {self._protocol}")
        instance: Made = made
        return instance

    def _entry_point(self, name: str) -> metadata.EntryPoint:
        found = [entry for entry in self._entry_points() if entry.name == name]
        origins = sorted({entry.dist.name for entry in found if entry.dist})
        if len(origins) > 1:
            raise PolicyError(f"{self._kind} {name!r} is provided by {' and '.join(origins)}: uninstall one of them")
        return found[0]

    def _entry_points(self) -> list[metadata.EntryPoint]:
        return list(metadata.entry_points(group=self._group))
