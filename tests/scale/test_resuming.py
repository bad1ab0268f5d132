"""Stopped and resumed: bit by bit on as many ranks, along the same curve on others, under any strategy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from scale_runs import (
    STRATEGIES,
    Case,
    Done,
    also,
    asked_for,
    everything_logged,
    logged,
    logged_by_step,
    some_strategies,
)

from spd_lightning import cli
from spd_lightning.training.saving import progress_checkpoints

Go = Callable[..., Done]
STEPS, STOP, STOPPED = 10, 5, 128 + 15
RUNS = [*some_strategies("single", default=["deepspeed_stage_3"]), *also("muon")]
CROSSINGS = [
    "single-by-deepspeed_stage_3",
    *also("deepspeed_stage_3-by-one", *(f"{s}-by-one" for s in STRATEGIES[:3])),
    *also(*(f"single-by-{s}" for s in STRATEGIES[:3])),
    *also("deepspeed_stage_3-by-deepspeed_stage_2", "deepspeed_stage_1-by-deepspeed_stage_3"),
    *also("deepspeed_stage_2-by-ddp"),
]  # fmt: skip


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
def runs(request: pytest.FixtureRequest, go: Go, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resuming")
    asked = {name for (name,) in asked_for(request, "run")} - {"single"}
    muon = fields(model__optimizer="muon", model__adamw_learning_rate=1e-3)
    for name, settings in (("single", fields()), *((("muon", muon),) if "muon" in asked else ())):
        done = go(folder, whole_stopped_resumed(name, settings, folder))
        assert list(done.returned.values()) == [0, STOPPED, 0], done.output
    asked -= {"muon"}
    cases = [case for strategy in sorted(asked) for case in whole_stopped_resumed(strategy, two(strategy), folder)]
    if cases:
        done = go(folder, cases, ranks=2)
        assert list(done.returned.values()) == [0, STOPPED, 0] * len(asked), done.output
        assert done.output.count("stopped by SIGTERM; the state is saved in") == len(asked)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", RUNS)
def test_a_run_that_was_stopped_and_resumed_is_the_whole_one_bit_by_bit(runs: Path, run: str) -> None:
    whole, resumed = runs / f"{run}-whole", runs / f"{run}-stopped"
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


@pytest.mark.parametrize("run", ["single", *also("deepspeed_stage_3")])
def test_a_run_that_is_stopped_in_a_validation_repeats_it(runs: Path, go: Go, tmp_path: Path, run: str) -> None:
    settings = fields() if run == "single" else two(run)
    cases = [
        Case("stopped", settings, stop_at="validation"),
        Case("resumed", settings | {"run_dir": tmp_path / "stopped", "ckpt_path": "last"}),
    ]
    done = go(tmp_path, cases, ranks=1 if run == "single" else 2)
    assert done.returned == {"stopped": STOPPED, "resumed": 0}, done.output
    assert "step00000003.ckpt. Go on with" in done.output, "saved as the validation began"
    whole = runs / f"{run}-whole"
    assert everything_logged(tmp_path / "stopped") == everything_logged(whole)
    weights = [load_file(run / "head" / "model.safetensors") for run in (whole, tmp_path / "stopped")]
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


@pytest.fixture(scope="module")
def crossings(request: pytest.FixtureRequest, runs: Path, go: Go) -> Path:
    """Runs that are stopped, and taken up by other ranks or another strategy: `FROM-by-TO`, one: without ranks."""
    names = [name for (name,) in sorted(asked_for(request, "name"))]
    ways = {name: name.split("-by-") for name in names}
    first = {begun for begun, _ in ways.values()} | {"single"}
    stopped = {s: Case(f"{s}-left", fields() if s == "single" else two(s), stop_at=STOP) for s in sorted(first)}

    def left(name: str) -> Path:
        return progress_checkpoints(runs / f"{name}-left" / "checkpoints")[-1]

    together = [stopped.pop(name) for name in list(stopped) if name != "single"]
    for cases, ranks in ((list(stopped.values()), 1), (together, 2)):
        assert not cases or set(go(runs, cases, ranks).returned.values()) == {STOPPED}
    alone = [Case(name, fields(ckpt_path=left(begun))) for name, (begun, by) in ways.items() if by == "one"]
    together = [Case(name, two(by, ckpt_path=left(begun))) for name, (begun, by) in ways.items() if by != "one"]
    for cases, ranks in ((alone, 1), (together, 2)):
        assert not cases or set(go(runs, cases, ranks).returned.values()) == {0}
    return runs


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CROSSINGS)
def test_other_ranks_and_strategies_go_on_along_the_same_curve(crossings: Path, name: str) -> None:
    whole, resumed = logged(crossings / "single-whole", "train/loss"), logged(crossings / name, "train/loss")
    assert len(resumed) == STEPS - STOP - 1 and resumed == pytest.approx(whole[STOP + 1 :], rel=1e-3)
    assert logged(crossings / name, "tokens")[-1] == logged(crossings / "single-whole", "tokens")[-1]
    for metric in ("lr-AdamW/pg1", "val/cycles"):
        found, expected = (logged_by_step(crossings / run, metric) for run in (name, "single-whole"))
        assert found == pytest.approx({step: x for step, x in expected.items() if step >= min(found)}, rel=1e-6), metric


@pytest.mark.parametrize(
    ("field", "ours", "theirs"), [("global_batch_size", 4, 8), ("batch_size", 4, 2), ("seed", 1, 0)]
)
def test_other_global_batches_are_refused(
    crossings: Path, base_fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    field: str, ours: int, theirs: int,
) -> None:  # fmt: skip
    left = progress_checkpoints(crossings / "single-left" / "checkpoints")[-1]
    changed = base_fields | fields(ckpt_path=left, run_dir=tmp_path / "run") | {f"data__{field}": ours}
    words = [f"--{name.replace('__', '.')}={value}" for name, value in changed.items()]
    assert cli.main(["fit", "--config", "tiny", *words]) == 2
    assert f"error: data.{field}={ours}: the run that is resumed had {theirs}" in capsys.readouterr().err
