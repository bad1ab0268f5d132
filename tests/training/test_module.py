"""SpdModule: loss, statistics, what is trained and saved, and that training raises real acceptance."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from module_cases import VOCABULARY, padded, random_samples
from torch import Tensor
from torch.utils.data import DataLoader

from spd_lightning.data.batches import Batch, Share, collate, supervised_positions
from spd_lightning.data.chat import Sample
from spd_lightning.decoding.decoder import SpdDecoder
from spd_lightning.decoding.generation import Pooled
from spd_lightning.errors import InputError
from spd_lightning.head.layout import StaircaseLayout
from spd_lightning.head.loading import load_head, new_head
from spd_lightning.target.loading import Loading
from spd_lightning.training.losses import COLUMNS, Loss
from spd_lightning.training.metrics import DraftStatistics
from spd_lightning.training.module import HeadOptions, SpdModule


def perturbed(module: SpdModule, seed: int = 0) -> SpdModule:
    """Random weights on top of the initial ones: a fresh head's W_k are identities, which hide errors."""
    generator = torch.Generator().manual_seed(seed)
    _, head = module.parts()
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.lines.append({"step": float(step or 0), **metrics})

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


def fit(module: SpdModule, samples: Sequence[Sample], batch_size: int, **options: Any) -> L.Trainer:
    """A real Trainer over samples in their order."""
    loader: DataLoader[Batch] = DataLoader(list(samples), batch_size=batch_size, collate_fn=padded)  # type: ignore[arg-type]
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "max_epochs": -1,
    }
    ckpt_path = options.pop("ckpt_path", None)
    trainer = L.Trainer(**(settings | options))
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


# -- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"loss": Loss(deeper_rows=0.3)}, {"restarts": "published"}, {"restarts": "rejected"}],
    ids=str,
)
def test_the_loss_of_several_draws_is_their_mean(make_module: Callable[..., SpdModule], options: dict) -> None:
    """Value, gradients and statistics; in validation there is one draw."""
    batch, seen = padded(random_samples(5, 6)), []
    several = make_module(restart_draws=3, **options)
    single = make_module(**{name: value for name, value in options.items() if value != "rejected"})
    draws: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        drawn = several.entry_cycles
        patch.setattr(several, "entry_cycles", lambda *about: draws.append(drawn(*about)) or draws[-1])
        several.loss(batch, statistics=False)
    for entries in draws:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(single, "entry_cycles", lambda *_, entries=entries: entries)
            loss, table = single.loss(batch, statistics=True)
            (loss / 3).backward()
            seen.append((loss.detach(), table))
    loss, table = several.loss(batch, statistics=True)
    loss.backward()
    torch.testing.assert_close(loss.detach(), sum(one for one, _ in seen) / 3)
    torch.testing.assert_close(table, sum(one for _, one in seen) / 3)
    for ours, theirs in zip(several.parameters(), single.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(several.eval().loss(batch, True)[0], single.eval().loss(batch, True)[0])


def straightforward(module: SpdModule, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by definition: dense masks, all logits, the library's KL, position by position."""
    target, head = module.parts()
    states, last = target(batch["input_ids"], head.config.anchors)
    layout = StaircaseLayout(head.staircase, module.entry_cycles(batch))
    head.zero_grad()
    log_q = head.logits(head(states, layout, dense=True)).log_softmax(-1)
    ids = head.config.draft_token_ids or range(VOCABULARY)
    log_p = target.model(batch["input_ids"]).logits[..., list(ids)].log_softmax(-1)
    terms = []
    for row, (length, labelled, starts) in enumerate(
        zip(batch["lengths"].tolist(), batch["labelled"], batch["turn_starts"], strict=True)
    ):
        for t in range(length - 1):
            if labelled[t + 1] and not starts[t + 1]:
                terms.append(F.kl_div(log_q[row, t], log_p[row, t], reduction="sum", log_target=True))
    loss = torch.stack(terms).mean()
    loss.backward()
    return loss.detach(), gradients(module)


def gradients(module: SpdModule) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.parts()[1].named_parameters() if p.grad is not None}


@pytest.mark.parametrize("vocabulary", [False, True], ids=["all ids", "a draft vocabulary"])
def test_the_loss_is_the_mean_kl_at_supervised_positions_in_value_and_gradient(
    make_module: Callable[..., SpdModule], tmp_path: Path, vocabulary: bool
) -> None:
    path = None
    if vocabulary:
        path = tmp_path / "vocabulary.json"
        path.write_text(json.dumps({"token_ids": sorted(random.Random(0).sample(range(VOCABULARY), 40))}))
    options = HeadOptions(draft_vocabulary=path and str(path))
    module = make_module(loading=Loading(dtype="float64"), loss_chunk=7, head=options)
    module.head = perturbed(module).parts()[1].double()
    batch = padded(random_samples(4, 3), epoch=2)
    expected, expected_gradients = straightforward(module, batch)
    module.parts()[1].zero_grad()
    loss, _ = module.loss(batch, statistics=False)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, atol=1e-10, rtol=1e-10)
    found = gradients(module)
    assert found.keys() == expected_gradients.keys() == trained_names(module)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-10, rtol=1e-8, msg=name)
        assert gradient.abs().max() > 0, f"{name} learns nothing from this batch"


