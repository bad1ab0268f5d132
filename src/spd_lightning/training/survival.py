"""Runs that survive: told to stop, they save and end; steps that are not finite are left out; dead ranks end the rest.

Every decision that one rank alone can make (a signal came, a gradient is not finite) is agreed on before anyone acts,
so that all ranks save together and leave together.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from spd_lightning.data.batches import Batch
from spd_lightning.errors import InputError, first_line
from spd_lightning.training.saving import SavedWhole, SaveProgress, step_ended, validation_follows


@dataclass(frozen=True)
class Survival:
    """What a run does to lose nothing.

    Args:
        save_every_steps: save the state every so many optimizer steps, besides at every validation.
        save_every_minutes: save it when the last save is so many minutes ago.
        keep: how many of the newest states stay on the disk; the best head stays besides.
        skipped_steps: optimizer steps with a non-finite loss or gradient that are left out (their batches are written
            to run_dir/skipped) before the run stops.
        dead_rank_seconds: how long a rank may give no sign of life before the others end.
    """

    save_every_steps: int | None = None
    save_every_minutes: float | None = None
    keep: int = 2
    skipped_steps: int = 10
    dead_rank_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("save_every_steps", self.save_every_steps, 1),
            ("keep", self.keep, 1),
            ("skipped_steps", self.skipped_steps, 0),
            ("dead_rank_seconds", self.dead_rank_seconds, 2),
        ):
            if value is not None and value < least:
                raise InputError(f"survival.{name}={value}: expected at least {least}.")
        if self.save_every_minutes is not None and not self.save_every_minutes > 0:
            raise InputError(f"survival.save_every_minutes={self.save_every_minutes}: expected a positive number.")


# -- told to stop ----------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """The run was told to stop by a signal, and its state is saved."""

    def __init__(self, number: int, path: Path) -> None:
        self.signal, self.path = signal.Signals(number), path
        super().__init__(
            f"stopped by {self.signal.name}; the state is saved in {path}. Go on with --ckpt_path last and the same "
            "configuration."
        )


class StopOnSignal(L.Callback):
    """SIGTERM (pre-emption, `scancel`, a container's end) or SIGUSR1 (SLURM's warning before a time limit): save, end.

    The optimizer step, or the prompt of a validation, that is under way is finished first. A validation that was
    interrupted is repeated on resuming.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, progress: SaveProgress) -> None:
        self.progress, self.received = progress, 0
        self._stopped: StoppedError | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals instead of dying by them; only in a main thread, where Python lets one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.received = number

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning has put a handler of its own in front by now, which meets the other ranks wherever they are
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                signal.signal(number, self._note)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if step_ended(trainer) and not validation_follows(trainer):
            self._stopped = self._agreed(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self._stopped is not None:  # the loggers have the figures of the last step now
            raise self._stopped

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.check(trainer)

    def check(self, trainer: L.Trainer) -> None:
        """Between two pieces of a validation, where all ranks meet: end it if any of them was told to stop."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and (stopped := self._agreed(trainer)):
            raise stopped

    def _agreed(self, trainer: L.Trainer) -> StoppedError | None:
        """A meeting of all ranks: where one was told to stop, all save."""
        numbers = torch.tensor(float(self.received), device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(numbers, reduce_op="max"))
        if not number:
            return None
        path = self.progress.save(trainer)
        if number == signal.SIGUSR1:
            _requeue()
        return StoppedError(number, path)


@rank_zero_only
def _requeue() -> None:
    """SLURM requeues what it pre-empts by itself, but not what reaches its time limit."""
    job = os.environ.get("SLURM_JOB_ID")
    if job and shutil.which("scontrol"):
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if done.returncode:
            print(f"scontrol requeue {job}: {done.stderr.strip()}", file=sys.stderr)


# -- steps that are not finite ---------------------------------------------------------------------------------------


class SkippedSteps(L.Callback):
    """Counts optimizer steps that were left out for a non-finite gradient, and keeps what they were made of.

    Args:
        directory: each rank writes step{step}-rank{rank}.pt there: its micro-batches and their losses.
        limit: how many may be left out before the run stops.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        self.count = 0
        self._batches: list[tuple[Batch, Tensor]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.directory = Path(trainer.strategy.broadcast(str(self.directory)))  # rank 0 knows what the run is called

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batches.append((batch, outputs["loss"].detach()))
        if not step_ended(trainer):
            return
        batches, self._batches = self._batches, []
        if pl_module.step_applied:
            return
        self.count += 1
        step = trainer.global_step
        path = self.directory / f"step{step:08d}-rank{trainer.global_rank}.pt"
        with SavedWhole(path) as temporary:
            cpu = [{name: x.cpu() for name, x in batch.items()} for batch, _ in batches]
            torch.save({"step": step, "batches": cpu, "losses": [float(loss) for _, loss in batches]}, temporary)
        rank_zero_warn(
            f"Step {step} is left out: its gradient is not finite. Its batches lie in {self.directory} "
            f"({self.count} of at most {self.limit} such steps)."
        )
        if self.count > self.limit:
            raise InputError(
                f"survival.skipped_steps={self.limit}: step {step} is number {self.count} whose loss or gradient is "
                f"not finite (batches: {self.directory}). Lower model.learning_rate (now "
                f"{pl_module.settings.learning_rate}) or trainer.gradient_clip_val."
            )


def gradients_finite(parameters: Iterator[torch.nn.Parameter]) -> bool:
    """Whether all gradients are finite numbers."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return not gradients or bool(torch.nn.utils.get_total_norm(gradients).isfinite())


# -- ranks that are gone ---------------------------------------------------------------------------------------------


class RankWatch(L.Callback):
    """Ends this process with a message when another rank died or hangs, instead of waiting in a collective.

    Every rank counts up in a store that rank 0 keeps. Rank 0 looks at all of them, the others at rank 0.

    Args:
        patience: seconds without a sign of life.
    """

    def __init__(self, patience: float) -> None:
        self.patience, self.interval = patience, min(2.0, patience / 4)
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size == 1:
            return
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store = None
        if trainer.is_global_zero:
            store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port = trainer.strategy.broadcast(store.port if store else 0)
        if store is None:
            store = torch.distributed.TCPStore(host, port, timeout=timedelta(seconds=self.patience))
        self._store, self._rank, self._ranks = store, trainer.global_rank, trainer.world_size
        self._answered = time.monotonic()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._count, self._watch)]
        for thread in self._threads:
            thread.start()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # Lightning tears no callback down after an exception, and a process whose thread is in the store's code when it
        # ends may be aborted: a run that is stopped leaves here
        stopped = isinstance(exception, StoppedError)
        message = f"rank {trainer.global_rank} ({socket.gethostname()}) ended: {first_line(exception)}"
        self._leave(None if stopped else message)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._leave(None)

    def _leave(self, message: str | None) -> None:
        """Stop watching; with a message, tell the others."""
        if not self._threads or self._over.is_set():
            return
        self._over.set()
        self._threads[0].join(self.patience)
        try:
            if message is not None:
                self._store.set("failed", message)
                time.sleep(2 * self.interval if self._rank == 0 else 0)  # the store ends with rank 0
            self._store.set(f"beat{self._rank}", "done")
            deadline = time.monotonic() + self.patience
            while self._rank == 0 and message is None and time.monotonic() < deadline and not self._all_done():
                time.sleep(0.05)  # whoever still looks would take the end of the store for a death
        except RuntimeError:
            pass  # rank 0 is gone already

    def _all_done(self) -> bool:
        keys = [f"beat{rank}" for rank in range(self._ranks)]
        return self._store.check(keys) and all(self._store.get(key) == b"done" for key in keys)

    def _count(self) -> None:
        """Give signs of life, and look for those of others."""
        beats, seen = 0, {rank: ("", time.monotonic()) for rank in range(self._ranks)}
        while not self._over.wait(self.interval):
            try:
                beats += 1
                self._store.set(f"beat{self._rank}", str(beats))
                if self._store.check(["failed"]):
                    self._end(self._store.get("failed").decode())
                late = self._late(seen) if self._rank == 0 else None
            except RuntimeError:  # of the store: its keeper is gone
                if not self._over.is_set():
                    self._end("rank 0 does not answer any more")
                return
            self._answered = time.monotonic()
            if late is not None:
                message = f"rank {late} gave no sign of life for {self.patience:.0f} s"
                self._store.set("failed", message)
                time.sleep(2 * self.interval)
                self._end(message)

    def _watch(self) -> None:
        """The store may hang as well: rank 0's machine is gone, and nothing closes its connections."""
        while not self._over.wait(self.interval):
            if time.monotonic() - self._answered > self.patience:
                self._end(f"rank 0 gave no sign of life for {self.patience:.0f} s")

    def _late(self, seen: dict[int, tuple[str, float]]) -> int | None:
        """The first rank that has not counted up for too long."""
        now = time.monotonic()
        for rank, (beat, when) in seen.items():
            key = f"beat{rank}"
            current = self._store.get(key).decode() if self._store.check([key]) else ""
            if current != beat or current == "done":
                seen[rank] = (current, now)
            elif now - when > self.patience:
                return rank
        return None

    def _end(self, message: str) -> None:
        print(
            f"error: {message}; rank {self._rank} ends too. What was saved is complete: go on with --ckpt_path last.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


# -- random numbers --------------------------------------------------------------------------------------------------


class RandomState(L.Callback):
    """Every rank's random numbers go on where they were; on another number of ranks they are seeded anew.

    The product's own draws need none of it (`randomness`); a user's dropout or augmentation does.
    """

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        state = _random_state()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"ranks": [state]}
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, state)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        # not earlier: starting the loaders draws numbers that a run without a break did not draw here
        pending, self._pending = self._pending, None
        if pending is not None and len(pending["ranks"]) == trainer.world_size:
            _set_random_state(pending["ranks"][trainer.global_rank])


def _random_state() -> dict[str, Any]:
    """In types that torch.load takes without trusting a pickle."""
    import random

    import numpy as np

    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (it is the global one that is kept)
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    import random

    import numpy as np

    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
