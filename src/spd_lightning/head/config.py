"""HeadConfig: everything that is needed to rebuild a head; the content of its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from spd_lightning.errors import InputError
from spd_lightning.staircase import Staircase


@dataclass(frozen=True)
class HeadConfig:
    """Sizes and structure of a speculation head.

    The layers are Qwen3-style for every target (per-head RMSNorm on queries and keys), as in the published heads, with
    the target's sizes and its RoPE.
    """

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

    def __post_init__(self) -> None:
        for name in ("stage_layers", "anchors", "draft_token_ids"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(int(x) for x in value))
        object.__setattr__(self, "rope_parameters", dict(self.rope_parameters))
        _ = self.staircase  # refuses impossible stages and anchors
        for name in _POSITIVE:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name}={value!r}: expected an integer of at least 1.")
        ids = self.draft_token_ids
        if ids is not None:
            ascending = all(a < b for a, b in zip(ids, ids[1:], strict=False))
            if not ids or not ascending or ids[0] < 0 or ids[-1] >= self.vocab_size:
                raise InputError(
                    f"draft_token_ids ({len(ids)} ids) must be distinct, ascending and within 0..{self.vocab_size - 1}."
                )

    @cached_property
    def staircase(self) -> Staircase:
        return Staircase(self.stage_layers, self.anchors)

    @property
    def draft_vocab_size(self) -> int:
        return self.vocab_size if self.draft_token_ids is None else len(self.draft_token_ids)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> HeadConfig:
        """Read config.json; InputError names the file and what is wrong with it."""
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a readable head config: {error}") from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise InputError(f'{path} does not describe a speculation head: expected "format": "{FORMAT}".')
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise InputError(f"{path}: unknown fields {unknown}; expected {sorted(known)}.")
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: {error}") from error


FORMAT = "spd-head/1"
_POSITIVE = (
    "num_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
