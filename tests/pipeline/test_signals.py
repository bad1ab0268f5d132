"""Ctrl-C, SIGTERM, and the death of the process that started the ranks: nothing stays, and what was said is kept."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
        pytest.param(True, signal.SIGINT, 130, id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param(False, signal.SIGINT, 130, id="SIGINT", marks=pytest.mark.slow),
        pytest.param(False, signal.SIGTERM, 143, id="SIGTERM", marks=pytest.mark.slow),
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


@pytest.mark.slow
def test_ranks_do_not_outlive_the_process_that_started_them(long_head: tuple[Path, Path]) -> None:
    head, folder = long_head
    port = free_port()
    with started(folder, head, port) as (process, ranks):
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: all(map(gone, ranks)), "the end of the ranks", 30)
        until(lambda: is_free(port), "the port", 30)


@pytest.mark.slow
def test_ranks_that_just_start_do_not_outlive_it_either(long_head: tuple[Path, Path]) -> None:
    head, folder = long_head
    port = free_port()
    command = [
        sys.executable, "-m", "spd_lightning", "generate", "--target", "tiny", "--head", str(head), "--prompt", PROMPT,
        "--workers", "2", "--port", str(port),
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: len(psutil.Process(process.pid).children()) == 2, "both ranks", 60)
    ranks = [child.pid for child in psutil.Process(process.pid).children()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: all(map(gone, ranks)), "the end of the ranks", 10)


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_ends_the_answer_and_not_the_session(long_head: tuple[Path, Path]) -> None:
    """The ranks are in the terminal's group, as in a shell: Ctrl-C reaches the leader, and it alone acts upon it."""
    head, folder = long_head
    command = [
        sys.executable, "-m", "spd_lightning", "generate", "--target", "tiny", "--head", str(head), "--workers", "2",
        "--max-new-tokens", "700", "--no-color",
    ]  # fmt: skip
    leader, follower = os.openpty()
    process = subprocess.Popen(
        command, cwd=folder, stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(follower)
    shown = bytearray()

    def read() -> None:
        with suppress(OSError):  # the terminal is closed
            while piece := os.read(leader, 4096):
                shown.extend(piece)

    threading.Thread(target=read, daemon=True).start()
    try:
        until(lambda: b"> " in shown, "the first prompt", 120)
        os.write(leader, b"Write a long story about all functions of the module os.\n")
        until(lambda: len(shown) > 400, "an answer")
        os.write(leader, b"\x03")
        until(lambda: b"interrupted |" in shown, "the end of the answer")
        at = len(shown)
        os.write(leader, b"/reset\nWhat is a path?\n")
        until(lambda: b"acceptance p" in shown[at:], "a second answer", 120)
        os.write(leader, b"\x04")
        until(lambda: process.poll() is not None, "the end of the session", 60)
        assert process.returncode == 0, shown.decode(errors="replace")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(leader)
