"""Which row sees which in a batch of teacher-forced sequences (StaircaseLayout), and which are computed (Rows)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from spd_lightning.staircase import Staircase, entry_cycles, gaps_from_restarts


class Rows:
    """Some of the rows of a batch, handled as one list [R, ...], block after block.

    Args:
        chosen: [B, S, r] bool, which rows of r blocks.
        blocks: which of the m reachable blocks those are.
    """

    def __init__(self, chosen: Tensor, blocks: Sequence[int]) -> None:
        self.chosen, self.blocks = chosen, tuple(blocks)
        #: per block, where its rows are among the B S positions
        self.places = [block.flatten().nonzero()[:, 0] for block in chosen.unbind(2)]
        self._index = torch.cat([place * len(self.blocks) + i for i, place in enumerate(self.places)])

    def __len__(self) -> int:
        return len(self._index)

    def spread(self, listed: Tensor) -> Tensor:
        """[R, ...] -> [B, r, S, ...], zero where there is no row; a position's rows stay neighbours in memory."""
        grid = listed.new_zeros(self.chosen.numel(), *listed.shape[1:])
        return grid.index_copy(0, self._index, listed).unflatten(0, self.chosen.shape).transpose(1, 2)

    def collect(self, grid: Tensor) -> Tensor:
        """[B, r, S, ...] -> [R, ...]."""
        return grid.transpose(1, 2).flatten(0, 2)[self._index]

    def find(self, some: Rows) -> Tensor:
        """Where `some` of these rows stand in this list."""
        numbers = self.places[0].new_full(self.chosen.shape, -1)
        numbers.view(-1)[self._index] = torch.arange(len(self), device=numbers.device)
        columns = [numbers[:, :, self.blocks.index(block)].flatten() for block in some.blocks]
        return torch.cat([column[place] for column, place in zip(columns, some.places, strict=True)])


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
        entries, n = self.entries, self.staircase.num_stages
        if self.documents is not None:  # far enough apart that no document is in flight together with another
            number = torch.nn.functional.pad(self.documents.diff(dim=1).ne(0).cumsum(1), (1, 0))
            entries = entries + number * (entries.max() - entries.min() + n)
        finished = torch.searchsorted(entries, entries - n, right=True)
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

    # -- what the fast twin of attention needs -----------------------------------------------------------------------

    @property
    def span(self) -> int:
        """c >= n: a position at least c back shows its deepest row to every row (and tiles under 8 are slow)."""
        return max(8, self.staircase.num_stages)

    @cached_property
    def near_mask(self) -> Tensor:
        """[B, t, c, m, 2 c, m] bool, t tiles of c positions: the rows less than c back that a row of a tile sees.

        The columns are the rows of the previous and of the own tile, position by position. Padding sees padding, so
        that no row is without anything to see.
        """
        c, n = self.span, self.staircase.num_stages
        device = self.entries.device
        documents = torch.zeros_like(self.entries) if self.documents is None else self.documents
        around = (c, -self.length % c)
        cycles = F.pad(self.entries, around).unfold(1, 2 * c, c)  # [B, t, 2 c]
        numbers = F.pad(documents, around, value=torch.iinfo(documents.dtype).min).unfold(1, 2 * c, c)
        elapsed = (cycles[:, :, c:, None] - cycles[:, :, None, :]).clamp(0, n)  # [B, t, c, 2 c]
        distance = torch.arange(c, 2 * c, device=device)[:, None] - torch.arange(2 * c, device=device)
        near = (numbers[:, :, c:, None] == numbers[:, :, None, :]) & (distance >= 0) & (distance < c)
        shown = self.shown_table[:, elapsed].movedim(0, 3)  # [B, t, c, m, 2 c]
        blocks = torch.arange(len(self.shown_table), device=device)
        return (shown[..., None] == blocks) & near[:, :, :, None, :, None]

    def seen_by(self, rows: Rows) -> Rows:
        """The rows that some of these rows see: themselves among them, and every position's deepest one."""
        c = self.span
        asking = F.pad(rows.chosen, (0, 0, 0, -self.length % c)).unflatten(1, (-1, c))
        mask = self.near_mask[:, :, :, list(rows.blocks)] & asking[..., None, None]
        windows = mask.flatten(2, 3).any(2)  # [B, t, 2 c, m]
        seen = windows[:, :, c:].clone()
        seen[:, :-1] |= windows[:, 1:, :c]
        seen = seen.flatten(1, 2)[:, : self.length]
        seen[..., -1] = True
        return Rows(seen, range(seen.shape[2]))

    def segments(self) -> list[tuple[slice, slice]]:
        """(sequences, positions) that one causal attention covers: the whole batch, or each document by itself."""
        if self.documents is None:
            return [(slice(0, self.batch_size), slice(0, self.length))]
        return [(slice(index, index + 1), where) for index, where in document_slices(self.documents)]


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
