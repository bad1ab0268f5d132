"""Launch lines of docs/scale.md: torchrun on two nodes, srun, and what a shared run directory looks like then."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scale_runs import logged

from spd_lightning.training.saving import newest_complete

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def start(command: Sequence[str], folder: Path, name: str, **environment: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.txt").open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | QUIET | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def fit(base: dict[str, Any], **fields: Any) -> list[str]:
    merged = base | {"data__global_batch_size": 8, "decoding__every_steps": 2} | fields
    return ["fit", "--config", "tiny", *(f"--{name.replace('__', '.')}={value}" for name, value in merged.items())]


@pytest.mark.slow
def test_torchrun_on_two_nodes_is_one_run_in_one_directory(base_fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {"trainer__max_steps": 4, "trainer__devices": 1, "trainer__num_nodes": 2, "run_dir": tmp_path / "run"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "older").touch()  # so that the run is called run-2, which only rank 0 finds out
    words = fit(base_fields, **fields, trainer__strategy="deepspeed_stage_2")
    port = str(20000 + os.getpid() % 5000)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    nodes = [
        start(
            [*launch, "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", port]
            + ["-m", "spd_lightning", *words],
            tmp_path,
            f"node{node}",
        )
        for node in range(2)
    ]
    try:
        codes = [node.wait(200) for node in nodes]
    finally:
        stop(nodes)
    said = [(tmp_path / f"node{node}.txt").read_text() for node in range(2)]
    assert codes == [0, 0], said
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["run", "run-2"]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["older"]
    assert len(logged(tmp_path / "run-2", "train/loss")) == 4, "one rank writes"
    assert json.loads((tmp_path / "run-2" / "run.json").read_text())["status"] == "finished"
    assert "Run directory" in said[0] and "Run directory" not in said[1]


@pytest.mark.slow
def test_slurm_warns_of_the_time_limit_and_the_run_saves_ends_and_is_requeued(
    base_fields: dict[str, Any], tmp_path: Path
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    (tools / "scontrol").chmod(0o755)
    fields = {"trainer__max_steps": 10**6, "decoding__every_steps": 10**6, "ckpt_path": "last"}
    fields |= {"trainer__devices": 2, "trainer__strategy": "ddp", "run_dir": tmp_path / "run"}
    words = fit(base_fields, **fields)
    job = {
        "SLURM_JOB_ID": str(31000 + os.getpid() % 900),
        "SLURM_JOB_NAME": "spd",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NODEID": "0",
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    tasks = [
        start(
            [sys.executable, "-m", "spd_lightning", *words],
            tmp_path,
            f"task{rank}",
            **job,
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
        )
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.1)
        for task in tasks:  # srun hands it on to every task
            task.send_signal(signal.SIGUSR1)
        codes = [task.wait(100) for task in tasks]
    finally:
        stop(tasks)
    said = [(tmp_path / f"task{rank}.txt").read_text() for rank in range(2)]
    assert codes == [128 + signal.SIGUSR1] * 2, said
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {job['SLURM_JOB_ID']}\n", "once, by rank 0"
    newest = newest_complete(tmp_path / "run" / "checkpoints")
    assert newest is not None and str(newest) in said[0] and "--ckpt_path last" in said[0]


def test_the_launch_lines_of_the_document_are_those_that_are_tested() -> None:
    text = DOCUMENT.read_text()
    for words in ("torchrun --nnodes", "--nproc_per_node", "srun", "--signal=USR1@", "--ckpt_path last", "--requeue"):
        assert words in text, words
    recipes = re.findall(r"--config (\w+)", text)
    assert recipes and all((DOCUMENT.parents[1] / "recipes" / f"{name}.yaml").exists() for name in recipes)
