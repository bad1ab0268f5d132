"""Sampling: three sampled tokens have exactly the target's own joint distribution, whatever drafts them.

The expected distribution is enumerated: logits of transformers' own model for every prefix, warped by its own
warpers. The same chi-square test must reject decoders that are broken in well-known ways.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scale_runs import also
from scipy import stats
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from spd_lightning.decoding import decoder as decoder_module
from spd_lightning.decoding import verdict as verdict_module
from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
from spd_lightning.decoding.drafters import Draft, HeadDrafter, PromptLookupDrafter
from spd_lightning.decoding.sampling import Sampling, draw, verify
from spd_lightning.decoding.schedule import Cycle
from spd_lightning.errors import InputError
from spd_lightning.head.loading import new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.randomness import Purpose, uniform
from spd_lightning.staircase import Staircase
from spd_lightning.target.target import Target

V = 6
PROMPT = [1, 4]
HOLDS, BROKEN = 1e-4, 1e-6  # p-values: above the first is what we claim, below the second is certainly wrong
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "warm": {"temperature": 0.7},
    "top-k": {"temperature": 1.0, "top_k": 3},
    "top-p": {"temperature": 1.2, "top_p": 0.8},
    "top-k and top-p": {"temperature": 1.5, "top_k": 4, "top_p": 0.85},
}


def library_law(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities [..., V] by transformers' warpers, float64."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    scores = logits.double().reshape(-1, logits.shape[-1])
    return warpers(torch.zeros(scores.shape[0], 0, dtype=torch.long), scores).softmax(-1).view(logits.shape)


def small_target(make_target: Callable[..., Target], num_stages: int = 2) -> Target:
    return make_target(
        num_layers=num_stages,
        hidden=16,
        vocab=V,
        num_stages=num_stages,
        seed=5,
        spread=0.35,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


@torch.no_grad()
def conditional_laws(target: Target, settings: dict[str, Any]) -> dict[tuple[int, ...], Tensor]:
    """The law of the next token after every continuation of 0, 1 or 2 tokens."""
    laws = {}
    for length in range(3):
        prefixes = list(product(range(V), repeat=length))
        logits = target.model(torch.tensor([[*PROMPT, *prefix] for prefix in prefixes])).logits[:, -1]
        laws.update(zip(prefixes, library_law(logits, **settings), strict=True))
    return laws


def joint_law(laws: dict[tuple[int, ...], Tensor]) -> dict[tuple[int, ...], float]:
    joint = {}
    for tokens in product(range(V), repeat=3):
        joint[tokens] = float(laws[()][tokens[0]] * laws[tokens[:1]][tokens[1]] * laws[tokens[:2]][tokens[2]])
    assert sum(joint.values()) == pytest.approx(1)
    return joint


def p_value(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Chi-square; outcomes expected less than 5 times share one cell, impossible ones must not occur."""
    draws = sum(counts.values())
    if any(counts[outcome] for outcome, probability in law.items() if probability == 0):
        return 0.0
    cells = [(counts[outcome], draws * probability) for outcome, probability in law.items() if draws * probability >= 5]
    rest = (draws - sum(seen for seen, _ in cells), draws - sum(expected for _, expected in cells))
    if rest[1] >= 5:
        cells.append(rest)
    else:
        cells[-1] = (cells[-1][0] + rest[0], cells[-1][1] + rest[1])
    if len(cells) == 1:  # one possible outcome, and nothing else occurred
        return 1.0
    return float(stats.chisquare(*zip(*cells, strict=True)).pvalue)


# -- drafters whose law is known -----------------------------------------------------------------------------


