"""Breaks the native index in many ways, one at a time, and tells which test notices.

Owns a copy of the tree in out/mutants, where each mutant of native_index.py is built and tested; the tree itself is
never touched. Only what a mutant changes is compiled again. RESULTS.md is the table; a run replaces the rows of the
mutants that it tried.

    python tests/mutants/run.py [--only NAME ...] [--seeds 1 2] [--steps 20000] [--jobs 1]

A mutant that a test by example catches is caught whatever the seed; others are tried with every seed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from mutant import Mutant
from native_index import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "out" / "mutants"
RESULTS = Path(__file__).with_name("RESULTS.md")
COPIED = ("CMakeLists.txt", "pyproject.toml", "data", "native", "flexkv_core", "tests")
MACHINE = "tests/test_index_machine.py"
TESTS = (
    "tests/test_index.py",
    "tests/test_index_evict.py",
    "tests/test_index_recover.py",
    "tests/test_index_native.py",
    "tests/test_policies.py",
    "tests/test_policies_s3fifo.py",
    "tests/test_index_lru_trace.py",
    MACHINE,
)
CHOSEN = "NativeIndex or not ReferenceIndex"
"""Tests of the reference alone cannot fail."""
SECONDS = 600
"""A test run that takes longer hangs; an unbroken one takes a tenth of it."""
SURVIVED, BROKEN = "SURVIVED", "BROKEN"


class Tree:
    """A copy of the tree with a build folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.build = folder / "build"
        self.clean = folder.with_name(folder.name + ".clean")  # the build of the unbroken tree

    def make(self) -> None:
        """Copy, configure, build; begin with the last run's build. At -O1: compiling takes longer than testing."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if self.clean.exists():
            shutil.copytree(self.clean, self.build)
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "build")
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.folder / name, ignore=ignored)
            else:
                shutil.copy2(ROOT / name, self.folder / name)
        nanobind = importlib.util.find_spec("nanobind")
        if nanobind is None or nanobind.origin is None:
            raise SystemExit("nanobind is not installed: see requirements/build.txt")
        configure: list[str | Path] = [
            tool("cmake"), "-S", self.folder, "-B", self.build, "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dnanobind_ROOT={Path(nanobind.origin).parent / 'cmake'}",
            "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
        ]  # fmt: skip
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        if error := self.compile():
            raise SystemExit(error)
        shutil.rmtree(self.clean, ignore_errors=True)
        shutil.copytree(self.build, self.clean)

    def compile(self) -> str:
        """Build what has changed; what the compiler says if it refuses."""
        made = subprocess.run([tool("ninja"), "-C", self.build, "-j2"], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            return made.stdout[-3000:]
        (library,) = self.build.glob("_native*.so")
        shutil.copy2(library, self.folder / "flexkv_core" / library.name)
        return ""

    def break_it(self, mutant: Mutant) -> str:
        path = self.folder / mutant.file
        path.write_text(mutant.applied(path.read_text()))
        return self.compile()

    def repair(self, mutant: Mutant) -> None:
        """As it was, times of files included, so that nothing else is compiled again."""
        shutil.copy2(ROOT / mutant.file, self.folder / mutant.file)
        shutil.rmtree(self.build)
        shutil.copytree(self.clean, self.build)

    def test(self, seed: int, steps: int, files: tuple[str, ...] = TESTS) -> str:
        """The first test that fails; SURVIVED if none does."""
        # -S: no .pth files, so that an editable installation does not come before this tree.
        command = [sys.executable, "-S", "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", "-k", CHOSEN, *files]
        path = os.pathsep.join([str(self.folder), *site.getsitepackages()])
        settings = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "FLEXKV_STEPS": str(steps), "FLEXKV_SEED": str(seed)}
        log = self.folder / "log"
        with log.open("w") as out:
            try:
                code = subprocess.run(
                    command, cwd=self.folder, env=os.environ | settings, timeout=SECONDS, check=False,
                    stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = None
        return verdict(code, log.read_text(errors="replace"))


def tool(name: str) -> str:
    """A program that lies beside this Python, or that PATH has."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        raise SystemExit(f"{name} is not installed: see requirements/build.txt")
    return found


