"""Stopped and resumed: bit by bit on as many ranks, along the same curve on others, under any strategy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from scale_runs import Case, Done, everything_logged, logged

from spd_lightning.training.saving import progress_checkpoints

Go = Callable[..., Done]
STEPS, STOP, STOPPED = 10, 5, 128 + 15
STRATEGIES = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


def fields(**changes: Any) -> dict[str, Any]:
    """4 rows per step of 40 conversations: epochs of 10 steps; validations after steps 3, 6 and 9."""
    every = {"trainer__max_steps": STEPS, "decoding__every_steps": 3, "data__global_batch_size": 8}
    return every | {"model__learning_rate": 3e-3} | changes


def two(strategy: str, **changes: Any) -> dict[str, Any]:
    return fields(trainer__devices=2, trainer__strategy=strategy, **changes)


def whole_stopped_resumed(name: str, fields: dict[str, Any], folder: Path) -> list[Case]:
    """A run, the same one stopped in step STOP, and its continuation."""
    return [
        Case(f"{name}-whole", fields),
        Case(f"{name}-stopped", fields, stop_at=STOP),
        Case(f"{name}-resumed", fields | {"run_dir": folder / f"{name}-stopped", "ckpt_path": "last"}),
    ]


@pytest.fixture(scope="module")
def runs(go: Go, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resuming")
    done = go(folder, whole_stopped_resumed("single", fields(), folder))
    assert list(done.returned.values()) == [0, STOPPED, 0], done.output
    cases = [case for strategy in STRATEGIES for case in whole_stopped_resumed(strategy, two(strategy), folder)]
    # stopped once more, for other ranks and strategies to go on with
    cases += [Case(f"{strategy}-left", two(strategy), stop_at=STOP) for strategy in STRATEGIES]
    done = go(folder, cases, ranks=2)
    assert list(done.returned.values()) == [0, STOPPED, 0] * len(STRATEGIES) + [STOPPED] * len(STRATEGIES), done.output
    assert done.output.count("stopped by SIGTERM; the state is saved in") == 2 * len(STRATEGIES)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["single", *STRATEGIES])
def test_a_run_that_was_stopped_and_resumed_is_the_whole_one_bit_by_bit(runs: Path, name: str) -> None:
    whole, resumed = runs / f"{name}-whole", runs / f"{name}-stopped"
    weights = [load_file(run / "head" / "model.safetensors") for run in (whole, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
    assert everything_logged(resumed) == everything_logged(whole)
    record = json.loads((resumed / "run.json").read_text())
    assert record["status"] == "finished"
    (part,) = record["resumed"]
    assert part["status"].startswith("stopped: stopped by SIGTERM")
    assert [path.name for path in progress_checkpoints(resumed / "checkpoints")] == [
        path.name for path in progress_checkpoints(whole / "checkpoints")
    ]


@pytest.mark.parametrize("strategy", [None, "deepspeed_stage_3"])
def test_a_run_that_is_stopped_in_a_validation_repeats_it(
    runs: Path, go: Go, tmp_path: Path, strategy: str | None
) -> None:
    settings = fields() if strategy is None else two(strategy)
    cases = [
        Case("stopped", settings, stop_at="validation"),
        Case("resumed", settings | {"run_dir": tmp_path / "stopped", "ckpt_path": "last"}),
    ]
    done = go(tmp_path, cases, ranks=1 if strategy is None else 2)
    assert done.returned == {"stopped": STOPPED, "resumed": 0}, done.output
    assert "step00000003.ckpt. Go on with" in done.output, "saved as the validation began"
    whole = runs / f"{'single' if strategy is None else strategy}-whole"
    assert everything_logged(tmp_path / "stopped") == everything_logged(whole)
    weights = [load_file(run / "head" / "model.safetensors") for run in (whole, tmp_path / "stopped")]
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


@pytest.fixture(scope="module")
def crossings(runs: Path, go: Go) -> Path:
    """Runs of two ranks taken up by one, and of one by two; and from strategy to strategy."""

    def left(name: str) -> Path:
        return progress_checkpoints(runs / f"{name}-left" / "checkpoints")[-1]

    alone = [Case(f"{strategy}-by-one", fields(ckpt_path=left(strategy))) for strategy in STRATEGIES]
    alone.append(Case("single-left", fields(), stop_at=STOP))
    done = go(runs, alone)
    assert list(done.returned.values()) == [0] * len(STRATEGIES) + [STOPPED], done.output
    together = [Case(f"single-by-{s}", two(s, ckpt_path=left("single"))) for s in STRATEGIES]
    together += [
        Case("3-by-2", two("deepspeed_stage_2", ckpt_path=left("deepspeed_stage_3"))),
        Case("1-by-3", two("deepspeed_stage_3", ckpt_path=left("deepspeed_stage_1"))),
        Case("2-by-ddp", two("ddp", ckpt_path=left("deepspeed_stage_2"))),
    ]
    done = go(runs, together, ranks=2)
    assert set(done.returned.values()) == {0}, done.output
    return runs


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [*(f"{s}-by-one" for s in STRATEGIES), *(f"single-by-{s}" for s in STRATEGIES), "3-by-2", "1-by-3", "2-by-ddp"],
)
def test_other_ranks_and_strategies_go_on_along_the_same_curve(crossings: Path, name: str) -> None:
    whole, resumed = logged(crossings / "single-whole", "train/loss"), logged(crossings / name, "train/loss")
    assert len(resumed) == STEPS - STOP - 1 and resumed == pytest.approx(whole[STOP + 1 :], rel=1e-3)
    assert logged(crossings / name, "tokens")[-1] == logged(crossings / "single-whole", "tokens")[-1]
    for metric in ("lr-AdamW/pg1", "val/cycles"):  # the first is logged in every micro-batch
        values = [list(dict.fromkeys(logged(crossings / run, metric))) for run in (name, "single-whole")]
        assert values[0] == pytest.approx(values[1][-len(values[0]) :], rel=1e-6), metric


def test_other_global_batches_are_refused(crossings: Path, go: Go) -> None:
    left = progress_checkpoints(crossings / "single-left" / "checkpoints")[-1]
    cases = [
        Case("other-global", fields(ckpt_path=left, data__global_batch_size=4)),
        Case("other-rows", fields(ckpt_path=left, data__batch_size=4)),
        Case("other-seed", fields(ckpt_path=left, data__seed=1)),
    ]
    done = go(crossings, cases)
    assert set(done.returned.values()) == {2}
    for field, ours, theirs in (("global_batch_size", 4, 8), ("batch_size", 4, 2), ("seed", 1, 0)):
        assert f"error: data.{field}={ours}: the run that is resumed had {theirs}" in done.output
