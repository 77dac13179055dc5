"""Starting a server where none runs: whichever engine's process comes first does it, and a lock decides.

Owns the race, which is for the socket's lock: whoever gets it starts the server and hands the lock over. So nothing is
started beside a server that is starting or stopping. The config goes through a pipe: secrets are in no argv. The server
is in a session of its own, so that it outlives the engine that started it. Does not own serving (`daemon.py`).
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

from flexkv_core.config import load_config
from flexkv_core.errors import DirectoryInUseError, ServerAwayError
from flexkv_core.server.client import CALL_DEADLINE_S, Client, connect
from flexkv_core.server.paths import PathLock, open_own, server_lock

LINGER_S = 10.0
"""How long a server that an engine started outlives its last client."""
START_S = 120.0
"""How long starting may take: host memory is prepared, which takes a second for some ten GiB."""
STEP_S = 0.02
"""Between two looks at whether it is there."""
LOG_BYTES = 4096
"""Of the end of the log, shown where the server did not start."""


def answers(path: Path, timeout_s: float = 1.0) -> bool:
    """Whether a server is ready for clients at this socket. Raises ServerRefusedError if it does not want this one, for
    good: one that is stopping is not there."""
    client = Client(path, role="observer")
    try:
        client.greet(timeout_s)
        return client.welcome is not None and client.welcome.ready
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
    deadline = time.monotonic() + start_s
    holder = ""
    while not _is_there(path):
        if time.monotonic() >= deadline:
            raise ServerAwayError(f"no server could be started within {start_s:g} s: {holder}")
        try:
            with server_lock(path) as lock:
                return _start(source, path, linger_s, deadline, lock)
        except DirectoryInUseError as error:  # somebody is starting one, or one is stopping
            holder = str(error)
            time.sleep(STEP_S)
    return None


def embedded(
    source: str | Path | Mapping[str, Any] | None,
    path: Path,
    *,
    engine: str | None = None,
    deadline_s: float = CALL_DEADLINE_S,
    linger_s: float = LINGER_S,
    notices: bool = False,
) -> Client:
    """A client of the server at this socket, which is started where none is, now and whenever it has gone.

    Raises as `ensure_server`, and StackConfigError.
    """
    digest = load_config(source).digest
    ensure_server(source, path, linger_s=linger_s)
    return connect(
        path,
        engine=engine,
        deadline_s=deadline_s,
        connect_s=START_S,
        stack_digest=digest,
        starter=lambda: ensure_server(source, path, linger_s=linger_s),
        notices=notices,
    )


def _is_there(path: Path, timeout_s: float = 1.0) -> bool:
    return path.exists() and answers(path, timeout_s)


def _start(
    source: str | Path | Mapping[str, Any] | None, path: Path, linger_s: float, deadline: float, lock: PathLock
) -> int:
    """Start the process, which is given the lock, and wait until it serves."""
    log = path.with_name(path.name + ".log")
    handed = {
        "source": dict(source) if isinstance(source, Mapping) else str(source) if source is not None else None,
        "socket": str(path),
        "linger_s": linger_s,
        "lock": lock.fd,
    }
    log_fd = open_own(log, os.O_WRONLY | os.O_TRUNC)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "flexkv_core.server"],
            stdin=subprocess.PIPE,
            stdout=log_fd,
            stderr=log_fd,
            start_new_session=True,
            pass_fds=[lock.fd],
        )
    finally:
        os.close(log_fd)
    lock.release()  # the process's alone from here on: it ends with it
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(json.dumps(handed, default=str).encode())
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerAwayError(f"the server ended with {process.returncode} before it served: {_end_of(log)}")
        if _is_there(path, 0.2):
            return process.pid
        time.sleep(STEP_S)
    process.kill()
    process.wait()
    raise ServerAwayError(f"the server was not ready in time: {_end_of(log)}")


def _end_of(log: Path) -> str:
    try:
        return log.read_bytes()[-LOG_BYTES:].decode(errors="replace").strip()
    except OSError:
        return "its log cannot be read"
