"""Bad configs of every kind: each error has its place, its key and the fix, and shows no secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Install
from hypothesis import example, given
from hypothesis import strategies as st
from ssd_plugin import SSD

from flexkv_core.config import LoadedConfig, load_config, load_stack
from flexkv_core.config.flat_keys import FLAT
from flexkv_core.config.json_text import read_json
from flexkv_core.config.source import read_text
from flexkv_core.errors import StackConfigError

BAD = yaml.safe_load((Path(__file__).parent / "data" / "bad_configs.yaml").read_text())


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case['key']}-{case['says'][:40]}")
def test_bad_configs(case: dict[str, Any], tmp_path: Path, install_plugin: Install) -> None:
    if case.get("ssd"):
        install_plugin("ssd", SSD)
    file = None
    if case["file"] is not None:
        file = tmp_path / case["file"]
        file.write_text(case["text"])
    with pytest.raises(StackConfigError) as caught:
        load_config(file, case.get("environ", {}))
    error = caught.value
    assert case["says"] in str(error)
    assert (error.line, error.column, error.key) == (case["line"], case["column"], case["key"]), str(error)
    assert error.file == (str(file) if case["line"] is not None else "environment")
    place = f"{error.file}:{error.line}:{error.column}" if error.line is not None else "environment"
    assert str(error).startswith(f"{place}: {error.key}: " if error.key else f"{place}: ")
    for value in case.get("environ", {}).values():
        if error.file != "environment":
            assert value not in str(error)


def test_there_are_forty_of_all_kinds() -> None:
    assert len(BAD) >= 40
    kinds = [("env" if case["line"] is None else case["file"]) for case in BAD]
    assert min(kinds.count(kind) for kind in ("a.yaml", "a.json", "env")) >= 10


def test_a_config_path_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(StackConfigError, match=r"No such file.*\(the file that FLEXKV_CONFIG_PATH names\)"):
        load_config(None, {"FLEXKV_CONFIG_PATH": str(tmp_path / "nothing.yaml")})


# ------------------------------------------------------------------------- anything at all

names = st.sampled_from([*FLAT, "tiers", "block_size", "index", "backend", "capacity", "root", "faults", "x"])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["cpu", "directory", "1GiB", "lru", "${X}", "$${", "${", "/x", b"bytes", {1, 2}])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)
variables = st.dictionaries(
    st.sampled_from([f"FLEXKV_{name.upper()}" for name in FLAT] + ["FLEXKV_X", "ENABLE_FLEXKV", "X"]),
    st.text(st.characters(exclude_characters="\0"), max_size=8) | st.sampled_from(["0", "1", "lru", "16"]),
    max_size=3,
)


def loads_or_tells(source: Any, environ: dict[str, str]) -> None:
    try:
        loaded = load_config(source, environ)
    except StackConfigError as error:
        assert str(error).startswith(("<mapping>", "<text>", "environment", "default"))  # noqa: PT017
        str(error).encode()
    else:
        assert isinstance(loaded, LoadedConfig)
        assert loaded.stack.tiers


@given(st.dictionaries(names | st.text(max_size=5) | st.integers(), values, max_size=5), variables)
@example({"tiers": [{"backend": "cpu", "capacity": "9" * 4000 + ".5"}]}, {})
@example({"cpu_cache_gb": float("nan")}, {})
@example({"tiers": [{"backend": "cpu", "capacity": f"{10**25} blocks"}]}, {})
@example({1: 2, "1": 3}, {})
@example({"\ud800": 1}, {})
@example({"redis_host": "${X}"}, {"X": "\udcff"})
@example({}, {"FLEXKV_REDIS_HOST": "\udcff"})
def test_any_mapping_loads_or_is_refused(mapping: dict[Any, Any], environ: dict[str, str]) -> None:
    loads_or_tells(mapping, environ)


def test_numbers_that_cannot_be_printed_are_refused() -> None:
    huge = 10**5000  # more digits than Python prints
    cpu = {"backend": "cpu", "capacity": "1GiB"}
    for mapping in (
        {"tiers": [{**cpu, "capacity": huge}]},
        {"tiers": [{**cpu, "threads": huge}]},
        {"tiers": [cpu], "block_size": huge},
        {"tiers": [cpu], "evict_ratio": huge},
        {"cpu_cache_gb": huge},
        {"instance_num": -huge},
        {"hugepage_size_bytes": huge},
    ):
        with pytest.raises(StackConfigError, match=r"^<mapping>: "):
            load_config(mapping, {})


def test_a_mapping_that_holds_itself_is_refused() -> None:
    mapping: dict[str, Any] = {}
    mapping["tiers"] = [mapping]
    with pytest.raises(StackConfigError, match="nested more than 16 deep"):
        load_config(mapping, {})


@given(st.text(max_size=40))
def test_any_text_is_json_or_refused(text: str) -> None:
    loads_or_tells("{" + text, {})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values, st.sampled_from([None, 2, "\t"]))
def test_json_is_read_as_the_standard_library_reads_it(value: Any, indent: Any) -> None:
    import json  # noqa: PLC0415

    for ascii_only in (True, False):
        text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
        source = read_json(text, "x.json", 100)
        assert source.data == value
        for path, place in source.values.items():
            line = text.split("\n")[place.line - 1][place.column - 1 :]
            inside: Any = value
            for step in path:
                inside = inside[step]
            assert line.startswith(json.dumps(inside, indent=indent, ensure_ascii=ascii_only).split("\n")[0])


def test_json_files_and_texts_make_the_stacks_that_yaml_makes(tmp_path: Path) -> None:
    text = '{"block_size": 16,\n\t"tiers": [{"backend": "cpu", "capacity": "1GiB"}]}'
    file = tmp_path / "stack.json"
    file.write_text("\ufeff" + text)
    other = tmp_path / "stack.yaml"
    other.write_text("block_size: 16\ntiers: [{backend: cpu, capacity: 1GiB}]\n")
    assert load_stack(file) == load_stack(other) == load_stack(text)
    assert read_text(text, "named.yaml").data == read_text(text, "named.json").data, "JSON text under any name"
    assert read_text("{tiers: [], b: 1}", "flow.yaml").data == {"tiers": [], "b": 1}
    assert read_text('{"a": 1, b: 2}', "flow.yaml").data == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "bomb",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\ntiers: [*b, *b]",
        "tiers: !include other.yaml",
        "tiers: !!python/object/apply:os.system [id]",
        "<<: {tiers: []}",
    ],
)
def test_nothing_is_expanded_included_or_executed(bomb: str, tmp_path: Path) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text(bomb)
    with pytest.raises(StackConfigError, match=r"not allowed here|not a plain name"):
        load_config(file, {})
