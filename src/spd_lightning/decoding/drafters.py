"""What fills the pipeline: the speculation head, or prompt lookup as a baseline that needs no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from spd_lightning.decoding.sampling import Sampling, draw
from spd_lightning.decoding.schedule import Cycle
from spd_lightning.head.module import SpeculationHead
from spd_lightning.staircase import Staircase


class Draft:
    """A proposed token and its exact law Q over `Drafter.draft_ids` (None under greedy decoding, which needs none)."""

    __slots__ = ("law", "token")

    def __init__(self, token: int, law: Tensor | None) -> None:
        self.token, self.law = token, law


class Drafter(Protocol):
    """Proposes the token after the newest one, from what exists at the start of a cycle."""

    staircase: Staircase
    draft_ids: Tensor | None

    def start(self, prompt: Sequence[int], states: list[Tensor], capacity: int) -> None:
        """A new prompt; states: [1, P, H] per anchor."""

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        """The draft after `tokens` (prompt, emitted and in flight, the newest last); u: its uniform number."""


class HeadDrafter:
    """The speculation head."""

    def __init__(self, head: SpeculationHead) -> None:
        self.head, self.staircase = head, head.staircase
        self.draft_ids = head.draft_token_ids

    def start(self, prompt: Sequence[int], states: list[Tensor], capacity: int) -> None:
        self.cache = self.head.new_cache(capacity)
        self.rotary = self.head.rotary_table(capacity)
        self.head.prefill([state.to(self.head.dtype) for state in states], self.cache, self.rotary)

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        logits = self.head.logits(self.head.step(cycle.rows, kept, self.cache, self.rotary))
        if sampling.greedy:
            return Draft(self.head.full_vocabulary_id(int(logits.argmax())), None)
        law = sampling.law(logits)
        return Draft(self.head.full_vocabulary_id(draw(law, u)), law)


class PromptLookupDrafter:
    """n-gram drafting: the token that followed the most recent earlier occurrence of the last few tokens.

    Tries the longest n-gram first; without any match it repeats the last token. Q is certain, so it is lossless under
    sampling too. (Saxena 2023, "Prompt lookup decoding", here through the pipeline's own verification.)
    """

    def __init__(self, staircase: Staircase, vocab_size: int, longest: int = 3) -> None:
        self.staircase, self.vocab_size, self.longest = staircase, vocab_size, longest
        self.draft_ids: Tensor | None = None

    def start(self, prompt: Sequence[int], states: list[Tensor], capacity: int) -> None:
        pass

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        token = self._lookup(tokens)
        if sampling.greedy:
            return Draft(token, None)
        law = torch.zeros(self.vocab_size, dtype=torch.float64)
        law[token] = 1
        return Draft(token, law)

    def _lookup(self, tokens: Sequence[int]) -> int:
        for size in range(min(self.longest, len(tokens) - 1), 0, -1):
            wanted = tokens[-size:]
            for end in range(len(tokens) - 1, size - 1, -1):
                if tokens[end - size : end] == wanted:
                    return tokens[end]
        return tokens[-1]
