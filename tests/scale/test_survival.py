"""What ends badly, and what is left then: signals, kills, full disks, gradients that are no numbers, ranks that die."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scale_runs import WORKER, Case, Done, also, asked_for, logged, some_strategies, torchrun_variables

from spd_lightning.errors import InputError
from spd_lightning.head.loading import load_head
from spd_lightning.training.saving import (
    SavedWhole,
    WholeCheckpointIO,
    newest_complete,
    progress_checkpoints,
    remove_checkpoint,
)
from spd_lightning.training.survival import Survival

Go = Callable[..., Done]


# -- files that are whole --------------------------------------------------------------------------------------------


def test_a_file_has_its_name_when_it_is_complete_and_the_old_one_until_then(tmp_path: Path) -> None:
    path = tmp_path / "step00000001.ckpt"
    path.write_text("old")
    with SavedWhole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ZeroDivisionError), SavedWhole(path) as temporary:
        temporary.mkdir()
        raise ZeroDivisionError
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_states_are_ordered_by_step_and_the_best_head_and_leftovers_are_none(tmp_path: Path) -> None:
    for name in (
        "step00000010.ckpt",
        "step00000009-validated.ckpt",
        "step00000010-validated.ckpt",
        "step00000100.ckpt",
    ):
        (tmp_path / name).touch()
    for name in ("step5-acceptance0.9.ckpt", ".step00000200.ckpt.part", ".step00000300.ckpt.removed", "last.ckpt"):
        (tmp_path / name).touch()
    names = [path.name.removeprefix("step000000") for path in progress_checkpoints(tmp_path)]
    assert names == [
        "09-validated.ckpt",
        "10.ckpt",
        "10-validated.ckpt",
        "step00000100.ckpt".removeprefix("step000000"),
    ]
    assert newest_complete(tmp_path) == tmp_path / "step00000100.ckpt" and newest_complete(tmp_path / "none") is None


def test_removing_takes_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "step00000001.ckpt"
    folder.mkdir()
    (folder / "part").touch()

    def killed(path: Path, *args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(folder)
    assert progress_checkpoints(tmp_path) == [] and (tmp_path / f".{folder.name}.removed" / "part").exists()
    folder.mkdir()
    remove_checkpoint(folder)
    assert list(tmp_path.iterdir()) == [], "what was left is cleared away by the next one"


def test_a_file_that_the_system_cuts_off_is_one_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    """The kernel itself refuses to let the file grow, as it does on a full disk."""
    saved = {"weights": torch.ones(100_000)}
    WholeCheckpointIO().save_checkpoint(saved, tmp_path / "step00000001.ckpt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError) as caught:
            WholeCheckpointIO().save_checkpoint(saved, tmp_path / "step00000002.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert "\n" not in message and "step00000002.ckpt cannot be written" in message
    assert f"the newest complete checkpoint is {tmp_path / 'step00000001.ckpt'}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step00000001.ckpt"]


def test_a_folder_that_is_a_file_now_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(InputError, match=r"run_dir: .*cannot be written: .*no checkpoint was saved before"):
        WholeCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "step00000001.ckpt")


def test_a_run_directory_that_is_gone_is_not_made_anew(
    base_fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spd_lightning import cli
    from spd_lightning.training.module import SpdModule

    original = SpdModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(SpdModule, "training_step", training_step)
    fields = {"trainer__max_steps": 8, "decoding__every_steps": 1, "trainer__log_every_n_steps": 100}
    assert cli.main(words(base_fields, run_dir=tmp_path / "run", **fields)) == 2
    # bars that other tests of this process left open make a bar end with cursor movements, on the error's line
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "error: run_dir: " in line and "cannot be written: No such file or directory" in line
    assert not (tmp_path / "run").exists()
    assert newest_complete(tmp_path / "elsewhere" / "checkpoints") is not None, "what was saved is where it went"


@pytest.mark.parametrize(
    ("field", "value"),
    [("save_every_steps", 0), ("keep", 0), ("skipped_steps", -1), ("dead_rank_seconds", 1), ("save_every_minutes", 0)],
)
def test_an_impossible_number_is_refused_by_field_and_value(field: str, value: int) -> None:
    with pytest.raises(InputError, match=rf"survival\.{field}={value}: expected"):
        Survival(**{field: value})


# -- gradients that are not finite -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skipping(request: pytest.FixtureRequest, go: Go, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The loss of rank 1 is no number in step 2, under every strategy; and the same on one rank."""
    folder = tmp_path_factory.mktemp("skipping")
    fields = {
        "trainer__max_steps": 5,
        "decoding__every_steps": 5,
        "data__global_batch_size": 8,
        "model__learning_rate": 3e-3,
    }
    asked = sorted({name for (name,) in asked_for(request, "name")} - {"single"})
    two = [Case(s, fields | {"trainer__devices": 2, "trainer__strategy": s}, break_at=(2, 1)) for s in asked]
    if two:
        done = go(folder, two, ranks=2)
        assert set(done.returned.values()) == {0}, done.output
    one = [
        Case("single", fields, break_at=(2, 0)),
        Case("none allowed", fields | {"survival__skipped_steps": 0}, break_at=(2, 0)),
    ]
    last = go(folder, one)
    assert last.returned == {"single": 0, "none allowed": 2}
    return folder, last.output


