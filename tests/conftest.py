"""Fixtures that several test files use."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexkv_core import plugins

Install = Callable[..., None]


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a plug-in as pip would: a module and a .dist-info with an entry point, on sys.path.

    Called with the backend's name and the module's source; `version` and `distribution` may be given.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    modules: list[str] = []

    def install(name: str, source: str, distribution: str | None = None, version: str = "1.0") -> None:
        distribution = distribution or f"plugin-{name}"
        module = distribution.replace("-", "_")
        modules.append(module)
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[flexkv.backends]\n{name} = {module}\n")
        plugins.forget_loaded()

    yield install
    plugins.forget_loaded()
    for module in modules:
        sys.modules.pop(module, None)
