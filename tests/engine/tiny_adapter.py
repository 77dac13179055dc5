"""A tiny LoRA adapter for the model of `tiny_model.py`, with random weights that change every token."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8


def make(folder: Path, *, seed: int, layers: int = 2, hidden: int = 128, std: float = 0.3) -> Path:
    """Write adapter_config.json and adapter_model.safetensors; returns the folder."""
    modules = {"k_proj": hidden // 2, "v_proj": hidden // 2}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(layers):
        for name, size in modules.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * std
            weights[f"{at}.lora_B.weight"] = torch.randn(size, RANK, generator=generator) * std
    save_file(weights, str(folder / "adapter_model.safetensors"))
    return folder
