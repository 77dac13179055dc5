"""Apply each mutant of `manager.py` to a copy of flexkv_core and see which test notices.

    python tests/mutants/run_manager.py [--jobs N] [NAME ...]

Writes RESULTS-manager.md beside this file, unless names are given. Exit code 1 if a mutant survives. Nothing is
built: the copy has the extension of the working tree. Tier processes run unchanged code; no mutant is of theirs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from manager import CLASSES, MUTANTS, PLANNER, POOL, Mutant

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
SURVIVED = "SURVIVED"
LIMIT_S = 600


def test_files() -> list[str]:
    """Quick files first."""
    named = {POOL, CLASSES, "test_simulate.py", PLANNER}
    found = sorted(path.name for path in (REPOSITORY / "tests").glob("test_manager*.py"))
    options = sorted(path.name for path in (REPOSITORY / "tests").glob("test_planner_*.py"))
    return [
        name
        for name in [POOL, CLASSES, *found, "test_simulate.py", *options, PLANNER]
        if name in named | {*found, *options}
    ]


def native_extension() -> Path:
    """The built extension that this interpreter would import."""
    code = "import flexkv_core._native as n; print(n.__file__)"
    return Path(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def snapshot(to: Path) -> None:
    """Copy what is needed, so that the working tree may change meanwhile."""
    for name in ("flexkv_core", "tests", "backends"):
        shutil.copytree(REPOSITORY / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy2(REPOSITORY / "pyproject.toml", to)
    extension = native_extension()
    shutil.copy2(extension, to / "flexkv_core" / extension.name)


def verdict(mutant: Mutant, tree: Path) -> str:
    """The first test that failed, or SURVIVED."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        package = Path(folder) / "flexkv_core"
        shutil.copytree(tree / "flexkv_core", package, ignore=shutil.ignore_patterns("__pycache__"))
        target = package / mutant.file
        target.write_text(mutated(mutant, target.read_text()))
        # -S, -P and a path of our own: an editable install and the working directory would come before PYTHONPATH.
        site = [path for path in sys.path if "site-packages" in path]
        sources = [str(path) for path in sorted((tree / "backends").glob("*/src"))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sources, *site])}
        command = [sys.executable, "-S", "-P", "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
        for files in ([mutant.first], [name for name in test_files() if name != mutant.first]):
            try:
                done = subprocess.run(
                    [*command, *(f"tests/{name}" for name in files)],
                    cwd=tree,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=LIMIT_S,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return f"{files[0]} did not end"
            failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
            if done.returncode == 1 and failed:
                return failed.group(1)
            if done.returncode:
                raise RuntimeError(f"{mutant.name}: pytest ended with {done.returncode}: {done.stdout} {done.stderr}")
    return SURVIVED


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the mutant in it. Raises ValueError where its text is not to be found exactly once."""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: its text occurs {text.count(mutant.old)} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not arguments.names or mutant.name in arguments.names]
    results = {}
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool,
    ):
        snapshot(Path(folder))
        waiting = {pool.submit(verdict, mutant, Path(folder)): mutant.name for mutant in chosen}
        for done in concurrent.futures.as_completed(waiting):
            results[waiting[done]] = done.result()
            print(f"{waiting[done]}: {done.result()}", flush=True)
    killed = sum(result != SURVIVED for result in results.values())
    if not arguments.names:
        lines = [
            "# Mutants of planner, scheduler and manager",
            "",
            f"{killed} of {len(chosen)} were killed. Written by `python tests/mutants/run_manager.py`.",
            "",
            "| mutant | file | breaks | first test that failed |",
            "|---|---|---|---|",
            *(f"| {m.name} | {m.file} | {m.breaks} | `{results[m.name]}` |" for m in chosen),
        ]
        (HERE / "RESULTS-manager.md").write_text("\n".join(lines) + "\n")
    return int(killed < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
