"""Which namespaces a manager knows, in which epochs, and the devices of each.

Owns registration, resets and their record on disk, and that namespaces which nobody uses stay few. Does not own what a
namespace holds (`planner.py`). Any thread.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from flexkv_core.blocks import Namespace
from flexkv_core.epochs import Epochs
from flexkv_core.errors import StateError, UnknownNamespaceError
from flexkv_core.layout import ModelSpec
from flexkv_core.planner import Planner
from flexkv_core.ranks import Ranks

MOST_IDLE_NAMESPACES = 1024
"""Registered namespaces without a device; beyond, the least recently used is unregistered."""


class Namespaces:
    """See the module's docstring.

    Args:
        planner: told of each namespace, under `lock`.
        epochs: the record of resets.
        call: has the owner thread call something, after what it was asked before.
        unsafe: names of tiers that would serve old blocks after a restart, because nothing would remember a reset.
    """

    def __init__(
        self,
        planner: Planner,
        lock: threading.RLock,
        epochs: Epochs,
        call: Callable[[Callable[[], None]], None],
        unsafe: Callable[[], Sequence[str]],
    ) -> None:
        self._planner = planner
        self._lock = lock
        self._epochs = epochs
        self._call = call
        self._unsafe = unsafe
        self._naming = threading.Lock()  # taken before `lock`: registrations and resets, which wait for a disk
        self._present: dict[bytes, Namespace] = {}  # root without an epoch -> what `register` gives
        self._live: dict[bytes, Namespace] = {}  # by root: all that are registered, also in earlier epochs
        self._ranks: dict[bytes, Ranks] = {}
        self._idle: OrderedDict[bytes, Namespace] = OrderedDict()  # root -> one without a device; the latest used last

    @property
    def error(self) -> str | None:
        """Why the last reset is not on disk everywhere it should be, or None."""
        return self._epochs.error

    def ranks_of(self, root: bytes) -> Ranks:
        """The devices of a namespace. Raises UnknownNamespaceError, or StateError where it has none."""
        ranks = self._ranks.get(root)
        if ranks is None:
            with self._lock:
                self._planner.groups(root)  # raises for a namespace that is not registered, or was reset
            raise StateError("this namespace has no device: pass device=... to register()")
        return ranks

    def used(self, root: bytes) -> None:
        """Note a use, under the lock."""
        if root in self._idle:
            self._idle.move_to_end(root)

    # ---------------------------------------------------------------- in

    def register(self, model: ModelSpec, ranks: Ranks | None, epoch: bytes | None) -> Namespace:
        """As `KVCacheManager.register`."""
        name = Namespace.of(model).root
        with self._naming:
            if epoch is not None:
                namespace = Namespace.of(model, epoch)
            else:
                namespace = self._present.get(name) or Namespace.of(model, self._epochs.of(name))
            with self._lock:
                self._planner.add_model(namespace.root, model.groups)
                self._live[namespace.root] = namespace
                if epoch is None:
                    self._present[name] = namespace
                if ranks is not None:
                    self._ranks[namespace.root] = ranks
                self._note_idle(namespace)
        return namespace

    def reset(self, namespace: Namespace, *, retire: bool) -> Namespace:
        """As `KVCacheManager.reset`."""
        name = _name_of(namespace)
        with self._naming:
            with self._lock:
                groups = self._planner.groups(namespace.root)
            if unsafe := self._unsafe():
                raise StateError(
                    f"tier {unsafe[0]} would serve the old blocks after a restart, as nothing would remember the "
                    "reset: name a state_directory in the stack"
                )
            fresh = dataclasses.replace(namespace, epoch=self._epochs.renew(name))
            with self._lock:
                if retire:
                    self._planner.retire(namespace.root)
                    self._live.pop(namespace.root, None)
                    self._idle.pop(namespace.root, None)
                self._planner.add_model(fresh.root, groups)
                ranks = self._ranks.pop(namespace.root, None) if retire else self._ranks.get(namespace.root)
                if ranks is not None:
                    self._ranks[fresh.root] = ranks
                self._present[name] = self._live[fresh.root] = fresh
                self._note_idle(fresh)
        return fresh

    # ---------------------------------------------------------------- out

    def unregister(self, namespace: Namespace) -> None:
        """As `KVCacheManager.unregister`."""
        with self._naming, self._lock:
            if namespace.root not in self._live:
                raise UnknownNamespaceError("this namespace is not registered or was reset: nothing to unregister")
            self._forget(namespace)

    def _note_idle(self, namespace: Namespace) -> None:
        """A namespace was registered or reset (under both locks): keep those without a device bounded."""
        if namespace.root in self._ranks:
            self._idle.pop(namespace.root, None)
            return
        self._idle[namespace.root] = namespace
        self._idle.move_to_end(namespace.root)
        if len(self._idle) > MOST_IDLE_NAMESPACES:
            self._forget(next(iter(self._idle.values())))

    def _forget(self, namespace: Namespace) -> None:
        """Unregister, under both locks. What was called before goes first: the owner thread may not have begun it."""
        root, name = namespace.root, _name_of(namespace)
        del self._live[root]
        if self._present.get(name) == namespace:
            del self._present[name]
        self._ranks.pop(root, None)
        self._idle.pop(root, None)

        def leave() -> None:
            with self._lock:
                if root not in self._live:
                    self._planner.leave(root)

        self._call(leave)

    def close(self) -> None:
        """Give back the record's places."""
        self._epochs.close()


def _name_of(namespace: Namespace) -> bytes:
    """What names it in all epochs: its root without one."""
    return dataclasses.replace(namespace, epoch=b"").root
