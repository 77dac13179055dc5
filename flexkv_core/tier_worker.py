"""Running a backend: opening it, calling it from threads, and holding it to its duties.

Shared by the tier process and by `isolation: none`. Turns whatever a backend does (raise, wrong number of statuses)
into one status a block. Does not know where calls come from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from flexkv_core.backend import (
    Backend,
    BackendConfig,
    BackendSpec,
    Batch,
    Listing,
    OpenContext,
    Recovered,
    Status,
    SubmitOperation,
    SupportsDelete,
    SupportsList,
    SupportsProbe,
    SupportsRecover,
    SupportsSubmit,
)
from flexkv_core.plugins import load_backend
from flexkv_core.testing.faults import FaultyBackend, wrap
from flexkv_core.tier_submit import Answer, Submissions

POWERS: dict[str, type] = {
    "probe": SupportsProbe,
    "delete": SupportsDelete,
    "list": SupportsList,
    "recover": SupportsRecover,
    "submit": SupportsSubmit,
}
"""Optional powers of backends by the name that the core knows them by."""
PROBE_FAILED = -1
"""In the place of a number of blocks."""
STATUSES = np.array(list(Status), np.uint8)


class TierWorker:
    """One opened backend. `run`, `submit` and `listing` may be called from several threads."""

    def __init__(
        self,
        backend: str,
        config: Mapping[str, Any],
        faults: Mapping[str, Any] | None,
        *,
        host: memoryview,
        slot_bytes: Sequence[int],
        capacity: int | None,
        state_directory: Path | None,
        logger: logging.Logger,
    ) -> None:
        spec = load_backend(backend)
        made: Backend = spec.factory(_config(spec, config))
        if faults is not None:
            made = wrap(made, faults)
        if made.capabilities.addressing != spec.addressing:
            raise ValueError(
                f"the spec says {spec.addressing!r} addressing, the backend {made.capabilities.addressing!r}"
            )
        if made.capabilities.persistent and not spec.persistent:
            raise ValueError("the backend is persistent, and its spec says that it is not")
        if state_directory is not None:
            state_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        made.open(OpenContext(host, tuple(slot_bytes), capacity, logger, state_directory))
        self.backend = made
        self.capabilities = made.capabilities
        self.powers = sorted(name for name, power in POWERS.items() if isinstance(made, power))
        self._logger = logger
        self._submissions: Submissions | None = None
        if isinstance(made, SupportsSubmit):
            self._submissions = Submissions(made, max(1, made.capabilities.concurrency), self._statuses, logger)

    def submits(self, operation: str) -> bool:
        """Whether calls of this kind are to be submitted, not run."""
        return self._submissions is not None and operation in get_args(SubmitOperation)

    def submit(self, operation: SubmitOperation, batch: Batch, answer: Answer) -> None:
        """Have the backend read or write without a thread of its own for it; returns at once. See `submits`."""
        if self._submissions is None:
            raise TypeError("this backend has no power 'submit'")
        self._submissions.add(operation, batch, answer)

    def run(self, operation: str, batch: Batch) -> npt.NDArray[np.uint8]:
        """One `Status` a block; a backend that raises or breaks its duty has failed for the whole batch."""
        try:
            return self._statuses(operation, batch, getattr(self.backend, operation)(batch))
        except Exception:
            self._logger.exception("%s of %d blocks failed", operation, len(batch))
            return np.full(len(batch), Status.FAILED, np.uint8)

    def answers(self) -> int:
        """How often the answer to the call that this thread has just run is sent: once, but for a fault on purpose."""
        return self.backend.answers() if isinstance(self.backend, FaultyBackend) else 1

    def probe(self, batch: Batch) -> int:
        """How many leading blocks are held; `PROBE_FAILED` if the backend could not say."""
        try:
            if not isinstance(self.backend, SupportsProbe):
                return PROBE_FAILED
            return min(max(int(self.backend.probe(batch)), 0), len(batch))
        except Exception:
            self._logger.exception("probe of %d blocks failed", len(batch))
            return PROBE_FAILED

    def listing(self) -> Iterator[Listing]:
        """What the backend holds; raises what it raises."""
        if isinstance(self.backend, SupportsList):
            yield from self.backend.list()

    def recovered(self) -> Iterator[Recovered]:
        """What survived in the backend; raises what it raises."""
        if isinstance(self.backend, SupportsRecover):
            yield from self.backend.recover()

    def close(self) -> None:
        """Close the backend; an exception is logged."""
        if self._submissions is not None:
            self._submissions.stop()
        try:
            self.backend.close()
        except Exception:
            self._logger.exception("close failed")

    def give_up(self) -> None:
        """Answer FAILED for what was submitted and was not done when the backend had been closed.

        Only where no process ends with it: else the core answers when that cannot touch host memory any more.
        """
        if self._submissions is not None:
            self._submissions.give_up()

    def _statuses(self, operation: str, batch: Batch, answer: Sequence[Status]) -> npt.NDArray[np.uint8]:
        statuses = answer if isinstance(answer, np.ndarray) and answer.ndim == 1 else np.asarray(list(answer))
        if len(statuses) != len(batch):
            raise ValueError(
                f"duty broken: {operation} returned {len(statuses)} statuses for {len(batch)} blocks; one each is due"
            )
        if len(statuses) and not np.isin(statuses, STATUSES).all():
            raise ValueError(f"duty broken: {operation} returned something that is no Status")
        return statuses.astype(np.uint8)


def _config(spec: BackendSpec, config: Mapping[str, Any]) -> BackendConfig:
    """The backend's config. ValueError without the values: pydantic's own error shows secrets."""
    try:
        return spec.config_model.model_validate(dict(config))
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
    told = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'config'}: {one['type']}" for one in found)
    raise ValueError(f"its config is not accepted in the tier's process: {told}")
