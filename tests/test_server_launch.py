"""Starting servers: one at a socket, whoever comes first; what is not safe is refused by name."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_rig import CPU_ONLY, SPEC, ServerProcess, serving, until

from flexkv_core.errors import DirectoryInUseError, ServerAwayError, SocketPathError
from flexkv_core.server import connect, launch, starter
from flexkv_core.server.launch import answers, embedded, ensure_server
from flexkv_core.server.paths import LONGEST_PATH, PathLock, server_lock, socket_path

pytestmark = pytest.mark.usefixtures("leak_check")

STACK: dict[str, Any] = CPU_ONLY


def gone(pid: int) -> bool:
    """Ended; reaps a child."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return not Path(f"/proc/{pid}").exists()


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    until(lambda: gone(pid))


# ---------------------------------------------------------------- paths and locks


def test_paths_are_checked(tmp_path: Path) -> None:
    assert socket_path("ipc:///run/x/y") == Path("/run/x/y")
    assert socket_path(str(tmp_path / "s")) == tmp_path / "s"
    for wrong in ("tcp://127.0.0.1:5555", "ipc://", ""):
        with pytest.raises(SocketPathError, match="local sockets"):
            socket_path(wrong)
    with pytest.raises(SocketPathError, match=rf"at most {LONGEST_PATH}"):
        socket_path("/" + "x" * LONGEST_PATH)


def test_the_default_path_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    path = socket_path(None, {"XDG_RUNTIME_DIR": str(runtime)})
    assert path == runtime / "flexkv" / "server.sock"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o755)
    with pytest.raises(SocketPathError, match="alone"):
        socket_path(None, {"XDG_RUNTIME_DIR": str(runtime)})
    path.parent.rmdir()
    (runtime / "elsewhere").mkdir(mode=0o700)
    path.parent.symlink_to(runtime / "elsewhere")
    with pytest.raises(SocketPathError, match="alone"):
        socket_path(None, {"XDG_RUNTIME_DIR": str(runtime)})
    runtime.chmod(0o777)  # not private: /tmp's own place is taken instead
    assert socket_path(None, {"XDG_RUNTIME_DIR": str(runtime)}).parent == Path(f"/tmp/flexkv-{os.geteuid()}")


