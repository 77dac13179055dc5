"""Starting a server where none runs: whichever engine's process comes first does it, and a lock decides.

Owns the race and the hand-over of the config, which goes through a pipe: secrets are in no argv. The server is in a
session of its own, so that it outlives the engine that started it. Does not own serving (`daemon.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexkv_core.errors import ServerAwayError, ServerRefusedError
from flexkv_core.server.client import CALL_DEADLINE_S, Client
from flexkv_core.server.paths import start_lock

LINGER_S = 10.0
"""How long a server that an engine started outlives its last client."""
START_S = 120.0
"""How long starting may take: host memory is prepared, which takes a second for some ten GiB."""
LOG_BYTES = 4096
"""Of the end of the log, shown where the server did not start."""


def answers(path: Path, timeout_s: float = 1.0) -> bool:
    """Whether a server is ready for clients at this socket. Raises ServerRefusedError if it does not want this one."""
    client = Client(path, role="observer")
    try:
        client.greet(timeout_s)
        return client.welcome is not None and client.welcome.ready
    except ServerRefusedError:
        raise
    except ServerAwayError:
        return False
    finally:
        client.close()


def ensure_server(
    source: str | Path | Mapping[str, Any] | None, path: Path, *, linger_s: float = LINGER_S, start_s: float = START_S
) -> int | None:
    """Have a server at this socket.

    Args:
        source: its config, as for `flexkv_core.config.load_config`; it is read by the server's process, which has this
            one's environment.
        linger_s: it ends so long after its last client.

    Returns the process that was started, None if a server was there already.

    Raises:
        ServerAwayError: it could not be started; the text has the end of its log.
        ServerRefusedError: a server of another version is there.
    """
    if _is_there(path):
        return None
    with start_lock(path):
        if _is_there(path):
            return None
        return _start(source, path, linger_s, start_s)


def embedded(
    source: str | Path | Mapping[str, Any] | None,
    path: Path,
    *,
    engine: str | None = None,
    deadline_s: float = CALL_DEADLINE_S,
    linger_s: float = LINGER_S,
) -> Client:
    """A client of the server at this socket, which is started where none is, now and whenever it has gone.

    Raises as `ensure_server`.
    """
    ensure_server(source, path, linger_s=linger_s)
    client = Client(
        path, engine=engine, deadline_s=deadline_s, starter=lambda: ensure_server(source, path, linger_s=linger_s)
    )
    try:
        client.greet(START_S)
    except BaseException:
        client.close()
        raise
    return client


def _is_there(path: Path) -> bool:
    return path.exists() and answers(path)


def _start(source: str | Path | Mapping[str, Any] | None, path: Path, linger_s: float, start_s: float) -> int:
    log = path.with_name(path.name + ".log")
    handed = {
        "source": dict(source) if isinstance(source, Mapping) else str(source) if source is not None else None,
        "socket": str(path),
        "linger_s": linger_s,
    }
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "flexkv_core.server"],
                stdin=read_end,
                stdout=log_fd,
                stderr=log_fd,
                start_new_session=True,
            )
        finally:
            os.close(log_fd)
        with open(write_end, "wb", closefd=False) as pipe, contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps(handed).encode())
    finally:
        os.close(read_end)
        os.close(write_end)
    deadline = time.monotonic() + start_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerAwayError(f"the server ended with {process.returncode} before it served: {_end_of(log)}")
        if path.exists() and answers(path, 0.2):
            return process.pid
        time.sleep(0.02)
    process.kill()
    process.wait()
    raise ServerAwayError(f"the server was not ready within {start_s:g} s: {_end_of(log)}")


def _end_of(log: Path) -> str:
    try:
        return log.read_bytes()[-LOG_BYTES:].decode(errors="replace").strip()
    except OSError:
        return "its log cannot be read"
