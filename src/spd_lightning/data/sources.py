"""Where conversations come from: files, directories, saved data sets, the hub; as a value to be written down."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from spd_lightning.errors import InputError, first_line

#: Files of JSON objects, and of tables by what `datasets` calls their kind.
LINES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
TABLES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
#: What a directory may hold besides, but nobody here can read: better refused than left out without a word.
_UNREADABLE = (".gz", ".zst", ".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz")
#: Files that describe others.
_ABOUT = ("manifest.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
#: Words of a file's name by which it is of one side of a split, or of the other.
_TRAIN = {"train", "training"}
_HELDOUT = {"test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation", "heldout", "held"}
_EMBEDDED = Path(__file__).resolve().parent.parent / "embedded" / "documentation"
#: What `columns` can name.
COLUMNS = ("messages", "prompt", "response", "system", "text", "tools", "id")


@dataclass(frozen=True)
class Source:
    """One source of conversations.

    Args:
        path: a .jsonl, .json (both also .gz), .parquet or .csv file, a directory of them, a data set written by
            `save_to_disk`, or a hub id; documentation:train and documentation:heldout ship with the package.
        config: configuration of a hub data set.
        split: its split, or that of what `save_to_disk` wrote.
        revision: its branch, tag or commit.
        files: pattern of the files to read of it, or of a directory, where it holds others too.
        weight: how often a conversation is seen per epoch on average: 2 shows each one twice, 0.5 another half of
            them in every epoch.
        columns: which column holds what, where its name is not one of the usual: {prompt: question, response:
            answer}. Keys: messages, prompt, response, system, text, tools, id.
        rows: number of rows, for several streamed sources whose size is not known beforehand.
    """

    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    files: str | None = None
    weight: float = 1.0
    columns: dict[str, str] = field(default_factory=dict)
    rows: int | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise InputError("a source has an empty path: expected a file, a directory or a hub id.")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise InputError(f"source {self.path}: weight={self.weight}: expected a positive number.")
        if self.rows is not None and self.rows < 1:
            raise InputError(f"source {self.path}: rows={self.rows}: expected at least 1.")
        for name in self.columns:
            if name not in COLUMNS:
                raise InputError(f"source {self.path}: columns.{name}: expected one of {', '.join(COLUMNS)}.")

    @classmethod
    def parse(cls, text: str) -> Source:
        """`path[,key=value...]`, keys being the fields above or those of `columns`: `x.jsonl,weight=2,prompt=question`.

        A file whose name holds commas wins over this reading.
        """
        if Path(text).exists():
            return cls(text)
        path, *parts = text.split(",")
        options: dict[str, Any] = {}
        columns: dict[str, str] = {}
        known = [f.name for f in fields(cls) if f.name not in ("path", "columns")]
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals or key not in (*known, *COLUMNS):
                raise InputError(
                    f"source {text!r}: {part!r}: expected path,key=value,... with keys {', '.join((*known, *COLUMNS))}."
                )
            if key in COLUMNS:
                columns[key] = value
                continue
            kind = {"weight": float, "rows": int}.get(key, str)
            try:
                options[key] = kind(value)
            except ValueError as error:
                raise InputError(f"source {text!r}: {key}={value!r}: expected {kind.__name__}.") from error
        return cls(path, columns=columns, **options)

    def __str__(self) -> str:
        has_splits = not self.is_local or self._splits
        details = [x for x in (self.config, self.files, self.split if has_splits else None, self.revision) if x]
        return f"{self.path} [{', '.join(details)}]" if details else self.path

    @property
    def local(self) -> Path:
        if self.path.startswith("documentation:"):
            return _EMBEDDED / f"{self.path.removeprefix('documentation:')}.jsonl.gz"
        return Path(self.path).expanduser()

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine: it exists, or is written as no hub id can be."""
        path = self.path
        looks_local = path.startswith(("documentation:", "/", ".", "~")) or path.count("/") > 1
        return looks_local or self.local.exists() or any(path.endswith(s) for s in (*LINES, *TABLES))

    def local_files(self) -> list[Path]:
        """The JSON or table files of a local source, in the order in which they are read."""
        if not self.local.is_dir():
            return [self.local]
        return [p for p in self._visible_files() if p.name.endswith((*LINES, *TABLES)) and p.name not in _ABOUT]

    def _visible_files(self) -> list[Path]:
        """All files of a directory that match `files` and are not hidden."""
        found = []
        for path in sorted(self.local.rglob("*")):
            relative = path.relative_to(self.local)
            hidden = any(part.startswith(".") for part in relative.parts)
            if path.is_file() and not hidden and (self.files is None or fnmatch(str(relative), self.files)):
                found.append(path)
        return found

    @property
    def is_saved(self) -> bool:
        """Whether it was written by `save_to_disk`."""
        one = all((self.local / name).is_file() for name in ("state.json", "dataset_info.json"))
        return one or (self.local / "dataset_dict.json").is_file()

    @property
    def _splits(self) -> list[str] | None:
        """The splits of what `DatasetDict.save_to_disk` wrote."""
        path = self.local / "dataset_dict.json"
        if not path.is_file():
            return None
        try:
            return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))["splits"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read: {first_line(error)}: expected what save_to_disk writes."
            ) from error

    def check(self, name: str) -> None:
        """Refuse what is not there or not readable by kind, before anything is loaded."""
        if not self.is_local:
            return
        if not self.local.exists():
            raise InputError(f"{name}={self.path!r} does not exist: expected a file, a directory or a hub id.")
        self._check_options(name)
        if self.is_saved:
            return
        files = self.local_files()
        if not files:
            kinds, which = ", ".join((*LINES, *TABLES)), "" if self.files is None else f" named {self.files}"
            raise InputError(f"{name}={self.path!r} holds no data files{which}: expected {kinds}.")
        if self.local.is_dir():
            self._check_directory(name, files)
        for file in files:
            if not file.name.endswith((*LINES, *TABLES)):
                raise InputError(f"{name}={str(file)!r}: expected a file ending in {', '.join((*LINES, *TABLES))}.")
        if all(file.stat().st_size == 0 for file in files):
            raise InputError(f"{name}={self.path!r} is empty: expected one conversation per line.")

    def _check_options(self, name: str) -> None:
        """Refuse options that a local source does not have."""
        for option in ("config", "revision"):
            if (value := getattr(self, option)) is not None:
                raise InputError(f"{name}={self.path!r}: {option}={value}: only hub data sets have one. Remove it.")
        splits = self._splits
        if splits is not None and self.split not in splits:
            raise InputError(f"{name}={self.path!r}: split={self.split}: expected one of {', '.join(splits)}.")
        if splits is None and self.split != "train":
            raise InputError(
                f"{name}={self.path!r}: split={self.split}: files have no splits. Name the files instead: "
                f"files=*{self.split}*."
            )
        if self.files is not None and (self.is_saved or not self.local.is_dir()):
            raise InputError(f"{name}={self.path!r}: files={self.files}: expected a directory of files. Remove it.")

    def _check_directory(self, name: str, files: Sequence[Path]) -> None:
        """Refuse a directory whose reading would mix splits, or leave files out, without a word."""
        words = {p: set(re.split(r"[^a-z]+", str(p.relative_to(self.local)).casefold())) for p in files}
        train = [p.name for p in files if words[p] & _TRAIN]
        heldout = [p.name for p in files if words[p] & _HELDOUT and not words[p] & _TRAIN]
        if train and heldout:
            raise InputError(
                f"{name}={self.path!r} holds several splits: {train[0]}, {heldout[0]}. Say which to read: "
                "files=*train*, or name the file."
            )
        readable = set(files)
        unread = [p for p in self._visible_files() if p not in readable and p.name not in _ABOUT]
        if others := [p for p in unread if p.name.casefold().endswith((*LINES, *TABLES, *_UNREADABLE))]:
            raise InputError(
                f"{name}={self.path!r} holds {others[0].name}, which cannot be read: unpack it, or name the files to "
                "read: files=*.jsonl."
            )

    def fingerprint(self) -> Any:
        """What changes when the rows do: names, sizes and times of local files; id, split and commit of the hub."""
        if self.is_local:
            files = sorted(self.local.rglob("*")) if self.is_saved else self.local_files()
            stats = [(str(file.resolve()), file.stat()) for file in files if file.is_file()]
            found: Any = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        else:
            found = str(hub_builder(self).hash)
        return [found, {k: v for k, v in asdict(self).items() if k not in ("weight", "rows")}]


