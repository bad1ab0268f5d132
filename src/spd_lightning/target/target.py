"""The frozen target: one causal language model, cut into stages, that hands out hidden states of every depth.

Two views of the same weights:
- training: one forward pass over whole sequences that keeps only the anchor states, and the last layer's output from
  which teacher logits are computed where they are needed (never [S, V] at once);
- decoding: one stage for one token at a time, with a cache that rolls back.

Both run the model's own decoder layers one by one, with every argument by keyword: what a family computes inside a
layer stays the family's business, and what differs outside of layers is in `families`. h_L is the last layer's output
BEFORE the final norm, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
)

from spd_lightning.errors import InputError
from spd_lightning.staircase import Staircase, resolve_stage_layers
from spd_lightning.target.cache import RollbackCache, rollback_layer
from spd_lightning.target.families import has_rope_per_kind, layer_kinds, logit_softcap, unsupported_reason
from spd_lightning.target.identity import TargetIdentity, identity_of
from spd_lightning.target.tree_cache import TreeCache

if TYPE_CHECKING:
    from spd_lightning.target.loading import Loading

_MASKS: dict[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "linear_attention": create_recurrent_attention_mask,
}

#: Kinds whose mask depends on what the cache holds.
_SIZED = ("full_attention", "sliding_attention")

#: cos and sin of some positions, by kind of layer: kinds may turn by different angles (Gemma 3, OLMo 3).
Rotary = dict[str, tuple[Tensor, Tensor]]


class Target(nn.Module):
    """A frozen causal language model with a stage partition.

    Shapes: B sequences, S positions, H hidden size, V vocabulary, A anchors.

    Attributes:
        model: the Hugging Face model; its parameters never require gradients and it stays in eval mode.
        stage_layers: layers per stage, or None until a partition is chosen (`partition`).
        layer_kinds: per decoder layer, `full_attention`, `sliding_attention` or `linear_attention`.
        source: what it was loaded from, a path or hub id; None for a model made in memory.
        loading: how it was loaded; None for a model made in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stage_layers: Sequence[int] | None = None,
        source: str | None = None,
        loading: Loading | None = None,
    ) -> None:
        super().__init__()
        if reason := unsupported_reason(model.config):
            raise InputError(f"This model cannot be a target: {reason}.")
        self.model = model.eval().requires_grad_(False)
        self.source, self.loading = source, loading
        self.home: torch.device | None = None  # where it works, if its embedding is on another rank
        self.stage_layers: tuple[int, ...] | None = None
        decoder = model.get_decoder()
        self._parts: Any = (decoder.embed_tokens, decoder.layers, decoder.norm, model.get_output_embeddings())
        self._rotary_embedding = decoder.rotary_emb
        self.layer_kinds = layer_kinds(self.config)
        self._softcap = logit_softcap(self.config)
        if stage_layers is not None:
            self.partition(stage_layers=stage_layers)

    def train(self, mode: bool = True) -> Target:
        """The target is frozen: it stays in eval mode when a surrounding module is set to train."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Target:
        """Weights that were placed on several devices, offloaded or quantised stay as they are.

        RoPE's frequencies keep their dtype: in bfloat16 they would turn far positions by whole radians.
        """
        if is_placed(self.model):
            return self
        kept = dict(self._rotary_embedding.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self._rotary_embedding, name)
            if moved.dtype != buffer.dtype:
                setattr(self._rotary_embedding, name, buffer.to(moved.device))
        return self

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The configuration of the text model (Hugging Face's own class)."""
        return self.model.config.get_text_config()

    @cached_property
    def identity(self) -> TargetIdentity:
        """What a head that is made for this target remembers of it, the tokenizer's digest included.

        A model that was made in memory, or lies in a folder without a tokenizer, has none.
        """
        if self.source is None:
            return identity_of(self.model.config, architecture=type(self.model).__name__)
        from spd_lightning.target.loading import target_identity

        return target_identity(self.source, self.loading)

    @property
    def num_layers(self) -> int:
        return len(self._parts[1])

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.lm_head.out_features)

    @property
    def context_length(self) -> int:
        return int(self.config.max_position_embeddings)

    def layer(self, index: int) -> nn.Module:
        """Decoder layer `index`, Hugging Face's own."""
        return self._parts[1][index]

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
        """Where token ids go in and hidden states come out; offloaded weights pass through it."""
        if self.home is not None:
            return self.home
        embedding = self._parts[0]
        place = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        return embedding.weight.device if place is None else torch.device(place)

    @cached_property
    def norms_store_minus_one(self) -> bool:
        """Whether the family's norms multiply by 1 + weight (Gemma, Qwen3.5), found by asking one."""
        ones = torch.ones(self.hidden_size, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            return bool((self.norm(ones).float().cpu() - self._stored_norm_weight()).mean() > 0.5)

    def norm_weight(self) -> Tensor:
        """[H] float32 on the CPU: what the final norm multiplies by."""
        return self._stored_norm_weight() + (1 if self.norms_store_minus_one else 0)

    def _stored_norm_weight(self) -> Tensor:
        with _in_memory(self.norm):
            return self.norm.weight.detach().float().cpu()

    def lm_head_rows(self, ids: Tensor | None = None) -> Tensor:
        """[V_d, H] float32 on the CPU: rows of the target's lm_head; all of them where `ids` is None."""
        with _in_memory(self.lm_head):
            weight = self.lm_head.weight.detach()
            return (weight if ids is None else weight[ids.to(weight.device)]).float().cpu()

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
        embed = self._parts[0]
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        hidden = embed(input_ids)
        rotary = self._rotary(hidden, position_ids)
        masks = self._masks(hidden, documents)
        kept = {0: hidden}
        for index in range(self.num_layers):
            hidden = self.run_layer(index, hidden, position_ids, rotary, cache, masks[self.layer_kinds[index]])
            if index + 1 in anchors:
                kept[index + 1] = hidden
        place = kept[0].device  # a target over several devices hands everything out in one place
        return [kept[anchor].to(place) for anchor in anchors], hidden.to(place)

    @torch.no_grad()
    def prefill_layers(
        self, hidden: Tensor, layers: range, start: int, cache: RollbackCache, keep: Iterable[int] = ()
    ) -> tuple[dict[int, Tensor], Tensor]:
        """A piece of a prompt through some consecutive layers (a stage).

        Args:
            hidden: h_i [1, C, H] of positions start .. start + C - 1, with i = layers.start; 0 is the embedding.
            cache: holds positions 0 .. start - 1 of these layers, and takes these.
            keep: hidden-state indices.

        Returns:
            [1, C, H] of those indices that these layers produce, and h_i with i = layers.stop.
        """
        position_ids = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
        rotary = self._rotary(hidden, position_ids)
        masks, kept = {}, {}
        for kind in {self.layer_kinds[index] for index in layers}:
            first = next(index for index in layers if self.layer_kinds[index] == kind)
            masks[kind] = _MASKS[kind](
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=None,
                past_key_values=cache if kind in _SIZED and start else None,
                **({"layer_idx": first} if kind in _SIZED else {}),
            )
        for index in layers:
            hidden = self.run_layer(index, hidden, position_ids, rotary, cache, masks[self.layer_kinds[index]])
            if index + 1 in keep:
                kept[index + 1] = hidden
        return kept, hidden

    def embed_tokens(self, tokens: Sequence[int]) -> Tensor:
        """h_0 of some tokens, [1, S, H]."""
        return self._parts[0](torch.tensor([list(tokens)], device=self.device))

    @torch.no_grad()
    def embedding_size(self) -> float:
        """Root mean square of h_0, over the first ids of the vocabulary."""
        return float(self.embed_tokens(range(min(1024, self.vocab_size))).float().square().mean().sqrt())

    def _masks(self, hidden: Tensor, documents: Tensor | None) -> dict[str, Any]:
        """The attention mask of each kind of layer; None where its kernel is causal by itself."""
        same_document = None
        if documents is not None:
            if "linear_attention" in self.layer_kinds:
                raise InputError(
                    f"documents are packed into one row, and family {self.config.model_type!r} has recurrent layers, "
                    "whose state would pass from one document to the next: pad instead of packing."
                )

            def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return documents[batch, query] == documents[batch, key]

        masks = {
            kind: _MASKS[kind](
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=None,
                past_key_values=None,
                and_mask_function=same_document,
            )
            for kind in set(self.layer_kinds)
        }
        if documents is not None and None in masks.values():
            raise InputError(
                f"documents are packed into one row, which the attention kernel {self.config._attn_implementation!r} "
                "takes no mask for: set loading.attention to sdpa, or pad instead of packing."
            )
        return masks

    def _rotary(self, hidden: Tensor, position_ids: Tensor) -> Rotary:
        """cos and sin [B, S, D] of some positions for every kind of layer; `hidden` gives dtype and device."""
        if has_rope_per_kind(self.config):
            return {kind: self._rotary_embedding(hidden, position_ids, kind) for kind in set(self.layer_kinds)}
        return dict.fromkeys(self.layer_kinds, self._rotary_embedding(hidden, position_ids))

    def logits(self, hidden: Tensor) -> Tensor:
        """Target logits [..., V] of last-layer outputs [..., H] (pre-norm)."""
        # not norm(...): where weights are gathered from other ranks, the caller says for how long (`gathered`)
        return self.logits_of_normed(self.norm.forward(hidden)).to(hidden.device)

    def normed(self, hidden: Tensor) -> Tensor:
        """Last-layer outputs [..., H] after the final norm: what the lm_head reads."""
        return self.norm.forward(hidden).to(hidden.device)

    def logits_of_normed(self, hidden: Tensor) -> Tensor:
        """Target logits [..., V] of `normed` hidden states [..., H]."""
        logits = self.lm_head.forward(hidden).to(hidden.device)
        return logits if self._softcap is None else softcap(logits, self._softcap)

    # -- one token through one stage (decoding) ----------------------------------------------------------------------

    def new_cache(self, capacity: int, stage_layers: Sequence[int] | None = None, tentative: int = 0) -> RollbackCache:
        """An empty cache for one sequence of up to `capacity` tokens.

        Args:
            stage_layers: stages of the pipeline that fills it: stage s of n can be rolled back by n - 1 - s tokens.
                None: one stage, which never rolls back.
            tentative: by how many tokens more, because stages go on before they know a verdict.
        """
        stages = [self.num_layers] if stage_layers is None else stage_layers
        rollbacks = [len(stages) - 1 - stage + tentative for stage, layers in enumerate(stages) for _ in range(layers)]
        window = getattr(self.config, "sliding_window", None)
        return RollbackCache(
            [
                rollback_layer(kind, capacity, rollback, window)
                for kind, rollback in zip(self.layer_kinds, rollbacks, strict=True)
            ]
        )

    def rotary_table(self, length: int) -> Rotary:
        """Rotary embeddings of positions 0..length-1, computed once per generation instead of per token and stage."""
        positions = torch.arange(length, device=self.device)[None]
        probe = torch.empty(1, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        return self._rotary(probe, positions)

    def embed(self, token: int | Tensor) -> Tensor:
        """h_0 of one token, [1, 1, H]; an id in a tensor [1] on the device never comes to the host."""
        ids = token.view(1, 1) if isinstance(token, Tensor) else torch.tensor([[token]], device=self.device)
        return self._parts[0](ids)

    @torch.no_grad()
    def run_layers(
        self,
        hidden: Tensor,
        layers: range,
        position: int | Tensor,
        rotary: Rotary,
        cache: RollbackCache | TreeCache,
        keep: dict[int, int],
        kept: Tensor,
        abandoned: Callable[[], bool] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One token at `position`, or some alternatives, through some consecutive layers (a stage).

        Args:
            hidden: h_i [1, R, H] with i = layers.start; R = 1, but in a draft tree.
            position: of the token; [R] in a draft tree.
            rotary: `rotary_table` that covers the position.
            keep: hidden-state index -> row of `kept`, for the anchors.
            kept: [A, H], or [A, R, H] in a draft tree; receives the anchor states that these layers produce.
            abandoned: asked before every layer whether the result is of no use any more.
            mask: [1, 1, R, C], added to attention scores; None: the token sees all that is cached.

        Returns:
            h_i [1, R, H] with i = layers.stop; anything where it was abandoned.
        """
        positions = torch.as_tensor(position, device=hidden.device).view(1, -1)
        here = {kind: (cos[:, positions[0]], sin[:, positions[0]]) for kind, (cos, sin) in rotary.items()}
        for index in layers:
            if abandoned is not None and abandoned():
                break
            hidden = self.run_layer(index, hidden, positions, here, cache, mask)
            if index + 1 in keep:
                kept[keep[index + 1]] = hidden[0]
        return hidden

    def run_layer(
        self,
        index: int,
        hidden: Tensor,
        position_ids: Tensor,
        rotary: Rotary,
        cache: Cache | None,
        mask: Any,
    ) -> Tensor:
        """h_{index + 1} [B, S, H] of h_index: the model's own layer, every argument by keyword."""
        output = self.layer(index)(
            hidden_states=hidden,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=rotary[self.layer_kinds[index]],
        )
        return output if isinstance(output, Tensor) else output[0]


def is_placed(model: PreTrainedModel) -> bool:
    """Whether loading decided where and how the weights are stored, so that they cannot be moved or cast."""
    return hasattr(model, "hf_device_map") or bool(getattr(model, "is_quantized", False))


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Logits squeezed smoothly into (-cap, cap)."""
    return cap * torch.tanh(logits / cap)


def _in_memory(module: nn.Module) -> Any:
    """Bring offloaded weights of a module into memory for a while; nothing to do for others."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


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
