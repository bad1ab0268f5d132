"""HeadConfig: everything that is needed to rebuild a head; the content of its config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from spd_lightning.errors import InputError
from spd_lightning.staircase import Staircase


@dataclass(frozen=True)
class LayerStyle:
    """How a decoder layer of the head is built; the defaults are the Qwen3 style that most published heads have.

    Always dense with full attention. `head.kind: target` takes the style of the target's own attention layers and
    leaves out what a staircase has no place for: experts, sliding windows, attention sinks (gpt-oss) and the soft-cap
    of attention scores (Gemma 2).
    """

    norms: Literal["before", "after", "both"] = "before"
    """RMSNorm before attention and MLP (most families), after them (OLMo), or both (Gemma)."""
    qk_norm: Literal["head", "row", "none"] = "head"
    """RMSNorm of queries and keys: per head (Qwen3), over all heads at once (OLMo), none (Llama)."""
    gate: bool = False
    """Attention's output is multiplied by the sigmoid of a second query projection (Qwen3.5)."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_scale: float | None = None
    """Factor of attention scores; None = head_dim ** -0.5."""

    def __post_init__(self) -> None:
        for name, expected in (("norms", ("before", "after", "both")), ("qk_norm", ("head", "row", "none"))):
            if getattr(self, name) not in expected:
                raise InputError(f"style.{name}={getattr(self, name)!r}: expected {', '.join(expected)}.")
        for name in ("gate", "qkv_bias", "output_bias", "mlp_bias"):
            if type(getattr(self, name)) is not bool:
                raise InputError(f"style.{name}={getattr(self, name)!r}: expected true or false.")
        if self.query_scale is not None and not (_is_number(self.query_scale) and self.query_scale > 0):
            raise InputError(f"style.query_scale={self.query_scale!r}: expected a positive number or null.")


@dataclass(frozen=True)
class HeadConfig:
    """Sizes and structure of a speculation head, with the target's sizes and the RoPE of its full attention."""

    stage_layers: tuple[int, ...]
    """Layers of the target per stage; n = their count, L = their sum."""
    anchors: tuple[int, ...]
    """Hidden-state indices the head reads, from 0 (embedding output) to at most L (last layer, before the norm)."""
    num_layers: int
    """Decoder layers of the head."""
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """Size of the target's vocabulary V."""
    draft_token_ids: tuple[int, ...] | None = None
    """The draft vocabulary: ids the head can propose, ascending; None = all V of them."""
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope_parameters: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    """RoPE of the target in the form of a Hugging Face config (`rope_theta`, scaling of Llama 3.1, ...)."""
    max_position_embeddings: int = 4096
    """The target's context length in tokens (some RoPE scalings depend on it)."""
    kind: str = "qwen3"
    """Where `style` comes from: `qwen3`, the published kind, or `target`, the target's own attention layers."""
    style: LayerStyle = LayerStyle()
    anchor_norm: bool = False
    """Each anchor's hidden state is divided by its root mean square before W_k (an RMSNorm whose weight W_k holds)."""
    logit_softcap: float | None = None
    """c: draft logits are c tanh(logits / c), as the target's are (Gemma 2)."""

    def __post_init__(self) -> None:
        for name in ("stage_layers", "anchors", "draft_token_ids"):
            value = getattr(self, name)
            if value is not None:
                if isinstance(value, str) or not isinstance(value, Sequence) or any(type(x) is not int for x in value):
                    raise InputError(f"{name}={str(value)[:80]}: expected a list of integers.")
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.style, Mapping):
            object.__setattr__(self, "style", LayerStyle(**self.style))
        if not isinstance(self.style, LayerStyle):
            raise InputError(f"style={self.style!r}: expected an object.")
        _ = self.staircase  # refuses impossible stages and anchors
        for name in _POSITIVE:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**31:
                raise InputError(f"{name}={value!r}: expected an integer of at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads={self.num_attention_heads}: expected a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if not (_is_number(self.rms_norm_eps) and self.rms_norm_eps >= 0):
            raise InputError(f"rms_norm_eps={self.rms_norm_eps!r}: expected a number of at least 0.")
        if not isinstance(self.hidden_act, str):
            raise InputError(f"hidden_act={self.hidden_act!r}: expected the name of an activation, such as silu.")
        self._check_rope()
        if type(self.anchor_norm) is not bool:
            raise InputError(f"anchor_norm={self.anchor_norm!r}: expected true or false.")
        if self.kind not in ("qwen3", "target"):
            raise InputError(f"kind={self.kind!r}: expected qwen3 or target.")
        if self.logit_softcap is not None and not (_is_number(self.logit_softcap) and self.logit_softcap > 0):
            raise InputError(f"logit_softcap={self.logit_softcap!r}: expected a positive number or null.")
        ids = self.draft_token_ids
        if ids is not None:
            ascending = all(a < b for a, b in zip(ids, ids[1:], strict=False))
            if not ids or not ascending or ids[0] < 0 or ids[-1] >= self.vocab_size:
                raise InputError(
                    f"draft_token_ids ({len(ids)} ids) must be distinct, ascending and within 0..{self.vocab_size - 1}."
                )

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        if not isinstance(rope, Mapping) or not isinstance(rope.get("rope_type"), str):
            raise InputError(f"rope_parameters={rope!r}: expected an object with rope_type and rope_theta.")
        theta: Any = rope.get("rope_theta")
        if not (_is_number(theta) and theta > 0):
            raise InputError(f"rope_parameters.rope_theta={theta!r}: expected a positive number.")
        object.__setattr__(self, "rope_parameters", dict(rope))
        share = rope.get("partial_rotary_factor", 1.0)
        if not (_is_number(share) and 0 < share <= 1) or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise InputError(
                f"head_dim={self.head_dim} and rope_parameters.partial_rotary_factor={share!r}: expected an even "
                "number of dimensions for RoPE to turn, at least 2."
            )

    @cached_property
    def staircase(self) -> Staircase:
        return Staircase(self.stage_layers, self.anchors)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns; the others stay (`partial_rotary_factor`)."""
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))

    @property
    def draft_vocab_size(self) -> int:
        return self.vocab_size if self.draft_token_ids is None else len(self.draft_token_ids)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_POSITIVE = (
    "num_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
