"""Throughput: tokens per second, how much of the hardware is used, and where a step's time goes."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from spd_lightning.data.batches import Batch
from spd_lightning.target.sizes import active_stage_parameters
from spd_lightning.training.saving import step_ended


class Throughput(L.Callback):
    """Logs, over the optimizer steps since the last line:

    - throughput/tokens_per_second, of all ranks together, validations not counted;
    - throughput/mfu, the share of this GPU's peak arithmetic that the models' matrices account for (forward of the
      target, forward and backward of the head's rows; attention scores and what activation checkpointing computes again
      left out); not on a CPU, whose peak nobody publishes;
    - throughput/share_target, share_data, share_validation: of the time; the rest, share_head, is the head's forward,
      backward and step. A state that is saved between two batches counts as data, one that is saved ahead of a
      validation as validation.

    On a GPU the target's share is measured by events and read when it is over, so nothing waits for it.
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._reset()
        self._validation_began: float | None = None
        self._batch_ended: float | None = None

    def _reset(self) -> None:
        self.began = time.perf_counter()
        self.tokens, self.flops = 0.0, 0.0
        self.target_seconds, self.data_seconds, self.validation_seconds = 0.0, 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        target, head = pl_module.parts()
        sizes = active_stage_parameters(target.model.config, head.config.stage_layers)
        self.per_token, self.per_verdict = sum(sizes.stages), sizes.verification
        self.lm_head = head.config.draft_vocab_size * head.config.hidden_size
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        self.on_gpu = trainer.strategy.root_device.type == "cuda"  # a run on the CPU may have a GPU beside it
        self.peak = get_available_flops(trainer.strategy.root_device, dtype) if self.on_gpu else None
        self._hooks = [target.register_forward_pre_hook(self._before), target.register_forward_hook(self._after)]
        self._reset()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _before(self, *unused: Any) -> None:
        if self.on_gpu:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        self._target_began = time.perf_counter()

    def _after(self, *unused: Any) -> None:
        if self.on_gpu:
            self._events[-1][1].record()
        else:
            self.target_seconds += time.perf_counter() - self._target_began

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        if self._batch_ended is not None:
            self.data_seconds += time.perf_counter() - self._batch_ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._count(pl_module, batch, trainer.world_size)
        self._batch_ended = time.perf_counter()
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step_ended(trainer) and trainer.global_step % every == 0:
            pl_module.log_dict(self.line(), sync_dist=False)
            self._reset()

    def _count(self, module: Any, batch: Batch, ranks: int) -> None:
        self.tokens += float(batch["tokens"]) * ranks  # of one micro-batch, on the average over ranks
        of_head, supervised = module.head.last_work
        of_target = self.per_token * int(batch["lengths"].sum()) + self.per_verdict * supervised
        self.flops += 2 * of_target + 6 * (of_head + self.lm_head * supervised)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._validation_began = time.perf_counter()
        self._seen_before = (self.target_seconds, len(self._events))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._validation_began is not None and trainer.state.fn == "fit":
            self.validation_seconds += time.perf_counter() - self._validation_began
            self.target_seconds, events = self._seen_before  # its target is counted as validation
            del self._events[events:]
            self._batch_ended = time.perf_counter()

    def line(self) -> dict[str, float]:
        """The figures since the last line."""
        if self._events:
            self._events[-1][1].synchronize()
            self.target_seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
        total = max(time.perf_counter() - self.began, 1e-9)
        training = max(total - self.validation_seconds, 1e-9)
        shares = {
            "target": self.target_seconds / total,
            "data": self.data_seconds / total,
            "validation": self.validation_seconds / total,
        }
        shares["head"] = max(0.0, 1 - sum(shares.values()))
        values = {"tokens_per_second": self.tokens / training}
        if self.peak:
            values["mfu"] = self.flops / training / self.peak
        values |= {f"share_{name}": share for name, share in shares.items()}
        return {f"throughput/{name}": value for name, value in values.items()}
