"""What differs from family to family, and nothing else: one entry per family, integers and names, no torch.

The adapter (`Target`) is generic. It runs any model that is a list of decoder layers between an embedding and a final
norm, and asks the configuration for the rest: whether kinds of layers have RoPE bases of their own, how wide an expert
is. Whatever happens inside a layer (biases, partial RoPE, sinks, sandwich norms, experts, gated delta rule) and inside
the embedding (Gemma's scale) stays the business of the model's own code.

A family needs an entry here because "it ran" is not "it is exact": every entry has a line in tests/families.py, which
proves training, parity, lossless decoding and rollback for it and writes the table of docs/families.md.
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
        title: its name for people, in the table of docs/families.md.
        layers: where the model's code looks for the kind of a layer: `listed` layer by layer (layer_types), `alike`
            (all sliding where the configuration has a sliding_window), or `full`, whatever the configuration says.
        head: the decoder layers that published heads of this family have: Qwen3-style ones, or the target's own.
        capped: whether the model's code caps its logits (final_logit_softcapping).
    """

    title: str
    layers: Literal["listed", "alike", "full"] = "listed"
    head: HeadKind = "qwen3"
    capped: bool = False


#: By `model_type` of the text model. A composite model (text inside vision and text) is known by its text model.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("Llama 2, 3.x", layers="full"),
    "qwen2": Family("Qwen2, Qwen2.5"),
    "qwen3": Family("Qwen3"),
    "qwen3_moe": Family("Qwen3 MoE", layers="alike"),
    "qwen3_5_text": Family("Qwen3.5", head="target"),
    "qwen3_5_moe_text": Family("Qwen3.5 MoE", head="target"),
    "qwen3_next": Family("Qwen3-Next"),
    "mistral": Family("Mistral", layers="alike"),
    "mixtral": Family("Mixtral", layers="alike"),
    "gemma2": Family("Gemma 2", capped=True),
    "gemma3_text": Family("Gemma 3", capped=True),
    "gpt_oss": Family("gpt-oss"),
    "olmo2": Family("OLMo 2", layers="full"),
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
    kinds, claimed = layer_kinds(config), _claimed_kinds(config)
    if unknown := sorted({*kinds, *claimed} - set(ROLLBACK)):
        return f"layers of type {', '.join(unknown)}, supported are {', '.join(ROLLBACK)}"
    if kinds != claimed:
        return (
            f"its configuration (layer_types, sliding_window) says {_short(claimed)}, and the code of family "
            f"{config.model_type!r} runs {_short(kinds)}"
        )
    if "sliding_attention" in kinds and not getattr(config, "sliding_window", None):
        return "sliding layers without a sliding_window"
    if getattr(config, "attention_chunk_size", None) is not None:
        return f"attention_chunk_size={config.attention_chunk_size}: attention in chunks is not supported"
    for rope in _rope_by_kind(config).values():
        if rope.get("rope_type", "default") in ("dynamic", "longrope"):
            return f"RoPE of type {rope['rope_type']!r}, whose angles depend on the length of the sequence"
    if getattr(config, "use_bidirectional_attention", False):
        return "use_bidirectional_attention=True: a token would see tokens that are not drafted yet"
    return None


def layer_kinds(config: Any) -> tuple[str, ...]:
    """Kind of every decoder layer, as Hugging Face names them: `full_attention`, `sliding_attention`, ..."""
    layers = FAMILIES[config.model_type].layers
    if layers == "listed":
        return _claimed_kinds(config)
    windowed = layers == "alike" and getattr(config, "sliding_window", None) is not None
    return ("sliding_attention" if windowed else "full_attention",) * int(config.num_hidden_layers)


def _claimed_kinds(config: Any) -> tuple[str, ...]:
    """What a configuration says of its layers, to whoever reads it without knowing the family."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        everywhere = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        kinds = [everywhere] * config.num_hidden_layers
    return tuple(kinds)


def _short(kinds: tuple[str, ...]) -> str:
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))


def packing_refusal(config: Any, attention: str | None) -> str | None:
    """Why a target cannot take several documents in one row without mixing them; None where it can.

    Args:
        config: its text config.
        attention: name of its attention kernel; None: the default one.
    """
    if "linear_attention" in layer_kinds(config):
        return (
            f"family {config.model_type!r} has recurrent layers, whose state would pass from one document to the next."
        )
    if attention is not None and "flash" in attention:
        return f"the attention kernel {attention!r} takes no mask; set model.loading.attention to sdpa."
    return None


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
    """Width of the head's dense MLP: what the target states for dense layers, else the width of the ACTIVE experts.

    A mixture that states a width for dense layers beside that of an expert (`moe_intermediate_size`) gives it, even
    where it has no dense layer. Otherwise a token passes through `num_experts_per_tok` experts (and a shared one), and
    their summed width is what its stages read per token: a head of that width stays in proportion. Qwen3-30B-A3B
    states 6144, which is the same sum, 8 x 768. Mixtral and gpt-oss call the width of ONE expert `intermediate_size`.
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
    cap = getattr(config, "final_logit_softcapping", None) if FAMILIES[config.model_type].capped else None
    return None if cap is None else float(cap)


def _rope_by_kind(config: Any) -> dict[str, dict[str, Any]]:
    rope = dict(config.rope_parameters or {})
    return {k: v or {} for k, v in rope.items()} if has_rope_per_kind(config) else {"full_attention": rope}
