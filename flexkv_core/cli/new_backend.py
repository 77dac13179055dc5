"""`flexkv backends new`: writes a package with a backend that works, and its conformance test.

Owns the names that are allowed and the files that are written; what is in them is in `templates/`.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import click

from flexkv_core.backend import CONTRACT_VERSION
from flexkv_core.cli.output import OutputError
from flexkv_core.plugins import INSTALL_HINTS

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
MOST = 40


@click.command("new", short_help="Write a package for a new backend.")
@click.argument("name")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    help="Where to write it; must not exist. Default: flexkv-backend-NAME.",
)
@click.option(
    "--addressing",
    type=click.Choice(["key", "slot"]),
    default="key",
    show_default=True,
    help="key: stored by block key. slot: the core chooses where a block lies.",
)
def new_backend_command(name: str, directory: Path | None, addressing: str) -> None:
    """Write a package for backend NAME: pyproject with entry point, backend, conformance test, README."""
    if not NAME.fullmatch(name) or len(name) > MOST:
        raise click.BadParameter(
            f"{name!r}: use lower-case letters, digits and single dashes, beginning with a letter, {MOST} at most",
            param_hint="NAME",
        )
    if name in INSTALL_HINTS:
        raise click.BadParameter(f"{name!r} is a backend of FlexKV's own: choose another name", param_hint="NAME")
    distribution = f"flexkv-backend-{name}"
    written = write_package(directory or Path(distribution), name, addressing)
    click.echo(f"{len(written)} files written to {directory or distribution}. Next:")
    click.echo(f"  pip install -e '{directory or distribution}[test]' && pytest {directory or distribution}")


def write_package(directory: Path, name: str, addressing: str) -> list[Path]:
    """Write the files of a package to a new directory. Raises OutputError if it exists or cannot be written."""
    module = f"flexkv_backend_{name.replace('-', '_')}"
    values = {
        "@NAME@": name,
        "@DISTRIBUTION@": f"flexkv-backend-{name}",
        "@MODULE@": module,
        "@CLASS@": "".join(part.capitalize() for part in name.split("-")),
        "@VERSION@": str(CONTRACT_VERSION),
    }
    files = {
        "pyproject.toml": "pyproject.toml.txt",
        "README.md": "README.md.txt",
        f"src/{module}/__init__.py": f"{addressing}.py.txt",
        "tests/test_conformance.py": "test_conformance.py.txt",
    }
    templates = resources.files("flexkv_core.cli") / "templates"
    try:
        directory.mkdir(parents=True)
        for target, template in files.items():
            text = (templates / template).read_text(encoding="utf-8")
            for mark, value in values.items():
                text = text.replace(mark, value)
            path = directory / target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except FileExistsError:
        raise OutputError(f"--directory {directory}: exists; name one that does not") from None
    except OSError as error:
        raise OutputError(f"--directory {directory}: cannot be written: {error.strerror}") from error
    return [directory / target for target in files]
