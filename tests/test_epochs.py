"""Resets outlive the process: whatever happens to the record of epochs, nothing of before a reset is served again."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gates import until
from helpers import Engine, prompt, stack
from rig import Rig, gate_stack, gate_tier, wait_ready

from flexkv_core import epochs
from flexkv_core.epochs import EPOCH_BYTES, FILE, MOST_FILE_BYTES, MOST_NAMESPACES, Epochs
from flexkv_core.errors import DirectoryInUseError, StateError
from flexkv_core.manager import KVCacheManager
from flexkv_core.plugins import load_backend

NAME, OTHER = b"n" * 32, b"o" * 32


@pytest.fixture
def reopen() -> Iterator[Callable[..., Epochs]]:
    """Opens a record as a restart does: the one before is closed first."""
    opened: list[Epochs] = []

    def reopen(*media: Path) -> Epochs:
        for each in opened:
            each.close()
        opened.append(Epochs(None, media))
        return opened[-1]

    yield reopen
    for each in opened:
        each.close()


# ---------------------------------------------------------------- through the manager


def open_ready(config: Any) -> KVCacheManager:
    """Opened, and every tier has said what it holds."""
    manager = KVCacheManager.open(config)
    wait_ready(manager)
    until(lambda: not any(queue.listings for queue in manager._scheduler.queues().values()))
    return manager


def found(engine: Engine, seed: int) -> int:
    """Blocks of a prompt that are loaded, all right."""
    ready, wrong, _ = engine.load(engine.keys(prompt(seed, 4)))
    assert wrong == 0
    return ready


def sunk(engine: Engine, seed: int) -> None:
    engine.store(engine.keys(prompt(seed, 4)))
    assert engine.manager.drain(10)


@pytest.mark.parametrize("named", [False, True], ids=["on the medium", "in the state directory"])
def test_what_was_reset_stays_reset_after_a_restart(tmp_path: Path, named: bool) -> None:
    config = stack(tmp_path / "tier", isolation="none")
    if named:
        config["state_directory"] = str(tmp_path / "state")
    with open_ready(config) as manager:
        engine = Engine(manager)
        sunk(engine, 1)
    with open_ready(config) as manager:
        engine = Engine(manager)
        assert engine.namespace.epoch == b""
        assert found(engine, 1) == 4, "a restart alone forgets nothing"
        engine.namespace = manager.reset(engine.namespace)
        fresh = engine.namespace
        assert manager.stats()["epochs"] == {"error": None}
        sunk(engine, 2)
    for _ in range(2):
        with open_ready(config) as manager:
            engine, stranger = Engine(manager), Engine(manager, model="stranger")
            assert engine.namespace == fresh
            assert (found(engine, 1), found(engine, 2)) == (0, 4)
            assert stranger.namespace.epoch == b"", "only what was reset"
    for folder in [tmp_path / "tier" / "epochs", *[tmp_path / "state" / "epochs"] * named]:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / FILE).stat().st_mode & 0o777 == 0o600


def test_two_managers_on_one_state_directory(tmp_path: Path) -> None:
    config = gate_stack(8, state_directory=str(tmp_path / "state"))
    with KVCacheManager.open(config):
        for _ in range(2):
            with pytest.raises(DirectoryInUseError, match=f"in use by process {os.getpid()}"):
                KVCacheManager.open(config)
    KVCacheManager.open(config).close()


class TestATierWithoutAPlace:
    """It has no directory on its medium, and the stack names none."""

    @pytest.fixture(autouse=True)
    def placeless(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(load_backend("directory").config_model, "epoch_directory", lambda self: None)

    def test_a_persistent_one_cannot_be_reset(self, tmp_path: Path) -> None:
        config = stack(tmp_path / "tier", isolation="none")
        with open_ready(config) as manager:
            engine = Engine(manager)
            sunk(engine, 1)
            match = "tier directory would serve the old blocks after a restart.*state_directory"
            with pytest.raises(StateError, match=match):
                manager.reset(engine.namespace)
            assert found(engine, 1) == 4, "nothing has changed"
        config["state_directory"] = str(tmp_path / "state")
        with open_ready(config) as manager:
            engine = Engine(manager)
            assert found(engine, 1) == 4
            engine.namespace = manager.reset(engine.namespace)
            sunk(engine, 2)
        with open_ready(config) as manager:
            engine = Engine(manager)
            assert (found(engine, 1), found(engine, 2)) == (0, 4)

    def test_one_in_memory_can(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with open_ready(stack(tmp_path, isolation="none")) as manager:
            link = manager._scheduler.queues()[1].link
            assert link.capabilities is not None
            monkeypatch.setattr(link, "capabilities", dataclasses.replace(link.capabilities, persistent=False))
            assert manager.reset(Engine(manager).namespace).epoch
            monkeypatch.setattr(link, "capabilities", None)  # it has not opened yet, so nobody knows
            with pytest.raises(StateError):
                manager.reset(Engine(manager).namespace)


def test_a_tier_that_is_never_persistent_needs_no_place() -> None:
    lower = {"backend": "cpu", "name": "second", "capacity": "1MiB"}
    with KVCacheManager.open(gate_stack(8, lower)) as manager:  # whether it has opened or not
        assert manager.reset(Rig(manager).namespace).epoch


LIAR = """
    import dataclasses
    from gates import fk, gate_backend

    @fk.hookimpl
    def flexkv_backend():
        return dataclasses.replace(gate_backend(), name="liar", persistent=False)
