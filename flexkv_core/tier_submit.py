"""Submitted batches of one backend: what waits, what is under way, and that each is answered.

Owns the thread that calls `SupportsSubmit.submit` and the count of batches that are not done. Does not own how an
answer travels, nor deadlines (`tier_link.py`, `tier_inline.py`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexkv_core.backend import Batch, Status, SubmitOperation, SupportsSubmit

Statuses = npt.NDArray[np.uint8]
Check = Callable[[str, Batch, Sequence[Status]], Statuses]
Answer = Callable[[Statuses, bool], None]
"""Gets one `Status` a block, and whether this is the first answer of its batch. Any thread."""

LAST_SUBMIT_S = 1.0
"""How long closing waits for a `submit` that is under way."""


@dataclass(slots=True, eq=False)
class _Submitted:
    operation: SubmitOperation
    batch: Batch
    answer: Answer
    done: bool = False


class Submissions:
    """See the module's docstring. Methods may be called by any thread.

    Args:
        most: batches that may be under way at a time.
        check: turns what the backend says into statuses; raises where it breaks its duty.
    """

    def __init__(self, backend: SupportsSubmit, most: int, check: Check, logger: logging.Logger) -> None:
        self._backend = backend
        self._most = most
        self._check = check
        self._logger = logger
        self._waiting: deque[_Submitted] = deque()
        self._under_way: set[_Submitted] = set()
        self._closed = False
        self._changed = threading.Condition()
        self._submitting = threading.Lock()
        threading.Thread(target=self._run, name="flexkv-submit", daemon=True).start()

    def add(self, operation: SubmitOperation, batch: Batch, answer: Answer) -> None:
        """Submit a batch as soon as there is a place for it. Returns at once; after `stop` it is FAILED."""
        submitted = _Submitted(operation, batch, answer)
        with self._changed:
            refused = self._closed
            if not refused:
                self._waiting.append(submitted)
                self._changed.notify_all()
        if refused:
            self._fail(submitted)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._waiting and len(self._under_way) < self._most))
                if self._closed:
                    return
                submitted = self._waiting.popleft()
                self._under_way.add(submitted)
            with self._submitting:
                if not self._closed:
                    self._submit(submitted)

    def _submit(self, submitted: _Submitted) -> None:
        try:
            self._backend.submit(submitted.operation, submitted.batch, lambda answer: self._done(submitted, answer))
        except Exception:
            self._logger.exception("submitting a %s of %d blocks failed", submitted.operation, len(submitted.batch))
            self._fail(submitted)

    def _done(self, submitted: _Submitted, answer: Sequence[Status]) -> None:
        try:
            statuses = self._check(submitted.operation, submitted.batch, answer)
        except Exception:
            self._logger.exception("%s of %d blocks failed", submitted.operation, len(submitted.batch))
            statuses = _failed(submitted)
        self._settle(submitted, statuses)

    def _fail(self, submitted: _Submitted) -> None:
        self._settle(submitted, _failed(submitted))

    def _settle(self, submitted: _Submitted, statuses: Statuses) -> None:
        with self._changed:
            first, submitted.done = not submitted.done, True
            self._under_way.discard(submitted)
            self._changed.notify_all()
        submitted.answer(statuses, first)

    def stop(self) -> None:
        """Submit nothing any more: call it before the backend is closed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._submitting.acquire(timeout=LAST_SUBMIT_S):
            self._submitting.release()

    def give_up(self) -> None:
        """What is not done is FAILED: call it when the backend has been closed."""
        with self._changed:
            left = [*self._under_way, *self._waiting]
            self._waiting.clear()
        for submitted in left:
            if not submitted.done:
                self._fail(submitted)


def _failed(submitted: _Submitted) -> Statuses:
    return np.full(len(submitted.batch), Status.FAILED, np.uint8)
