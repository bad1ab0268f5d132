"""What is kept of a corpus: usable conversations, on this side of the held-out split, without benchmark prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from spd_lightning.data.conversations import Conversation, Tools, conversation
from spd_lightning.data.reading import Row, read
from spd_lightning.data.sources import Source, digest, parse_sources
from spd_lightning.data.tally import Bad, BadRowError, Tally
from spd_lightning.errors import InputError

Part = Literal["train", "heldout", "all"]

_WORD = re.compile(r"\w+", re.UNICODE)


@dataclass(frozen=True)
class Cleaning:
    """What is dropped from a corpus, and when there is too much of it.

    Args:
        tools: keep tool calls and their results, or drop them and keep the rest of the conversation.
        max_bad_share: share of unusable rows above which reading ends with an error.
        decontaminate: benchmarks, written as sources; conversations that share an n-gram with one of their questions
            are left out. Fields read: prompt, question, turns, instruction, text, messages.
        ngram: words in a row that count as the same text; a shorter question must be a whole turn.
    """

    tools: Tools = "drop"
    max_bad_share: float = 0.05
    decontaminate: list[str] = field(default_factory=list)
    ngram: int = 13

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_share <= 1:
            raise InputError(f"data.cleaning.max_bad_share={self.max_bad_share}: expected a number from 0 to 1.")
        if self.ngram < 3:
            raise InputError(f"data.cleaning.ngram={self.ngram}: expected at least 3 words.")

    def fingerprint(self) -> Any:
        """What changes when the benchmarks do."""
        return [Source.parse(name).fingerprint() for name in self.decontaminate]


@dataclass(frozen=True)
class Cleaner:
    """Rows in, conversations out; holds no state, so that processes can share the work.

    Args:
        sources: which the rows are of.
        cleaning: what is dropped.
        part: the side of the split that is wanted.
        heldout_share: share of conversations on the held-out side, by a digest of their openings.
    """

    sources: tuple[Source, ...]
    cleaning: Cleaning = Cleaning()
    part: Part = "all"
    heldout_share: float = 0.0

    def __call__(self, rows: Iterable[Row]) -> tuple[list[tuple[Row, Conversation]], Tally]:
        """The conversations of some rows, and what became of each row."""
        tally, kept = Tally(), []
        for row in rows:
            tally.read += 1
            if isinstance(row.content, Bad):
                tally.add_bad(row.content)
                continue
            try:
                found = conversation(row.content, self.sources[row.source].columns, self.cleaning.tools)
            except BadRowError as error:
                tally.add_bad(error.at(row.place))
                continue
            if self.part != "all" and self.part != self.side(found):
                tally.left_out[f"other side of the split ({self.side(found)})"] += 1
            elif self.cleaning.decontaminate and (name := self.contaminated(found)):
                tally.left_out[f"contains a prompt of {name}"] += 1
            else:
                tally.kept += 1
                kept.append((row, found))
        return kept, tally

    def side(self, found: Conversation) -> Part:
        """On which side of the split a conversation falls; a function of its opening alone."""
        return "heldout" if int(digest(found.opening)[:15], 16) / 16**15 < self.heldout_share else "train"

    def contaminated(self, found: Conversation) -> str | None:
        """The benchmark that a conversation shares text with."""
        known = _benchmarks(tuple(self.cleaning.decontaminate), self.cleaning.ngram)
        for text in found.texts():
            for ngram in _ngrams(_words(text), self.cleaning.ngram):
                if name := known.get(ngram):
                    return name
        return None


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]


def _ngrams(words: list[str], size: int) -> Iterator[int]:
    """Hashes of every `size` words in a row; of all words, where there are fewer."""
    for start in range(max(1, len(words) - size + 1)):
        yield hash((len(words) < size, *words[start : start + size]))


@lru_cache(maxsize=4)
def _benchmarks(files: tuple[str, ...], size: int) -> dict[int, str]:
    """The n-grams of all questions, with the benchmark they are of."""
    found: dict[int, str] = {}
    for name in files:
        (source,) = check_sources("data.cleaning.decontaminate", name)
        questions = [question for row in read([source]) for question in _questions(row)]
        if not questions:
            raise InputError(
                f"data.cleaning.decontaminate={name!r}: no question found: expected prompt, question, turns or text."
            )
        for question in questions:
            if words := _words(question):
                found.update(dict.fromkeys(_ngrams(words, size), Path(source.path).name))
    return found


def _questions(row: Row) -> list[str]:
    if isinstance(row.content, Bad):
        raise InputError(f"data.cleaning.decontaminate: {row.content}")
    fields: Any = row.content
    values: list[Any] = []
    for name in ("prompt", "question", "instruction", "text", "turns"):
        values += fields[name] if isinstance(fields.get(name), list) else [fields.get(name)]
    messages = fields.get("messages")
    if isinstance(messages, list):
        values += [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    return [value for value in values if isinstance(value, str)]


def check_sources(name: str, given: str | Source | Sequence[str | Source]) -> tuple[Source, ...]:
    """The sources of a field or flag, refused early where one is not there."""
    sources = parse_sources(name, given)
    for source in sources:
        source.check(name)
    return tuple(sources)
