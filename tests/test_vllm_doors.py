"""The ways into vLLM, without vLLM: what is configured and where, the plug-in, the original FlexKV, docs/vllm.md."""

from __future__ import annotations

import email
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tomllib
import types
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder
from server_rig import until

from flexkv_core.config.flat_keys import CONFIG_PATH, VARIABLES
from flexkv_core.connectors import vllm_plugin
from flexkv_core.connectors.original import original_flexkv
from flexkv_core.connectors.vllm_config import ConnectorKeys, connector_config
from flexkv_core.errors import SocketPathError, StackConfigError

pytestmark = pytest.mark.usefixtures("leak_check")

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "vllm.md").read_text()
COMPAT = REPOSITORY / "compat" / "flexkv"


def tiers(name: str, capacity: str = "4MiB") -> dict[str, Any]:
    return {"tiers": [{"backend": "cpu", "name": name, "capacity": capacity, "prefault": False}]}


# ---------------------------------------------------------------- configuration


def test_the_connectors_own_stack_goes_first_then_the_path_then_variables(tmp_path: Path) -> None:
    named, given = tmp_path / "named.json", tmp_path / "given.yaml"
    named.write_text(json.dumps(tiers("named")))
    given.write_text(json.dumps(tiers("given")))
    environ = {"FLEXKV_CONFIG_PATH": str(named), "XDG_RUNTIME_DIR": str(tmp_path)}

    def first(extra: dict[str, Any], environ: dict[str, str]) -> str:
        return connector_config(extra, environ).loaded.stack.tiers[0].name

    assert first({"stack": tiers("inline")}, environ) == "inline"
    assert first({"stack": str(given)}, environ) == "given"
    assert first({}, environ) == "named"
    loaded = connector_config({}, {"FLEXKV_CPU_CACHE_GB": "3", "FLEXKV_SERVER_RECV_PORT": "ipc:///run/a"})
    capacity = loaded.loaded.stack.tiers[0].capacity
    assert capacity is not None
    assert capacity.bytes == 3 << 30
    assert loaded.socket == Path("/run/a")
    both = connector_config({"socket": "/run/b"}, {"FLEXKV_SERVER_RECV_PORT": "/run/a"})
    assert both.socket == Path("/run/b")
    assert not connector_config({}, {"ENABLE_FLEXKV": "0", "FLEXKV_SERVER_RECV_PORT": "/run/a"}).enabled


@pytest.mark.parametrize(
    ("extra", "key", "said"),
    [
        ({"fetch": 1}, "fetch", "did you mean 'fetch_s'?"),
        ({"stacks": {}}, "stacks", "did you mean 'stack'?"),
        ({"enforce_handshake_compat": 1}, "enforce_handshake_compat", "known keys are call_s, fetch_s"),
        (tiers("a"), "tiers", "is a key of a stack: write it below the key stack"),
        ({"cpu_cache_gb": 1}, "cpu_cache_gb", "is a key of a stack: write it below the key stack"),
        ({"fetch_s": "5"}, "fetch_s", "'5': input should be a valid number"),
        ({"call_s": 0}, "call_s", "input should be greater than 0"),
        ({"stack": 7}, "stack", "7: a stack is a mapping with the key tiers, or the path of a YAML or JSON file"),
        ({"stack": {}}, "stack", "a stack is a mapping"),
        ({"socket": 5555}, "socket", "5555: input should be a valid string"),
    ],
)
def test_a_wrong_key_is_named(extra: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(StackConfigError) as caught:
        connector_config(extra, {})
    assert str(caught.value).startswith(f"kv_connector_extra_config: {key}: ")
    assert said in str(caught.value)
    assert caught.value.key == key


def test_errors_in_a_stack_say_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(StackConfigError, match=r"tiers\[0\].capacity: .*\(the stack in kv_connector_extra_config\)"):
        connector_config({"stack": tiers("a", "much")}, {})
    file = tmp_path / "stack.yaml"
    file.write_text("tiers:\n  - backend: cpu\n    capacity: much\n")
    for extra, environ in (({"stack": str(file)}, {}), ({}, {"FLEXKV_CONFIG_PATH": str(file)})):
        with pytest.raises(StackConfigError, match=rf"^{re.escape(str(file))}:3:15: tiers\[0\].capacity: ") as caught:
            connector_config(extra, environ)
        assert caught.value.line == 3
    with pytest.raises(SocketPathError, match="local sockets"):
        connector_config({"stack": tiers("a"), "socket": "tcp://10.0.0.1:5555"}, {})


def test_the_server_that_is_started_gets_the_inline_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CONFIG_PATH", str(tmp_path / "none.yaml"))  # would be an error: it must not be read
    config = connector_config({"stack": tiers("inline"), "socket": str(tmp_path / "s"), "call_s": 5.0})
    client = config.client("e")
    assert client.welcome is not None
    pid = client.welcome.pid
    try:
        assert client.engine == "e"
        assert client.welcome.stack == config.loaded.digest
        assert list(client.stats()["tiers"]) == ["inline"]
    finally:
        client.close()
        os.kill(pid, signal.SIGTERM)
        until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)


