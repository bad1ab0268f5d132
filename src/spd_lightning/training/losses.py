"""What a head is trained to minimise, twice: readable forms, and a fused chunked twin that keeps no logits.

At a supervised position t, P_t is the frozen target's distribution from the same forward pass, Q_t the head's over the
draft vocabulary D, and p_t is P_t restricted to D and renormalised. `Loss` weighs these terms:

- `kl`: KL(p || Q). Makes Q cover p wherever p has mass; not the acceptance itself.
- `reverse_kl`: KL(Q || p). Makes Q stay where p has mass; forgives what it leaves out.
- `ce`: -log Q of the target's most probable token, what greedy decoding asks for. 0 where that token is outside D.
- `tv`: 1 - alpha, with alpha = sum min(P, Q) the acceptance at temperature 1 (Leviathan et al., 2211.17192). P is not
  renormalised here: mass outside D is lost, whatever the head does. Hardly any gradient where P and Q do not overlap.
- `lk`: -log alpha (LK losses, 2602.23881): tv's gradient divided by alpha, so it is strong where acceptance is poor.
- `lk_hybrid`: lambda kl + (1 - lambda) tv with lambda = exp(-lk_decay alpha) per position, which no gradient passes:
  kl while P and Q are apart, tv as they meet (2602.23881; there with alpha averaged over a batch).

Beside these terms, which compare laws, stands one that compares what laws are made from:

- `hidden`: |x - y|^2 / |y|^2, x and y the hidden states that the head's and the target's lm_head read (feature
  regression, as in EAGLE, 2401.15077). A law says of y only what a next token depends on, most of all on the likely
  ones; y says all of it, so a head learns more from as much text.

Positions whose target argmax lies OUTSIDE the draft vocabulary stay in the loss unless `misses` is false: what P puts
inside still teaches sampled acceptance. In the metrics they are certain rejections at temperature 0 (`miss`).

The chunked twin computes the gradient of a chunk while its logits exist, and keeps [P, H] and [V_d, H] only: neither
a float32 [P, V] copy of the whole batch nor logits at unlabelled positions ever arise.

Shapes: P supervised positions of a batch, H hidden, V vocabulary, V_d draft vocabulary, n stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spd_lightning.errors import InputError

#: On a CPU, elements of a chunk's logits: 1 MiB of float32, which fits its caches. Without this cap the loss took
#: 1.7 times as long (V = 4096, 512 positions at once).
CPU_CHUNK_LOGITS = 2**18

#: Where P and Q share nothing in float32, alpha counts as this: -log alpha stays finite.
_LEAST = 1e-30

#: Columns of a statistics table; all but `count` are sums over positions.
COLUMNS = ("count", "top1", "hit2", "hit4", "alpha", "miss", "kl", "loss")


@dataclass(frozen=True)
class Loss:
    """What is minimised: a weighted sum of terms.

    Args:
        kl: weight of KL(P || Q) on the draft vocabulary.
        reverse_kl: weight of KL(Q || P).
        ce: weight of the cross-entropy with the target's most probable token.
        tv: weight of 1 - alpha, alpha the acceptance at temperature 1.
        lk: weight of -log alpha.
        lk_hybrid: weight of a mix that goes from kl to 1 - alpha as alpha grows.
        hidden: weight of the squared distance between the head's and the target's last hidden state, over the latter's
            square; at every supervised position, also where `misses` leaves the others out.
        lk_decay: how fast: kl's share of that mix is exp(-lk_decay x alpha).
        deeper_rows: weight of the same loss on the rows of deeper blocks, which draft the same token once more from
            more of the target; 0: only the rows that really draft are trained.
        misses: whether positions whose most probable token is outside the draft vocabulary stay in the loss.
    """

    kl: float = 1.0
    reverse_kl: float = 0.0
    ce: float = 0.0
    tv: float = 0.0
    lk: float = 0.0
    lk_hybrid: float = 0.0
    hidden: float = 0.0
    lk_decay: float = 3.0
    deeper_rows: float = 0.0
    misses: bool = True

    def __post_init__(self) -> None:
        for name in (*TERMS, "hidden", "lk_decay", "deeper_rows"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"model.loss.{name}={value}: expected a number of at least 0.")
        if not any(getattr(self, name) for name in TERMS):
            raise InputError(f"model.loss: expected a weight above 0 for one of {', '.join(TERMS)}.")


#: The terms that compare laws; one of them must have a weight, for `hidden` alone teaches the lm_head nothing.
TERMS = ("kl", "reverse_kl", "ce", "tv", "lk", "lk_hybrid")


class Verdicts:
    """What became of drafts at temperature 1, given the tokens that came: `kept` [P], min(1, Q(x) / P(x)).

    Speculative sampling emits x as an accepted draft with probability min(P, Q)(x) and as a correction with the rest of
    P(x) (Leviathan et al., 2211.17192), so a token x came after a flush with probability 1 - kept.

    Args:
        columns: [P], the tokens that came, as columns of the draft's logits; -1 where the draft vocabulary lacks one.
        tokens: [P], their ids.
    """

    def __init__(self, columns: Tensor, tokens: Tensor) -> None:
        self.columns, self.tokens = columns, tokens
        self.kept = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)

    def fill(self, here: slice, log_q: Tensor, teacher: Tensor) -> None:
        """Positions `here`, from [C, V_d] log Q and the target's [C, V] logits."""
        columns = self.columns[here]
        log_p = teacher.log_softmax(-1).gather(-1, self.tokens[here, None])[:, 0]
        ratio = (log_q.gather(-1, columns.clamp(min=0)[:, None])[:, 0] - log_p).exp().clamp(max=1)
        self.kept[here] = torch.where(columns >= 0, ratio, 0.0).float()


