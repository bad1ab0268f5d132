"""Packed rows are exactly the documents alone: states, losses, statistics and gradients, per family that packs."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from spd_lightning.data.batches import Batch, collate, is_packed, position_ids
from spd_lightning.data.chat import Sample
from spd_lightning.errors import InputError
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.families import layer_kinds, packing_refusal
from spd_lightning.target.target import Target
from spd_lightning.training.module import SpdModule

from .common import build, every_family
from .test_training import VOCABULARY, module_for, padded

#: Longer than any tiny sliding window, and short ones that share a tile of the head's attention with their neighbours.
LENGTHS = (23, 3, 9, 2, 31, 14, 5, 40)
ROWS = ((0, 1, 2, 3), (4, 5), (6, 7))


def documents(seed: int) -> list[Sample]:
    """Random documents of two turns, or one where they are short."""
    draw, made = random.Random(seed), []
    for number, length in enumerate(LENGTHS):
        first = draw.randint(1, max(1, length // 3))
        turns = ((first, length),) if length < 9 else ((first, length // 2), (length // 2 + 1, length))
        ids = np.array([draw.randrange(VOCABULARY) for _ in range(length)], np.int32)
        made.append(Sample(number, ids, turns))
    return made


def packed(samples: list[Sample], length: int = 48) -> Batch:
    return collate([[samples[i] for i in row] for row in ROWS], length)


def gradients(head: SpeculationHead) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    head.zero_grad()
    return found


def grouped(target: Target) -> bool:
    """Whether it has experts, whose grouped multiplication knows no float64."""
    return any("experts" in name for name, _ in target.model.named_modules())


def tolerance(module: SpdModule) -> dict[str, float]:
    """Of float64 targets, some of which (Gemma 2) take their softmax in float32; losses are float32 everywhere."""
    return {"rtol": 1e-3, "atol": 1e-4} if grouped(module.parts()[0]) else {"rtol": 1e-5, "atol": 2e-6}


def packs(make_target: Callable[..., Target], family: str, seed: int) -> SpdModule | None:
    """A module; None where the family cannot pack, after its refusal was seen."""
    target = build(make_target, family, (1, 2, 1, 1), seed=seed)
    if not grouped(target):
        target.double()
    module = module_for(target, num_layers=2)
    if "linear_attention" not in layer_kinds(target.config):
        assert packing_refusal(target.config, None) is None
        return module
    refusal = packing_refusal(target.config, None)
    assert refusal is not None and "recurrent" in refusal and family in refusal
    with pytest.raises(InputError, match="recurrent layers"):
        module.loss(packed(documents(0)), statistics=False)
    return None


@every_family
def test_a_packed_batch_has_the_states_of_its_documents_alone(make_target: Callable[..., Target], family: str) -> None:
    module = packs(make_target, family, seed=5)
    if module is None:
        return
    samples = documents(1)
    batch = packed(samples)
    assert is_packed(batch) and not is_packed(padded(samples))
    target, head = module.parts()
    states, last = target(batch["input_ids"], head.config.anchors, position_ids(batch), batch["documents"])
    for sample, start, length in zip(samples, batch["starts"].tolist(), batch["lengths"].tolist(), strict=True):
        alone, alone_last = target(torch.from_numpy(sample.ids).long()[None], head.config.anchors)
        for together, single in zip([*states, last], [*alone, alone_last], strict=True):
            here = together.flatten(0, 1)[start : start + length]
            torch.testing.assert_close(here, single[0], **tolerance(module))


@every_family
def test_a_packed_batch_has_the_loss_statistics_and_gradients_of_its_documents_alone(
    make_target: Callable[..., Target], family: str
) -> None:
    module = packs(make_target, family, seed=6)
    if module is None:
        return
    samples, (_, head) = documents(2), module.parts()
    loss, table = module.loss(packed(samples), statistics=True)
    loss.backward()
    together = gradients(head)
    total, supervised, tables = torch.zeros(()), 0, torch.zeros_like(table)
    for sample in samples:
        mean, part = module.loss(padded([sample]), statistics=True)
        count = sample.labels - len(sample.turns)  # the first token of a turn is never drafted
        total, supervised, tables = total + mean * count, supervised + count, tables + part
    (total / supervised).backward()
    assert loss.item() == pytest.approx((total / supervised).item(), rel=tolerance(module)["rtol"])
    torch.testing.assert_close(table, tables, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients(head).items():
        torch.testing.assert_close(together[name], gradient, **tolerance(module), msg=name)


def test_what_stands_beside_a_document_and_the_order_in_a_row_change_nothing(
    make_target: Callable[..., Target],
) -> None:
    module = packs(make_target, "llama", seed=7)
    assert module is not None
    samples = documents(3)
    backwards = collate([[samples[i] for i in reversed(row)] for row in reversed(ROWS)], 48)
    first = module.loss(packed(samples), statistics=True)
    second = module.loss(backwards, statistics=True)
    assert first[0].item() == pytest.approx(second[0].item(), rel=1e-10)
    torch.testing.assert_close(first[1], second[1], rtol=1e-9, atol=1e-9)
