"""Tokenised once: samples of a corpus on disk, memory-mapped, under a name that follows from everything they depend on.

The name is a fingerprint of sources, cleaning, split, template, tokenizer, length and this package's own code, so a
store that exists is right, and one that would be stale is simply another. A store is written under a temporary name by
whoever holds its lock and renamed when it is complete; every other process waits and maps the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from spd_lightning.data.chat import ChatEncoder, ChatOptions, Sample
from spd_lightning.data.cleaning import Cleaner
from spd_lightning.data.parallel import chunks, ordered_map
from spd_lightning.data.progress import Progress
from spd_lightning.data.reading import Row, count_rows, read
from spd_lightning.data.tally import BadRowError, Tally
from spd_lightning.errors import InputError
from spd_lightning.target.loading import Loading, load_tokenizer

_NOTHING_DRAFTED = BadRowError("no labelled token", "but the first of a turn, which no head drafts")


@dataclass
class Encoding:
    """Rows in, samples out: everything that tokenised samples depend on; cheap to send to other processes.

    Args:
        cleaner: sources, filters, side of the split.
        tokenizer: folder or hub id.
        loading: how it is loaded.
        chat: how conversations are rendered.
        max_length: tokens.
    """

    cleaner: Cleaner
    tokenizer: str
    loading: Loading = Loading()
    chat: ChatOptions = ChatOptions()
    max_length: int = 2048
    _encoder: ChatEncoder | None = field(default=None, repr=False, compare=False)

    @property
    def encoder(self) -> ChatEncoder:
        if self._encoder is None:
            self._encoder = ChatEncoder(load_tokenizer(self.tokenizer, self.loading), self.max_length, self.chat)
        return self._encoder

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_encoder": None}  # each process has a tokenizer of its own

    def __call__(self, rows: Sequence[Row]) -> tuple[list[tuple[Row, list[Sample]]], Tally]:
        """The samples of some rows, and what became of each row."""
        kept, tally = self.cleaner(rows)
        made = self.encoder.encode([found for _, found in kept])
        result = []
        for (row, found), samples in zip(kept, made, strict=True):
            if not isinstance(samples, BadRowError):
                samples = [sample for sample in samples if sample.drafted] or _NOTHING_DRAFTED
            if isinstance(samples, BadRowError):
                tally.kept -= 1
                tally.add_bad(samples.at(row.place))
                continue
            if any(token in text for text in found.texts() for token in self._control_tokens):
                tally.notes["text that holds control tokens of the tokenizer"] += 1
            result.append((row, samples))
        return result, tally

    @property
    def _control_tokens(self) -> list[str]:
        return [str(token) for token in self.encoder.tokenizer.all_special_tokens]

    def fingerprint(self) -> str:
        """Names what this encoding makes of its sources as they are now."""
        tokenizer = self.encoder.tokenizer
        content = {
            "sources": [source.fingerprint() for source in self.cleaner.sources],
            "cleaning": asdict(self.cleaner.cleaning) | {"max_bad_share": None},
            "benchmarks": self.cleaner.cleaning.fingerprint(),
            "split": [self.cleaner.part, self.cleaner.heldout_share],
            "chat": asdict(self.chat) | {"template": self.encoder.template},
            "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "special": [sorted(self.encoder.special), {k: str(v) for k, v in tokenizer.special_tokens_map.items()}],
            "max_length": self.max_length,
            "code": [_code(), *(version(name) for name in ("transformers", "tokenizers"))],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _code() -> str:
    """A digest of the modules that decide which tokens come out."""
    folder = Path(__file__).parent
    names = ("chat.py", "cleaning.py", "conversations.py", "reading.py", "sources.py", "store.py")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


class TokenStore:
    """The samples of a corpus; a sequence of `Sample`.

    Attributes:
        path: its folder: samples.arrow, manifest.json.
        manifest: counts, and what it was made from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))

    @cached_property
    def _table(self) -> Any:
        import pyarrow

        with pyarrow.memory_map(str(self.path / "samples.arrow")) as mapped:
            return pyarrow.ipc.open_stream(mapped).read_all()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}  # another process maps the file itself

    def __len__(self) -> int:
        return int(self.manifest["samples"])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids = self._table["ids"][index].values.to_numpy()
        ends = self._table["turns"][index].values.to_numpy()
        return Sample(index, ids, tuple(map(tuple, ends.reshape(-1, 2).tolist())))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def lengths(self) -> np.ndarray:
        """[samples] int32: tokens of each."""
        return self._column("length")

    @cached_property
    def source_numbers(self) -> np.ndarray:
        """[samples] int32: which of the sources each is of."""
        return self._column("source")

    @cached_property
    def drafted(self) -> np.ndarray:
        """[samples] int64: labelled tokens of each that a head drafts, see `Sample.drafted`."""
        turns = self._table["turns"].combine_chunks()
        ends, offsets = turns.values.to_numpy().astype(np.int64), turns.offsets.to_numpy()
        lengths = np.concatenate([[0], np.cumsum(ends[1::2] - ends[::2] - 1)])  # turns lie one after another
        return lengths[offsets[1:] // 2] - lengths[offsets[:-1] // 2]

    def _column(self, name: str) -> np.ndarray:
        return np.asarray(self._table[name].to_numpy(), np.int32)

    @property
    def tally(self) -> Tally:
        return Tally.from_dict(self.manifest["tally"])


def open_store(
    encoding: Encoding, folder: Path, name: str, workers: int = 0, progress: Progress | None = None
) -> TokenStore:
    """The store of an encoding: mapped if it exists, built if not.

    Args:
        encoding: what to tokenise, and how.
        folder: where stores lie.
        name: the field or flag that the sources come from, for errors.
        workers: processes that tokenise, besides this one.
        progress: told how far a build is.

    Raises:
        InputError: too many bad rows, nothing usable, or a folder that cannot be written.
    """
    from filelock import FileLock

    path = folder / encoding.fingerprint()
    if not (path / "manifest.json").is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not (path / "manifest.json").is_file():
                    _build(encoding, path, name, workers, progress)
        except OSError as error:
            raise InputError(f"data.cache={str(folder)!r} cannot be written: {error}. Set data.cache.") from error
    store = TokenStore(path)
    store.tally.check(name, encoding.cleaner.cleaning.max_bad_share, "data.cleaning.max_bad_share")
    return store


def _build(encoding: Encoding, path: Path, name: str, workers: int, progress: Progress | None) -> None:
    import pyarrow as pa

    schema = pa.schema(
        [
            ("ids", pa.list_(pa.int32())),
            ("turns", pa.list_(pa.int32())),
            ("length", pa.int32()),
            ("source", pa.int32()),
        ]
    )
    sources = encoding.cleaner.sources
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    for left in path.parent.glob(f".{path.name}-*"):  # by a process that was killed: this one holds the lock
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    total = count_rows(sources)
    tally, began = Tally(), time.time()
    count = tokens = labels = 0
    largest = -1
    try:
        with pa.OSFile(str(temporary / "samples.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for result, counted in ordered_map(encoding, chunks(read(sources)), workers):
                tally.add(counted)
                tally.check(name, encoding.cleaner.cleaning.max_bad_share, "data.cleaning.max_bad_share", over=False)
                listed = [(row.source, sample) for row, samples in result for sample in samples]
                if listed:
                    writer.write_batch(_record_batch(listed, schema))
                    count += len(listed)
                    tokens += sum(len(sample) for _, sample in listed)
                    labels += sum(sample.labels for _, sample in listed)
                    largest = max(largest, *(int(sample.ids.max()) for _, sample in listed))
                if progress is not None:
                    progress(tally.read, total)
        tally.check(name, encoding.cleaner.cleaning.max_bad_share, "data.cleaning.max_bad_share")
        if not count:
            raise InputError(
                f"{name}: none of {tally.read} rows of {', '.join(map(str, sources))} gave a sample. "
                + " ".join(line.strip() for line in tally.lines()[1:4])
            )
        manifest = {
            "samples": count,
            "tokens": tokens,
            "labels": labels,
            "largest_token": largest,
            "sources": [asdict(source) for source in sources],
            "tokenizer": encoding.tokenizer,
            "chat": asdict(encoding.chat),
            "max_length": encoding.max_length,
            "tally": tally.as_dict(),
            "seconds": round(time.time() - began, 2),
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(path, ignore_errors=True)  # without a manifest: what a killed process left
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _record_batch(listed: Sequence[tuple[int, Sample]], schema: Any) -> Any:
    import pyarrow as pa

    lengths = np.array([len(sample) for _, sample in listed], np.int32)
    turns = [np.array(sample.turns, np.int32).ravel() for _, sample in listed]
    columns = [
        _lists([sample.ids for _, sample in listed]),
        _lists(turns),
        pa.array(lengths),
        pa.array(np.array([source for source, _ in listed], np.int32)),
    ]
    return pa.record_batch(columns, schema=schema)


def _lists(rows: Sequence[np.ndarray]) -> Any:
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows).astype(np.int32)))


def default_folder() -> Path:
    """Where stores lie unless told otherwise: SPD_CACHE, else the user's cache."""
    if given := os.environ.get("SPD_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "spd_lightning" / "tokens"
