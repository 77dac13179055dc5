"""The log of a process of ours: one line a record, as key=value or JSON, that no value can forge.

Owns the format and what `FLEXKV_LOG_LEVEL` and `FLEXKV_LOGGING_PREFIX` mean. Libraries do not set up logging: only
commands and the server's process call `configure`. Does not own what is logged. Whoever logs keeps secrets out of it;
what a backend's error says all the same is masked.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TextIO

Format = Literal["text", "json"]

MAX_VALUE = 16384
"""Characters of one value; what is more is cut off, and the line says so."""
MASK = "***"
SHORTEST_SECRET = 4
"""Characters; shorter ones would mask half of every line."""
_BARE = re.compile(r"[A-Za-z0-9_.,:;/@%+\-]+")
_NOT_A_NAME = re.compile(r"[^A-Za-z0-9_]")
_OWN = ("prefix", "time", "level", "logger", "pid", "message", "error")
_OF_RECORDS = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def _quoted(text: str) -> str:
    """Bare where nothing in it could be taken for something else; else a JSON string of printable characters only."""
    if _BARE.fullmatch(text):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    if quoted.isprintable():
        return quoted
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in quoted)


class LineFormatter(logging.Formatter):
    """A record as one line: time, level, logger, pid and message, then what was given as `extra`, then the traceback.

    Args:
        prefix: the first word of each line; in JSON the value of `prefix`.
        secrets: masked wherever they stand.
    """

    def __init__(self, prefix: str, style: Format, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._prefix = prefix
        self._form = style
        longest_first = sorted((each for each in secrets if len(each) >= SHORTEST_SECRET), key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def _text_of(self, value: Any) -> str:
        text = value if isinstance(value, str) else str(value)
        if self._secrets is not None:
            text = self._secrets.sub(MASK, text)
        return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}... ({len(text) - MAX_VALUE} more)"

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(self._fields(record))
        if self._form == "json":
            plain = {
                name: value if isinstance(value, int | float) else self._text_of(value)
                for name, value in fields.items()
            }
            return json.dumps({"prefix": self._prefix, **plain} if self._prefix else plain)
        line = " ".join(f"{name}={_quoted(self._text_of(value))}" for name, value in fields.items())
        return f"{_quoted(self._prefix)} {line}" if self._prefix else line

    def _fields(self, record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        yield "time", when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        yield "level", record.levelname
        yield "logger", record.name
        yield "pid", record.process
        yield "message", _message_of(record)
        for name, value in vars(record).items():
            if name not in _OF_RECORDS:
                clean = _NOT_A_NAME.sub("_", name)
                yield f"{clean}_" if clean in _OWN else clean, value
        if record.exc_info:
            yield "error", self.formatException(record.exc_info)


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # arguments that do not fit: say what there is
        return str(record.msg)


def configure(
    level: str, prefix: str, style: Format = "text", *, secrets: Iterable[str] = (), stream: TextIO | None = None
) -> None:
    """Have this process log to `stream`, stderr if it is None. May be called again; the last call counts.

    Args:
        level: of FlexKV's own loggers: a name of `logging`, or OFF. Others' are heard from WARNING up.
    """
    handler: logging.Handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(prefix, style, secrets))
    root, own = logging.getLogger(), logging.getLogger("flexkv")
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    number = logging.CRITICAL + 1 if level == "OFF" else logging.getLevelNamesMapping()[level]
    own.setLevel(number)
    root.setLevel(max(number, logging.WARNING))
    logging.raiseExceptions = False  # a log that cannot be written is no reason to write more
