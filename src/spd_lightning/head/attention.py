"""Staircase attention, twice: a dense-mask reference that reads like the definition, and a fast twin.

m rows per position under the mask of `StaircaseLayout` would need an (m S)^2 mask: 50 GiB per sample at 32k. The fast
path holds nothing quadratic. With c = `layout.span` >= n, every position at least c back has finished by the time a
row is computed (entry cycles grow by at least 1 per position), so it shows its deepest row:

- near part: positions are cut into tiles of c. The rows of a tile attend to the rows less than c back, which lie in
  their own and in the previous tile, under a small mask that holds everything intricate: depths, restarts, documents;
- far part: every row attends to the deepest rows at least c back, which is PLAIN causal attention;
- the two are merged by log-sum-exp. Backward, each part is its kernel's own backward pass fed with the MERGED output
  and the TOTAL log-sum-exp, which gives exactly that part's share of the gradient (the ring-attention identity).

Inside, rows lie position by position (all blocks of position 0, then those of position 1, ...): a tile is a contiguous
slice, and both parts are views of the same tensors.

Shapes: B batch, m reachable blocks, r query blocks, S positions, N query heads, K key/value heads (G = N / K),
D head_dim, c span, t tiles of c positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spd_lightning.head.layout import StaircaseLayout

aten = torch.ops.aten

#: Positions per far call on a CPU. Its causal kernel skips no block of 512 keys, so each tile is given its own prefix.
FAR_TILE = 64


def staircase_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: StaircaseLayout,
    blocks: Sequence[int],
    dense: bool | None = None,
    asking: Tensor | None = None,
) -> Tensor:
    """Attention of the rows of some blocks over all rows.

    Args:
        query: [B, r, S, N, D], rows of the query blocks.
        key: [B, m, S, K, D].
        value: [B, m, S, K, D].
        layout: who sees whom.
        blocks: which of the m reachable blocks the r query blocks are.
        dense: True: the reference; False: the fast path; None: fast wherever this device and dtype have a kernel.
        asking: [B, S, r] bool: the rows whose output is wanted; what comes out for others means nothing. None: all.

    Returns:
        [B, r, S, N, D].
    """
    if dense is None:
        dense = not has_fast_kernel(query)
    if dense:
        return _dense(query, key, value, layout, blocks)
    by_position = (x.transpose(1, 2) for x in (query, key, value))
    return _StaircaseAttention.apply(*by_position, layout, tuple(blocks), asking).transpose(1, 2)


def has_fast_kernel(query: Tensor) -> bool:
    """Whether torch has a flash kernel that returns the log-sum-exp for this device and dtype."""
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


# -- the fast path -----------------------------------------------------------------------------------------------------


class _StaircaseAttention(torch.autograd.Function):
    """query [B, S, r, N, D], key and value [B, S, m, K, D] -> [B, S, r, N, D]."""

    @staticmethod
    def forward(  # type: ignore[override]  # autograd.Function declares (ctx, *args)
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: StaircaseLayout,
        blocks: tuple[int, ...],
        asking: Tensor | None,
    ) -> Tensor:
        B, S, r, N, D = query.shape
        c, G = layout.span, N // key.shape[3]
        mask = _near_mask(layout, blocks, query.dtype)
        near = _attend(_tiles(query, c), _windows(key, c, G), _windows(value, c, G), mask)
        out, lse = near[0].reshape(B, -1, N, D), near[1].reshape(B, -1, N)
        rows, deep_key, deep_value = query.flatten(1, 2), _deepest(key, G), _deepest(value, G)
        calls = _far_calls(layout, query, asking)
        for call in calls:
            here, seen = call.rows, call.seen
            far, far_lse = call.attend(rows[here], deep_key[seen], deep_value[seen])
            share = torch.sigmoid(far_lse - lse[here])[..., None].to(out.dtype)
            out[here] = torch.lerp(out[here], far, share)
            lse[here] = torch.logaddexp(lse[here], far_lse)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        ctx.span, ctx.calls = c, calls
        return out[:, : S * r].view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # the same
        query, key, value, mask, out, lse = ctx.saved_tensors
        S, r, N = query.shape[1:4]
        c, G = ctx.span, N // key.shape[3]
        tiles = _tiles(query, c)
        near = _attend_backward(
            _tiles(grad, c),
            tiles,
            _windows(key, c, G),
            _windows(value, c, G),
            mask,
            out.view(tiles.shape),
            lse.view(tiles.shape[:-1]),
        )
        grad_query, grad_key, grad_value = near[0].reshape(out.shape), _fold(near[1], key), _fold(near[2], value)
        rows, deep_key, deep_value = query.flatten(1, 2), _deepest(key, G), _deepest(value, G)
        grad_rows = grad.flatten(1, 2)
        grad_deep_key, grad_deep_value = (torch.zeros_like(x, dtype=lse.dtype) for x in (deep_key, deep_value))
        for call in ctx.calls:
            here, seen = call.rows, call.seen
            asked = rows[here], deep_key[seen], deep_value[seen]
            dq, dk, dv = call.backward(grad_rows[here], *asked, out[here], lse[here])
            grad_query[here] += dq
            grad_deep_key[seen] += dk
            grad_deep_value[seen] += dv
        grad_key[:, :, -1] += _sum_groups(grad_deep_key, G)
        grad_value[:, :, -1] += _sum_groups(grad_deep_value, G)
        return grad_query[:, : S * r].view(query.shape), grad_key, grad_value, None, None, None


def _tiles(x: Tensor, c: int) -> Tensor:
    """[B, S, r, N, D] -> [B t, c r, N, D], padded on the right."""
    return F.pad(x, (0,) * 7 + (-x.shape[1] % c,)).reshape(-1, c * x.shape[2], *x.shape[3:])


def _windows(x: Tensor, c: int, G: int) -> Tensor:
    """[B, S, m, K, D] -> [B t, 2 c m, N, D]: for each tile the rows of the tile before it and its own."""
    windows = F.pad(x, (0,) * 6 + (c, -x.shape[1] % c)).unfold(1, 2 * c, c)  # [B, t, m, K, D, 2 c]
    return _repeat(windows.movedim(-1, 2).flatten(2, 3).flatten(0, 1), G)


def _fold(grad: Tensor, x: Tensor) -> Tensor:
    """The adjoint of x -> `_windows(x)`: a row adds up what the two windows that hold it received."""
    B, S, m, K, D = x.shape
    windows = _sum_groups(grad, grad.shape[2] // K).reshape(B, -1, 2, grad.shape[1] // (2 * m), m, K, D)
    before, own = windows[:, :, 0], windows[:, :, 1]
    own[:, :-1] += before[:, 1:]
    return own.flatten(1, 2)[:, :S]


def _near_mask(layout: StaircaseLayout, blocks: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[B t, 1, c r, 2 c m]: 0 where a row of a tile sees a row of its window, else -inf."""
    sees = layout.near_mask[:, :, :, list(blocks)]
    mask = torch.zeros((), dtype=dtype, device=sees.device).masked_fill(~sees, -math.inf)
    return mask.flatten(4, 5).flatten(2, 3).flatten(0, 1)[:, None]


