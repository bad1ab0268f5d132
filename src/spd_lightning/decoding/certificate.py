"""The lossless certificate: what the decoder emits, tested against the target's own laws.

Greedy output must equal plain decoding token for token. Sampled output cannot be compared with another sample token by
token, so every emitted token x_t is judged by the target's law P_t given what was emitted before it, recomputed in one
teacher-forced pass that shares nothing with the decoder but the target. For any order of the vocabulary

    u_t = P_t(tokens before x_t) + v_t P_t(x_t),   v_t ~ U(0, 1) of its own,

is uniform and independent of the past where x_t follows P_t. Three orders are tested: by Q_t / P_t, where the head's
favourites come first (every common fault of speculative sampling favours them), by P_t (a temperature or top-p that one
side forgot) and by token id (draws that share a number). Two martingales follow: the mass on {Q_t > P_t}, and the
product of neighbouring u.

All p-values are bounds that hold at any sample size: Dvoretzky-Kiefer-Wolfowitz with Massart's constant for the
largest distance from uniform, Bennett's inequality in Freedman's form for the martingales. Together, over all tests and
settings, a lossless decoder fails with probability at most `ALPHA` (Bonferroni).

In half precision the teacher-forced pass rounds otherwise than the decoder. A token just outside the top-k or top-p set
is excused if a logit within `TIE_TOLERANCE` lets it in; such tokens are counted and left out of the statistics. What
rounding does to the remaining probabilities averages out far below the shift that can be detected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spd_lightning.decoding.checks import TIE_TOLERANCE, drift, lossless_divergence
from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
from spd_lightning.decoding.generation import Generation, Pooled
from spd_lightning.decoding.sampling import Sampling
from spd_lightning.errors import InputError
from spd_lightning.head.loading import draft_logits
from spd_lightning.head.module import SpeculationHead
from spd_lightning.randomness import Purpose, generator
from spd_lightning.target.target import Target

#: Probability that a lossless decoder fails the whole certificate, at most.
ALPHA = 1e-4
#: Probability with which a shift of the stated size is found, at least.
POWER = 0.99
DEFAULT_SETTINGS = (Sampling(1.0), Sampling(0.7, top_p=0.9), Sampling(1.0, top_k=8))
ORDERS = ("head's favourites first", "likely tokens first", "token ids")
TESTS = (*ORDERS, "mass on the head's favourites", "neighbouring tokens")


@dataclass(frozen=True)
class GreedyEvidence:
    """Greedy decoding against plain decoding, prompt by prompt.

    Attributes:
        identical: prompts whose tokens are the same to the last one.
        ties: prompts that part where the target's two logits are equal within rounding.
        mismatches: prompts that part elsewhere; none may.
        tokens: new tokens, all prompts.
        acceptance: accepted / verified drafts; None where none was verified.
        drifts: accept flags that the training view does not give again, ties aside; drift_ties: the ties. They tell of
            the head's two views and cannot harm losslessness, so they do not decide it.
    """

    identical: int
    ties: int
    mismatches: int
    tokens: int
    acceptance: float | None
    drifts: int
    drift_ties: int


@dataclass(frozen=True)
class SampledEvidence:
    """One setting of sampling.

    Attributes:
        temperature, top_k, top_p: the setting.
        tokens: emitted tokens under test, the first of each prompt included.
        acceptance: accepted / verified drafts; None where none was verified.
        impossible: tokens to which the target gives probability 0; none may.
        excused: tokens outside the top-k or top-p set by rounding only; left out of the tests.
        p_values: by test, see `TESTS`; upper bounds.
        detectable_shift: if the decoder's law differs from the target's by this much probability, on average over
            tokens, on some initial part of one of the orders, it is found with probability `POWER` at least.
        detectable_favour: the same for mass moved to the tokens that the head likes better than the target does
            (normal approximation); None where there are none.
    """

    temperature: float
    top_k: int
    top_p: float
    tokens: int
    acceptance: float | None
    impossible: int
    excused: int
    p_values: dict[str, float]
    detectable_shift: float
    detectable_favour: float | None


@dataclass(frozen=True)
class Certificate:
    """The evidence, and whether it holds. `alpha` is shared out evenly among all tests of all settings."""

    prompts: int
    max_new_tokens: int
    seed: int
    dtype: str
    alpha: float
    power: float
    greedy: GreedyEvidence
    sampled: tuple[SampledEvidence, ...]

    @property
    def alpha_each(self) -> float:
        """The level of one test."""
        return _alpha_each(len(self.sampled))

    @property
    def smallest_p_value(self) -> float:
        """Of all tests; 1 where nothing was sampled."""
        return min((p for found in self.sampled for p in found.p_values.values()), default=1.0)

    @property
    def holds(self) -> bool:
        """No greedy mismatch, no impossible token, and no test below its level."""
        possible = not any(found.impossible for found in self.sampled)
        return self.greedy.mismatches == 0 and possible and self.smallest_p_value >= self.alpha_each

    @property
    def summary(self) -> str:
        """One line for a model card."""
        greedy, tokens = self.greedy, sum(found.tokens for found in self.sampled)
        parts = [
            f"{'Lossless' if self.holds else 'NOT LOSSLESS'} in {self.dtype}: greedy output identical for "
            f"{greedy.identical} of {self.prompts} prompts ({greedy.ties} ties, {greedy.mismatches} mismatches)"
        ]
        if self.sampled:
            shift = max(found.detectable_shift for found in self.sampled)
            impossible = sum(found.impossible for found in self.sampled)
            parts.append(
                f"{tokens} sampled tokens under {len(self.sampled)} settings against the target's law: {impossible} "
                f"impossible, smallest p-value {self.smallest_p_value:.2g} (level {self.alpha_each:.1g}), "
                f"a shift of {shift:.2f} would be found with probability {self.power:g}"
            )
        return "; ".join(parts) + "."

    def fields(self) -> dict[str, Any]:
        """Everything as JSON types."""
        derived = {"alpha_each": self.alpha_each, "holds": self.holds, "summary": self.summary}
        return {**asdict(self), "sampled": [asdict(found) for found in self.sampled], **derived}


@torch.no_grad()
def certify(
    target: Target,
    head: SpeculationHead,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    seed: int = 0,
    settings: Sequence[Sampling] = DEFAULT_SETTINGS,
    on_progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Decode all prompts greedily and under every setting, and test what comes out.

    Args:
        target: the target; head: a head for its stages.
        prompts: token ids, each at least one.
        max_new_tokens: per prompt. Sampled text runs on past an end of sequence: sample sizes are fixed beforehand.
        seed: of all draws. The settings' own seeds are not used.
        settings: sampled settings (temperature > 0); may be empty.
        on_progress: called with (generations done, of how many).

    Raises:
        InputError: without prompts, for less than 2 new tokens, for a greedy setting, or for what the decoder refuses.
    """
    _check(prompts, max_new_tokens, settings)
    decoder, total = SpdDecoder(target, head), len(prompts) * (1 + len(settings))
    level = _alpha_each(len(settings))

    def progress(done: int) -> None:
        if on_progress:
            on_progress(done, total)

    greedy = _greedy(decoder, head, prompts, max_new_tokens, progress)
    sampled = []
    for index, setting in enumerate(settings):
        found = _Sample(target, head, setting)
        for number, prompt in enumerate(prompts):
            random = generator(seed, Purpose.CERTIFICATE, index, number)
            own = int(random.integers(2**62))
            generation = decoder.generate(
                prompt, max_new_tokens, setting.temperature, setting.top_k, setting.top_p, own, eos_token_id=[]
            )
            found.add(prompt, generation, random)
            progress(len(prompts) * (1 + index) + number + 1)
        sampled.append(found.evidence(level))
    dtype = str(target.dtype).removeprefix("torch.")
    return Certificate(len(prompts), max_new_tokens, seed, dtype, ALPHA, POWER, greedy, tuple(sampled))


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, settings: Sequence[Sampling]) -> None:
    if len(prompts) == 0:
        raise InputError("no prompts: a certificate needs at least one.")
    if max_new_tokens < 2:
        raise InputError(f"max_new_tokens={max_new_tokens}: expected at least 2, the first token is never drafted.")
    if any(setting.greedy for setting in settings):
        raise InputError("a setting has temperature=0: greedy decoding is always tested, give temperatures above 0.")


