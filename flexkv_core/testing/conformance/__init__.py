"""The conformance suite: what every backend owes, as tests that an author inherits.

    class TestMine(BackendConformance):
        backend = "mine"

        def make_config(self, directory):
            return {"root": directory}

Hooks and knobs are in `suite.py`, the duties in the modules `duties_*.py`; `README.md` of `flexkv_core/testing` says
which hook opens which test.
"""

from __future__ import annotations

from flexkv_core.testing.conformance.blocks import StoredBlock
from flexkv_core.testing.conformance.duties_kill import KillDuties
from flexkv_core.testing.conformance.duties_life import LifeDuties
from flexkv_core.testing.conformance.duties_load import LoadDuties
from flexkv_core.testing.conformance.duties_medium import MediumDuties
from flexkv_core.testing.conformance.duties_powers import PowerDuties, RecoveryDuties
from flexkv_core.testing.conformance.duties_submit import SubmitDuties
from flexkv_core.testing.conformance.suite import DUTIES

__all__ = ["DUTIES", "BackendConformance", "StoredBlock"]


class BackendConformance(RecoveryDuties, SubmitDuties, PowerDuties, LoadDuties, MediumDuties, LifeDuties, KillDuties):
    """Subclass it as `Test...`, set `backend` and override `make_config`; the other hooks open further tests."""
