"""A tiny LoRA adapter for the model of `tiny_model.py`, with random weights that change every token."""

from __future__ import annotations

from pathlib import Path

from tiny_checkpoint import drawn, write

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
    normal = drawn(seed, std)
    weights = {}
    for layer in range(layers):
        for name, size in modules.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = normal(RANK, hidden)
            weights[f"{at}.lora_B.weight"] = normal(size, RANK)
    return write(folder, config, weights, ("adapter_config.json", "adapter_model.safetensors"))
