"""The certificate: lossless decoding gets it at every seed, and decoders that are broken in well-known ways do not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from spd_lightning.decoding import certificate as module
from spd_lightning.decoding import decoder as decoder_module
from spd_lightning.decoding import verdict as verdict_module
from spd_lightning.decoding.certificate import (
    ALPHA,
    Certificate,
    certify,
    distance_p_value,
    martingale_p_value,
)
from spd_lightning.decoding.drafters import Draft, HeadDrafter
from spd_lightning.decoding.sampling import Sampling, draw
from spd_lightning.errors import InputError
from spd_lightning.head.loading import new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.randomness import Purpose, uniform
from spd_lightning.target.cache import RollbackCache
from spd_lightning.target.target import Target

V = 12
PROMPTS = [[1, 4], [3], [5, 2, 7], [0, 9, 8, 6]]
BOTH = (Sampling(1.0), Sampling(0.7, top_p=0.8))


def small_target(make_target: Callable[..., Target], **options: Any) -> Target:
    sizes = {"num_layers": 2, "hidden": 16, "vocab": V, "num_stages": 2, "seed": 5, "spread": 0.35}
    return make_target(**{**sizes, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, **options})


def random_head(target: Target, draft_token_ids: list[int] | None = None, scale: float = 0.5) -> SpeculationHead:
    head = new_head(target, num_layers=1, draft_token_ids=draft_token_ids, seed=3)
    noise = torch.randn(head.lm_head.weight.shape, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        head.lm_head.weight.add_((scale * noise).to(head.dtype))
    return head


def small_certificate(
    make_target: Callable[..., Target], settings: Any = BOTH, scale: float = 0.5, rounds: int = 2, tokens: int = 240
) -> Certificate:
    target = small_target(make_target)
    return certify(target, random_head(target, scale=scale), rounds * PROMPTS, tokens, settings=settings)


def test_a_lossless_decoder_is_certified_at_every_seed(make_target: Callable[..., Target]) -> None:
    target = small_target(make_target)
    head = random_head(target)
    found = [certify(target, head, PROMPTS, 24, seed, (*BOTH, Sampling(1.2, top_k=4))) for seed in range(10)]
    assert all(c.holds for c in found)
    values = [p for c in found for s in c.sampled for p in s.p_values.values()]
    assert np.mean(np.array(values) < 0.05) < 0.05, "bounds are rarely small"
    assert all(s.tokens == 96 and s.excused == 0 for c in found for s in c.sampled)
    assert found[0].greedy.identical == len(PROMPTS) and found[0].greedy.drifts == 0


def test_a_certificate_is_json_and_says_what_was_tested(make_target: Callable[..., Target]) -> None:
    target, seen = small_target(make_target), []
    made = certify(target, random_head(target), PROMPTS[:2], 8, 3, on_progress=lambda *done: seen.append(done))
    fields = json.loads(json.dumps(made.fields()))
    assert fields["holds"] is True and fields["alpha"] == ALPHA and fields["seed"] == 3 and fields["dtype"] == "float32"
    assert seen == [(done, 8) for done in range(1, 9)]
    assert made.summary.startswith("Lossless in float32: greedy output identical for 2 of 2 prompts")
    assert "\n" not in made.summary
    again = certify(target, random_head(target), PROMPTS[:2], 8, 3)
    assert again == made, "a seed decides everything"


# -- broken decoders -----------------------------------------------------------------------------------------


def accept_always(token: int, *rest: Any) -> int:
    return token


def kept(token: int, P: Tensor, Q: Tensor, coin: float) -> bool:
    return coin * float(Q[token]) < float(P[token])


def residual_is_the_target(token: int, P: Tensor, Q: Tensor, ids: Any, coin: float, u: float) -> int:
    return token if kept(token, P, Q, coin) else draw(P, u)


def residual_is_the_draft(token: int, P: Tensor, Q: Tensor, ids: Any, coin: float, u: float) -> int:
    return token if kept(token, P, Q, coin) else draw(Q, u)


def ratio_is_swapped(token: int, P: Tensor, Q: Tensor, ids: Any, coin: float, u: float) -> int:
    return token if kept(token, Q, P, coin) else draw((P - Q).clamp(min=0), u)


def one_number_for_every_position(seed: int, purpose: Purpose, position: int, attempt: int) -> float:
    return uniform(seed, purpose, 0, 0)


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("verify", residual_is_the_target),
        ("uniform", one_number_for_every_position),
        pytest.param("verify", accept_always, marks=pytest.mark.slow),
        pytest.param("verify", residual_is_the_draft, marks=pytest.mark.slow),
        pytest.param("verify", ratio_is_swapped, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_broken_verification_is_not_certified(
    make_target: Callable[..., Target], monkeypatch: pytest.MonkeyPatch, name: str, replacement: Any
) -> None:
    monkeypatch.setattr(verdict_module, name, replacement)
    monkeypatch.setattr(decoder_module, name, replacement, raising=False)
    made = small_certificate(make_target, (Sampling(1.0),))
    print(made.sampled[0])
    assert not made.holds and made.greedy.mismatches == 0
    assert made.summary.startswith("NOT LOSSLESS")


@pytest.mark.parametrize(
    ("what", "side"),
    [
        ("top_p", "target"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("top_p", "head"), ("temperature", "target"))),
        pytest.param("temperature", "head", marks=pytest.mark.slow),
    ],
)
def test_a_warping_that_one_side_forgets_is_not_certified(
    make_target: Callable[..., Target], monkeypatch: pytest.MonkeyPatch, side: str, what: str
) -> None:
    """The head's side: it draws from its own law and reports the warped one."""
    setting = Sampling(0.9, top_p=0.6) if what == "top_p" else Sampling(0.5)
    plain = Sampling(setting.temperature) if what == "top_p" else Sampling(1.0)
    if side == "head":

        def one_sided(self: HeadDrafter, c: Any, kept: Any, tokens: Any, s: Sampling, u: float) -> Draft:
            head = self.head
            logits = head.logits(head.step(c.rows, kept, self.cache, self.rotary))
            return Draft(head.full_vocabulary_id(draw(plain.law(logits), u)), s.law(logits))

        monkeypatch.setattr(HeadDrafter, "draft", one_sided)
    else:
        drafted, law = HeadDrafter.draft, Sampling.law

        class Decoded(Sampling):
            def law(self, logits: Tensor) -> Tensor:
                return law(plain, logits)

        monkeypatch.setattr(decoder_module, "_sampling", lambda t, k, p, seed: Decoded(t, k, p, seed))
        monkeypatch.setattr(
            HeadDrafter, "draft", lambda self, c, states, tokens, s, u: drafted(self, c, states, tokens, setting, u)
        )
    made = small_certificate(make_target, (setting,), scale=0.0, rounds=5 if (what, side) == ("top_p", "head") else 2)
    print(made.sampled[0])
    assert not made.holds
    assert (made.sampled[0].impossible > 0) == (side == "target" and what == "top_p")


