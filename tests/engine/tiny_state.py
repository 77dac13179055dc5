"""A tiny Qwen3-Next with random weights: linear attention, which keeps a state, between layers of full attention."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_checkpoint import COMMON, VOCABULARY, drawn, write

HIDDEN, INNER, LAYERS = 128, 256, 4
HEADS, KV_HEADS, DIM = 4, 2, 128
KEY, VALUE, VALUE_HEADS = 2 * DIM, 4 * DIM, 4
EXPERTS, EXPERT = 4, 64


def make(folder: Path, *, seed: int = 0) -> Path:
    """Write config.json and model.safetensors; returns the folder."""
    config = {
        **COMMON,
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "linear_num_value_heads": VALUE_HEADS,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": DIM,
        "linear_value_head_dim": DIM,
        "linear_conv_kernel_dim": 4,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT,
        "shared_expert_intermediate_size": EXPERT,
        "mlp_only_layers": list(range(LAYERS - 1)),  # vLLM wants one that has experts
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }
    draw = drawn(seed)

    def normal(*shape: int) -> torch.Tensor:
        return draw(*shape).bfloat16()

    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.zeros(HIDDEN),  # they are multiplied with 1 + weight
        "lm_head.weight": normal(VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        if layer % 2:
            shapes = {
                "self_attn.q_proj.weight": (2 * HEADS * DIM, HIDDEN),  # with a gate
                "self_attn.k_proj.weight": (KV_HEADS * DIM, HIDDEN),
                "self_attn.v_proj.weight": (KV_HEADS * DIM, HIDDEN),
                "self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
            }
            weights[f"{at}self_attn.q_norm.weight"] = torch.zeros(DIM)
            weights[f"{at}self_attn.k_norm.weight"] = torch.zeros(DIM)
        else:
            shapes = {
                "linear_attn.in_proj_qkvz.weight": (2 * KEY + 2 * VALUE, HIDDEN),
                "linear_attn.in_proj_ba.weight": (2 * VALUE_HEADS, HIDDEN),
                "linear_attn.conv1d.weight": (2 * KEY + VALUE, 1, 4),
                "linear_attn.dt_bias": (VALUE_HEADS,),
                "linear_attn.out_proj.weight": (HIDDEN, VALUE),
            }
            weights[f"{at}linear_attn.norm.weight"] = torch.ones(DIM)
            weights[f"{at}linear_attn.A_log"] = torch.full((VALUE_HEADS,), -6.0)  # it forgets slowly
        parts = {"mlp": INNER}
        if layer == LAYERS - 1:
            parts = {f"mlp.experts.{expert}": EXPERT for expert in range(EXPERTS)} | {"mlp.shared_expert": EXPERT}
            shapes |= {"mlp.gate.weight": (EXPERTS, HIDDEN), "mlp.shared_expert_gate.weight": (1, HIDDEN)}
        for part, inner in parts.items():
            shapes[f"{part}.gate_proj.weight"] = shapes[f"{part}.up_proj.weight"] = (inner, HIDDEN)
            shapes[f"{part}.down_proj.weight"] = (HIDDEN, inner)
        for name, shape in shapes.items():
            weights[f"{at}{name}"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{name}.weight"] = torch.zeros(HIDDEN)
    return write(folder, config, weights)
