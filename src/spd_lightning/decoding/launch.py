"""This process as one rank of a job, started by `workers` (`--workers N`) or torchrun, and how it ends.

Every rank counts up in the job's store from a thread and says what it is at. Who watches is whoever outlives a rank:
the process that started the workers, or under torchrun the other ranks. A rank that died, stopped or stands still ends
the job with ONE line that names it, its stage and the cause.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta

from spd_lightning.decoding.signs import DONE, Beats
from spd_lightning.errors import InputError, first_line
from spd_lightning.processes import VICTIM, all_cores_are_ours, die_with_parent, pin, started_here

#: Seconds without a sign of life after which a rank counts as lost.
PATIENCE = 60.0
#: What keeps the messages of a job apart from those of another one on the same port.
JOB = "SPD_JOB"
BROKEN_PIPE, INTERRUPTED = 141, 130
#: Errors that say everything in one line.
_PLAIN = (OSError, MemoryError)


def launched() -> bool:
    """Whether this process is one rank of several: by `start_workers` or torchrun.

    Raises:
        InputError: for variables of a launcher that are not numbers, or a part of them.
    """
    world = _number("WORLD_SIZE", 1)
    if world > 1:
        _number("RANK"), _number("MASTER_PORT", 29500), _number("LOCAL_RANK", 0)
    return world > 1


def _number(variable: str, default: int | None = None) -> int:
    text = os.environ.get(variable)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise InputError(
            f"{variable}={'(not set)' if text is None else text!r}: expected a number, as torchrun sets it for every "
            "rank. Start ranks by torchrun or --workers, or unset WORLD_SIZE."
        )
    return int(text)


def check_patience(seconds: float) -> None:
    """Refuse a patience that would end healthy jobs."""
    if not 2 <= seconds <= 1e6:
        raise InputError(f"--patience {seconds:g}: expected from 2 to 1,000,000 seconds.")


class Member:
    """This process as a rank: its process group, its signs of life, and a decent end.

    Args:
        patience: see `PATIENCE`.
    """

    def __init__(self, patience: float) -> None:
        import torch.distributed as dist

        die_with_parent()
        self.rank, self.world = _number("RANK"), _number("WORLD_SIZE")
        self.patience = patience
        self.role, self.state = "starting", "starting"
        if not started_here() and all_cores_are_ours():
            pin(0, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1))
        limit = timedelta(seconds=patience)
        host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), _number("MASTER_PORT", 29500)
        self._keeps_store = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = dist.TCPStore(host, port, self.world, self._keeps_store, limit, wait_for_workers=False)
            # a connection of its own: a thread that waits must not hold up the others
            mine = dist.TCPStore(host, port, self.world, False, limit, wait_for_workers=False)
            job = os.environ.get(JOB, "spd")
            self.beats = Beats(dist.PrefixStore(job, mine), self.world, patience)
            self.beats.beat(self.rank, self.role, self.state)
            self._over = threading.Event()
            self._thread = threading.Thread(target=self._live, daemon=True, name="signs of life")
            self._thread.start()
            self._all_here()
            dist.init_process_group(
                "gloo", store=dist.PrefixStore(f"{job} groups", store), rank=self.rank, world_size=self.world,
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
        while missing := self.beats.missing():
            # a rank that `--workers` started is waited for by who started it
            if time.monotonic() > deadline and not started_here():
                raise RuntimeError(f"rank {', '.join(map(str, missing))} did not come")
            time.sleep(0.02)

    def _live(self) -> None:
        while not self._over.wait(min(1.0, self.patience / 8)):
            try:
                self.beats.beat(self.rank, self.role, self.state)
                lost = None if started_here() else self.beats.lost()
            except RuntimeError:
                self._leave("the store of the job is gone: the process that kept it ended")
                return
            if lost is not None:
                self._leave(lost if self.tells() else None)

    def tells(self) -> bool:
        """Whether this rank is the one that tells why the job ends; under torchrun all of them could."""
        me = str(self.rank)
        with contextlib.suppress(RuntimeError):
            return bool(self.beats.store.compare_set("told", "", me).decode() == me)
        return True

    def _leave(self, message: str | None) -> None:
        if self._over.is_set():
            return
        if message is not None and not started_here():
            print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(VICTIM)

    def play(self, role: str) -> None:
        """From now on this rank goes by the name of what it does in the pipeline."""
        self.role = role
        self.beats.beat(self.rank, self.role, self.state)

    def close(self) -> None:
        """Leave the job in order."""
        import torch.distributed as dist

        self._over.set()
        self._thread.join()
        self.beats.done(self.rank)
        deadline = time.monotonic() + self.patience
        with contextlib.suppress(RuntimeError):
            while self._keeps_store and not self.beats.all_done() and time.monotonic() < deadline:
                time.sleep(0.05)  # whoever is still at work would take the end of the store for a death
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

    status = 2 if isinstance(error, InputError) else 1
    if isinstance(error, KeyboardInterrupt):
        status = INTERRUPTED
    elif isinstance(error, BrokenPipeError):  # whoever read the output has left
        status = BROKEN_PIPE
        made.beats.done(made.rank)
    elif isinstance(error, LinkError):
        status = VICTIM
        _blame(made, error.rank)
    else:
        why = " ".join(str(error).split()) if isinstance(error, InputError) else first_line(error)
        if isinstance(error, MemoryError) or "cannot allocate memory" in str(error).lower():
            why = f"out of memory: {why}"
        made.beats.failed(made.rank, why)
        told = not started_here() and made.tells()
        if not (isinstance(error, (InputError, *_PLAIN)) or _out_of_memory(error)) or _debugs():
            traceback.print_exception(error)
        if told:
            print(f"error: {why} ({made.role})", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
            stream.flush()
    return status


def _blame(made: Member, other: int) -> None:
    """Someone else is the cause of a broken connection. Who started the ranks knows who; under torchrun this says it.

    The end is put off, so that whoever looks for the first to end finds the cause and not this rank.
    """
    if started_here():
        return
    time.sleep(0.3)  # for its last words
    if made.beats.last(other) != DONE and made.beats.why(other) is None and made.tells():
        print(f"error: {made.beats.name(other)} ended without a word: was it killed?", file=sys.stderr, flush=True)
    time.sleep(2.0)


def _out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def _debugs() -> bool:
    return os.environ.get("SPD_DEBUG", "0") not in ("", "0")