def _deepest(x: Tensor, G: int) -> Tensor:
    """[B, S, m, K, D] -> [B, S, N, D]."""
    return _repeat(x[:, :, -1], G).contiguous()


def _repeat(x: Tensor, G: int) -> Tensor:
    """[..., K, D] -> [..., N, D]: every key/value head once for each query head that shares it."""
    return x if G == 1 else x.repeat_interleave(G, dim=-2)


def _sum_groups(grad: Tensor, G: int) -> Tensor:
    """The adjoint of `_repeat`: [..., N, D] -> [..., K, D]."""
    return grad if G == 1 else grad.unflatten(-2, (-1, G)).sum(-2)


@dataclass
class _FarCall:
    """One kernel call of the far part.

    Attributes:
        rows: sequences, and rows of queries among the S r of each.
        seen: sequences, and positions whose deepest rows are attended to.
        last: [rows], the last of the `seen` positions that each row sees; None: the causal kernel of CUDA.
        state: what that kernel's backward pass asks back.
    """

    rows: tuple[slice, slice | Tensor]
    seen: tuple[slice, slice]
    last: Tensor | None = None
    state: Sequence[Any] = ()

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.last is not None:
            return _attend(query, key, value, self._mask(query))
        out, lse, self.state = _cuda_causal(query, key, value)
        return out, lse

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        if self.last is not None:
            return _attend_backward(grad, query, key, value, self._mask(query), out, lse)
        return _cuda_causal_backward(grad, query, key, value, out, lse, self.state)

    def _mask(self, query: Tensor) -> Tensor:
        """[1, 1, rows, positions]; made anew each time, since the masks of all calls together are quadratic in S."""
        assert self.last is not None
        positions = self.seen[1].stop - self.seen[1].start
        mask = query.new_zeros(1, 1, len(self.last), positions)
        some = int(self.last[0])  # all rows see the positions up to this one
        mask[..., some:].masked_fill_(torch.arange(some, positions) > self.last[:, None], -math.inf)
        return mask


