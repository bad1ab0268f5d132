"""Two proofs by real output: losslessness against plain decoding, and drift between decoding and the training view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_lightning.decoding.generation import Generation
from spd_lightning.head.loading import draft_logits
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.target import Target

#: Two logits closer than this share of the largest magnitude are a tie: rounding of the arithmetic alone can swap them.
TIE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Divergence:
    """The first position at which two token sequences differ, and whether a tie excuses it.

    Attributes:
        position: index into the new tokens.
        expected: token of the reference; found: token of the sequence under test.
        gap: how far the logit of the worse choice is below the largest there, relative to the largest magnitude;
            infinite where one sequence has no token.
        tie: the gap is within rounding.
    """

    position: int
    expected: int | None
    found: int | None
    gap: float
    tie: bool


def lossless_divergence(
    target: Target, prompt: Sequence[int], found: Generation, reference: Generation
) -> Divergence | None:
    """None if greedy output equals the reference token for token; else where and how it differs."""
    at = _first_difference(found.token_ids, reference.token_ids)
    if at is None:
        return None
    ids = torch.tensor([[*prompt, *reference.token_ids[:at]]], device=target.device)
    _, last = target(ids, ())
    pick = [tokens[at] if at < len(tokens) else None for tokens in (reference.token_ids, found.token_ids)]
    gap = _shortfall(target.logits(last[0, -1]), pick)
    return Divergence(at, pick[0], pick[1], gap, gap <= TIE_TOLERANCE[target.dtype])


def drift(target: Target, head: SpeculationHead, prompt: Sequence[int], found: Generation) -> list[Divergence]:
    """Positions whose accept flag differs when the decoder's own output is re-scored by the training view.

    The recorded restarts give the entry cycles, so every draft of the greedy decoder must come out again: any
    difference but a tie is a bug in one of the two views (method: drift check).
    """
    if len(found.token_ids) < 2:
        return []
    ids = torch.tensor([[*prompt, *found.token_ids]], device=target.device)
    logits = draft_logits(target, head, ids, found.restart_positions)[0]
    tolerance = max(TIE_TOLERANCE[target.dtype], TIE_TOLERANCE[head.dtype])
    result = []
    for index, accepted in enumerate(found.accepted_flags, start=1):
        here = logits[len(prompt) + index - 1]
        best, *others = here.topk(min(2, len(here))).indices.tolist()
        drafted, token = head.full_vocabulary_id(best), found.token_ids[index]
        if (drafted == token) != accepted:
            # an accepted draft was this token; of a rejected one no more is known than that it was another
            gap = _shortfall(here, [_draft_index(head, token) if accepted else next(iter(others), None)])
            result.append(Divergence(index, token, drafted, gap, gap <= tolerance))
    return result


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def _draft_index(head: SpeculationHead, token: int) -> int | None:
    ids = head.config.draft_token_ids
    return token if ids is None else ids.index(token) if token in ids else None


def _shortfall(logits: Tensor, choices: Sequence[int | None]) -> float:
    """How far the worst choice is below the largest logit, relative to the largest magnitude; infinite for None."""
    values = logits.double()
    least = min(-math.inf if choice is None else float(values[choice]) for choice in choices)
    return (float(values.max()) - least) / max(float(values.abs().max()), 1e-300)
