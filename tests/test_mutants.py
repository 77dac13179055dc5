"""The list of mutants does not rot: each still says where it belongs, and was caught (`make mutants`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutant import Mutant
from native_index import MUTANTS

TESTS = Path(__file__).parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_still_applies(mutant: Mutant) -> None:
    text = (TESTS.parent / mutant.file).read_text()
    assert mutant.applied(text) != text


def test_a_mutant_that_does_not_apply_is_told() -> None:
    with pytest.raises(ValueError, match=r"mutant x: its text occurs 2 times in y.cpp"):
        Mutant("x", "y.cpp", "a", "b", "nothing").applied("aa")


def test_all_were_caught() -> None:
    """To be repeated after a change of the list."""
    lines = (TESTS / "mutants" / "RESULTS.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [name.removeprefix("| ") for name, *_ in rows] == [mutant.name for mutant in MUTANTS]
    assert not [name for name, *_, found in rows if "SURVIVED" in found or "BROKEN" in found]