def test_deeper_rows_add_the_mean_loss_of_the_same_tokens(make_module: Callable[..., SpdModule]) -> None:
    """By definition: every row through the dense training view, each against the target's law of the next token."""
    batch, found = padded(random_samples(3, 4), epoch=1), {}
    for weight in (0.0, 0.7):
        module = perturbed(make_module(loading=Loading(dtype="float64"), loss=Loss(deeper_rows=weight)))
        module.head = module.parts()[1].double()
        target, head = module.parts()
        loss, table = module.loss(batch, statistics=True)
        found[weight] = (float(loss), table)
    states, _ = target(batch["input_ids"], head.config.anchors)
    layout = StaircaseLayout(head.staircase, module.entry_cycles(batch))
    log_q = head.logits(head(states, layout, dense=True, all_rows=True)).log_softmax(-1)
    log_p = target.model(batch["input_ids"]).logits.log_softmax(-1)
    chosen = supervised_positions(batch)
    kl = (log_p.exp()[:, None] * (log_p[:, None] - log_q)).sum(-1)[:, 1:].mean(1)[chosen].mean()
    assert found[0.7][0] - found[0.0][0] == pytest.approx(0.7 * kl.item(), abs=1e-9)
    torch.testing.assert_close(found[0.7][1], found[0.0][1], msg="statistics are of the rows that draft")


@pytest.mark.parametrize("deeper", [0.0, 0.6])
def test_hidden_states_are_drawn_to_those_that_the_targets_lm_head_reads(
    make_module: Callable[..., SpdModule], deeper: float
) -> None:
    """By definition: transformers' last hidden state, and every row through the dense training view."""
    batch, found = padded(random_samples(3, 4), epoch=1), {}
    for weight in (0.0, 0.7):
        loss = Loss(hidden=weight, deeper_rows=deeper)
        module = perturbed(make_module(loading=Loading(dtype="float64"), loss=loss))
        module.head = module.parts()[1].double()
        target, head = module.parts()
        found[weight], table = module.loss(batch, statistics=False)
        column = COLUMNS.index("loss")
        if not deeper:
            assert float(table[:, column].sum() / table[:, 0].sum()) == pytest.approx(found[weight].item())
    wanted = target.model.model(batch["input_ids"]).last_hidden_state[:, None]
    states, _ = target(batch["input_ids"], head.config.anchors)
    layout = StaircaseLayout(head.staircase, module.entry_cycles(batch))
    rows = head.norm(head(states, layout, dense=True, all_rows=True))  # [B, m, S, H]
    apart = (rows - wanted).square().sum(-1) / wanted.square().sum(-1)
    chosen = supervised_positions(batch)
    expected = apart[:, 0][chosen].mean() + deeper * apart[:, 1:].mean(1)[chosen].mean()
    assert (found[0.7] - found[0.0]).item() == pytest.approx(0.7 * expected.item(), abs=1e-9)