def verdict(code: int | None, log: str) -> str:
    if code == 0:
        return SURVIVED
    begun: list[tuple[str, str]] = re.findall(r"^(tests/\S+\.py::.*?)(?: (PASSED|FAILED|ERROR|SKIPPED).*)?$", log, re.M)
    last = begun[-1][0].partition(" Fatal Python error")[0].strip() if begun else "collection"
    if code == 1:
        last = next((name for name, state in begun if state in ("FAILED", "ERROR")), last)
        steps = re.search(r"after (\d+) steps in all", log)
        return last.removeprefix("tests/") + (f" after {steps[1]} steps" if steps else "")
    return f"{'HANG' if code is None else f'CRASH ({code})'} in {last.removeprefix('tests/')}"


def judge(tree: Tree, mutant: Mutant, seeds: list[int], steps: int) -> list[str]:
    """What each seed found."""
    try:
        if error := tree.break_it(mutant):
            print(f"{mutant.name} does not compile:\n{error}", file=sys.stderr)
            return [BROKEN] * len(seeds)
        found = [tree.test(seeds[0], steps)]
        by_chance = found[0] == SURVIVED or Path(MACHINE).name in found[0]
        for seed in seeds[1:]:
            found.append(tree.test(seed, steps, (MACHINE,)) if by_chance else found[0])
        return found
    finally:
        tree.repair(mutant)


def judge_all(mutants: list[Mutant], seeds: list[int], steps: int, jobs: int) -> Iterator[tuple[Mutant, list[str]]]:
    """In the order of the list."""
    trees: SimpleQueue[Tree] = SimpleQueue()
    for number in range(jobs):
        tree = Tree(WORK / f"tree{number}")
        tree.make()
        trees.put(tree)
    for seed in seeds:
        if (found := tree.test(seed, steps)) != SURVIVED:
            raise SystemExit(f"the unbroken tree fails with seed {seed}: {found}")

    def one(mutant: Mutant) -> list[str]:
        mine = trees.get()
        begun = time.monotonic()
        try:
            return judge(mine, mutant, seeds, steps)
        finally:
            trees.put(mine)
            print(f"{mutant.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        yield from zip(mutants, pool.map(one, mutants), strict=True)


def row(mutant: Mutant, found: list[str]) -> str:
    told = "; ".join(f"`{each}`" for each in dict.fromkeys(found)).replace("|", "/")
    return f"| {mutant.name} | {Path(mutant.file).name} | {mutant.breaks} | {told} |"


def write(rows: dict[str, str]) -> None:
    """Put these rows among those that RESULTS.md has; mutants that are no longer there leave it."""
    known = dict(rows)
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else []:
        if line.startswith("| "):
            known.setdefault(line.split(" | ")[0].removeprefix("| "), line)
    listed = [known[each.name] for each in MUTANTS if each.name in known]
    caught = sum(not re.search(f"`({SURVIVED}|{BROKEN})`", line) for line in listed)
    RESULTS.write_text(
        "# Mutants of the native index, and the first test that catches each\n\n"
        f"Written by `make mutants`. {caught} of {len(MUTANTS)} are caught, whatever the seed of the state machine.\n\n"
        "| mutant | file | what it breaks | caught by |\n|---|---|---|---|\n" + "\n".join(listed) + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some mutants")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="of the state machine, FLEXKV_SEED")
    parser.add_argument("--steps", type=int, default=20000, help="of the state machine, FLEXKV_STEPS")
    parser.add_argument("--jobs", type=int, default=1, help="trees to work in at once")
    options = parser.parse_args()
    chosen = [each for each in MUTANTS if not options.only or each.name in options.only]
    if unknown := set(options.only or []) - {each.name for each in chosen}:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")

    rows: dict[str, str] = {}
    alive = []
    for mutant, found in judge_all(chosen, options.seeds, options.steps, options.jobs):
        rows[mutant.name] = row(mutant, found)
        print(rows[mutant.name], flush=True)
        if {SURVIVED, BROKEN} & set(found):
            alive.append(mutant.name)
        write(rows)
    print(f"{len(rows) - len(alive)} of {len(rows)} mutants are caught.", *alive)
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
