"""Whole runs through the command line: what they leave behind, what they repeat, and two ranks against one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_lightning import cli
from spd_lightning.decoding import decoder as decoding
from spd_lightning.decoding.decoder import SpdDecoder
from spd_lightning.decoding.generation import Pooled
from spd_lightning.errors import BrokenInvariantError
from spd_lightning.head.loading import load_head
from spd_lightning.target.loading import load_target
from spd_lightning.training import run as runs
from spd_lightning.training.data import SpdDataModule
from spd_lightning.training.saving import progress_checkpoints

Arguments = Callable[..., list[str]]
DECODING_PROMPTS, VALIDATION_SAMPLES, FINAL_PROMPTS, NEW_TOKENS = 3, 6, 4, 8


@pytest.fixture(scope="module")
def arguments(model_folder: Path, data_files: dict[str, str]) -> Arguments:
    """Arguments of a run of 4 steps and 2 validations; a keyword with dots for underscores changes or adds a field."""

    def make(command: str, run_dir: Path, **changes: Any) -> list[str]:
        fields = {
            "model.target": model_folder,
            "model.num_stages": 4,
            "data.train": data_files["train"],
            "data.validation": data_files["validation"],
            "data.batch_size": 4,
            "data.validation_samples": VALIDATION_SAMPLES,
            "decoding.prompts": DECODING_PROMPTS,
            "decoding.max_new_tokens": NEW_TOKENS,
            "final.prompts": 0,
            "final.max_new_tokens": NEW_TOKENS,
            "trainer.accelerator": "cpu",
            "trainer.max_steps": 4,
            "trainer.val_check_interval": 2,
            "trainer.log_every_n_steps": 1,
            "run_dir": run_dir,
        }
        fields |= {name.replace("__", "."): value for name, value in changes.items()}
        return [
            command,
            "--config",
            "tiny",
            *(word for name, value in fields.items() for word in (f"--{name}", str(value))),
        ]

    return make


def program(arguments: list[str], folder: Path, limit: float = 170) -> subprocess.CompletedProcess[str]:
    """`python -m spd_lightning ...` in a process group of its own, which ends with it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "spd_lightning", *arguments]
    with (folder / "stdout.txt").open("w+") as out, (folder / "stderr.txt").open("w+") as err:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        finally:
            with contextlib.suppress(ProcessLookupError):  # ranks that outlived the first one
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            texts = [(file.seek(0), file.read())[1] for file in (out, err)]
    return subprocess.CompletedProcess(command, process.returncode, *texts)


