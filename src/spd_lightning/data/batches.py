"""Batches: which samples share a row, which rows a batch, in which order; all of it from (seed, epoch) alone.

A row holds one sample, or, packed, several that never see one another: `documents` numbers them, positions restart.
Packing fills rows of a fixed length, best fit first; without it samples of similar length share a batch and are padded.

Shapes: B rows, S positions, D documents of a batch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spd_lightning.data.chat import Sample
from spd_lightning.errors import InputError
from spd_lightning.randomness import Purpose, generator

Batch = dict[str, Tensor]
Rows = list[list[int]]  # samples of each row

#: Samples that are packed together: enough to fill rows to a percent, few enough to stay random.
PACK_POOL = 2048


@dataclass(frozen=True)
class Share:
    """What a micro-batch has to know of the global batch: all that ranks and accumulation put into one optimizer step.

    Attributes:
        epoch: of the data; seeds the restarts.
        supervised, tokens: of the global batch, divided by its number of micro-batches. A sum over this micro-batch
            divided by `supervised`, then averaged over micro-batches and ranks as strategies do, is the global mean:
            it does not depend on how the global batch was cut.
    """

    epoch: int = 0
    supervised: float = 1.0
    tokens: float = 0.0

    @classmethod
    def of(cls, samples: Sequence[Sample], parts: int = 1, epoch: int = 0) -> Share:
        """Of a global batch of these samples, cut into `parts`."""
        return cls(epoch, sum(s.drafted for s in samples) / parts, sum(map(len, samples)) / parts)


def collate(rows: Sequence[Sequence[Sample]], length: int | None = None, share: Share | None = None) -> Batch:
    """Rows of samples as tensors, padded on the right.

    Args:
        rows: the samples of each row.
        length: S; the longest row where None.
        share: what the global batch is; None: these rows are all of it.

    Returns:
        input_ids, labelled, turn_starts, documents [B, S] (documents count from 0 within a row, padding has a number
        of its own); sample_ids, starts, lengths [D], starts counted over the flattened [B S]; epoch, supervised,
        tokens, scalars of `Share`.
    """
    sizes = [sum(map(len, row)) for row in rows]
    length = max(sizes) if length is None else length
    shape = (len(rows), length)
    ids, documents = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    labelled, turn_starts = np.zeros(shape, bool), np.zeros(shape, bool)
    starts = []
    for number, row in enumerate(rows):
        at = 0
        for document, sample in enumerate(row):
            where = slice(at, at + len(sample))
            ids[number, where], documents[number, where] = sample.ids, document
            for start, stop in sample.turns:
                labelled[number, at + start : at + stop] = True
                turn_starts[number, at + start] = True
            starts.append(number * length + at)
            at += len(sample)
    samples = [sample for row in rows for sample in row]
    share = Share.of(samples) if share is None else share
    return {
        "input_ids": torch.from_numpy(ids),
        "labelled": torch.from_numpy(labelled),
        "turn_starts": torch.from_numpy(turn_starts),
        "documents": torch.from_numpy(documents),
        "sample_ids": torch.tensor([sample.index for sample in samples]),
        "starts": torch.tensor(starts),
        "lengths": torch.tensor([len(sample) for sample in samples]),
        "epoch": torch.tensor(share.epoch),
        "supervised": torch.tensor(share.supervised, dtype=torch.float64),
        "tokens": torch.tensor(share.tokens, dtype=torch.float64),
    }


def supervised_positions(batch: Batch) -> Tensor:
    """[B, S] bool: t is supervised iff x_{t+1} is labelled and not the first token of its turn.

    No document borrows its neighbour's label: what it is labelled from is the first token of a turn.
    """
    drafted = batch["labelled"] & ~batch["turn_starts"]
    return torch.cat([drafted[:, 1:], torch.zeros_like(drafted[:, :1])], dim=1)


def is_packed(batch: Batch) -> bool:
    """Whether any row holds more than one document."""
    return len(batch["lengths"]) > len(batch["input_ids"])


def position_ids(batch: Batch) -> Tensor:
    """[B, S]: positions from 0 in every document; in padding they go on."""
    documents = batch["documents"]
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    count = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return count - torch.where(first, count, 0).cummax(1).values


def pack(lengths: np.ndarray, capacity: int) -> Rows:
    """Rows of at most `capacity` tokens, best fit of the longest first; numbers are those of `lengths`.

    Raises:
        InputError: a sample longer than a row.
    """
    if len(lengths) and lengths.max() > capacity:
        raise InputError(f"a sample of {lengths.max()} tokens exceeds a packed row of {capacity} (data.max_length).")
    rows: Rows = []
    with_space: dict[int, list[int]] = {}  # free tokens -> rows
    spaces: list[int] = []  # the keys of with_space, ascending
    for number in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[number])
        at = bisect_left(spaces, need)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        rows[row].append(number)
        if left := space - need:
            if left not in with_space:
                with_space[left] = []
                insort(spaces, left)
            with_space[left].append(row)
    return rows


def plan(
    lengths: np.ndarray,
    order: np.ndarray,
    batch_size: int,
    capacity: int | None,
    random: np.random.Generator,
    pool: int = 32,
) -> tuple[list[Rows], list[int]]:
    """Full batches of `batch_size` rows, in random order, and the samples that are left.

    Args:
        lengths: tokens of every sample.
        order: the samples to use, in random order; one may come more than once.
        batch_size: rows per batch.
        capacity: tokens of a packed row; None: one sample per row, similar lengths together.
        random: shuffles the batches.
        pool: batches' worth of samples among which lengths are matched.
    """
    size = pool * batch_size if capacity is None else max(PACK_POOL, pool * batch_size)
    batches: list[Rows] = []
    rows: Rows = []
    for start in range(0, len(order), size):
        part = order[start : start + size]
        if capacity is None:
            rows += [[i] for i in part[np.argsort(lengths[part], kind="stable")].tolist()]
        else:
            packed = pack(lengths[part], capacity)
            rows += [part[packed[i]].tolist() for i in random.permutation(len(packed)).tolist()]
        whole = len(rows) // batch_size * batch_size
        batches += [rows[at : at + batch_size] for at in range(0, whole, batch_size)]
        rows = rows[whole:]
    shuffled = [batches[i] for i in random.permutation(len(batches)).tolist()]
    return shuffled, [sample for row in rows for sample in row]


def epoch_order(weights: np.ndarray, random: np.random.Generator, draws: np.random.Generator) -> np.ndarray:
    """Samples in random order; one of weight w comes floor(w) or ceil(w) times, w on average over the draws."""
    times = np.floor(weights).astype(np.int64) + (draws.random(len(weights)) < weights % 1)
    return np.repeat(np.arange(len(weights)), times)[random.permutation(int(times.sum()))]


class Resumable:
    """Where an order of batches stands: in which epoch, and after how many of its batches.

    Attributes:
        epoch: of the next iteration.
        shown: how many batches were shown in all, of a checkpoint those before it. Where it is known, it decides alone
            where an iteration begins: Lightning may announce an epoch late, twice, or one that it goes through without
            batches, but it counts batches right.
    """

    epoch = 0
    shown: Callable[[], int] | None = None

    @property
    def sampler(self) -> Any:
        """Lightning announces the epoch to `sampler.set_epoch` of a loader or its batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class PlannedBatch(Rows):
    """A micro-batch, as rows of sample numbers, and its share of the global batch."""

    def __init__(self, rows: Rows, share: Share) -> None:
        super().__init__(rows)
        self.share = share


