"""Where conversations come from: hub data sets, local files and directories, read row by row with their places.

JSON lines are read here, because a single broken line of millions must be skipped, counted and named, and because the
lines of one file need not agree in their fields; everything else is read by `datasets`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, NamedTuple

from spd_lightning.data.tally import Bad
from spd_lightning.errors import InputError
from spd_lightning.randomness import Purpose, generator

#: Bytes of one line above which it is no conversation but a broken file; never more than this is held in memory.
LINE_LIMIT = 64 << 20
#: Characters of a JSON array that are read at a time.
ARRAY_BLOCK = 1 << 20
_LINES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_TABLES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_EMBEDDED = Path(__file__).resolve().parent.parent / "embedded" / "documentation"
#: What `columns` can name.
COLUMNS = ("messages", "prompt", "response", "system", "text", "tools", "id")


class Row(NamedTuple):
    """One row of a source: which source, where it stands, and its fields (or what is wrong with it)."""

    source: int
    place: str
    content: dict[str, Any] | Bad


@dataclass(frozen=True)
class Source:
    """One source of conversations.

    Args:
        path: a .jsonl, .json (both also .gz), .parquet or .csv file, a directory of them, a data set written by
            `save_to_disk`, or a hub id; documentation:train and documentation:heldout ship with the package.
        config: configuration of a hub data set.
        split: its split.
        revision: its branch, tag or commit.
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
        details = [x for x in (self.config, self.split if not self.is_local else None, self.revision) if x]
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
        return looks_local or self.local.exists() or any(path.endswith(s) for s in (*_LINES, *_TABLES))

    def files(self) -> list[Path]:
        """The JSON or table files of a local source, in the order in which they are read."""
        if not self.local.is_dir():
            return [self.local]
        found = sorted(p for p in self.local.rglob("*") if p.is_file() and p.name.endswith((*_LINES, *_TABLES)))
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
        files = self.files()
        if not files:
            kinds = ", ".join((*_LINES, *_TABLES))
            raise InputError(f"{name}={self.path!r} holds no data files: expected {kinds}.")
        for file in files:
            if not file.name.endswith((*_LINES, *_TABLES)):
                raise InputError(f"{name}={str(file)!r}: expected a file ending in {', '.join((*_LINES, *_TABLES))}.")
        if all(file.stat().st_size == 0 for file in files):
            raise InputError(f"{name}={self.path!r} is empty: expected one conversation per line.")

    def fingerprint(self) -> Any:
        """What changes when the rows do: names, sizes and times of local files; id, split and commit of the hub."""
        if self.is_local:
            files = sorted(self.local.rglob("*")) if self.is_saved else self.files()
            stats = [(str(file.resolve()), file.stat()) for file in files if file.is_file()]
            found: Any = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        else:
            found = _hub_commit(self)
        return [found, {k: v for k, v in asdict(self).items() if k not in ("weight", "rows")}]


Sources = list[Source]


def parse_sources(name: str, given: str | Source | Sequence[str | Source]) -> Sources:
    """One or several sources as a list; `name` is the field or flag they come from."""
    several = [given] if isinstance(given, (str, Source)) else list(given)
    if not several:
        raise InputError(f"{name} is empty: expected a file, a directory or a hub id.")
    return [Source.parse(each) if isinstance(each, str) else each for each in several]


# -- reading ---------------------------------------------------------------------------------------------------------


def read(sources: Sequence[Source], streaming: bool = False, seed: int = 0) -> Iterator[Row]:
    """Rows of all sources: one source after the other, or, streamed, interleaved in proportion to their sizes.

    Memory holds a few rows, never a source.
    """
    if not streaming or len(sources) == 1:
        for number, source in enumerate(sources):
            yield from (Row(number, place, content) for place, content in _read_one(source, streaming))
        return
    readers = [_read_one(source, True) for source in sources]
    sizes = [_size(source) * source.weight for source in sources]
    open_ones = list(range(len(sources)))
    random = generator(seed, Purpose.MIX)
    while open_ones:
        total = sum(sizes[i] for i in open_ones)
        chosen = random.choice(open_ones, p=[sizes[i] / total for i in open_ones])
        row = next(readers[chosen], None)
        if row is None:
            open_ones.remove(chosen)
        else:
            yield Row(int(chosen), *row)


