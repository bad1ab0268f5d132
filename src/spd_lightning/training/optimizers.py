"""Optimizers and learning-rate schedules of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Of AdamW.
BETAS = (0.9, 0.95)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for matrices, AdamW for what Muon is not meant for: norms, biases and the lm_head.

    Muon (Jordan 2024) makes every step of a matrix orthogonal. Its steps are scaled to the size that AdamW's have
    (2502.16982); still, the best rate of new layers is higher than that of an lm_head, which starts as a trained one.
    The two parts share groups and state with this optimizer: schedules and checkpoints see one.

    Args:
        groups: as for AdamW, with "params" and "weight_decay"; the first one holds matrices.
        learning_rate: of Muon's part.
        adamw_learning_rate: of AdamW's.
        apart: matrices that AdamW takes nevertheless.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        learning_rate: float,
        adamw_learning_rate: float,
        apart: Sequence[Tensor],
    ) -> None:
        kept = {id(p) for p in apart}
        first, *others = groups
        muon = {**first, "params": [p for p in first["params"] if id(p) not in kept]}
        adamw = [{**first, "params": [p for p in first["params"] if id(p) in kept]}, *others]
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon([muon], lr=learning_rate, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([group for group in adamw if group["params"]], lr=adamw_learning_rate, betas=BETAS),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        at = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups, part.state = self.param_groups[at : at + count], self.state
            at += count

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def scheduled(optimizer: torch.optim.Optimizer, settings: Any, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up to the peak, then cosine or linear to `final_learning_rate` times the peak at the last step."""
    from transformers import get_scheduler

    warmup, last = round(settings.warmup * steps), settings.final_learning_rate
    if settings.schedule == "cosine":
        name, fields = "cosine_with_min_lr", {"min_lr_rate": last}
    else:
        name, fields = (
            "warmup_stable_decay",
            {"num_decay_steps": steps - warmup, "decay_type": "linear", "min_lr_ratio": last},
        )
    return get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=fields
    )
