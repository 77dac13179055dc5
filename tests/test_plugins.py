"""Discovery of backends, through real distributions on sys.path."""

from __future__ import annotations

import pytest
from conftest import Install

from flexkv_core.backend import BackendSpec
from flexkv_core.errors import BackendLoadError, BackendNotFoundError
from flexkv_core.plugins import list_backends, load_backend

GOOD = """
    import flexkv_core.backend as fk

    class Config(fk.BackendConfig):
        pass

    class Memory(fk.Backend):
        capabilities = fk.Capabilities(addressing="key")
        def __init__(self, config): pass
        def open(self, context): pass
        def read(self, batch): return [fk.Status.MISSING] * len(batch)
        def write(self, batch): return [fk.Status.OK] * len(batch)
        def close(self): pass

    @fk.hookimpl
    def flexkv_backend():
        return {spec}
"""
SPEC = 'fk.BackendSpec("mem", Config, Memory, contract_version=1, addressing="key")'


def test_the_backends_of_this_repository() -> None:
    assert load_backend("cpu").hosts
    assert load_backend("directory").addressing == "key"
    names = [info.name for info in list_backends()]
    assert names == sorted(names)
    assert {"cpu", "directory"} <= set(names)


def test_a_strangers_plugin(install_plugin: Install) -> None:
    install_plugin("mem", GOOD.format(spec=SPEC))
    spec = load_backend("mem")
    assert isinstance(spec, BackendSpec)
    assert spec.name == "mem"


@pytest.mark.parametrize("name", ["ssd", "s3", "rdma"])
def test_what_to_install(name: str) -> None:
    with pytest.raises(
        BackendNotFoundError, match=f"backend '{name}' is not installed: pip install flexkv-backend-{name}"
    ):
        load_backend(name)


def test_the_nearest_name() -> None:
    with pytest.raises(BackendNotFoundError, match="did you mean 'directory'"):
        load_backend("directroy")
    with pytest.raises(BackendNotFoundError, match="known ones are cpu, directory"):
        load_backend("zzzz")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "import nothing_of_this_name",
            "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name'",
        ),
        ("raise SystemError('at import')", "cannot be imported: SystemError: at import"),
        ("x = 1", "has no hook flexkv_backend"),
        (GOOD.format(spec="42"), "returned a int from its hook: return a BackendSpec"),
        (GOOD.format(spec="1 / 0"), "failed in its hook: ZeroDivisionError"),
        (
            GOOD.format(spec=SPEC.replace("contract_version=1", "contract_version=2")),
            r"version 2 of the backend contract, this flexkv-core speaks version 1: upgrade flexkv-core",
        ),
        (
            GOOD.format(spec=SPEC.replace("contract_version=1", "contract_version=0")),
            r"version 0 of the backend contract, this flexkv-core speaks version 1: upgrade the plug-in",
        ),
        (GOOD.format(spec=SPEC.replace('"mem"', '"other"')), "calls itself 'other'"),
        (GOOD.format(spec=SPEC.replace("Config", "dict")), "config_model must be a subclass"),
        (GOOD.format(spec=SPEC.replace("Memory", "None")), "factory must be callable"),
        (GOOD.format(spec=SPEC.replace('"key"', '"both"')), "addressing 'both' must be"),
    ],
)
def test_a_broken_plugin_is_named_and_takes_no_other_down(install_plugin: Install, source: str, says: str) -> None:
    install_plugin("mem", source, version="3.1")
    with pytest.raises(BackendLoadError, match=says) as caught:
        load_backend("mem")
    assert "backend 'mem' of plugin-mem 3.1" in str(caught.value)
    found = {info.name: info for info in list_backends()}
    assert found["mem"].error == str(caught.value)
    assert found["mem"].spec is None
    assert found["cpu"].error is None
    assert load_backend("directory").name == "directory"


def test_two_distributions_of_one_backend_are_refused(install_plugin: Install) -> None:
    install_plugin("mem", GOOD.format(spec=SPEC), distribution="first-mem")
    install_plugin("mem", GOOD.format(spec=SPEC), distribution="second-mem")
    with pytest.raises(BackendLoadError, match=r"first-mem 1.0 and second-mem 1.0: uninstall one"):
        load_backend("mem")