@dataclass
class EpochBatches(Resumable):
    """This rank's micro-batches of an epoch; ranks take turns in one common order.

    The order is that of micro-batches, whoever takes them: an optimizer step uses `world_size * accumulate` of them in
    a row, so ranks can be traded for accumulation. Every rank and every epoch has the same number of micro-batches, a
    multiple of `accumulate` (an epoch that packs into fewer shows its first ones again, one that packs into more leaves
    some out); the last incomplete global batch is left out.

    Args:
        lengths: tokens of every sample.
        batch_size: rows per micro-batch.
        seed: of the order.
        capacity: tokens of a packed row; None: padded rows.
        weights: mean number of times that each sample comes per epoch; None: once.
        rank, world_size: of the data-parallel processes.
        pool: see `plan`.
        drafted: supervised positions of every sample; None: as many as tokens.
        accumulate: micro-batches per rank and optimizer step.
    """

    lengths: np.ndarray
    batch_size: int
    seed: int
    capacity: int | None = None
    weights: np.ndarray | None = None
    rank: int = 0
    world_size: int = 1
    pool: int = 32
    drafted: np.ndarray | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        self.lengths = np.asarray(self.lengths)
        self._batches, self._planned = self._plan(0), 0
        self._rounds = len(self._batches) // (self.world_size * self.accumulate) * self.accumulate
        if not self._rounds:
            rows = "conversations" if self.capacity is None else f"tokens, in rows of {self.capacity}"
            found = len(self.lengths) if self.capacity is None else int(self.lengths.sum())
            steps = f", and {self.accumulate} of them per optimizer step" if self.accumulate > 1 else ""
            raise InputError(
                f"data.train has {found} {rows}, fewer than one batch of data.batch_size={self.batch_size} for each "
                f"of {self.world_size} ranks{steps}."
            )

    def __len__(self) -> int:
        return self._rounds

    def __iter__(self) -> Iterator[PlannedBatch]:
        skip = 0
        if self.shown is not None:
            self.epoch, skip = divmod(self.shown(), self._rounds)
        if self._planned != self.epoch:
            self._batches, self._planned = self._plan(self.epoch) or self._plan(0), self.epoch
        for number in range(skip, self._rounds):
            yield PlannedBatch(self._batch(number * self.world_size + self.rank), self._share(number))

    def _batch(self, number: int) -> Rows:
        return self._batches[number % len(self._batches)]

    def _share(self, number: int) -> Share:
        """Of the global batch to which this rank's micro-batch `number` belongs."""
        parts = self.world_size * self.accumulate
        first = number // self.accumulate * parts
        samples = [i for at in range(first, first + parts) for row in self._batch(at) for i in row]
        tokens = float(self.lengths[samples].sum())
        supervised = tokens if self.drafted is None else float(self.drafted[samples].sum())
        return Share(self.epoch, supervised / parts, tokens / parts)

    @property
    def efficiency(self) -> float:
        """Share of the positions of this epoch's batches that hold a token."""
        held = positions = 0
        for batch in self._batches:
            sizes = [int(self.lengths[row].sum()) for row in batch]
            held += sum(sizes)
            positions += len(batch) * (max(sizes) if self.capacity is None else self.capacity)
        return held / positions if positions else 0.0

    def _plan(self, epoch: int) -> list[Rows]:
        random = generator(self.seed, Purpose.ORDER, epoch)
        weights = np.ones(len(self.lengths)) if self.weights is None else self.weights
        order = epoch_order(weights, random, generator(self.seed, Purpose.MIX, epoch))
        return plan(self.lengths, order, self.batch_size, self.capacity, random, self.pool)[0]
