"""A tiny Gemma 3 with random weights: layers of a sliding window between layers of full attention, so three KV groups.

Its outputs depend on the KV of each group: norms make what attention says as large as what goes past it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_checkpoint import COMMON, VOCABULARY, drawn, write

WINDOW = 64
LAYERS = ("sliding_attention", "sliding_attention", "full_attention") * 2
GROUPS = 3


def make(folder: Path, *, heads: int = 4, kv_heads: int = 2, dim: int = 32, seed: int = 0) -> Path:
    """Write config.json and model.safetensors; returns the folder."""
    hidden, inner = heads * dim, 2 * heads * dim
    config = {
        **COMMON,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": len(LAYERS),
        "layer_types": list(LAYERS),
        "sliding_window": WINDOW,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "query_pre_attn_scalar": dim,
        "rope_theta": 10000.0,
        "rope_local_base_freq": 10000.0,
        "torch_dtype": "float32",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    normal = drawn(seed)
    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, hidden),
        "model.norm.weight": torch.zeros(hidden),  # they are multiplied with 1 + weight
        "lm_head.weight": normal(VOCABULARY, hidden),
    }
    for layer in range(len(LAYERS)):
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
        for name, size, weight in (
            ("input_layernorm", hidden, 0.0),
            ("post_attention_layernorm", hidden, 0.0),
            ("pre_feedforward_layernorm", hidden, 0.0),
            ("post_feedforward_layernorm", hidden, 0.0),
            ("self_attn.q_norm", dim, 1.0),
            ("self_attn.k_norm", dim, 0.0),
        ):
            weights[f"{at}{name}.weight"] = torch.full((size,), weight)
    return write(folder, config, weights)
