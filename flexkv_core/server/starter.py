"""When a client has a server started: now and then while there is none, by calls that do not wait for it.

Owns the times and the thread. Does not own how a server is started (`launch.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger("flexkv.client")

AFTER_S, AFTER_MAX_S = 0.5, 60.0
"""Between two attempts: at first, and at most; it doubles in between."""


class Starter:
    """See the module's docstring. Any thread.

    Args:
        start: starts a server, or raises; called in a thread of its own.
    """

    def __init__(self, start: Callable[[], object]) -> None:
        self._start = start
        self._lock = threading.Lock()
        self._at = time.monotonic() + AFTER_S
        self._attempts = 0
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Have a server started, if it is time. Never waits."""
        with self._lock:
            now = time.monotonic()
            if now < self._at or (self._thread is not None and self._thread.is_alive()):
                return
            self._attempts += 1
            self._at = now + min(AFTER_S * 2**self._attempts, AFTER_MAX_S)
            self._thread = threading.Thread(target=self._run, name="flexkv-start", daemon=True)
            self._thread.start()

    def succeeded(self) -> None:
        """A server is there: when it is gone, the next one may be started at once."""
        with self._lock:
            self._attempts, self._at = 0, 0.0

    def _run(self) -> None:
        try:
            self._start()
        except Exception as error:
            logger.error("no server could be started: %s", error)