def count_rows(source: Source) -> int | None:
    """Rows of a source if that costs nothing to know, for progress bars."""
    try:
        return _size(source)
    except InputError:
        return None


Located = tuple[str, "dict[str, Any] | Bad"]


def _read_one(source: Source, streaming: bool) -> Iterator[Located]:
    if not source.is_local or source.is_saved:
        yield from _read_dataset(source, streaming)
        return
    for file in source.files():
        if file.name.endswith(_LINES):
            yield from _read_json(file)
        else:
            yield from _read_dataset(source, streaming, file)


def _read_dataset(source: Source, streaming: bool, file: Path | None = None) -> Iterator[Located]:
    from datasets import Dataset, load_dataset, load_from_disk

    named = str(source if file is None else file)
    with _quiet_datasets():
        try:
            if file is not None:
                kind = _TABLES[file.suffix]
                rows: Any = load_dataset(kind, data_files=str(file), split="train", streaming=streaming)
            elif source.is_saved:
                rows = load_from_disk(str(source.local))
                rows = rows if isinstance(rows, Dataset) else rows[source.split]
            else:
                rows = load_dataset(
                    source.path, source.config, split=source.split, revision=source.revision, streaming=streaming
                )
        except Exception as error:  # datasets, huggingface_hub, fsspec and pyarrow have classes of their own
            raise InputError(f"source {named} cannot be loaded: {_first_line(error)}") from error
    number = 0
    try:
        for batch in rows.iter(batch_size=256):
            names = list(batch)
            for values in zip(*(batch[name] for name in names), strict=True):
                yield f"{named} row {number}", dict(zip(names, values, strict=True))
                number += 1
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # broken files show when they are read
        raise InputError(f"source {named} cannot be read after row {number}: {_first_line(error)}") from error


