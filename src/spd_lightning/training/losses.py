"""KL to the target on the draft vocabulary, twice: a readable form, and a chunked twin that keeps no logits.

At a supervised position t the loss is KL(P_t restricted to the draft vocabulary and renormalised || Q_t), with P_t the
frozen target's distribution from the same forward pass and Q_t the head's. It makes Q cover P wherever P has mass; it
is not the acceptance itself (that is 1 - TV at temperature 1), which the metrics report beside it.

Positions whose target argmax lies OUTSIDE the draft vocabulary stay in the loss: what P puts inside still teaches
sampled acceptance. In the metrics they are certain rejections at temperature 0 (`miss`).

The chunked twin computes the gradient of a chunk while its logits exist, and keeps [P, H] and [V_d, H] only: neither
a float32 [P, V] copy of the whole batch nor logits at unlabelled positions ever arise.

Shapes: P supervised positions of a batch, H hidden, V vocabulary, V_d draft vocabulary, n stages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: On a CPU, elements of a chunk's logits: 1 MiB of float32, which fits its caches. Without this cap the loss took
#: 1.7 times as long (V = 4096, 512 positions at once).
CPU_CHUNK_LOGITS = 2**18

#: Columns of a statistics table; all but `count` are sums over positions.
COLUMNS = ("count", "top1", "hit2", "hit4", "alpha", "miss", "kl")


def draft_kl(draft_logits: Tensor, target_logits: Tensor, draft_ids: Tensor | None) -> Tensor:
    """The definition, per position: [P, V_d], [P, V] -> [P], in float32 or better."""
    restricted = target_logits if draft_ids is None else target_logits[:, draft_ids]
    log_p, log_q = _wide(restricted).log_softmax(-1), _wide(draft_logits).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def chunked_draft_kl(
    hidden: Tensor,
    lm_head: Tensor,
    target_hidden: Tensor,
    target_logits: Callable[[Tensor], Tensor],
    draft_ids: Tensor | None,
    fills: Tensor,
    num_stages: int,
    chunk: int = 1024,
    statistics: bool = True,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of `draft_kl` over all positions, a chunk at a time.

    Args:
        hidden: [P, H], the head's output after the final norm; receives gradient.
        lm_head: [V_d, H], the head's own lm_head; receives gradient.
        target_hidden: [P, H], the target's last-layer output (pre-norm).
        target_logits: the target's norm and lm_head, [C, H] -> [C, V].
        draft_ids: [V_d] ids of the draft vocabulary; None: all V.
        fills: [P] tokens in flight, 1..n.
        num_stages: n.
        chunk: C, positions whose logits exist at a time, at most (fewer on a CPU, see `CPU_CHUNK_LOGITS`).
        statistics: also fill the statistics table (sorting costs time, so training asks for it now and then).
        softcap: c, where draft logits are c tanh(logits / c).

    Returns:
        The summed loss (scalar, differentiable), and statistics [n + 1, len(COLUMNS)] in float64, one row per fill;
        only `count` and `kl` are filled without `statistics`.
    """
    table = torch.zeros(num_stages + 1, len(COLUMNS), dtype=torch.float64, device=hidden.device)
    loss = _ChunkedKL.apply(
        hidden, lm_head, target_hidden, target_logits, draft_ids, fills, chunk, table, statistics, softcap
    )
    return loss, table


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        lm_head: Tensor,
        target_hidden: Tensor,
        target_logits: Callable[[Tensor], Tensor],
        draft_ids: Tensor | None,
        fills: Tensor,
        chunk: int,
        table: Tensor,
        statistics: bool,
        softcap: float | None,
    ) -> Tensor:
        kind = hidden.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        weight = lm_head.to(compute)
        needs_gradient = hidden.requires_grad or lm_head.requires_grad
        grad_hidden = torch.zeros_like(hidden) if needs_gradient else None
        grad_weight = torch.zeros_like(lm_head) if needs_gradient else None
        if kind == "cpu":
            chunk = min(chunk, max(32, CPU_CHUNK_LOGITS // len(lm_head)))
        total = table.new_zeros(())
        with torch.autocast(kind, enabled=False):
            for start in range(0, hidden.shape[0], chunk):
                here = slice(start, start + chunk)
                x = hidden[here].to(compute)
                teacher = _wide(target_logits(target_hidden[here]))
                logits = _wide(x @ weight.T)
                squeezed = None
                if softcap is not None:
                    squeezed = torch.tanh(logits / softcap)
                    logits = softcap * squeezed
                log_q = logits.log_softmax(-1)
                log_p = (teacher if draft_ids is None else teacher[:, draft_ids]).log_softmax(-1)
                p = log_p.exp()
                kl = log_p.sub_(log_q).mul_(p).sum(-1)
                total += kl.sum()
                _tabulate(table, fills[here], kl, log_q, teacher, draft_ids, statistics)
                if grad_hidden is not None and grad_weight is not None:
                    grad = log_q.exp_().sub_(p)
                    if squeezed is not None:
                        grad *= 1 - squeezed**2
                    grad = grad.to(compute)
                    grad_hidden[here] = grad @ weight
                    grad_weight += (grad.T @ x).to(grad_weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = upstream.to(grad_hidden.dtype)
        return grad_hidden * scale, grad_weight * scale.to(grad_weight.dtype), *([None] * 8)


@torch.no_grad()
def _tabulate(
    table: Tensor,
    fills: Tensor,
    kl: Tensor,
    log_q: Tensor,
    teacher: Tensor,
    draft_ids: Tensor | None,
    statistics: bool,
) -> None:
    """Add a chunk to the statistics: P over the FULL vocabulary, Q = 0 outside the draft vocabulary."""
    columns = {"count": torch.ones_like(kl), "kl": kl}
    if statistics:
        wanted = teacher.argmax(-1)
        best = log_q.topk(min(4, log_q.shape[-1]), dim=-1).indices
        proposals = best if draft_ids is None else draft_ids[best]
        hits = proposals == wanted[:, None]
        p = teacher.softmax(-1)
        p = p if draft_ids is None else p[:, draft_ids]
        outside = torch.zeros_like(hits[:, 0]) if draft_ids is None else ~torch.isin(wanted, draft_ids)
        columns |= {
            "top1": hits[:, 0],
            "hit2": hits[:, :2].any(-1),
            "hit4": hits.any(-1),
            "alpha": torch.minimum(p, log_q.exp()).sum(-1),
            "miss": outside,
        }
    values = torch.stack([columns.get(name, torch.zeros_like(kl)).to(table.dtype) for name in COLUMNS], dim=-1)
    table.index_add_(0, fills, values)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