def _alpha_each(settings: int) -> float:
    return ALPHA / max(1, settings * len(TESTS))


def _greedy(
    decoder: SpdDecoder,
    head: SpeculationHead,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    progress: Callable[[int], None],
) -> GreedyEvidence:
    target, generations, partings, drifts = decoder.target, [], [], []
    for number, prompt in enumerate(prompts):
        found = decoder.generate(prompt, max_new_tokens)
        generations.append(found)
        parting = lossless_divergence(target, prompt, found, autoregressive_generate(target, prompt, max_new_tokens))
        if parting is not None:
            partings.append(parting)
        drifts += drift(target, head, prompt, found)
        progress(number + 1)
    pooled, ties = Pooled.of(generations, head.staircase.num_stages), sum(parting.tie for parting in partings)
    return GreedyEvidence(
        identical=len(prompts) - len(partings),
        ties=ties,
        mismatches=len(partings) - ties,
        tokens=pooled.new_tokens,
        acceptance=pooled.acceptance,
        drifts=sum(not d.tie for d in drifts),
        drift_ties=sum(d.tie for d in drifts),
    )


class _Sample:
    """What is known of the tokens emitted under one setting, generation by generation."""

    def __init__(self, target: Target, head: SpeculationHead, setting: Sampling) -> None:
        self.target, self.head, self.setting = target, head, setting
        self.generations: list[Generation] = []
        self.uniforms: list[np.ndarray] = []  # [T, orders] per generation
        self.scores: list[tuple[float, float]] = []  # of the favourites' martingale: increment and its variance
        self.impossible = self.excused = 0

    def add(self, prompt: Sequence[int], generation: Generation, random: np.random.Generator) -> None:
        """Score one generation; random gives the v_t."""
        self.generations.append(generation)
        start, tokens = len(prompt), generation.token_ids
        ids = torch.tensor([[*prompt, *tokens[:-1]]], device=self.target.device)
        restarts = [position for position in generation.restart_positions if position < ids.shape[1]]
        drafts = draft_logits(self.target, self.head, ids, restarts or (0,))[0, start - 1 :]
        logits = self.target.logits(self.target(ids, ())[1][0, start - 1 :])
        rows = []
        for token, own, draft, v in zip(tokens, logits, drafts, random.random(len(tokens)).tolist(), strict=True):
            law = self.setting.law(own)
            if law[token] > 0:
                rows.append(self._score(token, law, self._favour(law, draft), v))
            elif _within_rounding(self.setting, own, token, TIE_TOLERANCE[self.target.dtype]):
                self.excused += 1
            else:
                self.impossible += 1
        self.uniforms.append(np.array(rows).reshape(-1, len(ORDERS)))

    def _favour(self, law: Tensor, draft: Tensor) -> Tensor:
        """Q / P [V] over the target's vocabulary; 0 where the head cannot draft."""
        warped, ids = self.setting.law(draft), self.head.draft_token_ids
        full = warped if ids is None else torch.zeros_like(law).scatter_(0, ids.cpu(), warped)
        return full / law.clamp(min=1e-300)

    def _score(self, token: int, law: Tensor, favour: Tensor, v: float) -> list[float]:
        liked = favour > 1
        mass = min(1.0, float(law[liked].sum()))
        self.scores.append((float(liked[token]) - mass, mass * (1 - mass)))
        by_id = float(law[:token].sum()) + v * float(law[token])
        return [_position(favour, law, token, v), _position(law, law, token, v), by_id]

    def evidence(self, level: float) -> SampledEvidence:
        """The tests; level: of each."""
        pooled = Pooled.of(self.generations, self.head.staircase.num_stages)
        uniforms, tokens = np.concatenate(self.uniforms), sum(map(len, self.uniforms))
        moved, variance = (sum(score[i] for score in self.scores) for i in (0, 1))
        p_values = [distance_p_value(uniforms[:, order]) for order in range(len(ORDERS))]
        p_values += [martingale_p_value(moved, variance), _neighbours([values[:, 0] for values in self.uniforms])]
        tails = math.sqrt(math.log(2 / level) / 2) + math.sqrt(math.log(1 / (1 - POWER)) / 2)
        return SampledEvidence(
            temperature=self.setting.temperature,
            top_k=self.setting.top_k,
            top_p=self.setting.top_p,
            tokens=pooled.new_tokens,
            acceptance=pooled.acceptance,
            impossible=self.impossible,
            excused=self.excused,
            p_values=dict(zip(TESTS, p_values, strict=True)),
            detectable_shift=min(1.0, tails / math.sqrt(max(1, tokens))),
            detectable_favour=min(1.0, 2 * tails * math.sqrt(variance) / tokens) if variance > 0 else None,
        )