def test_what_lies_at_the_default_path_is_no_crash(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    for make in (lambda path: path.write_text(""), lambda path: path.symlink_to(tmp_path / "nowhere")):
        make(runtime / "flexkv")
        with pytest.raises(SocketPathError, match="alone"):
            socket_path(None, {"XDG_RUNTIME_DIR": str(runtime)})
        (runtime / "flexkv").unlink()


def test_a_log_is_written_through_no_link_and_into_no_pipe(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "s.log").symlink_to(victim)
    with pytest.raises(SocketPathError, match="cannot be opened"):
        ensure_server(STACK, tmp_path / "s")
    assert victim.read_text() == "precious"
    (tmp_path / "s.log").unlink()
    os.mkfifo(tmp_path / "s.log")
    with pytest.raises(SocketPathError, match=r"s\.log: "):
        ensure_server(STACK, tmp_path / "s")
    server_lock(tmp_path / "s").release()


def test_a_server_whose_lock_file_was_removed_is_found_by_its_socket(tmp_path: Path) -> None:
    with serving(tmp_path / "s"):
        (tmp_path / "s.lock").unlink(missing_ok=True)
        with pytest.raises(DirectoryInUseError, match=f"process {os.getpid()}"):
            server_lock(tmp_path / "s")


def test_a_lock_that_was_handed_over_ends_with_its_last_holder(tmp_path: Path) -> None:
    first = server_lock(tmp_path / "s")
    second = server_lock(tmp_path / "s", os.dup(first.fd))
    first.release()
    with pytest.raises(DirectoryInUseError):
        server_lock(tmp_path / "s")
    second.release()
    server_lock(tmp_path / "s").release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_refused(tmp_path: Path) -> None:
    """Even where the directories and the socket would let them in."""
    source = textwrap.dedent("""
        import os, sys
        sys.path.insert(0, sys.argv[2])
        from server_rig import Wire, hello
        from flexkv_core.errors import ServerAwayError
        from flexkv_core.server import connect
        os.setuid(65534)
        try:
            connect(sys.argv[1], connect_s=0.3)
            sys.exit(1)
        except ServerAwayError:
            pass
        with Wire(sys.argv[1]) as wire:
            print(wire.ask(hello()).reason)
            assert wire.hung_up()
    """)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, serving(Path(folder) / "s"):
        assert os.stat(f"{folder}/s").st_mode & 0o777 == 0o600
        os.chmod(folder, 0o777)
        os.chmod(f"{folder}/s", 0o777)
        command = [sys.executable, "-c", source, f"{folder}/s", os.path.dirname(__file__)]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (told.returncode, told.stderr) == (0, "")
        assert "user 65534 is not the server's user 0" in told.stdout


def test_a_lock_is_no_link_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "s.lock").symlink_to(victim)
    with pytest.raises(SocketPathError, match="cannot be opened: Too many levels"):
        server_lock(tmp_path / "s")
    assert victim.read_text() == "precious"
    (tmp_path / "s.lock").unlink()
    with server_lock(tmp_path / "s"), pytest.raises(DirectoryInUseError, match=f"process {os.getpid()}"):
        server_lock(tmp_path / "s")
    monkeypatch.setattr("flexkv_core.server.paths.os.geteuid", lambda: 4242)
    with pytest.raises(SocketPathError, match="another user's"):
        PathLock(tmp_path / "s.lock")


# ---------------------------------------------------------------- starting


