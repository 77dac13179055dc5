"""What commands write: reports to files, and strangers' text to terminals. Owns neither's content."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flexkv_core.errors import FlexKVError

_FILE_WIDTH = 100


class OutputError(FlexKVError, OSError):
    """A report that cannot be written."""


def make_console() -> Console:
    """Stdout, as wide as the terminal; in a file or a pipe, of a fixed width that tables fit in."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


def write_json(path: Path | None, report: Mapping[str, Any] | Sequence[Any]) -> None:
    """What `--json FILE` does; None: nothing. Raises OutputError."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--json {path}: cannot be written: {error.strerror}") from error


def printable(text: Any) -> str:
    """Without characters that would end a comment or steer a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "?", str(text))
