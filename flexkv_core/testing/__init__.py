"""What authors of backends test with: the conformance suite, and faults on purpose (`faults.py`).

`BackendConformance` is imported when it is asked for: it needs pytest, which tier processes and servers do without.
"""

from typing import TYPE_CHECKING, Any

from flexkv_core.testing.faults import FaultConfig, FaultyBackend, wrap

if TYPE_CHECKING:
    from flexkv_core.testing.conformance import BackendConformance, StoredBlock

__all__ = ["BackendConformance", "FaultConfig", "FaultyBackend", "StoredBlock", "wrap"]


def __getattr__(name: str) -> Any:
    if name not in ("BackendConformance", "StoredBlock"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flexkv_core.testing import conformance  # noqa: PLC0415 - see the module's docstring

    return getattr(conformance, name)
