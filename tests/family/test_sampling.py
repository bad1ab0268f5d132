"""Sampling from a hybrid, a sliding-window and a mixture target: three tokens follow the target's own joint law.

The law is enumerated by transformers' own model, prefix by prefix. Rejected drafts roll recurrent states and windows
back, and the window is so small that the prompt and three tokens cross its edge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity.test_sampling import (
    BROKEN,
    HOLDS,
    PROMPT,
    SETTINGS,
    V,
    conditional_laws,
    joint_law,
    make_drafter,
    p_value,
    sample,
)
from scale_runs import also

from spd_lightning.decoding.decoder import SpdDecoder
from spd_lightning.target.cache import RecurrentLayer
from spd_lightning.target.target import Target

from .common import HYBRID, SLIDING, build

SMALL_WINDOW = 3

# family, drafter, settings
QUICK = [
    ("qwen3_5_text", "far", "warm"),
    ("gemma3_text", "far", "plain"),
    ("qwen3_moe", "far", "top-k and top-p"),
]
LONG = [
    ("qwen3_5_text", "far", "plain"),
    ("mistral", "head", "plain"),
    ("gemma3_text", "far", "top-k"),
    ("gemma2", "far", "plain"),
    ("qwen3_moe", "head", "plain"),
]


def small_target(make_target: Callable[..., Target], family: str) -> Target:
    """V tokens; two stages, the first of which rolls back; a layer of each kind of the family."""
    more: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    if family in SLIDING:
        more["sliding_window"] = SMALL_WINDOW
        assert len(PROMPT) < SMALL_WINDOW < len(PROMPT) + 3
    if family in HYBRID:
        more["layer_types"] = ["linear_attention", "linear_attention", "full_attention"]
    spread = {"gemma2": 0.2, "gemma3_text": 0.2}.get(family, 0.35)
    return build(make_target, family, (2, 1), hidden=16, vocab=V, seed=5, spread=spread, **more)


def check_joint_distribution(
    make_target: Callable[..., Target], family: str, kind: str, name: str, draws: int, first_seed: int
) -> float:
    target, settings = small_target(make_target, family), SETTINGS[name]
    law = joint_law(conditional_laws(target, settings))
    counts, acceptance = sample(SpdDecoder(target, make_drafter(kind, target, settings)), settings, draws, first_seed)
    p = p_value(counts, law)
    print(f"{family}, {kind}, {name}: {draws} draws, {len(counts)} outcomes, acceptance {acceptance:.3f}, p = {p:.4f}")
    assert 0.02 < acceptance < 0.98 and len(counts) > 20
    return p


@pytest.mark.parametrize(("family", "kind", "name"), [QUICK[0], *also(*QUICK[1:])])
def test_three_sampled_tokens_follow_the_targets_joint_law(
    make_target: Callable[..., Target], family: str, kind: str, name: str, record_property: Any
) -> None:
    first_seed = 1_000_000 + 100_000 * QUICK.index((family, kind, name))
    assert check_joint_distribution(make_target, family, kind, name, 1_000, first_seed) > HOLDS
    record_property("cases", 1_000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("family", "kind", "name"), LONG)
def test_three_sampled_tokens_follow_the_targets_joint_law_over_20000_draws(
    make_target: Callable[..., Target], family: str, kind: str, name: str, record_property: Any
) -> None:
    first_seed = 2_000_000 + 100_000 * LONG.index((family, kind, name))
    assert check_joint_distribution(make_target, family, kind, name, 20_000, first_seed) > HOLDS
    record_property("cases", 20_000)


def test_the_same_test_rejects_recurrent_states_that_do_not_roll_back(
    make_target: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecurrentLayer, "truncate", lambda layer, length: None)
    assert check_joint_distribution(make_target, "qwen3_5_text", "far", "warm", 600, 0) < BROKEN


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_5_text"])
def test_the_law_depends_on_what_is_special_about_the_family(make_target: Callable[..., Target], family: str) -> None:
    """Otherwise the test above would prove nothing about it: a wider window, or another first token, is another law."""
    target = small_target(make_target, family)
    with torch.no_grad():
        laws = [target.model(torch.tensor([[1, 4, *rest, 2]])).logits[0, -1].softmax(-1) for rest in ((0, 3), (5, 3))]
    assert float((laws[0] - laws[1]).abs().max()) > 0.02
    if family == "gemma3_text":
        target.model.config.sliding_window = 50
        for layer in target.model.model.layers:
            layer.self_attn.sliding_window = 50 if layer.self_attn.is_sliding else None
        with torch.no_grad():
            wide = target.model(torch.tensor([[1, 4, 0, 3, 2]])).logits[0, -1].softmax(-1)
        assert float((wide - laws[0]).abs().max()) > 0.02
