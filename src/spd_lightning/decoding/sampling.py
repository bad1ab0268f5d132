"""From logits to tokens: the law that temperature, top-k and top-p define, draws from it, and verification.

Every draw takes its uniform number from outside (`spd_lightning.randomness`), so engines agree on it.
Probabilities are float64: 1e5 summands lose no digit that a chi-square test could see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spd_lightning.errors import InputError
from spd_lightning.randomness import gumbel


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the same warping applies to the target's and to the head's logits.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: then keep the fewest tokens whose probabilities sum to at least top_p; 1 keeps all.
        seed: of the counter-based draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    #: Whether the target's own tokens are drawn with the noise of their position, see `scores`.
    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise InputError(f"temperature={self.temperature}: expected a finite number >= 0 (0 is greedy).")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k}: expected an integer >= 0 (0 keeps all tokens).")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: expected a number in (0, 1] (1 keeps all tokens).")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def law(self, logits: Tensor) -> Tensor:
        """Probabilities [V], float64 on the CPU, of one token's logits [V]."""
        exact = logits.detach().double().cpu()
        if not torch.isfinite(exact.max()):
            raise InputError("the logits are not finite: the weights of the target or the head are damaged.")
        scaled = (exact - exact.max()) / self.temperature  # at most 0, so no temperature overflows
        if 0 < self.top_k < scaled.numel():
            kept = torch.full_like(scaled, -torch.inf)
            values, indices = scaled.topk(self.top_k)
            scaled = kept.scatter_(0, indices, values)
        law = scaled.softmax(-1)
        if self.top_p < 1:
            ordered, indices = law.sort(descending=True, stable=True)
            before = ordered.cumsum(0) - ordered
            ordered[before >= self.top_p] = 0
            law = torch.zeros_like(law).scatter_(0, indices, ordered)
            law /= law.sum()
        return law

    def scores(self, logits: Tensor, position: int, ids: Tensor | None = None) -> Tensor:
        """[V], float64, of logits [V]; the best is the choice for a position. On the CPU, but for greedy choices.

        Greedy: the logits themselves. Else the law's logarithm plus the Gumbel noise of the position, whose best is an
        exact draw from the law. Target and drafts share that noise, so they agree more often than two draws would,
        and the target's choice does not depend on any draft (drafter-invariant speculative decoding, 2408.07978).

        Args:
            ids: [V] target ids of these logits; None: all of them in order.
        """
        if self.greedy:
            return logits.detach().double()
        size = logits.numel() if ids is None else int(ids.max()) + 1
        noise = torch.from_numpy(gumbel(self.seed, position, size))
        return self.law(logits).log() + (noise if ids is None else noise[ids.cpu()])


@dataclass(frozen=True)
class CoupledSampling(Sampling):
    """The same laws, drawn with noise that drafts know: what a draft tree samples by."""

    coupled: ClassVar[bool] = True


def draw(law: Tensor, uniform: float) -> int:
    """The token whose interval of the cumulative law [V] holds `uniform` in [0, 1). The law need not be normalised."""
    cumulative = law.cumsum(0)
    index = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    # rounding can put the number past the last token that has any probability
    return index if index < law.numel() and law[index] > 0 else int(law.nonzero()[-1])


def verify(token: int, target: Tensor, draft: Tensor, draft_ids: Tensor | None, coin: float, uniform: float) -> int:
    """Speculative sampling's verdict (method: Leviathan et al. 2023): returns `token` if kept, else the correction.

    Args:
        token: the draft, an id of the target's vocabulary, drawn from `draft`.
        target: P [V].
        draft: Q [V_d], the exact law of the draft.
        draft_ids: [V_d] target ids of the draft vocabulary; None if V_d = V.
        coin: uniform number of the accept decision.
        uniform: uniform number of the correction.

    Returns:
        A token distributed exactly by P. Equality with `token` means accepted: the correction never equals it, because
        a rejection implies P(token) < Q(token).
    """
    full = draft if draft_ids is None else torch.zeros_like(target).scatter_(0, draft_ids.cpu(), draft)
    if coin * float(full[token]) < float(target[token]):
        return token
    residual = (target - full).clamp_(min=0)
    return draw(residual if residual.sum() > 0 else target, uniform)