def test_a_head_of_one_block_has_no_deeper_rows_to_train(make_module: Callable[..., SpdModule]) -> None:
    batch, losses = padded(random_samples(3, 4)), []
    for weight in (0.0, 0.7):
        module = make_module(head=HeadOptions(anchors=[0]), loss=Loss(deeper_rows=weight))
        losses.append(float(module.loss(batch, statistics=False)[0]))
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_new_head_with_normed_anchors_drafts_from_embeddings_of_their_own_size(
    make_target: Callable[..., Any], name: str
) -> None:
    target = make_target(name, num_layers=4).partition(num_stages=4)
    states, _ = target(torch.arange(10, 30)[None], (0, 4))
    plain, normed = (new_head(target, anchors=(0, 4), anchor_norm=norm) for norm in (False, True))
    for loud in (1.0, 100.0):  # a norm forgets how loud a state was, the embedding comes back as it was on average
        rows = normed.aggregation[0](states[0] * loud)
        torch.testing.assert_close(rows.square().mean().sqrt(), states[0].square().mean().sqrt(), rtol=0.1, atol=0)
    torch.testing.assert_close(plain.aggregation[0](states[0]), states[0])
    deep = normed.aggregation[1](torch.cat(list(states), -1))
    torch.testing.assert_close(deep.square().mean(-1).sqrt(), torch.ones(1, 20), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"restarts": "some"}, "model.restarts='some': expected drawn, rejected or published"),
        ({"restart_draws": 0}, "model.restart_draws=0: expected at least 1"),
        ({"optimizer": "sgd"}, "model.optimizer='sgd': expected adamw or muon"),
        ({"schedule": "step"}, "model.schedule='step': expected cosine or linear"),
        ({"adamw_learning_rate": 0.0}, "model.adamw_learning_rate=0.0: expected a positive"),
    ],
)
def test_unknown_choices_are_named(make_module: Callable[..., SpdModule], options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make_module(configured=False, **options)


def test_a_batch_without_a_supervised_position_has_no_loss_and_no_gradient(
    make_module: Callable[..., SpdModule],
) -> None:
    module = make_module()
    batch = padded([Sample(0, np.array([1, 2, 3]), ((2, 3),))])
    loss, table = module.loss(batch, statistics=True)
    loss.backward()
    assert loss.item() == 0 and table.sum() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(module).values())


@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_of_a_global_batch_do_not_depend_on_how_it_is_cut(
    make_module: Callable[..., SpdModule], seed: int
) -> None:
    """Into micro-batches of any sizes, padded or packed: the mean of the parts is the whole."""
    draw = random.Random(seed)
    module = make_module(loading=Loading(dtype="float64"), loss_chunk=7, loss=Loss(hidden=seed % 2))
    module.head = perturbed(module).parts()[1].double()
    samples = random_samples(9, seed)
    whole, _ = module.loss(padded(samples, epoch=1), statistics=False)
    whole.backward()
    expected = gradients(module)
    module.parts()[1].zero_grad()
    cuts = sorted(draw.sample(range(1, 9), 3))
    parts = [samples[a:b] for a, b in zip([0, *cuts], [*cuts, 9], strict=True)]
    share = Share.of(samples, len(parts), epoch=1)
    means = []
    for number, part in enumerate(parts):
        rows = [part] if number % 2 else [[sample] for sample in part]
        loss, _ = module.loss(collate(rows, share=share), statistics=False)
        (loss / len(parts)).backward()
        means.append(loss.item() / len(parts))
    assert sum(means) == pytest.approx(whole.item(), rel=1e-10)
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-11, rtol=1e-8, msg=name)
    naive = [module.loss(padded(part, epoch=1), statistics=False)[0].item() for part in parts]
    assert abs(sum(naive) / len(parts) - whole.item()) > 1e-4, "a mean of means is something else"


# -- statistics ------------------------------------------------------------------------------------------------------


def statistics(module: SpdModule, samples: Sequence[Sample]) -> Tensor:
    with torch.no_grad():
        return module.loss(padded(samples), statistics=True)[1]


