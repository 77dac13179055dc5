"""What a client uses of the cache, and what of it its server has been told: namespaces and their resets.

Owns that registered namespaces outlive servers: a server that is new to them is told all again, in one go, and the
answers are not waited for. Does no I/O; all with the condition of the client's channel held.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from flexkv_core.blocks import Namespace
from flexkv_core.errors import UnknownNamespaceError
from flexkv_core.layout import ModelSpec
from flexkv_core.server import messages as m

logger = logging.getLogger("flexkv.client")

AGAIN_S = 0.1
"""Between two attempts to make namespaces known to a server that does not take them, as one that is starting."""


@dataclass(slots=True)
class _Reset:
    """A reset that no server has confirmed; `number`: of the request that is under way."""

    model: ModelSpec
    old: Namespace
    number: int | None


class Names:
    """See the module's docstring.

    Args:
        number: makes the next request's number.
    """

    def __init__(self, number: Callable[[], int]) -> None:
        self._number = number
        self._used: dict[bytes, tuple[ModelSpec, Namespace]] = {}
        self._known: set[bytes] = set()  # of these, those that the present server knows
        self._asked: dict[int, bytes] = {}  # registrations under way, by number
        self._resets: dict[bytes, _Reset] = {}  # by root without an epoch: the first counts, no server saw the others
        self._again_at = 0.0
        self._complained = False

    def model(self, root: bytes) -> ModelSpec:
        """Raises UnknownNamespaceError for a namespace that is not in use."""
        if root not in self._used:
            raise UnknownNamespaceError("this namespace is not registered or was reset: call register() again")
        return self._used[root][0]

    def knows(self, root: bytes) -> bool:
        """Whether the present server knows it."""
        return root in self._known

    def add(self, model: ModelSpec, namespace: Namespace, *, known: bool) -> None:
        """Use a namespace from now on. `known`: the present server has confirmed it."""
        self._used[namespace.root] = (model, namespace)
        if known:
            self._known.add(namespace.root)

    def remove(self, root: bytes) -> None:
        """Use a namespace no more. Safe to call twice."""
        self._used.pop(root, None)
        self._known.discard(root)

    def reset_without_server(self, model: ModelSpec, old: Namespace, number: int | None) -> None:
        """A namespace was reset, and no server has confirmed it. `number`: of the request that is under way."""
        self._resets.setdefault(dataclasses.replace(old, epoch=b"").root, _Reset(model, old, number))

    def lost(self) -> None:
        """The server is gone, or has forgotten something: the next one is told all."""
        self._known.clear()
        self._asked.clear()
        for reset in self._resets.values():
            reset.number = None
        self._again_at = 0.0
        self._complained = False

    def to_say(self) -> list[m.Message]:
        """What the server is to be told now."""
        untold = [reset for reset in self._resets.values() if reset.number is None]
        now = time.monotonic()
        if self._asked or now < self._again_at or (len(self._known) == len(self._used) and not untold):
            return []
        self._again_at = now + AGAIN_S
        messages: list[m.Message] = []
        for reset in untold:
            messages.append(m.Register(self._number(), reset.model, reset.old.epoch))
            reset.number = self._number()
            messages.append(m.Reset(reset.number, reset.old.root))
        for root, (model, namespace) in self._used.items():
            if root not in self._known:
                number = self._number()
                self._asked[number] = root
                messages.append(m.Register(number, model, namespace.epoch))
        return messages

    def answered(self, message: m.FromServer) -> None:
        """Take note of an answer, if it is to one of these messages."""
        if isinstance(message, m.Registered):
            root = self._asked.pop(message.id, None)
            if root in self._used:
                self._known.add(root)
            for key, reset in list(self._resets.items()):
                if reset.number == message.id:
                    del self._resets[key]
        elif isinstance(message, m.Failed):
            root = self._asked.pop(message.id, None)
            if root in self._used and message.kind == "input" and not self._complained:
                self._complained = True
                logger.error("model %r is not served any more: %s", self._used[root][0].model, message.text)
            for reset in self._resets.values():
                if reset.number == message.id:
                    reset.number = None
