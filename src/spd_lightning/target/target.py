"""The frozen target: one causal language model, cut into stages, that hands out hidden states of every depth.

Two views of the same weights:
- training: one forward pass over whole sequences that keeps only the anchor states, and the last layer's output from
  which teacher logits are computed where they are needed (never [S, V] at once);
- decoding: one stage for one token at a time, with a cache that rolls back.

Both run the model's own decoder layers one by one, with every argument by keyword: what a family computes inside a
layer stays the family's business. h_L is the last layer's output BEFORE the final norm, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from spd_lightning.errors import InputError
from spd_lightning.staircase import Staircase, resolve_stage_layers
from spd_lightning.target.cache import RollbackCache

#: Families whose decoder layers run one by one under plain causal attention.
SUPPORTED_MODEL_TYPES = ("llama", "qwen3")


class Target(nn.Module):
    """A frozen causal language model with a stage partition.

    Shapes: B sequences, S positions, H hidden size, V vocabulary, A anchors.

    Attributes:
        model: the Hugging Face model; its parameters never require gradients and it stays in eval mode.
        stage_layers: layers per stage, or None until a partition is chosen (`partition`).
        source: what it was loaded from (path or hub id) and the revision; None for a model made in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stage_layers: Sequence[int] | None = None,
        source: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if reason := unsupported_reason(model.config.get_text_config()):
            raise InputError(f"This model cannot be a target: {reason}.")
        self.model = model.eval().requires_grad_(False)
        self.source, self.revision = source, revision
        self.stage_layers: tuple[int, ...] | None = None
        decoder = model.get_decoder()
        self._parts: Any = (decoder.embed_tokens, decoder.layers, decoder.norm, model.get_output_embeddings())
        self._rotary = decoder.rotary_emb
        if stage_layers is not None:
            self.partition(stage_layers=stage_layers)

    def train(self, mode: bool = True) -> Target:
        """The target is frozen: it stays in eval mode when a surrounding module is set to train."""
        return super().train(False)

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The configuration of the text model (Hugging Face's own class)."""
        return self.model.config.get_text_config()

    @property
    def num_layers(self) -> int:
        return len(self._parts[1])

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.lm_head.weight.shape[0])

    @property
    def context_length(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def norm(self) -> Any:
        return self._parts[2]

    @property
    def lm_head(self) -> nn.Linear:
        return self._parts[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def partition(self, num_stages: int | None = None, stage_layers: Sequence[int] | None = None) -> Target:
        """Choose the stages; raises InputError for a split that does not fit the number of layers."""
        self.stage_layers = resolve_stage_layers(self.num_layers, num_stages, stage_layers)
        return self

    def end_of_sequence_ids(self, eos_token_id: int | Iterable[int] | None = None) -> frozenset[int]:
        """The ids that end a generation: as given, else generation_config, else the text config, else none."""
        if eos_token_id is None:
            eos_token_id = getattr(self.model.generation_config, "eos_token_id", None)
        if eos_token_id is None:
            eos_token_id = getattr(self.config, "eos_token_id", None)
        if eos_token_id is None:
            return frozenset()
        return frozenset([eos_token_id] if isinstance(eos_token_id, int) else (int(i) for i in eos_token_id))

    # -- whole sequences (training, prefill) -----------------------------------------------------------------------

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        anchors: Sequence[int],
        position_ids: Tensor | None = None,
        documents: Tensor | None = None,
        cache: RollbackCache | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """All layers over whole sequences; keeps the anchor states only.

        Args:
            input_ids: [B, S].
            anchors: hidden-state indices to keep.
            position_ids: [B, S] RoPE positions; 0..S-1 where None.
            documents: [B, S] document number of each token of a packed row; tokens see their own document only.
                Padding on the right needs none: causal attention hides it.
            cache: filled with the keys and values of all positions (prefill; must be empty).

        Returns:
            The anchor states, one [B, S, H] per anchor, and h_L [B, S, H].
        """
        embed, layers, _, _ = self._parts
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = embed(input_ids)
        rotary = self._rotary(hidden, position_ids=position_ids)
        if documents is None:
            # None where the attention kernel is causal by itself, a tensor where it is not (eager attention)
            mask = create_causal_mask(
                config=self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=cache
            )
        else:
            mask = document_causal_mask(documents, hidden.dtype)
        kept = {0: hidden}
        for index, layer in enumerate(layers):
            hidden = self._layer(layer, hidden, position_ids, rotary, cache, mask)
            if index + 1 in anchors:
                kept[index + 1] = hidden
        return [kept[anchor] for anchor in anchors], hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Target logits [..., V] of last-layer outputs [..., H] (pre-norm)."""
        return self.lm_head(self.norm(hidden))

    # -- one token through one stage (decoding) ----------------------------------------------------------------------

    def new_cache(self, capacity: int) -> RollbackCache:
        return RollbackCache(self.num_layers, capacity)

    def rotary_table(self, length: int) -> tuple[Tensor, Tensor]:
        """Rotary embeddings of positions 0..length-1, computed once per generation instead of per token and stage."""
        positions = torch.arange(length, device=self.device)[None]
        probe = torch.empty(1, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        return self._rotary(probe, position_ids=positions)

    def embed(self, token: int) -> Tensor:
        """h_0 of one token, [1, 1, H]."""
        return self._parts[0](torch.tensor([[token]], device=self.device))

    @torch.no_grad()
    def run_layers(
        self,
        hidden: Tensor,
        layers: range,
        position: int,
        rotary: tuple[Tensor, Tensor],
        cache: RollbackCache,
        keep: dict[int, int],
        kept: Tensor,
    ) -> Tensor:
        """One token at `position` through some consecutive layers (a stage).

        Args:
            hidden: h_i [1, 1, H] with i = layers.start.
            rotary: `rotary_table` that covers the position.
            keep: hidden-state index -> row of `kept`, for the anchors.
            kept: [A, H], receives the anchor states that these layers produce.

        Returns:
            h_i [1, 1, H] with i = layers.stop.
        """
        cos, sin = rotary
        here = (cos[:, position : position + 1], sin[:, position : position + 1])
        positions = torch.tensor([[position]], device=hidden.device)
        for index in layers:
            hidden = self._layer(self._parts[1][index], hidden, positions, here, cache, None)
            if index + 1 in keep:
                kept[keep[index + 1]] = hidden[0, 0]
        return hidden

    @staticmethod
    def _layer(
        layer: nn.Module,
        hidden: Tensor,
        position_ids: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: RollbackCache | None,
        mask: Any,
    ) -> Tensor:
        output = layer(
            hidden_states=hidden,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=rotary,
        )
        return output if isinstance(output, Tensor) else output[0]


def document_causal_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive [B, 1, S, S] mask: position t sees t' <= t of its own document."""
    seen = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def unsupported_reason(config: Any) -> str | None:
    """Why a (text) configuration cannot be a target of this version, or None if it can; reads no weight."""
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        return f"family {config.model_type!r}, supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"layers of type {', '.join(sorted(kinds - {'full_attention'}))}, supported is full attention"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"RoPE of type {rope!r}, whose angles depend on the length of the sequence"
    return None


def require_partition(target: Target) -> tuple[int, ...]:
    """The target's stages, or one clear error where none were chosen."""
    if target.stage_layers is None:
        raise InputError("The target is not cut into stages yet: call load_target(..., num_stages=N) or .partition().")
    return target.stage_layers


def check_head_fits(target: Target, staircase: Staircase, hidden_size: int, vocab_size: int) -> None:
    """Refuse a head that was made for another target, showing both values.

    Raises:
        InputError: naming the first property that differs.
    """
    pairs: list[tuple[str, Any, Any]] = [
        ("hidden size", hidden_size, target.hidden_size),
        ("vocabulary size", vocab_size, target.vocab_size),
        ("number of layers", staircase.num_layers, target.num_layers),
    ]
    if target.stage_layers is not None:
        pairs.append(("stages (layers per stage)", list(staircase.stage_layers), list(target.stage_layers)))
    for what, of_head, of_target in pairs:
        if of_head != of_target:
            raise InputError(
                f"The head does not fit the target: {what} is {of_head} in the head and {of_target} in the target. "
                "Load the target that the head was trained for, with the same num_stages or stage_layers."
            )
