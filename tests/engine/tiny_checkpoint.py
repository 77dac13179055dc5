"""What tiny checkpoints have in common: the vocabulary, how random weights are drawn, how files are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY = 512
STD = 0.15
"""Of weights: large enough that outputs depend on the KV."""
COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def drawn(seed: int, std: float = STD) -> Callable[..., torch.Tensor]:
    """Draws normal weights of the shape that it is given."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator) * std


def write(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], names: tuple[str, str] = ("", "")
) -> Path:
    """Write the two files of a checkpoint, or others of these names; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / (names[0] or "config.json")).write_text(json.dumps(config))
    save_file(dict(weights), str(folder / (names[1] or "model.safetensors")), metadata={"format": "pt"})
    return folder
