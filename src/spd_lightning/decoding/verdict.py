"""The target's word on every token: kept drafts, corrections, and tokens of its own. One rule for all engines."""

from __future__ import annotations

from torch import Tensor

from spd_lightning.decoding.drafters import Draft
from spd_lightning.decoding.sampling import Sampling, draw, verify
from spd_lightning.errors import InputError
from spd_lightning.randomness import Purpose, uniform
from spd_lightning.target.target import Target


class Verdicts:
    """From last-layer outputs to tokens.

    Args:
        target: gives the logits.
        draft_ids: [V_d] target ids of the draft vocabulary; None if it is the target's.
        sampling: how tokens are chosen.
        forced_acceptance: for timing alone: the probability with which a seeded coin keeps a draft, whatever the target
            says of it. The target's logits are computed and read all the same.

    Raises:
        InputError: for a forced acceptance outside of [0, 1].
    """

    def __init__(
        self, target: Target, draft_ids: Tensor | None, sampling: Sampling, forced_acceptance: float | None = None
    ) -> None:
        if forced_acceptance is not None and not 0 <= forced_acceptance <= 1:
            raise InputError(f"forced_acceptance={forced_acceptance}: expected a number from 0 to 1.")
        self.target, self.draft_ids, self.sampling = target, draft_ids, sampling
        self.forced_acceptance = forced_acceptance

    def own(self, hidden: Tensor, position: int) -> int:
        """The target's own token for `position`, from h_L [H] of the position before it."""
        logits = self.target.logits(hidden)
        if self.sampling.greedy:
            return int(logits.argmax())
        return draw(self.sampling.law(logits), self._uniform(Purpose.TARGET, position, 0))

    def of(self, hidden: Tensor, draft: Draft, position: int, attempt: int) -> int:
        """The token at `position`: the draft, or the correction; h_L [H] is that of the position before it."""
        logits = self.target.logits(hidden)
        if self.forced_acceptance is not None:
            best, second = logits.topk(2).indices.tolist()
            if self._uniform(Purpose.COIN, position, attempt) < self.forced_acceptance:
                return draft.token
            return best if best != draft.token else second
        if self.sampling.greedy:
            return int(logits.argmax())
        assert draft.law is not None
        coin, residual = (self._uniform(purpose, position, attempt) for purpose in (Purpose.ACCEPT, Purpose.RESIDUAL))
        return verify(draft.token, self.sampling.law(logits), draft.law, self.draft_ids, coin, residual)

    def _uniform(self, purpose: Purpose, position: int, attempt: int) -> float:
        return uniform(self.sampling.seed, purpose, position, attempt)
