"""Frames on a stream socket: a 4-byte little-endian length, then a body. No I/O, and nothing of what bodies mean."""

from __future__ import annotations

import struct

_HEADER = struct.Struct("<I")


class WireError(Exception):
    """The other side broke the protocol."""


def framed(body: bytes, limit: int) -> bytes:
    """A body with its length before it. Raises WireError for one longer than `limit` bytes."""
    if len(body) > limit:
        raise WireError(f"a message of {len(body)} bytes is too long to send: at most {limit}")
    return _HEADER.pack(len(body)) + body


class Reader:
    """Puts frames together from what a socket delivers.

    Attributes:
        limit: bytes that a body may have.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes, return the bodies that are complete. Raises WireError for a length out of bounds."""
        whole: bytes | bytearray = data
        if self._held:
            self._held += data
            whole = self._held
        bodies, at = [], 0
        with memoryview(whole) as view:
            while len(whole) - at >= _HEADER.size:
                (length,) = _HEADER.unpack_from(whole, at)
                if length > self.limit:
                    raise WireError(f"a message of {length} bytes is announced: at most {self.limit} are taken")
                end = at + _HEADER.size + length
                if len(whole) < end:
                    break
                bodies.append(bytes(view[at + _HEADER.size : end]))
                at = end
        if whole is self._held:
            del self._held[:at]
        elif at < len(data):
            self._held += data[at:] if at else data
        return bodies
