"""Block keys and namespaces: the names under which blocks are kept. No I/O.

Owns the canonical encoding of a namespace, its root, and the chain of keys that starts there. Does not own
the geometry of blocks (layout.py) nor who holds them (index/). The hashing is native (native/keys.cpp).

``key[i] = SHA-256(tokens[i] as little-endian int32 || extras[i] || key[i-1])``, and ``key[-1]`` is the root.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from flexkv_core import _native
from flexkv_core.errors import KeyInputError, KeyTypeError
from flexkv_core.layout import KVGroup, ModelSpec

KEY_FORMAT_VERSION = 1
"""Part of every namespace: caches written under another encoding are simply not found."""
KEY_BYTES = 32

Keys = npt.NDArray[np.uint8]
"""(n, 32) uint8, C-contiguous: chained block keys."""
Digest: TypeAlias = bytes | Keys
"""32 bytes, or a (32,) uint8 array such as a row of keys."""

_NO_OFFSETS = np.empty(0, np.int64)
_NO_TOKENS = np.empty(0, np.int32)


@dataclass(frozen=True)
class Namespace:
    """What separates caches that must not share. Any field that differs gives another root.

    The canonical encoding is built of items. An item is one byte of kind, the payload's length as 8 bytes
    little-endian, and the payload:

    ====  =======================================================
    kind  payload
    ====  =======================================================
    N     none: empty
    i     an integer, in decimal ASCII
    s     text, in UTF-8
    b     bytes
    l     a list: its items one after the other
    ====  =======================================================

    A record is a list of (s name, value) pairs, flattened. The namespace is the record with the fields
    ``version`` (i, `KEY_FORMAT_VERSION`), ``model`` (s), ``block_size`` (i), ``groups`` (l, each a record of
    ``block_bytes`` i, ``coverage`` s, ``coverage_blocks`` i, ``layout`` s), ``dtype`` (s), ``engine`` (s),
    ``tensor_parallel`` (i), ``pipeline_parallel`` (i), ``lora`` (s or N), ``salt`` (s or N), ``epoch`` (b),
    in this order. `root` is the SHA-256 of that one item.

    Attributes:
        model, block_size, groups, dtype, engine, tensor_parallel, pipeline_parallel, lora, salt: as in
            `flexkv_core.layout.ModelSpec`. None and "" are different salts.
        epoch: b"" at first; a fresh random value after every reset.

    Raises:
        KeyTypeError, KeyInputError: a field of a wrong type or value; the text names it and the fix.
    """

    model: str
    block_size: int
    groups: tuple[KVGroup, ...]
    dtype: str = "bfloat16"
    engine: str = ""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    lora: str | None = None
    salt: str | None = None
    epoch: bytes = b""

    def __post_init__(self) -> None:
        for name in ("model", "dtype", "engine"):
            _check_text(name, getattr(self, name))
        for name in ("lora", "salt"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if not self.model:
            raise KeyInputError("model '': name the model, or give a digest of its config and weights")
        for name in ("block_size", "tensor_parallel", "pipeline_parallel"):
            _check_count(name, getattr(self, name))
        if not isinstance(self.groups, tuple):
            raise KeyTypeError(f"groups is a {_type_name(self.groups)}: give a tuple of KVGroup")
        for position, group in enumerate(self.groups):
            if not isinstance(group, KVGroup):
                raise KeyTypeError(f"groups[{position}] is a {_type_name(group)}: give a KVGroup")
            _check_text(f"groups[{position}].layout", group.layout)
        if not 1 <= len(self.groups) <= 255:
            raise KeyInputError(f"groups has {len(self.groups)} entries: a model has 1 to 255 KV groups")
        if not isinstance(self.epoch, bytes):
            raise KeyTypeError(f"epoch is a {_type_name(self.epoch)}: give bytes, b'' before any reset")

    @classmethod
    def of(cls, spec: ModelSpec, epoch: bytes = b"") -> Namespace:
        """Return the namespace of a model as it is registered."""
        return cls(
            model=spec.model,
            block_size=spec.block_size,
            groups=tuple(spec.groups),
            dtype=spec.dtype,
            engine=spec.engine,
            tensor_parallel=spec.tensor_parallel,
            pipeline_parallel=spec.pipeline_parallel,
            lora=spec.lora,
            salt=spec.salt,
            epoch=epoch,
        )

    @cached_property
    def encoding(self) -> bytes:
        """The canonical encoding, as the class describes it."""
        return _record(
            version=KEY_FORMAT_VERSION,
            model=self.model,
            block_size=self.block_size,
            groups=[
                _record(
                    block_bytes=group.block_bytes,
                    coverage=group.coverage.kind,
                    coverage_blocks=group.coverage.blocks,
                    layout=group.layout,
                )
                for group in self.groups
            ],
            dtype=self.dtype,
            engine=self.engine,
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            lora=self.lora,
            salt=self.salt,
            epoch=self.epoch,
        )

    @cached_property
    def root(self) -> bytes:
        """32 bytes: what the chain of keys starts from."""
        return hashlib.sha256(self.encoding).digest()


def multimodal_extra(identity: bytes) -> bytes:
    """Tag the identity of a multimodal input, for `extras`.

    Args:
        identity: a digest of the input's content (and of the part of it that the block stands for, where a
            block's placeholders cover only some of it).

    Returns:
        The record ``multimodal`` (b identity), encoded as in `Namespace`. Where a block's placeholders stand
        for several inputs, join their extras: each says its own length.
    """
    if not isinstance(identity, bytes):
        raise KeyTypeError(f"identity is a {_type_name(identity)}: give bytes, such as a digest of the input")
    if not identity:
        raise KeyInputError("identity is empty: give a digest of the input's content")
    return _record(multimodal=identity)


def block_keys(
    tokens: npt.NDArray[np.int32] | npt.NDArray[np.int64],
    block_size: int,
    root: Digest,
    previous: Digest | None = None,
    extras: Sequence[bytes | None] | None = None,
) -> Keys:
    """Return the keys of the complete blocks of a prefix.

    Args:
        tokens: (t,) int32 or int64, any stride, values 0 to 2**31 - 1. Tokens after the last complete block
            are ignored.
        block_size: tokens a block, at least 1.
        root: the namespace's root.
        previous: the key of the block before `tokens`, to extend a prefix; None: `tokens` start the prompt.
        extras: one entry a complete block, None or b"" where there is nothing (see `multimodal_extra`).

    Returns:
        (t // block_size, 32) uint8.

    Raises:
        KeyTypeError: a wrong type or dtype. KeyInputError: a wrong shape, length or value.
    """
    return _keys(tokens, block_size, root, previous, extras)


def _keys(
    tokens: Any,
    block_size: int,
    root: Digest,
    previous: Digest | None,
    extras: Any,
    *,
    portable: bool = False,
) -> Keys:
    """`block_keys`, with the choice of the portable SHA-256 for tests."""
    _check_count("block_size", block_size)
    start = _digest("root", root)
    if previous is not None:
        start = _digest("previous", previous)
    flat = _token_array(tokens)
    out = np.empty((len(flat) // block_size, KEY_BYTES), np.uint8)
    blob, offsets = _join_extras(extras, len(out), block_size)
    if len(out):
        bad = _native.hash_blocks(flat, int(block_size), start, blob, offsets, out, portable)
        if bad >= 0:
            raise _bad_token(flat, bad)
    return out


class GrowingKeys:
    """The keys of one growing prefix: every token is hashed once, however it arrives. Not thread-safe.

    Args:
        namespace_root: the namespace's root.
        block_size: tokens a block.
    """

    def __init__(self, namespace_root: Digest, block_size: int) -> None:
        _check_count("block_size", block_size)
        self._root = _digest("namespace_root", namespace_root)
        self._block_size = int(block_size)
        self._keys = np.empty((16, KEY_BYTES), np.uint8)
        self._blocks = 0
        self._rest = _NO_TOKENS

    @property
    def keys(self) -> Keys:
        """(n, 32) uint8, read-only: the keys of all complete blocks so far."""
        view = self._keys[: self._blocks]
        view.flags.writeable = False
        return view

    @property
    def tokens(self) -> int:
        """How many tokens the prefix has, those of the incomplete block included."""
        return self._blocks * self._block_size + len(self._rest)

    def extend(
        self,
        tokens: npt.NDArray[np.int32] | npt.NDArray[np.int64],
        extras: Sequence[bytes | None] | None = None,
    ) -> Keys:
        """Append tokens and return the (n, 32) keys of the blocks that they complete.

        `extras` has one entry for each of these blocks. After an error nothing has changed.

        Raises:
            KeyTypeError, KeyInputError: as in `block_keys`; positions count from the start of `tokens`.
        """
        flat = _token_array(tokens)
        bad = _native.first_bad_token(flat)
        if bad >= 0:
            raise _bad_token(flat, bad)
        size = self._block_size
        complete = (len(self._rest) + len(flat)) // size
        _join_extras(extras, complete, size)
        if not complete:
            self._rest = np.concatenate((self._rest, flat), dtype=np.int32, casting="unsafe")
            return self.keys[self._blocks :]
        # Only the block that was begun is put together; the others are hashed where they lie.
        head = size - len(self._rest) if len(self._rest) else 0
        previous: Digest = self._keys[self._blocks - 1] if self._blocks else self._root
        pieces = []
        if head:
            block = np.concatenate((self._rest, flat[:head]), dtype=np.int32, casting="unsafe")
            pieces.append(_keys(block, size, self._root, previous, extras[:1] if extras else None))
            previous = pieces[0][0]
        pieces.append(_keys(flat[head:], size, self._root, previous, extras[len(pieces) :] if extras else None))
        self._rest = flat[head + len(pieces[-1]) * size :].astype(np.int32)
        self._append(pieces)
        return self.keys[self._blocks - complete :]

    def _append(self, pieces: Sequence[Keys]) -> None:
        needed = self._blocks + sum(map(len, pieces))
        if needed > len(self._keys):
            grown = np.empty((max(needed, 2 * len(self._keys)), KEY_BYTES), np.uint8)
            grown[: self._blocks] = self._keys[: self._blocks]
            self._keys = grown
        for piece in pieces:
            self._keys[self._blocks : self._blocks + len(piece)] = piece
            self._blocks += len(piece)


def _token_array(tokens: Any) -> npt.NDArray[np.int32] | npt.NDArray[np.int64]:
    if not isinstance(tokens, np.ndarray):
        raise KeyTypeError(f"tokens is a {_type_name(tokens)}: pass np.asarray(tokens, np.int32)")
    if tokens.dtype not in (np.int32, np.int64):
        raise KeyTypeError(f"tokens has dtype {tokens.dtype}: use int32 or int64, native byte order")
    if tokens.ndim != 1:
        raise KeyInputError(f"tokens has shape {tokens.shape}: pass one prompt, a 1-D array")
    return np.ascontiguousarray(tokens)


def _bad_token(tokens: npt.NDArray[Any], position: int) -> KeyInputError:
    return KeyInputError(
        f"tokens[{position}] is {int(tokens[position])}: token ids are 0 to {2**31 - 1} (int32, not negative)"
    )


def _join_extras(extras: Any, blocks: int, block_size: int) -> tuple[bytes, npt.NDArray[np.int64]]:
    """Return all extras in one piece, and (blocks + 1,) offsets; none where no block has any."""
    if extras is None:
        return b"", _NO_OFFSETS
    if isinstance(extras, (bytes, str)) or not isinstance(extras, Sequence):
        raise KeyTypeError(f"extras is a {_type_name(extras)}: pass a list, one bytes or None a block")
    if len(extras) != blocks:
        raise KeyInputError(
            f"extras has {len(extras)} entries: pass {blocks}, one a complete block of {block_size} tokens"
        )
    for position, extra in enumerate(extras):
        if extra is not None and not isinstance(extra, bytes):
            raise KeyTypeError(f"extras[{position}] is a {_type_name(extra)}: pass bytes, or None for no extra")
    blob = b"".join(extra or b"" for extra in extras)
    if not blob:
        return b"", _NO_OFFSETS
    offsets = np.zeros(blocks + 1, np.int64)
    np.cumsum([len(extra or b"") for extra in extras], out=offsets[1:])
    return blob, offsets


def _digest(name: str, value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8:
            raise KeyTypeError(f"{name} has dtype {value.dtype}: pass {KEY_BYTES} bytes or a uint8 array")
        if value.shape != (KEY_BYTES,):
            raise KeyInputError(f"{name} has shape {value.shape}: pass one key, an array of shape ({KEY_BYTES},)")
        return value.tobytes()
    if not isinstance(value, bytes):
        raise KeyTypeError(f"{name} is a {_type_name(value)}: pass {KEY_BYTES} bytes or a uint8 array")
    if len(value) != KEY_BYTES:
        raise KeyInputError(f"{name} has {len(value)} bytes: pass {KEY_BYTES}, such as Namespace(...).root")
    return value


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise KeyTypeError(f"{name} is a {_type_name(value)}: give a whole number")
    if not 1 <= value < 2**31:
        raise KeyInputError(f"{name} is {value}: give at least 1 and less than 2**31")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise KeyTypeError(f"{name} is a {_type_name(value)}: give a str")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise KeyInputError(f"{name} {value!r} cannot be written as UTF-8: give text without surrogates") from error


def _type_name(value: Any) -> str:
    return type(value).__name__


def _item(kind: bytes, payload: bytes) -> bytes:
    return kind + len(payload).to_bytes(8, "little") + payload


def _value(value: Any) -> bytes:
    if value is None:
        return _item(b"N", b"")
    if isinstance(value, str):
        return _item(b"s", value.encode())
    if isinstance(value, bytes):
        return _item(b"b", value)
    return _item(b"i", str(int(value)).encode())


def _record(**fields: str | bytes | int | list[bytes] | None) -> bytes:
    """Encode a record; a list's entries are records that are encoded already."""
    pairs = (
        _value(name) + (_item(b"l", b"".join(value)) if isinstance(value, list) else _value(value))
        for name, value in fields.items()
    )
    return _item(b"l", b"".join(pairs))
