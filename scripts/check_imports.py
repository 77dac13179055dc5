"""Check that imports point down only.

Owns the table of layers. A module of `flexkv_core` may import from the rows below its own and, within one
folder, from that folder. A backend's distribution may import `flexkv_core.backend` and nothing deeper; the core
imports no backend. Run: python scripts/check_imports.py [ROOT]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

CORE = "flexkv_core"

LAYERS: tuple[tuple[str, ...], ...] = (
    # engines
    ("connectors",),
    # shells
    ("cli",),
    ("server", "testing"),
    # lookup, fetch, load, store, reset; the same without bytes
    ("manager", "simulate"),
    ("copying",),
    ("fetching",),
    ("books", "handles", "namespaces"),
    # what moves where; when; isolation
    ("scheduler",),
    ("reading",),
    ("writing", "probing"),
    ("tier_queue",),
    ("tier_health",),
    ("planner", "tier_inline", "tier_process"),
    ("tier_link", "write_through", "recovery", "hints"),
    ("tier_worker", "ledger"),
    ("turns",),
    ("tier_wire", "tier_submit", "plans", "tier_book", "pins"),
    # what is where
    ("presence", "failures", "changes"),
    ("index",),
    ("pool", "ranks"),
    ("model_groups",),
    # what a stack says, devices, discovery of plug-ins, policies (which plug-ins may bring)
    ("config", "device", "models"),
    ("policies", "testing.faults", "breaker"),
    ("plugins",),
    # what a backend's author reads, and helpers of bytes
    ("backend",),
    ("seal",),
    ("region", "epochs"),
    # keys, geometry: no I/O
    ("arguments",),
    ("blocks", "locks", "framing", "logs", "identity"),
    ("layout",),
    ("errors", "_native", "__init__"),
)
"""Top to bottom. A name is a module or folder of flexkv_core; `__init__` is flexkv_core itself."""

ROW = {name: row for row, names in enumerate(LAYERS) for name in names}


def check(root: Path) -> list[str]:
    """Return one line for each import that points up or nowhere, as ``path:line: what; the fix``."""
    problems = []
    for path in sorted((root / CORE).rglob("*.py")):
        problems += _check_core(root, path)
    for path in sorted((root / "backends").glob("*/src/**/*.py")):
        problems += _check_backend(root, path)
    return problems


def _check_core(root: Path, path: Path) -> list[str]:
    module, where = _module(path.relative_to(root)), path.relative_to(root)
    unit = _unit(module)
    if unit is None:
        return [f"{where}:1: {module} is in no layer; add it to LAYERS in scripts/check_imports.py"]
    plug_ins = {each.name for each in root.glob("backends/*/src/*") if each.is_dir() or each.suffix == ".py"}
    problems = []
    for line, target in _imports(root, path):
        top = target.split(".")[0]
        if top in plug_ins:
            problems.append(f"{where}:{line}: imports {target}, a plug-in; find it through flexkv_core.plugins")
        if top != CORE:
            continue
        below = _unit(target)
        if below is None:
            problems.append(f"{where}:{line}: {target} is in no layer; add it to LAYERS in this script")
        elif below != unit and ROW[below] <= ROW[unit]:
            problems.append(f"{where}:{line}: {unit} imports {target}, which is not below it; see LAYERS")
    return problems


def _check_backend(root: Path, path: Path) -> list[str]:
    where = path.relative_to(root)
    return [
        f"{where}:{line}: a backend imports {target}; it may import {CORE}.backend and nothing deeper"
        for line, target in _imports(root, path)
        if target.split(".")[0] == CORE and target != f"{CORE}.backend"
    ]


def _module(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _unit(module: str) -> str | None:
    """The name in LAYERS that a module belongs to: the longest one that fits."""
    names = module.split(".")[1:] or ["__init__"]
    for length in range(len(names), 0, -1):
        name = ".".join(names[:length])
        if name in ROW:
            return name
    return None


def _imports(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module) for every import of a file, those in functions and for type checkers included."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join((*above, base) if base else above)
            yield from (
                (node.lineno, name) for name in sorted({_submodule(root, base, each.name) for each in node.names})
            )


def _submodule(root: Path, base: str, name: str) -> str:
    """``from base import name`` imports base.name where that is a module, else base."""
    folder = root.joinpath(*base.split("."))
    named = (folder / name, folder / f"{name}.py", folder / f"{name}.pyi")
    if any(each.exists() for each in named) or (base == CORE and name in ROW):
        return f"{base}.{name}"
    return base


def main(argv: list[str]) -> int:
    root = Path(argv[0]) if argv else Path(__file__).resolve().parent.parent
    problems = check(root)
    for problem in problems:
        print(problem)
    print(f"imports: {len(problems)} problem(s)" if problems else "imports: all point down")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