def test_whoever_comes_first_starts_it_and_only_one(tmp_path: Path) -> None:
    source = textwrap.dedent("""
        import sys
        from pathlib import Path
        from flexkv_core.server.launch import ensure_server
        stack = {"tiers": [{"backend": "cpu", "capacity": "16MiB", "prefault": False}]}
        print(ensure_server(stack, Path(sys.argv[1]), linger_s=60))
    """)
    racers = [
        subprocess.Popen([sys.executable, "-c", source, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    said = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    started = [int(pid) for pid in said if pid != "None"]
    assert len(started) == 1, said
    with connect(tmp_path / "s") as cache:
        assert cache.stats()["server"]["pid"] == started[0]
    assert os.getsid(started[0]) == started[0], "in a session of its own"
    stop(started[0])


def test_the_config_is_in_no_argv_and_the_log_is_private(tmp_path: Path) -> None:
    pid = ensure_server(STACK, tmp_path / "s", linger_s=60)
    assert pid is not None
    assert "tiers" not in Path(f"/proc/{pid}/cmdline").read_text()
    assert (tmp_path / "s.log").stat().st_mode & 0o777 == 0o600
    assert ensure_server(STACK, tmp_path / "s") is None
    stop(pid)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerAwayError, match="nosuch"):
        ensure_server({"tiers": [{"backend": "nosuch"}]}, tmp_path / "s")
    with pytest.raises(ServerAwayError, match="does not fit"):
        ensure_server({"tiers": [{"backend": "cpu", "capacity": "900TiB"}]}, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_second_server_is_refused_and_told_whose_it_is(tmp_path: Path) -> None:
    stack = tmp_path / "stack.yaml"
    stack.write_text("tiers: [{backend: cpu, capacity: 16MiB, prefault: false}]\n")
    command = [str(Path(sys.executable).with_name("flexkv")), "serve", "--stack", str(stack), "--socket"]
    with subprocess.Popen([*command, str(tmp_path / "s")]) as first:
        until(lambda: (tmp_path / "s").exists() and answers(tmp_path / "s"))
        second = subprocess.run(
            [*command, f"ipc://{tmp_path}/s"], capture_output=True, text=True, timeout=60, check=False
        )
        assert second.returncode == 2
        assert re.search(rf"served by process {first.pid}: use that one", second.stderr)
        with connect(tmp_path / "s") as cache:
            assert cache.register(SPEC)
        first.terminate()
        assert first.wait(30) == 0
    assert not (tmp_path / "s").exists()


def test_what_a_killed_server_left_is_no_hindrance(tmp_path: Path) -> None:
    first = ensure_server(STACK, tmp_path / "s", linger_s=60)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: gone(first))
    assert (tmp_path / "s").exists()
    second = ensure_server(STACK, tmp_path / "s", linger_s=60)
    assert second not in (None, first)
    stop(second or 0)


SLOW_CLOSE = """
import pathlib, time
closed, mark = daemon.KVCacheManager.close, pathlib.Path({!r})
def slow(self, deadline_s):
    mark.touch()
    while mark.exists():
        time.sleep(0.005)
    closed(self, deadline_s)
daemon.KVCacheManager.close = slow
"""


def test_a_server_that_is_stopping_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not answer any more, but holds the lock while it writes down what is queued."""
    closing, tried = tmp_path / "closing", []

    def counted(path: Path) -> PathLock:
        tried.append(path)
        return server_lock(path)

    monkeypatch.setattr(launch, "server_lock", counted)
    with ServerProcess(tmp_path / "s", prelude=SLOW_CLOSE.format(str(closing))) as first:
        os.kill(first.pid, signal.SIGTERM)
        until(closing.exists)
        started: list[int | None] = []
        thread = threading.Thread(target=lambda: started.append(ensure_server(STACK, tmp_path / "s", linger_s=60)))
        thread.start()
        until(lambda: len(tried) >= 2)
        assert not started
        closing.unlink()
        thread.join(60)
        assert started
        assert started[0] not in (None, first.pid)
        stop(started[0] or 0)


def test_a_long_config_for_a_server_that_dies_at_once_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ServerAwayError, match="ended with 1"):
        ensure_server({**STACK, "comment": "x" * (1 << 20)}, tmp_path / "s")
    server_lock(tmp_path / "s").release()


def test_another_stack_than_this_engines_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = {"tiers": [{"backend": "cpu", "capacity": "17MiB", "prefault": False}]}
    with serving(tmp_path / "s", STACK):
        embedded(STACK, tmp_path / "s").close()
        assert "another stack" not in caplog.text
        embedded(other, tmp_path / "s").close()
        assert "another stack" in caplog.text


MAIN_THREAD_DEAF = """
import signal
opened = daemon.Server._open
def masked(self):
    opened(self)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
daemon.Server._open = masked
"""


def test_sigterm_is_heard_whichever_thread_it_is_handed_to(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "s", prelude=MAIN_THREAD_DEAF) as server:
        assert server.stop() == 0


def test_an_embedded_server_ends_after_its_last_client(tmp_path: Path) -> None:
    with embedded(STACK, tmp_path / "s", linger_s=0.3) as cache:
        pid = cache.stats()["server"]["pid"]
        with embedded(STACK, tmp_path / "s", linger_s=0.3) as other:
            assert other.stats()["server"]["pid"] == pid
        time.sleep(0.5)
        assert cache.connected
    until(lambda: gone(pid))
    assert not (tmp_path / "s").exists()


def test_an_embedded_server_that_was_killed_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "AFTER_S", 0.05)
    with embedded(STACK, tmp_path / "s", linger_s=0.3) as cache:
        model = cache.register(SPEC)
        pid = cache.stats()["server"]["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: gone(pid))
        until(lambda: cache.lookup(model, np.zeros((1, 32), np.uint8)).blocks == 0 and cache.stats())
        second = cache.stats()["server"]["pid"]
        assert second != pid
    until(lambda: gone(second))