@pytest.mark.parametrize("name", some_strategies("single", default=["deepspeed_stage_2"]))
def test_a_step_with_a_gradient_that_is_no_number_changes_nothing_and_its_batches_are_kept(
    skipping: tuple[Path, str], name: str
) -> None:
    folder, _ = skipping
    losses = logged(folder / name, "train/loss")
    assert len(losses) == 5 and all(loss == loss for loss in losses)
    assert losses == pytest.approx(logged(folder / "single", "train/loss"), rel=2e-3)
    assert all(tensor.isfinite().all() for tensor in load_head(folder / name).state_dict().values())
    kept = sorted((folder / name / "skipped").iterdir())
    assert [path.name for path in kept] == [f"step00000003-rank{r}.pt" for r in range(1 if name == "single" else 2)]
    contents = [torch.load(path, weights_only=True) for path in kept]
    broken = contents[-1]
    assert all(loss != loss for loss in broken["losses"]), "the rank whose loss it was"
    assert broken["batches"][0]["input_ids"].shape[0] == 2
    (checkpoint,) = progress_checkpoints(folder / name / "checkpoints")[-1:]
    assert newest_complete(folder / name / "checkpoints") == checkpoint


def test_too_many_such_steps_end_the_run_in_one_line(skipping: tuple[Path, str]) -> None:
    folder, output = skipping
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: survival.skipped_steps=0: step 3 is number 1 whose loss or gradient is not finite")
    assert "model.learning_rate" in line and "trainer.gradient_clip_val" in line
    assert (folder / "none allowed" / "skipped" / "step00000003-rank0.pt").exists()


# -- kills -----------------------------------------------------------------------------------------------------------