Sources = list[Source]


def parse_sources(name: str, given: str | Source | Sequence[str | Source]) -> Sources:
    """One or several sources as a list; `name` is the field or flag they come from."""
    several = [given] if isinstance(given, (str, Source)) else list(given)
    if not several:
        raise InputError(f"{name} is empty: expected a file, a directory or a hub id.")
    return [Source.parse(each) if isinstance(each, str) else each for each in several]


def hub_builder(source: Source) -> Any:
    """What `datasets` knows of a hub source without its rows: its commit is in `hash`, its sizes in `info`."""
    from datasets import load_dataset_builder

    with quiet_datasets():
        try:
            return load_dataset_builder(source.path, source.config, data_files=source.files, revision=source.revision)
        except Exception as error:  # datasets, huggingface_hub and fsspec have classes of their own
            raise InputError(f"source {source} cannot be loaded: {first_line(error)}") from error


class quiet_datasets:
    """No bars of datasets, and no log lines for what it raises anyway."""

    def __enter__(self) -> None:
        from datasets.utils import logging

        self.before = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        from datasets.utils import logging

        logging.set_verbosity(self.before)


def digest(*parts: str) -> str:
    """20 hexadecimal digits that name some text."""
    hashed = hashlib.blake2b(digest_size=10)
    for part in parts:
        hashed.update(part.encode("utf-8", "surrogatepass"))
        hashed.update(b"\x00")
    return hashed.hexdigest()