def draft_kl(draft_logits: Tensor, target_logits: Tensor, draft_ids: Tensor | None) -> Tensor:
    """KL(p || Q) per position: [P, V_d], [P, V] -> [P], in float32 or better."""
    return draft_terms(draft_logits, target_logits, draft_ids)["kl"]


def draft_terms(
    draft_logits: Tensor, target_logits: Tensor, draft_ids: Tensor | None, lk_decay: float = 3.0
) -> dict[str, Tensor]:
    """The definition of every term, per position: [P, V_d], [P, V] -> [P] each, in float32 or better."""
    teacher, log_q = _wide(target_logits), _wide(draft_logits).log_softmax(-1)
    restricted = teacher if draft_ids is None else teacher[:, draft_ids]
    log_p, q = restricted.log_softmax(-1), log_q.exp()
    P = teacher.softmax(-1)
    P = P if draft_ids is None else P[:, draft_ids]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    alpha = torch.minimum(P, q).sum(-1).clamp(min=_LEAST)
    share = torch.exp(-lk_decay * alpha.detach())
    best = restricted.argmax(-1, keepdim=True)
    inside = restricted.amax(-1) >= teacher.amax(-1)
    return {
        "kl": kl,
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "ce": -log_q.gather(-1, best)[:, 0] * inside,
        "tv": 1 - alpha,
        "lk": -alpha.log(),
        "lk_hybrid": share * kl + (1 - share) * (1 - alpha),
    }


def draft_loss(draft_logits: Tensor, target_logits: Tensor, draft_ids: Tensor | None, loss: Loss) -> Tensor:
    """The definition of a loss, per position: [P, V_d], [P, V] -> [P]."""
    terms = draft_terms(draft_logits, target_logits, draft_ids, loss.lk_decay)
    total = sum(getattr(loss, name) * terms[name] for name in TERMS if getattr(loss, name))
    assert isinstance(total, Tensor)
    if not loss.misses and draft_ids is not None:
        total = total * torch.isin(target_logits.argmax(-1), draft_ids)
    return total


def hidden_distance(hidden: Tensor, target_hidden: Tensor) -> Tensor:
    """The definition of `hidden`, per position: [P, H], [P, H] -> [P], in float32 or better."""
    wanted = _wide(target_hidden)
    return (_wide(hidden) - wanted).square().sum(-1) / _square(wanted)[:, 0]