def test_two_batches_give_the_statistics_of_their_concatenation(make_module: Callable[..., SpdModule]) -> None:
    module = perturbed(make_module())
    samples = random_samples(7, 4)
    split, whole = DraftStatistics(4), DraftStatistics(4)
    parts = [statistics(module, samples[:1]), statistics(module, samples[1:])]
    for part in parts:
        split.update(part)
    whole.update(statistics(module, samples))
    torch.testing.assert_close(split.table, whole.table, atol=1e-4, rtol=1e-6)
    for name, value in whole.compute().items():
        torch.testing.assert_close(split.compute()[name], value, atol=1e-6, rtol=1e-6, msg=name)
    means = [part.sum(0)[COLUMNS.index("kl")] / part.sum(0)[0] for part in parts]
    assert (sum(means) / 2 - whole.compute()["kl"]).abs() > 1e-3, "a mean of ratios is something else"


def test_padding_changes_no_statistic(make_module: Callable[..., SpdModule]) -> None:
    module = perturbed(make_module())
    samples = random_samples(5, 5)
    alone = torch.stack([statistics(module, [sample]) for sample in samples]).sum(0)
    torch.testing.assert_close(statistics(module, samples), alone, atol=1e-4, rtol=1e-6)
    long = Sample(1, np.arange(60), ((0, 60),))
    beside = statistics(module, [samples[0], long]) - statistics(module, [long])
    torch.testing.assert_close(beside, statistics(module, [samples[0]]), atol=1e-4, rtol=1e-6)


def test_logged_training_statistics_pool_all_micro_batches_of_a_step(make_module: Callable[..., SpdModule]) -> None:
    samples = random_samples(8, 6)
    logger = Memory()
    module = make_module(configured=False, learning_rate=1e-3)
    options: dict[str, Any] = {"logger": logger, "accumulate_grad_batches": 4, "max_steps": 1, "log_every_n_steps": 1}
    fit(module, samples, 2, **options)
    pooled = DraftStatistics(4)
    pooled.update(statistics(make_module(), samples))
    (line,) = [line for line in logger.lines if "train/kl" in line]
    for name, value in pooled.compute().items():
        assert line[f"train/{name}"] == pytest.approx(float(value), abs=1e-5), name


def test_training_statistics_are_logged_at_every_logged_step_and_nowhere_else(
    make_module: Callable[..., SpdModule],
) -> None:
    logger = Memory()
    module = make_module(configured=False)
    samples = random_samples(12, 7)
    fit(module, samples, 2, logger=logger, max_steps=6, log_every_n_steps=3)
    with_statistics = [line for line in logger.lines if "train/top1" in line]
    assert len(with_statistics) == 2
    last = with_statistics[-1]
    assert last["tokens"] == sum(len(sample.ids) for sample in samples) == module.tokens_seen
    assert last["train/kl"] == pytest.approx(last["train/loss"], rel=1e-5), "the same micro-batch, the same mean"


# -- what is trained and saved ---------------------------------------------------------------------------------------


def trained_names(module: SpdModule) -> set[str]:
    """Every trained tensor of a head with 5 anchors and 2 layers, spelled out."""
    layer = {"input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    layer |= {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    names = {f"aggregation.{k}" for k in range(5)} | {f"layers.{i}.{name}" for i in range(2) for name in layer}
    assert module.parts()[1].config.anchors == (0, 1, 2, 3, 4)
    return {f"{name}.weight" for name in names | {"lm_head"}}


@pytest.fixture(scope="module")
def trained(
    make_module: Callable[..., SpdModule], tmp_path_factory: pytest.TempPathFactory
) -> tuple[SpdModule, L.Trainer, Path]:
    """Three steps and their checkpoint."""
    module = make_module(configured=False, weight_decay=0.01)
    trainer = fit(module, random_samples(6, 8), 2, max_steps=3)
    path = tmp_path_factory.mktemp("checkpoint") / "three.ckpt"
    trainer.save_checkpoint(path)
    return module, trainer, path


def test_a_checkpoint_holds_the_head_and_nothing_of_the_target(
    trained: tuple[SpdModule, L.Trainer, Path],
) -> None:
    module, _, path = trained
    content = torch.load(path, weights_only=True)
    wanted = {f"head.{name}" for name in trained_names(module) | {"norm.weight"}}
    assert set(content["state_dict"]) == wanted
    (state,) = content["optimizer_states"]
    assert len(state["state"]) == len(wanted) - 1, "every tensor but the frozen norm"
    assert path.stat().st_size < 4 * 4 * sum(p.numel() for p in module.parts()[1].parameters())
    loaded = load_head(path)
    for name, tensor in module.parts()[1].state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_optimizer_holds_the_trained_tensors_of_the_head_and_decays_matrices_only(
    trained: tuple[SpdModule, L.Trainer, Path],
) -> None:
    module, trainer, _ = trained
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    matrices, vectors = trainer.optimizers[0].param_groups
    found = [[names[id(p)] for p in group["params"]] for group in (matrices, vectors)]
    assert {*found[0], *found[1]} == {f"head.{name}" for name in trained_names(module)}
    assert all("norm" in name for name in found[1]) and not any("norm" in name for name in found[0])
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.01, 0.0)


