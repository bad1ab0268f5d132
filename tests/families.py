"""One line per family: a tiny configuration of it. Everything in tests/family/ runs for every line.

Sizes are chosen so that a short test meets what is special about the family: windows of six tokens, which prompts and
generations cross; two RoPE bases; every kind of layer within the first five layers; both shared and routed experts.
"""

from __future__ import annotations

from typing import Any

DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOW = {"sliding_window": 6}
LLAMA_3_1 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 64,
}  # fmt: skip

#: model_type -> fields beyond the common ones of `make_target`.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA_3_1},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": EXPERTS,
    "qwen3_5_text": DELTA | {"num_attention_heads": 3, "num_key_value_heads": 1},  # 27B: heads divide no hidden size
    "qwen3_5_moe_text": DELTA | EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_next": DELTA | EXPERTS | {"shared_expert_intermediate_size": 24},
    "mistral": WINDOW,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": WINDOW | {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "gemma3_text": WINDOW | {
        "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
    },
    "gpt_oss": WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": YARN},
    "olmo2": {},
    "olmo3": WINDOW | {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            "full_attention": YARN | {"rope_theta": 500000.0},
        },
    },
    "smollm3": {"no_rope_layers": [1, 0]},
}  # fmt: skip


def fields(family: str, num_layers: int) -> dict[str, Any]:
    """The family's fields for some number of layers: patterns over layers are repeated."""
    values = dict(FAMILIES[family])
    for name in ("layer_types", "no_rope_layers"):
        if name in values:
            values[name] = (values[name] * num_layers)[:num_layers]
    return values
