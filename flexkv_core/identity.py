"""What a model or an adapter is, by its content: a digest of its config and of samples of every weight file.

Owns the sampling. Does not own namespaces (`blocks.py`). A name that the user vouches for may stand instead.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SAMPLE_BYTES = 64 << 10
"""Of the begin, the middle and the end of a weight file."""
WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz"})
CONFIGS = frozenset({".json"})


def content_identity(folder: Path) -> str:
    """Name a model's folder by its content: of every JSON file all, of every weight file its size and samples.

    Weights that differ only between the samples have the same identity: whoever edits weights in place resets the
    cache. Raises OSError if a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(entry for entry in folder.iterdir() if entry.suffix in WEIGHTS | CONFIGS):
        name = path.name.encode()
        content = path.read_bytes() if path.suffix in CONFIGS else _samples(path)
        for field in (name, content):
            digest.update(len(field).to_bytes(8, "little") + field)
    return f"sha256:{digest.hexdigest()}"


def _samples(path: Path) -> bytes:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        parts = [size.to_bytes(8, "little")]
        for start in (0, max(0, size // 2 - SAMPLE_BYTES // 2), max(0, size - SAMPLE_BYTES)):
            file.seek(start)
            parts.append(file.read(SAMPLE_BYTES))
    return b"".join(parts)
