"""The flat configuration: every key and variable, by file and by environment."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from flat_rows import ROWS, VARIABLES_ONLY, Row, written

from flexkv_core.config import LoadedConfig, load_config
from flexkv_core.config.flat_keys import KEYS
from flexkv_core.errors import StackConfigError


@pytest.fixture(autouse=True)
def ssd_where_a_row_needs_it(request: pytest.FixtureRequest) -> None:
    row = getattr(request.node, "callspec", None) and request.node.callspec.params.get("row")
    if row is not None and row.key == "ssd_cache_gb":
        request.getfixturevalue("ssd")


def of(loaded: LoadedConfig, row: Row) -> Any:
    return attrgetter(row.setting)(loaded.settings) if row.setting else loaded.values[row.key].value


def cases(which: str, rows: list[Row]) -> list[Any]:
    return [
        pytest.param(row, one, id=f"{row.key}={one[0] if which == 'good' else one}")
        for row in rows
        for one in getattr(row, which)
    ]


def as_variable(value: Any) -> str:
    return str(value)


def test_every_row_is_here() -> None:
    assert len(ROWS + VARIABLES_ONLY) == len(KEYS)
    assert {row.key for row in ROWS + VARIABLES_ONLY} == {key.name for key in KEYS}
    assert {key.name for key in KEYS if not key.in_file} == {row.key for row in VARIABLES_ONLY}
    assert len(ROWS) == 68
    assert {row.setting for row in ROWS + VARIABLES_ONLY if row.setting} == {key.target for key in KEYS if key.target}


@pytest.mark.parametrize("row", ROWS + VARIABLES_ONLY, ids=lambda row: row.key)
def test_defaults(row: Row) -> None:
    loaded = load_config(None, {})
    assert of(loaded, row) == row.default
    assert loaded.values[row.key].origin.kind == "default"
    empty = load_config(None, dict.fromkeys(row.variables[:1], ""))
    assert of(empty, row) == row.default, "an empty variable is as good as none"


@pytest.mark.parametrize("kind", ["yaml", "json"])
@pytest.mark.parametrize(("row", "value"), cases("good", ROWS))
def test_good_values_in_files(row: Row, value: tuple[Any, Any], kind: str, tmp_path: Path) -> None:
    for name in row.names or [row.key]:
        loaded = load_config(written(tmp_path, kind, {name: value[0]}), {})
        assert of(loaded, row) == value[1]
        assert type(of(loaded, row)) is type(value[1])
        origin = loaded.values[row.key].origin
        assert (origin.kind, origin.key) == ("file", name)


@pytest.mark.parametrize(("row", "value"), cases("good", ROWS + VARIABLES_ONLY))
def test_good_values_in_variables(row: Row, value: tuple[Any, Any]) -> None:
    for variable in row.variables:
        loaded = load_config(None, {variable: as_variable(value[0])})
        assert of(loaded, row) == value[1]
        origin = loaded.values[row.key].origin
        assert (origin.kind, origin.key) == ("environment", variable)
        assert loaded.warnings == ()


@pytest.mark.parametrize(("row", "value"), cases("bad", ROWS))
def test_bad_values_in_files(row: Row, value: Any, tmp_path: Path) -> None:
    file = written(tmp_path, "json", {row.key: value})
    with pytest.raises(StackConfigError) as caught:
        load_config(file, {})
    error = caught.value
    assert (error.file, error.key, error.line, error.column) == (str(file), row.key, 1, len(row.key) + 6)
    assert str(error).startswith(f"{file}:1:{len(row.key) + 6}: {row.key}: ")
    if row.key != "redis_password":
        assert json.dumps(value) in str(error) or repr(value)[:50] in str(error) or str(value) in str(error)


def wrong_as_text(row: Row, value: Any) -> bool:
    """Keys that take any text refuse only other types, and a variable has none."""
    takes_text = row.good[0][0] in ("a b/c.d", "a b", "/a")
    return isinstance(value, str) or not takes_text


BAD_VARIABLES = [case for case in cases("bad", ROWS + VARIABLES_ONLY) if wrong_as_text(*case.values)]


@pytest.mark.parametrize(("row", "value"), BAD_VARIABLES)
def test_bad_values_in_variables(row: Row, value: Any) -> None:
    with pytest.raises(StackConfigError) as caught:
        load_config(None, {row.variables[0]: as_variable(value)})
    error = caught.value
    assert (error.file, error.key, error.line) == ("environment", row.variables[0], None)
    assert str(error).startswith(f"environment: {row.variables[0]}: ")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_file_before_environment_before_default(row: Row, tmp_path: Path) -> None:
    (first, read), (second, other) = row.good[0], row.good[-1]
    file = written(tmp_path, "yaml", {row.key: first})
    variables = {row.variables[0]: as_variable(second)}
    assert of(load_config(file, variables), row) == read
    bad = {row.variables[0]: as_variable(row.bad[0])}
    assert of(load_config(file, bad), row) == read, "a variable that the file overrides is not even read"
    file = written(tmp_path, "yaml", {})
    assert of(load_config(file, variables), row) == other
    assert of(load_config(file, {}), row) == row.default


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_misspelt_names_are_told_with_the_nearest(row: Row, tmp_path: Path) -> None:
    wrong = row.key[:-2] + row.key[-1] + row.key[-2] + "x"
    with pytest.raises(StackConfigError, match=r"unknown key .*did you mean") as caught:
        load_config(written(tmp_path, "yaml", {wrong: 1}), {})
    assert (caught.value.key, caught.value.line, caught.value.column) == (wrong, 1, 1)
    loaded = load_config(None, {f"FLEXKV_{wrong.upper()}": "secret-looking-value"})
    (warning,) = loaded.warnings
    assert warning.startswith(f"unknown variable FLEXKV_{wrong.upper()}: did you mean FLEXKV_")
    assert "secret-looking-value" not in warning


def test_older_names_of_layout_variables_are_taken() -> None:
    for which in ("cpu", "ssd", "remote", "gds"):
        loaded = load_config(None, {f"FLEXKV_{which.upper()}_LAYOUT": "layerfirst"})
        assert getattr(loaded.settings.layout, which) == "LAYERFIRST"
        assert loaded.warnings == ()


# ------------------------------------------------------------------------- what is accepted without effect

TAKEN = {
    "cpu_cache_gb", "ssd_cache_gb", "ssd_cache_dir", "enable_gds", "use_hugepage_cpu_buffer", "eviction_policy",
    "evict_ratio", "evict_start_threshold", "hit_reward_seconds", "max_file_size_gb", "iouring_entries", "index_accel",
    "server_recv_port", "enable_metrics", "py_metrics_port",
}  # fmt: skip
"""Keys with an effect in a flat file with an ssd tier; slru_protected_threshold needs eviction_policy: slru."""


@pytest.mark.usefixtures("ssd")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_keys_without_effect_are_listed_with_a_reason(row: Row, tmp_path: Path) -> None:
    base = {"cpu_cache_gb": 1, "ssd_cache_gb": 32}
    given = row.good[-1][0]
    loaded = load_config(written(tmp_path, "json", {**base, row.key: given}), {})
    notices = {notice.key: notice.reason for notice in loaded.notices}
    if row.key in TAKEN:
        assert notices == {}
    else:
        assert set(notices) == {row.key}
        assert len(notices[row.key]) > 15
    through_variable = load_config(None, {row.variables[0]: as_variable(given), "FLEXKV_SSD_CACHE_GB": "32"})
    if row.key not in TAKEN:
        assert [notice.key for notice in through_variable.notices] == [row.variables[0]]


@pytest.mark.usefixtures("ssd")
@pytest.mark.parametrize(
    ("mapping", "without"),
    [
        ({"ssd_cache_dir": "/x"}, ["ssd_cache_dir"]),
        ({"enable_gds": 1}, ["enable_gds"]),
        ({"iouring_entries": 8}, ["iouring_entries"]),
        ({"max_file_size_gb": 8}, ["max_file_size_gb"]),
        ({"eviction_policy": "slru", "hit_reward_seconds": 5}, ["hit_reward_seconds"]),
        ({"eviction_policy": "slru", "slru_protected_threshold": 5}, []),
        ({"ssd_cache_gb": 32, "enable_gds": 1, "iouring_entries": 8}, ["iouring_entries"]),
        ({}, []),
    ],
)
def test_what_has_no_effect_beside_what(mapping: dict[str, Any], without: list[str]) -> None:
    assert [notice.key for notice in load_config(mapping, {}).notices] == without
