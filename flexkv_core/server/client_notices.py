"""What a client was told unasked and has not taken yet: which blocks come and go.

Owns their order and their bound. All with the condition of the client's channel held.
"""

from __future__ import annotations

from flexkv_core.server import messages as m

Notice = m.Committed | m.Dropped | m.Cleared
MAX_BYTES = 16 << 20
"""Of keys that wait to be taken; beyond, all that was known is forgotten instead."""


class NoticeBox:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._notices: list[Notice] = []
        self._bytes = 0

    def put(self, notice: Notice) -> None:
        """The server says so."""
        self._notices.append(notice)
        self._bytes += len(notice.keys) if not isinstance(notice, m.Cleared) else 0
        if self._bytes > MAX_BYTES:
            self.forget()

    def forget(self) -> None:
        """Nothing that was said counts any more."""
        self._notices, self._bytes = [m.Cleared(None)], 0

    def take(self) -> list[Notice]:
        """All that wait, in the order in which they came."""
        taken, self._notices, self._bytes = self._notices, [], 0
        return taken
