"""Coverage arithmetic against the rules, spelled out position by position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_core.index.coverage import covered_prefix, needed
from flexkv_core.layout import Coverage

COVERAGES = st.sampled_from([Coverage(), Coverage("state"), *(Coverage.window(w) for w in (1, 2, 3, 20))])


def positions(coverage: Coverage, boundary: int) -> range:
    if coverage.kind == "all":
        return range(boundary)
    if coverage.kind == "window":
        return range(max(0, boundary - coverage.blocks), boundary)
    return range(max(0, boundary - 1), boundary)


@given(st.lists(st.tuples(COVERAGES, st.lists(st.booleans(), min_size=9, max_size=9)), min_size=1, max_size=4))
def test_covered_prefix_is_the_longest_that_all_groups_supply(rows: list[tuple[Coverage, list[bool]]]) -> None:
    fine = [b for b in range(10) if all(all(held[i] for i in positions(rule, b)) for rule, held in rows)]
    assert covered_prefix(np.array([held for _, held in rows]), [rule for rule, _ in rows]) == fine[-1]


@given(st.lists(COVERAGES, min_size=1, max_size=4), st.integers(0, 12))
def test_needed_is_what_covered_prefix_asks_for(coverages: list[Coverage], blocks: int) -> None:
    need = needed(coverages, blocks)
    assert need.shape == (len(coverages), blocks)
    for row, rule in zip(need, coverages, strict=True):
        assert np.flatnonzero(row).tolist() == list(positions(rule, blocks))
    assert covered_prefix(need, coverages) == blocks
    for lost in np.argwhere(need):
        without = need.copy()
        without[tuple(lost)] = False
        assert covered_prefix(without, coverages) < blocks


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="one coverage for each"):
        covered_prefix(np.ones((2, 3), bool), [Coverage()])
    with pytest.raises(ValueError, match="bool"):
        covered_prefix(np.ones((1, 3), np.int64), [Coverage()])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocks -1"):
        needed([Coverage()], -1)