"""


def test_a_tier_that_denies_to_be_persistent_is_held_to_it(install_plugin: Callable[..., None]) -> None:
    install_plugin("liar", LIAR)
    with KVCacheManager.open(gate_stack(8, gate_tier() | {"backend": "liar"})) as manager:
        until(lambda: "its spec says that it is not" in str(manager.stats()["tiers"]["gate"]["last_error"]))


def test_without_lower_tiers_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with KVCacheManager.open(gate_stack(8)) as manager:
        rig = Rig(manager)
        assert manager.reset(rig.namespace).epoch
    assert not list(tmp_path.iterdir())


def test_a_reset_that_cannot_be_written_counts_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stack(tmp_path, isolation="none")
    with open_ready(config) as manager:
        engine = Engine(manager)
        sunk(engine, 1)
        with monkeypatch.context() as full:
            full.setattr(os, "write", no_room)
            engine.namespace = manager.reset(engine.namespace)
        assert "No space left on device" in manager.stats()["epochs"]["error"]
        assert found(engine, 1) == 0
        sunk(engine, 2)
    with open_ready(config) as manager:
        engine = Engine(manager)
        assert found(engine, 1) == found(engine, 2) == 0, "which one it was, nobody knows"
        assert engine.namespace.epoch != b""
        sunk(engine, 3)
        known = engine.namespace
    with open_ready(config) as manager:
        engine = Engine(manager)
        assert engine.namespace == known
        assert found(engine, 3) == 4


def no_room(descriptor: int, content: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------------------------------- the record


def test_epochs_are_remembered(reopen: Callable[..., Epochs], tmp_path: Path) -> None:
    record = reopen(tmp_path)
    assert record.of(NAME) == b""
    fresh = [record.renew(NAME) for _ in range(3)]
    assert len({*fresh, b""}) == 4
    assert {len(epoch) for epoch in fresh} == {EPOCH_BYTES}
    for _ in range(2):
        record = reopen(tmp_path)
        assert (record.of(NAME), record.of(OTHER)) == (fresh[-1], b"")


def test_it_is_on_disk_before_the_reset_returns(
    reopen: Callable[..., Epochs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that a power loss asks for: content, then name."""
    record = reopen(tmp_path)
    did: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def syncing(descriptor: int) -> None:
        did.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renaming(self: Path, to: Path) -> Path:
        did.append(f"rename {self.name} {to.name}")
        return rename(self, to)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    record.renew(NAME)
    assert did == ["fsync epochs.tmp", "rename epochs.tmp epochs", f"fsync {tmp_path.name}"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def another_version(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epochs, "VERSION", 2)
        path.write_bytes(epochs._Record().encoded())


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "noise": lambda path: path.write_bytes(bytes(range(256))),
    "another version": another_version,
    "huge": lambda path: path.write_bytes(b"x" * (MOST_FILE_BYTES + 1)),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_serves_nothing_of_before(
    damage: Callable[[Path], Any], reopen: Callable[..., Epochs], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = reopen(tmp_path)
    before = {b"", record.renew(NAME)}
    record.close()
    damage(tmp_path / FILE)
    with caplog.at_level(logging.WARNING, "flexkv.epochs"):
        record = reopen(tmp_path)
    assert "cannot be relied on" in caplog.text
    now = record.of(NAME)
    assert now == record.of(OTHER), "one for all that are not reset"
    assert now not in before
    if (tmp_path / FILE).is_dir():
        assert record.error is not None
        (tmp_path / FILE).rmdir()
    assert record.renew(OTHER) not in {*before, now}
    assert (record.error, reopen(tmp_path).of(NAME)) == (None, now), "from now on it is known again"


def test_any_flipped_bit_is_noticed(reopen: Callable[..., Epochs], tmp_path: Path) -> None:
    record = reopen(tmp_path)
    last = record.renew(NAME)
    record.close()
    content = (tmp_path / FILE).read_bytes()
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1
        (tmp_path / FILE).write_bytes(changed)
        assert reopen(tmp_path).of(NAME) not in (last, b""), f"byte {at}"


def test_directories_that_differ_are_not_believed(reopen: Callable[..., Epochs], tmp_path: Path) -> None:
    """Two media that were in different stacks, or a crash between the two files."""
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    fresh = reopen(one).renew(NAME)
    assert reopen(one, two).of(NAME) == fresh, "a new medium has nothing to say"
    assert reopen(two).of(NAME) == fresh, "and knows it now"
    other = reopen(two, three).renew(NAME)
    both = reopen(one, two).of(NAME)
    assert both not in {b"", fresh, other}
    assert reopen(one, two).of(NAME) == both
    assert reopen(one).of(NAME) == both


@pytest.mark.parametrize("broken", [0, 1])
def test_a_medium_that_fails_at_a_reset_is_not_believed(
    broken: int, reopen: Callable[..., Epochs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = [tmp_path / "one", tmp_path / "two"]
    record = reopen(*media)
    write = os.write

    def failing(descriptor: int, content: Any) -> int:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if media[broken].name in name:
            if len(content) > 100:
                return write(descriptor, content[:100])  # a medium that is nearly full
            return no_room(descriptor, content)
        return write(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", failing)
        fresh = record.renew(NAME)
    assert record.of(NAME) == fresh
    assert record.error is not None
    assert media[broken].name in record.error
    assert reopen(*media).of(NAME) not in (b"", fresh)
    record.close()


def test_a_medium_that_recovers_is_up_to_date_with_the_next_reset(
    reopen: Callable[..., Epochs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = reopen(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", no_room)
        first = record.renew(NAME)
    second = record.renew(OTHER)
    assert record.error is None
    record = reopen(tmp_path)
    assert (record.of(NAME), record.of(OTHER)) == (first, second)


def test_a_medium_that_takes_nothing_at_all_is_reported(
    reopen: Callable[..., Epochs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = reopen(tmp_path)

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", broken)
        patch.setattr(Path, "unlink", broken)
        record.renew(NAME)
    assert record.error is not None
    assert "nor can the old record be removed" in record.error
    assert "a restart may serve what was stored before" in caplog.text


def test_a_medium_that_another_holds_is_left_alone(reopen: Callable[..., Epochs], tmp_path: Path) -> None:
    holder = Epochs(None, [tmp_path])
    theirs = holder.renew(NAME)
    ours = Epochs(None, [tmp_path])
    assert ours.of(NAME) not in (b"", theirs)
    fresh = ours.renew(NAME)
    assert f"in use by process {os.getpid()}" in str(ours.error)
    assert holder.of(NAME) == theirs
    holder.close()
    ours.renew(OTHER)  # by now the medium is ours
    assert ours.error is None
    ours.close()
    assert reopen(tmp_path).of(NAME) == fresh


def test_too_many_resets_reset_everything(
    reopen: Callable[..., Epochs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epochs, "MOST_NAMESPACES", 3)
    record = reopen(tmp_path)
    names = [bytes([number]) * 32 for number in range(4)]
    given = [record.renew(name) for name in names[:3]]
    again = record.renew(names[1])
    assert [record.of(name) for name in names] == [given[0], again, given[2], b""]
    last = record.renew(names[3])
    record = reopen(tmp_path)
    now = [record.of(name) for name in [*names, NAME]]
    assert now[3] == last
    assert now[0] == now[1] == now[2] == now[4]
    assert now[0] not in {*given, again, last, b""}


def test_the_file_is_bounded(tmp_path: Path) -> None:
    record = epochs._Record()
    for number in range(MOST_NAMESPACES):
        record.own[number.to_bytes(32, "big")] = bytes(EPOCH_BYTES)
    assert len(record.encoded()) <= 120_000


# ---------------------------------------------------------------- kill -9

CHILD = """
    import os, signal, sys
    from pathlib import Path
    from helpers import Engine
    from test_epochs import open_ready, stack

    countdown = int(sys.argv[2])

    def lethal(name, module):
        original = getattr(module, name)
        def act(*arguments, **options):
            global countdown
            for _ in range(2):  # before and after
                countdown -= 1
                if not countdown:
                    os.kill(os.getpid(), signal.SIGKILL)
                if _ == 0:
                    result = original(*arguments, **options)
            return result
        setattr(module, name, act)

    manager = open_ready(stack(Path(sys.argv[1]), isolation="none"))
    engine = Engine(manager)
    print(engine.namespace.epoch.hex(), flush=True)
    for name, module in (("write", os), ("fsync", os), ("open", os), ("rename", Path), ("close", os)):
        lethal(name, module)
    while True:
        engine.namespace = manager.reset(engine.namespace)
        print(engine.namespace.epoch.hex(), flush=True)
"""


def test_a_process_killed_around_a_reset_leaves_the_old_epoch_or_the_new_one(
    reopen: Callable[..., Epochs], tmp_path: Path
) -> None:
    """Killed before or after a system call of a reset: what had returned is remembered, and nothing older is."""
    root = tmp_path / "tier"
    draw = random.Random(8)
    outlived = 0
    for _ in range(12):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CHILD), str(root), str(draw.randint(1, 60))],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        returned = [bytes.fromhex(line) for line in done.stdout.splitlines()]
        with open_ready(stack(root, isolation="none")) as manager:
            epoch = Engine(manager).namespace.epoch
        assert epoch not in returned[:-1], "an epoch from before a reset that had returned"
        outlived += epoch == returned[-1]
        assert epoch == returned[-1] or (len(epoch) == EPOCH_BYTES and epoch not in returned)
    assert 0 < outlived < 12, "both sides of the moment were hit"
