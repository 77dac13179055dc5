"""docs/dynamo.md and examples/dynamo name only what exists: scripts, targets, tiers, and variables that are read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from flexkv_core.config import load_config, load_stack
from flexkv_core.config.flat_keys import CONFIG_PATH, VARIABLES

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples" / "dynamo"
PAGE = (REPOSITORY / "docs" / "dynamo.md").read_text()
README = (EXAMPLES / "README.md").read_text()
SCRIPTS = ("aggregated.sh", "kv_routing.sh", "disaggregated.sh", "verify")
SHELL = [*(EXAMPLES / name for name in (*SCRIPTS, "common.sh")), REPOSITORY / "scripts" / "install_dynamo.sh"]
COMMON = (EXAMPLES / "common.sh").read_text()


def variables(text: str) -> set[str]:
    """FlexKV's own that a text names."""
    return set(re.findall(r"\b(?:FLEXKV_[A-Z0-9_]+|ENABLE_FLEXKV|DYNAMO_USE_FLEXKV)\b", text))


def test_variables_are_those_of_the_flat_config() -> None:
    named = variables(PAGE + README + "".join(file.read_text() for file in SHELL))
    assert {"DYNAMO_USE_FLEXKV", "FLEXKV_CPU_CACHE_GB", "FLEXKV_SERVER_RECV_PORT", CONFIG_PATH} <= named
    assert named - {CONFIG_PATH} <= set(VARIABLES)


def test_the_guides_variables_mean_what_the_page_says(tmp_path: Path) -> None:
    guide = dict(re.findall(r"`(\w+)=\"?([\w:/.]+)\"?`", PAGE))
    flat = tmp_path / "flexkv_config.yml"
    flat.write_text("cpu_cache_gb: 8\n")
    guide["FLEXKV_CONFIG_PATH"] = str(flat)
    of_variables = load_config(None, {name: value for name, value in guide.items() if name != "FLEXKV_CONFIG_PATH"})
    assert not of_variables.warnings
    assert of_variables.stack.tiers[0].capacity.bytes == 32 << 30
    assert str(of_variables.settings.server.socket) == "/tmp/flexkv_server_0"
    assert not of_variables.settings.process.enabled
    assert [notice.key for notice in of_variables.notices] == ["DYNAMO_USE_FLEXKV"]
    assert load_config(None, guide).stack.tiers[0].capacity.bytes == 8 << 30  # the file's


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_scripts_are_sound(file: Path) -> None:
    subprocess.run(["bash", "-n", str(file)], check=True)
    assert file.name == "common.sh" or file.stat().st_mode & 0o111


def test_the_page_and_the_readme_name_every_script_and_no_other() -> None:
    for text in (PAGE, README):
        named = set(re.findall(r"`(?:[\w/.]*/)?(\w+\.sh|verify)\b", text))
        assert set(SCRIPTS) <= named
        assert named <= {file.name for file in SHELL}


def test_options_and_settings_exist() -> None:
    (option,) = set(re.findall(r"`aggregated\.sh`[^`]*`(--[\w-]+)`", PAGE + README))
    assert f"{option})" in (EXAMPLES / "aggregated.sh").read_text()
    settings = re.findall(r"^\| ((?:`[A-Z_]+`(?:, )?)+) \|", README, re.MULTILINE)
    code = "".join(file.read_text() for file in SHELL)
    for name in re.findall(r"`(\w+)`", "".join(settings)):
        assert name in VARIABLES or f"${{{name}:" in code, name


def test_the_target_and_the_stack_exist() -> None:
    assert re.search(r"^test-dynamo:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert "make test-dynamo" in PAGE
    assert load_stack(EXAMPLES / "stack.yaml").block_size is None  # engines differ in it


def test_the_connector_is_the_in_tree_name_everywhere() -> None:
    config = '{"kv_connector":"FlexKVConnectorV1","kv_role":"kv_both"}'
    assert config in PAGE
    assert config in COMMON
