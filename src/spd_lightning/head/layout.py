"""StaircaseLayout: which row sees which, for a batch of teacher-forced sequences, as tensors."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from spd_lightning.staircase import Staircase, entry_cycles, gaps_from_restarts


class StaircaseLayout:
    """Entry cycles and documents of a batch, under one staircase.

    Shapes: B sequences, S positions, m REACHABLE blocks.

    Args:
        staircase: stages and anchors.
        entries: [B, S] entry cycle of every position, growing by at least 1 within a document.
        documents: [B, S] document number where several documents are packed into one row (each one contiguous);
            None: one document per row. Padding belongs on the right, where causality hides it from every token.
    """

    def __init__(self, staircase: Staircase, entries: Tensor, documents: Tensor | None = None) -> None:
        self.staircase, self.entries, self.documents = staircase, entries, documents

    @classmethod
    def from_restarts(
        cls, staircase: Staircase, restarts: Iterable[Iterable[int]], length: int, device: torch.device | None = None
    ) -> StaircaseLayout:
        """One list of restart positions per sequence; every other gap is 1."""
        n = staircase.num_stages
        rows = [entry_cycles(gaps_from_restarts(length, positions, n)) for positions in restarts]
        return cls(staircase, torch.tensor(rows, device=device))

    @property
    def batch_size(self) -> int:
        return self.entries.shape[0]

    @property
    def length(self) -> int:
        return self.entries.shape[1]

    @cached_property
    def shown_table(self) -> Tensor:
        """[m, n + 1]: `Staircase.shown`."""
        return torch.tensor(self.staircase.shown, device=self.entries.device)

    def shown_at(self, row: int, distance: int) -> Tensor:
        """[B, S - distance]: the row that position T - distance shows to row (row, T), T = distance .. S - 1."""
        elapsed = self.entries[:, distance:] - self.entries[:, : self.length - distance]
        return self.shown_table[row][elapsed.clamp(max=self.staircase.num_stages)]

    def fills(self) -> Tensor:
        """[B, S]: tokens in flight, 1..n, when a position is the newest (entered less than n cycles ago)."""
        finished = torch.searchsorted(self.entries, self.entries - self.staircase.num_stages, right=True)
        return torch.arange(self.length, device=self.entries.device) - finished + 1

    def dense_mask(self) -> Tensor:
        """The definition, as a boolean [B, m S, m S] mask over rows in block-major order. For tests and references."""
        n, m, S = self.staircase.num_stages, len(self.staircase.reachable_blocks), self.length
        elapsed = (self.entries[:, :, None] - self.entries[:, None, :]).clamp(0, n)
        causal = torch.ones(S, S, dtype=torch.bool, device=self.entries.device).tril()[None]
        if self.documents is not None:
            causal = causal & (self.documents[:, :, None] == self.documents[:, None, :])
        shown = self.shown_table[:, elapsed].transpose(0, 1)  # [B, m, S, S]
        blocks = torch.arange(m, device=self.entries.device)[:, None]
        mask = (shown[:, :, :, None, :] == blocks) & causal[:, None, :, None, :]  # [B, m, S, m, S]
        return mask.reshape(-1, m * S, m * S)

    def document_layouts(self) -> list[tuple[int, slice, StaircaseLayout]]:
        """(batch index, positions, layout of its own) of every document of packed rows."""
        assert self.documents is not None
        return [
            (index, where, StaircaseLayout(self.staircase, self.entries[index : index + 1, where]))
            for index, where in document_slices(self.documents)
        ]


def document_slices(documents: Tensor) -> list[tuple[int, slice]]:
    """(batch index, positions) of every document of packed rows [B, S], in order."""
    result = []
    for index, row in enumerate(documents.tolist()):
        start = 0
        for stop in range(1, len(row) + 1):
            if stop == len(row) or row[stop] != row[start]:
                result.append((index, slice(start, stop)))
                start = stop
    return result
