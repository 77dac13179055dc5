"""Admission: which blocks that a request offers a lower tier takes, and how third parties add their own rule.

Owns the names, the hook and `second_touch`. Does not own what is offered, nor that a block without its ancestors is
never written (`write_through.py`).

A third party's rule is a distribution with an entry point in the group `flexkv.admissions` whose value makes an
`Admission` when called without arguments, or a call of `register_admission`. It runs in the manager's process, under
its lock, once for each KV group of a touch. A *touch* is a request's use of blocks: a store that brings them to host
memory, or a fetch that finds them. What a growing request stores again is no touch of what host memory has already.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from flexkv_core._native import TouchSketch
from flexkv_core.policies.registry import Registry

logger = logging.getLogger("flexkv.admission")

ADMISSION_ENTRY_POINTS = "flexkv.admissions"
BUILT_IN_ADMISSIONS = ("all", "second_touch")

DEFAULT_WINDOW = 1 << 20
"""Blocks that `second_touch` remembers for a tier whose size is not known: 4 MiB of memory."""
SMALLEST_WINDOW, LARGEST_WINDOW = 1 << 10, 1 << 24


class Admission(Protocol):
    """What a third party's rule implements. One instance a tier; calls never overlap."""

    def admit(self, keys: npt.NDArray[np.uint8], group: int) -> npt.NDArray[np.bool_]:
        """Say which blocks the tier takes.

        Args:
            keys: (n, 32) uint8: blocks of one path that were touched and that the tier neither holds nor has queued, in
                order; not to be kept or changed.
            group: number of their KV group.

        Returns:
            (n,) bool. A block behind one that was refused may be left out all the same: it would never be found. An
            exception or another answer admits nothing; it is reported once, and never reaches an engine.
        """


@runtime_checkable
class SupportsCapacity(Protocol):
    """A rule that wants to know the tier's size."""

    def set_capacity(self, blocks: int) -> None:
        """The tier has room for `blocks` blocks of the smallest size of a model. Called when a model is registered,
        not for a tier that bounds itself."""


class SecondTouch:
    """Admits a block that was touched before, and notes one that was not: most blocks are never seen again.

    A doorkeeper (Einziger, Friedman, Manes, "TinyLFU", 2017) that forgets by rotation: two Bloom filters, the older
    one cleared and made the newer whenever that has noted a window of blocks.

    - A block counts as touched before as long as fewer than `window` other blocks were touched since, always; and not
      once 2 x `window` have been, but for false positives.
    - False positives (a new block is admitted at once): at most 0.2 %. Filters have 16 bits a block and 7 probes in
      one cache line of 512 bits. A line gets i of the window's blocks with Poisson probability of mean 32, and then
      answers yes falsely with (1 - (1 - 1/512)^(7 i))^7: a sum of 0.00099 for a full filter (Putze, Sanders, Singler,
      "Cache-, hash- and space-efficient Bloom filters", 2007, equation 3), twice that for two.
    - Memory: 4 bytes a block of the window, `memory_bytes` in all.

    The window is the tier's capacity in blocks, from 1,024 to 16 Mi. When a registered model's smaller blocks
    make it larger, what was noted is lost.
    """

    def __init__(self, window: int = DEFAULT_WINDOW) -> None:
        self._sketch = TouchSketch(window)
        self._sized = False

    @property
    def window(self) -> int:
        """How many blocks it remembers at least."""
        return self._sketch.window

    @property
    def memory_bytes(self) -> int:
        """What the filters take."""
        return self._sketch.memory_bytes

    def set_capacity(self, blocks: int) -> None:
        """Size the window by the tier's capacity; it only grows, but for the first time."""
        window = min(max(blocks, SMALLEST_WINDOW), LARGEST_WINDOW)
        if not self._sized or window > self.window:
            self._sketch = TouchSketch(window)
            self._sized = True

    def admit(self, keys: npt.NDArray[np.uint8], group: int) -> npt.NDArray[np.bool_]:
        """See `Admission.admit`."""
        seen = np.empty(len(keys), np.bool_)
        self._sketch.touch(keys, group, seen)
        return seen


class GuardedAdmission:
    """Any rule, with a third party's mistakes turned into refusals."""

    def __init__(self, name: str, rule: Admission) -> None:
        self._name = name
        self._rule = rule
        self._reported = False

    def admit(self, keys: npt.NDArray[np.uint8], group: int) -> npt.NDArray[np.bool_]:
        """See `Admission.admit`; never raises and always has the right shape."""
        try:
            answer = self._rule.admit(keys, group)
            if isinstance(answer, np.ndarray) and answer.dtype == np.bool_ and answer.shape == (len(keys),):
                return answer
            shown = f"{answer.dtype} {answer.shape}" if isinstance(answer, np.ndarray) else type(answer).__name__
            self._report(f"returned {shown}: return a bool array ({len(keys)},)")
        except Exception as error:
            self._report(f"raised {type(error).__name__}: {error}")
        return np.zeros(len(keys), np.bool_)

    def set_capacity(self, blocks: int) -> None:
        """Pass the tier's size on to a rule that wants it."""
        if not isinstance(self._rule, SupportsCapacity):
            return
        try:
            self._rule.set_capacity(blocks)
        except Exception as error:
            self._report(f"raised {type(error).__name__} in set_capacity: {error}")

    def _report(self, what: str) -> None:
        if not self._reported:
            self._reported = True
            logger.error("admission %r %s. Blocks are refused; further mistakes are not reported", self._name, what)


_registry: Registry[Admission] = Registry(
    key="admission",
    kind="admission policy",
    entry_points=ADMISSION_ENTRY_POINTS,
    built_in=BUILT_IN_ADMISSIONS,
    methods=("admit",),
    protocol="flexkv_core.policies.admission.Admission",
)


def admission_names() -> list[str]:
    """Names that a stack's `admission:` may have, sorted."""
    return _registry.names()


def register_admission(name: str, factory: Callable[[], Admission]) -> None:
    """Make a third party's rule known by name. Raises PolicyError if the name is taken."""
    _registry.register(name, factory)


def check_admission(name: str) -> str:
    """Return the name if there is such a rule. Raises PolicyError naming the nearest known one."""
    return _registry.check(name)


def make_admission(name: str) -> GuardedAdmission | None:
    """A new instance of a rule for one tier; None for `all`.

    Raises PolicyError if there is none of that name, or it cannot be made; the text names what provides it.
    """
    if name == "all":
        return None
    rule = SecondTouch() if name == "second_touch" else _registry.make(name)
    return None if rule is None else GuardedAdmission(name, rule)
