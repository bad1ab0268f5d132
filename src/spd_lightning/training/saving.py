"""Checkpoints that are complete or not there, whatever ends the process, and the newest of them.

A checkpoint is written under a hidden name beside its own, flushed to the disk, and renamed; one that goes away is
renamed first and deleted then. Whatever carries its own name is whole. `step{step}.ckpt` is written before every
validation, on further occasions and when a run is told to stop, `step{step}-validated.ckpt` after a validation, when it
is known whether the head is the best one. No name is written twice; of a step only the newest state stays. A link,
last.ckpt, leads to the newest of all.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage

from spd_lightning.errors import InputError, first_line

LAST = "last.ckpt"
VALIDATED = "-validated"
#: What torch says of a disk that takes no more.
_WRITER = re.compile(r"iostream error|inline_container|PytorchStreamWriter|[Ff]ile write failed")
_PROGRESS = re.compile(rf"step(\d+)({VALIDATED})?\.ckpt")


class SavedWhole:
    """A temporary path to write a file or folder to, which gets its own name at the end; together with other ranks.

    `files.write_whole` is enough for a text of one process. Here ranks wait for each other on both sides of the rename,
    folders cannot be replaced in one go, torch tells of a full disk in errors of its own, and the message has to name
    the checkpoint that is left.

    Args:
        final: the name it is to have.
        mine: whether this process renames.
        barrier: waits for the other ranks.

    Raises:
        InputError: the file system refuses; what lay under the name before is still there.
    """

    def __init__(self, final: Path, mine: bool = True, barrier: Callable[[], Any] = lambda: None) -> None:
        self.final, self.mine, self.barrier = final, mine, barrier
        self.temporary = final.with_name(f".{final.name}.part")

    def __enter__(self) -> Path:
        if self.mine:
            try:
                self.final.parent.mkdir(exist_ok=True)  # a run directory that is gone is an error, not a new start
                _remove(self.temporary)  # what a killed process left
            except OSError as error:
                raise cannot_save(self.final, error) from error
        self.barrier()
        return self.temporary

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            if self.mine:
                _remove(self.temporary, quietly=True)
            if isinstance(error, OSError) or (isinstance(error, RuntimeError) and _WRITER.search(str(error))):
                raise cannot_save(self.final, error) from error
            return
        self.barrier()
        if self.mine:
            try:
                _flush(self.temporary)
                if self.final.is_dir():  # a folder takes no other's place
                    remove_checkpoint(self.final)
                self.temporary.replace(self.final)
                _flush(self.final.parent, content=False)
            except OSError as failure:
                _remove(self.temporary, quietly=True)
                raise cannot_save(self.final, failure) from failure
        self.barrier()


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints of one file, for single devices and DDP; reads those of ZeRO too, merged."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with SavedWhole(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if Path(path).is_dir():
            from spd_lightning.training.resuming import read_merged

            return read_merged(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        remove_checkpoint(Path(path))


def cannot_save(path: Path, error: BaseException) -> InputError:
    """The one line for a disk that is full, a folder that cannot be written or is gone."""
    reason = getattr(error, "strerror", None) or first_line(error)
    older = newest_complete(path.parent)
    kept = f"the newest complete checkpoint is {older}" if older else "no checkpoint was saved before"
    return InputError(
        f"run_dir: {path} cannot be written: {reason}; {kept}. Make room or set run_dir elsewhere, then resume with "
        "--ckpt_path last."
    )


def remove_checkpoint(path: Path) -> None:
    """Take a checkpoint's name away, then its content: what still has a name is whole."""
    hidden = path.with_name(f".{path.name}.removed")
    _remove(hidden, quietly=True)
    try:
        path.replace(hidden)
    except FileNotFoundError:
        return
    _remove(hidden, quietly=True)


def progress_checkpoints(folder: Path) -> list[Path]:
    """The complete states of a run, newest last; the best head, `step{step}-acceptance{p}.ckpt`, is not among them."""
    matches = [(_PROGRESS.fullmatch(path.name), path) for path in folder.glob("step*.ckpt")]
    found = [(int(match[1]), bool(match[2]), path) for match, path in matches if match]
    return [path for _, _, path in sorted(found)]


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint of a run; None where there is none."""
    found = progress_checkpoints(folder)
    return found[-1] if found else None


class SaveProgress(Checkpoint):
    """Saves the state of a run before and after every validation, besides every so many steps or minutes.

    Args:
        directory: where states lie.
        keep: of how many steps the newest states stay.
        every_steps, every_minutes: further occasions; None: validations only.
        resumed: told (steps, whether their validation is not done) of the state that the run goes on from.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        resumed: Callable[[int, bool], Any] = lambda step, validates: None,
    ) -> None:
        self.directory, self.keep, self.resumed = directory, keep, resumed
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.saved_step, self.saved_at = -1, time.monotonic()
        self.validates = False  # a validation is under way, to be repeated on resuming

    def state_dict(self) -> dict[str, Any]:
        return {"validates": self.validates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validates = state_dict["validates"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path is not None:
            self.saved_step = trainer.global_step
            self.resumed(trainer.global_step, self.validates)
        if self.validates:  # Lightning would take the validation for done
            trainer.fit_loop.epoch_loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validates = True
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.validates:
            self.validates = False
            self.save(trainer, VALIDATED)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        # the state after a step that a validation follows is saved as that begins
        if step_ended(trainer) and not validation_follows(trainer) and self._due(trainer):
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer, suffix: str = "") -> Path:
        """Save the state after the last optimizer step, unless it is saved already; returns where."""
        path = self.directory / f"step{trainer.global_step:08d}{suffix}.ckpt"
        if trainer.global_step == self.saved_step and not suffix:
            return path
        trainer.save_checkpoint(path)
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            _link(self.directory / LAST, path)
            states = progress_checkpoints(self.directory)
            newest = {state.stem.removesuffix(VALIDATED): state for state in states}  # of each step
            for old in set(states) - set(list(newest.values())[-self.keep :]):
                remove_checkpoint(old)
        return path

    def _due(self, trainer: L.Trainer) -> bool:
        if self.every_steps is not None and trainer.global_step % self.every_steps == 0:
            return trainer.global_step > 0
        if self.every_minutes is None:
            return False
        late = time.monotonic() - self.saved_at > 60 * self.every_minutes
        return trainer.strategy.reduce_boolean_decision(late, all=False)  # clocks differ, the decision must not


def step_ended(trainer: L.Trainer) -> bool:
    """Whether the batch that just ended was the last of an optimizer step."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches == 0


def validation_follows(trainer: L.Trainer) -> bool:
    """Whether a validation comes before the next batch."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def _link(link: Path, path: Path) -> None:
    """`link` leads to its neighbour `path`, from one moment to the next."""
    temporary = link.with_name(f".{link.name}.part")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(path.name)
        if link.is_dir() and not link.is_symlink():
            remove_checkpoint(link)
        temporary.replace(link)
    except OSError:  # a file system without links: `--ckpt_path last` needs none
        temporary.unlink(missing_ok=True)


def _flush(path: Path, content: bool = True) -> None:
    """Have the disk, not its cache, hold a file, or a folder with all that is in it; or just the folder's list."""
    for place in [path, *(path.rglob("*") if content and path.is_dir() else [])]:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path, quietly: bool = False) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        if not quietly:
            raise
