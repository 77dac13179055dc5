"""Imports point down only, and the check that says so can see a violation."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(REPOSITORY / "scripts" / "check_imports.py"))
check: Callable[[Path], list[str]] = SCRIPT["check"]


def tree(root: Path, **files: str) -> Path:
    """Write files whose names have __ for / and no suffix; all of flexkv_core's that are imported exist."""
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_repository_keeps_its_layers() -> None:
    assert check(REPOSITORY) == []


def test_no_name_is_in_two_layers() -> None:
    names = [name for row in SCRIPT["LAYERS"] for name in row]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("importer", "statement", "told"),
    [
        ("layout", "from flexkv_core.blocks import Namespace", "layout imports flexkv_core.blocks"),
        ("layout", "from flexkv_core import blocks", "layout imports flexkv_core.blocks"),
        ("layout", "import flexkv_core.manager", "layout imports flexkv_core.manager"),
        ("layout", "from .manager import KVCacheManager", "layout imports flexkv_core.manager"),
        ("layout", "from . import manager", "layout imports flexkv_core.manager"),
        ("layout", "def f():\n    import flexkv_core.cli.main", "layout imports flexkv_core.cli.main"),
        ("index__tree", "from ..planner import Planner", "index imports flexkv_core.planner"),
        ("manager", "from flexkv_core.simulate import run", "manager imports flexkv_core.simulate"),
        ("tier_process", "from flexkv_core.testing import BackendConformance", "imports flexkv_core.testing"),
        ("plugins", "from flexkv_core.nowhere import x", "flexkv_core.nowhere is in no layer; add it"),
        ("novelty", "x = 1", "flexkv_core.novelty is in no layer; add it to LAYERS"),
        ("manager", "import flexkv_backend_ssd", "flexkv_backend_ssd, a plug-in"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, importer: str, statement: str, told: str) -> None:
    plug_in = {"backends__ssd__src__flexkv_backend_ssd____init": ""}
    root = tree(tmp_path, **{f"flexkv_core__{importer}": statement, **plug_in})
    (problem,) = check(root)
    assert told in problem
    line = statement.count("\n") + 1
    assert problem.startswith(f"flexkv_core/{importer.replace('__', '/')}.py:{line}:")


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("manager", "from flexkv_core.errors import FlexKVError"),
        ("manager", "from flexkv_core import _native, __version__"),
        ("cli__main", "from flexkv_core.cli.replay import run\nfrom .plot import plot\nimport json, numpy"),
        ("tier_process", "from flexkv_core.testing.faults import FaultyBackend"),
        ("scheduler", "from flexkv_core.tier_link import TierLink\nfrom flexkv_core.planner import Planner"),
        ("tier_link", "from flexkv_core.tier_wire import encode"),
    ],
)
def test_imports_that_are_allowed(tmp_path: Path, importer: str, statement: str) -> None:
    assert check(tree(tmp_path, **{f"flexkv_core__{importer}": statement})) == []


def test_a_backend_may_import_the_contract_only(tmp_path: Path) -> None:
    fine = "from flexkv_core.backend import Batch\nfrom flexkv_core import backend\nfrom .other import x"
    source = "backends__ssd__src__flexkv_backend_ssd__main"
    assert check(tree(tmp_path, **{source: fine})) == []
    (problem,) = check(tree(tmp_path, **{source: fine + "\nfrom flexkv_core.layout import PAGE"}))
    assert "a backend imports flexkv_core.layout" in problem
    assert "main.py:4:" in problem


def test_the_script_fails_on_a_violation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path, flexkv_core__errors="from flexkv_core.layout import PAGE")
    assert SCRIPT["main"]([str(root)]) == 1
    assert "errors imports flexkv_core.layout" in capsys.readouterr().out
    assert SCRIPT["main"]([str(REPOSITORY)]) == 0
