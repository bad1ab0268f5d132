"""Staircase attention, twice: a dense-mask reference that reads like the definition, and a fast twin.

m rows per position under the mask of `StaircaseLayout` would need an (m S)^2 mask: 50 GiB per sample at 32k. The fast
path holds nothing quadratic. With w = n - d_min of the query's block, every position at least w back has finished by
the time the row is computed (entry cycles grow by at least 1 per position), so it shows its deepest row:

- far part: queries shifted left by w attend to the deepest rows under a PLAIN causal mask: one flash call per block;
- near part: at most w <= n scores per query, one position each, against the row that position shows;
- both are merged by log-sum-exp. The backward pass of the far part is the flash backward kernel fed with the MERGED
  output and the TOTAL log-sum-exp, which gives exactly the far share of the gradient (the ring-attention identity).

Shapes: B batch, m reachable blocks, r query blocks, S positions, N query heads, K key/value heads (G = N / K), D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spd_lightning.head.layout import StaircaseLayout

aten = torch.ops.aten


def staircase_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: StaircaseLayout, blocks: Sequence[int], dense: bool | None = None
) -> Tensor:
    """Attention of the rows of some blocks over all rows.

    Args:
        query: [B, r, S, N, D], rows of the query blocks.
        key: [B, m, S, K, D].
        value: [B, m, S, K, D].
        layout: who sees whom.
        blocks: which of the m reachable blocks the r query blocks are.
        dense: True: the reference; False: the fast path; None: fast wherever this device and dtype have a kernel.

    Returns:
        [B, r, S, N, D].
    """
    if dense is None:
        dense = not has_fast_kernel(query)
    if dense:
        return _dense(query, key, value, layout, blocks)
    if layout.documents is None:
        return _StaircaseAttention.apply(query, key, value, layout, tuple(blocks))
    result = torch.empty_like(query)
    for index, where, own in layout.document_layouts():
        here = (slice(index, index + 1), slice(None), where)
        result[here] = _StaircaseAttention.apply(query[here], key[here], value[here], own, tuple(blocks))
    return result


def has_fast_kernel(query: Tensor) -> bool:
    """Whether torch has a causal flash kernel that returns the log-sum-exp for this device and dtype."""
    if query.device.type == "cpu":
        return query.dtype in (torch.float32, torch.float64, torch.bfloat16)
    if query.device.type == "cuda":
        return query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return False


def _dense(query: Tensor, key: Tensor, value: Tensor, layout: StaircaseLayout, blocks: Sequence[int]) -> Tensor:
    B, r, S, N, D = query.shape
    m, K = key.shape[1], key.shape[3]
    mask = layout.dense_mask().view(-1, m, S, m * S)[:, list(blocks)].reshape(-1, 1, r * S, m * S)

    def heads_first(x: Tensor) -> Tensor:
        return x.reshape(B, -1, x.shape[3], D).transpose(1, 2)

    keys, values = (heads_first(x).repeat_interleave(N // K, dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(heads_first(query), keys, values, attn_mask=mask)
    return out.transpose(1, 2).reshape(B, r, S, N, D)


# -- the fast path ---------------------------------------------------------------------------------------------------


class _StaircaseAttention(torch.autograd.Function):
    """The fast path for one document per row. Near scores are float32 whatever the dtype; accumulation follows."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: StaircaseLayout, blocks: tuple[int, ...]
    ) -> Tensor:
        B, _, S, N, D = query.shape
        K = key.shape[3]
        deep_key, deep_value = (_deepest(x, N // K) for x in (key, value))
        rows_key, rows_value = (x.reshape(-1, K, 1, D) for x in (key, value))
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        total = query.new_empty(B, len(blocks), S, N, dtype=_accumulation(query))
        near_weights, kernel_states = [], []
        for r, block in enumerate(blocks):
            w = min(layout.staircase.windows[block], S)
            scores = _near_scores(query[:, r], rows_key, layout, block, w)
            far, far_lse = None, scores.new_full((B, S, N), -math.inf)
            states: tuple[Any, ...] = ()
            if w < S:
                far, lse, states = _causal(query[:, r, w:], deep_key[:, : S - w], deep_value[:, : S - w])
                far_lse[:, w:] = lse.transpose(1, 2)
            lse = torch.logaddexp(far_lse, scores.logsumexp(-1)) if w else far_lse
            weights = torch.exp(scores - lse[..., None])
            merged = query.new_zeros(B, S, K, N // K, D, dtype=lse.dtype)
            if far is not None:
                share = torch.exp(far_lse - lse)[:, w:, :, None]
                merged[:, w:] = (share * far).view(B, S - w, K, N // K, D)
            for d in range(w):
                shown = rows_value.index_select(0, _shown_rows(layout, block, d))
                merged[:, d:] += weights[:, d:, :, d].reshape(B, S - d, K, -1, 1) * shown.view(B, S - d, K, 1, D)
            out[:, r] = merged.view(B, S, N, D)
            total[:, r] = lse
            near_weights.append(weights)
            kernel_states.append(states)
        ctx.save_for_backward(query, key, value, out, total, *near_weights)
        ctx.layout, ctx.blocks, ctx.kernel_states = layout, blocks, kernel_states
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, total, *near_weights = ctx.saved_tensors
        layout, blocks = ctx.layout, ctx.blocks
        B, _, S, N, D = query.shape
        K, G, scale = key.shape[3], N // key.shape[3], D**-0.5
        deep_key, deep_value = (_deepest(x, G) for x in (key, value))
        rows_key, rows_value = (x.reshape(-1, K, 1, D) for x in (key, value))
        kind = total.dtype
        grad_query = torch.zeros_like(query, dtype=kind)
        grad_key, grad_value = (
            torch.zeros_like(x, dtype=kind, memory_format=torch.contiguous_format) for x in (key, value)
        )
        grad_rows_key, grad_rows_value = (x.view(-1, K, D) for x in (grad_key, grad_value))
        delta = (grad.to(kind) * out.to(kind)).sum(-1)  # [B, r, S, N]
        for r, block in enumerate(blocks):
            w = min(layout.staircase.windows[block], S)
            if w < S:
                dq, dk, dv = _causal_backward(
                    grad[:, r, w:],
                    query[:, r, w:],
                    deep_key[:, : S - w],
                    deep_value[:, : S - w],
                    out[:, r, w:],
                    total[:, r, w:],
                    ctx.kernel_states[r],
                )
                grad_query[:, r, w:] += dq
                grad_key[:, -1, : S - w] += dk.reshape(B, S - w, K, G, D).sum(3)
                grad_value[:, -1, : S - w] += dv.reshape(B, S - w, K, G, D).sum(3)
            for d in range(w):
                rows = _shown_rows(layout, block, d)
                weights = near_weights[r][:, d:, :, d].reshape(-1, K, G, 1)
                grad_here = grad[:, r, d:].to(kind).reshape(-1, K, G, D)
                query_here = query[:, r, d:].to(kind).reshape(-1, K, G, D)
                agreement = (grad_here * rows_value.index_select(0, rows)).sum(-1, keepdim=True)
                score_grad = weights * (agreement - delta[:, r, d:].reshape(-1, K, G, 1)) * scale
                grad_query[:, r, d:] += (score_grad * rows_key.index_select(0, rows)).view(B, S - d, N, D)
                # T -> (row, T - d) is injective for a fixed distance, so no row occurs twice and += is safe
                grad_rows_key[rows] += (score_grad * query_here).sum(2)
                grad_rows_value[rows] += (weights * grad_here).sum(2)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _deepest(x: Tensor, groups: int) -> Tensor:
    """[B, S, N, D]: the deepest block's keys or values, repeated for the query heads that share them."""
    return x[:, -1] if groups == 1 else x[:, -1].repeat_interleave(groups, dim=2)


def _shown_rows(layout: StaircaseLayout, block: int, distance: int) -> Tensor:
    """[B (S - distance)] index into the B m S flattened rows: what each T - distance shows to row (block, T)."""
    B, S, m = layout.batch_size, layout.length, len(layout.staircase.reachable_blocks)
    device = layout.entries.device
    batch = torch.arange(B, device=device)[:, None] * m
    return ((batch + layout.shown_at(block, distance)) * S + torch.arange(S - distance, device=device)).flatten()


def _near_scores(query: Tensor, rows_key: Tensor, layout: StaircaseLayout, block: int, w: int) -> Tensor:
    """[B, S, N, w]: scaled scores against the positions 0..w-1 back; -inf where the document has not begun yet."""
    B, S, N, D = query.shape
    K = rows_key.shape[1]
    kind = _accumulation(query)
    scores = query.new_full((B, S, N, w), -math.inf, dtype=kind)
    scaled = query.to(kind).reshape(B, S, K, N // K, D) * D**-0.5
    for d in range(w):
        shown = rows_key.index_select(0, _shown_rows(layout, block, d)).view(B, S - d, K, 1, D)
        scores[:, d:, :, d] = (scaled[:, d:] * shown).sum(-1).view(B, S - d, N)
    return scores


def _causal(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Plain causal flash attention of [B, S, N, D]: output [B, S, N, D], log-sum-exp [B, N, S], state for backward."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        return out.transpose(1, 2), lse, ()
    out, lse, *states = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
    return out.transpose(1, 2), lse, tuple(states[:6])


def _causal_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, total: Tensor, states: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Flash backward with the merged output and the total log-sum-exp [B, S, N]: the far share of each gradient."""
    g, q, k, v, o = (x.transpose(1, 2) for x in (grad, query, key, value, out))
    lse = total.transpose(1, 2).contiguous()
    if query.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, o, lse, 0.0, True)
    else:
        cum_q, cum_k, max_q, max_k, seed, offset = states
        grads = aten._scaled_dot_product_flash_attention_backward(
            g, q, k, v, o, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset
        )
    return tuple(x.transpose(1, 2) for x in grads)  # type: ignore[return-value]
