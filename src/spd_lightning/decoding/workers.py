"""Local ranks, started here (`--workers N`) and watched, so that none waits for a dead one and none is left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from spd_lightning.decoding.launch import BROKEN_PIPE, INTERRUPTED, JOB, PATIENCE, check_patience
from spd_lightning.decoding.signs import DONE, Beats
from spd_lightning.errors import InputError, first_line
from spd_lightning.processes import PARENT, VICTIM, pin

#: Seconds in which ranks may end by themselves, once they were asked to.
GRACE = 3.0
#: Seconds for the last words of ranks that end together.
_TOGETHER = 0.5
#: Two interrupts within so many seconds end everything.
_TWICE = 3.0


def start_workers(arguments: Sequence[str], workers: int, patience: float = PATIENCE, port: int = 0) -> int:
    """Run `python -m spd_lightning ARGUMENTS` on `workers` local ranks; returns the exit status of the whole.

    Args:
        port: of the store where ranks meet; 0 takes a free one.

    Raises:
        InputError: the port is taken, or is none.
    """
    # a module of the working directory must not stand in for one of a library
    safe = {"PYTHONSAFEPATH": "1"}
    return run_ranks([sys.executable, "-m", "spd_lightning", *arguments], workers, patience, port, variables=safe)


def run_ranks(
    command: Sequence[str],
    workers: int,
    patience: float = PATIENCE,
    port: int = 0,
    threads: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Run a command on local ranks and watch them; see `start_workers`.

    Args:
        threads: of each rank; default: its share of the cores.
        variables: of the environment, besides.
    """
    import torch.distributed as dist

    check_patience(patience)
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: expected a number from 1 to 65535, or 0 for a free one.")
    try:
        store = dist.TCPStore("127.0.0.1", port, None, True, timedelta(seconds=patience), wait_for_workers=False)
    except RuntimeError as error:
        raise InputError(f"--port {port} is taken ({first_line(error)}): choose another, or leave it out.") from error
    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    job = secrets.token_hex(8)
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers), PARENT: str(os.getpid()), JOB: job,
        **(variables or {}),
    }  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []
    with _Signals() as signals:
        try:
            for rank in range(workers):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                quiet = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "FATAL"}
                environment = {**quiet, **os.environ, **common, **own}
                processes.append(subprocess.Popen(list(command), env=environment))
                pin(processes[-1].pid, rank, workers)
            message, status = _Watch(processes, Beats(dist.PrefixStore(job, store), workers, patience), signals).run()
        finally:
            _end(processes)
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return status


class _Signals:
    """Signals that end a job, noted instead of raised: an exception could come between any two lines of a library.

    Those that are ignored stay so (nohup).
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))

    def __init__(self) -> None:
        self.came: list[tuple[int, float]] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in self.NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.came.append((number, time.monotonic()))


class _Watch:
    """Waits for all ranks to end, and ends them when one fails or a signal says so."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], beats: Beats, signals: _Signals) -> None:
        self.processes, self.beats, self.signals = processes, beats, signals
        self.codes: dict[int, int] = {}  # rank -> exit status, in the order in which they ended
        self._began = self._looked = time.monotonic()
        self._asked = False

    def run(self) -> tuple[str | None, int]:
        """A message, where there is something to say, and the status of the whole."""
        while True:
            self._poll()
            if (number := self._told_to_end()) is not None:
                return self._end_by(number)
            if any(code != 0 for code in self.codes.values()):
                deadline = time.monotonic() + _TOGETHER  # one that dies takes others along: see who was first
                while time.monotonic() < deadline and len(self.codes) < len(self.processes):
                    time.sleep(0.02)
                    self._poll()
                return self._cause()
            if len(self.codes) == len(self.processes):
                return None, 0
            if (lost := self._lost()) is not None:
                return lost, 1
            time.sleep(0.05)

    def _poll(self) -> None:
        for rank, process in enumerate(self.processes):
            if rank not in self.codes and (code := process.poll()) is not None:
                self.codes[rank] = code

    def _told_to_end(self) -> int | None:
        """The signal by which the job ends now.

        Ctrl-C on a terminal reaches the ranks too, and one that answers questions only ends its answer: they decide,
        unless it comes twice. Where nobody types, ranks that did not get it are asked after a moment.
        """
        interrupts = [when for number, when in self.signals.came if number == signal.SIGINT]
        for number, _ in self.signals.came:
            if number != signal.SIGINT:
                return number
        if not interrupts:
            return None
        if len(interrupts) > 1 and interrupts[-1] - interrupts[-2] < _TWICE:
            return signal.SIGINT
        if not sys.stdin or not sys.stdin.isatty():
            return signal.SIGINT if time.monotonic() - interrupts[0] > 2.0 else None
        return None

    def _end_by(self, number: int) -> tuple[str | None, int]:
        """Ask all ranks to end, and give them a moment.

        Raises:
            KeyboardInterrupt: for SIGINT, as in a command that runs in one process.
        """
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    os.kill(process.pid, number)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and len(self.codes) < len(self.processes):
            time.sleep(0.05)
            self._poll()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        return f"ended by {signal.Signals(number).name}", 128 + number

    def _lost(self) -> str | None:
        now = time.monotonic()
        if now - self._looked < min(1.0, self.beats.patience / 8):
            return None
        self._looked = now
        start = max(PATIENCE, self.beats.patience)
        if now - self._began > start and (missing := self.beats.missing()):
            return f"rank {', '.join(map(str, missing))} has not started within {start:g} s"
        return self.beats.lost()

    def _cause(self) -> tuple[str | None, int]:
        """Of the ranks that ended, the one that was the cause: killed, else failed, else aborted, else left alone.

        Raises:
            KeyboardInterrupt: it was interrupted.
        """
        order = list(self.codes)

        def guilt(rank: int) -> tuple[int, int]:
            code = self.codes[rank]
            kinds = {VICTIM: 4, -signal.SIGABRT: 3, 0: 5}
            return kinds.get(code, 1 if code < 0 else 2), order.index(rank)

        rank = min(order, key=guilt)
        code = self.codes[rank]
        if code == BROKEN_PIPE or self.beats.last(rank) == DONE:  # it left in order, and its status is the answer
            return None, code
        if code in (INTERRUPTED, -signal.SIGINT):
            raise KeyboardInterrupt
        why = self.beats.why(rank)
        if code < 0:
            why = f"was killed by {signal.Signals(-code).name}" + (
                " (out of memory?)" if code == -signal.SIGKILL else ""
            )
        elif code == VICTIM:
            why = "lost the connection to another rank"
        elif code == 2:  # wrong input is no rank's fault; of wrong flags each rank has said so in its one line
            return why, code
        else:
            why = f"ended: {why}" if why else f"ended with status {code}"
        return f"{self.beats.name(rank)} {why}; the other ranks were ended", 1 if code < 0 or code == VICTIM else code


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """No process outlives this."""
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
