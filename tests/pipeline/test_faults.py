"""What ends a rank ends the job: one line that names it, its stage and the cause, in time, and no process stays."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from pipeline.test_pipeline import run_ranks

HERE = Path(__file__).parent
PATIENCE = 4.0


def strike(heads: str, rank: int, when: str, what: str, message: str) -> None:
    world = 4 if heads == "alone" else 3
    began = time.monotonic()
    done = run_ranks(world, HERE / "fault_worker.py", heads, rank, when, what, PATIENCE, patience=PATIENCE)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and re.search(message, errors[0]), done.stderr[-3000:]
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", done.stdout)]
    assert len(pids) == world and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert time.monotonic() - began < 120


CASES = [
    ("together", 0, "cycle -1", "SIGKILL", r"rank 0: stage 0 \+ head was killed by SIGKILL"),
    ("together", 1, "cycle 30", "SIGSTOP", r"rank 1: stage 1 gave no sign of life for 4 s"),
    ("together", 1, "cycle 30", "memory", r"rank 1: stage 1 ended: CUDA out of memory"),
    ("together", 0, "cycle 30, stage", "freeze", r"rank 0: stage 0 \+ head stands still for 4 s"),
    ("together", 1, "never", "other head", r"head is \w+ on rank 0 and \w+ on rank 1"),
    ("together", 2, "never", "other version", r"torch version is 2\.\S+ on rank 0 and 1\.0\.0 on rank 2"),
]
#: Differences that are found at start like those above.
OTHERS = [
    ("alone", 1, "never", "other target", r"target is llama, 6 layers of 32 on rank 0 and llama, 6 layers of 64 on"),
    ("alone", 3, "never", "other split", r"split \(stage_layers\) is \[2, 2, 2\] on rank 0 and \[2, 1, 3\] on rank 3"),
    ("together", 1, "never", "other chunk", r"prefill_chunk is 256 on rank 0 and 7 on rank 1"),
]
MANY = [
    (heads, rank, when, "SIGKILL", rf"rank {rank}: .* was killed by SIGKILL")
    for heads, world in (("together", 3), ("alone", 4))
    for rank in range(world)
    for when in ("cycle -1", "cycle 1,", "cycle 40")
] + [
    (heads, rank, when, "SIGSTOP", rf"rank {rank}: .* gave no sign of life for 4 s")
    for heads, rank, when in (
        ("together", 0, "cycle -1"), ("together", 2, "cycle 40"), ("alone", 3, "cycle 1,"), ("alone", 2, "cycle 40")
    )
]  # fmt: skip


@pytest.mark.parametrize(("heads", "rank", "when", "what", "message"), CASES)
def test_a_rank_that_ends_is_named(heads: str, rank: int, when: str, what: str, message: str) -> None:
    strike(heads, rank, when, what, message)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "rank", "when", "what", "message"), [*OTHERS, *MANY])
def test_every_rank_can_be_killed_at_any_time(heads: str, rank: int, when: str, what: str, message: str) -> None:
    strike(heads, rank, when, what, message)
