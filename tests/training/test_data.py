"""Batches, their order, the epoch that Lightning announces, and data that cannot be read."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from spd_lightning.errors import InputError
from spd_lightning.training.chat import Sample
from spd_lightning.training.data import BucketedBatches, SpdDataModule, collate, supervised_positions

Conversations = Callable[..., list[list[dict[str, str]]]]
WriteLines = Callable[[Path, Iterable[Any]], Path]

#: 60 conversations of very different lengths.
LENGTHS = [(index * 37) % 61 + 1 for index in range(60)]


def sample(index: int, labels: str, starts: tuple[int, ...]) -> Sample:
    """ids 10 * index + 1, + 2, ...; `labels` has one character per token, x where the assistant wrote it."""
    ids = tuple(10 * index + number for number in range(1, len(labels) + 1))
    return Sample(index, ids, tuple(mark == "x" for mark in labels), starts)


# -- batches ---------------------------------------------------------------------------------------------------------


def test_supervised_are_the_positions_before_a_labelled_token_that_starts_no_turn() -> None:
    #                    position   0123456789
    batch = collate([sample(0, labels="..xxx..xx.", starts=(2, 7)), sample(1, labels=".x", starts=(1,))])
    found = ["".join("s" if mark else "." for mark in row) for row in supervised_positions(batch).tolist()]
    # x_3 and x_4 are drafted at 2 and 3, x_8 at 7; x_2 and x_7 start their turns, and row 1 has nothing but a start
    assert found == ["..ss...s..", ".........."]


def test_a_label_at_the_end_of_one_row_supervises_nothing_in_another() -> None:
    batch = collate([sample(0, "xxx", (0,)), sample(1, "x..", (0,))])
    assert supervised_positions(batch).tolist() == [[True, True, False], [False, False, False]]


def test_a_batch_is_padded_on_the_right() -> None:
    batch = collate([sample(3, ".xx", (1,)), sample(5, ".xxx.x", (1, 5))])
    assert batch["input_ids"].tolist() == [[31, 32, 33, 0, 0, 0], [51, 52, 53, 54, 55, 56]]
    assert batch["labelled"].int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 1]]
    assert batch["turn_starts"].int().tolist() == [[0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1]]
    assert batch["sample_ids"].tolist() == [3, 5] and batch["lengths"].tolist() == [3, 6]


# -- order -----------------------------------------------------------------------------------------------------------


def rounds(world_size: int, epoch: int = 0, seed: int = 0, batch_size: int = 3, pool: int = 4) -> list[list[list[int]]]:
    """[round][rank]: what all ranks work on at the same time."""
    ranks = []
    for rank in range(world_size):
        batches = BucketedBatches(LENGTHS, batch_size, seed, rank, world_size, pool)
        batches.set_epoch(epoch)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches), "the announced length is the real one"
    return [list(each) for each in zip(*ranks, strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_rank_gets_as_many_batches_and_no_sample_comes_twice_in_an_epoch(world_size: int) -> None:
    found = rounds(world_size)
    assert len(found) == 60 // (3 * world_size)
    flat = [index for each in found for batch in each for index in batch]
    assert len(flat) == len(set(flat)) and all(len(batch) == 3 for each in found for batch in each)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_order_does_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    alone = [batch for (batch,) in rounds(1)]
    for number, together in enumerate(rounds(world_size)):
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
        flat = [index for each in rounds(1, pool=pool) for batch in each for index in batch]
        assert sorted(flat) == list(range(60))
    leftover = BucketedBatches(LENGTHS, 7, 0)
    assert len(leftover) == 8 and len({index for batch in leftover for index in batch}) == 56


def test_conversations_of_a_batch_are_of_similar_length() -> None:
    def padding(batches: list[list[int]]) -> int:
        return sum(max(LENGTHS[i] for i in batch) * len(batch) - sum(LENGTHS[i] for i in batch) for batch in batches)

    bucketed = [batch for (batch,) in rounds(1, pool=100)]
    unsorted = [list(range(start, start + 3)) for start in range(0, 60, 3)]
    assert padding(bucketed) < 0.2 * padding(unsorted)


def test_too_few_conversations_for_one_batch_per_rank_are_refused() -> None:
    with pytest.raises(InputError, match=r"data\.train has 5 conversations.*batch_size=3.*2 ranks"):
        BucketedBatches([1] * 5, 3, 0, rank=0, world_size=2)


# -- the data module -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_data(model_folder: Path, data_files: dict[str, str]) -> Callable[..., SpdDataModule]:
    def make(**options: Any) -> SpdDataModule:
        return SpdDataModule(**({"tokenizer": str(model_folder), "batch_size": 4, **data_files} | options))

    return make


class Recorder(L.LightningModule):
    """Trains nothing and writes down which samples it was given in which epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch["sample_ids"].tolist()))
        return self.weight * 0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated += batch["sample_ids"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def trainer(**options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**(settings | options))


@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_announces_the_epoch_so_that_every_epoch_has_its_own_order(
    make_data: Callable[..., SpdDataModule], workers: int
) -> None:
    data, module = make_data(num_workers=workers, seed=4), Recorder()
    trainer(max_epochs=2).fit(module, datamodule=data)
    epochs = [[ids for epoch, ids in module.seen if epoch == number] for number in (0, 1)]
    lengths = [len(each.ids) for each in data.train_samples]
    for number, seen in enumerate(epochs):
        expected = BucketedBatches(lengths, 4, seed=4)
        expected.set_epoch(number)
        assert seen == [[data.train_samples[i].index for i in batch] for batch in expected]
    assert epochs[0] != epochs[1] and len(epochs[0]) == 10
    assert len(module.validated) == 2 * len(data.validation_set), "validation takes every sample, in every epoch"


def test_validation_keeps_its_order_and_its_number_of_samples(make_data: Callable[..., SpdDataModule]) -> None:
    data, module = make_data(validation_samples=6), Recorder()
    trainer().validate(module, datamodule=data, verbose=False)
    assert module.validated == [0, 1, 2, 3, 4, 5]


def test_every_rank_validates_its_share_of_the_samples_and_has_at_least_one(
    make_data: Callable[..., SpdDataModule],
) -> None:
    data = make_data(validation_samples=5, batch_size=2)
    data.setup("validate")

    def share(rank: int, world_size: int) -> list[int]:
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
        return [index for batch in data.val_dataloader() for index in batch["sample_ids"].tolist()]

    assert [share(rank, 2) for rank in (0, 1)] == [[0, 2, 4], [1, 3]]
    with pytest.raises(InputError, match=r"data\.validation_samples=5: expected at least one for each of 6 ranks"):
        share(0, 6)


def test_prompts_are_the_first_held_out_ones_up_to_the_first_answer(
    make_data: Callable[..., SpdDataModule], make_conversations: Conversations
) -> None:
    data = make_data()
    data.setup("validate")
    tokenizer = data.encoder.tokenizer
    held_out = make_conversations(14, 1)
    expected = []
    for messages in held_out:
        until = next(number for number, message in enumerate(messages) if message["role"] == "assistant")
        encoded = tokenizer.apply_chat_template(messages[:until], add_generation_prompt=True, return_dict=True)
        expected.append(list(encoded["input_ids"]))
    assert data.prompts(5) == expected[:5] and data.prompts(9, skip=5) == expected[5:]
    with pytest.raises(InputError, match=r"15 held-out prompts.*has 14 conversations.*decoding\.prompts"):
        data.prompts(10, skip=5)


def test_conversations_without_an_answer_are_left_out_and_the_others_keep_their_number(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, make_conversations: Conversations, write_lines: WriteLines
) -> None:
    silent = [{"role": "user", "content": "hello"}]
    rows = [
        {"messages": silent if number % 2 else messages} for number, messages in enumerate(make_conversations(6, 2))
    ]
    data = make_data(train=str(write_lines(tmp_path / "train.jsonl", rows)), batch_size=1)
    data.setup("fit")
    assert [each.index for each in data.train_samples] == [0, 2, 4]


def test_several_files_and_gzipped_ones_are_read_in_order(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, make_conversations: Conversations, write_lines: WriteLines
) -> None:
    rows = [{"messages": messages} for messages in make_conversations(5, 3)]
    whole = write_lines(tmp_path / "whole.jsonl", rows)
    first, second = write_lines(tmp_path / "a.jsonl", rows[:2]), tmp_path / "b.jsonl.gz"
    second.write_bytes(gzip.compress(write_lines(tmp_path / "b.jsonl", rows[2:]).read_bytes()))
    one, two = make_data(train=str(whole), batch_size=1), make_data(train=[str(first), str(second)], batch_size=1)
    one.setup("fit")
    two.setup("fit")
    assert one.train_samples == two.train_samples and len(one.train_samples) == 5


def test_a_file_that_changed_is_read_again(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, make_conversations: Conversations, write_lines: WriteLines
) -> None:
    found = []
    for seed in (4, 5):
        path = write_lines(tmp_path / "train.jsonl", ({"messages": m} for m in make_conversations(3, seed)))
        data = make_data(train=str(path), batch_size=1)
        data.setup("fit")
        found.append(data.train_samples)
    assert found[0] != found[1]


def test_training_after_a_validation_has_its_training_data(make_data: Callable[..., SpdDataModule]) -> None:
    data = make_data()
    data.setup("validate")
    assert not data.train_samples, "a validation does not pay for the training data"
    data.setup("fit")
    assert len(data.train_samples) == 40


# -- what cannot be read ---------------------------------------------------------------------------------------------


def refusal(data: SpdDataModule, stage: str = "fit") -> str:
    with pytest.raises(InputError) as caught:
        data.setup(stage)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("field", ["train", "validation"])
def test_a_missing_and_an_empty_file_are_refused_by_field_and_path(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, field: str
) -> None:
    missing, empty = tmp_path / "missing.jsonl", tmp_path / "empty.jsonl"
    empty.write_text("")
    message = refusal(make_data(**{field: str(missing)}))
    assert f"data.{field}=" in message and str(missing) in message and "does not exist" in message
    message = refusal(make_data(**{field: str(empty)}))
    assert f"data.{field}=" in message and str(empty) in message and "is empty" in message


def test_a_file_of_blank_lines_is_refused(make_data: Callable[..., SpdDataModule], tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n\n  \n")
    message = refusal(make_data(train=str(tmp_path / "blank.jsonl")))
    assert "data.train" in message and "blank.jsonl" in message


def test_a_truncated_last_line_is_refused_by_field_and_path(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, make_conversations: Conversations, write_lines: WriteLines
) -> None:
    path = write_lines(tmp_path / "train.jsonl", ({"messages": m} for m in make_conversations(5, 6)))
    path.write_text(path.read_text()[:-30])
    message = refusal(make_data(train=str(path)))
    assert "data.train=" in message and str(path) in message and "JSON" in message


def test_a_truncated_gzip_file_is_refused_by_field_and_path(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, make_conversations: Conversations, write_lines: WriteLines
) -> None:
    whole = write_lines(tmp_path / "train.jsonl", ({"messages": m} for m in make_conversations(50, 6))).read_bytes()
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(whole)[:-40])
    message = refusal(make_data(train=str(path)))
    assert "data.train=" in message and str(path) in message


def test_lines_without_messages_are_refused_with_the_fields_that_were_found(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, write_lines: WriteLines
) -> None:
    path = write_lines(tmp_path / "train.jsonl", [{"prompt": "a", "answer": "b"}])
    message = refusal(make_data(train=str(path)))
    assert "data.train" in message and '"messages"' in message and "'prompt'" in message and "'answer'" in message


def test_data_without_a_labelled_token_is_refused(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, write_lines: WriteLines
) -> None:
    path = write_lines(tmp_path / "v.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}] * 3)
    message = refusal(make_data(validation=str(path)))
    assert "data.validation" in message and "none of 3 conversations" in message and "data.max_length" in message
    message = refusal(make_data(max_length=2))
    assert "data.train" in message and "none of 40 conversations" in message


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
        [{"role": "user"}],
        [{"content": "a"}],
        [],
        None,
        "a conversation",
    ],
    ids=["no content", "a missing content", "a missing role", "no message", "null", "a string"],
)
def test_a_conversation_the_template_cannot_render_is_refused_by_field_and_line(
    make_data: Callable[..., SpdDataModule],
    tmp_path: Path,
    messages: Any,
    make_conversations: Conversations,
    write_lines: WriteLines,
) -> None:
    good = make_conversations(2, 7)
    rows = [{"messages": good[0]}, {"messages": messages}] if not isinstance(messages, str) else []
    path = write_lines(tmp_path / "train.jsonl", rows or [{"messages": messages}])
    message = refusal(make_data(train=str(path)))
    assert "data.train" in message and str(path) in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_length", 0), ("batch_size", 0), ("batch_size", -4), ("validation_samples", 0), ("num_workers", -1)],
)
def test_an_impossible_number_is_refused_by_field_and_value(
    make_data: Callable[..., SpdDataModule], field: str, value: int
) -> None:
    with pytest.raises(InputError, match=rf"data\.{field}={value}: expected at least"):
        make_data(**{field: value})


def test_no_file_at_all_is_refused_by_field(make_data: Callable[..., SpdDataModule]) -> None:
    with pytest.raises(InputError, match=r"data\.train is empty"):
        make_data(train=[])