def test_an_external_server_is_not_started(tmp_path: Path) -> None:
    environ = {"FLEXKV_SERVER_LAUNCH_MODE": "external", "FLEXKV_SERVER_RECV_PORT": str(tmp_path / "s")}
    client = connector_config({}, environ).client("e")
    assert client.stats() == {}
    client.close()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the plug-in


class InTree:
    """vLLM's own class."""


class Ours:
    """This project's."""


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Any]]:
    """A vLLM that is nothing but its factory of connectors, and a connector that can be imported."""

    class KVConnectorFactory:
        _registry: Any

    KVConnectorFactory._registry = {"FlexKVConnectorV1": lambda: InTree, "NixlConnector": lambda: object}
    name = "vllm.distributed.kv_transfer.kv_connector.factory"
    for end in [len(name), *(found.start() for found in re.finditer(r"\.", name))]:
        monkeypatch.setitem(sys.modules, name[:end], types.ModuleType(name[:end]))
    sys.modules[name].KVConnectorFactory = KVConnectorFactory  # type: ignore[attr-defined]
    ours = types.ModuleType("flexkv_core.connectors.vllm")
    ours.FlexKVConnector = Ours  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, ours.__name__, ours)
    return KVConnectorFactory


def test_the_entry_point_gives_both_names_this_projects_connector(factory: type[Any]) -> None:
    (entry,) = metadata.entry_points(group="vllm.general_plugins", name="flexkv")
    register = entry.load()
    others = dict(factory._registry)
    register()
    assert factory._registry["FlexKVConnectorV1"]() is Ours
    assert factory._registry["FlexKVConnector"]() is Ours
    assert factory._registry["NixlConnector"] is others["NixlConnector"]
    once = dict(factory._registry)
    register()
    assert factory._registry == once


