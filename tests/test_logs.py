"""The log: one line a record whatever is in it, at the level that was asked for, and no secret."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_rig import until

from flexkv_core import logs
from flexkv_core.server.launch import ensure_server

SECRET = "hunter2-hunter2"
PAIR = re.compile(r'(?:^| )([A-Za-z0-9_]+)=("(?:[^"\\]|\\.)*"|[^ "]+)')
OURS = logging.getLogger("flexkv.test")
THEIRS = logging.getLogger("someone.else")
NASTY = [
    "",
    " ",
    "a b",
    'x" level=ERROR message="forged',
    "a\nFLEXKV time=2026-01-01T00:00:00.000Z level=ERROR",
    "a\r\nb\x0bc\x0cd\x1ce\x85f\u2028g\u2029h",
    "\x1b[31mred\x1b[0m \x9b31m",
    "back\\slash\\" + '"',
    "\u202ereversed\u2066",
    "lone \ud800 surrogate",
    "=",
    "münchen 東京",
    "{}",
]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("flexkv")
    before = root.handlers[:], root.level, own.level, logging.raiseExceptions
    yield
    root.handlers[:], logging.raiseExceptions = before[0], before[3]
    root.setLevel(before[1])
    own.setLevel(before[2])


def logged(style: logs.Format = "text", level: str = "INFO", prefix: str = "FLEXKV", **options: Any) -> io.StringIO:
    stream = io.StringIO()
    logs.configure(level, prefix, style, stream=stream, **options)
    return stream


def lines(stream: io.StringIO) -> list[str]:
    """By everything that anyone takes for the end of a line."""
    text = stream.getvalue()
    assert text.endswith("\n") or not text
    return text.splitlines()


def parsed(line: str, prefix: str = "FLEXKV") -> dict[str, str]:
    """A line of key=value, taken apart by its own rules; nothing may be left over."""
    head, _, rest = line.partition(" ")
    assert head == prefix
    pairs = PAIR.findall(rest)
    assert " ".join(f"{name}={value}" for name, value in pairs) == rest
    assert len({name for name, _ in pairs}) == len(pairs)
    return {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}


@pytest.mark.parametrize("text", NASTY)
def test_no_value_forges_a_line_or_a_field(text: str) -> None:
    stream = logged()
    OURS.info("said: %s", text, extra={"engine": text, "count": 3, f"odd {text}": 1})
    (line,) = lines(stream)
    assert line.isprintable()
    fields = parsed(line)
    assert (fields["level"], fields["logger"], fields["count"]) == ("INFO", "flexkv.test", "3")
    assert (fields["message"], fields["engine"]) == (f"said: {text}", text)
    assert len(fields) == 8
    stream = logged("json")
    OURS.info("said: %s", text, extra={"engine": text, "count": 3})
    (line,) = lines(stream)
    assert line.isascii()
    again = json.loads(line)
    assert (again["message"], again["engine"], again["count"]) == (f"said: {text}", text, 3)
    assert (again["prefix"], again["level"]) == ("FLEXKV", "INFO")


def test_fields_of_a_line() -> None:
    stream = logged(prefix="")
    OURS.warning("plain", extra={"level": "forged", "pid": 0, "time": "forged"})
    (line,) = lines(stream)
    assert re.fullmatch(
        r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=WARNING logger=flexkv\.test pid=\d+ message=plain "
        r"level_=forged pid_=0 time_=forged",
        line,
    )


def test_a_traceback_is_a_field_and_arguments_that_do_not_fit_are_no_error() -> None:
    stream = logged()
    try:
        raise ValueError("a\nb")
    except ValueError:
        OURS.exception("it failed")
    OURS.info("%d blocks", "many")
    OURS.info("long: %s", "x" * 3 * logs.MAX_VALUE)
    failed, unfit, long = map(parsed, lines(stream))
    assert "Traceback" in failed["error"]
    assert "ValueError: a\nb" in failed["error"]
    assert unfit["message"] == "%d blocks"
    assert long["message"].endswith("more)")
    assert len(long["message"]) < 2 * logs.MAX_VALUE


@pytest.mark.parametrize(
    ("level", "heard"),
    [
        ("DEBUG", ["our DEBUG", "our INFO", "our WARNING", "our CRITICAL", "their WARNING", "their CRITICAL"]),
        ("INFO", ["our INFO", "our WARNING", "our CRITICAL", "their WARNING", "their CRITICAL"]),
        ("WARNING", ["our WARNING", "our CRITICAL", "their WARNING", "their CRITICAL"]),
        ("CRITICAL", ["our CRITICAL", "their CRITICAL"]),
        ("OFF", []),
    ],
)
def test_levels(level: str, heard: list[str]) -> None:
    stream = logged(level=level)
    for whose, logger in (("our", OURS), ("their", THEIRS)):
        for name in ("DEBUG", "INFO", "WARNING", "CRITICAL"):
            logger.log(getattr(logging, name), "%s %s", whose, name)
    assert [parsed(line)["message"] for line in lines(stream)] == heard


def test_the_last_call_counts() -> None:
    first, second = logged(), logged("json")
    OURS.info("once")
    assert (lines(first), len(lines(second))) == ([], 1)


@pytest.mark.parametrize("style", ["text", "json"])
def test_secrets_are_masked_wherever_they_stand(style: logs.Format) -> None:
    quoted = 'pass "word"\\'
    stream = logged(style, secrets=[SECRET, f"{SECRET}-b", quoted, "a"])
    OURS.info("with %s and %s-b", SECRET, SECRET, extra={"more": [SECRET], "q": quoted})
    try:
        raise ValueError(f"login {SECRET} refused")
    except ValueError:
        OURS.exception("failed")
    text = stream.getvalue()
    assert "hunter2" not in text
    assert "word" not in text
    assert "-b" not in text, "the longer of two secrets is masked whole"
    assert text.count(logs.MASK) == 5
    assert "and" in text, "what is too short for a secret is left"


def test_the_log_of_a_server_that_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("FLEXKV_LOGGING_PREFIX", "my cache")
    monkeypatch.setenv("FLEXKV_SOMETHING_UNKNOWN", SECRET)
    stack = {"tiers": [{"backend": "cpu", "capacity": "16MiB", "prefault": False}], "redis_password": SECRET}
    path = tmp_path / SECRET / "s"  # so that it would be in the log
    path.parent.mkdir()
    assert ensure_server(stack, path, linger_s=0.1) is not None
    until(lambda: not path.exists())
    until(lambda: "stopped" in path.with_name("s.log").read_text())
    text = path.with_name("s.log").read_text()
    assert "***" in text
    assert SECRET not in text
    assert all(line.startswith('"my cache" time=') for line in text.splitlines()), text
    assert any("level=WARNING" in line and "FLEXKV_SOMETHING_UNKNOWN" in line for line in text.splitlines())


def test_the_log_of_serve_as_json(tmp_path: Path) -> None:
    stack = tmp_path / "stack.yaml"
    stack.write_text(f"tiers: [{{backend: cpu, capacity: 16MiB, prefault: false}}]\nredis_password: {SECRET}\n")
    command = [str(Path(sys.executable).with_name("flexkv")), "serve", "--log-format", "json", "--stack", str(stack)]
    (tmp_path / SECRET).mkdir()
    with subprocess.Popen(
        [*command, "--socket", str(tmp_path / SECRET / "s"), "--linger", "0.1"], stderr=subprocess.PIPE, text=True
    ) as process:
        text = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    records = [json.loads(line) for line in text.splitlines()]
    assert records[-1]["message"] == "stopped"
    assert {record["logger"] for record in records} == {"flexkv.server"}
    assert SECRET not in text
    assert "***" in text
