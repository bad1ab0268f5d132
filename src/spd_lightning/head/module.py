"""SpeculationHead: rows -> draft logits, in the training view and in the decoding view of the same weights.

Row (k, T) = W_k [h_{b_0}(T); ...; h_{b_k}(T)] goes through a few decoder layers under the staircase, then the target's
frozen final norm and a trained lm_head over the draft vocabulary. Row (0, t) drafts x_{t+1}.

Shapes: B batch, S positions, H hidden, m reachable blocks, R rows of one cycle, N/K query/key heads, D head_dim,
V_d draft vocabulary, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from spd_lightning.head.attention import staircase_attention
from spd_lightning.head.config import HeadConfig
from spd_lightning.head.layout import Rows, StaircaseLayout
from spd_lightning.target.identity import TargetIdentity
from spd_lightning.target.target import softcap

Rotary = tuple[Tensor, Tensor]


class SelfAttention(nn.Module):
    """Projections of one layer's attention; who attends to whom is the caller's business."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        H, D, style = config.hidden_size, config.head_dim, config.style
        queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
        self.head_dim = D
        self.q_proj = nn.Linear(H, queries * (2 if style.gate else 1), bias=style.qkv_bias)
        self.k_proj = nn.Linear(H, keys, bias=style.qkv_bias)
        self.v_proj = nn.Linear(H, keys, bias=style.qkv_bias)
        self.o_proj = nn.Linear(queries, H, bias=style.output_bias)
        self.style = style
        if style.qk_norm != "none":
            per_head = style.qk_norm == "head"
            self.q_norm = nn.RMSNorm(D if per_head else queries, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(D if per_head else keys, eps=config.rms_norm_eps)
        # attention kernels scale by head_dim ** -0.5 themselves
        self.query_factor = 1.0 if style.query_scale is None else style.query_scale * D**0.5

    def query(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor | None]:
        """[..., H] -> queries [..., N, D] and the output gate [..., N, D] where the style has one."""
        projected, gate = self.q_proj(x), None
        if self.style.gate:  # per head: D values of the query, D of its gate
            projected, gate = projected.unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
            projected = projected.flatten(-2)
        turned = self._turned(projected, self.q_norm if self.style.qk_norm != "none" else None, rotary)
        return turned if self.query_factor == 1 else turned * self.query_factor, gate

    def key_value(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """[..., H] -> two [..., K, D]."""
        key = self._turned(self.k_proj(x), self.k_norm if self.style.qk_norm != "none" else None, rotary)
        return key, self._heads(self.v_proj(x))

    def _turned(self, projected: Tensor, norm: nn.RMSNorm | None, rotary: Rotary) -> Tensor:
        """Norm and rotation: [..., N D] -> [..., N, D]."""
        if norm is None:
            normed = self._heads(projected)
        elif self.style.qk_norm == "row":
            normed = self._heads(norm(projected))
        else:
            normed = norm(self._heads(projected))
        # they run in float32 under autocast; attention kernels want the projections' own dtype
        return rotate(normed, rotary).to(projected.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class Mlp(nn.Module):
    """Gated MLP, dense even if the target is a mixture of experts."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        H, intermediate, bias = config.hidden_size, config.intermediate_size, config.style.mlp_bias
        self.gate_proj = nn.Linear(H, intermediate, bias=bias)
        self.up_proj = nn.Linear(H, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, H, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class HeadLayer(nn.Module):
    """One decoder layer, in the pieces that the two views put together differently.

    The norms carry the names that Hugging Face's layers give them; what a style lacks is the identity, without weights.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        norms = config.style.norms

        def norm(present: bool) -> nn.Module:
            return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if present else nn.Identity()

        self.input_layernorm = norm(norms != "after")
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = norm(True)  # before the MLP, or after attention where a layer norms outputs
        if norms != "before":
            self.pre_feedforward_layernorm = norm(norms == "both")
            self.post_feedforward_layernorm = norm(True)
        self.mlp = Mlp(config)
        self.norms_outputs = norms != "before"

    def finish(self, residual: Tensor, attended: Tensor, gate: Tensor | None) -> Tensor:
        """Everything after attention: [..., H], [..., N, D] and the gate -> [..., H]."""
        if gate is not None:
            attended = attended * torch.sigmoid(gate)
        written = self.self_attn.o_proj(attended.flatten(-2))
        if not self.norms_outputs:
            x = residual + written
            return x + self.mlp(self.post_attention_layernorm(x))
        x = residual + self.post_attention_layernorm(written)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Aggregation(nn.Linear):
    """W_k: concatenated anchors [..., (k+1) H] -> row [..., H].

    With `anchor_norm` each of them has root mean square 1 first: the states of a deep layer are many times larger than
    those of a shallow one, and without it they decide alone how far a step of the optimizer moves a row. The norm has
    no weight of its own, because W_k would undo it.
    """

    def __init__(self, config: HeadConfig, block: int) -> None:
        super().__init__((block + 1) * config.hidden_size, config.hidden_size, bias=False)
        self.norm_size, self.eps = (config.hidden_size if config.anchor_norm else None), config.rms_norm_eps

    def forward(self, anchors: Tensor) -> Tensor:
        return super().forward(self.normed(anchors))

    def normed(self, anchors: Tensor) -> Tensor:
        """What W_k multiplies: the anchors, each normed or as it is."""
        if self.norm_size is None:
            return anchors
        apart = anchors.unflatten(-1, (-1, self.norm_size))
        return F.rms_norm(apart, (self.norm_size,), eps=self.eps).flatten(-2).to(anchors.dtype)


class LmHead(nn.Linear):
    """Over the draft vocabulary, without bias."""

    def forward(self, hidden: Tensor, fused: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Logits [..., V_d] of [..., H]; or whatever `fused` makes of hidden and weight.

        A loss that never holds all logits needs the weight itself, and under ZeRO-3 a weight is whole in its own
        module's forward only.
        """
        return super().forward(hidden) if fused is None else fused(hidden, self.weight)


class HeadCache:
    """Keys and values of the head during decoding: ONE row per position, overwritten when the position goes deeper."""

    def __init__(self, config: HeadConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_layers, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)


class SpeculationHead(nn.Module):
    """The trainable aggregation head.

    Trained: `aggregation` (one W_k per block), `layers`, `lm_head`. Frozen: `norm`, the target's final norm.
    `origin` says which target it was made for, as far as that is known.
    """

    norm: nn.RMSNorm
    draft_token_ids: Tensor | None

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.origin = TargetIdentity()
        self.staircase = config.staircase
        H = config.hidden_size
        self.aggregation = nn.ModuleList(Aggregation(config, k) for k in range(len(config.anchors)))
        self.layers = nn.ModuleList(HeadLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(H, eps=config.rms_norm_eps).requires_grad_(False)
        self.lm_head = LmHead(H, config.draft_vocab_size, bias=False)
        #: Whether the training view computes a layer's activations again in the backward pass instead of keeping them.
        self.checkpoint_layers = False
        #: Multiplications with weights, lm_head left out, in the last training forward; and rows that it returned.
        self.last_work = (0, 0)
        self.make_tables()

    def make_tables(self) -> None:
        """What no file holds: RoPE frequencies and the draft vocabulary as a tensor, on the default device."""
        self.rotary = _rotary_embedding(self.config)
        ids = self.config.draft_token_ids
        self.register_buffer("draft_token_ids", None if ids is None else torch.tensor(ids), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def _layers(self) -> list[HeadLayer]:
        return cast("list[HeadLayer]", list(self.layers))

    def full_vocabulary_id(self, draft_index: int) -> int:
        """The target's token id of an index into the draft vocabulary."""
        ids = self.config.draft_token_ids
        return draft_index if ids is None else ids[draft_index]

    def logits(self, hidden: Tensor) -> Tensor:
        """Draft logits [..., V_d] of the last layer's output [..., H]."""
        logits = self.lm_head(self.norm(hidden))
        cap = self.config.logit_softcap
        return logits if cap is None else softcap(logits, cap)

    def aggregate(self, states: Sequence[Tensor], rows: Rows) -> Tensor:
        """Anchor states, one [B, S, H] per anchor, to some rows [R, H]."""
        H = self.config.hidden_size
        anchors = torch.cat(list(states), dim=-1).flatten(0, 1)
        blocks = [self.staircase.reachable_blocks[r] for r in rows.blocks]
        return torch.cat(
            [self.aggregation[k](anchors[place, : (k + 1) * H]) for k, place in zip(blocks, rows.places, strict=True)]
        )

    # -- the training view: all rows of whole sequences -------------------------------------------------------------

    def forward(
        self,
        states: Sequence[Tensor],
        layout: StaircaseLayout,
        position_ids: Tensor | None = None,
        select: Tensor | None = None,
        all_rows: bool = False,
        dense: bool | None = None,
    ) -> Tensor:
        """Last-layer outputs of block-0 rows, which are the ones that draft.

        Args:
            states: one [B, S, H] per anchor.
            layout: entry cycles (and documents) of the batch.
            position_ids: [B, S] RoPE positions; 0..S-1 where None.
            select: [B, S] bool: the positions that are asked for, returned as [P, H] in row-major order. A row that
                none of them depends on is computed in no layer: a prompt costs one row per position, not m.
            all_rows: return [B, m, S, H], every row (parity tests, losses on all rows).
            dense: see `staircase_attention`.

        Returns:
            [B, S, H], or [P, H] with `select`, or [B, m, S, H] with `all_rows`.
        """
        B, S = layout.entries.shape
        blocks = range(len(self.staircase.reachable_blocks) if all_rows else 1)
        asked = layout.entries.new_ones(B, S, len(blocks), dtype=torch.bool)
        if select is not None:
            asked &= select[:, :, None]
        needed = [Rows(asked, blocks)]  # from the last layer's output back to the first layer's input
        for _ in self.layers:
            needed.append(layout.seen_by(needed[-1]))
        self.last_work = (self._multiplications(needed), len(needed[0]))
        if position_ids is None:
            position_ids = torch.arange(S, device=asked.device)[None]
        rotary = self._rotary(states[0], position_ids.expand(B, S))
        x = self.aggregate(states, needed[-1])
        for layer, (rows, asking) in zip(self._layers, pairwise(reversed(needed)), strict=True):
            arguments = (layer, x, rows, asking, rotary, layout, dense)
            if self.checkpoint_layers and torch.is_grad_enabled():
                x = checkpoint(_train_layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = _train_layer(*arguments)
        if all_rows:
            return needed[0].spread(x)
        return x if select is not None else x.view(B, S, -1)

    def _multiplications(self, needed: Sequence[Rows]) -> int:
        """Of all weights with the rows of a forward, from the last layer's output back to the first one's input."""
        config = self.config
        H, D = config.hidden_size, config.head_dim
        keys = 2 * H * config.num_key_value_heads * D
        queries = (3 if config.style.gate else 2) * H * config.num_attention_heads * D  # and the output
        others = queries + 3 * H * config.intermediate_size
        first = needed[-1]
        blocks = [self.staircase.reachable_blocks[r] for r in first.blocks]
        total = sum(len(place) * (k + 1) * H * H for k, place in zip(blocks, first.places, strict=True))
        return total + sum(keys * len(seen) + others * len(asking) for asking, seen in pairwise(needed))

    # -- the decoding view: the rows of one cycle ------------------------------------------------------------------

    def new_cache(self, capacity: int) -> HeadCache:
        return HeadCache(self.config, capacity, self.dtype, self.device)

    def rotary_table(self, length: int) -> Rotary:
        """cos and sin [length, R] of all positions, computed once per generation."""
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self._rotary(probe, torch.arange(length, device=self.device)[None])
        return cos[0], sin[0]

    @torch.no_grad()
    def prefill(self, states: Sequence[Tensor], cache: HeadCache, rotary: Rotary) -> None:
        """Rows of a finished prompt, states [1, P, H] each: one causal pass over deepest rows, keys and values kept."""
        deepest = self.staircase.reachable_blocks[-1]
        x = self.aggregation[deepest](torch.cat(list(states[: deepest + 1]), dim=-1))[0]
        P = x.shape[0]
        here = (rotary[0][:P], rotary[1][:P])
        for index, layer in enumerate(self._layers):
            normed = layer.input_layernorm(x)
            k, v = layer.self_attn.key_value(normed, here)
            cache.keys[index, :, :P], cache.values[index, :, :P] = k.transpose(0, 1), v.transpose(0, 1)
            if index == len(self.layers) - 1:
                return
            q, gate = layer.self_attn.query(normed, here)
            x = layer.finish(x, _attend(q, cache, index, P, causal=True), gate)

    @torch.no_grad()
    def step(
        self,
        rows: Sequence[tuple[int, int]],
        kept: dict[int, Tensor],
        cache: HeadCache,
        rotary: Rotary,
        all_rows: bool = False,
    ) -> Tensor:
        """The rows that are due in one cycle; their keys and values replace the positions' older rows.

        Args:
            rows: (block, position) pairs, the newest position's row last; the same position at most once.
            kept: position -> [A, H] anchor states, valid up to the row's block.
            cache: one row per position.
            rotary: `rotary_table` that covers all positions.
            all_rows: return every row's output instead of the newest's alone.

        Returns:
            [H], the last layer's output of the newest position's row; [R, H] with `all_rows`.
        """
        positions = torch.tensor([position for _, position in rows], device=self.device)
        length = int(max(position for _, position in rows)) + 1
        mask = torch.arange(length, device=self.device)[None] <= positions[:, None]
        states = [(k, kept[position][None]) for k, position in rows]
        last = len(rows) if all_rows else 1
        x = self.step_rows(states, positions, positions, mask, cache, rotary, last)
        return x if all_rows else x[-1]

    @torch.no_grad()
    def step_rows(
        self,
        states: Sequence[tuple[int, Tensor]],
        positions: Tensor,
        places: Tensor,
        mask: Tensor,
        cache: HeadCache,
        rotary: Rotary,
        last: int,
    ) -> Tensor:
        """Rows wherever they lie in the cache; in a chain a row's place is its position, in a draft tree it is not.

        Args:
            states: blocks, each with the anchor states [r, A, H] of its rows, valid up to that block; R rows together.
            positions, places: [R], of RoPE and in the cache; a place occurs once.
            mask: [R, C] bool, the first C places that each row sees.
            last: so many rows at the end are asked for.

        Returns:
            [last, H], the last layer's outputs.
        """
        x = torch.cat([self.aggregation[k](anchors[:, : k + 1].flatten(1).to(self.dtype)) for k, anchors in states])
        here = (rotary[0][positions], rotary[1][positions])
        for index, layer in enumerate(self._layers):
            normed = layer.input_layernorm(x)
            k, v = layer.self_attn.key_value(normed, here)
            cache.keys[index, :, places] = k.transpose(0, 1)
            cache.values[index, :, places] = v.transpose(0, 1)
            if index == len(self.layers) - 1:  # the others are computed for their keys and values alone
                asked = slice(len(x) - last, None)
                x, normed, mask, here = x[asked], normed[asked], mask[asked], (here[0][asked], here[1][asked])
            q, gate = layer.self_attn.query(normed, here)
            x = layer.finish(x, _attend(q, cache, index, mask.shape[1], mask=mask), gate)
        return x

    def _rotary(self, x: Tensor, position_ids: Tensor) -> Rotary:
        cos, sin = self.rotary(x, position_ids)
        return cos, sin


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of [..., heads, D] by cos and sin [..., R] (the half-split form of Hugging Face models).

    The first R <= D dimensions of a head turn, the others pass.
    """
    cos, sin = (part.unsqueeze(-2) for part in rotary)
    turning, passing = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, passing), dim=-1) if passing.shape[-1] else turned


def _train_layer(
    layer: HeadLayer,
    x: Tensor,
    rows: Rows,
    asking: Rows,
    rotary: Rotary,
    layout: StaircaseLayout,
    dense: bool | None,
) -> Tensor:
    """One layer of the training view: some of the rows x [R, H] are `asking`; they attend to all, and go on."""
    cos, sin = (table.flatten(0, 1) for table in rotary)  # [B S, R]
    place, where = torch.cat(rows.places), rows.find(asking)
    normed = layer.input_layernorm(x)
    key, value = layer.self_attn.key_value(normed, (cos[place], sin[place]))
    query, gate = layer.self_attn.query(normed[where], (cos[place[where]], sin[place[where]]))
    attended = staircase_attention(
        asking.spread(query), rows.spread(key), rows.spread(value), layout, asking.blocks, dense, asking.chosen
    )
    return layer.finish(x[where], asking.collect(attended), gate)


def _attend(
    query: Tensor, cache: HeadCache, layer: int, length: int, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention of [R, N, D] over the first `length` cached positions -> [R, N, D]."""
    keys, values = cache.keys[None, layer, :, :length], cache.values[None, layer, :, :length]
    heads_first = query.transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(heads_first, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=True)
    return out[0].transpose(0, 1)


class HeadRotary(LlamaRotaryEmbedding):
    """Hugging Face's rotary embedding (all RoPE scalings of the Llama family), float32 in a head of any dtype.

    Eight bits of a frequency turn far positions by whole radians, which no head was trained on.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeadRotary:
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def _rotary_embedding(config: HeadConfig) -> HeadRotary:
    """The rotary embedding of the head's own config: that of a model with one head, as wide as the part that turns."""
    rope = {name: value for name, value in config.rope_parameters.items() if name != "partial_rotary_factor"}
    return HeadRotary(
        LlamaConfig(
            hidden_size=config.rotary_dim,
            num_attention_heads=1,
            head_dim=config.rotary_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=rope,
        )
    )
