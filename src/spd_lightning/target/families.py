"""What differs from family to family, and nothing else: one entry per family, integers and names, no torch.

The adapter (`Target`) is generic. It runs any model that is a list of decoder layers between an embedding and a final
norm, and asks the configuration for the rest: which kind of layer comes where, whether kinds have RoPE bases of their
own, how wide an expert is. Whatever happens inside a layer (biases, partial RoPE, sinks, sandwich norms, experts, gated
delta rule) and inside the embedding (Gemma's scale) stays the business of the model's own code.

A family needs an entry here because "it ran" is not "it is exact": every entry has a line in tests/families.py, which
proves training, parity, lossless decoding and rollback for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: How a layer of each kind returns to an earlier position after a rejected draft.
ROLLBACK = {
    "full_attention": "truncation",
    "sliding_attention": "truncation inside a kept window",
    "linear_attention": "snapshot ring",
}

HeadKind = Literal["qwen3", "target"]


@dataclass(frozen=True)
class Family:
    """What one family needs beyond the generic adapter.

    Attributes:
        title: its name for people.
        head: the decoder layers that published heads of this family have: Qwen3-style ones, or the target's own.
    """

    title: str
    head: HeadKind = "qwen3"


#: By `model_type` of the text model. A composite model (text inside vision and text) is known by its text model.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("Llama 2, 3.x"),
    "qwen2": Family("Qwen2, Qwen2.5"),
    "qwen3": Family("Qwen3"),
    "qwen3_moe": Family("Qwen3 MoE"),
    "qwen3_5_text": Family("Qwen3.5", head="target"),
    "qwen3_5_moe_text": Family("Qwen3.5 MoE", head="target"),
    "qwen3_next": Family("Qwen3-Next"),
    "mistral": Family("Mistral"),
    "mixtral": Family("Mixtral"),
    "gemma2": Family("Gemma 2"),
    "gemma3_text": Family("Gemma 3"),
    "gpt_oss": Family("gpt-oss"),
    "olmo2": Family("OLMo 2"),
    "olmo3": Family("OLMo 3"),
    "smollm3": Family("SmolLM3"),
}


def unsupported_reason(config: Any) -> str | None:
    """Why a configuration cannot be a target, or None if it can; reads no weight.

    Args:
        config: a Hugging Face configuration; of a composite model, its text model's is looked at.
    """
    config = config.get_text_config()
    if config.model_type not in FAMILIES:
        return f"family {config.model_type!r}, supported are {', '.join(FAMILIES)}"
    if unknown := sorted(set(layer_kinds(config)) - set(ROLLBACK)):
        return f"layers of type {', '.join(unknown)}, supported are {', '.join(ROLLBACK)}"
    for rope in _rope_by_kind(config).values():
        if rope.get("rope_type", "default") in ("dynamic", "longrope"):
            return f"RoPE of type {rope['rope_type']!r}, whose angles depend on the length of the sequence"
    if getattr(config, "use_bidirectional_attention", False):
        return "use_bidirectional_attention=True: a token would see tokens that are not drafted yet"
    return None


def layer_kinds(config: Any) -> tuple[str, ...]:
    """Kind of every decoder layer, as Hugging Face names them: `full_attention`, `sliding_attention`, ..."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        everywhere = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        kinds = [everywhere] * config.num_hidden_layers
    return tuple(kinds)


def has_rope_per_kind(config: Any) -> bool:
    """Whether sliding and full layers turn by different angles (Gemma 3, OLMo 3)."""
    return set(config.rope_parameters) <= set(ROLLBACK)


def full_attention_rope(config: Any) -> dict[str, Any]:
    """The RoPE that a layer with full attention has: the one a head uses, whose layers all have full attention.

    Without what places pictures (`mrope_*`): the three positions of a text token are one.
    """
    rope = _rope_by_kind(config).get("full_attention") or _rope_by_kind(config)["sliding_attention"]
    return {name: value for name, value in rope.items() if not name.startswith("mrope")}


def dense_intermediate_size(config: Any) -> int:
    """Width of the head's dense MLP: the target's own where it has dense layers, else that of the ACTIVE experts.

    A token of a mixture passes through `num_experts_per_tok` experts (and a shared one), so their summed width is what
    its stages read per token: a head of that width stays in proportion. Qwen3-30B-A3B states 6144 for dense layers,
    which is the same sum, 8 x 768. Mixtral and gpt-oss call the width of ONE expert `intermediate_size`.
    """
    active: int | None = getattr(config, "num_experts_per_tok", None)
    expert: int | None = getattr(config, "moe_intermediate_size", None)
    dense: int | None = getattr(config, "intermediate_size", None)
    if active is None or (expert is not None and dense is not None):
        assert dense is not None
        return dense
    of_one = dense if expert is None else expert
    assert of_one is not None
    return active * of_one + (getattr(config, "shared_expert_intermediate_size", None) or 0)


def activation(config: Any) -> str:
    """Name of the MLP's activation."""
    return str(getattr(config, "hidden_act", None) or config.hidden_activation)


def logit_softcap(config: Any) -> float | None:
    """c of logits = c tanh(logits / c), where a family has it (Gemma 2)."""
    cap = getattr(config, "final_logit_softcapping", None)
    return None if cap is None else float(cap)


def _rope_by_kind(config: Any) -> dict[str, dict[str, Any]]:
    rope = dict(config.rope_parameters or {})
    return {k: v or {} for k, v in rope.items()} if has_rope_per_kind(config) else {"full_attention": rope}
