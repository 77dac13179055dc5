"""The ground that the duties stand on: what an author gives, how a failure reads, what is cleaned up.

Owns the hooks and knobs of `BackendConformance`, the seed, media and processes of a test. The duties are mixed in
from the modules beside this one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import pytest

from flexkv_core.backend import BackendSpec
from flexkv_core.errors import FlexKVError
from flexkv_core.plugins import load_backend
from flexkv_core.region import HostRegion
from flexkv_core.testing.conformance.blocks import SMALLEST, Damage, Fill, Host, Slots, StoredBlock, some_key
from flexkv_core.testing.conformance.opened import Opened
from flexkv_core.testing.conformance.tier import Owner, RefusedError, Tier
from flexkv_core.tier_link import LinkSettings

DUTIES: Mapping[str, str] = {
    "answers": "every call returns one Status a block, probe a number of leading blocks, list arrays of one length",
    "identity": "what is read under (key, group) is what was written under it, byte for byte",
    "batches": "batches of every size and mixture are carried out whole, and answered in their order",
    "statuses": "OK only for blocks that were moved whole; MISSING for what is not held; FAILED for what went wrong",
    "only-what-was-asked": "nothing is written outside the batch's blocks, in the host region or on the medium",
    "submit": "done is called exactly once for each submitted batch, when its bytes have been moved",
    "concurrency": "up to `concurrency` calls at a time do not disturb each other",
    "probe": "the number of leading blocks that are held, and nothing else",
    "delete": "a deleted block is gone, others stay, and deleting what is not there is OK",
    "list": "every block that is held, once, with its length, and no other",
    "persistence": "a persistent backend serves after a restart what it had answered OK",
    "kill": "kill -9 at any time loses nothing that was answered OK, and makes nothing wrong",
    "recovery": "recover() returns every surviving block with its identity and slot, and no other",
    "full-medium": "a full medium answers FAILED, keeps what it has, and works again when there is room",
    "damage": "what others did to the medium never crashes the backend and is never served as whole",
    "close": "close returns promptly, also with calls in flight, and the medium can be opened again",
    "open-twice": "a second opening of one medium is refused with the holder's name, or harmless",
    "short-writes": "a write of which the medium took a part only is FAILED, and does not count as held",
    "throughput": "measured and printed; only right bytes are asked for",
    "leaks": "file descriptors, threads, processes and shared memory do not add up",
}
"""The duties, by the names that failures use."""

_numbers = itertools.count(1)


class Suite:
    """What an author sets and overrides; see `BackendConformance`."""

    backend: ClassVar[str] = ""
    """The backend's name, that of its entry point; its distribution must be installed."""
    exclusive: ClassVar[bool] = False
    """It claims its medium for itself: a second opening must be refused."""
    ordered_listing: ClassVar[bool] = False
    """Its list starts with the least recently written block."""
    many: ClassVar[int] = 300
    """Blocks in the duties that need many."""
    largest: ClassVar[int] = 4 << 20
    """Bytes of the largest block."""
    capacity: ClassVar[int] = 64 << 20
    """Bytes of the tier, for slot-addressed backends."""
    region_bytes: ClassVar[int] = 24 << 20
    """Bytes of the host region."""
    deadline_s: ClassVar[float] = 30.0
    """A call that takes longer has hung."""
    open_deadline_s: ClassVar[float] = 60.0
    """The same for opening and listing."""
    close_deadline_s: ClassVar[float] = 10.0
    """The same for closing."""
    kill_rounds: ClassVar[int] = 6
    """kill -9 so many times; ten times as many with FLEXKV_SOAK=1."""
    full_bytes: ClassVar[int] = 4 << 20
    """About how much the medium of `make_full_config` takes."""

    directory: Path
    """The medium of the test at hand."""
    seed: int
    random: random.Random
    duty: str = ""

    # ------------------------------------------------------------------ what an author gives

    def make_config(self, directory: Path) -> dict[str, Any]:
        """The backend's keys in a stack, for a medium of its own that belongs to `directory` (which exists).

        The same directory means the same medium, with what is on it; another one an empty medium.
        """
        raise NotImplementedError("make_config(self, directory) returns the backend's keys in a stack")

    def make_full_config(self, directory: Path) -> dict[str, Any] | None:
        """The same for a medium that is full after about `full_bytes`; None where there is no such thing."""
        return None

    def damage(self, block: StoredBlock, how: Damage) -> bool | None:
        """Change the block's bytes on the medium of `self.directory`, behind the backend's back.

        how: "flip" some bits of it; "truncate" it, so that a part is gone; "swap" its bytes with those of
        `block.other`, which is of the same length. Return False for what this medium cannot suffer.
        """
        raise NotImplementedError

    def medium_throughput(self, directory: Path) -> tuple[float, float] | None:
        """MB/s that the medium itself writes and reads, printed beside the backend's; None if not known."""
        return None

    # ------------------------------------------------------------------ a test's beginning and end

    @pytest.fixture(autouse=True)
    def _conformance(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
        given = os.environ.get("FLEXKV_SEED")
        self.seed = int(given) if given else secrets.randbits(32)
        self.random = random.Random(self.seed)
        self.directory = tmp_path / "medium"
        self.directory.mkdir(exist_ok=True)
        self._node = request.node.nodeid
        self._temporary = tmp_path
        self._opened: list[Opened] = []
        self._regions: list[HostRegion] = []
        self._owner: Owner | None = None
        self._slots = Slots(self.capacity)
        print(f"FLEXKV_SEED={self.seed}")
        yield
        for opened in self._opened:
            opened.tier.kill()
        if self._owner is not None:
            self._owner.close()
        self._opened.clear()
        for region in self._regions:
            with contextlib.suppress(BufferError):
                region.close()

    @property
    def spec(self) -> BackendSpec:
        try:
            return load_backend(self.backend)
        except FlexKVError as error:
            pytest.fail(f"{type(self).__name__}.backend = {self.backend!r}: {error}", pytrace=False)

    @property
    def soak(self) -> bool:
        """Whether whole counts are asked for."""
        return os.environ.get("FLEXKV_SOAK") == "1"

    def open(
        self,
        directory: Path | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        fast_deadline_s: float | None = None,
        refused: bool = False,
    ) -> Opened:
        """Open the backend in a process of its own.

        Raises RefusedError only with `refused`; without, the duty under test is broken.
        """
        directory = directory or self.directory
        if self._owner is None:
            self._owner = Owner()
        state = directory.with_name(directory.name + ".state")
        settings = LinkSettings(
            name=f"{self.backend}#{next(_numbers)}",
            backend=self.backend,
            config=_plain(self.make_config(directory) if config is None else config),
            capacity=self.capacity if self.spec.addressing == "slot" else None,
            slot_bytes=(SMALLEST, 65536),
            state_directory=state,
            deadline_s=fast_deadline_s or self.deadline_s,
            open_deadline_s=self.open_deadline_s,
            backoff_s=1e6,  # whatever kills it ends the test
            backoff_max_s=1e6,
        )
        region = HostRegion.create(self.region_bytes, "off", prefault=False)
        self._regions.append(region)
        try:
            tier = Tier(self._owner, settings, region)
        except RefusedError as error:
            if refused:
                raise
            self.broken(self.duty, f"it cannot be opened: {error}")
        opened = Opened(self, tier, Host(region, random.Random(self.seed)))
        self._opened.append(opened)
        return opened

    def reopen(self, before: Opened, *, config: Mapping[str, Any] | None = None) -> Opened:
        """Close in order, open the same medium again; what should be held is remembered."""
        self.close(before)
        after = self.open(config=config)
        after.held = dict(before.held)
        return after

    def close(self, opened: Opened) -> None:
        """Close in order: promptly, and without a crash."""
        status = opened.tier.close(self.close_deadline_s)
        if status == -9:
            self.broken(
                "close",
                f"close had not returned after {self.close_deadline_s:g} s, its process was killed",
                opened.tier,
            )
        if status != 0:
            self.broken("close", f"its process ended with {status} when it was closed", opened.tier)

    def broken(self, duty: str, how: str, tier: Tier | None = None) -> NoReturn:
        """Fail: which duty, how, and how to see it again."""
        log = [] if self._owner is None or tier is None else list(self._owner.records)
        mine = [line for line in log if line.startswith(f"{tier.settings.name}:")] if tier else []
        lines = [
            f'duty "{duty}" is broken by backend {self.backend!r}: {how}',
            f"  the duty: {DUTIES[duty]}",
            f"  to see it again: FLEXKV_SEED={self.seed} pytest '{self._node}'",
            *(f"  its log: {line[:2000]}" for line in mine[-3:]),
        ]
        pytest.fail("\n".join(lines), pytrace=False)

    def begin(self, duty: str, *, addressing: str = "", power: str = "", persistent: bool = False) -> Opened:
        """Start the test of a duty on an empty medium; skip where the backend does not claim what it is about."""
        self.duty = duty
        if addressing and self.spec.addressing != addressing:
            pytest.skip(f"for {addressing}-addressed backends")
        opened = self.open()
        if power and power not in opened.tier.powers:
            pytest.skip(f"it has no power {power!r}")
        if persistent and not opened.tier.capabilities.persistent:
            pytest.skip("it does not claim to be persistent")
        return opened

    # ------------------------------------------------------------------ blocks

    def block(
        self, length: int = SMALLEST, *, key: bytes | None = None, group: int = 0, fill: Fill = "random"
    ) -> StoredBlock:
        """A block that is not stored yet."""
        slot = self._slots.take(length) if self.spec.addressing == "slot" else 0
        return StoredBlock(key if key is not None else some_key(self.random), group, length, slot, fill)

    def blocks(self, count: int, length: int = SMALLEST) -> list[StoredBlock]:
        return [self.block(length) for _ in range(count)]

    def shuffled(self, blocks: Sequence[StoredBlock]) -> list[StoredBlock]:
        return self.random.sample(list(blocks), len(blocks))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As it would come from YAML."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in config.items()}
