"""Ctrl-C, SIGTERM, and the death of the process that started the ranks: nothing stays, and what was said is kept."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

PROMPT = "What is a path?"


@pytest.fixture(scope="module")
def long_head(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target that never stops speaking, and an untrained head of two stages for it."""
    from spd_lightning.head.folder import save_head
    from spd_lightning.head.loading import new_head
    from spd_lightning.target.loading import load_target

    folder = tmp_path_factory.mktemp("signals") / "two"
    folder.mkdir()
    save_head(new_head(load_target("tiny", num_stages=2), num_layers=1), folder)
    return folder, folder.parent


@contextmanager
def started(folder: Path, head: Path, port: int, *more: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """`bench` on two ranks, of many prompts with forced acceptance, once it decodes; and the ranks' process numbers."""
    (folder / "p.txt").write_text("\n".join(f"{PROMPT} {number}" for number in range(400)))
    command = [
        sys.executable, "-m", "spd_lightning", "bench", "--target", "tiny", "--head", str(head), "--prompts", "p.txt",
        "--max-new-tokens", "200", "--forced-acceptance", "0.9", "--workers", "2", "--port", str(port), "--output",
        "b.json", *more,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        journal = folder / ".b.json.journal"
        until(lambda: journal.exists() and journal.read_text().count("\n") > 3, "the first prompts")
        yield process, [child.pid for child in psutil.Process(process.pid).children()]
    finally:
        for name in (".b.json.journal", ".b.json.journal.lock", "b.json"):
            (folder / name).unlink(missing_ok=True)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(happened: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.1)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a new job does too
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.mark.parametrize(
    ("to_all", "number", "status"),
    [
        pytest.param(True, signal.SIGINT, 130, id="Ctrl-C"),
        pytest.param(False, signal.SIGINT, 130, id="SIGINT", marks=pytest.mark.slow),
        pytest.param(False, signal.SIGTERM, 143, id="SIGTERM"),
        pytest.param(False, signal.SIGHUP, 129, id="SIGHUP", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_all_processes_and_keeps_the_rows(
    long_head: tuple[Path, Path], to_all: bool, number: signal.Signals, status: int
) -> None:
    head, folder = long_head
    port = free_port()
    with started(folder, head, port) as (process, ranks):
        assert len(ranks) == 2
        (os.killpg if to_all else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, err
        assert "Traceback" not in err and err.count("error: ") <= 1, err
        until(lambda: all(map(gone, ranks)), "the end of the ranks", 10)
        assert is_free(port)
        assert (folder / ".b.json.journal").read_text().count("\n") > 3, "the same command goes on from here"


def test_ranks_do_not_outlive_the_process_that_started_them(long_head: tuple[Path, Path]) -> None:
    head, folder = long_head
    port = free_port()
    with started(folder, head, port) as (process, ranks):
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: all(map(gone, ranks)), "the end of the ranks", 30)
        assert is_free(port)
