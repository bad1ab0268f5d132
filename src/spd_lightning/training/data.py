"""SpdDataModule: chat conversations to padded batches with assistant labels and turn starts.

The order of samples is a function of (seed, epoch) alone (counter-based), whatever the number of workers or ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spd_lightning.errors import InputError
from spd_lightning.randomness import Purpose, generator
from spd_lightning.target.loading import Loading, load_tokenizer
from spd_lightning.training.chat import ChatEncoder, Sample

Batch = dict[str, Tensor]


def embedded_data(name: str) -> Path:
    """`documentation:train` and `documentation:heldout`: the conversations that ship with the package."""
    folder = Path(__file__).resolve().parent.parent / "embedded" / "documentation"
    return folder / f"{name.removeprefix('documentation:')}.jsonl.gz"


class SpdDataModule(L.LightningDataModule):
    """Conversations from JSON lines, tokenised by the target's chat template.

    Args:
        tokenizer: folder or hub id of the tokenizer; normally the target's.
        train: JSON-lines file(s) of {"messages": [...]}, gzipped or not; `documentation:train` ships with the package.
        validation: the same for held-out conversations: teacher-forced metrics, and prompts for real decoding.
        max_length: tokens; longer conversations are cut.
        batch_size: conversations per batch and rank.
        validation_samples: how many held-out conversations the teacher-forced metrics use.
        seed: of the sample order.
        num_workers: processes that build batches.
    """

    def __init__(
        self,
        tokenizer: str = "tiny",
        train: str | list[str] = "documentation:train",
        validation: str | list[str] = "documentation:heldout",
        max_length: int = 512,
        batch_size: int = 16,
        validation_samples: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer_source = tokenizer
        self.loading = Loading()  # a run that takes the target's tokenizer asks for it as for the target
        self.train_files, self.validation_files = _paths("train", train), _paths("validation", validation)
        self.max_length, self.batch_size, self.seed = max_length, batch_size, seed
        self.validation_samples, self.num_workers = validation_samples, num_workers
        for name, value, least in (
            ("max_length", max_length, 1),
            ("batch_size", batch_size, 1),
            ("validation_samples", validation_samples, 1),  # without any, no validation and no real decoding would run
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise InputError(f"data.{name}={value}: expected at least {least}.")
        self.train_samples: list[Sample] = []
        self.validation_set: list[Sample] = []

    def setup(self, stage: str) -> None:
        if stage == "fit" and not self.train_samples:
            self.train_samples = load_samples("data.train", self.train_files, self.encoder)
            self.batches()  # refuses too few conversations before the target is loaded
        if not self.validation_set:
            self.validation_set = load_samples("data.validation", self.validation_files, self.encoder)

    @property
    def encoder(self) -> ChatEncoder:
        return ChatEncoder(load_tokenizer(self.tokenizer_source, self.loading), self.max_length)

    def prompts(self, count: int, skip: int = 0) -> list[list[int]]:
        """Held-out prompts for real decoding, up to the first assistant turn. InputError if there are too few."""
        found = [sample.prompt for sample in self.validation_set if sample.prompt]
        if len(found) < skip + count:
            raise InputError(
                f"{skip + count} held-out prompts are needed ({skip} of them for validations), but data.validation has "
                f"{len(found)} conversations. Give more, or lower final.prompts, decoding.prompts or "
                "data.validation_samples."
            )
        return found[skip : skip + count]

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train_samples, self.batches())

    def batches(self) -> BucketedBatches:
        """This rank's training batches."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return BucketedBatches([len(s.ids) for s in self.train_samples], self.batch_size, self.seed, rank, world)

    def val_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        count = min(self.validation_samples, len(self.validation_set))
        if count < world:  # a rank without a batch would skip the validation that the others wait in
            raise InputError(f"data.validation_samples={count}: expected at least one for each of {world} ranks.")
        chosen = range(count)[rank::world]
        batches = [list(chosen[i : i + self.batch_size]) for i in range(0, len(chosen), self.batch_size)]
        return self._loader(self.validation_set, batches)

    def _loader(self, samples: list[Sample], batches: Any) -> DataLoader[Batch]:
        return DataLoader(
            samples,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad on the right, where causality hides it: input_ids, labelled, turn_starts [B, S]; sample_ids, lengths [B]."""
    length = max(len(sample.ids) for sample in samples)
    batch = {
        "input_ids": torch.zeros(len(samples), length, dtype=torch.long),
        "labelled": torch.zeros(len(samples), length, dtype=torch.bool),
        "turn_starts": torch.zeros(len(samples), length, dtype=torch.bool),
        "sample_ids": torch.tensor([sample.index for sample in samples]),
        "lengths": torch.tensor([len(sample.ids) for sample in samples]),
    }
    for row, sample in enumerate(samples):
        batch["input_ids"][row, : len(sample.ids)] = torch.tensor(sample.ids)
        batch["labelled"][row, : len(sample.ids)] = torch.tensor(sample.labelled)
        batch["turn_starts"][row, list(sample.turn_starts)] = True
    return batch


def supervised_positions(batch: Batch) -> Tensor:
    """[B, S] bool: t is supervised iff x_{t+1} is labelled and not the first token of its turn (never drafted)."""
    drafted = batch["labelled"] & ~batch["turn_starts"]
    return torch.cat([drafted[:, 1:], torch.zeros_like(drafted[:, :1])], dim=1)


@dataclass
class BucketedBatches:
    """Batches of similar length in an order that depends on (seed, epoch) alone; ranks take turns.

    Samples are shuffled, cut into pools of `pool` batches, sorted by length within a pool, and the batches shuffled.
    Every rank gets the same number of batches; the last incomplete round is left out of the epoch.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    pool: int = 32
    epoch: int = 0

    def __post_init__(self) -> None:
        if not len(self):
            raise InputError(
                f"data.train has {len(self.lengths)} conversations, fewer than one batch of data.batch_size="
                f"{self.batch_size} for each of {self.world_size} ranks."
            )

    @property
    def sampler(self) -> BucketedBatches:
        """Lightning announces the epoch to `batch_sampler.sampler.set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        random = generator(self.seed, Purpose.ORDER, self.epoch)
        order = random.permutation(len(self.lengths)).tolist()
        batches = []
        size = self.pool * self.batch_size
        for start in range(0, len(order), size):
            pool = sorted(order[start : start + size], key=lambda index: self.lengths[index])
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        full = [batch for batch in batches if len(batch) == self.batch_size]
        shuffled = [full[i] for i in random.permutation(len(full))][: len(self) * self.world_size]
        return iter(shuffled[self.rank :: self.world_size])


def load_samples(field: str, files: Sequence[Path], encoder: ChatEncoder) -> list[Sample]:
    """All conversations with at least one labelled token; InputError for an unreadable or empty source."""
    from datasets import load_dataset
    from datasets.utils.logging import CRITICAL, disable_progress_bar, set_verbosity
    from rich.progress import track

    disable_progress_bar()
    set_verbosity(CRITICAL)  # it logs what it raises, too
    names = [str(file) for file in files]
    for file in files:
        if not file.is_file():
            raise InputError(f"{field}={str(file)!r} does not exist: expected a JSON-lines file.")
        if file.stat().st_size == 0:
            raise InputError(f"{field}={str(file)!r} is empty: expected one conversation per line.")
    try:
        rows = load_dataset("json", data_files=names, split="train")
    except Exception as error:  # datasets wraps pyarrow's errors in classes of its own
        cause = error.__cause__ or error
        raise InputError(f"{field}={names} cannot be read as JSON lines: {_first_line(cause)}") from error
    if "messages" not in rows.column_names:
        raise InputError(f'{field}: expected lines {{"messages": [...]}}, found the fields {rows.column_names}.')
    samples = []
    for index, messages in enumerate(track(rows["messages"], f"tokenising {field}", transient=True)):
        try:
            sample = encoder(messages, index)
        except InputError:
            raise
        except Exception as error:  # a template raises whatever jinja2 and Python raise
            raise InputError(
                f"{field}={names}: conversation {index} (from 0) cannot be rendered by the chat template: "
                f"{_first_line(error)}"
            ) from error
        if any(sample.labelled):
            samples.append(sample)
    if not samples:
        raise InputError(f"{field}: none of {len(rows)} conversations has an assistant token within data.max_length.")
    return samples


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _paths(field: str, given: str | list[str]) -> list[Path]:
    names = [given] if isinstance(given, str) else list(given)
    if not names:
        raise InputError(f"data.{field} is empty: expected a JSON-lines file.")
    return [embedded_data(name) if name.startswith("documentation:") else Path(name) for name in names]
