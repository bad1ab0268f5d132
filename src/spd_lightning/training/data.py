"""SpdDataModule: what a corpus becomes on its way to a training step; the order is a function of (seed, epoch) alone.

A corpus is tokenised once into a memory-mapped store that runs and ranks share; a corpus larger than the disk is
streamed instead, tokenised as it comes and shuffled in windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from spd_lightning.data.batches import Batch, EpochBatches, Resumable, Rows, collate, plan
from spd_lightning.data.chat import ChatEncoder, ChatOptions, Sample
from spd_lightning.data.cleaning import Cleaner, Cleaning, Part, check_sources
from spd_lightning.data.parallel import chunks
from spd_lightning.data.progress import progress_bar
from spd_lightning.data.reading import read
from spd_lightning.data.sources import Source
from spd_lightning.data.store import Encoding, TokenStore, default_folder, open_store
from spd_lightning.data.tally import Tally
from spd_lightning.errors import InputError
from spd_lightning.randomness import Purpose, generator
from spd_lightning.target.loading import Loading

Sources = str | Source | list[str | Source]


class SpdDataModule(L.LightningDataModule):
    """Chat corpora, tokenised by the target's chat template, in packed or padded batches.

    Args:
        tokenizer: folder or hub id of the tokenizer; normally the target's.
        train: one or several sources: a file, a directory, a hub id, or a mapping with path, config, split, revision,
            weight, columns and rows; short form path,split=train_sft,weight=2. documentation:train ships with the
            package.
        validation: the same for held-out conversations: teacher-forced metrics, and prompts for real decoding. null:
            validation_share of the training sources.
        validation_share: share of the training sources that is held out, by a digest of each conversation's opening.
        chat: how conversations are rendered.
        cleaning: what is dropped from the sources, and when there is too much of it.
        max_length: tokens; longer conversations are cut. Also the length of a packed row.
        batch_size: rows per batch and rank: conversations, or packed rows of max_length tokens.
        packing: several conversations per row, without seeing one another; auto: where the target's family can.
        streaming: read the training sources as training goes, for corpora that no disk holds; needs trainer.max_steps.
        window: rows of a streamed corpus that are shuffled together.
        validation_samples: how many held-out samples the teacher-forced metrics use.
        seed: of the sample order.
        num_workers: processes that tokenise and build batches.
        cache: folder for tokenised corpora, shared by runs; default: SPD_CACHE, else the user's cache.
    """

    def __init__(
        self,
        tokenizer: str = "tiny",
        train: Sources = "documentation:train",
        validation: Sources | None = "documentation:heldout",
        validation_share: float = 0.01,
        chat: ChatOptions = ChatOptions(),  # noqa: B008 (frozen)
        cleaning: Cleaning = Cleaning(),  # noqa: B008 (frozen)
        max_length: int = 512,
        batch_size: int = 16,
        packing: bool | Literal["auto"] = "auto",
        streaming: bool = False,
        window: int = 4096,
        validation_samples: int = 128,
        seed: int = 0,
        num_workers: int = 0,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer_source = tokenizer
        self.loading = Loading()  # a run that takes the target's tokenizer asks for it as for the target
        self.train_sources = check_sources("data.train", train)
        self.validation_sources = None if validation is None else check_sources("data.validation", validation)
        self.validation_share, self.chat, self.cleaning = validation_share, chat, cleaning
        self.max_length, self.batch_size, self.seed = max_length, batch_size, seed
        self.packing, self.streaming, self.window = packing, streaming, window
        self.validation_samples, self.num_workers = validation_samples, num_workers
        self.folder = default_folder() if cache is None else Path(cache).expanduser()
        for name, value, least in (
            ("max_length", max_length, 2),
            ("batch_size", batch_size, 1),
            ("window", window, 1),
            ("validation_samples", validation_samples, 1),  # without any, no validation and no real decoding would run
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise InputError(f"data.{name}={value}: expected at least {least}.")
        if not 0 < validation_share < 1:
            raise InputError(f"data.validation_share={validation_share}: expected a number between 0 and 1.")
        #: Whether rows are packed; a run asks the target's family before it sets up.
        self.packed = packing is True
        self.train_samples: TokenStore | None = None
        self.validation_set: TokenStore | None = None

    def choose_packing(self, refusal: str | None) -> None:
        """Settle `packing: auto`; `refusal` says why the target cannot take packed rows, None: it can."""
        if self.packing is True and refusal is not None:
            raise InputError(f"data.packing=true: {refusal} Set data.packing to auto or false.")
        self.packed = self.packing is True or (self.packing == "auto" and refusal is None)

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.train_samples is None and not self.streaming:
            self.train_samples = self._store("data.train", self.train_encoding)
            _ = self.batches  # refuses too few conversations before the target is loaded
        if self.validation_set is None:
            self.validation_set = self._store("data.validation", self.validation_encoding)

    # -- encodings and stores ----------------------------------------------------------------------------------------

    @property
    def train_encoding(self) -> Encoding:
        split = self.validation_sources is None
        return self._encoding(self.train_sources, "train" if split else "all")

    @property
    def validation_encoding(self) -> Encoding:
        if self.validation_sources is not None:
            return self._encoding(self.validation_sources, "all")
        if self.streaming:
            raise InputError(
                "data.validation=null with data.streaming: holding out a share would read the whole stream first. Set "
                "data.validation to sources of its own."
            )
        return self._encoding(self.train_sources, "heldout")

    @property
    def encoder(self) -> ChatEncoder:
        return self.train_encoding.encoder

    def _encoding(self, sources: tuple[Source, ...], part: Part) -> Encoding:
        cleaner = Cleaner(sources, self.cleaning, part, self.validation_share if part != "all" else 0.0)
        return Encoding(cleaner, self.tokenizer_source, self.loading, self.chat, self.max_length)

    def _store(self, name: str, encoding: Encoding) -> TokenStore:
        with progress_bar(f"tokenising {name}") as progress:
            return open_store(encoding, self.folder, name, self.num_workers, progress)

    # -- batches -----------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int | None:
        """Tokens of a packed row; None where rows are padded."""
        return self.max_length if self.packed else None

    @cached_property
    def batches(self) -> EpochBatches:
        """This rank's training batches."""
        assert self.train_samples is not None, "setup has not run"
        rank, world = self._place
        weights = np.array([source.weight for source in self.train_sources])[self.train_samples.source_numbers]
        return EpochBatches(self.train_samples.lengths, self.batch_size, self.seed, self.capacity, weights, rank, world)

    def train_dataloader(self) -> DataLoader[Batch] | StreamedBatches:
        if self.streaming:
            if self.trainer is not None and self.trainer.max_steps < 0:
                raise InputError("data.streaming: the length of an epoch is not known. Set trainer.max_steps.")
            streamed = StreamedBatches(
                self.train_encoding, self.batch_size, self.seed, self.capacity, *self._place, self.window,
                self.num_workers,
            )  # fmt: skip
            streamed.shown = self._shown
            return streamed
        assert self.train_samples is not None, "setup has not run"
        if self.trainer is not None:
            self.batches.shown = self._shown
        return self._loader(self.train_samples, self.batches, self.capacity)

    def val_dataloader(self) -> DataLoader[Batch]:
        assert self.validation_set is not None, "setup has not run"
        rank, world = self._place
        count = min(self.validation_samples, len(self.validation_set))
        if count < world:  # a rank without a batch would skip the validation that the others wait in
            raise InputError(f"data.validation_samples={count}: expected at least one for each of {world} ranks.")
        chosen = [[index] for index in self._validation_order()[:count].tolist()[rank::world]]
        return self._loader(self.validation_set, list(chunks(chosen, self.batch_size)), None)

    def prompts(self, count: int, skip: int = 0) -> list[list[int]]:
        """Held-out prompts for real decoding, up to the first assistant turn. InputError if there are too few."""
        assert self.validation_set is not None, "setup has not run"
        found: list[list[int]] = []
        for index in self._validation_order().tolist():
            if len(found) == skip + count:
                break
            sample = self.validation_set[index]
            if 0 < len(sample.prompt) < len(sample):
                found.append(sample.prompt)
        if len(found) < skip + count:
            raise InputError(
                f"{skip + count} held-out prompts are needed ({skip} of them for validations), but data.validation has "
                f"{len(found)} conversations. Give more, or lower final.prompts, decoding.prompts or "
                "data.validation_samples."
            )
        return found[skip : skip + count]

    def _validation_order(self) -> np.ndarray:
        """Held-out samples so that any first part of them holds every source in proportion to its size."""
        assert self.validation_set is not None, "setup has not run"
        sources = self.validation_set.source_numbers
        within = np.empty(len(sources))
        for source in np.unique(sources):
            (places,) = np.nonzero(sources == source)
            within[places] = (np.arange(len(places)) + 0.5) / len(places)
        return np.argsort(within, kind="stable")

    @property
    def _place(self) -> tuple[int, int]:
        """Rank and number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _shown(self) -> int:
        """Training batches of this run so far, before a checkpoint that it goes on from included."""
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress if self.trainer else None
        return progress.total.processed if progress else 0

    def _loader(self, samples: TokenStore, batches: Any, capacity: int | None) -> DataLoader[Batch]:
        return DataLoader(
            _Rows(samples),  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=_Collate(capacity),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


class _Rows:
    """What a loader reads of a store: the samples of one row."""

    def __init__(self, samples: TokenStore) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: Sequence[int]) -> list[Sample]:
        return [self.samples[index] for index in row]


class _Collate:
    def __init__(self, length: int | None) -> None:
        self.length = length

    def __call__(self, rows: Sequence[Sequence[Sample]]) -> Batch:
        return collate(rows, self.length)


# -- streaming -------------------------------------------------------------------------------------------------------


class _Windows(IterableDataset[Any]):
    """Windows of a stream, tokenised. Workers take turns, so that the loader hands them out in the stream's order."""

    def __init__(self, encoding: Encoding, window: int, seed: int) -> None:
        self.encoding, self.window, self.seed = encoding, window, seed

    def __iter__(self) -> Iterator[tuple[list[Sample], Tally]]:
        info = get_worker_info()
        mine, workers = (0, 1) if info is None else (info.id, info.num_workers)
        rows = read(self.encoding.cleaner.sources, streaming=True, seed=self.seed)
        for number, window in enumerate(chunks(rows, self.window)):
            if number % workers != mine:
                continue
            made, tally = self.encoding(window)
            weights = [self.encoding.cleaner.sources[row.source].weight for row, _ in made]
            random = generator(self.seed, Purpose.MIX, number, 1)
            times = [int(w) + bool(random.random() < w % 1) for w in weights]
            listed = [s for (_, samples), n in zip(made, times, strict=True) for s in samples * n]
            yield [replace(sample, index=(number << 24) + place) for place, sample in enumerate(listed)], tally


