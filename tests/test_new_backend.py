"""`flexkv backends new`: what it writes installs, passes its own conformance test, and is clean."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flexkv_core.cli.main import main

CI = "answers or identity_of_groups or statuses or host_region or switch_often or short or in_flight or twice or probe"


def new(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["backends", "new", *arguments])


@pytest.mark.parametrize("addressing", ["key", "slot"])
def test_what_is_written_installs_and_passes_its_own_test(tmp_path: Path, addressing: str) -> None:
    made, site = tmp_path / "package", tmp_path / "site"
    result = new("my-store2", "--directory", str(made), "--addressing", addressing)
    assert result.exit_code == 0, result.output
    for command in (["format", "--check"], ["check"]):
        subprocess.run(["ruff", *command, "--isolated", "--line-length", "120", made], check=True, env=path())
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", site, made], check=True)
    chosen = [] if os.environ.get("FLEXKV_SOAK") == "1" else ["-k", CI]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", made, *chosen, made]
    done = subprocess.run(
        command, cwd=made, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def path() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_an_existing_directory_is_refused(tmp_path: Path) -> None:
    result = new("mine", "--directory", str(tmp_path))
    assert result.exit_code == 2
    assert "exists" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["Mine", "1st", "a_b", "a--b", "-a", "a-", "../x", "", "a b", "x" * 41, "cpu", "s3", "a\n"]
)
def test_names_that_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = new("--directory", str(tmp_path / "made"), "--", name)
    assert result.exit_code == 2
    assert "NAME" in result.output
    assert not (tmp_path / "made").exists()


def test_without_a_directory_it_is_named_after_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert new("mine").exit_code == 0
    assert (tmp_path / "flexkv-backend-mine" / "src" / "flexkv_backend_mine" / "__init__.py").exists()
