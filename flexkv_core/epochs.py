"""The present epoch of each namespace, kept where a restart finds it: what was reset stays reset.

Owns the record and the files that hold it. Does not own what a reset does (`manager.py`) nor names (`blocks.py`).

The record is one small file in each of a few directories: one that the stack names, and one on the medium of every
tier that has a place for it, where it lives exactly as long as the blocks. What cannot be trusted (damaged, removed,
unreadable, of another version, or two directories that differ) is not guessed at: every namespace then gets a fresh
random epoch, so that nothing of before is served. That costs a cold start, never a wrong answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexkv_core.errors import DirectoryInUseError
from flexkv_core.locks import DirectoryLock

logger = logging.getLogger("flexkv.epochs")

VERSION = 1
EPOCH_BYTES = 16
MOST_NAMESPACES = 1024
"""Namespaces with an epoch of their own: bounds the file, and so what a reset writes, to about 120 KB."""
MOST_FILE_BYTES = 1 << 20
FILE, TEMPORARY = "epochs", "epochs.tmp"


class _UntrustedError(Exception):
    """What a directory says, or that it says nothing, is not to be relied on."""


@dataclass(slots=True)
class _Record:
    """`generation`: the epoch of every namespace that has none of its own; b"" until something was lost."""

    generation: bytes = b""
    own: dict[bytes, bytes] = field(default_factory=dict)  # root without an epoch -> epoch

    def encoded(self) -> bytes:
        own = {root.hex(): epoch.hex() for root, epoch in self.own.items()}
        text = json.dumps({"version": VERSION, "generation": self.generation.hex(), "own": own}, sort_keys=True)
        return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n".encode()

    @classmethod
    def decoded(cls, content: bytes) -> _Record:
        """Raises _UntrustedError for anything but what `encoded` returned."""
        try:
            text, digest, _ = content.decode("ascii").split("\n")
            if hashlib.sha256(text.encode()).hexdigest() != digest:
                raise _UntrustedError("its checksum does not fit")
            said = json.loads(text)
            if said["version"] != VERSION:
                raise _UntrustedError(f"it has version {said['version']}, and this is {VERSION}")
            own = {bytes.fromhex(root): bytes.fromhex(epoch) for root, epoch in said["own"].items()}
            return cls(bytes.fromhex(said["generation"]), own)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _UntrustedError(f"it cannot be read: {type(error).__name__}") from error


class _Place:
    """One directory's file, for as long as this process holds the directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock: DirectoryLock | None = None

    def __str__(self) -> str:
        return str(self._directory)

    def take(self) -> bool:
        """Lock the directory, making it if need be; whether it was in use before. Raises OSError, and
        DirectoryInUseError, which names the holder."""
        used = (self._directory / "lock").exists()
        if self._lock is None:
            self._lock = DirectoryLock(self._directory)
            if not used:
                _sync(self._directory.parent)
        return used

    def read(self) -> bytes | None:
        """The file's content; None where there is none."""
        try:
            with (self._directory / FILE).open("rb") as file:
                return file.read(MOST_FILE_BYTES)
        except FileNotFoundError:
            return None

    def write(self, content: bytes) -> None:
        """Replace the file: after a crash at any point it is the old one or the new one, and the new one after the
        return. Raises OSError."""
        self.take()
        temporary = self._directory / TEMPORARY
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(self._directory / FILE)
        _sync(self._directory)

    def spoil(self) -> None:
        """Make sure that the old file is not believed. Needs no room on the medium. Raises OSError."""
        self.take()
        (self._directory / FILE).unlink(missing_ok=True)
        _sync(self._directory)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


class Epochs:
    """One caller at a time; the manager's lock is not needed, and should not be held: a reset waits for a disk.

    Args:
        directory: that the stack names, or None.
        media: on the media of tiers. Without any directory the record is kept in memory only.

    Attributes:
        error: why the record, since the last reset or the start, is not everywhere, or None.

    Raises DirectoryInUseError if another process holds `directory`; one of `media` that is held is that tier's matter.
    """

    def __init__(self, directory: Path | None, media: Sequence[Path]) -> None:
        self.error: str | None = None
        self._record = _Record()
        named = [_Place(directory)] if directory is not None else []
        self._places = [*named, *(_Place(medium) for medium in dict.fromkeys(media) if medium != directory)]
        found: list[bytes] = []
        lost: str | None = None
        for place in self._places:
            try:
                if place.take():
                    found.append(_trusted(place.read()))
            except DirectoryInUseError as error:
                if place in named:
                    raise
                lost = str(error)
            except (OSError, _UntrustedError) as error:
                lost = f"{place}: {error}"
        if len(set(found)) > 1:
            lost = "the directories differ: " + ", ".join(str(place) for place in self._places)
        if lost is not None:
            logger.warning(
                "the record of resets cannot be relied on, so nothing of before this start is served: %s", lost
            )
            self._record.generation = _fresh()
        elif found:
            self._record = _Record.decoded(found[0])
        if lost is not None or len(found) < len(self._places):
            self._keep()

    def of(self, root: bytes) -> bytes:
        """The present epoch of the namespace that has this root without an epoch."""
        return self._record.own.get(root, self._record.generation)

    def renew(self, root: bytes) -> bytes:
        """Give it a fresh epoch, and return that when no restart will find the old one.

        When there are too many, the namespaces without an epoch of their own begin a new generation together. Where it
        cannot be written, the old record is removed, which a restart takes for a loss of all, and `error` says why.
        """
        if len(self._record.own) >= MOST_NAMESPACES and root not in self._record.own:
            logger.warning("%d namespaces were reset: all others are, with them, at the next start", MOST_NAMESPACES)
            self._record = _Record(_fresh())
        self._record.own[root] = _fresh()
        self._keep()
        return self._record.own[root]

    def close(self) -> None:
        """Let others have the directories. Safe to call twice."""
        for place in self._places:
            place.release()

    def _keep(self) -> None:
        content, self.error = self._record.encoded(), None
        for place in self._places:
            try:
                place.write(content)
            except DirectoryInUseError as error:  # so is the tier: nothing of ours is there, and ours has another epoch
                self.error = str(error)
            except OSError as error:
                self.error = f"{place}: {error}"
                try:
                    place.spoil()
                    logger.error("%s: the next start begins with an empty cache", self.error)
                except OSError as worse:
                    self.error = f"{self.error}; nor can the old record be removed: {worse}"
                    logger.error("%s: a restart may serve what was stored before", self.error)


def _trusted(content: bytes | None) -> bytes:
    """The content, if it is a whole record. A directory that was in use has one."""
    if content is None:
        raise _UntrustedError("the file of a directory that was in use is gone")
    return _Record.decoded(content).encoded()


def _fresh() -> bytes:
    return os.urandom(EPOCH_BYTES)


def _sync(directory: Path) -> None:
    """Make names in it durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
