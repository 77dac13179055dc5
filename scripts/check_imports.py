"""Check that imports point down, as docs/design.md lays the layers out. Exit 1 and a line for each that does not."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PACKAGE = "flexkv_core"
LAYERS = [
    ["cli"],
    ["simulate", "manager", "handles"],
    ["books", "scheduler"],
    ["planner", "tier_link", "tier_inline", "tier_process"],
    ["plans", "tier_worker", "tier_wire"],
    ["pool", "presence", "index"],
    ["config"],
    ["plugins", "policies", "device", "testing", "models"],
    ["seal"],
    ["region"],
    ["backend"],
    ["blocks", "layout", "locks"],
    ["errors", "_native", "__version__"],
]
"""Top to bottom. A module imports from lower layers and its own only."""
ALLOWED_IN_BACKENDS = {f"{PACKAGE}.backend"}


def layer_of(module: str) -> int | None:
    """Number of the layer of `flexkv_core.<name>...`, None for the package itself; KeyError for unknown ones."""
    parts = module.split(".")
    if len(parts) < 2:
        return None
    for number, names in enumerate(LAYERS):
        if parts[1] in names:
            return number
    raise KeyError(parts[1])


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of this package in a file; a relative import counts as the package itself."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names if name.name.split(".")[0] == PACKAGE]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            if node.module == PACKAGE:
                found += [(node.lineno, f"{PACKAGE}.{name.name}") for name in node.names]
            else:
                found.append((node.lineno, node.module))
    return found


def violations(root: Path) -> list[str]:
    """One line for each import that points up or is unknown."""
    lines = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for line, target in imports_of(path):
            try:
                mine, theirs = layer_of(module), layer_of(target)
            except KeyError as unknown:
                lines.append(f"{path.relative_to(root)}:{line}: {unknown} is in no layer: add it to LAYERS")
                continue
            if mine is not None and theirs is not None and theirs < mine:
                lines.append(f"{path.relative_to(root)}:{line}: imports {target}, which lies above it")
    for path in sorted((root / "backends").glob("*/src/**/*.py")):
        for line, target in imports_of(path):
            if target not in ALLOWED_IN_BACKENDS:
                lines.append(f"{path.relative_to(root)}:{line}: imports {target}: a backend imports the contract only")
    return lines


if __name__ == "__main__":
    found = violations(Path(__file__).resolve().parent.parent)
    print("\n".join(found) or "imports point down")
    sys.exit(bool(found))