def test_training_moves_every_trained_tensor_and_neither_norm_nor_target(
    trained: tuple[SpdModule, L.Trainer, Path], make_module: Callable[..., SpdModule]
) -> None:
    (target, head), (old_target, old_head) = trained[0].parts(), make_module().parts()
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, old_target.state_dict()[name]), name
    unchanged = {name for name, t in head.state_dict().items() if torch.equal(t, old_head.state_dict()[name])}
    assert unchanged == {"norm.weight"} and torch.equal(head.norm.weight, target.norm.weight)
    assert not any(parameter.requires_grad for parameter in target.parameters()) and not target.model.training


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("wrong", ["head.lm_head.weight", "head.layers.9.mlp.up_proj.weight"])
def test_resuming_with_a_missing_or_a_foreign_head_tensor_is_refused(
    trained: tuple[SpdModule, L.Trainer, Path], make_module: Callable[..., SpdModule], tmp_path: Path, wrong: str
) -> None:
    content = torch.load(trained[2], weights_only=True)
    if content["state_dict"].pop(wrong, None) is None:
        content["state_dict"][wrong] = torch.zeros(2)
    torch.save(content, tmp_path / "wrong.ckpt")
    module = make_module(configured=False)
    message = refusal(lambda: fit(module, random_samples(6, 8), 2, max_steps=4, ckpt_path=tmp_path / "wrong.ckpt"))
    assert wrong in message and "checkpoint" in message


@pytest.mark.parametrize(
    "options", [{"head": HeadOptions(num_layers=1)}, {"head": HeadOptions(anchors=[0, 4])}, {"num_stages": 2}]
)
def test_resuming_with_another_head_is_refused(
    trained: tuple[SpdModule, L.Trainer, Path], make_module: Callable[..., SpdModule], options: dict[str, Any]
) -> None:
    module = make_module(configured=False, **options)
    message = refusal(lambda: fit(module, random_samples(6, 8), 2, max_steps=4, ckpt_path=trained[2]))
    assert "checkpoint" in message