def start(arguments: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """`python -m spd_lightning ...` in a session of its own."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"} | (environment or {})
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "spd_lightning", *arguments],
            cwd=folder,
            env=settings,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def words(base: dict[str, Any], **fields: Any) -> list[str]:
    merged = base | fields
    return ["fit", "--config", "tiny", *(f"--{name.replace('__', '.')}={value}" for name, value in merged.items())]


def kill_and_resume(
    base: dict[str, Any], folder: Path, kills: int, terms: int, seed: int, **fields: Any
) -> tuple[Path, Path, list[str]]:
    """One run undisturbed, one killed at random moments and resumed until it is done; and what the kills met."""
    settings = fields | {"survival__save_every_steps": 1, "ckpt_path": "last"}
    whole, disturbed = folder / "whole", folder / "disturbed"
    assert start(words(base, run_dir=whole, **settings), folder).wait(600) == 0, (folder / "output.txt").read_text()
    draw, met = random.Random(seed), []
    plan = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    draw.shuffle(plan)
    for number, kind in enumerate(plan):
        process = start(words(base, run_dir=disturbed, **settings), folder)
        before = {path.name for path in progress_checkpoints(disturbed / "checkpoints")}
        in_a_save, began, deadline = draw.random() < 0.5, time.time(), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            saving = [path for path in (disturbed / "checkpoints").glob(".step*.part") if newer(path, began)]
            new = {path.name for path in progress_checkpoints(disturbed / "checkpoints")} - before
            if saving if in_a_save else new:
                break
            time.sleep(0.0005)
        time.sleep(0.0 if in_a_save else draw.uniform(0.0, 0.3))
        met.append("done" if process.poll() is not None else "save" if in_a_save else "step")
        if process.poll() is None:
            os.killpg(process.pid, kind) if kind == signal.SIGKILL else process.send_signal(kind)
        code = process.wait(120)
        assert code in (-signal.SIGKILL, 128 + signal.SIGTERM, 0), (number, kind, code)
        for path in progress_checkpoints(disturbed / "checkpoints"):
            load_head(path)  # whatever has a name is whole
    assert start(words(base, run_dir=disturbed, **settings), folder).wait(600) == 0
    return whole, disturbed, met


def newer(path: Path, moment: float) -> bool:
    """Not a leftover of an earlier kill."""
    try:
        return path.stat().st_mtime > moment
    except FileNotFoundError:
        return False


def assert_same_run(whole: Path, disturbed: Path) -> None:
    weights = [load_file(run / "head" / "model.safetensors") for run in (whole, disturbed)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    newest = [newest_complete(run / "checkpoints") for run in (whole, disturbed)]
    assert newest[0] is not None and newest[1] is not None and newest[0].name == newest[1].name
    states = [load_head(path).state_dict() for path in newest if path is not None]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert logged(disturbed, "val/acceptance") == logged(whole, "val/acceptance")


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_weights(
    base_fields: dict[str, Any], tmp_path: Path
) -> None:
    fields = {"trainer__max_steps": 12, "decoding__every_steps": 4, "model__learning_rate": 3e-3}
    whole, disturbed, met = kill_and_resume(base_fields, tmp_path, 1, 0, seed=0, **fields)
    assert_same_run(whole, disturbed)
    assert "step" in met or "save" in met


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills_and_ten_terms_leave_no_trace_in_the_weights(base_fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {"trainer__max_steps": 300, "decoding__every_steps": 25, "model__learning_rate": 3e-3}
    whole, disturbed, met = kill_and_resume(base_fields, tmp_path, 30, 10, seed=1, **fields)
    assert_same_run(whole, disturbed)
    assert met.count("done") == 0 and met.count("save") >= 5 and met.count("step") >= 5, met
    record = json.loads((disturbed / "run.json").read_text())
    assert len(record["resumed"]) == 40
    assert sum(part["status"] == "killed" for part in record["resumed"]) >= 30
    print("kills met", {kind: met.count(kind) for kind in set(met)})


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_of_two_zero_ranks_leave_no_trace_in_the_weights(base_fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {
        "trainer__max_steps": 40,
        "decoding__every_steps": 10,
        "model__learning_rate": 3e-3,
        "trainer__devices": 2,
        "trainer__strategy": "deepspeed_stage_2",
    }
    whole, disturbed, _ = kill_and_resume(base_fields, tmp_path, 6, 2, seed=2, **fields)
    assert_same_run(whole, disturbed)


def test_a_damaged_newest_state_is_passed_over(
    base_fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from spd_lightning import cli

    fields = {"run_dir": tmp_path / "run", "trainer__max_steps": 4, "decoding__every_steps": 2}
    assert cli.main(words(base_fields, **fields)) == 0
    newest = progress_checkpoints(tmp_path / "run" / "checkpoints")
    newest[-1].write_bytes(newest[-1].read_bytes()[:-2000])
    with pytest.warns(UserWarning, match=f"{re.escape(str(newest[-1]))}.*older checkpoint"):
        assert cli.main(words(base_fields, **fields, ckpt_path="last")) == 0
    assert f"Going on from {newest[-2]}" in "".join(capsys.readouterr())


# -- ranks that die --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies", [1, *also(0)])
def test_a_rank_that_dies_ends_the_other_with_a_message(
    base_fields: dict[str, Any], go: Go, tmp_path: Path, dies: int
) -> None:
    fields = {
        "trainer__max_steps": 100000,
        "decoding__every_steps": 50000,
        "trainer__devices": 2,
        "trainer__strategy": "ddp",
        "survival__dead_rank_seconds": 4,
        "run_dir": tmp_path / "run",
    }
    case = {"name": "run", "arguments": words(base_fields, **fields)}
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    processes = []
    for rank in range(2):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | torchrun_variables(rank, 2, 29000 + os.getpid() % 2000)
        with (tmp_path / f"rank{rank}.txt").open("wb") as output:
            command = [sys.executable, str(WORKER), str(tmp_path / "cases.json")]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path)
            )
    try:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.2)
        time.sleep(5)  # the watch has begun
        # stopped, not killed: its connections stay open, as those of a machine that is gone do
        processes[dies].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        code = processes[1 - dies].wait(60)
        seconds = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = (tmp_path / f"rank{1 - dies}.txt").read_text()
    assert code == 1 and seconds < 30, said
    assert f"error: rank {dies} " in said and "go on with --ckpt_path last" in said, said
