"""What authors of backends test with: faults on purpose (`faults.py`)."""

from flexkv_core.testing.faults import FaultConfig, FaultyBackend, wrap

__all__ = ["FaultConfig", "FaultyBackend", "wrap"]