class StreamedBatches(Resumable):
    """This rank's batches of a streamed corpus: the same in the same order for any number of workers, and, dealt out
    in turn, of ranks. What does not fill a batch at the end of a window goes on into the next one. On resuming, what
    was shown is read again.

    Args:
        encoding: the corpus, and how it is tokenised. Every rank reads and tokenises all of it.
        batch_size, seed, capacity, rank, world_size: as in `EpochBatches`.
        window: rows that are shuffled together.
        num_workers: processes that tokenise.
    """

    def __init__(
        self,
        encoding: Encoding,
        batch_size: int,
        seed: int,
        capacity: int | None,
        rank: int,
        world_size: int,
        window: int,
        num_workers: int,
    ) -> None:
        self.encoding, self.batch_size, self.seed, self.capacity = encoding, batch_size, seed, capacity
        self.rank, self.world_size, self.window, self.num_workers = rank, world_size, window, num_workers
        self.tally = Tally()
        self._lengths: dict[int, int] = {}  # batches of the epochs that are over

    def __iter__(self) -> Iterator[Batch]:
        skip = 0
        if self.shown is not None:
            self.epoch, skip = 0, self.shown()
            while (length := self._lengths.get(self.epoch, skip + 1)) <= skip:
                self.epoch, skip = self.epoch + 1, skip - length
        while True:
            count = 0
            for batch in self._batches():
                count += 1
                if count > skip:
                    yield collate(batch, self.capacity)
            self._lengths[self.epoch] = count
            if count > skip or not count:
                return
            self.epoch, skip = self.epoch + 1, skip - count  # the run that is resumed has been through this epoch

    def _batches(self) -> Iterator[list[list[Sample]]]:
        """This rank's batches of the epoch."""
        round_: list[list[list[Sample]]] = []  # batches that the ranks take at the same time
        for samples, rows in self._planned():
            for batch in rows:
                round_.append([[samples[i] for i in row] for row in batch])
                if len(round_) == self.world_size:
                    yield round_[self.rank]
                    round_ = []

    def _planned(self) -> Iterator[tuple[list[Sample], list[Rows]]]:
        self.tally = Tally()
        flag, most = "data.cleaning.max_bad_share", self.encoding.cleaner.cleaning.max_bad_share
        rest: list[Sample] = []
        windows = DataLoader(
            _Windows(self.encoding, self.window, self.seed), batch_size=None, num_workers=self.num_workers
        )
        for number, (samples, tally) in enumerate(windows):
            self.tally.add(tally)
            self.tally.check("data.train", most, flag, over=False)
            samples = rest + samples
            lengths = np.array([len(sample) for sample in samples], np.int64)
            random = generator(self.seed, Purpose.ORDER, self.epoch, number)
            batches, left = plan(lengths, random.permutation(len(samples)), self.batch_size, self.capacity, random)
            yield samples, batches
            rest = [samples[i] for i in left]
        self.tally.check("data.train", most, flag)
