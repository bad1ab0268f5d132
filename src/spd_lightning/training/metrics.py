"""Teacher-forced statistics by fill: sums and counts are reduced across micro-batches and ranks, ratios taken last."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from spd_lightning.data.batches import Batch
from spd_lightning.training.losses import COLUMNS


class DraftStatistics(Metric):
    """Accumulates the statistics tables of `chunked_draft_loss`.

    Teacher-forced means: on the DATA's text, with drawn restarts. Real decoding runs on the target's own text, which is
    easier; the two are logged under different names and never compared as if they were one.
    """

    full_state_update = False
    table: Tensor
    places: Tensor

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        self.add_state("table", torch.zeros(num_stages + 1, len(COLUMNS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("places", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, table: Tensor, batch: Batch | None = None) -> None:
        """Add a micro-batch: its table and, to count its tokens, itself."""
        self.table += table.to(self.table.device)
        if batch is not None:
            counts = [batch["input_ids"].numel(), int(batch["lengths"].sum()), int(batch["labelled"].sum())]
            self.places += torch.tensor(counts, dtype=torch.float64, device=self.places.device)

    def compute(self) -> dict[str, Tensor]:
        """Ratios over all fills: top1 (acceptance at T=0), alpha (acceptance at T=1), hit2, hit4, miss, kl.

        Where batches were counted too, also the share of their positions that hold a token (filled; the rest is
        padding) and of the tokens that are labelled.
        """
        values = _ratios(self.table.sum(0))
        positions, tokens, labelled = self.places
        if positions > 0:
            values |= {"filled": (tokens / positions).float(), "labelled": (labelled / tokens).float()}
        return values


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