class LawDrafter:
    """Proposes from a law of our own making, given the tokens after the prompt."""

    draft_ids: Tensor | None = None

    def __init__(self, staircase: Staircase, law: Callable[[tuple[int, ...]], Tensor]) -> None:
        self.staircase, self.law = staircase, law

    def start(self, prompt: Sequence[int], states: list[Tensor], capacity: int) -> None:
        pass

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        law = self.law(tuple(tokens[len(PROMPT) :]))
        token = next(index for index, bound in enumerate(law.cumsum(0).tolist()) if u < bound or index == V - 1)
        return Draft(token, law)


def far_law(prefix: tuple[int, ...]) -> Tensor:
    """Nearly certain of one token, another one after each prefix, right or wrong."""
    law = torch.full((V,), 0.02, dtype=torch.float64)
    law[sum(prefix) % V] += 1 - 0.02 * V
    return law


def random_head(target: Target, draft_token_ids: Sequence[int] | None = None) -> SpeculationHead:
    head = new_head(target, num_layers=1, draft_token_ids=draft_token_ids, seed=3)
    with torch.no_grad():
        head.lm_head.weight.add_(
            torch.randn(head.lm_head.weight.shape, generator=torch.Generator().manual_seed(8)) * 0.5
        )
    return head


def make_drafter(kind: str, target: Target, settings: dict[str, Any]) -> Any:
    assert target.stage_layers is not None
    staircase = Staircase(target.stage_layers, (0, target.num_layers))
    if kind == "far":
        return LawDrafter(staircase, far_law)
    if kind == "equal":
        laws = conditional_laws(target, settings)
        anything = torch.full((V,), 1 / V, dtype=torch.float64)
        return LawDrafter(staircase, lambda prefix: laws.get(prefix, anything))
    if kind == "prompt lookup":
        return PromptLookupDrafter(staircase, V)
    return random_head(target, [0, 2, 5] if kind == "head with draft vocabulary" else None)


def sample(
    decoder: SpdDecoder, settings: dict[str, Any], draws: int, first_seed: int = 0
) -> tuple[Counter[tuple[int, ...]], float]:
    """Outcomes of three tokens over consecutive seeds, and the acceptance."""
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for seed in range(first_seed, first_seed + draws):
        generation = decoder.generate(PROMPT, 3, seed=seed, **settings)
        counts[tuple(generation.token_ids)] += 1
        accepted += generation.drafts_accepted
    return counts, accepted / (2 * draws)


# drafter, settings, stages
QUICK = [
    ("far", "plain", 2),
    ("equal", "top-p", 3),
    ("head with draft vocabulary", "warm", 2),
    ("head", "top-k and top-p", 2),
]
LONG = [
    ("far", "plain", 3),
    ("equal", "warm", 2),
    ("head", "top-k", 2),
    ("head", "top-p", 2),
    ("head with draft vocabulary", "top-k and top-p", 2),
    ("prompt lookup", "plain", 2),
]


def check_joint_distribution(
    make_target: Callable[..., Target], kind: str, name: str, num_stages: int, draws: int, first_seed: int
) -> None:
    target, settings = small_target(make_target, num_stages), SETTINGS[name]
    law = joint_law(conditional_laws(target, settings))
    counts, acceptance = sample(SpdDecoder(target, make_drafter(kind, target, settings)), settings, draws, first_seed)
    p = p_value(counts, law)
    print(f"{kind}, {name}, n={num_stages}: {draws} draws, acceptance {acceptance:.3f}, p = {p:.4f}")
    assert p > HOLDS
    if kind == "equal":
        assert acceptance > 0.999
    else:
        assert 0.02 < acceptance < 0.98


@pytest.mark.parametrize(("kind", "name", "num_stages"), [*QUICK[::2], *also(*QUICK[1::2])])
def test_three_sampled_tokens_follow_the_targets_joint_law(
    make_target: Callable[..., Target], kind: str, name: str, num_stages: int
) -> None:
    check_joint_distribution(
        make_target, kind, name, num_stages, 2_000, first_seed=100_000 * QUICK.index((kind, name, num_stages))
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "name", "num_stages"), LONG)
def test_three_sampled_tokens_follow_the_targets_joint_law_over_20000_draws(
    make_target: Callable[..., Target], kind: str, name: str, num_stages: int
) -> None:
    check_joint_distribution(
        make_target, kind, name, num_stages, 20_000, first_seed=100_000 * LONG.index((kind, name, num_stages))
    )


