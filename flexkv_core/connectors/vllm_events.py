"""vLLM's KV events: what a router is told of the blocks that are cached here, in the engine's own hashes.

Owns what has been announced of each block, in which medium, and the order in which it is said: after commit, a parent
before its child, a removal after its store. Exists only where the engine's events are on. Does not own what the server
holds: it says so itself, in order, ahead of the end of every transfer (`Client.take_notices`).

The server knows keys, a router wants tokens and the engine's hashes: so what a store or a load names is described
when it begins, and the description is kept for as long as the server holds the block. Blocks that nobody has described
here, such as another engine's, are not announced until a load or store of this one names them. Host memory is
announced as `CPU`, all lower tiers that keep exact books together as `STORAGE`.

A block is announced only behind an announced parent: what lies behind a hole is not found.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from flexkv_core.blocks import Keys
from flexkv_core.layout import ModelSpec
from flexkv_core.server import Client, ClientTransfer
from flexkv_core.server import messages as m

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger("flexkv.vllm")

CPU, STORAGE = 0, 1
MEDIA = ("CPU", "STORAGE")
KEY_BYTES = 32
TIER_BITS = 64
"""Of a block's mask, for each KV group: one a tier of the stack, host memory first."""
LOWER_TIERS = (1 << TIER_BITS) - 2
MOST_BLOCKS = 1 << 20
"""Described at a time; blocks beyond are cached, but not announced."""

Hash = int | bytes


class Origin(NamedTuple):
    """What the blocks of one request have in common."""

    lora_id: int | None
    lora_name: str | None


@dataclass(slots=True, eq=False)
class Block:
    """A described block.

    Attributes:
        key, parent: of the block and of the one before it, b"" for none.
        hash, parent_hash: the engine's.
        extra: what the engine's hash covers beside the tokens.
        tiers: which hold it: bit `group * TIER_BITS + tier`.
        announced: bit `group * 2 + medium`.
        expected: transfers under way that name it.
    """

    key: bytes
    parent: bytes
    hash: Hash
    parent_hash: Hash | None
    tokens: array[int]
    origin: Origin
    extra: tuple[Any, ...] | None
    tiers: int = 0
    announced: int = 0
    expected: int = 0


@dataclass(slots=True, eq=False)
class Stored:
    """Blocks that follow each other, to announce."""

    blocks: list[Block]
    group: int
    medium: int


@dataclass(slots=True, eq=False)
class Removed:
    """Blocks to take back."""

    hashes: list[Hash]
    group: int
    medium: int


class Form(Protocol):
    """How the engine wants it."""

    def hashes(self, request: Request, first: int, stop: int) -> Sequence[Hash]:
        """The engine's hashes of these blocks of a request: fewer where it has not computed them."""

    def extras(self, request: Request, first: int, stop: int) -> Sequence[tuple[Any, ...] | None]:
        """What these hashes cover beside tokens."""

    def engine_reset(self) -> bool:
        """Whether the engine has told routers, since the last call, that it holds nothing: they take that for all
        media."""

    def stored(self, stored: Stored) -> Any:
        """The engine's event."""

    def removed(self, removed: Removed) -> Any:
        """The engine's event."""


class _Waiting(NamedTuple):
    transfer: ClientTransfer
    blocks: list[Block]


