"""Batches: what a packed and a padded row hold, in which order they come, and what every rank gets."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spd_lightning.data.batches import (
    EpochBatches,
    collate,
    is_packed,
    pack,
    plan,
    position_ids,
    supervised_positions,
)
from spd_lightning.data.chat import Sample
from spd_lightning.errors import InputError

#: 60 conversations of very different lengths.
LENGTHS = [(index * 37) % 61 + 1 for index in range(60)]


def sample(index: int, labels: str) -> Sample:
    """ids 10 * index + 1, + 2, ...; one character per token: x where the assistant wrote it, F first of its turn."""
    ids = np.array([10 * index + number for number in range(1, len(labels) + 1)], np.int32)
    starts = [at for at, mark in enumerate(labels) if mark == "F"]
    ends = [at + len(labels[at:]) - len(labels[at + 1 :].lstrip("x")) for at in starts]
    return Sample(index, ids, tuple(zip(starts, ends, strict=True)))


def marks(batch: dict[str, torch.Tensor]) -> list[str]:
    return ["".join("s" if mark else "." for mark in row) for row in supervised_positions(batch).tolist()]


# -- batches ---------------------------------------------------------------------------------------------------------


def test_supervised_are_the_positions_before_a_labelled_token_that_starts_no_turn() -> None:
    #                          position   0123456789
    batch = collate([[sample(0, labels="..Fxx..Fx.")], [sample(1, labels=".F")]])
    # x_3 and x_4 are drafted at 2 and 3, x_8 at 7; x_2 and x_7 start their turns, and row 1 has nothing but a start
    assert marks(batch) == ["..ss...s..", ".........."]


def test_a_label_at_the_start_of_a_document_supervises_nothing_in_the_one_before() -> None:
    batch = collate([[sample(0, "Fxx"), sample(1, "xF."), sample(2, "x.Fx")], [sample(3, "x..")]])
    # the second and third documents begin with labelled tokens that are no turn's first: nobody drafted them
    assert marks(batch) == ["ss......s.", ".........."]


def test_a_batch_is_padded_on_the_right() -> None:
    batch = collate([[sample(3, ".Fx")], [sample(5, ".Fxx.F")]])
    assert batch["input_ids"].tolist() == [[31, 32, 33, 0, 0, 0], [51, 52, 53, 54, 55, 56]]
    assert batch["labelled"].int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 1]]
    assert batch["turn_starts"].int().tolist() == [[0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1]]
    assert batch["documents"].tolist() == [[0, 0, 0, -1, -1, -1], [0] * 6]
    assert batch["sample_ids"].tolist() == [3, 5] and batch["lengths"].tolist() == [3, 6]
    assert batch["starts"].tolist() == [0, 6] and not is_packed(batch)


def test_a_packed_row_numbers_its_documents_and_begins_their_positions_anew() -> None:
    batch = collate([[sample(1, ".Fx"), sample(2, ".F")], [sample(4, "Fxxx")]], length=7)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22, 0, 0], [41, 42, 43, 44, 0, 0, 0]]
    assert batch["documents"].tolist() == [[0, 0, 0, 1, 1, -1, -1], [0, 0, 0, 0, -1, -1, -1]]
    assert position_ids(batch).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2]]
    assert batch["starts"].tolist() == [0, 3, 7] and batch["lengths"].tolist() == [3, 2, 4] and is_packed(batch)


# -- packing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=80), st.integers(64, 100))
def test_packing_loses_and_repeats_nothing_and_fits_every_row(lengths: list[int], capacity: int) -> None:
    rows = pack(np.array(lengths, np.int64), capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in row) for row in rows]
    assert all(size <= capacity for size in sizes)
    # no two rows would fit into one: then the best fit had not been taken
    assert sum(sorted(sizes)[:2]) > capacity or len(sizes) < 2


def test_short_documents_fill_packed_rows_to_a_percent() -> None:
    draw = random.Random(0)
    lengths = np.array([int(draw.lognormvariate(5, 0.9)) % 2000 + 2 for _ in range(4000)])
    assert lengths.sum() / (len(pack(lengths, 2048)) * 2048) > 0.99
    batches = EpochBatches(lengths, 4, seed=0, capacity=2048)
    assert batches.efficiency > 0.99 > 0.97 > EpochBatches(lengths, 4, seed=0).efficiency


def test_a_document_that_is_longer_than_a_row_is_refused() -> None:
    with pytest.raises(InputError, match=r"71 tokens exceeds a packed row of 64"):
        pack(np.array([5, 71]), 64)


def test_what_fills_no_batch_is_handed_back() -> None:
    lengths = np.array([10, 60, 30, 50, 20])
    batches, rest = plan(lengths, np.arange(5), 2, 64, np.random.default_rng(0))
    assert len(batches) == 1 and rest
    assert sorted([i for batch in batches for row in batch for i in row] + rest) == [0, 1, 2, 3, 4]


# -- order -----------------------------------------------------------------------------------------------------------


Rounds = list[list[list[list[int]]]]


def rounds(
    world_size: int, epoch: int = 0, seed: int = 0, batch_size: int = 3, pool: int = 4, capacity: int | None = None
) -> Rounds:
    """[round][rank]: the batch of rows that all ranks work on at the same time."""
    ranks = []
    for rank in range(world_size):
        batches = EpochBatches(np.array(LENGTHS), batch_size, seed, capacity, None, rank, world_size, pool)
        batches.set_epoch(epoch)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches), "the announced length is the real one"
    return [list(each) for each in zip(*ranks, strict=True)]  # type: ignore[arg-type]


def samples_of(found: Rounds) -> list[int]:
    return [i for each in found for batch in each for row in batch for i in row]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_rank_gets_as_many_batches_and_no_sample_comes_twice_in_an_epoch(world_size: int) -> None:
    found = rounds(world_size)
    assert len(found) == 60 // (3 * world_size)
    flat = samples_of(found)
    assert len(flat) == len(set(flat)) and all(len(batch) == 3 for each in found for batch in each)


@pytest.mark.parametrize("capacity", [None, 64], ids=["padded", "packed"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_order_does_not_depend_on_the_number_of_ranks(world_size: int, capacity: int | None) -> None:
    alone = [batch for (batch,) in rounds(1, capacity=capacity)]
    for number, together in enumerate(rounds(world_size, capacity=capacity)):
        assert together == alone[number * world_size : (number + 1) * world_size]


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    first = rounds(2, epoch=3, seed=5)
    rounds(1, epoch=9)
    torch.manual_seed(2)
    assert rounds(2, epoch=3, seed=5) == first
    assert rounds(2, epoch=4, seed=5) != first and rounds(2, epoch=3, seed=6) != first


def test_an_epoch_uses_every_sample_that_full_rounds_can_hold_in_any_pool() -> None:
    for pool in (1, 2, 7, 100):
        assert sorted(samples_of(rounds(1, pool=pool))) == list(range(60))
    leftover = EpochBatches(np.array(LENGTHS), 7, 0)
    assert len(leftover) == 8 and len({row[0] for batch in leftover for row in batch}) == 56


def test_conversations_of_a_batch_are_of_similar_length() -> None:
    def padding(batches: list[list[int]]) -> int:
        return sum(max(LENGTHS[i] for i in batch) * len(batch) - sum(LENGTHS[i] for i in batch) for batch in batches)

    bucketed = [[row[0] for row in batch] for (batch,) in rounds(1, pool=100)]
    unsorted = [list(range(start, start + 3)) for start in range(0, 60, 3)]
    assert padding(bucketed) < 0.2 * padding(unsorted)


def test_every_epoch_has_as_many_packed_batches_and_misses_next_to_nothing() -> None:
    lengths = np.random.default_rng(0).integers(2, 64, 500)
    batches = EpochBatches(lengths, 4, seed=1, capacity=64)
    for epoch in range(6):
        batches.set_epoch(epoch)
        seen = [i for batch in batches for row in batch for i in row]
        assert len(list(batches)) == len(batches)
        assert len(set(seen)) > 0.95 * len(lengths)


def test_a_weight_is_how_often_a_sample_comes_per_epoch_on_average() -> None:
    weights = np.repeat([1.0, 2.0, 0.5, 1.25], 40)
    batches = EpochBatches(np.full(160, 5), 1, seed=3, weights=weights)
    times = np.zeros((20, 160))
    for epoch in range(20):
        batches._batches, batches._planned = batches._plan(epoch), epoch
        np.add.at(times[epoch], [row[0] for batch in batches._batches for row in batch], 1)
    assert (times[:, :40] == 1).all() and (times[:, 40:80] == 2).all()
    assert set(np.unique(times[:, 80:120])) == {0, 1} and set(np.unique(times[:, 120:])) == {1, 2}
    assert times[:, 80:120].mean() == pytest.approx(0.5, abs=0.06)
    assert times[:, 120:].mean() == pytest.approx(1.25, abs=0.06)
    assert (times[:, 80:120].max(0) == 1).all(), "no half of a source is left out in every epoch"


def test_an_epoch_that_draws_too_little_for_a_batch_shows_the_first_one_again() -> None:
    for seed in range(40):
        try:
            batches = EpochBatches(np.full(8, 5), 2, seed=seed, weights=np.full(8, 0.2))
        except InputError:
            continue  # not even the first
        for epoch in range(6):
            batches.set_epoch(epoch)
            assert len(list(batches)) == len(batches) > 0


def test_too_few_conversations_for_one_batch_per_rank_are_refused() -> None:
    with pytest.raises(InputError, match=r"data\.train has 5 conversations.*batch_size=3.*2 ranks"):
        EpochBatches(np.ones(5), 3, 0, rank=0, world_size=2)
    with pytest.raises(InputError, match=r"data\.train has 50 tokens, in rows of 40.*batch_size=3"):
        EpochBatches(np.full(5, 10), 3, 0, capacity=40)
