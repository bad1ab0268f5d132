"""A warm start: what a head knows before its first step, and when it is one.

That it is the end of the target to the last digit, for every family, is in tests/family/test_head.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spd_lightning import cli
from spd_lightning.data.batches import Batch, collate
from spd_lightning.data.chat import Sample
from spd_lightning.errors import InputError
from spd_lightning.head.loading import draft_logits, load_head, new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.loading import load_target
from spd_lightning.target.target import Target
from spd_lightning.training.data import SpdDataModule
from spd_lightning.training.losses import draft_kl
from spd_lightning.training.warm_start import warm_start


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Batch], list[Batch]]:
    """Batches of documentation to start from, and others to judge by."""
    data = SpdDataModule(batch_size=16, validation_samples=8, cache=str(tmp_path_factory.mktemp("cache")))
    data.setup("fit")
    train = iter(data.train_dataloader())
    return [next(train) for _ in range(6)], list(data.val_dataloader())


def surprise(target: Target, head: SpeculationHead, batches: list[Batch]) -> float:
    """Mean KL(P || Q) of the drafts that the assistant's tokens get, at one fill."""
    total = count = 0.0
    for batch in batches:
        drafts = draft_logits(target, head, batch["input_ids"])
        _, last = target(batch["input_ids"], ())
        kl = draft_kl(drafts, target.logits(last), None)[batch["labelled"]]
        total, count = total + float(kl.sum()), count + len(kl)
    return total / count


@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_a_warm_start_knows_much_before_the_first_step(texts: tuple[list[Batch], list[Batch]], norm: bool) -> None:
    target = load_target("tiny", num_stages=8)
    head = new_head(target, kind="target", anchor_norm=norm)
    before = surprise(target, head, texts[1])
    warm_start(target, head, texts[0])
    after = surprise(target, head, texts[1])
    print(f"KL {before:.2f}, with a warm start {after:.2f}")
    assert after < 2.0 < 8.0 < before
    states, _ = target(texts[1][0]["input_ids"], head.config.anchors)
    row = head.aggregation[-1](torch.cat(states, -1))[texts[1][0]["labelled"]]
    assert not norm or 0.5 < float(row.square().mean().sqrt()) < 2, "as large as the rows of a new head"


@torch.no_grad()
def test_padding_does_not_count(texts: tuple[list[Batch], list[Batch]]) -> None:
    target = load_target("tiny", num_stages=8)
    heads = []
    for batches in (texts[0][:1], [garbled(texts[0][0])]):
        head = new_head(target, kind="target", anchor_norm=True)
        warm_start(target, head, batches)
        heads.append(head)
    ours, theirs = (torch.cat([weight.flatten() for weight in head.parameters()]) for head in heads)
    torch.testing.assert_close(ours, theirs)


def garbled(batch: Batch) -> Batch:
    """The same texts with other tokens in their padding."""
    padding = batch["documents"] < 0
    assert padding.any()
    return batch | {"input_ids": torch.where(padding, 77, batch["input_ids"])}


@torch.no_grad()
def test_packed_rows_say_the_same(make_target: Callable[..., Target]) -> None:
    """Documents in one row, and each in a row of its own: the same tokens at the same positions."""
    target = make_target("llama", 4, num_stages=2)
    random = np.random.default_rng(0)
    samples = [Sample(i, random.integers(3, 60, 24).astype(np.int32), ((1, 3),)) for i in range(12)]
    heads = []
    for rows in ([[sample] for sample in samples], [samples[at : at + 3] for at in range(0, 12, 3)]):
        head = new_head(target, num_layers=2, kind="target", anchor_norm=True)
        warm_start(target, head, [collate(rows)])
        heads.append(head)
    ours, theirs = (torch.cat([weight.flatten() for weight in head.parameters()]) for head in heads)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_what_is_no_weight_is_not_copied(make_target: Callable[..., Target]) -> None:
    target = make_target("llama", 4, num_stages=2)
    projection: Any = target.layer(3).self_attn.q_proj
    for weight in (torch.zeros_like(projection.weight, dtype=torch.int8), projection.weight.to("meta")):
        projection.weight = torch.nn.Parameter(weight, requires_grad=False)
        with pytest.raises(InputError, match=r"q_proj.weight of the target's layer 3 is quantised or offloaded"):
            warm_start(target, new_head(target, num_layers=1, kind="target"), [])
    with pytest.raises(InputError, match=r"no training text"):
        whole = make_target("llama", 4, num_stages=2)
        warm_start(whole, new_head(whole, num_layers=1, kind="target"), [])


def test_layers_of_another_kind_or_size_are_refused(make_target: Callable[..., Target]) -> None:
    target = make_target("llama", 4, num_stages=2)
    with pytest.raises(InputError, match=r"warm_start: .* another kind than the head's. Set model.head.kind"):
        warm_start(target, new_head(target, num_layers=2, kind="qwen3"), [])
    with pytest.raises(InputError, match=r"warm_start: the head's mlp.gate_proj.weight has shape \(16, 32\)"):
        warm_start(target, new_head(target, num_layers=2, kind="target", intermediate_size=16), [])
    hybrid = make_target("qwen3_5_text", 4, num_stages=2, full_attention_interval=4)
    with pytest.raises(InputError, match=r"num_layers=2, and the target has 1 layers of full attention"):
        warm_start(hybrid, new_head(hybrid, num_layers=2, kind="target"), [])


def test_a_run_begins_with_it_once(
    tmp_path: Path, model_folder: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate of almost nothing leaves what the run began with; a resumed run goes on from its checkpoint instead."""
    calls = []

    def counted(target: Target, head: SpeculationHead, batches: Any) -> None:
        assert torch.get_default_device().type == "cpu", "workers of a data loader inherit it"
        warm_start(target, head, batches)
        calls.append({name: weight.clone() for name, weight in head.named_parameters()})

    monkeypatch.setattr("spd_lightning.training.module.warm_start", counted)
    fields = {
        "model.target": model_folder, "model.num_stages": 4, "model.head.kind": "target",
        "model.head.warm_start": "true", "model.learning_rate": 1e-9, "model.adamw_learning_rate": 1e-9,
        "data.train": data_files["train"], "data.validation": data_files["validation"], "data.batch_size": 4,
        "data.validation_samples": 4, "decoding.prompts": 2, "decoding.max_new_tokens": 6, "final.prompts": 0,
        "trainer.accelerator": "cpu", "run_dir": tmp_path / "run", "ckpt_path": "last",
    }  # fmt: skip
    for steps in (1, 2):
        words = [f"--{name}={value}" for name, value in fields.items()]
        steps_words = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
        assert cli.main(["fit", "--config", "tiny", *words, *steps_words]) == 0
    (begun,) = calls
    head = load_head(tmp_path / "run", load_target(model_folder, num_stages=4))
    for name, weight in head.named_parameters():
        torch.testing.assert_close(weight, begun[name], rtol=1e-4, atol=1e-6)
