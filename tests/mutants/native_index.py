"""Mutants of the native index: small faults, each of which a test must notice (run.py tries them).

None is equivalent to the unbroken code: what changes only how much memory or time it takes is not here.
"""

from __future__ import annotations

from mutant import Mutant
from native_order import ARGUMENTS, EVICTION, POLICIES, QUEUES, RECOVERY
from native_tree import COPIES, NODES

MUTANTS: list[Mutant] = [*NODES, *COPIES, *POLICIES, *QUEUES, *EVICTION, *RECOVERY, *ARGUMENTS]
