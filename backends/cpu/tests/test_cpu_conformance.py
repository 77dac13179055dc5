"""The cpu backend, further down than first in a stack, does what the contract asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexkv_core.testing import BackendConformance


class TestCpuConformance(BackendConformance):
    backend = "cpu"

    def make_config(self, directory: Path) -> dict[str, Any]:
        return {}
