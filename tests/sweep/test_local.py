"""A sweep on this machine: it finds the best, prunes, survives kills, and its results are what was run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from spd_lightning import cli
from spd_lightning.errors import InputError
from spd_lightning.sweep.file import read_sweep
from spd_lightning.sweep.local import LocalSweep

QUICK = Path(__file__).parent / "quick_fit.py"


def written(path: Path, **changes: Any) -> Path:
    content = {
        "program": str(QUICK),
        "command": ["${env}", "${interpreter}", "${program}", "fit", "${args}"],
        "method": "bayes",
        "metric": {"name": "val/score", "goal": "maximize"},
        "parameters": {"x": {"distribution": "uniform", "min": 0.0, "max": 1.0}, "steps": {"value": 3}},
    }
    path.write_text(yaml.safe_dump(content | changes))
    return path


def run(path: Path, folder: Path, count: int) -> LocalSweep:
    made = LocalSweep(read_sweep(path), folder)
    made.run(count, lambda line: None, lambda number, text: None)
    return made


def test_a_sweep_runs_so_many_trials_and_ranks_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "sweep.yaml", run_cap=7)
    assert cli.main(["sweep", str(path), "--local", "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = results["trials"]
    assert sorted(row["trial"] for row in rows) == list(range(7))
    assert [row["value"] for row in rows] == sorted((row["value"] for row in rows), reverse=True)
    for row in rows:
        assert row["state"] == "complete" and row["value"] == pytest.approx(1 - (row["parameters"]["x"] - 0.3) ** 2)
        assert (tmp_path / "out" / row["run"] / "metrics.jsonl").is_file()
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.startswith("| trial | state | val/score | x | s |") and table.count("complete") == 7
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    capfd.readouterr()
    assert cli.main(["sweep", str(path), "--local", "--output", str(tmp_path / "out"), "--trials", "8"]) == 0
    assert "7 of 8 trials done" in capfd.readouterr().err
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["trials"]) == 8, "it went on"


def test_the_field_that_matters_is_the_important_one(tmp_path: Path) -> None:
    parameters = {"x": {"min": 0.0, "max": 1.0}, "unread": {"min": 0.0, "max": 1.0}, "steps": {"value": 1}}
    made = run(written(tmp_path / "sweep.yaml", method="random", parameters=parameters), tmp_path / "out", 16)
    shares = made.importances()
    assert set(shares) == {"x", "unread"} and sum(shares.values()) == pytest.approx(1)
    assert shares["x"] > 0.6


def test_a_grid_is_gone_through_once(tmp_path: Path) -> None:
    parameters = {"x": {"values": [0.1, 0.2, 0.3]}, "mode": {"values": ["[0, 1]", "null"]}}
    made = run(written(tmp_path / "sweep.yaml", method="grid", parameters=parameters), tmp_path / "out", 100)
    found = {(row["parameters"]["x"], row["parameters"]["mode"]) for row in made.rows()}
    assert len(made.rows()) == 6 and len(found) == 6


def test_a_poor_trial_is_ended_early_and_says_so(tmp_path: Path) -> None:
    parameters = {"x": {"values": [0.3, 0.9, 0.95, 1.0]}, "steps": {"value": 4}, "seconds": {"value": 0.6}}
    early = {"type": "hyperband", "min_iter": 1, "eta": 2}
    path = written(tmp_path / "sweep.yaml", method="grid", parameters=parameters, early_terminate=early)
    made = run(path, tmp_path / "out", 4)
    states = {row["parameters"]["x"]: row["state"] for row in made.rows()}
    assert states[0.3] == "complete" and "pruned" in states.values()
    pruned = next(row for row in made.rows() if row["state"] == "pruned")
    lines = (tmp_path / "out" / pruned["run"] / "metrics.jsonl").read_text().splitlines()
    assert len(lines) < 4 and pruned["value"] is not None, "it was really stopped, and its value is shown"


def test_a_sweep_whose_trials_all_fail_ends_with_the_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parameters = {"x": {"min": 0.0, "max": 1.0}, "mode": {"value": "bad"}}
    path = written(tmp_path / "sweep.yaml", parameters=parameters, run_cap=9)
    assert cli.main(["sweep", str(path), "--local", "--output", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert "error: 3 trials in a row failed; the last: error: x=bad: expected something else" in error
    made = LocalSweep(read_sweep(path), tmp_path / "out")
    with pytest.raises(InputError, match="3 trials in a row failed"):  # it tries again: what was wrong may be mended
        made.run(9, lambda line: None, lambda number, text: None)
    assert len(made.rows()) == 6


@pytest.mark.parametrize(
    ("mode", "state", "starts"), [("killed", "complete", ["0", "1"]), ("always killed", "failed", ["0", "1"])]
)
def test_a_trial_that_is_killed_goes_on_once(tmp_path: Path, mode: str, state: str, starts: list[str]) -> None:
    parameters = {"x": {"value": 0.3}, "mode": {"value": mode}}
    made = run(written(tmp_path / "sweep.yaml", parameters=parameters), tmp_path / "out", 1)
    (row,) = made.rows()
    assert row["state"] == state and (tmp_path / "out" / row["run"] / "starts").read_text().split() == starts
    assert row["value"] == (1.0 if state == "complete" else None)


def test_a_metric_that_ends_as_no_number_is_a_failure(tmp_path: Path) -> None:
    parameters = {"x": {"value": 0.3}, "mode": {"value": "nan"}}
    made = run(written(tmp_path / "sweep.yaml", parameters=parameters), tmp_path / "out", 1)
    (row,) = made.rows()
    assert row["state"] == "failed" and row["value"] is None
    assert made.trials[0].user_attrs["why"] == "val/score ended as nan"


def test_a_launcher_may_stand_between_sweep_and_trial(tmp_path: Path) -> None:
    launcher = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)"
    command = ["${interpreter}", "-c", launcher, "${program}", "fit", "${args}"]
    made = run(written(tmp_path / "sweep.yaml", command=command), tmp_path / "out", 2)
    assert {row["state"] for row in made.rows()} == {"complete"}


def test_a_folder_is_of_one_sweep_at_a_time(tmp_path: Path) -> None:
    path, refused = written(tmp_path / "sweep.yaml"), []
    made = LocalSweep(read_sweep(path), tmp_path / "out")

    def tick(number: int, text: str) -> None:
        with pytest.raises(InputError, match="another sweep runs in this folder") as caught:
            run(path, tmp_path / "out", 2)
        refused.append(caught)

    made.run(1, lambda line: None, tick)
    assert refused
    run(path, tmp_path / "out", 2)


def test_another_sweep_is_not_mixed_in(tmp_path: Path) -> None:
    run(written(tmp_path / "sweep.yaml"), tmp_path / "out", 1)
    other = written(tmp_path / "other.yaml", metric={"name": "val/other", "goal": "maximize"})
    with pytest.raises(InputError, match="holds a sweep with another metric"):
        LocalSweep(read_sweep(other), tmp_path / "out")
    with pytest.raises(InputError, match="holds a sweep with another name"):
        LocalSweep(read_sweep(written(tmp_path / "sweep.yaml", name="renamed")), tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_sweep_that_is_killed_goes_on_with_the_trial_that_it_was_in(tmp_path: Path, number: signal.Signals) -> None:
    parameters = {"x": {"min": 0.0, "max": 1.0}, "steps": {"value": 6}, "seconds": {"value": 0.5}}
    path, out = written(tmp_path / "sweep.yaml", parameters=parameters), tmp_path / "out"
    words = [
        sys.executable,
        "-m",
        "spd_lightning",
        "sweep",
        str(path),
        "--local",
        "--output",
        str(out),
        "--trials",
        "2",
    ]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics = out / "trials" / "000" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert process.wait(30) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    time.sleep(1.5)
    written_then = len(metrics.read_text().splitlines())
    time.sleep(1.0)
    assert len(metrics.read_text().splitlines()) == written_then < 6, "the trial does not outlive its sweep"
    assert subprocess.run(words, capture_output=True, timeout=120).returncode == 0
    rows = json.loads((out / "results.json").read_text())["trials"]
    assert sorted(row["trial"] for row in rows) == [0, 1] and {row["state"] for row in rows} == {"complete"}
    starts = (out / "trials" / "000" / "run" / "starts").read_text().split()
    assert starts == ["0", str(written_then)], "it went on from where it was"
    assert len(metrics.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing", "--local"], "sweep nothing: no such file, and no sweep of that name"),
        (["tiny_trainin", "--local"], "Did you mean tiny_training?"),
        (["tiny_training", "--local", "--trials", "0"], "--trials 0: expected at least 1"),
        (["tiny_training"], "one of the arguments --local --show is required"),
    ],
)
def test_wrong_flags_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", *words]) == 2
    assert says in capsys.readouterr().err
