"""Processes of a pipeline: started here (`--workers N`) or by torchrun, and watched so that none waits for a dead one.

Every rank counts up in the job's store from a thread and says what it is at. Who watches is whoever outlives a rank:
the process that started the workers, or under torchrun the other ranks. A rank that died, stopped or stands still ends
the job with ONE line that names it, its stage and the cause.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from spd_lightning.errors import InputError, first_line

#: Seconds without a sign of life after which a rank counts as lost.
PATIENCE = 60.0
#: Exit status of a rank that ends because another one is gone.
VICTIM = 75
_STARTED_HERE = "SPD_WORKER"


def launched() -> bool:
    """Whether this process is one rank of several: by `start_workers` or torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_patience(seconds: float) -> None:
    """Refuse a patience that would end healthy jobs."""
    if not seconds >= 2:
        raise InputError(f"--patience {seconds:g}: expected at least 2 seconds.")


# -- in a rank -------------------------------------------------------------------------------------------------------


class Member:
    """This process as a rank: its process group, its signs of life, and a decent end.

    Args:
        patience: see `PATIENCE`.
    """

    def __init__(self, patience: float) -> None:
        import torch.distributed as dist

        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.patience = patience
        self.role, self.state = "starting", "starting"
        if _STARTED_HERE in os.environ:
            _die_with_parent()
        elif hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == os.cpu_count():  # nobody chose cores
            pin(0, int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        limit = timedelta(seconds=patience)
        host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = dist.TCPStore(host, port, self.world, self.rank == 0 and not agent, limit, wait_for_workers=False)
            # a connection of its own: a thread that waits must not hold up the others
            self._store = dist.TCPStore(host, port, self.world, False, limit, wait_for_workers=False)
            self._beats = Beats(self._store, self.world, patience)
            self._beats.beat(self.rank, self.role, self.state)
            self._over = threading.Event()
            self._thread = threading.Thread(target=self._live, daemon=True, name="signs of life")
            self._thread.start()
            self._all_here()
            dist.init_process_group(
                "gloo", store=dist.PrefixStore("spd", store), rank=self.rank, world_size=self.world,
                timeout=timedelta(seconds=max(patience, 60)),
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"rank {self.rank} of {self.world} could not join the others at {host}:{port} within {patience:g} s "
                f"({first_line(error)}): is the port taken, does every rank run, are WORLD_SIZE and RANK right?"
            ) from error

    def _all_here(self) -> None:
        """Wait until every rank has given a sign; say which did not, instead of a library's timeout."""
        deadline = time.monotonic() + self.patience
        while missing := self._beats.missing():
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {', '.join(map(str, missing))} did not come")
            time.sleep(0.02)

    def _live(self) -> None:
        watches = _STARTED_HERE not in os.environ
        while not self._over.wait(min(1.0, self.patience / 8)):
            try:
                self._beats.beat(self.rank, self.role, self.state)
                lost = self._beats.lost() if watches else None
            except RuntimeError:
                self._leave("the store of the job is gone: the process that kept it ended")
                return
            if lost is not None:
                self._leave(
                    lost if self._store.compare_set("told", "", str(self.rank)) == str(self.rank).encode() else None
                )

    def _leave(self, message: str | None) -> None:
        if self._over.is_set():
            return
        if message is not None and (_STARTED_HERE not in os.environ):
            print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(VICTIM)

    def play(self, role: str) -> None:
        """From now on this rank goes by the name of what it does in the pipeline."""
        self.role = role
        self._beats.beat(self.rank, self.role, self.state)

    def failed(self, error: BaseException) -> None:
        """Tell the watching process why this rank ends."""
        with contextlib.suppress(RuntimeError):
            self._store.set(
                f"failed{self.rank}", first_line(error) if not isinstance(error, InputError) else str(error)
            )

    def close(self) -> None:
        """Leave the job in order."""
        import torch.distributed as dist

        self._over.set()
        self._thread.join()
        self._beats.done(self.rank)
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


@contextlib.contextmanager
def member(patience: float = PATIENCE) -> Iterator[Member]:
    """Be one rank of the job; whatever ends it is told to those who watch."""
    check_patience(patience)
    made = Member(patience)
    try:
        yield made
    except (Exception, KeyboardInterrupt) as error:
        # not by unwinding: threads that wait for messages would abort the interpreter, and its status with it
        os._exit(_last_words(made, error))
    made.close()


def _last_words(made: Member, error: BaseException) -> int:
    """Tell who watches, or under torchrun whoever reads, why this rank ends; its exit status."""
    from spd_lightning.decoding.links import LinkError

    here = _STARTED_HERE in os.environ
    status = VICTIM if isinstance(error, LinkError) else 2 if isinstance(error, InputError) else 1
    if isinstance(error, KeyboardInterrupt):
        status = 130
    elif isinstance(error, LinkError):  # someone else is the cause; who watches will say who
        if not here:
            print(f"error: {made.role} ends: {first_line(error)}", file=sys.stderr)
    else:
        made.failed(error)
        if status == 1 or os.environ.get("SPD_DEBUG", "0") not in ("", "0"):
            traceback.print_exception(error)
        elif not here:
            print(f"error: {' '.join(str(error).split())} ({made.role})", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    return status


class Beats:
    """Signs of life of all ranks in the job's store."""

    def __init__(self, store: Any, world: int, patience: float) -> None:
        self.store, self.world, self.patience = store, world, patience
        self._count = 0
        self._seen: dict[int, tuple[str, float]] = {}
        self._moved: tuple[str, float] = ("", time.monotonic())

    def beat(self, rank: int, role: str, state: str) -> None:
        self._count += 1
        self.store.set(f"beat{rank}", json.dumps([self._count, role, state]))

    def done(self, rank: int) -> None:
        with contextlib.suppress(RuntimeError):
            self.store.set(f"beat{rank}", "done")

    def missing(self) -> list[int]:
        return [rank for rank in range(self.world) if not self.store.check([f"beat{rank}"])]

    def name(self, rank: int) -> str:
        """The rank with its stage, as far as it is known."""
        if not self.store.check([f"beat{rank}"]):
            return f"rank {rank}"
        beat = self.store.get(f"beat{rank}").decode()
        role = "" if beat == "done" else json.loads(beat)[1]
        return role if role.startswith("rank") else f"rank {rank}" + (f" ({role})" if role else "")

    def lost(self) -> str | None:
        """A line about a rank that gives no sign of life, or about a job that stands still; None while all is well."""
        now, states = time.monotonic(), {}
        for rank in range(self.world):
            key = f"beat{rank}"
            beat = self.store.get(key).decode() if self.store.check([key]) else ""
            before, since = self._seen.get(rank, (None, now))
            if beat != before or beat == "done":
                self._seen[rank] = (beat, now)
            elif beat and now - since > self.patience:  # who never came is told by those who wait for it
                return (
                    f"{self.name(rank)} gave no sign of life for {self.patience:g} s: it hangs, or its machine is gone"
                )
            if beat and beat != "done":
                states[rank] = json.loads(beat)[2]
        everything = json.dumps(states)
        if everything != self._moved[0] or not any("cycle" in state for state in states.values()):
            self._moved = (everything, now)
        elif now - self._moved[1] > self.patience:
            rank = min(states, key=lambda rank: ("waits" in states[rank], _cycle(states[rank])))
            return f"{self.name(rank)} stands still for {self.patience:g} s ({states[rank]})"
        return None


def _cycle(state: str) -> int:
    """The cycle that a rank says it is in; who is behind holds up the others."""
    words = state.replace(",", " ").split()
    return int(words[1]) if words[:1] == ["cycle"] else 0


def pin(process: int, rank: int, ranks: int) -> None:
    """Give a process (0: this one) its own share of the cores; where there are fewer cores than ranks, none.

    A rank's threads (its work, gloo, verdicts) then never disturb another rank's work: on two cores a cycle of empty
    stages takes a third of the time.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // ranks
    if share:
        with contextlib.suppress(OSError):  # a process that is gone already, or a place that forbids it
            os.sched_setaffinity(process, cores[rank * share : (rank + 1) * share])


# -- the process that starts them --------------------------------------------------------------------------------------


def start_workers(arguments: Sequence[str], workers: int, patience: float = PATIENCE, port: int = 0) -> int:
    """Run `python -m spd_lightning ARGUMENTS` on `workers` local ranks; returns the exit status of the whole.

    Args:
        port: of the store where ranks meet; 0 takes a free one.

    Raises:
        InputError: the port is taken.
    """
    return run_ranks([sys.executable, "-m", "spd_lightning", *arguments], workers, patience, port)


def run_ranks(
    command: Sequence[str], workers: int, patience: float = PATIENCE, port: int = 0, threads: int | None = None
) -> int:
    """Run a command on local ranks and watch them; see `start_workers`."""
    import torch.distributed as dist

    check_patience(patience)
    try:
        store = dist.TCPStore("127.0.0.1", port, None, True, timedelta(seconds=patience), wait_for_workers=False)
    except RuntimeError as error:
        raise InputError(f"--port {port} is taken ({first_line(error)}): choose another, or leave it out.") from error
    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers), _STARTED_HERE: "1",
    }  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []
    beats = Beats(store, workers, patience)
    with _signals_as_interrupt() as came:
        try:
            for rank in range(workers):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **common, **own}
                processes.append(subprocess.Popen(list(command), env=environment))
                pin(processes[-1].pid, rank, workers)
            message, status = _watched(processes, beats)
        except KeyboardInterrupt:
            _end(processes, grace=3.0)
            if came:
                print(f"error: ended by {signal.Signals(came[0]).name}", file=sys.stderr, flush=True)
                return 128 + came[0]
            raise
        _end(processes, grace=0.0 if message else 5.0)
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def _watched(processes: Sequence[subprocess.Popen[bytes]], beats: Beats) -> tuple[str | None, int]:
    """Wait for all to end; a message and a status as soon as one failed."""
    looked = time.monotonic()
    while True:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return None, 0
        if any(code not in (None, 0) for code in codes):
            time.sleep(0.5)  # one that dies takes others along: see who was first
            return _cause([process.poll() for process in processes], beats)
        if time.monotonic() - looked > min(1.0, beats.patience / 8):
            looked = time.monotonic()
            if (lost := beats.lost()) is not None:
                return lost, 1
        time.sleep(0.05)


def _cause(codes: Sequence[int | None], beats: Beats) -> tuple[str | None, int]:
    """Of several ranks that ended, the one that was the cause: killed, then failed, then merely left alone."""

    def guilt(rank: int) -> int:
        code = codes[rank]
        return 3 if code is None or code == 0 else 0 if code < 0 else 2 if code == VICTIM else 1

    rank = min(range(len(codes)), key=guilt)
    code = codes[rank] or 0
    if code < 0:
        name = signal.Signals(-code).name
        why = f"was killed by {name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    elif code == VICTIM:
        why = "lost the connection to another rank"
    elif beats.store.check([f"failed{rank}"]):
        why = beats.store.get(f"failed{rank}").decode()
        if code == 2:  # wrong input is wrong on all ranks alike
            return why, code
        why = f"ended: {why}"
    elif code == 2:  # the rank has said why in its one line
        return None, code
    else:
        why = f"ended with status {code}"
    return f"{beats.name(rank)} {why}; the other ranks were ended", 1 if code < 0 or code == VICTIM else code


def _end(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """No process outlives this: ask, wait, kill."""
    deadline = time.monotonic() + grace
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


@contextlib.contextmanager
def _signals_as_interrupt() -> Iterator[list[int]]:
    """SIGTERM and a closed terminal end workers as Ctrl-C does; yields a list that holds the one that came."""
    came: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """Linux: the kernel ends this process when the one that started it is gone; elsewhere the lost store tells."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
