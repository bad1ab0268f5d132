"""Muon beside AdamW as one optimizer, and how the learning rate runs."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spd_lightning.training.optimizers import MuonAdamW, scheduled


def made(model: nn.Module, rate: float = 0.02, apart: float = 0.01) -> MuonAdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return MuonAdamW(groups, rate, apart, apart=[matrices[-1]])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step % 4))
        loss = (model(x) - x[:, :3].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_muon_takes_matrices_but_the_one_apart_and_adamw_the_rest() -> None:
    model = network()
    optimizer = made(model)
    muon, adamw = optimizer.parts
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(16, 8), (8, 16)]
    assert [[tuple(p.shape) for p in g["params"]] for g in adamw.param_groups] == [[(3, 8)], [(16,), (8,), (3,)]]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.0]
    losses = train(model, optimizer, 60)
    assert losses[-1] < 0.3 * losses[0]


def test_a_step_is_that_of_the_two_optimizers_by_themselves() -> None:
    ours, theirs = network(), network()
    optimizer = made(ours)
    matrices, others = [p for p in theirs.parameters() if p.ndim == 2], [p for p in theirs.parameters() if p.ndim < 2]
    alone: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices[:-1], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": matrices[-1:], "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=0.01, betas=(0.9, 0.95),
        ),
    ]  # fmt: skip

    class Both(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(list(theirs.parameters()), {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for one in alone:
                one.step()

    assert train(ours, optimizer, 5) == train(theirs, Both(), 5)
    assert all(a.equal(b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_what_is_saved_and_loaded_goes_on_as_if_nothing_had_happened() -> None:
    model = network()
    optimizer = made(model)
    train(model, optimizer, 7)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, 5, start=7)
    again = network()
    again.load_state_dict(weights)
    resumed = made(again, rate=0.5)
    resumed.load_state_dict(state)
    assert train(again, resumed, 5, start=7) == expected


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_rises_to_its_peak_and_falls_to_its_end(schedule: str) -> None:
    optimizer = made(network(), rate=1.0, apart=0.5)
    settings = SimpleNamespace(warmup=0.1, final_learning_rate=0.2, schedule=schedule)
    scheduler, values = scheduled(optimizer, settings, 100), []
    for _ in range(101):
        muon, *adamw = (group["lr"] for group in optimizer.param_groups)
        assert all(rate == pytest.approx(muon / 2) for rate in adamw), "each part has its own peak"
        values.append(muon)
        optimizer.step()
        scheduler.step()
    assert values[0] <= 0.2 and values[10] == pytest.approx(1.0) and values[100] == pytest.approx(0.2)
    assert values[10:] == sorted(values[10:], reverse=True)
    half = {"linear": 0.6, "cosine": 0.6}[schedule]
    assert values[55] == pytest.approx(half, abs=0.01)
    assert (abs(values[30] - (1 - 0.8 * 20 / 90)) < 1e-6) == (schedule == "linear")
