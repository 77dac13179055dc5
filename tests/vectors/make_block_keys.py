"""Write block_keys.json: published vectors of block keys, made with hashlib and nothing of FlexKV.

Anybody who computes keys elsewhere can check against them. Run: python tests/vectors/make_block_keys.py
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LARGEST_TOKEN = 2**31 - 1


def chain(tokens: list[int], block_size: int, start: bytes, extras: list[bytes] | None) -> list[bytes]:
    """The definition: key[i] = SHA-256(tokens[i] as little-endian int32 || extras[i] || key[i-1])."""
    keys = []
    for block in range(len(tokens) // block_size):
        part = tokens[block * block_size : (block + 1) * block_size]
        message = struct.pack(f"<{block_size}i", *part) + (extras[block] if extras else b"") + start
        start = hashlib.sha256(message).digest()
        keys.append(start)
    return keys


def some_tokens(count: int, seed: int) -> list[int]:
    """Pseudo-random tokens, the same everywhere; the smallest and the largest are among them."""
    words = [hashlib.sha256(f"{seed}/{i}".encode()).digest() for i in range(count)]
    tokens = [int.from_bytes(word[:4], "little") % 2**31 for word in words]
    if count > 1:
        tokens[0], tokens[1] = 0, LARGEST_TOKEN
    return tokens


def cases() -> list[dict[str, Any]]:
    """Block sizes on both sides of every boundary of a 64-byte chunk, remainders, extras, extension."""
    made = []
    for block_size in (1, 2, 5, 6, 7, 8, 15, 16, 17, 21, 22, 24, 31, 32, 64, 128, 512):
        blocks = 2 if block_size > 64 else 4
        for with_extras in (False, True):
            tokens = some_tokens(block_size * blocks + block_size // 2, block_size)
            extras = None
            if with_extras:
                extras = [b"" if i % 3 == 0 else bytes(range(13 * i)) for i in range(blocks)]
            root = hashlib.sha256(f"root {block_size}".encode()).digest()
            made.append(
                {
                    "block_size": block_size,
                    "root": root.hex(),
                    "tokens": tokens,
                    "extras": None if extras is None else [extra.hex() for extra in extras],
                    "keys": [key.hex() for key in chain(tokens, block_size, root, extras)],
                }
            )
    return made


def text() -> str:
    return json.dumps({"key_format_version": 1, "cases": cases()}, indent=None, separators=(",", ":")) + "\n"


if __name__ == "__main__":
    (HERE / "block_keys.json").write_text(text())
