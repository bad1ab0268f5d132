"""Rows of a source with their places, a few at a time: memory never holds a source.

JSON lines are read here, because a single broken line of millions must be skipped, counted and named, and because the
lines of one file need not agree in their fields; everything else is read by `datasets`.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from glob import escape
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from spd_lightning.data.sources import LINES, TABLES, Source, hub_builder, quiet_datasets
from spd_lightning.data.tally import Bad
from spd_lightning.errors import InputError, first_line
from spd_lightning.randomness import Purpose, generator

#: Bytes of one line above which it is no conversation but a broken file; never more than this is held in memory.
LINE_LIMIT = 64 << 20
#: Characters of a JSON array that are read at a time.
ARRAY_BLOCK = 1 << 20


class Row(NamedTuple):
    """One row of a source: which source, where it stands, and its fields (or what is wrong with it)."""

    source: int
    place: str
    content: dict[str, Any] | Bad


def read(sources: Sequence[Source], streaming: bool = False, seed: int = 0) -> Iterator[Row]:
    """Rows of all sources: one source after the other, or, streamed, interleaved in proportion to their sizes.

    Memory holds a few rows, never a source.
    """
    if not streaming or len(sources) == 1:
        for number, source in enumerate(sources):
            yield from (Row(number, place, content) for place, content in _read_one(source, streaming))
        return
    readers = [_read_one(source, True) for source in sources]
    sizes = [max(1, _size(source)) for source in sources]
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


def count_rows(sources: Sequence[Source]) -> int | None:
    """Rows of some sources if that costs little to know, for progress bars."""
    try:
        return sum(map(_size, sources))
    except InputError:
        return None


Located = tuple[str, "dict[str, Any] | Bad"]


def _read_one(source: Source, streaming: bool) -> Iterator[Located]:
    if not source.is_local or source.is_saved:
        yield from _read_dataset(source, streaming)
        return
    for file in source.local_files():
        if file.name.endswith(LINES):
            yield from _read_json(file)
        else:
            yield from _read_dataset(source, streaming, file)


def _read_dataset(source: Source, streaming: bool, file: Path | None = None) -> Iterator[Located]:
    from datasets import Dataset, load_dataset, load_from_disk

    named = str(source if file is None else file)
    with quiet_datasets():
        try:
            if file is not None:
                kind = TABLES[file.suffix]
                rows: Any = load_dataset(kind, data_files=escape(str(file)), split="train", streaming=streaming)
            elif source.is_saved:
                rows = load_from_disk(str(source.local))
                rows = (rows if isinstance(rows, Dataset) else rows[source.split]).with_format(None)
            else:
                rows = load_dataset(
                    source.path,
                    source.config,
                    data_files=source.files,
                    split=source.split,
                    revision=source.revision,
                    streaming=streaming,
                )
        except Exception as error:  # datasets, huggingface_hub, fsspec and pyarrow have classes of their own
            raise InputError(f"source {named} cannot be loaded: {first_line(error)}") from error
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
        raise InputError(f"source {named} cannot be read after row {number}: {first_line(error)}") from error


def _read_json(file: Path) -> Iterator[Located]:
    """The objects of a JSON-lines file or of a JSON array; lines that are none come back as `Bad`."""
    try:
        with _open(file) as stream:
            if _first_byte(stream) == b"[":
                yield from _read_array(file, stream)
            else:
                yield from _read_lines(file, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file} cannot be read to its end: {first_line(error)}") from error


def _open(file: Path) -> BufferedIOBase:
    return gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb")


def _first_byte(stream: BufferedIOBase) -> bytes:
    while (byte := stream.read(1)).isspace() or byte in (b"\xef", b"\xbb", b"\xbf"):  # also a byte order mark
        continue
    stream.seek(0)
    return byte


def _read_lines(file: Path, stream: BufferedIOBase) -> Iterator[Located]:
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
        return Bad("invalid JSON", place, first_line(error))
    if not isinstance(content, dict):
        return Bad("not an object", place, f"found {type(content).__name__}")
    return content


def _read_array(file: Path, stream: BufferedIOBase) -> Iterator[Located]:
    """Elements of one JSON array, a buffer at a time.

    Raises:
        InputError: a fault inside, after which no element can be told from another, or text after the array.
    """
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
            except (ValueError, RecursionError) as error:
                # a buffer that ends within the element, or a fault; an element of many buffers is not parsed for each
                size = max(ARRAY_BLOCK, len(text) - place_in_text)
                if len(text) - place_in_text > LINE_LIMIT or not next_one or not fill():
                    raise InputError(
                        f"{place} (from 0): invalid JSON, or longer than {LINE_LIMIT} bytes: {first_line(error)}. "
                        "What follows in an array cannot be read: mend the file, or write one object per line."
                    ) from error
        yield place, content if isinstance(content, dict) else Bad("not an object", place)
        number, size = number + 1, ARRAY_BLOCK
    place_in_text += 1
    if skip(" \t\r\n"):
        raise InputError(
            f"{file}: text after its JSON array of {number} elements: expected one array, or one per file."
        )


def _size(source: Source) -> int:
    if source.rows is not None:
        return source.rows
    if source.is_local and not source.is_saved:
        files = source.local_files()
        if all(file.suffix == ".parquet" for file in files):
            return sum(map(_parquet_rows, files))
        if all(file.suffix in (".jsonl", ".ndjson") for file in files):
            return sum(map(_count_lines, files))
    elif not source.is_local:
        splits = hub_builder(source).info.splits or {}
        if source.split in splits and splits[source.split].num_examples:
            return int(splits[source.split].num_examples)
    raise InputError(
        f"source {source}: its number of rows is not known, and streamed sources are mixed in proportion to their "
        "sizes: give it as rows."
    )


def _parquet_rows(file: Path) -> int:
    from pyarrow import ArrowException, parquet

    try:
        return int(parquet.read_metadata(file).num_rows)
    except (ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read as parquet: {first_line(error)}") from error


def _count_lines(file: Path) -> int:
    with open(file, "rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
