"""Where training sequences restart: drawn by seed, epoch, sample and draw alone, as often as asked for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from module_cases import padded, random_samples

from spd_lightning.data.batches import Batch, Share, collate, position_ids, supervised_positions
from spd_lightning.data.chat import Sample
from spd_lightning.errors import InputError
from spd_lightning.head.layout import StaircaseLayout
from spd_lightning.staircase import entry_cycles
from spd_lightning.training.module import HeadOptions, SpdModule


def gaps(module: SpdModule, samples: Sequence[Sample], epoch: int = 0) -> dict[int, list[int]]:
    """Gaps after position 0 by sample, as the module draws them for these samples in one batch."""
    entries = module.entry_cycles(padded(samples, epoch))
    return {sample.index: entries[row, : len(sample.ids)].diff().tolist() for row, sample in enumerate(samples)}


def test_restarts_do_not_depend_on_the_batch_or_on_padding(make_module: Callable[..., SpdModule]) -> None:
    module, samples = make_module(), random_samples(6, 0)
    together = gaps(module, samples)
    assert gaps(module, samples[::-1]) == together
    for sample in samples:
        assert gaps(module, [sample])[sample.index] == together[sample.index]


def test_restarts_depend_on_seed_epoch_and_sample(make_module: Callable[..., SpdModule]) -> None:
    module, samples = make_module(), random_samples(3, 0)
    twin = Sample(999, samples[0].ids, samples[0].turns)
    torch.manual_seed(7)
    first = gaps(module, samples)
    assert first == gaps(make_module(), samples), "another module of the same seed draws the same"
    assert first != gaps(module, samples, epoch=1) and first != gaps(make_module(seed=1), samples)
    assert gaps(module, [twin])[999] != first[samples[0].index], "another sample of the same text draws anew"


@pytest.mark.parametrize("rate", [0.0, 0.15, 0.6, 1.0])
def test_the_observed_rate_is_the_restart_rate(make_module: Callable[..., SpdModule], rate: float) -> None:
    module = make_module(restart_rate=rate)
    samples = [Sample(i, np.ones(200, np.int32), ((5, 200),)) for i in range(60)]
    drawn = [gap for row in gaps(module, samples).values() for position, gap in enumerate(row, 1) if position != 5]
    assert set(drawn) <= {1, 4}
    observed = sum(gap == 4 for gap in drawn) / len(drawn)
    assert observed == pytest.approx(rate, abs=4 * (rate * (1 - rate) / len(drawn)) ** 0.5)


def test_every_turn_begins_with_a_restart(make_module: Callable[..., SpdModule]) -> None:
    module = make_module(restart_rate=0.0)
    for sample, row in zip(random_samples(5, 1), gaps(module, random_samples(5, 1)).values(), strict=True):
        assert [position for position, gap in enumerate(row, 1) if gap == 4] == [start for start, _ in sample.turns]


def test_entry_cycles_are_those_of_the_staircase(make_module: Callable[..., SpdModule]) -> None:
    module, samples = make_module(), random_samples(4, 2)
    entries = module.entry_cycles(padded(samples, epoch=3))
    for row, sample in enumerate(samples):
        found = entries[row, : len(sample.ids)].tolist()
        steps = [4, *gaps(module, samples, epoch=3)[sample.index]]
        assert [entry - found[0] for entry in found] == entry_cycles(steps)


def test_published_restarts_are_saturated_or_show_every_fill_alike(make_module: Callable[..., SpdModule]) -> None:
    module = make_module(restarts="published", restart_rate=0.9)
    samples = [Sample(i, np.ones(121, np.int32), ((1, 121),)) for i in range(200)]
    kinds = {"saturated": 0, "all fills": 0}
    fills = torch.zeros(5)
    for row in gaps(module, samples).values():
        places = [position for position, gap in enumerate(row, 1) if gap == 4 and position > 1]
        kinds["all fills" if places else "saturated"] += 1
        assert {b - a for a, b in itertools.pairwise(places)} <= {4}
        if places:
            entries = torch.tensor([entry_cycles([4, *row])])
            fills += torch.bincount(StaircaseLayout(module.parts()[1].staircase, entries).fills()[0], minlength=5)
    assert abs(kinds["saturated"] - 100) < 30
    assert fills[1:].max() < 1.1 * fills[1:].min(), "1 to n alike"


def test_validation_draws_restarts_however_training_sets_them(make_module: Callable[..., SpdModule]) -> None:
    published, drawn = make_module(restarts="published").eval(), make_module().eval()
    samples = random_samples(4, 3)
    assert gaps(published, samples) == gaps(drawn, samples)
    assert gaps(published.train(), samples) != gaps(drawn, samples)


def test_every_draw_of_restarts_is_another_one(make_module: Callable[..., SpdModule]) -> None:
    module, batch = make_module(restart_draws=3), padded(random_samples(4, 5))
    first, second, third = (module.entry_cycles(batch, draw) for draw in range(3))
    assert torch.equal(first, make_module().entry_cycles(batch)), "the first is the one of a single draw"
    assert not torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.parametrize("vocabulary", [None, range(0, 300, 2)], ids=["whole", "half"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("seed", range(2))
def test_each_draw_restarts_where_drafts_of_the_one_before_are_rejected(
    make_module: Callable[..., SpdModule],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    seed: int,
    packed: bool,
    vocabulary: range | None,
) -> None:
    """With a chance of 1 - min(1, Q(x) / P(x)) before a drafted token x, Q at the layout of the draw before."""
    options = HeadOptions()
    if vocabulary is not None:
        (tmp_path / "vocabulary.json").write_text(json.dumps({"token_ids": list(vocabulary)}))
        options = HeadOptions(draft_vocabulary=str(tmp_path / "vocabulary.json"))
    module = make_module(restarts="rejected", restart_draws=3, restart_rate=0.4, head=options)
    samples = random_samples(4, seed)
    batch = collate([samples[:2], samples[2:]], share=Share.of(samples)) if packed else padded(samples)
    target, head = module.parts()
    asked: list[tuple[torch.Tensor | None, torch.Tensor]] = []
    original = module.entry_cycles

    def entry_cycles(batch: Batch, draw: int = 0, rates: torch.Tensor | None = None) -> torch.Tensor:
        asked.append((rates, original(batch, draw, rates)))
        return asked[-1][1]

    monkeypatch.setattr(module, "entry_cycles", entry_cycles)
    module.loss(batch, statistics=False)
    (none, first), *others = asked
    assert none is None and torch.equal(first, original(batch, 0)) and len(others) == 2
    documents, positions = (batch["documents"], position_ids(batch)) if packed else (None, None)
    states, last = target(batch["input_ids"], head.config.anchors, positions, documents)
    before = first
    for draw, (rates, entries) in enumerate(others, 1):
        assert rates is not None
        with torch.no_grad():
            layout = StaircaseLayout(head.staircase, before, documents)
            P = target.logits(last).softmax(-1)
            Q = torch.zeros_like(P)
            Q[..., list(vocabulary or range(300))] = head.logits(head(states, layout, positions)).softmax(-1)
        expected = torch.full(rates.shape, 0.4)
        for row, at in supervised_positions(batch).nonzero().tolist():
            token = batch["input_ids"][row, at + 1]
            expected[row, at + 1] = 1 - min(1.0, float(Q[row, at, token] / P[row, at, token]))
        torch.testing.assert_close(rates, expected, rtol=0, atol=1e-5)
        assert torch.equal(entries, original(batch, draw, rates)) and not torch.equal(entries, before)
        before = entries


def test_tokens_restart_as_often_as_their_rates_say(make_module: Callable[..., SpdModule]) -> None:
    module = make_module()
    samples = [Sample(i, np.ones(200, np.int32), ((5, 200),)) for i in range(60)]
    batch = padded(samples)
    rates = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    restarts = module.entry_cycles(batch, 1, rates)[:, 6:].diff() == 4
    for low in (0.0, 0.25, 0.5, 0.75):
        band = (rates[:, 7:] >= low) & (rates[:, 7:] < low + 0.25)
        assert restarts[band].float().mean() == pytest.approx(float(rates[:, 7:][band].mean()), abs=0.04)


def test_validation_asks_nothing_of_drafts(
    make_module: Callable[..., SpdModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(restarts="rejected", restart_draws=2).eval()
    monkeypatch.setattr(module, "_verdicts", lambda *unused: pytest.fail("nobody reads them"))
    module.loss(padded(random_samples(3, 0)), statistics=True)


def test_rejected_drafts_need_a_draw_before_them(make_module: Callable[..., SpdModule]) -> None:
    with pytest.raises(InputError, match=r"model\.restarts=rejected with model\.restart_draws=1: expected at least 2"):
        make_module(restarts="rejected", configured=False)
