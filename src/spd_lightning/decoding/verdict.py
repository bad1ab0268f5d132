"""The target's word on every token: kept drafts, corrections, and tokens of its own. One rule for all engines."""

from __future__ import annotations

from torch import Tensor

from spd_lightning.decoding.drafters import Draft
from spd_lightning.decoding.sampling import Sampling, draw, verify
from spd_lightning.errors import InputError
from spd_lightning.randomness import Purpose, uniform


class Verdicts:
    """From the target's logits to tokens.

    Args:
        draft_ids: [V_d] target ids of the draft vocabulary; None if it is the target's.
        sampling: how tokens are chosen.
        forced_acceptance: for timing alone: the probability with which a seeded coin keeps a draft, whatever the target
            says of it. The target's logits are computed and read all the same.

    Raises:
        InputError: for a forced acceptance outside of [0, 1].
    """

    def __init__(self, draft_ids: Tensor | None, sampling: Sampling, forced_acceptance: float | None = None) -> None:
        if forced_acceptance is not None and not 0 <= forced_acceptance <= 1:
            raise InputError(f"forced_acceptance={forced_acceptance}: expected a number from 0 to 1.")
        self.draft_ids, self.sampling = draft_ids, sampling
        self.forced_acceptance = forced_acceptance

    def own(self, logits: Tensor, position: int) -> int:
        """The target's own token for `position`, from the logits [V] of the position before it."""
        if self.sampling.greedy:
            return int(logits.argmax())
        if self.sampling.coupled:
            return int(self.sampling.scores(logits, position).argmax())
        return draw(self.sampling.law(logits), self._uniform(Purpose.TARGET, position, 0))

    def of(self, logits: Tensor, draft: Draft, position: int, attempt: int, best: int | None = None) -> int:
        """The token at `position`: the draft, or the correction.

        Args:
            logits: [V] of the position before it.
            best: their argmax, where it is known already.
        """
        forced = self.forced_acceptance
        if forced is not None or self.sampling.greedy:
            best = int(logits.argmax()) if best is None else best
            if forced is None:
                return best
            if self._uniform(Purpose.COIN, position, attempt) < forced:
                return draft.token
            return best if best != draft.token else (best + 1) % logits.numel()
        assert draft.law is not None
        coin, residual = (self._uniform(purpose, position, attempt) for purpose in (Purpose.ACCEPT, Purpose.RESIDUAL))
        return verify(draft.token, self.sampling.law(logits), draft.law, self.draft_ids, coin, residual)

    def _uniform(self, purpose: Purpose, position: int, attempt: int) -> float:
        return uniform(self.sampling.seed, purpose, position, attempt)
