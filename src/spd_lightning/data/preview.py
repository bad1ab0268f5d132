"""Look at samples as training sees them: pieces of text with the mask, an HTML page of them, figures of many rows.

A piece is one token, or several of which none ends with a complete character: a byte-level token may hold a part of
one. No piece reaches across the border of a turn or into a special token.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

import numpy as np

from spd_lightning.data.chat import ChatEncoder, Sample
from spd_lightning.data.parallel import chunks
from spd_lightning.data.progress import Progress
from spd_lightning.data.reading import Row
from spd_lightning.data.store import Encoding
from spd_lightning.data.tally import BadRowError, Tally

Kind = Literal["prompt", "first", "label"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: No limit on the tokens of a sample.
_WHOLE = 1 << 30
_CHUNK = 64


@dataclass(frozen=True)
class Piece:
    """Some tokens and what they read.

    Attributes:
        start: position of the first one.
        ids: the tokens.
        text: what they decode to where they stand.
        kind: prompt: not learned from; first: the first of a turn, which no draft is made for; label: drafted.
        special: whether it is one special token.
    """

    start: int
    ids: tuple[int, ...]
    text: str
    kind: Kind
    special: bool


def pieces(sample: Sample, encoder: ChatEncoder) -> list[Piece]:
    """The text of a sample in pieces, in order; together they read as the decoded sample."""
    ids = sample.ids.tolist()
    kinds: list[Kind] = ["prompt"] * len(ids)
    for start, stop in sample.turns:
        later: list[Kind] = ["label"] * (stop - start - 1)
        kinds[start:stop] = ["first", *later]
    special = [token in encoder.special for token in ids]
    borders = {border for turn in sample.turns for border in turn}
    borders |= {border for at, is_special in enumerate(special) if is_special for border in (at, at + 1)}

    def decode(tokens: Sequence[int]) -> str:
        found = encoder.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(found)

    return [
        Piece(start, tuple(ids[start:stop]), text, kinds[start], special[start])
        for start, stop, text in _readable(ids, decode, borders)
    ]


def _readable(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], borders: set[int]
) -> Iterator[tuple[int, int, str]]:
    """Shortest runs [start, stop) of tokens that end with a complete character or at a border, with their text.

    Each is decoded together with the one before, since some tokenizers strip the space of a text's first token.
    """
    window = shown = 0
    before = ""
    for stop in range(1, len(ids) + 1):
        text = decode(ids[window:stop])
        complete = len(text) > len(before) and text.startswith(before) and not text.endswith(_REPLACEMENT)
        if not (complete or stop in borders or stop == len(ids)):
            continue
        text = text[len(before) :]
        yield shown, stop, text
        # half a character is no context: with the other half it would read otherwise
        window, shown = (shown, stop) if complete else (stop, stop)
        before = decode(ids[window:shown])


def visible(text: str) -> str:
    """Control characters and invisible marks as something to see; tabs, newlines and joiners of emojis stay."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in "\n\t\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    return f"<U+{ord(character):04X}>"


# -- scan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A sample to look at: where its conversation stands, and which of how many samples of it this is."""

    place: str
    number: int
    count: int
    sample: Sample


@dataclass
class Scan:
    """What some rows of a corpus become.

    Attributes:
        tally: what became of each row.
        shown: the first samples.
        lengths: tokens of each sample.
        labels, first: labelled tokens, and those of them that begin a turn.
        per_chat, per_text: how many samples conversations gave.
        cut: conversations that lost labelled tokens to max_length.
        lost: how many.
    """

    tally: Tally = field(default_factory=Tally)
    shown: list[Shown] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    labels: int = 0
    first: int = 0
    per_chat: Counter[int] = field(default_factory=Counter)
    per_text: Counter[int] = field(default_factory=Counter)
    cut: int = 0
    lost: int = 0

    def lines(self, max_length: int) -> list[str]:
        """For people."""
        if not self.lengths:
            return self.tally.lines()
        tokens = sum(self.lengths)
        quantiles = np.percentile(self.lengths, (5, 25, 50, 75, 95, 100)).round().astype(int)
        named = zip(("5 %", "25 %", "median", "75 %", "95 %", "longest"), quantiles, strict=True)
        return [
            *self.tally.lines(),
            f"{len(self.lengths)} samples, {tokens} tokens. Lengths: {', '.join(f'{n}: {v}' for n, v in named)}",
            f"labelled: {self.labels} tokens ({self.labels / tokens:.1%}); drafted: {self.labels - self.first} "
            f"({(self.labels - self.first) / tokens:.1%}), the rest are first tokens of turns, which the target gives",
            f"cut by --max-length {max_length}: {self.cut} conversations, which lose {self.lost} labelled tokens "
            f"({self.lost / (self.labels + self.lost):.1%} of all)",
            *self._several(),
        ]

    def _several(self) -> list[str]:
        lines = []
        for counts, what, why in (
            (self.per_chat, "conversations", "the template writes an older answer in another way than the last one "
             "(without its thoughts, say), and each is learned as the target meets it when it answers"),
            (self.per_text, "plain texts", "a text longer than --max-length goes on in further samples"),
        ):  # fmt: skip
            if counts and max(counts) > 1:
                several = sum(n for samples, n in counts.items() if samples > 1)
                mean = sum(samples * n for samples, n in counts.items()) / counts.total()
                lines.append(f"several samples: {several} of {counts.total()} {what}, {mean:.2f} on average: {why}")
        return lines


