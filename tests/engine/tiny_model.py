"""A tiny Qwen3 checkpoint with random normal weights, whose outputs depend on the KV: a wrong block changes tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_checkpoint import COMMON, VOCABULARY, drawn, write


def make(folder: Path, *, layers: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 32, seed: int = 0) -> Path:
    """Write config.json and model.safetensors; returns the folder."""
    hidden, inner = heads * dim, 2 * heads * dim
    config = {
        **COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    normal = drawn(seed)
    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": normal(VOCABULARY, hidden),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (heads * dim, hidden),
            "self_attn.k_proj": (kv_heads * dim, hidden),
            "self_attn.v_proj": (kv_heads * dim, hidden),
            "self_attn.o_proj": (hidden, heads * dim),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            weights[f"{at}{name}.weight"] = normal(*shape)
        for name, size in {
            "input_layernorm": hidden,
            "post_attention_layernorm": hidden,
            "self_attn.q_norm": dim,
            "self_attn.k_norm": dim,
        }.items():
            weights[f"{at}{name}.weight"] = torch.ones(size)
    return write(folder, config, weights)
