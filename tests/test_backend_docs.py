"""docs/backends.md quotes examples/redis_backend, which is short, formatted, and imports the contract only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "backends.md").read_text()
EXAMPLE = REPOSITORY / "examples" / "redis_backend"
SOURCE = (EXAMPLE / "src" / "flexkv_backend_redis" / "__init__.py").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def lines(text: str) -> str:
    """Without indentation and empty lines: on the page a method stands alone."""
    return "".join(f"{line.strip()}\n" for line in text.splitlines() if line.strip())


def test_the_page_shows_the_code_that_runs() -> None:
    quoted = [block for block in blocks("python") if "BackendConformance" not in block]
    assert len(quoted) >= 6
    for block in quoted:
        assert lines(block) in lines(SOURCE), f"not in the example:\n{block}"
    for block in blocks("toml"):
        assert block in (EXAMPLE / "pyproject.toml").read_text()


def test_the_page_shows_every_duty_of_the_backend() -> None:
    for method in ("open", "read", "write", "probe", "delete", "list"):
        assert f"def {method}(self" in "".join(blocks("python"))


def test_it_is_under_80_lines_and_imports_the_contract_only() -> None:
    assert len(SOURCE.splitlines()) < 80
    modules = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {n.module if isinstance(n, ast.ImportFrom) else a.name for n in modules for a in n.names}
    assert {name for name in names if name and name.startswith("flexkv")} == {"flexkv_core.backend"}
