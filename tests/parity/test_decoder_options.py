"""Lossless whatever is switched on: every combination of the decoder's options with every kind of head.

Greedy decoding and trees are compared token by token with plain decoding; sampling by a chain is judged by the target's
laws (`certify`, whose power tests/parity/test_certificate.py shows). The static engine, which graphs are captured from,
must take every step as the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from spd_lightning.decoding.certificate import certify
from spd_lightning.decoding.checks import drift
from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
from spd_lightning.decoding.graph import GraphDecoder
from spd_lightning.decoding.sampling import Sampling
from spd_lightning.decoding.tree import Tree, TreeDecoder
from spd_lightning.head.loading import new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.target import Target

SPLITS: list[dict[str, Any]] = [{"num_stages": 4}, {"stage_layers": [1, 0, 2, 1]}]
VOCABULARIES = (None, tuple(range(0, 60, 2)))
KINDS = ("qwen3", "target")
NORMS = (False, True)
HEADS = list(product(SPLITS, VOCABULARIES, KINDS, NORMS))

SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 8, "top_p": 0.9}]
TREES = [Tree(width, 2.0, late, gate) for width, late, gate in product((1, 3, 5), (False, True), (0.0, 0.05))]
ENDS: list[list[int]] = [[], [7, 11, 23]]
PROMPTS = ([5], [9, 8, 7, 6, 5])
NEW = 8


def models(make_target: Callable[..., Target], index: int) -> tuple[Target, SpeculationHead]:
    split, ids, kind, norm = HEADS[index]
    layers = 1 + index.bit_count() % 2  # beside each of the others as often as not
    target = make_target("qwen3", 4, seed=index, spread=0.05, embedding_scale=4.0, dtype=torch.float64, **split)
    head = new_head(target, layers, draft_token_ids=ids, kind=kind, anchor_norm=norm, seed=index)
    return target, head.double().eval()


@pytest.mark.parametrize("index", range(len(HEADS)))
def test_every_tree_says_what_plain_decoding_says(make_target: Callable[..., Target], index: int) -> None:
    target, head = models(make_target, index)
    accepted = 0
    for sampling, (ends, prompt) in product(SAMPLINGS, zip(ENDS, PROMPTS, strict=True)):
        settings = sampling | {"eos_token_id": ends, "seed": index}
        plain = autoregressive_generate(target, prompt, NEW, coupled=True, **settings).token_ids
        for tree in TREES:
            found = TreeDecoder(target, head, tree).generate(prompt, NEW, **settings)
            assert found.token_ids == plain, (tree, settings)
            accepted += found.drafts_accepted
    assert accepted > 0


@pytest.mark.parametrize("index", range(len(HEADS)))
def test_every_chain_says_what_the_target_says(make_target: Callable[..., Target], index: int) -> None:
    target, head = models(make_target, index)
    chain = SpdDecoder(target, head)
    for ends, prompt in product(ENDS, PROMPTS):
        plain = autoregressive_generate(target, prompt, NEW, eos_token_id=ends).token_ids
        found = chain.generate(prompt, NEW, eos_token_id=ends)
        assert found.token_ids == plain
        assert not drift(target, head, prompt, found)
    law = [Sampling(**sampling) for sampling in SAMPLINGS if sampling]
    assert certify(target, head, [*PROMPTS, [index, 1, 2]], 16, settings=law).holds


@pytest.mark.parametrize("index", range(len(HEADS)))
def test_the_static_engine_takes_every_step_of_the_plain_one(make_target: Callable[..., Target], index: int) -> None:
    target, head = models(make_target, index)
    chain, static = SpdDecoder(target, head), GraphDecoder(target, head)
    for sampling, ends, prompt in product(SAMPLINGS, ENDS, PROMPTS):
        settings = sampling | {"eos_token_id": ends, "seed": index}
        one, other = (decoder.generate(prompt, NEW, **settings) for decoder in (chain, static))
        assert (one.token_ids, one.cycles, one.restart_positions) == (
            other.token_ids, other.cycles, other.restart_positions,
        )  # fmt: skip
