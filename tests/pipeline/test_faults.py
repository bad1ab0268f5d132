"""What ends a rank ends the job: one line that names it, its stage and the cause, in time, and no process stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.test_pipeline import run_ranks
from spd_lightning.decoding.launch import launched
from spd_lightning.decoding.pipeline import BETWEEN
from spd_lightning.decoding.signs import Beats
from spd_lightning.decoding.workers import _Signals, _Watch
from spd_lightning.errors import InputError
from spd_lightning.processes import pin

HERE = Path(__file__).parent
PATIENCE = 4.0


def strike(heads: str, rank: int, when: str, what: str, message: str) -> None:
    world = 4 if heads == "alone" else 3
    began = time.monotonic()
    done = run_ranks(world, HERE / "fault_worker.py", heads, rank, when, what, PATIENCE, patience=PATIENCE)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and re.search(message, errors[0]), done.stderr[-3000:]
    assert "Traceback" not in done.stderr, "one line says it"
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", done.stdout)]
    assert len(pids) == world and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert time.monotonic() - began < 120


CASES = [
    ("together", 1, "cycle 30", "memory", r"rank 1: stage 1 ended: CUDA out of memory"),
]
#: More of what ends a rank, or is found at start.
OTHERS = [
    ("together", 1, "cycle 30", "SIGSTOP", r"rank 1: stage 1 gave no sign of life for 4 s"),
    ("together", 0, "cycle -1", "SIGKILL", r"rank 0: stage 0 \+ head was killed by SIGKILL"),
    ("together", 1, "never", "other head", r"head is \w+ on rank 0 and \w+ on rank 1"),
    ("together", 2, "never", "other version", r"torch version is 2\.\S+ on rank 0 and 1\.0\.0 on rank 2"),
    ("together", 0, "cycle 30, stage", "freeze", r"rank 0: stage 0 \+ head stands still for 4 s .*--patience"),
    ("together", 1, "cycle 30", "input", r"^error: the logits are not finite: the weights"),
    ("alone", 1, "never", "other target", r"target is llama, 6 layers of 32 on rank 0 and llama, 6 layers of 64 on"),
    ("alone", 3, "never", "other split", r"split \(stage_layers\) is \[2, 2, 2\] on rank 0 and \[2, 1, 3\] on rank 3"),
    ("together", 1, "never", "other chunk", r"prefill_chunk is 256 on rank 0 and 7 on rank 1"),
]
MANY = [
    (heads, rank, when, "SIGKILL", rf"rank {rank}: .* was killed by SIGKILL")
    for heads, world in (("together", 3), ("alone", 4))
    for rank in range(world)
    for when in ("cycle -1", f"cycle {max(1, rank % 3)},", "cycle 40")  # stage 2 is idle before cycle 2
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
def test_whatever_ends_any_rank_at_any_time_it_is_named(
    heads: str, rank: int, when: str, what: str, message: str
) -> None:
    strike(heads, rank, when, what, message)


@pytest.mark.slow
def test_under_torchrun_one_rank_names_the_one_that_was_killed(tmp_path: Path) -> None:
    """Nobody outlives the ranks but torchrun, which knows no stages."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3",
        str(HERE / "fault_worker.py"), "together", "1", "cycle 30", "SIGKILL", "20",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    # torchrun ends the others as soon as it sees the death, maybe before one of them could tell
    assert errors in ([], ["error: rank 1: stage 1 ended without a word: was it killed?"]), done.stderr[-3000:]
    assert re.search(r"Root Cause.*?rank +: 1 .*?exitcode +: -9", done.stderr, re.DOTALL), done.stderr[-3000:]
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", done.stdout)]
    assert len(pids) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


# -- what the watch makes of statuses and signs, without processes ---------------------------------------------------