def scan(encoding: Encoding, rows: Iterable[Row], samples: int, progress: Progress | None = None) -> Scan:
    """Encode rows as training does, count, and keep the first `samples` samples."""
    found = Scan()
    whole = ChatEncoder(encoding.encoder.tokenizer, _WHOLE, encoding.chat)
    for chunk in chunks(rows, _CHUNK):
        made, tally = encoding(chunk)
        found.tally.add(tally)
        kept = encoding.cleaner(chunk)[0]
        uncut = whole.encode([conversation for _, conversation in kept])
        known = {id(row): (each, labels) for (row, each), labels in zip(kept, map(_labels, uncut), strict=True)}
        for row, of_row in made:
            conversation, labels = known[id(row)]
            _add(found, row, of_row, samples)
            if conversation.text is not None:  # cut into further samples, nothing is lost
                found.per_text[len(of_row)] += 1
                continue
            found.per_chat[len(of_row)] += 1
            lost = labels - sum(sample.labels for sample in of_row)
            found.cut += lost > 0
            found.lost += lost
        if progress is not None:
            progress(found.tally.read, None)
    return found


def _labels(samples: Sequence[Sample] | BadRowError) -> int:
    return 0 if isinstance(samples, BadRowError) else sum(sample.labels for sample in samples)


def _add(found: Scan, row: Row, of_row: Sequence[Sample], samples: int) -> None:
    for number, sample in enumerate(of_row, 1):
        if len(found.shown) < samples:
            found.shown.append(Shown(row.place, number, len(of_row), sample))
        found.lengths.append(len(sample))
        found.labels += sample.labels
        found.first += len(sample.turns)


# -- HTML ------------------------------------------------------------------------------------------------------------

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Samples</title>
<style>
:root {{ color-scheme: light dark; --text: #1b1b1b; --page: #fff; --quiet: #6a6a6a; --line: #bbb;
  --label: #c9efc9; --first: #ffdf80; --special: #8a1fa8; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e8e8e8; --page: #161616; --quiet: #a0a0a0; --line: #555;
  --label: #1d4a24; --first: #6b5200; --special: #e29bff; }} }}
body {{ margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: var(--text); background: var(--page);
  font: 15px/1.5 system-ui, sans-serif; }}
h2 {{ font-size: 1rem; margin: 2rem 0 .3rem; overflow-wrap: anywhere; }}
.text, .key, pre {{ font: 13px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
.text {{ border: 1px solid var(--line); border-radius: 4px; padding: .6rem; }}
.text span, .key span {{ box-shadow: inset 1px 0 var(--line); }}
.p {{ color: var(--quiet); }} .l {{ background: var(--label); }} .f {{ background: var(--first); }}
.s {{ color: var(--special); font-weight: 600; }}
i::before {{ content: "\\23CE"; color: var(--quiet); }}
</style>
</head>
<body>
<h1>Samples as training sees them</h1>
<p class="key"><span class="p">prompt</span> <span class="f">first token of a turn: labelled, never drafted</span> \
<span class="l">labelled and drafted</span> <span class="p s">special token</span></p>
<p>A thin line begins each token; point at one for its position, id and vocabulary entry. Tokens that hold parts of one
character stand together.</p>
<pre>{summary}</pre>
{samples}
</body>
</html>
"""


def html_page(shown: Sequence[Shown], encoder: ChatEncoder, summary: Sequence[str]) -> str:
    """One self-contained page: a legend, the summary, and each sample with its tokens."""
    samples = "\n".join(_html_sample(each, encoder) for each in shown)
    return _PAGE.format(summary=escape(visible("\n".join(summary))), samples=samples)


def heading(shown: Shown) -> str:
    """Where a sample comes from, how long it is, how much of it is labelled."""
    sample = shown.sample
    part = f", sample {shown.number} of {shown.count}" if shown.count > 1 else ""
    return (
        f"{shown.place}{part}: {len(sample)} tokens, {sample.labels} labelled ({sample.labels / len(sample):.0%}) "
        f"in {len(sample.turns)} turn{'s' if len(sample.turns) > 1 else ''}"
    )


def _html_sample(shown: Shown, encoder: ChatEncoder) -> str:
    spans = "".join(_html_piece(piece, encoder) for piece in pieces(shown.sample, encoder))
    return f'<h2>{escape(visible(heading(shown)))}</h2>\n<div class="text">{spans}</div>'


def _html_piece(piece: Piece, encoder: ChatEncoder) -> str:
    entries = encoder.tokenizer.convert_ids_to_tokens(list(piece.ids))
    title = "\n".join(
        f"position {position}, id {token}: {entry}"
        for position, (token, entry) in enumerate(zip(piece.ids, entries, strict=True), piece.start)
    )
    kind = piece.kind[0] + (" s" if piece.special else "")
    # the sign for a newline is drawn by the style sheet, so that copied text is the sample's
    text = escape(visible(piece.text)).replace("\n", "<i></i>\n")
    return f'<span class="{kind}" title="{escape(visible(title))}">{text}</span>'
