"""SpdDataModule: what a corpus becomes on its way to a training step; the order is a function of (seed, epoch) alone.

A corpus is tokenised once into a memory-mapped store that runs and ranks share; a corpus larger than the disk is
streamed instead, tokenised as it comes and shuffled in windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from spd_lightning.data.batches import Batch, EpochBatches, PlannedBatch, Resumable, Rows, Share, collate, plan
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
        batch_size: rows per micro-batch, what one rank computes at once: conversations, or packed rows of max_length
            tokens.
        global_batch_size: rows per optimizer step over all ranks; trainer.accumulate_grad_batches follows from it, so
            that a run is the same on any number of ranks. null: batch_size x ranks x accumulate_grad_batches.
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
        global_batch_size: int | None = None,
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
        self.global_batch_size = global_batch_size
        self.packing, self.streaming, self.window = packing, streaming, window
        self.validation_samples, self.num_workers = validation_samples, num_workers
        self.folder = default_folder() if cache is None else Path(cache).expanduser()
        for name, value, least in (
            ("max_length", max_length, 2),
            ("batch_size", batch_size, 1),
            ("global_batch_size", 1 if global_batch_size is None else global_batch_size, 1),
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

    # -- global batches, on any number of ranks ----------------------------------------------------------------------

    def share_out(self, trainer: L.Trainer, before: Mapping[str, Any] | None = None) -> None:
        """Let the trainer accumulate what makes a global batch.

        Args:
            trainer: whose `accumulate_grad_batches` is set.
            before: `state_dict` of a run that is resumed, whose global batches stay what they were.

        Raises:
            InputError: ranks and micro-batches do not make up the global batch, or not that of the run before.
        """
        rows = self.global_batch_size
        if before:
            known = before["batch_size"] * before["world_size"] * before["accumulate"]
            for name, ours, theirs in (
                ("batch_size", self.batch_size, before["batch_size"]),
                ("global_batch_size", known if rows is None else rows, known),
                ("seed", self.seed, before["seed"]),
                ("max_length", self.max_length, before["max_length"]),
            ):
                if ours != theirs:
                    raise InputError(
                        f"data.{name}={ours}: the run that is resumed had {theirs}, and the order of its data would be "
                        f"another one. Set data.{name} to {theirs}; ranks may be more or fewer."
                    )
            rows = known
        self.trainer = trainer  # ranks and accumulation are known from now on
        if rows is None:
            return
        world, given = trainer.world_size, trainer.accumulate_grad_batches
        if rows % (self.batch_size * world):
            raise InputError(
                f"data.global_batch_size={rows}: expected a multiple of data.batch_size={self.batch_size} x {world} "
                f"ranks ({self.batch_size * world})."
            )
        trainer.accumulate_grad_batches = rows // (self.batch_size * world)
        if not before and given not in (1, trainer.accumulate_grad_batches):
            raise InputError(
                f"trainer.accumulate_grad_batches={given}: data.global_batch_size={rows} asks for "
                f"{trainer.accumulate_grad_batches} on {world} ranks. Leave it out."
            )

    def state_dict(self) -> dict[str, Any]:
        """What decides which rows a step uses; where the run stands is counted by the trainer."""
        return {
            "batch_size": self.batch_size,
            "world_size": self._place[1],
            "accumulate": self._accumulate,
            "seed": self.seed,
            "max_length": self.max_length,
            "store": None if self.train_samples is None else self.train_samples.path.name,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ours, theirs = self.state_dict()["store"], state_dict["store"]
        if ours != theirs:
            rank_zero_warn(
                f"The checkpoint was made on other data (fingerprint {theirs}, now {ours}): the run goes on, but it "
                "does not repeat what it would have been. Check data.train and the tokenizer."
            )

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

    @property
    def batches(self) -> EpochBatches:
        """This rank's training batches."""
        return self._planned_for(*self._place, self._accumulate)

    @lru_cache(maxsize=1)  # noqa: B019 (one data module per process; ranks are known late, and packing takes a while)
    def _planned_for(self, rank: int, world_size: int, accumulate: int) -> EpochBatches:
        assert self.train_samples is not None, "setup has not run"
        return EpochBatches(
            self.train_samples.lengths,
            self.batch_size,
            self.seed,
            self.capacity,
            weights=np.array([source.weight for source in self.train_sources])[self.train_samples.source_numbers],
            rank=rank,
            world_size=world_size,
            drafted=self.train_samples.drafted,
            accumulate=accumulate,
        )

    def train_dataloader(self) -> DataLoader[Batch] | StreamedBatches:
        if self.streaming:
            if self.trainer is not None and self.trainer.max_steps < 0:
                raise InputError("data.streaming: the length of an epoch is not known. Set trainer.max_steps.")
            streamed = StreamedBatches(
                self.train_encoding, self.batch_size, self.seed, self.capacity, *self._place, self.window,
                self.num_workers, self._accumulate,
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
        drafted, lengths = self.validation_set.drafted, self.validation_set.lengths
        mine = self._validation_order()[:count].tolist()[rank::world]
        # as many batches on every rank: under ZeRO-3 each of them is a meeting of all ranks
        parts = np.array_split(mine, ceil(ceil(count / world) / self.batch_size))
        batches = [
            PlannedBatch([[i] for i in part], Share(0, float(drafted[part].sum()), float(lengths[part].sum())))
            for part in (part.tolist() for part in parts)
        ]
        return self._loader(self.validation_set, batches, None)

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

    @property
    def _accumulate(self) -> int:
        """Micro-batches per rank and optimizer step."""
        return int(self.trainer.accumulate_grad_batches) if self.trainer else 1

    def _shown(self) -> int:
        """Training batches of this run so far, before a checkpoint that it goes on from included."""
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress if self.trainer else None
        return progress.total.processed if progress else 0

    def _loader(self, samples: TokenStore, batches: Any, capacity: int | None) -> DataLoader[Batch]:
        return DataLoader(
            _Rows(samples),  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=_Collate(capacity),  # type: ignore[arg-type]  # it gets what __getitems__ returns
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


class _Rows:
    """What a loader reads of a store: the samples of a micro-batch, row by row."""

    def __init__(self, samples: TokenStore) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, batch: PlannedBatch) -> tuple[list[list[Sample]], Share]:
        rows = [[self.samples[index] for index in row] for row in batch]
        # a rank that has nothing to do in a round still takes part in it
        return rows or [[replace(self.samples[0], turns=())]], batch.share


class _Collate:
    def __init__(self, length: int | None) -> None:
        self.length = length

    def __call__(self, planned: tuple[list[list[Sample]], Share]) -> Batch:
        rows, share = planned
        return collate(rows, self.length, share)


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
        accumulate: as in `EpochBatches`.
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
        accumulate: int = 1,
    ) -> None:
        self.encoding, self.batch_size, self.seed, self.capacity = encoding, batch_size, seed, capacity
        self.rank, self.world_size, self.window, self.num_workers = rank, world_size, window, num_workers
        self.accumulate = accumulate
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
            for batch, share in self._batches():
                count += 1
                if count > skip:
                    yield collate(batch, self.capacity, share)
            self._lengths[self.epoch] = count
            if count > skip or not count:
                return
            self.epoch, skip = self.epoch + 1, skip - count  # the run that is resumed has been through this epoch

    def _batches(self) -> Iterator[tuple[list[list[Sample]], Share]]:
        """This rank's micro-batches of the epoch."""
        step: list[list[list[Sample]]] = []  # the micro-batches of a global batch
        parts = self.world_size * self.accumulate
        for samples, rows in self._planned():
            for batch in rows:
                step.append([[samples[i] for i in row] for row in batch])
                if len(step) == parts:
                    share = Share.of([s for batch in step for row in batch for s in row], parts, self.epoch)
                    yield from ((mine, share) for mine in step[self.rank :: self.world_size])
                    step = []

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