def test_where_this_projects_connector_does_not_know_vllm_its_own_class_serves(
    factory: type[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "flexkv_core.connectors.vllm", None)
    vllm_plugin.register()
    assert factory._registry["FlexKVConnectorV1"]() is InTree
    assert "does not know this vLLM" in caplog.text
    with pytest.raises(ImportError):
        factory._registry["FlexKVConnector"]()


@pytest.mark.parametrize("shape", [None, [], {"FlexKVConnectorV1": ("module", "class")}])
def test_another_shape_of_vllm_is_left_alone(factory: type[Any], shape: Any, caplog: pytest.LogCaptureFixture) -> None:
    factory._registry = shape
    before = repr(shape)
    vllm_plugin.register()
    assert repr(factory._registry) == before
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "kv_connector_module_path" in record.getMessage()


def test_no_factory_is_no_crash(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    vllm_plugin.register()
    assert "is not registered with this vLLM" in caplog.text


def test_the_plugin_is_cheap_to_import() -> None:
    code = "import sys, flexkv_core.connectors.vllm_plugin; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = done.stdout.split()
    assert "flexkv_core.connectors.original" in loaded
    for heavy in ("numpy", "pydantic", "msgspec", "torch", "vllm", "flexkv_core._native", "flexkv_core.config"):
        assert heavy not in loaded


# ---------------------------------------------------------------- the original FlexKV


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is looked at first for packages and distributions."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "flexkv", raising=False)
    return folder


def distribution(site: Path, *requires: str) -> None:
    info = site / "flexkv-1.2.0.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        "Name: flexkv",
        "Version: 1.2.0",
        *(f"Requires-Dist: {each}" for each in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def package(site: Path, init: str | None) -> Path:
    folder = site / "flexkv"
    folder.mkdir()
    if init is not None:
        (folder / "__init__.py").write_text(init)
    return folder


def test_a_distribution_that_is_not_ours_is_refused(site: Path) -> None:
    distribution(site, "torch", "flexkv-core-lookalike>=1")
    found = original_flexkv()
    assert found is not None
    assert f"the distribution flexkv 1.2.0 in {site}" in found
    for said in ("pip uninstall flexkv", "pip install flexkv", "pip uninstall flexkv-core"):
        assert f"`{said}`" in found


@pytest.mark.parametrize("leftover", ["__init__.py", "c_ext.cpython-311-x86_64-linux-gnu.so"])
def test_a_package_that_is_not_ours_is_refused(site: Path, leftover: str) -> None:
    folder = package(site, "" if leftover == "__init__.py" else "# of flexkv_core\n")
    (folder / leftover).touch()
    assert str(folder / leftover) in (original_flexkv() or "")
    assert "flexkv" not in sys.modules, "it is not imported to find that out"


@pytest.mark.parametrize(
    "requires", [("flexkv-core", "flexkv-backend-cpu"), ("numpy", "flexkv_core>=0.1; python_version>'3'")]
)
def test_ours_is_ours(site: Path, requires: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(COMPAT / "src"))
    distribution(site, *requires)
    assert original_flexkv() is None


def test_a_folder_of_that_name_is_nobodys_package(site: Path) -> None:
    package(site, None)
    assert original_flexkv() is None


def test_where_both_are_installed_the_name_is_refused_and_nothing_else(factory: type[Any], site: Path) -> None:
    distribution(site)
    vllm_plugin.register()
    assert factory._registry["NixlConnector"]() is object
    assert factory._registry["FlexKVConnector"]() is Ours
    with pytest.raises(ImportError, match="pip uninstall flexkv"):
        factory._registry["FlexKVConnectorV1"]()


# ---------------------------------------------------------------- the distribution flexkv


def test_flexkv_brings_the_core_and_every_backend_of_this_repository(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(COMPAT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        (info,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        needs = set(email.message_from_bytes(opened.read(info)).get_all("Requires-Dist") or ())
    assert "flexkv/integration/vllm/vllm_v1_adapter.py" in names
    backends = [tomllib.loads(each.read_text()) for each in REPOSITORY.glob("backends/*/pyproject.toml")]
    assert len(backends) >= 2
    assert needs == {"flexkv-core", *(each["project"]["name"] for each in backends)}


# ---------------------------------------------------------------- docs/vllm.md


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def test_the_page_has_every_key_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*?) \|$", section("Configure"), re.MULTILINE)
    told = {name: default.strip("`") for name, default in rows}
    assert told.keys() == ConnectorKeys.model_fields.keys()
    for name, field in ConnectorKeys.model_fields.items():
        if field.default is not None:
            assert json.loads(told[name]) == field.default, name


def test_the_page_s_commands_can_be_used(tmp_path: Path) -> None:
    configs = [json.loads(text) for text in re.findall(r"--kv-transfer-config '(.*?)'", PAGE, re.DOTALL)]
    assert len(configs) >= 4
    found = 0
    for config in configs:
        each = [config, *config.get("kv_connector_extra_config", {}).get("connectors", ())]
        for one in each:
            if one["kv_connector"].startswith("FlexKV"):
                found += 1
                assert one["kv_role"] == "kv_both"
                extra = one.get("kv_connector_extra_config", {})
                if not isinstance(extra.get("stack"), str):  # a path that is not here
                    connector_config(extra, {"XDG_RUNTIME_DIR": str(tmp_path)})
                assert extra.keys() <= ConnectorKeys.model_fields.keys()
    assert found >= 4


def test_the_page_s_variables_are_known() -> None:
    names = set(re.findall(r"\b(?:FLEXKV_[A-Z0-9_]+|ENABLE_FLEXKV)\b", PAGE))
    assert {"FLEXKV_CONFIG_PATH", "FLEXKV_CPU_CACHE_GB", "ENABLE_FLEXKV"} <= names
    assert names <= {*VARIABLES, CONFIG_PATH}
