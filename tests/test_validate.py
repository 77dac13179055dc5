"""`flexkv validate`: what it prints is a stack, with the origin of values, what has no effect, and what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import Install
from ssd_plugin import SSD

from flexkv_core.cli.main import main
from flexkv_core.config import load_config, load_stack

MODELS = Path(__file__).parent / "data" / "models"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLEXKV_CONFIG_PATH", "FLEXKV_SEED", "FLEXKV_SOAK", "FLEXKV_STEPS"):
        monkeypatch.delenv(name, raising=False)


def validate(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["validate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_a_flat_file(tmp_path: Path, install_plugin: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin("ssd", SSD)
    monkeypatch.setenv("FLEXKV_EVICT_RATIO", "0.05")
    monkeypatch.setenv("FLEXKV_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("FLEXKV_ENABLE_TRASE", "1")
    file, figures = tmp_path / "flexkv.yaml", tmp_path / "figures.json"
    file.write_text("cpu_cache_gb: 32\nssd_cache_gb: 64.5\nssd_cache_dir: /a;/b\nenable_metrics: 1\nenable_trace: 1\n")
    result = validate("--config", file, "--model", "llama-3.1-8b", "--json", figures)
    again = tmp_path / "again.yaml"
    again.write_text(result.stdout)
    assert load_stack(again, {}) == load_config(file).stack, "what is printed is the stack"
    for line in (
        "#   cpu_cache_gb: 32.0  (file, cpu_cache_gb)",
        "#   evict_ratio: 0.05  (environment, FLEXKV_EVICT_RATIO)",
        "#   ssd_cache_dir: /a;/b  (file, ssd_cache_dir)",
        "#   enable_metrics: the server answers Prometheus at /metrics",
        "#   enable_trace: needs the request trace, which is not in this version",
        "#   32 layers of full attention: 2,097,152 bytes a block, 2,101,248 with padding and seal",
        "#   cpu: 16,128 blocks, 258,048 tokens",  # 32 GiB are 256 runs of 63 slots
    ):
        assert line in result.stdout.splitlines()
    assert "warning: unknown variable FLEXKV_ENABLE_TRASE: did you mean FLEXKV_ENABLE_TRACE?" in result.stderr
    report = json.loads(figures.read_text())
    assert report["values"]["cpu_cache_gb"] == {"value": 32.0, "from": "file", "key": "cpu_cache_gb"}
    assert report["values"]["redis_port"] == {"value": 6379, "from": "default", "key": "redis_port"}
    assert [each["key"] for each in report["without_effect"]] == ["enable_trace"]
    assert [each["key"] for each in report["server"]] == ["enable_metrics", "FLEXKV_LOG_LEVEL"]
    assert report["flat"] is True
    assert [tier["name"] for tier in report["model"]["tiers"]] == ["cpu", "ssd"]
    assert report["model"]["tiers"][0]["tokens"] == 258_048


def test_no_file_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = validate()
    assert "environment: ok, 1 tier(s)" in result.stdout
    assert "#   cpu_cache_gb: 16.0  (default)" in result.stdout
    file = tmp_path / "f.json"
    file.write_text('{"cpu_cache_gb": 3}')
    monkeypatch.setenv("FLEXKV_CONFIG_PATH", str(file))
    assert "capacity: 3GiB" in validate().stdout


def test_a_stack_alone_takes_no_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_EVICTION_POLICY", "lfu")
    monkeypatch.setenv("FLEXKV_UNKNOWN", "1")
    file = tmp_path / "stack.yaml"
    file.write_text("block_size: 32\ntiers:\n- backend: cpu\n  capacity: 1GiB\n- backend: directory\n  root: /x\n")
    result = validate("--stack", file, "--model", MODELS / "gemma-3-27b")
    assert "lfu" not in result.stdout
    assert result.stderr == ""
    assert "eviction: lfu" in validate("--config", file).stdout
    assert "gemma-3-27b, bfloat16, blocks of 32 tokens:" in result.stdout
    assert "#   52 layers of sliding window 1024: 13,631,488 bytes a block" in result.stdout
    assert "blocks (by itself" not in result.stdout
    assert "tokens (by itself, each group: " in result.stdout
    assert "#   directory: as much as its backend allows" in result.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in MODELS.iterdir()))
def test_every_model(name: str) -> None:
    assert f"# {name}, bfloat16, blocks of 16 tokens" in validate("--model", MODELS / name / "config.json").stdout


@pytest.mark.parametrize(
    ("text", "arguments", "told"),
    [
        ("tiers:\n- backend: cpu\n  capacity: lots\n", [], "{file}:3:13: tiers[0].capacity: 'lots' is not a size"),
        ("cpu_cache_gb: lots\n", [], "{file}:1:15: cpu_cache_gb: 'lots': must be a number"),
        ("cpu_cache_gb: 0.001\n", ["--model", "llama-3.1-8b"], "tier cpu: capacity 1073741 bytes cannot hold one slot"),
        ("cpu_cache_gb: 1\n", ["--model", "llama-9"], "model 'llama-9': neither a file nor a known name"),
        ("cpu_cache_gb: 1\n", ["--json", "/nowhere/x.json"], "--json /nowhere/x.json: cannot be written"),
        ("cpu_cache_gb: 1\n", ["--stack", "x"], "--config and --stack: give one"),
    ],
)
def test_errors_are_one_line_and_exit_code_two(text: str, arguments: list[Any], told: str, tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text)
    result = validate("--config", file, *arguments, code=2)
    assert told.format(file=file) in result.stderr
    assert "Traceback" not in result.output


def test_what_would_steer_a_terminal_is_not_printed(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text(json.dumps({"redis_host": "a\u001b[31m\nb: c", "trace_file_path": "x\u2028y"}))
    result = validate("--config", file)
    assert "\u001b" not in result.stdout
    assert "#   redis_host: a?[31m?b: c  (file, redis_host)" in result.stdout
    assert "#   trace_file_path: x?y  (file, trace_file_path)" in result.stdout