def chunked_draft_loss(
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
    options: Loss = Loss(),  # noqa: B008 (frozen)
    verdicts: Verdicts | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of `draft_loss` and of `hidden_distance` by its weight over all positions, a chunk at a time.

    Args:
        hidden: [P, H], the head's output after the final norm; receives gradient.
        lm_head: [V_d, H], the head's own lm_head; receives gradient.
        target_hidden: [P, H], the target's last-layer output after its norm.
        target_logits: the target's lm_head, [C, H] -> [C, V].
        draft_ids: [V_d] ids of the draft vocabulary; None: all V.
        fills: [P] tokens in flight, 1..n.
        num_stages: n.
        chunk: C, positions whose logits exist at a time, at most (fewer on a CPU, see `CPU_CHUNK_LOGITS`).
        statistics: also fill the statistics table (sorting costs time, so training asks for it now and then).
        softcap: c, where draft logits are c tanh(logits / c).
        options: what is minimised.
        verdicts: asks for the chances of the tokens that came to have been drafted.

    Returns:
        The summed loss (scalar, differentiable), and statistics [n + 1, len(COLUMNS)] in float64, one row per fill;
        only `count`, `kl` and `loss` are filled without `statistics`.
    """
    table = torch.zeros(num_stages + 1, len(COLUMNS), dtype=torch.float64, device=hidden.device)
    loss = _ChunkedLoss.apply(
        hidden, lm_head, target_hidden, target_logits, draft_ids, fills, chunk, table, statistics, softcap, options,
        verdicts,
    )  # fmt: skip
    return loss, table


class _ChunkedLoss(torch.autograd.Function):
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
        options: Loss,
        verdicts: Verdicts | None,
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
                kl, value, grad = _value_and_gradient(log_q, teacher, draft_ids, options, grad_hidden is not None)
                pull = None
                if options.hidden:
                    wanted = _wide(target_hidden[here])
                    apart, size = _wide(hidden[here]) - wanted, _square(wanted)
                    value += options.hidden * (_square(apart) / size)[:, 0]
                    pull = 2 * options.hidden * apart / size
                total += value.sum()
                if verdicts is not None:
                    verdicts.fill(here, log_q, teacher)
                _tabulate(table, fills[here], {"kl": kl, "loss": value}, log_q, teacher, draft_ids, statistics)
                if grad is not None and grad_hidden is not None and grad_weight is not None:
                    if squeezed is not None:
                        grad *= 1 - squeezed**2
                    grad = grad.to(compute)
                    grad_hidden[here] = grad @ weight
                    if pull is not None:
                        grad_hidden[here] += pull.to(grad_hidden.dtype)
                    grad_weight += (grad.T @ x).to(grad_weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = upstream.to(grad_hidden.dtype)
        return grad_hidden * scale, grad_weight * scale.to(grad_weight.dtype), *([None] * 10)


def _value_and_gradient(
    log_q: Tensor, teacher: Tensor, draft_ids: Tensor | None, options: Loss, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """KL [C], loss [C] and its gradient [C, V_d] by the draft logits, in closed form.

    With z the draft logits and Q = softmax(z), the derivatives of the terms by z are

        kl          Q - p                                reverse_kl   Q (log Q - log p - reverse_kl)
        ce          Q - [the best token]                 tv           Q (sum of Q where Q < P - [Q < P])
        lk          tv's / alpha                         lk_hybrid    lambda kl's + (1 - lambda) tv's
    """
    restricted = teacher if draft_ids is None else teacher[:, draft_ids]
    log_p = restricted.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    apart = log_p - log_q
    kl = (apart * p).sum(-1)
    value = options.kl * kl
    to_kl = kl.new_full(kl.shape, options.kl)  # what multiplies the gradients of kl and of 1 - alpha
    to_tv = kl.new_full(kl.shape, options.tv)
    P = None
    if options.tv or options.lk or options.lk_hybrid:
        P = p if draft_ids is None else teacher.softmax(-1)[:, draft_ids]
        alpha = torch.minimum(P, q).sum(-1).clamp(min=_LEAST)
        share = torch.exp(-options.lk_decay * alpha)
        value += options.tv * (1 - alpha) - options.lk * alpha.log()
        value += options.lk_hybrid * (share * kl + (1 - share) * (1 - alpha))
        to_kl += options.lk_hybrid * share
        to_tv += options.lk_hybrid * (1 - share) + options.lk / alpha
    grad = (q - p).mul_(to_kl[:, None]) if gradient else None
    if grad is not None and P is not None:
        short = q < P
        kept = torch.where(short, q, 0.0).sum(-1, keepdim=True)
        grad += to_tv[:, None] * q * (kept - short.to(q.dtype))
    if options.reverse_kl:
        reverse = -(q * apart).sum(-1)
        value += options.reverse_kl * reverse
        if grad is not None:
            grad -= options.reverse_kl * q * (apart + reverse[:, None])
    if options.ce:
        best = restricted.argmax(-1, keepdim=True)
        weight = options.ce * (restricted.amax(-1) >= teacher.amax(-1)).to(q.dtype)
        value -= weight * log_q.gather(-1, best)[:, 0]
        if grad is not None:
            grad += weight[:, None] * q
            grad.scatter_add_(-1, best, -weight[:, None])
    if not options.misses and draft_ids is not None:
        stays = torch.isin(teacher.argmax(-1), draft_ids).to(q.dtype)
        value *= stays
        grad = None if grad is None else grad * stays[:, None]
    return kl, value, grad


@torch.no_grad()
def _tabulate(
    table: Tensor,
    fills: Tensor,
    losses: dict[str, Tensor],
    log_q: Tensor,
    teacher: Tensor,
    draft_ids: Tensor | None,
    statistics: bool,
) -> None:
    """Add a chunk to the statistics: P over the FULL vocabulary, Q = 0 outside the draft vocabulary."""
    kl = losses["kl"]
    columns = {"count": torch.ones_like(kl), **losses}
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


def _square(x: Tensor) -> Tensor:
    """|x|^2 of each row, kept from 0: [P, H] -> [P, 1]."""
    return x.square().sum(-1, keepdim=True).clamp(min=_LEAST)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
