"""W&B's real agent against a server that is not there: two trials as real processes, and one that is told to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

AGENT = """
import json, os, sys, time
import wandb
from wandb.apis.public import sweeps
from wandb import wandb_agent

trials, stop, folder = json.loads(sys.argv[1]), sys.argv[2] == "stop", sys.argv[3]
config = json.loads(sys.argv[4])
sent, began = [], time.monotonic()

def heartbeat(api, agent_id, metrics, run_status):
    running = [name for name, alive in run_status.items() if alive]
    if running:
        begun = os.path.exists(os.path.join(folder, "run-stop", "metrics.jsonl"))
        return [{"type": "stop", "run_id": running[0]}] if stop and begun else []
    if len(sent) == len(trials):
        return [{"type": "exit"}]
    number = len(sent)
    sent.append(number)
    args = {name: {"value": value} for name, value in trials[number].items()}
    return [{"type": "run", "run_id": f"trial{number}", "program": config["program"], "args": args}]

sweeps._sweep_with_runs = lambda api, sweep, specs, **options: {"config": json.dumps(config)}
sweeps._register_agent = lambda api, host, sweep_id=None, **options: {"id": "agent0"}
sweeps._agent_heartbeat = heartbeat
wandb.Api = lambda *args, **options: None
failed = []
poll = wandb_agent.AgentProcess.poll

def watched(self):
    code = poll(self)
    if code is not None:
        print("ENDED", code, flush=True)
    return code

wandb_agent.AgentProcess.poll = watched
wandb_agent.run_agent("sweep0", count=len(trials))
"""


def run_agent(tmp_path: Path, trials: list[dict[str, Any]], stop: bool = False) -> subprocess.CompletedProcess[str]:
    import yaml

    path = Path(__file__).parents[2] / "recipes" / "sweeps" / "tiny_training.yaml"
    config = yaml.safe_load(path.read_text())
    script = tmp_path / "agent.py"
    script.write_text(AGENT)
    bin_folder = str(Path(sys.executable).parent)  # `${interpreter}` is `python`, looked up on the path
    environment = os.environ | {
        "WANDB_MODE": "offline", "WANDB_AGENT_REPORT_INTERVAL": "0", "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true",
    }  # fmt: skip
    words = [sys.executable, str(script), json.dumps(trials), "stop" if stop else "", str(tmp_path), json.dumps(config)]
    return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)


def fields(tmp_path: Path, name: str, model: Path, files: dict[str, str], **changes: Any) -> dict[str, Any]:
    return {
        "model.target": str(model), "model.num_stages": 4, "data.train": files["train"],
        "data.validation": files["validation"], "data.batch_size": 2, "data.validation_samples": 4,
        "decoding.prompts": 2, "decoding.max_new_tokens": 12, "decoding.every_steps": 2, "final.prompts": 0,
        "trainer.max_steps": 4, "trainer.log_every_n_steps": 1, "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False, "run_dir": str(tmp_path / name),
    } | changes  # fmt: skip


@pytest.mark.slow
def test_the_agent_runs_two_trials_whose_metric_reaches_their_wandb_runs(
    tmp_path: Path, model_folder: Path, data_files: dict[str, str]
) -> None:
    rates = [1e-3, 3e-3]
    trials = [
        fields(tmp_path, f"run-{i}", model_folder, data_files, **{"model.learning_rate": rate})
        for i, rate in enumerate(rates)
    ]
    done = run_agent(tmp_path, trials)
    assert done.returncode == 0 and done.stdout.count("ENDED 0") >= 2, done.stdout[-2000:] + done.stderr[-3000:]
    for number, rate in enumerate(rates):
        record = json.loads((tmp_path / f"run-{number}" / "run.json").read_text())
        assert record["status"] == "finished" and record["config"]["model"]["learning_rate"] == rate
        assert record["tracking"]["wandb"]["id"] == f"trial{number}", "the run that the agent has chosen"
        (folder,) = (tmp_path / f"run-{number}" / "wandb").glob("offline-run-*")
        assert folder.name.endswith(f"-trial{number}")


@pytest.mark.slow
def test_a_trial_that_the_server_ends_dies_by_the_signal_and_its_agent_counts_no_failure(
    tmp_path: Path, model_folder: Path, data_files: dict[str, str]
) -> None:
    trial = fields(
        tmp_path, "run-stop", model_folder, data_files, **{"trainer.max_steps": 100000, "decoding.every_steps": 50000}
    )
    done = run_agent(tmp_path, [trial], stop=True)
    assert f"ENDED {-signal.SIGTERM}" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]
    assert "consecutive failed runs" not in done.stderr
    record = json.loads((tmp_path / "run-stop" / "run.json").read_text())
    assert record["status"].startswith("stopped: stopped by SIGTERM")
    assert list((tmp_path / "run-stop" / "checkpoints").glob("step*.ckpt")), "and its state is there"