def _position(key: Tensor, law: Tensor, token: int, v: float) -> float:
    """u of `token` with the vocabulary in falling order of key [V]; tokens of equal key count as one."""
    return float(law[key > key[token]].sum()) + v * float(law[key == key[token]].sum())


def _within_rounding(setting: Sampling, logits: Tensor, token: int, tolerance: float) -> bool:
    """Would the token be possible if its logit were larger by the rounding of two logits?"""
    raised = logits.detach().double().cpu().clone()
    raised[token] += 2 * tolerance * float(raised.abs().max())
    return float(setting.law(raised)[token]) > 0


def _neighbours(series: Sequence[np.ndarray]) -> float:
    """p-value of the products of neighbouring u, per generation [T]: a martingale with steps of at most 1."""
    moved = variance = 0.0
    for values in series:
        centred = 2 * values - 1
        moved += float((centred[1:] * centred[:-1]).sum())
        variance += float((centred[:-1] ** 2).sum() / 3)
    return martingale_p_value(moved, variance)


def distance_p_value(values: np.ndarray) -> float:
    """Bound on the two-sided Kolmogorov-Smirnov p-value of values [N] against U(0, 1): 2 exp(-2 N D^2)."""
    count = len(values)
    if count == 0:
        return 1.0
    ordered, steps = np.sort(values), np.arange(count + 1) / count
    distance = max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max()))
    return min(1.0, 2 * math.exp(-2 * count * distance**2))


def martingale_p_value(moved: float, variance: float) -> float:
    """Two-sided bound for a martingale of steps at most 1 that moved so far under so much predictable variance.

    Freedman (1975): P(S >= s, V <= v) <= exp(-v h(s / v)), h(x) = (1 + x) ln(1 + x) - x.
    """
    distance = abs(moved)
    if distance < 1e-9:  # rounding of laws that sum to 1
        return 1.0
    if variance <= 0:
        return 0.0
    x = distance / variance
    return min(1.0, 2 * math.exp(-variance * ((1 + x) * math.log1p(x) - x)))
