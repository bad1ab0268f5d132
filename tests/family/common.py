"""What the tests of families share: tiny targets of every family, and drafters that know the continuation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import families
import pytest
import torch
from parity.test_lossless import VOCABULARY, OracleDrafter
from torch import Tensor

from spd_lightning.decoding.decoder import CycleEvent
from spd_lightning.decoding.drafters import Draft
from spd_lightning.decoding.sampling import Sampling
from spd_lightning.decoding.schedule import Cycle
from spd_lightning.staircase import Staircase, default_anchors
from spd_lightning.target.target import Target

#: Every test that takes `family` runs for all of them; the table of docs/families.md counts its cases.
FAMILIES = tuple(families.FAMILIES)
every_family = pytest.mark.parametrize("family", FAMILIES)
HYBRID = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
SLIDING = ("mistral", "gemma2", "gemma3_text", "gpt_oss", "olmo3")
WINDOW = 6

#: A tied embedding of full size makes a random Gemma repeat its last token; a faint one lets the layers speak.
VARIED: dict[str, dict[str, Any]] = dict.fromkeys(("gemma2", "gemma3_text"), {"embedding_scale": 0.03, "spread": 0.5})


def build(
    make_target: Callable[..., Target], family: str, stages: int | Sequence[int], layers: int | None = None, **more: Any
) -> Target:
    """A tiny target of a family with all that tests/families.py says of it.

    Args:
        stages: layers per stage, or the number of stages together with `layers`.
        more: arguments of `make_target` and fields of the configuration; they win.
    """
    split: dict[str, Any]
    if isinstance(stages, int):
        assert layers is not None
        split = {"num_stages": stages}
    else:
        layers, split = sum(stages), {"stage_layers": tuple(stages)}
    return make_target(family, layers, **(families.fields(family, layers) | split | more))


def staircase_of(target: Target) -> Staircase:
    assert target.stage_layers is not None
    return Staircase(target.stage_layers, default_anchors(target.stage_layers))


def random_prompt(length: int, generator: random.Random, vocab: int = VOCABULARY) -> list[int]:
    return [generator.randrange(vocab) for _ in range(length)]


class WrongAt(OracleDrafter):
    """Right everywhere but at some positions."""

    def __init__(self, staircase: Staircase, tokens: Sequence[int], wrong: Sequence[int]) -> None:
        super().__init__(staircase, tokens)
        self.wrong = set(wrong)

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        draft = super().draft(cycle, kept, tokens, sampling, u)
        return Draft((draft.token + 1) % self.vocab, None) if cycle.newest + 1 in self.wrong else draft


class EveryPhase(OracleDrafter):
    """Wrong once per run: at the draft that was made when f tokens were in flight, for f = 1..n in a random order.

    All tokens after it are flushed, so the next run begins right there. Between two rollbacks the caches advance by f
    tokens more than what the first one took back.
    """

    def __init__(self, staircase: Staircase, tokens: Sequence[int], seed: int) -> None:
        super().__init__(staircase, tokens)
        self.shuffle, self.phases, self.began, self.phase = random.Random(seed), list[int](), 0, 0

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        if len(cycle.stages) == 1:  # alone in the pipeline: a run begins
            if not self.phases:
                self.phases = list(range(1, self.staircase.num_stages + 1))
                self.shuffle.shuffle(self.phases)
            self.began, self.phase = cycle.newest, self.phases.pop()
        draft = super().draft(cycle, kept, tokens, sampling, u)
        if cycle.newest + 1 == self.began + self.phase:
            return Draft((draft.token + 1) % self.vocab, None)
        return draft


def tokens_for_every_phase(n: int) -> int:
    """New tokens after which `EveryPhase` has been through all of them: runs of 1..n, and the free first token."""
    return n * (n + 1) // 2 + 1


def rejected_phases(events: Sequence[CycleEvent]) -> list[int]:
    """Of every rejected draft: how many tokens were in flight when it was made."""
    in_flight, found = {}, []
    for event in events:
        if event.cycle is None:
            continue
        if event.accepted is False:
            assert event.cycle.leaving is not None
            found.append(in_flight[event.cycle.leaving + 1])
        in_flight[event.cycle.newest + 1] = len(event.cycle.stages)
    return found


def ids_tensor(rows: int, length: int, seed: int, vocab: int = VOCABULARY) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