def test_autoregressive_sampling_follows_the_same_law(make_target: Callable[..., Target]) -> None:
    target, settings = small_target(make_target), SETTINGS["top-k and top-p"]
    law = joint_law(conditional_laws(target, settings))
    counts = Counter(
        tuple(autoregressive_generate(target, PROMPT, 3, seed=seed, **settings).token_ids) for seed in range(2_000)
    )
    assert p_value(counts, law) > HOLDS


# -- the same test rejects what is broken --------------------------------------------------------------------


class ClaimsTooMuch(HeadDrafter):
    """Draws from the head's truncated law but reports the whole one as Q."""

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        draft = super().draft(cycle, kept, tokens, sampling, u)
        whole = Sampling(sampling.temperature, seed=sampling.seed)
        again = super().draft(cycle, kept, tokens, whole, u)
        return Draft(draft.token, again.law)


def accept_always(token: int, *rest: Any) -> int:
    return token


def residual_is_the_target(
    token: int, target: Tensor, draft: Tensor, ids: Tensor | None, coin: float, uniform: float
) -> int:
    return token if coin * float(draft[token]) < float(target[token]) else draw(target, uniform)


def one_number_for_every_purpose(seed: int, purpose: Purpose, position: int, attempt: int) -> float:
    return uniform(seed, Purpose.TARGET, position, attempt)