def test_a_greedy_verification_that_accepts_the_second_best_is_not_certified(
    make_target: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = decoder_module._Run._verdict

    def generous(self: Any, leaving: int) -> int:
        logits = self.target.logits(self.hidden[leaving])[0, 0]
        drafted = self.drafts[leaving + 1].token
        best = verdict(self, leaving)
        return drafted if drafted in logits.topk(2).indices.tolist() else best

    monkeypatch.setattr(decoder_module._Run, "_verdict", generous)
    made = small_certificate(make_target, (), tokens=24)
    assert made.greedy.mismatches > 0 and not made.holds


def test_a_cache_that_is_not_rolled_back_is_not_certified(
    make_target: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = decoder_module._Run._enter

    def stale(self: Any, position: int, token: int) -> None:
        enter(self, position, 0 if position % 5 == 0 else token)

    monkeypatch.setattr(RollbackCache, "truncate", lambda *_: None)
    monkeypatch.setattr(decoder_module._Run, "_enter", stale)
    try:
        made = small_certificate(make_target, (Sampling(1.0),), tokens=60)
    except AssertionError:
        return
    assert not made.holds


# -- unusual heads, targets and requests ---------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1e3], ids=["untrained", "hopeless"])
@pytest.mark.parametrize("ids", [None, [0, 2, 5], [4, 11]], ids=["full", "three ids", "two ids"])
def test_any_head_is_certified(make_target: Callable[..., Target], scale: float, ids: list[int] | None) -> None:
    target = small_target(make_target)
    made = certify(target, random_head(target, ids, scale), PROMPTS, 12, settings=(Sampling(1.0, top_k=3),))
    assert made.holds


def test_a_perfect_head_is_certified(make_target: Callable[..., Target], monkeypatch: pytest.MonkeyPatch) -> None:
    """The training view equals the target: no token is liked better, and nothing divides by zero."""
    target = small_target(make_target)
    monkeypatch.setattr(module, "draft_logits", lambda target, head, ids, _: target.logits(target(ids, ())[1]))
    made = certify(target, random_head(target), PROMPTS, 12, settings=BOTH)
    assert made.holds and made.sampled[0].detectable_favour is None


def test_a_target_in_bfloat16_is_certified(make_target: Callable[..., Target]) -> None:
    target = small_target(make_target, dtype=torch.bfloat16)
    made = certify(target, random_head(target), PROMPTS, 60, settings=(*BOTH, Sampling(1.0, top_k=3)))
    assert made.holds and made.dtype == "bfloat16"


def test_impossible_requests_are_refused(make_target: Callable[..., Target]) -> None:
    target = small_target(make_target)
    head = random_head(target)
    with pytest.raises(InputError, match="no prompts"):
        certify(target, head, [])
    with pytest.raises(InputError, match="max_new_tokens=1"):
        certify(target, head, PROMPTS, 1)
    with pytest.raises(InputError, match="temperature=0"):
        certify(target, head, PROMPTS, 4, settings=(Sampling(0.0),))


# -- p-values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 100, 5000])
def test_the_distance_bound_is_above_the_exact_p_value_and_close_to_it_where_it_is_small(count: int) -> None:
    for power in (1.0, 1.02, 1.1, 1.5):
        values = np.random.default_rng(count).random(count) ** power
        exact, bound = stats.kstest(values, "uniform").pvalue, distance_p_value(values)
        assert bound >= exact * (1 - 1e-9)
        if count >= 5000 and 1e-9 < exact < 1e-2:
            assert bound < 1.3 * exact


@pytest.mark.parametrize("count", [20, 400])
@pytest.mark.parametrize("p", [0.02, 0.5])
def test_the_martingale_bound_is_above_the_exact_binomial_tail(count: int, p: float) -> None:
    for seen in range(count + 1):
        moved = seen - count * p
        exact = stats.binom.sf(seen - 1, count, p) if moved > 0 else stats.binom.cdf(seen, count, p)
        assert martingale_p_value(moved, count * p * (1 - p)) >= exact * (1 - 1e-9)
    assert martingale_p_value(0.0, 0.0) == 1.0 and martingale_p_value(1.0, 0.0) == 0.0
    near = martingale_p_value(5 * math.sqrt(2500), 2500.0)
    assert near < 25 * 2 * stats.norm.sf(5)
