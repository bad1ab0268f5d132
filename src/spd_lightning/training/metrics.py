"""Teacher-forced statistics by fill: sums and counts are reduced across micro-batches and ranks, ratios taken last."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from spd_lightning.training.losses import COLUMNS


class DraftStatistics(Metric):
    """Accumulates the statistics tables of `chunked_draft_kl`.

    Teacher-forced means: on the DATA's text, with drawn restarts. Real decoding runs on the target's own text, which is
    easier; the two are logged under different names and never compared as if they were one.
    """

    full_state_update = False
    table: Tensor

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        self.add_state("table", torch.zeros(num_stages + 1, len(COLUMNS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, table: Tensor) -> None:
        self.table += table.to(self.table.device)

    def compute(self) -> dict[str, Tensor]:
        """Ratios over all fills: top1 (acceptance at T=0), alpha (acceptance at T=1), hit2, hit4, miss, kl."""
        return _ratios(self.table.sum(0))


def by_fill(table: Tensor) -> list[dict[str, float]]:
    """One entry per fill that occurred: {"fill", "count", "top1", ...}."""
    return [
        {"fill": fill, "count": float(row[0])} | {name: float(x) for name, x in _ratios(row).items()}
        for fill, row in enumerate(table)
        if row[0] > 0
    ]


def _ratios(sums: Tensor) -> dict[str, Tensor]:
    count = sums[0].clamp(min=1)
    return {name: (sums[index] / count).float() for index, name in enumerate(COLUMNS) if name != "count"}