class Store(dict[str, str]):
    """As much of torch's store as signs of life need."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key].encode()


@pytest.fixture
def beats() -> Beats:
    made = Beats(Store(), 3, patience=4.0)
    for rank in range(3):
        made.beat(rank, f"rank {rank}: stage {rank}", "cycle 3, waits")
    return made


def watch(beats: Beats, codes: dict[int, int]) -> _Watch:
    made = _Watch([None] * beats.world, beats, _Signals())  # type: ignore[list-item]
    made.codes = codes
    return made


@pytest.mark.parametrize(
    ("codes", "why", "expected"),
    [
        ({2: 75, 0: -9, 1: 75}, {}, ("rank 0: stage 0 was killed by SIGKILL (out of memory?); the other ranks", 1)),
        ({1: -9, 0: -6}, {}, ("rank 1: stage 1 was killed by SIGKILL (out of memory?); the other ranks", 1)),
        ({0: -6, 1: 1}, {1: "a bug"}, ("rank 1: stage 1 ended: a bug; the other ranks", 1)),
        ({1: 1, 0: 1}, {0: "late", 1: "first"}, ("rank 1: stage 1 ended: first; the other ranks", 1)),
        ({1: 2}, {1: "--head x is damaged"}, ("--head x is damaged", 2)),
        ({0: 2, 1: 2, 2: 2}, {}, (None, 2)),
        ({1: 141, 0: 75}, {}, (None, 141)),
    ],
    ids=["killed", "killed before aborted", "failed before aborted", "first", "input", "flags", "pipe"],
)
def test_of_several_ranks_that_ended_the_cause_is_named(
    beats: Beats, codes: dict[int, int], why: dict[int, str], expected: tuple[str | None, int]
) -> None:
    for rank, text in why.items():
        beats.failed(rank, text)
    message, status = watch(beats, codes)._cause()
    assert status == expected[1]
    assert status != 2 or message == expected[0]  # wrong input is told as it is, whichever rank found it
    assert message is expected[0] is None or (message or "").startswith(expected[0] or "?")


def test_the_status_of_a_rank_that_left_in_order_is_the_answer(beats: Beats) -> None:
    beats.done(1)
    assert watch(beats, {1: 1, 0: 75})._cause() == (None, 1), "such as a bench that was not lossless"
    beats.store.set("beat1", "x")
    with pytest.raises(KeyboardInterrupt):
        watch(beats, {0: 130, 1: 130})._cause()


def test_a_job_that_waits_for_a_question_or_was_suspended_is_not_lost(
    beats: Beats, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    beats = Beats(beats.store, 3, patience=4.0)

    def signs(state: str) -> None:
        for rank in range(3):
            beats.beat(rank, f"rank {rank}: stage {rank}", state)

    for _ in range(20):  # nobody types for 20 s
        signs(BETWEEN)
        assert beats.lost() is None
        clock[0] += 1
    signs("cycle 3, stage")
    assert beats.lost() is None
    clock[0] += 60  # everything was stopped, the watch too
    assert beats.lost() is None
    for _ in range(6):
        clock[0] += 1
        signs("cycle 3, stage")
        lost = beats.lost()
    assert lost is not None and lost.startswith("rank 0: stage 0 stands still for 4 s (cycle 3, stage)")
    for _ in range(6):
        clock[0] += 1
        lost = beats.lost()
    assert lost is not None and "rank 0: stage 0 gave no sign of life for 4 s" in lost


def test_signals_that_are_ignored_stay_ignored() -> None:
    """nohup ignores SIGHUP, and a job that runs for days must not end when its terminal does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        assert [number for number, _ in signals.came] == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': expected a number"),
        ({"WORLD_SIZE": "2"}, r"RANK='\(not set\)': expected a number"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "abc"}, "MASTER_PORT='abc'"),
    ],
)
def test_wrong_variables_of_a_launcher_are_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        launched()


def test_cores_are_shared_out_and_never_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 1, 0, 2, 7}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: given.append((process, cores)), raising=False)
    for rank in range(2):
        pin(10 + rank, rank, 2)
    pin(99, 0, 6)  # more ranks than cores: nobody has one of its own
    assert given == [(10, [0, 1]), (11, [2, 3])]
