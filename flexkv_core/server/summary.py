"""The line that a server logs every so many fetches: what they found since the last one, and what is wrong.

Owns when it is due and its words. Does not own the figures (`daemon.py`) or the log (`flexkv_core.logs`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger("flexkv.summary")


class Summary:
    """On the owner's thread.

    Args:
        interval: fetches from one line to the next.
        figures: the server's.
    """

    def __init__(self, interval: int, figures: Callable[[], Mapping[str, Any]]) -> None:
        self._interval = interval
        self._figures = figures
        self._count = 0
        self._last: Mapping[str, Any] = {}

    def fetched(self) -> None:
        """A fetch of some client is done."""
        self._count += 1
        if self._count >= self._interval:
            requests, self._count = self._count, 0
            if logger.isEnabledFor(logging.INFO):
                self._log(requests)

    def _log(self, requests: int) -> None:
        now, last = self._figures(), self._last
        self._last = now
        tiers, before = now.get("tiers", {}), last.get("tiers", {})
        asked = now.get("asked_blocks", 0) - last.get("asked_blocks", 0)
        missed = now.get("miss_blocks", 0) - last.get("miss_blocks", 0)
        since = {
            name: {field: its[field] - before.get(name, {}).get(field, 0) for field in ("hit_blocks", "stored_blocks")}
            for name, its in tiers.items()
        }
        shares = {name: _share(counts["hit_blocks"], asked) for name, counts in since.items()}
        stored = {name: counts["stored_blocks"] for name, counts in since.items()}
        queued = {name: sum(its["queued_blocks"].values()) for name, its in tiers.items() if its["queued_blocks"]}
        troubled = {name: its["health"] for name, its in tiers.items() if its["health"] != "ok"}
        logger.info(
            "%d fetches of %d blocks: %.1f%% hits",
            requests,
            asked,
            100 * _share(asked - missed, asked),
            extra={
                "requests": requests,
                "blocks": asked,
                "hit_rate": _share(asked - missed, asked),
                **{f"hit_rate_{name}": share for name, share in shares.items()},
                **{f"stored_{name}": blocks for name, blocks in stored.items()},
                **{f"queued_{name}": blocks for name, blocks in queued.items()},
                "degraded": ",".join(f"{name}:{health}" for name, health in troubled.items()) or "none",
            },
        )


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0
