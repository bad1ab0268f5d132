"""Where conversations come from: files, directories, saved data sets, the hub; as a value to be written down."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from spd_lightning.errors import InputError

#: Files of JSON objects, and of tables by what `datasets` calls their kind.
LINES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
TABLES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
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
        split: its split.
        revision: its branch, tag or commit.
        files: pattern of the files to read of it, where it holds others too.
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
        if not self.weight > 0:
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
        details = [x for x in (self.config, self.files, self.split if not self.is_local else None, self.revision) if x]
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
        found = sorted(p for p in self.local.rglob("*") if p.is_file() and p.name.endswith((*LINES, *TABLES)))
        return [p for p in found if not p.name.startswith(".") and "manifest" not in p.name]

    @property
    def is_saved(self) -> bool:
        """Whether it was written by `Dataset.save_to_disk`."""
        return (self.local / "state.json").is_file() and (self.local / "dataset_info.json").is_file()

    def check(self, name: str) -> None:
        """Refuse what is not there or not readable by kind, before anything is loaded."""
        if not self.is_local:
            return
        if not self.local.exists():
            raise InputError(f"{name}={self.path!r} does not exist: expected a file, a directory or a hub id.")
        if self.is_saved:
            return
        files = self.local_files()
        if not files:
            kinds = ", ".join((*LINES, *TABLES))
            raise InputError(f"{name}={self.path!r} holds no data files: expected {kinds}.")
        for file in files:
            if not file.name.endswith((*LINES, *TABLES)):
                raise InputError(f"{name}={str(file)!r}: expected a file ending in {', '.join((*LINES, *TABLES))}.")
        if all(file.stat().st_size == 0 for file in files):
            raise InputError(f"{name}={self.path!r} is empty: expected one conversation per line.")

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


def first_line(error: BaseException) -> str:
    cause = error.__cause__ if error.__cause__ is not None and not str(error).strip() else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def digest(*parts: str) -> str:
    """20 hexadecimal digits that name some text."""
    hashed = hashlib.blake2b(digest_size=10)
    for part in parts:
        hashed.update(part.encode("utf-8", "surrogatepass"))
        hashed.update(b"\x00")
    return hashed.hexdigest()