@pytest.fixture(scope="module")
def finished(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A complete run, with final evaluation, in a process of its own: its directory and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    done = program(arguments("fit", folder / "first", final__prompts=FINAL_PROMPTS), folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return folder / "first", done.stdout


def record(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run.json").read_text())


def metrics(directory: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def validated(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The figures of a `validate` in this process."""
    found: list[dict[str, float]] = []
    original = runs.validate
    with monkeypatch.context() as patch:
        patch.setattr(runs, "validate", lambda cli: found.extend(original(cli)))
        assert cli.main(arguments) == 0
    return found[0]


# -- what a run leaves behind ----------------------------------------------------------------------------------------


def test_run_json_says_what_the_run_was(finished: tuple[Path, str], model_folder: Path) -> None:
    directory, _ = finished
    content = record(directory)
    assert content["status"] == "finished" and content["directory"] == "first"
    assert "fit" in content["argv"] and str(directory) in content["argv"]
    assert content["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", content["commit"])
    assert content["versions"]["torch"] == torch.__version__
    assert {"python", "lightning", "transformers", "datasets", "spd_lightning"} <= content["versions"].keys()
    config = content["config"]
    assert config["model"]["target"] == config["data"]["tokenizer"] == str(model_folder)
    assert config["model"]["num_stages"] == 4 and config["trainer"]["max_steps"] == 4
    train, validation = content["data"]["train"], content["data"]["validation"]
    assert (train["samples"], validation["samples"]) == (40, 14)
    assert re.fullmatch(r"[0-9a-f]{20}", train["fingerprint"]) and train["fingerprint"] != validation["fingerprint"]
    assert train["rows"]["read"] == train["rows"]["kept"] == 40 and not train["rows"]["bad"]
    assert train["tokens"] > 40 and 0 < train["labelled_share"] < 1
    assert len(content["seconds"]) == 4 and all(seconds >= 0 for seconds in content["seconds"].values())
    assert content["seconds"]["train and validate"] > 0 and content["seconds"]["final decoding"] > 0


def test_run_json_holds_results_that_the_decoder_reproduces(
    finished: tuple[Path, str], model_folder: Path, data_files: dict[str, str]
) -> None:
    directory, _ = finished
    results = record(directory)["results"]
    arms = [(row["drafter"], row["temperature"]) for row in results["final"]]
    assert arms == [
        ("plain", 0.0), ("trained head", 0.0), ("trained head", 1.0), ("untrained head", 0.0), ("prompt lookup", 0.0)
    ]  # fmt: skip
    assert results["lossless"] == {"identical": FINAL_PROMPTS, "ties": 0, "mismatches": 0}
    assert results["drift"] == {"differing_flags": 0, "ties": 0}
    assert results["versus"].keys() == {"untrained head", "prompt lookup"}
    data = SpdDataModule(str(model_folder), **data_files)
    data.setup("validate")
    unseen = data.prompts(FINAL_PROMPTS, skip=VALIDATION_SAMPLES)
    target = load_target(model_folder)
    decoder = SpdDecoder(target, load_head(directory, target))
    for row, temperature in ((results["final"][1], 0.0), (results["final"][2], 1.0)):
        found = [
            decoder.generate(prompt, NEW_TOKENS, temperature=temperature, seed=i) for i, prompt in enumerate(unseen)
        ]
        pooled = Pooled.of(found, 4)
        assert row["acceptance"] == pytest.approx(pooled.acceptance)
        assert row["theoretical_speedup"] == pytest.approx(pooled.theoretical_speedup)
        assert (row["cycles"], row["new_tokens"]) == (pooled.cycles, pooled.new_tokens)
        assert sum(fill["count"] for fill in row["by_fill"]) == pooled.drafts_verified
        low, high = row["acceptance_interval"]
        assert low <= row["acceptance"] <= high
    for name, index in (("untrained head", 3), ("prompt lookup", 4)):
        difference = results["final"][1]["acceptance"] - results["final"][index]["acceptance"]
        assert results["versus"][name]["difference"] == pytest.approx(difference)


def test_metrics_hold_every_step_and_both_validations(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    assert len(metrics(directory, "train/loss")) == 4 and len(metrics(directory, "val/acceptance")) == 2
    assert len(metrics(directory, "val/theoretical_speedup")) == len(metrics(directory, "val/teacher_forced_top1")) == 2
    assert metrics(directory, "val/lossless") == [1.0, 1.0] and metrics(directory, "val/drift") == [0.0, 0.0]
    tokens = metrics(directory, "tokens")
    assert tokens == sorted(tokens) and tokens[-1] == record(directory)["results"]["tokens"]


def test_the_head_of_a_run_is_that_of_its_best_checkpoint(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    (best,) = (directory / "checkpoints").glob("*acceptance*.ckpt")
    states = progress_checkpoints(directory / "checkpoints")
    assert [state.name for state in states] == ["step00000002-validated.ckpt", "step00000004-validated.ckpt"]
    assert (directory / "checkpoints" / "last.ckpt").resolve() == states[-1].resolve()
    named = float(re.search(r"acceptance([\d.]+)\.ckpt", best.name)[1])  # type: ignore[index]
    assert named == pytest.approx(max(metrics(directory, "val/acceptance")), abs=1e-4)
    assert record(directory)["results"]["best_val_acceptance"] == pytest.approx(named, abs=1e-4)
    head, of_checkpoint = load_head(directory), load_head(best)
    assert head.config == of_checkpoint.config
    for name, tensor in of_checkpoint.state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor), name
    assert {path.name for path in (directory / "head").iterdir()} == {"config.json", "model.safetensors"}


def test_a_run_draws_its_plots_and_prints_its_result(finished: tuple[Path, str]) -> None:
    directory, printed = finished
    plots = {path.name: path.read_bytes()[:8] for path in (directory / "plots").iterdir()}
    assert plots.keys() >= {"training.png", "acceptance_by_fill.png", "occupancy.png"}
    assert set(plots.values()) == {b"\x89PNG\r\n\x1a\n"}
    assert f"Real decoding of {FINAL_PROMPTS} held-out prompts" in printed and "untrained head" in printed
    assert "lossless yes" in printed and str(directory) in printed.replace("\n", "")


# -- what a run repeats ----------------------------------------------------------------------------------------------


def test_a_second_run_keeps_the_first_and_the_same_seed_gives_the_same_losses(
    finished: tuple[Path, str], arguments: Arguments
) -> None:
    first, _ = finished
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert cli.main(arguments("fit", first)) == 0
    second = first.with_name("first-2")
    assert record(second)["status"] == "finished" and record(second)["directory"] == "first-2"
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    for name in ("train/loss", "val/acceptance", "val/teacher_forced_kl", "tokens"):
        assert metrics(second, name) == metrics(first, name), name
    assert "final" not in record(second)["results"] and not (second / "plots").exists()


def test_the_written_configuration_repeats_the_run_and_another_seed_does_not(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    first, _ = finished
    changes = ["--run_dir", str(tmp_path / "again"), "--final.prompts", "0", "--trainer.max_steps", "2"]
    assert cli.main(["fit", "--config", str(first / "config.yaml"), *changes]) == 0
    assert metrics(tmp_path / "again", "train/loss")[:2] == metrics(first, "train/loss")[:2]
    changes[1] = str(tmp_path / "other")
    assert cli.main(["fit", "--config", str(first / "config.yaml"), *changes, "--data.seed", "1"]) == 0
    assert metrics(tmp_path / "other", "train/loss") != metrics(first, "train/loss")[:2]


def test_validating_the_last_checkpoint_gives_what_training_logged(
    finished: tuple[Path, str], arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = finished
    checkpoint = first / "checkpoints" / "last.ckpt"
    found = validated(arguments("validate", tmp_path / "none", ckpt_path=checkpoint), monkeypatch)
    for name in ("acceptance", "theoretical_speedup", "cycles", "teacher_forced_kl", "teacher_forced_top1"):
        assert found[f"val/{name}"] == pytest.approx(metrics(first, f"val/{name}")[-1], rel=1e-6), name
    assert not (tmp_path / "none").exists(), "validating leaves nothing behind"


# -- what ends badly -------------------------------------------------------------------------------------------------


def test_a_failing_run_says_so_in_run_json(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{no JSON\n")
    assert cli.main(arguments("fit", tmp_path / "run", data__train=broken)) == 2
    content = record(tmp_path / "run")
    assert content["status"].startswith("failed: InputError: data.train: 1 of 1 rows are bad")
    assert f"{broken}:1" in content["status"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data.train: ")


def test_a_broken_invariant_fails_the_run_and_leaves_its_state(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        decoding._Run,
        "_verdict",
        lambda self, leaving: self.hidden.pop(leaving) is None or self.drafts[leaving + 1].token,
    )
    with pytest.raises(BrokenInvariantError):
        cli.main(arguments("fit", tmp_path / "run"))
    assert record(tmp_path / "run")["status"].startswith("failed: BrokenInvariantError: Not lossless")
    assert load_head(tmp_path / "run" / "checkpoints" / "broken_invariant.ckpt").config.num_layers == 2


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("final__prompts", 40, "prompts"),
        ("final__prompts", -1, "final.prompts=-1"),
        ("final__max_new_tokens", 0, "final.max_new_tokens=0"),
        ("final__max_new_tokens", 100000, "context"),
        ("decoding__max_new_tokens", 100000, "context"),
        ("final__temperatures", "[0.0, -1.0]", "temperature"),
        ("final__temperatures", "[0.0, 0.0]", "final.temperatures"),
    ],
)
def test_what_could_not_be_evaluated_in_the_end_is_refused_before_training(
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: Any,
    says: str,
) -> None:
    def trains(*args: Any, **options: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr("lightning.Trainer.fit", trains)
    changes = {"final__prompts": 2} | {field: value}
    assert cli.main(arguments("fit", tmp_path / "run", **changes)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


# -- two ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_share_the_prompts_and_find_what_one_finds(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a learning rate that moves nothing: the head stays the untrained one that a single rank can validate
    changes = {"model__learning_rate": 1e-30, "model__adamw_learning_rate": 1e-30, "trainer__max_steps": 2}
    ranks = {"trainer__devices": 2, "trainer__strategy": "ddp"}
    done = program(arguments("fit", tmp_path / "two", **changes, **ranks), tmp_path)
    assert done.returncode == 0, done.stderr
    alone = validated(arguments("validate", tmp_path / "none"), monkeypatch)
    for name in ("acceptance", "theoretical_speedup", "cycles", "decoded_tokens", "lossless", "drift"):
        assert metrics(tmp_path / "two", f"val/{name}") == [pytest.approx(alone[f"val/{name}"], rel=1e-6)], name
    for name in (name for name in alone if name.startswith("val/teacher_forced")):
        assert metrics(tmp_path / "two", name) == [pytest.approx(alone[name], rel=1e-5)], name
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["two"], "one run, one directory"
    content = record(tmp_path / "two")
    assert content["status"] == "finished" and len(metrics(tmp_path / "two", "train/loss")) == 2
    assert load_head(tmp_path / "two").config.stage_layers == (1, 1, 1, 1)