def _far_calls(layout: StaircaseLayout, query: Tensor, asking: Tensor | None) -> list[_FarCall]:
    """CUDA: a causal call per document (or batch). CPU: a masked one per tile, for the rows that ask in it."""
    r, c, calls = query.shape[2], layout.span, []
    tile = query.shape[1] if query.device.type == "cuda" else FAR_TILE
    for batch, where in layout.segments():
        for start in range(where.start + c, where.stop, tile):
            stop = min(start + tile, where.stop)
            seen = (batch, slice(where.start, stop - c))
            if query.device.type == "cuda":
                calls.append(_FarCall((batch, slice(start * r, stop * r)), seen))
                continue
            asked = torch.arange((stop - start) * r)
            if asking is not None:
                asked = asked[asking[batch, start:stop].any(0).flatten()]
            if len(asked):
                calls.append(_FarCall((batch, start * r + asked), seen, last=start - c - where.start + asked // r))
    return calls


# -- kernels: query [b, q, N, D], key and value [b, k, N, D], log-sum-exp [b, q, N] ------------------------------------


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention under an additive mask [b, 1, q, k]: output and log-sum-exp."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    else:
        scores = _scores(q, k, mask)
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp().to(v.dtype) @ v
    return out.transpose(1, 2), lse.transpose(1, 2)


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, for an output and a log-sum-exp that may cover more keys than these."""
    g, q, k, v, o, total = (x.transpose(1, 2) for x in (grad, query, key, value, out, lse))
    if query.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, total.contiguous(), 0.0, False, attn_mask=mask
        )
    else:
        weights = (_scores(q, k, mask) - total[..., None]).exp()
        agreement = (g @ v.mT).to(weights.dtype) - (g * o).sum(-1, keepdim=True, dtype=weights.dtype)
        score_grad = (weights * agreement * q.shape[-1] ** -0.5).to(q.dtype)
        grads = (score_grad @ k, score_grad.mT @ q, weights.to(g.dtype).mT @ g)
    return tuple(x.transpose(1, 2) for x in grads)


def _scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """[b, N, q, k], in float32 or better."""
    kind = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        return q.to(kind) @ k.to(kind).mT * q.shape[-1] ** -0.5 + mask


def _cuda_causal(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Sequence[Any]]:
    """Causal flash attention of r rows per position: query [b, T r, N, D], key and value [b, T, N, D].

    The r rows of a position become r times as many heads. NOT YET EXERCISED: no GPU has run this.
    """
    q, k, v = _rows_as_heads(query, key, value)
    out, lse, *state = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
    return out.transpose(1, 2).reshape(query.shape), lse.transpose(1, 2).reshape(query.shape[:-1]), state[:6]


def _cuda_causal_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, state: Sequence[Any]
) -> tuple[Tensor, ...]:
    """Its gradients, given the merged output and the total log-sum-exp. NOT YET EXERCISED: no GPU has run this."""
    q, k, v = _rows_as_heads(query, key, value)
    g, o = (_rows_as_heads(x, key, value)[0] for x in (grad, out))
    total = lse.reshape(q.shape[0], q.shape[2], q.shape[1]).transpose(1, 2).contiguous()
    cum_q, cum_k, max_q, max_k, seed, offset = state
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        g, q, k, v, o, total, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset
    )
    dk, dv = (x.transpose(1, 2).unflatten(2, (-1, key.shape[2])).sum(2) for x in (dk, dv))
    return dq.transpose(1, 2).reshape(query.shape), dk, dv


def _rows_as_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[b, T r, N, D] and twice [b, T, N, D] -> three times [b, r N, T, D]."""
    b, T, N, D = key.shape
    r = query.shape[1] // T
    q = query.reshape(b, T, r * N, D)
    k, v = (x.repeat(1, 1, r, 1) for x in (key, value))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