class Announcements:
    """See the module's docstring. For the scheduler's thread.

    Args:
        client: one with notices.
    """

    def __init__(self, client: Client, spec: ModelSpec, form: Form) -> None:
        self._client = client
        self._size = spec.block_size
        self._whole = [group.coverage.kind == "all" for group in spec.groups]
        self._form = form
        self._blocks: dict[bytes, Block] = {}
        self._behind: dict[bytes, set[bytes]] = {}  # key -> held blocks that wait for it to be announced
        self._waiting: list[_Waiting] = []
        self._out: list[Stored | Removed] = []
        self._complained = False

    # ---------------------------------------------------------------- what the scheduler's half says

    def watch(self, transfer: ClientTransfer, request: Request, keys: Keys, first: int) -> None:
        """A store or a load of a request names the blocks of these keys from position `first` on.

        Args:
            keys: (n, 32) uint8, from the first block on.
        """
        stop, before = len(keys), max(0, first - 1)
        raw = keys[before:stop].tobytes()
        names = [raw[at : at + KEY_BYTES] for at in range(0, len(raw), KEY_BYTES)]
        if before == first:
            names.insert(0, b"")
        named = [self._blocks.get(name) for name in names[1:]]
        if None in named:
            self._describe(request, names, first, stop)
            named = [self._blocks.get(name) for name in names[1:]]
        blocks = [block for block in named if block is not None]
        for block in blocks:
            block.expected += 1
        self._waiting.append(_Waiting(transfer, blocks))

    def _describe(self, request: Request, names: Sequence[bytes], first: int, stop: int) -> None:
        """Note the blocks that are not known; `names[0]` is the key before position `first`."""
        before = max(0, first - 1)
        hashes = self._form.hashes(request, before, stop)
        own, above = hashes[first - before :], hashes if before < first else [None, *hashes]
        extras = self._form.extras(request, first, stop)
        lora = request.lora_request
        origin = Origin(lora.adapter_id, lora.name) if lora is not None else Origin(None, None)
        # As many as the engine has hashes of.
        for at, (name, parent, digest, parent_hash, extra) in enumerate(
            zip(names[1:], names, own, above, extras, strict=False)
        ):
            if name in self._blocks:
                continue
            if len(self._blocks) >= MOST_BLOCKS:
                self._complain()
                return
            start = (first + at) * self._size
            tokens = array("i", request.all_token_ids[start : start + self._size])
            self._blocks[name] = Block(name, parent, digest, parent_hash, tokens, origin, extra)

    def _complain(self) -> None:
        if not self._complained:
            self._complained = True
            logger.warning("more than %d blocks are cached: routers are not told of those beyond", MOST_BLOCKS)

    def reset(self) -> None:
        """The caches of all namespaces were reset: what comes of them from now on is not known here any more."""
        self._take_back_all()
        self._keep(())

    # ---------------------------------------------------------------- what the engine takes

    def take(self) -> list[Any]:
        """The engine's events since the last call."""
        self._client.pump()
        ended = [waiting for waiting in self._waiting if waiting.transfer.ended]
        if self._form.engine_reset():
            self._say_again()
        for notice in self._client.take_notices():
            if isinstance(notice, m.Committed):
                self._committed(notice)
            elif isinstance(notice, m.Dropped):
                self._dropped(notice)
            elif notice.tier is None:
                self._take_back_all()
                self._keep(block for block in self._blocks.values() if block.expected)
            else:
                self._cleared(notice.tier)
        if ended:
            self._settle(ended)
        out, self._out = self._out, []
        return [self._form.stored(each) if isinstance(each, Stored) else self._form.removed(each) for each in out]

    def _settle(self, ended: Sequence[_Waiting]) -> None:
        """All that the server had to say of these transfers has been taken in."""
        gone = {id(waiting) for waiting in ended}
        self._waiting = [waiting for waiting in self._waiting if id(waiting) not in gone]
        for waiting in ended:
            for block in waiting.blocks:
                block.expected -= 1
                self._drop_unheld(block)

    def _keep(self, blocks: Iterable[Block]) -> None:
        self._blocks = {block.key: block for block in blocks}
        self._behind.clear()

    def _drop_unheld(self, block: Block) -> None:
        if not block.tiers and not block.expected and self._blocks.get(block.key) is block:
            del self._blocks[block.key]
            waiting = self._behind.get(block.parent)
            if waiting is not None:
                waiting.discard(block.key)
                if not waiting:
                    del self._behind[block.parent]

    # ---------------------------------------------------------------- notices

    def _committed(self, notice: m.Committed) -> None:
        medium = STORAGE if notice.tier else CPU
        for at, group in enumerate(notice.groups):
            block = self._blocks.get(notice.keys[at * KEY_BYTES : (at + 1) * KEY_BYTES])
            if block is not None:
                block.tiers |= 1 << group * TIER_BITS + notice.tier
                self._announce(block, group, medium)

    def _announce(self, block: Block, group: int, medium: int) -> None:
        """Announce a block, and those that have waited for it."""
        self._say(block, group, medium)
        line = [block.key] if block.announced and self._behind else []
        while line:
            for key in self._behind.pop(line.pop(), ()):
                self._say_held(self._blocks[key])
                line.append(key)

    def _say_held(self, block: Block) -> None:
        """Announce a block in every medium that holds it."""
        for group in range(len(self._whole)):
            for medium in range(len(MEDIA)):
                if _is_held(block, group, medium):
                    self._say(block, group, medium)

    def _say(self, block: Block, group: int, medium: int) -> None:
        bit = 1 << group * len(MEDIA) + medium
        if block.announced & bit:
            return
        if block.parent and self._whole[group]:
            parent = self._blocks.get(block.parent)
            if parent is None or not parent.announced & 0b11 << group * len(MEDIA):
                self._behind.setdefault(block.parent, set()).add(block.key)
                return
        block.announced |= bit
        last = self._out[-1] if self._out else None
        if (
            isinstance(last, Stored)
            and (last.group, last.medium) == (group, medium)
            and last.blocks[-1].key == block.parent
            and last.blocks[-1].origin == block.origin
        ):
            last.blocks.append(block)
        else:
            self._out.append(Stored([block], group, medium))

    def _dropped(self, notice: m.Dropped) -> None:
        for at, group in enumerate(notice.groups):
            block = self._blocks.get(notice.keys[at * KEY_BYTES : (at + 1) * KEY_BYTES])
            if block is not None:
                self._left(block, group, notice.tier)
                self._drop_unheld(block)

    def _cleared(self, tier: int) -> None:
        for block in reversed(list(self._blocks.values())):
            for group in range(len(self._whole)):
                self._left(block, group, tier)
            self._drop_unheld(block)

    def _left(self, block: Block, group: int, tier: int) -> None:
        """A tier holds a block no more: take it back unless another of the medium does."""
        block.tiers &= ~(1 << group * TIER_BITS + tier)
        medium = STORAGE if tier else CPU
        if not _is_held(block, group, medium):
            self._take_back(block, group, medium)

    def _take_back(self, block: Block, group: int, medium: int) -> None:
        bit = 1 << group * len(MEDIA) + medium
        if not block.announced & bit:
            return
        block.announced &= ~bit
        last = self._out[-1] if self._out else None
        if isinstance(last, Removed) and (last.group, last.medium) == (group, medium):
            last.hashes.append(block.hash)
        else:
            self._out.append(Removed([block.hash], group, medium))

    def _take_back_all(self) -> None:
        """Nothing is known of any block any more."""
        for medium in range(len(MEDIA)):
            for group in range(len(self._whole)):
                for block in reversed(self._blocks.values()):
                    self._take_back(block, group, medium)
        for block in self._blocks.values():
            block.tiers = 0

    def _say_again(self) -> None:
        """Routers have forgotten all: announce what is still held."""
        self._out.clear()
        self._behind.clear()
        for block in self._blocks.values():
            block.announced = 0
        for block in self._blocks.values():
            for group in range(len(self._whole)):
                for medium in range(len(MEDIA)):
                    if _is_held(block, group, medium):
                        self._announce(block, group, medium)