def _read_json(file: Path) -> Iterator[Located]:
    """The objects of a JSON-lines file or of a JSON array; lines that are none come back as `Bad`."""
    with _open(file) as stream:
        try:
            if _first_byte(stream) == b"[":
                yield from _read_array(file, stream)
            else:
                yield from _read_lines(file, stream)
        except (OSError, EOFError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
            raise InputError(f"{file} cannot be read to its end: {_first_line(error)}") from error


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb")  # type: ignore[return-value]


def _first_byte(stream: IO[bytes]) -> bytes:
    while (byte := stream.read(1)).isspace() or byte in (b"\xef", b"\xbb", b"\xbf"):  # also a byte order mark
        continue
    stream.seek(0)
    return byte


def _read_lines(file: Path, stream: IO[bytes]) -> Iterator[Located]:
    number = 0
    while line := stream.readline(LINE_LIMIT + 1):
        number += 1
        place = f"{file}:{number}"
        if len(line) > LINE_LIMIT:
            size = len(line)
            while not line.endswith(b"\n") and (line := stream.readline(LINE_LIMIT)):
                size += len(line)
            yield place, Bad("line too long", place, f"{size} bytes, the limit is {LINE_LIMIT}")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            complete = line.endswith(b"\n")
            content = _parse(line, place)
            if isinstance(content, Bad) and content.reason == "invalid JSON" and not complete:
                content = Bad("truncated last line", place, content.detail)
            yield place, content


def _parse(line: bytes, place: str) -> dict[str, Any] | Bad:
    try:
        content = json.loads(line)
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", place, f"byte {error.object[error.start]:#04x} at column {error.start + 1}")
    except (ValueError, RecursionError) as error:
        return Bad("invalid JSON", place, _first_line(error))
    if not isinstance(content, dict):
        return Bad("not an object", place, f"found {type(content).__name__}")
    return content


def _read_array(file: Path, stream: IO[bytes]) -> Iterator[Located]:
    """Elements of one JSON array, a buffer at a time. A fault inside ends the file: there is no next line to go on."""
    import codecs

    decode, parse = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    text, place_in_text, number, size = "", 0, 0, ARRAY_BLOCK

    def fill() -> bool:
        nonlocal text, place_in_text
        block = stream.read(size)
        try:
            text = text[place_in_text:] + decode.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: element {number} (from 0) is not UTF-8: {error.reason}.") from error
        place_in_text = 0
        if len(text) > LINE_LIMIT:
            raise InputError(f"{file}: element {number} (from 0) exceeds {LINE_LIMIT} bytes.")
        return bool(block)

    def skip(characters: str) -> str:
        """The next character that is not among these; empty at the end."""
        nonlocal place_in_text
        while True:
            while place_in_text < len(text) and text[place_in_text] in characters:
                place_in_text += 1
            if place_in_text < len(text) or not fill():
                return text[place_in_text : place_in_text + 1]

    fill()
    skip(" \t\r\n")
    place_in_text += 1  # the opening bracket
    while (next_one := skip(" \t\r\n,")) != "]":
        place = f"{file} element {number}"
        while True:
            try:
                content, place_in_text = parse.raw_decode(text, place_in_text)
                break
            except ValueError as error:
                size = max(ARRAY_BLOCK, len(text))  # an element of many buffers is not parsed again for each of them
                if not next_one or not fill():
                    yield place, Bad("invalid JSON", place, f"{_first_line(error)}; the rest of the file is not read")
                    return
        yield place, content if isinstance(content, dict) else Bad("not an object", place)
        number, size = number + 1, ARRAY_BLOCK


def _size(source: Source) -> int:
    if source.rows is not None:
        return source.rows
    if source.is_local and not source.is_saved:
        files = source.files()
        if all(file.suffix == ".parquet" for file in files):
            from pyarrow import parquet

            return sum(parquet.read_metadata(file).num_rows for file in files)
        if all(file.suffix in (".jsonl", ".ndjson") for file in files):
            return max(1, sum(_count_lines(file) for file in files))
    elif not source.is_local:
        from datasets import load_dataset_builder

        with _quiet_datasets():
            try:
                splits = load_dataset_builder(source.path, source.config, revision=source.revision).info.splits or {}
            except Exception as error:
                raise InputError(f"source {source} cannot be loaded: {_first_line(error)}") from error
        if source.split in splits and splits[source.split].num_examples:
            return int(splits[source.split].num_examples)
    raise InputError(
        f"source {source}: its number of rows is not known, and streamed sources are mixed in proportion to their "
        "sizes: give it as rows."
    )


def _count_lines(file: Path) -> int:
    with open(file, "rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


def _hub_commit(source: Source) -> str:
    """The commit a hub source stands at, or, offline, what `datasets` has of it."""
    from datasets import load_dataset_builder

    with _quiet_datasets():
        try:
            builder = load_dataset_builder(source.path, source.config, revision=source.revision)
        except Exception as error:
            raise InputError(f"source {source} cannot be loaded: {_first_line(error)}") from error
    return f"{builder.hash}"


class _quiet_datasets:
    """No bars of datasets, and no log lines for what it raises anyway."""

    def __enter__(self) -> None:
        from datasets.utils import logging

        self.before = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        from datasets.utils import logging

        logging.set_verbosity(self.before)


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ if error.__cause__ is not None and not str(error).strip() else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def digest(*parts: str) -> str:
    """20 hexadecimal digits that name some text."""
    hashed = hashlib.blake2b(digest_size=10)
    for part in parts:
        hashed.update(part.encode("utf-8", "surrogatepass"))
        hashed.update(b"\x00")
    return hashed.hexdigest()
