"""Every family trains: the loss of the training module falls, every trained parameter moves, the target stays.

The module's own `loss` on hand-made batches of conversations with two turns, so nothing but Lightning's loop is left
out, which tests/training covers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from parity.test_lossless import VOCABULARY
from torch import Tensor

from spd_lightning.data.batches import Batch, collate, supervised_positions
from spd_lightning.data.chat import Sample
from spd_lightning.head.layout import StaircaseLayout
from spd_lightning.head.loading import new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.target import Target
from spd_lightning.training.losses import draft_kl
from spd_lightning.training.module import SpdModule

from .common import build, every_family

STEPS = 12


def two_turns(count: int, seed: int) -> list[Sample]:
    """Random texts of different lengths with a supervised part of each of two turns; the second fills any pipeline."""
    draw, samples = random.Random(seed), []
    for number in range(count):
        length, starts = draw.randint(24, 32), (draw.randint(1, 4), draw.randint(8, 10))
        ids = np.array([draw.randrange(VOCABULARY) for _ in range(length)], np.int32)
        samples.append(Sample(number, ids, ((starts[0], starts[0] + 4), (starts[1], length))))
    return samples


def padded(samples: list[Sample]) -> Batch:
    """One sample per row."""
    return collate([[sample] for sample in samples])


def unmoved(head: SpeculationHead, before: dict[str, Tensor]) -> list[str]:
    return [name for name, parameter in head.named_parameters() if torch.equal(parameter, before[name])]


def module_for(target: Target, **options: Any) -> SpdModule:
    """The training module with a target that is in memory already."""
    assert target.stage_layers is not None
    module = SpdModule(target="in memory", stage_layers=list(target.stage_layers), restart_rate=0.1)
    module.target, module.head = target, new_head(target, **options)
    return module


def train(module: SpdModule, batch: Batch, steps: int, rate: float = 3e-3) -> list[float]:
    _, head = module.parts()
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss, table = module.loss(batch, statistics=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert int(table[:, 0].sum()) > 0
    return losses


@every_family
@pytest.mark.parametrize("kind", ["qwen3", "target"])
def test_training_lowers_the_loss_moves_every_weight_of_the_head_and_none_of_the_target(
    make_target: Callable[..., Target], family: str, kind: str
) -> None:
    target = build(make_target, family, (1, 2, 1, 1), seed=2)
    module = module_for(target, num_layers=2, kind=kind, draft_token_ids=range(0, VOCABULARY, 2))
    _, head = module.parts()
    frozen = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    losses = train(module, padded(two_turns(3, seed=1)), STEPS)
    print(f"{family}, {kind}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.9 * losses[0] and all(loss == loss for loss in losses)
    assert unmoved(head, before) == ["norm.weight"], "everything but the target's norm is trained"
    for name, tensor in target.model.state_dict().items():
        assert torch.equal(tensor, frozen[name]), name
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in target.parameters())


@every_family
def test_the_loss_is_that_of_the_logits_which_decoding_compares(
    make_target: Callable[..., Target], family: str
) -> None:
    """Soft-caps and norms included: the divergence of `head.logits` from the target's own logits."""
    target = build(make_target, family, (1, 2, 1, 1), seed=4)
    module = module_for(target, num_layers=1, draft_token_ids=range(0, VOCABULARY, 2))
    _, head = module.parts()
    with torch.no_grad():
        head.lm_head.weight.mul_(1.5)
    batch = padded(two_turns(2, seed=5))
    loss, _ = module.loss(batch, statistics=False)
    with torch.no_grad():
        states, _ = target(batch["input_ids"], head.config.anchors)
        drafts = head.logits(head(states, StaircaseLayout(head.staircase, module.entry_cycles(batch)), dense=True))
        teacher = target.model(batch["input_ids"], use_cache=False).logits
        select = supervised_positions(batch)
        expected = draft_kl(drafts[select], teacher[select], head.draft_token_ids).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@every_family
def test_a_longer_neighbour_in_the_batch_changes_no_loss(make_target: Callable[..., Target], family: str) -> None:
    """Padding on the right, as batches have it: the sum over both alone is the sum over the batch."""
    module = module_for(build(make_target, family, (1, 2, 1, 1), seed=3), num_layers=1)
    samples = two_turns(2, seed=4)
    assert len(samples[0]) != len(samples[1])
    _, together = module.loss(padded(samples), statistics=True)
    alone = sum(module.loss(padded([sample]), statistics=True)[1] for sample in samples)
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("layers", [5, 7, 31, 36])
def test_any_depth_trains_on_any_number_of_stages(make_target: Callable[..., Target], layers: int, n: int) -> None:
    target = build(make_target, "llama", n, layers, seed=1, spread=0.25 if layers < 10 else 0.1)
    module = module_for(target, num_layers=1)
    _, head = module.parts()
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    losses = train(module, padded(two_turns(2, seed=n)), 2)
    assert losses[1] < losses[0]
    assert unmoved(head, before) == ["norm.weight"]
