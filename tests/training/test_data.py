"""The data module: epochs, ranks, workers, held-out prompts, streams; and data that cannot be used."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from spd_lightning.data.batches import Batch, EpochBatches
from spd_lightning.data.cleaning import Cleaning
from spd_lightning.data.sources import Source
from spd_lightning.errors import InputError
from spd_lightning.training.data import SpdDataModule, StreamedBatches

Conversations = Callable[..., list[list[dict[str, str]]]]
WriteLines = Callable[[Path, Iterable[Any]], Path]


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
    assert data.train_samples is not None and data.validation_set is not None
    for number, seen in enumerate(epochs):
        expected = EpochBatches(data.train_samples.lengths, 4, seed=4)
        expected.set_epoch(number)
        assert seen == [[row[0] for row in batch] for batch in expected]
    assert epochs[0] != epochs[1] and len(epochs[0]) == 10
    assert len(module.validated) == 2 * len(data.validation_set), "validation takes every sample, in every epoch"


_STEPS = {"every_n_train_steps": 1}
_EPOCHS = {"every_n_epochs": 1}


@pytest.mark.parametrize(
    ("step", "saved"),
    [
        pytest.param(4, _STEPS, id="in the middle of an epoch"),
        pytest.param(10, _STEPS, id="at its last step"),
        pytest.param(20, _STEPS, id="at the last step of the second"),
        pytest.param(15, _EPOCHS | {"save_on_train_epoch_end": False}, id="after a validation in the middle"),
        pytest.param(20, _EPOCHS | {"save_on_train_epoch_end": False}, id="after one at the end"),
        pytest.param(20, _EPOCHS | {"save_on_train_epoch_end": True}, id="at the end of an epoch"),
    ],
)
@pytest.mark.parametrize(("streaming", "workers"), [(False, 0), (False, 1), (True, 0)])
def test_a_resumed_run_is_shown_what_the_whole_one_was(
    make_data: Callable[..., SpdDataModule],
    tmp_path: Path,
    step: int,
    saved: dict[str, Any],
    streaming: bool,
    workers: int,
) -> None:
    def run(ckpt_path: Path | None = None, **options: Any) -> list[list[int]]:
        module = Recorder()
        data = make_data(num_workers=workers, streaming=streaming, window=16, packing=False)
        settings = {"max_steps": 24, "val_check_interval": 5} | options
        trainer(**settings).fit(module, datamodule=data, ckpt_path=ckpt_path)
        return [ids for _, ids in module.seen]

    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **saved)
    whole = run(callbacks=[keep], enable_checkpointing=True)
    assert whole[:10] != whole[10:20] and len(whole) == 24
    assert run(tmp_path / f"step={step}.ckpt") == whole[step:]
    further = ModelCheckpoint(tmp_path, filename="again-{step}", save_top_k=-1, every_n_train_steps=1)
    run(tmp_path / f"step={step}.ckpt", callbacks=[further], enable_checkpointing=True, max_steps=step + 3)
    assert run(tmp_path / f"again-step={step + 2}.ckpt") == whole[step + 2 :], "resumed twice"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_of_epochs_goes_on_with_the_next_one(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, workers: int
) -> None:
    def run(ckpt_path: Path | None = None, **options: Any) -> list[list[int]]:
        module = Recorder()
        trainer(**options).fit(module, datamodule=make_data(num_workers=workers), ckpt_path=ckpt_path)
        return [ids for _, ids in module.seen]

    whole = run(max_epochs=3)
    run(max_epochs=1, callbacks=[ModelCheckpoint(tmp_path, filename="one")], enable_checkpointing=True)
    assert len(whole) == 30 and run(tmp_path / "one.ckpt", max_epochs=3) == whole[10:]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_number_of_workers_changes_nothing(make_data: Callable[..., SpdDataModule], packing: bool) -> None:
    found = []
    for workers in (0, 2):
        data = make_data(num_workers=workers, packing=packing, batch_size=2, max_length=128)
        data.setup("fit")
        found.append(list(data.train_dataloader()))
    assert len(found[0]) == len(found[1]) > 2
    for one, two in zip(*found, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_packing_follows_the_target_unless_it_is_set(make_data: Callable[..., SpdDataModule]) -> None:
    for packing, refusal, packed in (("auto", None, True), ("auto", "no.", False), (False, None, False)):
        data = make_data(packing=packing)
        data.choose_packing(refusal)
        assert data.packed is packed and (data.capacity == data.max_length) is packed
    with pytest.raises(InputError, match=r"data\.packing=true: family x has recurrent layers\. Set data\.packing"):
        make_data(packing=True).choose_packing("family x has recurrent layers.")


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
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, accumulate_grad_batches=1)  # type: ignore[assignment]
        return [index for batch in data.val_dataloader() for index in batch["sample_ids"].tolist()]

    assert [share(rank, 2) for rank in (0, 1)] == [[0, 2, 4], [1, 3]]
    with pytest.raises(InputError, match=r"data\.validation_samples=5: expected at least one for each of 6 ranks"):
        share(0, 6)


def test_validation_takes_every_source_in_proportion(
    make_data: Callable[..., SpdDataModule], two_sources: list[Source]
) -> None:
    data = make_data(validation=two_sources, validation_samples=16, batch_size=16)
    data.setup("validate")
    assert data.validation_set is not None
    (batch,) = data.val_dataloader()
    assert np.bincount(data.validation_set.source_numbers[batch["sample_ids"].numpy()]).tolist() == [12, 4]


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


def test_conversations_without_an_answer_are_counted_and_left_out(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, make_conversations: Conversations, write_lines: WriteLines
) -> None:
    silent = [{"role": "user", "content": "hello"}]
    rows = [
        {"messages": silent if number % 2 else messages} for number, messages in enumerate(make_conversations(6, 2))
    ]
    path = str(write_lines(tmp_path / "train.jsonl", rows))
    message = refusal(make_data(train=path, batch_size=1))
    assert "3 of 6 rows are bad (50.0%, data.cleaning.max_bad_share allows 5.0%)" in message
    assert "3 x no assistant turn" in message and f"{path}:2" in message
    data = make_data(train=path, batch_size=1, cleaning=Cleaning(max_bad_share=0.5))
    data.setup("fit")
    assert len(data.train_samples) == 3 and data.train_samples.tally.bad == {"no assistant turn": 3}


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
    assert list(one.train_samples) == list(two.train_samples) and len(one.train_samples) == 5


def test_a_file_that_changed_is_read_again(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, make_conversations: Conversations, write_lines: WriteLines
) -> None:
    found = []
    for seed in (4, 5):
        path = write_lines(tmp_path / "train.jsonl", ({"messages": m} for m in make_conversations(3, seed)))
        data = make_data(train=str(path), batch_size=1)
        data.setup("fit")
        found.append(list(data.train_samples))
    assert found[0] != found[1]


def test_training_after_a_validation_has_its_training_data(make_data: Callable[..., SpdDataModule]) -> None:
    data = make_data()
    data.setup("validate")
    assert data.train_samples is None, "a validation does not pay for the training data"
    data.setup("fit")
    assert len(data.train_samples) == 40


# -- mixtures, splits, streams ---------------------------------------------------------------------------------------


def ids_of(batch: Batch) -> list[tuple[int, ...]]:
    """The documents of a batch, as tokens."""
    flat = batch["input_ids"].flatten().tolist()
    places = zip(batch["starts"].tolist(), batch["lengths"].tolist(), strict=True)
    return [tuple(flat[start : start + length]) for start, length in places]


@pytest.fixture
def two_sources(tmp_path: Path, make_conversations: Conversations, write_lines: WriteLines) -> list[Source]:
    """60 and 20 conversations, the second ones twice as often."""
    paths = [
        write_lines(tmp_path / f"{name}.jsonl", ({"messages": m} for m in make_conversations(count, seed)))
        for name, count, seed in (("a", 60, 10), ("b", 20, 11))
    ]
    return [Source(str(paths[0])), Source(str(paths[1]), weight=2.0)]


def test_a_heavier_source_comes_more_often(make_data: Callable[..., SpdDataModule], two_sources: list[Source]) -> None:
    data = make_data(train=two_sources, batch_size=1, packing=False)
    data.setup("fit")
    seen = [row[0] for batch in data.batches for row in batch]
    assert data.train_samples is not None
    numbers = data.train_samples.source_numbers[seen]
    assert np.bincount(numbers).tolist() == [60, 40] and len(set(seen)) == 80


def test_a_share_of_the_training_sources_is_held_out_by_the_opening_alone(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, make_conversations: Conversations, write_lines: WriteLines
) -> None:
    rows = [{"messages": messages} for messages in make_conversations(120, 12)]
    changed = json.loads(json.dumps(rows))
    for row in changed:  # as if the target had written the responses anew
        for message in row["messages"]:
            message["content"] += " anew" if message["role"] == "assistant" else ""
    kept = []
    for name, content in (("own", rows), ("anew", changed)):
        path = write_lines(tmp_path / f"{name}.jsonl", content)
        data = make_data(train=str(path), validation=None, validation_share=0.25)
        data.setup("fit")
        assert data.train_samples is not None and data.validation_set is not None
        assert len(data.train_samples) + len(data.validation_set) == 120 and 15 < len(data.validation_set) < 45
        kept.append([tuple(sample.prompt) for sample in data.validation_set])
        assert not set(kept[-1]) & {tuple(sample.prompt) for sample in data.train_samples}
    assert kept[0] == kept[1]


def streamed(data: SpdDataModule, rank: int = 0, world_size: int = 1, shown: int = 0) -> list[Batch]:
    loops = trainer(max_steps=10).fit_loop
    loops.epoch_loop.batch_progress.total.processed = shown
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank, world_size=world_size, max_steps=10, fit_loop=loops, accumulate_grad_batches=1
    )
    loader = data.train_dataloader()
    assert isinstance(loader, StreamedBatches)
    return list(loader)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_stream_shows_everything_in_an_order_that_neither_workers_nor_ranks_change(
    make_data: Callable[..., SpdDataModule], two_sources: list[Source], packing: bool
) -> None:
    def make(workers: int = 0, sources: list[Source] = two_sources) -> SpdDataModule:
        return make_data(
            train=sources, streaming=True, window=16, batch_size=2, packing=packing, max_length=128, num_workers=workers
        )

    alone = [ids_of(batch) for batch in streamed(make())]
    assert alone == [ids_of(batch) for batch in streamed(make(workers=3))]
    together = [[ids_of(batch) for batch in streamed(make(), rank, 3)] for rank in range(3)]
    dealt = [batch for round_ in zip(*together, strict=True) for batch in round_]
    assert dealt == alone[: len(dealt)] and len(alone) - len(dealt) < 3
    assert alone[3:] == [ids_of(batch) for batch in streamed(make(), shown=3)], "on from where it was"
    assert alone != [ids_of(batch) for batch in streamed(make(), shown=len(alone))], "every epoch has its own order"
    stored = make_data(train=two_sources, batch_size=1, packing=False)
    stored.setup("fit")
    assert stored.train_samples is not None
    everything = [tuple(s.ids.tolist()) for s in stored.train_samples]
    shown = [document for batch in alone for document in batch]
    left = len([*everything, *everything[60:]]) - len(shown)
    assert set(shown) <= set(everything) and 0 <= left <= (40 if packing else 2), "the second source comes twice"
    early = set(shown[: len(shown) // 2])
    assert early & set(everything[:60]) and early & set(everything[60:]), "both sources from the start"


def test_a_stream_trains_and_needs_a_number_of_steps(
    make_data: Callable[..., SpdDataModule], two_sources: list[Source]
) -> None:
    data, module = make_data(train=two_sources, streaming=True, window=8), Recorder()
    trainer(max_steps=12, val_check_interval=6, check_val_every_n_epoch=None).fit(module, datamodule=data)
    assert len(module.seen) == 12 and module.validated
    with pytest.raises(InputError, match=r"data\.streaming.*trainer\.max_steps"):
        trainer(max_epochs=1).fit(Recorder(), datamodule=make_data(train=two_sources, streaming=True))
    with pytest.raises(InputError, match=r"data\.validation=null with data\.streaming"):
        make_data(train=two_sources, streaming=True, validation=None).setup("fit")


def test_streamed_rows_that_are_bad_end_the_run(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, make_conversations: Conversations, write_lines: WriteLines
) -> None:
    path = write_lines(tmp_path / "train.jsonl", ({"messages": m} for m in make_conversations(30, 1)))
    path.write_text(path.read_text() + "{broken\n" * 3)
    with pytest.raises(InputError, match=r"data\.train: 3 of 33 rows are bad.*invalid JSON.*train\.jsonl:31"):
        streamed(make_data(train=str(path), streaming=True))


# -- what cannot be read ---------------------------------------------------------------------------------------------


def refusal(data: SpdDataModule, stage: str = "fit") -> str:
    with pytest.raises(InputError) as caught:
        data.setup(stage)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 900
    return message


@pytest.mark.parametrize("field", ["train", "validation"])
def test_a_missing_and_an_empty_file_are_refused_by_field_and_path_before_anything_else(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, field: str
) -> None:
    missing, empty = tmp_path / "missing.jsonl", tmp_path / "empty.jsonl"
    empty.write_text("")
    for path, complaint in ((missing, "does not exist"), (empty, "is empty")):
        with pytest.raises(InputError, match=complaint) as caught:
            make_data(**{field: str(path)})
        assert f"data.{field}=" in str(caught.value) and str(path) in str(caught.value)


def test_a_file_of_blank_lines_is_refused(make_data: Callable[..., SpdDataModule], tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n\n  \n")
    message = refusal(make_data(train=str(tmp_path / "blank.jsonl")))
    assert "data.train" in message and "blank.jsonl" in message


def test_a_truncated_gzip_file_is_refused_by_path(
    make_data: Callable[..., SpdDataModule], tmp_path: Path, make_conversations: Conversations, write_lines: WriteLines
) -> None:
    whole = write_lines(tmp_path / "train.jsonl", ({"messages": m} for m in make_conversations(50, 6))).read_bytes()
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(whole)[:-40])
    assert str(path) in refusal(make_data(train=str(path)))


def test_data_without_a_labelled_token_is_refused(make_data: Callable[..., SpdDataModule]) -> None:
    message = refusal(make_data(max_length=2))
    assert "data.train" in message and "40 of 40 rows are bad" in message and "no labelled token" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_length", 1), ("batch_size", 0), ("batch_size", -4), ("validation_samples", 0), ("num_workers", -1)],
)
def test_an_impossible_number_is_refused_by_field_and_value(
    make_data: Callable[..., SpdDataModule], field: str, value: int
) -> None:
    with pytest.raises(InputError, match=rf"data\.{field}={value}: expected at least"):
        make_data(**{field: value})


def test_no_file_at_all_is_refused_by_field(make_data: Callable[..., SpdDataModule]) -> None:
    with pytest.raises(InputError, match=r"data\.train is empty"):
        make_data(train=[])
