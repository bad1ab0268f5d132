"""The published implementation's own numbers: logits of its heads, its greedy text, its cycles.

The data are numbers written by the authors' code (float32, a random tiny Llama): SPD_GOLDEN in conftest.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
from spd_lightning.decoding.generation import Pooled
from spd_lightning.head.loading import draft_logits, load_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.loading import load_target
from spd_lightning.target.target import Target

HEADS = ("head_v11", "head_v11_dv128", "head_v11_n8_quick")


@pytest.fixture(scope="module")
def numbers(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "llama" / "golden.json").read_text())


def load(golden: Path, name: str) -> tuple[Target, SpeculationHead]:
    target = load_target(golden / "llama" / "target")
    return target, load_head(golden / "llama" / f"{name}.pt", target)


@pytest.mark.parametrize("name", HEADS)
def test_draft_logits_equal_the_published_training_pass(golden: Path, numbers: dict[str, Any], name: str) -> None:
    target, head = load(golden, name)
    expected = np.load(golden / "llama" / "training_logits_fp32.npz")
    keys = [key for key in expected.files if key.startswith(f"{name}.p")]
    assert keys
    worst = 0.0
    for key in keys:
        prompt = numbers["prompts"][int(key.removeprefix(f"{name}.p").split(".")[0])]
        logits = draft_logits(target, head, torch.tensor([prompt]), restarts=(0,))[0].numpy()
        assert logits.shape == expected[key].shape
        worst = max(worst, float(np.abs(logits - expected[key]).max()))
    print(f"{name}: {len(keys)} prompts, largest difference {worst:.1e}")
    assert worst < 1e-3


@pytest.mark.parametrize("name", HEADS)
def test_greedy_decoding_gives_the_targets_own_text(golden: Path, numbers: dict[str, Any], name: str) -> None:
    target, head = load(golden, name)
    for prompt, expected in zip(numbers["prompts"], numbers["plain_greedy"], strict=True):
        new_tokens = len(expected)
        assert autoregressive_generate(target, prompt, new_tokens, eos_token_id=[]).token_ids == expected
        generation = SpdDecoder(target, head).generate(prompt, new_tokens, eos_token_id=[])
        assert generation.token_ids == expected


@pytest.mark.parametrize("name", HEADS)
def test_blocks_and_first_depths_are_the_published_ones(golden: Path, numbers: dict[str, Any], name: str) -> None:
    _, head = load(golden, name)
    published = numbers["heads"][name]
    assert list(head.staircase.anchors) == published["aggr_feature_bound"]
    assert list(head.staircase.block_of_depth) == published["stage_depth_to_aggr_idx"]
    for block, depth in zip(head.staircase.reachable_blocks, head.staircase.first_depths, strict=True):
        assert published["aggr_to_min_depth"][block] == depth


def test_a_trained_head_needs_no_more_cycles_than_published_and_drifts_in_no_verdict(
    golden: Path, numbers: dict[str, Any]
) -> None:
    target, head = load(golden, "head_v11_n8_quick")
    runs = numbers["golden_accept"]
    decoder, generations = SpdDecoder(target, head), []
    for run in runs:
        prompt = run["prompt"]
        generation = decoder.generate(prompt, len(run["ids"]), eos_token_id=[])
        assert generation.token_ids == run["ids"] == run["plain_greedy"]
        tokens = torch.tensor([prompt + generation.token_ids])
        logits = draft_logits(target, head, tokens, restarts=generation.restart_positions)[0]
        drafts = logits.argmax(-1)[len(prompt) : -1].tolist()
        flags = [draft == token for draft, token in zip(drafts, generation.token_ids[1:], strict=True)]
        assert flags == generation.accepted_flags
        generations.append(generation)
    pooled = Pooled.of(generations, head.staircase.num_stages)
    published = sum(run["decode_loop_steps"] for run in runs)
    print(f"{pooled.cycles} cycles, published {published}; acceptance {pooled.acceptance:.3f}")
    assert pooled.cycles <= 1.02 * published
    assert pooled.acceptance is not None and 0.2 < pooled.acceptance < 0.9, "a real mix of both verdicts"
