"""Each mutant of planner, scheduler and manager still applies, compiles, and was killed when the list was last run."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent / "mutants"
PACKAGE = HERE.parent.parent / "flexkv_core"


def mutants() -> ModuleType:
    spec = importlib.util.spec_from_file_location("manager_mutants", HERE / "manager.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mutant_applies_once_and_is_python() -> None:
    listed = mutants().MUTANTS
    assert len(listed) >= 30
    assert len({mutant.name for mutant in listed}) == len(listed)
    for mutant in listed:
        text = (PACKAGE / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{mutant.name}: adapt it to {mutant.file}"
        changed = text.replace(mutant.old, mutant.new)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), f"{mutant.name} changes nothing"
        assert (HERE.parent / mutant.first).exists()


def test_the_results_are_of_this_list_and_none_survived() -> None:
    results = (HERE / "RESULTS-manager.md").read_text()
    assert "SURVIVED" not in results
    for mutant in mutants().MUTANTS:
        assert f"| {mutant.name} |" in results, f"{mutant.name}: run tests/mutants/run_manager.py"