@pytest.mark.parametrize(
    "broken",
    [
        "residual is P",
        "coin not independent",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("accept always", "top-p on one side")),
    ],
)
def test_the_same_test_rejects_a_decoder_that_is_broken(
    make_target: Callable[..., Target], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    target, settings = small_target(make_target), SETTINGS["plain"]
    drafter = make_drafter("head", target, settings)
    if broken == "accept always":
        monkeypatch.setattr(verdict_module, "verify", accept_always)
    elif broken == "residual is P":
        monkeypatch.setattr(verdict_module, "verify", residual_is_the_target)
    elif broken == "top-p on one side":
        settings, drafter = {"temperature": 1.2, "top_p": 0.6}, ClaimsTooMuch(drafter)
    else:
        for module in (decoder_module, verdict_module):
            monkeypatch.setattr(module, "uniform", one_number_for_every_purpose)
    law = joint_law(conditional_laws(target, settings))
    counts, _ = sample(SpdDecoder(target, drafter), settings, 1_000)
    p = p_value(counts, law)
    print(f"{broken}: p = {p:.1e}")
    assert p < BROKEN


# -- one verification, in bulk -------------------------------------------------------------------------------

PAIRS: dict[str, tuple[list[float], list[float], list[int] | None]] = {
    "near": ([0.1, 0.2, 0.3, 0.4], [0.15, 0.15, 0.4, 0.3], None),
    "far": ([0.7, 0.2, 0.1, 0.0], [0.01, 0.04, 0.15, 0.8], None),
    "equal": ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], None),
    "disjoint": ([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.3, 0.7], None),
    "certain draft": ([0.3, 0.2, 0.1, 0.4], [0.0, 1.0, 0.0, 0.0], None),
    "certain target": ([0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], None),
    "draft vocabulary": ([0.3, 0.2, 0.1, 0.4], [0.6, 0.4], [1, 3]),
    "draft vocabulary without any target mass": ([0.5, 0.0, 0.5, 0.0], [0.6, 0.4], [1, 3]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_one_verified_token_follows_the_target_and_is_kept_as_often_as_the_laws_overlap(name: str) -> None:
    P, Q, ids = PAIRS[name]
    target, draft = torch.tensor(P, dtype=torch.float64), torch.tensor(Q, dtype=torch.float64)
    draft_ids = None if ids is None else torch.tensor(ids)
    full = [0.0] * len(P)
    for token, probability in zip(ids or range(len(P)), Q, strict=True):
        full[token] = probability
    random, counts, kept = np.random.default_rng(1), Counter(), 0
    draws = 20_000
    proposals = random.choice(len(P), size=draws, p=full)
    for token, (coin, u) in zip(proposals.tolist(), random.random((draws, 2)).tolist(), strict=True):
        result = verify(token, target, draft, draft_ids, coin, u)
        counts[result,] += 1
        kept += result == token
    assert p_value(counts, {(token,): probability for token, probability in enumerate(P)}) > HOLDS
    overlap = sum(min(p, q) for p, q in zip(P, full, strict=True))
    assert stats.binomtest(kept, draws, min(1.0, overlap)).pvalue > HOLDS
    assert torch.equal(target, torch.tensor(P, dtype=torch.float64)), "inputs stay as they are"


def test_draws_follow_their_law_and_never_give_an_impossible_token() -> None:
    law = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    numbers = np.random.default_rng(2).random(20_000).tolist()
    counts = Counter((draw(law, u),) for u in numbers)
    assert p_value(counts, {(token,): probability for token, probability in enumerate(law.tolist())}) > HOLDS
    assert draw(law, 0.0) == 1 and draw(law, 1 - 2.0**-53) == 4
    assert draw(law, 0.5) == 3 and draw(3 * law, 0.8) == 4, "half-open intervals; a law need not be normalised"


# -- the law of one token ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 50, 1000])
def test_the_law_of_a_token_equals_the_librarys_warpers(size: int) -> None:
    generator, worst = torch.Generator().manual_seed(size), 0.0
    cases = list(product((0.3, 1.0, 2.5), (0, 1, 3, 40, 5000), (1.0, 0.95, 0.5, 0.01)))
    for temperature, top_k, top_p in cases:
        logits = 3 * torch.randn(size, generator=generator)
        expected = library_law(logits, temperature, min(top_k, size), top_p)
        law = Sampling(temperature, top_k, top_p).law(logits)
        assert law.dtype == torch.float64 and float(law.sum()) == pytest.approx(1)
        assert torch.equal(law > 0, expected > 0)
        worst = max(worst, float((law - expected).abs().max()))
    print(f"V={size}: {len(cases)} laws, largest difference {worst:.1e}")
    assert worst < 1e-12


def test_a_seed_decides_everything_and_another_seed_decides_otherwise(
    make_target: Callable[..., Target],
) -> None:
    target = make_target(num_layers=4, num_stages=4)
    decoder = SpdDecoder(target, new_head(target))
    texts = [decoder.generate([1, 2], 12, temperature=1.0, seed=seed).token_ids for seed in (0, 1, 2, 0)]
    assert texts[0] == texts[3] == decoder.generate([1, 2], 12, temperature=1.0).token_ids
    assert len({tuple(text) for text in texts}) == 3
    for seed, text in enumerate(texts[:3]):
        plain = autoregressive_generate(target, [1, 2], 12, temperature=1.0, seed=seed).token_ids
        assert plain[0] == text[0], "the first token is the target's own draw in both"


def test_a_low_temperature_is_nearly_greedy(make_target: Callable[..., Target]) -> None:
    target = make_target(num_layers=4, num_stages=4)
    decoder = SpdDecoder(target, new_head(target))
    greedy = decoder.generate([1, 2], 12).token_ids
    assert decoder.generate([1, 2], 12, temperature=1e-6).token_ids == greedy


def test_a_temperature_that_overflows_is_refused_or_greedy() -> None:
    try:
        law = Sampling(1e-310).law(torch.tensor([1.0, 3.0, 2.0]))
    except InputError:
        return
    assert law.tolist() == [0.0, 1.0, 0.0]
