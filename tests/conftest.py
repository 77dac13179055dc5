"""Fixtures that several test files use."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from index_examples import INDEXES, MakeIndex, add
from leaks import Leaks, no_leaks
from ssd_plugin import SSD

from flexkv_core import plugins
from flexkv_core.index import Index
from flexkv_core.policies import Eviction

# Stages of their own, in environments of their own: `make test-engine`, `make test-dynamo`.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["engine", "engine_dynamo"]

Install = Callable[..., None]
Make = Callable[[str | Eviction], Index]


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a plug-in as pip would: a module and a .dist-info with an entry point, on sys.path.

    Called with the plug-in's name and the module's source; `version`, `distribution`, the entry point's `group`, and
    `attribute`, what of the module it names, may be given.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    modules: list[str] = []

    def install(
        name: str,
        source: str,
        distribution: str | None = None,
        version: str = "1.0",
        group: str = "flexkv.backends",
        attribute: str = "",
    ) -> None:
        distribution = distribution or f"plugin-{name}"
        module = distribution.replace("-", "_")
        modules.append(module)
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}{attribute}\n")
        plugins.forget_loaded()

    yield install
    plugins.forget_loaded()
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def leak_check() -> Iterator[Leaks]:
    """Fails the test at its end if it leaves descriptors, threads, children or shared memory behind."""
    with no_leaks() as leaks:
        yield leaks


@pytest.fixture(params=INDEXES, ids=lambda made: made.__name__)
def make_index(request: pytest.FixtureRequest) -> MakeIndex:
    """Each implementation of the index."""
    made: MakeIndex = request.param
    return made


@pytest.fixture
def index(make_index: MakeIndex) -> Index:
    """Two tiers, lru; one namespace with one group."""
    made = make_index(2)
    add(made)
    return made


@pytest.fixture
def make(make_index: MakeIndex) -> Make:
    """An index with one tier of that policy, and one namespace of one group."""

    def made(policy: str | Eviction) -> Index:
        index = make_index(1, [policy])
        add(index)
        return index

    return made


@pytest.fixture
def gates(install_plugin: Install) -> None:
    """The backends `gate`, `sharedgate` and `slotgate` of `gates.py`, installed."""
    install_plugin("gate", "from gates import gate_backend as flexkv_backend")
    install_plugin("sharedgate", "from gates import shared_gate_backend as flexkv_backend")
    install_plugin("slotgate", "from gates import slot_gate_backend as flexkv_backend")


@pytest.fixture
def ssd(install_plugin: Install) -> None:
    """The backend that flat files speak of, installed."""
    install_plugin("ssd", SSD)