@pytest.mark.parametrize(
    "options", [{"draft": True}, {"stage_layers": [2, 1, 1], "head": HeadOptions(anchors=[0, 1, 2, 3, 4])}]
)
def test_resuming_with_a_head_of_other_shapes_or_stages_is_refused(
    trained: tuple[SpdModule, L.Trainer, Path],
    make_module: Callable[..., SpdModule],
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    if options.pop("draft", False):
        (tmp_path / "vocabulary.json").write_text('{"token_ids": [3, 4, 5]}')
        options["head"] = HeadOptions(draft_vocabulary=str(tmp_path / "vocabulary.json"))
    elif "stage_layers" in options:
        options["num_stages"] = None
    module = make_module(configured=False, **options)
    message = refusal(lambda: fit(module, random_samples(6, 8), 2, max_steps=4, ckpt_path=trained[2]))
    assert "checkpoint" in message


@pytest.mark.parametrize(("optimizer", "peaks"), [("adamw", {1e-2}), ("muon", {1e-2, 1e-4})])
def test_the_rate_of_adamw_beside_muon_is_nothing_without_muon(
    make_module: Callable[..., SpdModule], optimizer: str, peaks: set[float]
) -> None:
    module = make_module(configured=False, optimizer=optimizer, learning_rate=1e-2, adamw_learning_rate=1e-4)
    trainer = fit(module, random_samples(2, 0), 2, max_steps=1)
    assert {group["initial_lr"] for group in trainer.optimizers[0].param_groups} == peaks


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(2, id="at the end of an epoch"),
        pytest.param(
            1,
            id="in the middle of an epoch",
            marks=pytest.mark.xfail(strict=True, reason="the plain DataLoader begins again at the epoch's first batch"),
        ),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_goes_on_as_if_nothing_had_happened(
    make_module: Callable[..., SpdModule], tmp_path: Path, step: int, optimizer: str
) -> None:
    samples = random_samples(4, 9)
    whole, resumed = (make_module(configured=False, seed=3, optimizer=optimizer) for _ in range(2))
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    fit(whole, samples, 2, max_steps=4, callbacks=[keep], enable_checkpointing=True)  # two epochs of two steps
    fit(resumed, samples, 2, max_steps=4, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert resumed.tokens_seen == whole.tokens_seen == 2 * sum(len(sample.ids) for sample in samples)
    halfway = load_head(tmp_path / f"step={step}.ckpt").state_dict()
    for name, tensor in whole.parts()[1].state_dict().items():
        assert torch.equal(resumed.parts()[1].state_dict()[name], tensor), name
        assert name == "norm.weight" or not torch.equal(halfway[name], tensor)


def test_a_step_whose_gradient_is_not_finite_changes_no_weight(make_module: Callable[..., SpdModule]) -> None:
    module, samples = make_module(configured=False, learning_rate=1e-2, warmup=0.0), random_samples(8, 10)
    original, weights = module.training_step, []

    def training_step(batch: Batch, batch_idx: int) -> Tensor:
        weights.append({name: x.clone() for name, x in module.parts()[1].state_dict().items()})
        loss = original(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 else loss

    module.training_step = training_step  # type: ignore[method-assign]
    fit(module, samples, 2, max_steps=4)
    same = [all(a[name].equal(b[name]) for name in a) for a, b in zip(weights, weights[1:], strict=False)]
    assert same == [False, False, True] and module.step_applied
    assert all(tensor.isfinite().all() for tensor in module.parts()[1].state_dict().values())


def test_a_new_head_does_not_depend_on_the_default_device_of_its_caller(make_module: Callable[..., SpdModule]) -> None:
    # Lightning builds models under the accelerator's device; "meta" stands for any device that is not the CPU
    target, head = make_module().parts()
    with torch.device("meta"):
        again = new_head(target, num_layers=2)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in head.state_dict().items())


# -- it learns -------------------------------------------------------------------------------------------------------


def own_text(module: SpdModule, count: int, seed: int, prompt: int = 4, length: int = 28) -> list[Sample]:
    """What the target itself says after random prompts."""
    target, _ = module.parts()
    ids = torch.randint(0, VOCABULARY, (count, prompt), generator=torch.Generator().manual_seed(seed))
    for _ in range(length - prompt):
        ids = torch.cat([ids, target.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return [Sample(number, row, ((prompt, length),)) for number, row in enumerate(ids.numpy())]


def acceptance(module: SpdModule, prompts: Sequence[list[int]], new_tokens: int = 16) -> float:
    decoder = SpdDecoder(*module.parts())
    found = Pooled.of([decoder.generate(prompt, new_tokens, eos_token_id=[]) for prompt in prompts], 4)
    assert found.acceptance is not None
    return found.acceptance


def test_eighty_steps_raise_real_acceptance_far_above_that_of_the_untrained_head(
    make_module: Callable[..., SpdModule],
) -> None:
    untrained = make_module()
    module = make_module(learning_rate=3e-3, restart_rate=0.4)
    with torch.no_grad():
        text = own_text(module, 96, seed=0)
        prompts = [sample.prompt for sample in own_text(module, 6, seed=1)]
    before = acceptance(untrained, prompts)
    fit(module, text, 12, max_steps=80)
    after = acceptance(module, prompts)
    print(f"acceptance {before:.2f} -> {after:.2f}")
    assert after > before + 0.3
