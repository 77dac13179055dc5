"""What the READMEs tell a stranger to write and to type: run as it stands there."""

from __future__ import annotations

import gzip
import re
import shlex
import time
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import Install
from helpers import SLOT_BYTES, Engine, prompt

from flexkv_core.backend import ENTRY_POINT_GROUP
from flexkv_core.cli.main import main
from flexkv_core.config import load_stack
from flexkv_core.manager import KVCacheManager

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
READMES = sorted(path for path in REPOSITORY.rglob("*.md") if not {".venv", ".venv-engine", "build"} & set(path.parts))


def blocks(language: str, path: Path = README) -> list[str]:
    """The fenced blocks of one language, "" for those without."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def stack_file(folder: Path) -> Path:
    """README's stack, its directory moved into the test's folder and its host memory made small."""
    (text,) = blocks("yaml")
    moved = text.replace("/var/cache/flexkv", str(folder / "blocks")).replace("capacity: 4GiB", "capacity: 64MiB")
    assert moved.count("64MiB") == 1
    file = folder / "stack.yaml"
    file.write_text(moved)
    return file


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_stack_of_the_documentation_is_valid(path: Path, tmp_path: Path) -> None:
    for text in blocks("yaml", path):
        file = tmp_path / "stack.yaml"
        file.write_text(text)
        assert load_stack(file).tiers


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_valid(path: Path) -> None:
    assert load_stack(path).tiers


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_library_example_runs_and_loads_what_it_stored() -> None:
    library = blocks("python")[0]
    names: dict[str, object] = {}
    content = "for layer, tensor in enumerate(pages):\n    tensor[:, :10] = 1 + layer\n"
    before, manager = library.split("with KVCacheManager")
    exec(compile(before + content + "with KVCacheManager" + manager, "README.md", "exec"), names)
    for layer, tensor in enumerate(names["pages"]):  # type: ignore[arg-type, var-annotated]
        assert (tensor[:, 20:30] == 1 + layer).all()
        assert (tensor[:, 10:20] == 0).all()


def test_the_backend_example_serves_blocks(install_plugin: Install) -> None:
    (metadata,) = map(tomllib.loads, blocks("toml"))
    ((name, module),) = metadata["project"]["entry-points"][ENTRY_POINT_GROUP].items()
    install_plugin(name, blocks("python")[1], distribution=module)
    tiers = [
        {"backend": "cpu", "capacity": 16 * SLOT_BYTES},
        {"backend": name, "write_queue": 16 * SLOT_BYTES, "label": "attic"},
    ]
    with KVCacheManager.open({"block_size": 16, "tiers": tiers}) as manager:
        engine = Engine(manager)
        deadline = time.monotonic() + 20
        while manager.stats()["tiers"][name]["state"] != "ready":
            assert time.monotonic() < deadline, manager.stats()
            time.sleep(0.01)
        for seed in range(4):
            engine.store(engine.keys(prompt(seed, 8)))
            assert manager.drain(10)
        assert engine.load(engine.keys(prompt(0, 8))) == (8, 0, {"cpu": 0, name: 8})


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with gzip.open(REPOSITORY / "data" / "conversation_trace.jsonl.gz", "rt") as lines:
        head = [next(lines) for _ in range(20)]
    (tmp_path / "conversation_trace.jsonl").write_text("".join(head))
    stack_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^flexkv (.*)$", README.read_text(), re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        result = CliRunner().invoke(main, shlex.split(command, comments=True))
        assert result.exit_code == 0, (command, result.output)
    assert (tmp_path / "hits.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figures.json").exists()


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for path in READMES:
        for target in re.findall(r"`?\bmake ([a-z]+)`", path.read_text()):
            assert target in targets, (path, target)
    for line in re.findall(r"^make ([a-z]+) ", README.read_text(), re.MULTILINE):
        assert line in targets, line
