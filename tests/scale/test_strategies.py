"""One run, cut into ranks and micro-batches in many ways, under every strategy: the same curve, the same decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scale_runs import Case, Done, also, asked_for, logged, some_strategies

from spd_lightning.head.loading import load_head
from spd_lightning.head.zero import open_parts
from spd_lightning.training.saving import progress_checkpoints

Go = Callable[..., Done]
STEPS, ROWS = 24, 8
#: rows per optimizer step: accumulation 1, 2 and 4 on two ranks with 2 rows per micro-batch
GLOBAL = [ROWS, *also(4, 16)]


def fields(rows: int, **changes: Any) -> dict[str, Any]:
    every = {"trainer__max_steps": STEPS, "decoding__every_steps": STEPS // 2, "model__learning_rate": 3e-3}
    every |= {"trainer__gradient_clip_val": 0.02}  # AdamW forgives a wrong scale of gradients, clipping does not
    return every | {"data__global_batch_size": rows} | changes


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, go: Go, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every strategy and accumulation on two ranks, and one rank for each global batch."""
    folder = tmp_path_factory.mktemp("strategies")
    asked = sorted(asked_for(request, "strategy", "rows"))
    alone = [Case(f"alone-{rows}", fields(rows)) for rows in sorted({rows for _, rows in asked})]
    assert set(go(folder, alone).returned.values()) == {0}
    together = [
        Case(f"{strategy}-{rows}", fields(rows, trainer__devices=2, trainer__strategy=strategy))
        for strategy, rows in asked
    ]
    done = go(folder, together, ranks=2)
    assert set(done.returned.values()) == {0}, done.output
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("rows", GLOBAL)
@pytest.mark.parametrize("strategy", some_strategies())
def test_the_loss_curve_is_that_of_one_rank(runs: Path, strategy: str, rows: int) -> None:
    alone, together = (logged(runs / name, "train/loss") for name in (f"alone-{rows}", f"{strategy}-{rows}"))
    assert len(alone) == STEPS and together == pytest.approx(alone, rel=2e-3)
    assert alone[-1] < 0.8 * alone[0], "the curve is one of training"
    assert logged(runs / f"{strategy}-{rows}", "tokens") == logged(runs / f"alone-{rows}", "tokens")


@pytest.mark.parametrize("rows", GLOBAL)
@pytest.mark.parametrize("strategy", some_strategies())
def test_validation_on_two_ranks_counts_what_one_rank_counts(runs: Path, strategy: str, rows: int) -> None:
    for name in ("cycles", "decoded_tokens", "acceptance", "lossless", "drift"):
        alone, together = (logged(runs / r, f"val/{name}") for r in (f"alone-{rows}", f"{strategy}-{rows}"))
        assert together == alone and len(alone) == 2, name
    for name in ("kl", "top1", "alpha"):
        values = [logged(runs / r, f"val/teacher_forced_{name}") for r in (f"alone-{rows}", f"{strategy}-{rows}")]
        assert values[1] == pytest.approx(values[0], rel=2e-3, abs=1e-5), name
    assert all(0 < p < 1 for p in logged(runs / f"alone-{rows}", "val/acceptance")), (
        "ranks need different numbers of cycles"
    )


def test_ranks_have_unequal_numbers_of_supervised_positions(model_folder: Path, data_files: dict[str, str]) -> None:
    from spd_lightning.data.batches import EpochBatches
    from spd_lightning.training.data import SpdDataModule

    data = SpdDataModule(str(model_folder), **data_files, batch_size=2, packing=False)
    data.setup("fit")
    assert data.train_samples is not None
    drafted = data.train_samples.drafted
    assert drafted.tolist() == [sample.drafted for sample in data.train_samples]
    ranks = [
        list(EpochBatches(data.train_samples.lengths, 2, 0, rank=r, world_size=2, drafted=drafted)) for r in (0, 1)
    ]
    counts = [[int(drafted[[i for row in batch for i in row]].sum()) for batch in rank] for rank in ranks]
    assert sum(a != b for a, b in zip(*counts, strict=True)) > len(counts[0]) / 2
    for a, b, batch in zip(*counts, ranks[0], strict=True):
        assert batch.share.supervised == (a + b) / 2


@pytest.mark.parametrize("strategy", some_strategies())
def test_checkpoints_hold_the_head_and_no_tensor_of_the_target(runs: Path, strategy: str) -> None:
    newest = progress_checkpoints(runs / f"{strategy}-{ROWS}" / "checkpoints")[-1]
    if strategy == "ddp":
        names = set(torch.load(newest, weights_only=True)["state_dict"])
    else:
        names = {name for group in open_parts(newest).shapes for name in group}
        for part in (newest / "checkpoint").glob("*model_states.pt"):
            held = torch.load(part, weights_only=False)["module"]
            assert not [name for name in held if name.startswith("target.")], part
    assert names and all(name.startswith("head.") for name in names)
    head, exported = load_head(newest), load_head(runs / f"{strategy}-{ROWS}")
    assert head.config == exported.config
    record = json.loads((runs / f"{strategy}-{ROWS}" / "run.json").read_text())
    assert record["status"] == "finished"