def _is_held(block: Block, group: int, medium: int) -> bool:
    mine = block.tiers >> group * TIER_BITS
    return bool(mine & LOWER_TIERS if medium == STORAGE else mine & 1)


class VllmForm:
    """Events of vLLM 0.32 or a later 0.x.

    Args:
        block_size: tokens a block, of all groups.
    """

    def __init__(self, kv_cache_config: KVCacheConfig, block_size: int) -> None:
        from vllm.v1.kv_cache_interface import (  # noqa: PLC0415
            get_kv_cache_spec_kind,
            get_kv_cache_spec_sliding_window,
        )

        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self._kinds = [get_kv_cache_spec_kind(spec).value for spec in specs]
        self._windows = [get_kv_cache_spec_sliding_window(spec) for spec in specs]
        self._size = block_size
        self._manager: KVCacheManager | None = None
        self._table: object = None

    def bind(self, manager: KVCacheManager) -> None:
        """vLLM's own cache."""
        self._manager = manager
        self._table = manager.block_pool.cached_block_hash_to_block

    def hashes(self, request: Request, first: int, stop: int) -> Sequence[Hash]:
        """See `Form`."""
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash, resolve_block_hashes  # noqa: PLC0415

        own = self._manager.block_pool.hash_block_size if self._manager is not None else self._size
        return [
            maybe_convert_block_hash(each)
            for each in resolve_block_hashes(request.block_hashes, own, self._size)[first:stop]
        ]

    def extras(self, request: Request, first: int, stop: int) -> Sequence[tuple[Any, ...] | None]:
        """See `Form`."""
        from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys  # noqa: PLC0415

        extras, feature = [], 0
        for start in range(first * self._size, stop * self._size, self._size):
            extra, feature = generate_block_hash_extra_keys(request, start, start + self._size, feature)
            extras.append(extra)
        return extras

    def engine_reset(self) -> bool:
        """See `Form`. vLLM says `AllBlocksCleared` and does not tell its connector; but its table is a new one then."""
        if self._manager is None:
            return False
        before, self._table = self._table, self._manager.block_pool.cached_block_hash_to_block
        return self._table is not before

    def stored(self, stored: Stored) -> Any:
        """See `Form`."""
        from vllm.distributed.kv_events import BlockStored  # noqa: PLC0415
        from vllm.v1.core.kv_cache_utils import to_event_extra_keys  # noqa: PLC0415

        first = stored.blocks[0]
        return BlockStored(
            block_hashes=[block.hash for block in stored.blocks],
            parent_block_hash=first.parent_hash,
            token_ids=[token for block in stored.blocks for token in block.tokens],
            block_size=self._size,
            lora_id=first.origin.lora_id,
            medium=MEDIA[stored.medium],
            lora_name=first.origin.lora_name,
            extra_keys=to_event_extra_keys([block.extra for block in stored.blocks]),
            group_idx=stored.group,
            kv_cache_spec_kind=self._kinds[stored.group],
            kv_cache_spec_sliding_window=self._windows[stored.group],
        )

    def removed(self, removed: Removed) -> Any:
        """See `Form`."""
        from vllm.distributed.kv_events import BlockRemoved  # noqa: PLC0415

        return BlockRemoved(block_hashes=removed.hashes, medium=MEDIA[removed.medium], group_idx=removed.group)
