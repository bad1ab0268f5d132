"""Real decoding in validation where the run's ranks are the pipeline: the counts of one process, and a clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scale_runs import Case, Done, also, asked_for, logged

Go = Callable[..., Done]
STEPS = 6
COUNTS = ("cycles", "decoded_tokens", "acceptance", "theoretical_speedup", "lossless", "drift", "ties")
CLOCK = ("wall_clock_speedup", "cycle_ms", "slowest_ms", "bubble_share")


def fields(ranks: int, strategy: str = "auto", rows: int = 12, **changes: Any) -> dict[str, Any]:
    every = {"model__num_stages": 2, "model__stage_layers": "[3, 1]", "model__learning_rate": 3e-3}
    every |= {"trainer__max_steps": STEPS, "decoding__every_steps": 3, "data__global_batch_size": rows}
    every |= {"trainer__devices": ranks, "trainer__strategy": strategy}
    return every | changes


def same_counts(run: Path, alone: Path) -> None:
    for name in COUNTS:
        found, expected = (logged(folder, f"val/{name}") for folder in (run, alone))
        assert found == expected and len(found) == 2, name


@pytest.fixture(scope="module")
def alone(go: Go, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    cases = [Case("rows-12", fields(1))]
    assert set(go(folder, cases).returned.values()) == {0}
    return folder


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest, go: Go, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two ranks for two stages under every strategy, and for four stages."""
    folder = tmp_path_factory.mktemp("two")
    asked = sorted(asked_for(request, "strategy", "precision"))
    cases = [Case(f"{s}-{precision}", fields(2, s, trainer__precision=precision)) for s, precision in asked]
    cases.append(Case("four-stages", fields(2, "ddp", model__num_stages=4, model__stage_layers=None)))
    cases.append(Case("stopped", fields(2, "ddp", trainer__max_steps=50), stop_at=4))
    done = go(folder, cases, ranks=2)
    assert done.returned.pop("stopped") == 143 and set(done.returned.values()) == {0}, done.output
    return folder, done.output


@pytest.mark.parametrize("precision", ["32-true"])
@pytest.mark.parametrize("strategy", ["ddp", *also("deepspeed_stage_1", "deepspeed_stage_2")])
def test_two_ranks_are_a_pipeline_of_two_stages(
    two: tuple[Path, str], alone: Path, strategy: str, precision: str
) -> None:
    run = two[0] / f"{strategy}-{precision}"
    same_counts(run, alone / "rows-12")
    assert 0 < logged(run, "val/acceptance")[-1] < 1, "ranks see rejections"
    for name in CLOCK:
        assert len(logged(run, f"val/{name}")) == 2, name
    speedup, cycle, slowest, bubbles = (logged(run, f"val/{name}")[-1] for name in CLOCK)
    assert speedup > 0 and 0 < slowest <= cycle and 0 <= bubbles < 1
    assert logged(run, "val/decoding_seconds") and not logged(run, "val/decoding_seconds_simulated")
    assert not logged(run, "val/head_slack_ms"), "the head shares a rank"
    assert not logged(alone / "rows-12", "val/wall_clock_speedup") and not logged(alone / "rows-12", "val/cycle_ms")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed"])
@pytest.mark.parametrize("strategy", ["ddp"])
def test_the_head_of_a_run_in_half_precision_is_the_one_that_validation_decodes_with(
    two: tuple[Path, str], strategy: str, precision: str
) -> None:
    run = two[0] / f"{strategy}-{precision}"
    assert logged(run, "val/lossless") == [1, 1] and logged(run, "val/drift") == [0, 0]
    assert logged(run, "val/wall_clock_speedup")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true"])
@pytest.mark.parametrize("strategy", ["deepspeed_stage_3"])
def test_weights_in_pieces_decode_in_process(two: tuple[Path, str], alone: Path, strategy: str, precision: str) -> None:
    run = two[0] / f"{strategy}-{precision}"
    same_counts(run, alone / "rows-12")
    assert not logged(run, "val/wall_clock_speedup")


def test_fewer_ranks_than_stages_decode_in_process_and_say_so_once(two: tuple[Path, str]) -> None:
    folder, output = two
    assert output.count("Validation decodes in process (2 ranks for 4 stages): wall clock is not measured.") == 1
    assert not logged(folder / "four-stages", "val/wall_clock_speedup")
    assert logged(folder / "four-stages", "val/decoding_seconds_simulated")


def test_a_run_that_is_stopped_after_a_validation_ends_by_itself(two: tuple[Path, str]) -> None:
    """A thread that still waited for verdicts would have the process aborted."""
    folder, output = two
    assert len(logged(folder / "stopped", "val/wall_clock_speedup")) == 1
    assert output.count("EXIT 0\n") == 2, output[-3000:]


@pytest.mark.slow
def test_a_third_rank_has_the_head_alone_and_its_slack_is_logged(go: Go, alone: Path, tmp_path: Path) -> None:
    done = go(tmp_path, [Case("three", fields(3, "ddp"))], ranks=3)
    assert done.returned == {"three": 0}, done.output
    same_counts(tmp_path / "three", alone / "rows-12")
    assert len(logged(tmp_path / "three", "val/head_slack_ms")) == 2


@pytest.mark.slow
def test_five_ranks_are_two_pipelines_and_one_rank_that_waits(go: Go, tmp_path: Path) -> None:
    done = go(tmp_path, [Case("five", fields(5, "ddp", rows=20))], ranks=5)
    assert done.returned == {"five": 0}, done.output
    assert go(tmp_path, [Case("one", fields(1, rows=20))]).returned == {"one": 0}
    same_counts(tmp_path / "five", tmp_path / "one")
    assert logged(tmp_path / "five", "val/wall_clock_speedup")
