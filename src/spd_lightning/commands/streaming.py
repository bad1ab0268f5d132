"""Show a generation while it happens: text as soon as it is final, coloured by where its tokens came from.

On a terminal the drafts in flight follow the final text, dim, and are replaced in the next cycle. They never leave the
current line, so saving the cursor before them and restoring it afterwards is all it takes: no scrolling, no redrawing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from spd_lightning.decoding.decoder import CycleEvent

ACCEPTED, CORRECTED, IN_FLIGHT = "green", "bold yellow", "dim"
_SAVE, _RESTORE, _ERASE_LINE = "\x1b7", "\x1b8", "\x1b[K"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: Control characters a model may emit must not reach a terminal; all but newline and tab become visible pictures.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t\r"}
_PICTURES |= {ord("\r"): "", 127: "\N{SYMBOL FOR DELETE}"} | {code: _REPLACEMENT for code in range(128, 160)}

Decode = Callable[[Sequence[int]], str]


class IncrementalDetokenizer:
    """Text of a growing sequence of tokens, in pieces that never change later.

    A byte-level token may end inside a character; the decoded text then ends with U+FFFD and is held back until the
    character is complete. Only a short window is decoded each time: the tokens of the last piece (some tokenizers
    strip the space of a text's first token) and what came after them.
    """

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self._ids: list[int] = []
        self._start = 0  # where the window begins
        self._shown = 0  # tokens whose text was handed out

    def push(self, token: int) -> str:
        """The text that became final with this token, maybe none."""
        self._ids.append(token)
        text = self.pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def pending(self, following: Sequence[int] = ()) -> str:
        """The text that was held back, as it would read if `following` came next. Changes nothing."""
        before = self.decode(self._ids[self._start : self._shown]) if self._shown > self._start else ""
        return self.decode([*self._ids[self._start :], *following])[len(before) :]

    def finish(self) -> str:
        """What is left at the end of the sequence, an incomplete character included."""
        text = self.pending()
        self._start, self._shown = self._shown, len(self._ids)
        return text


class TextStream:
    """An observer of the decoder that writes what becomes final.

    Args:
        decode: ids to text, special tokens left out.
        output: where to write.
        colour: None: on a terminal that shows colours, unless NO_COLOR is set; False: never.
        width: columns of the terminal; None: ask it.
    """

    def __init__(self, decode: Decode, output: TextIO, colour: bool | None = None, width: int | None = None) -> None:
        self.text = IncrementalDetokenizer(decode)
        self.output = output
        self.console = None if colour is False else colour_console(output, force=bool(colour))
        self.live = self.console is not None and output.isatty() and not self.console.legacy_windows
        self.width = width or (self.console.width if self.console else 80)
        self._in_flight: list[int] = []
        self._column = 0
        self._drafts_shown = False

    def __call__(self, event: CycleEvent) -> None:
        if event.emitted is not None:
            style = {None: None, True: ACCEPTED, False: CORRECTED}[event.accepted]
            self._write(self.text.push(event.emitted), style)
        self._track(event)
        if self.live:
            self._show_drafts()
        self.output.flush()

    def finish(self) -> None:
        """Write what is left and end the line."""
        self._write(self.text.finish())
        self._erase_drafts()
        self.output.write("\n")
        self.output.flush()

    def _track(self, event: CycleEvent) -> None:
        """Keep the list of drafts in flight: a verified one leaves, a rejection flushes all, the fresh one enters."""
        if event.accepted is False or event.drafted is None:
            self._in_flight.clear()
            return
        if event.accepted:
            del self._in_flight[0]
        self._in_flight.append(event.drafted)

    def _write(self, text: str, style: str | None = None) -> None:
        if not text:
            return
        self._erase_drafts()
        if self.console is None:
            self.output.write(text)
            return
        visible = text.translate(_PICTURES)
        self.console.out(visible, style=style, end="", highlight=False)
        self._column = column_after(visible, self._column, self.width)

    def _show_drafts(self) -> None:
        self._erase_drafts()
        drafts = self.text.pending(self._in_flight).translate(_PICTURES).replace("\n", "⏎").replace("\t", " ")
        drafts = _cut(drafts, self.width - self._column - 2)  # a reserve, should a character be wider than thought
        if drafts:
            assert self.console is not None
            self.output.write(_SAVE)
            self.console.out(drafts, style=IN_FLIGHT, end="", highlight=False)
            self.output.write(_RESTORE)
            self._drafts_shown = True

    def _erase_drafts(self) -> None:
        if self._drafts_shown:
            self.output.write(_ERASE_LINE)
            self._drafts_shown = False


def colour_console(output: TextIO, force: bool = False) -> Console | None:
    """A console for `output` if it shows colours (or `force`), else None: plain text without any escape code."""
    from rich.console import Console

    console = Console(file=output, highlight=False, force_terminal=True if force else None)
    if force:
        return console
    wanted = console.is_terminal and console.color_system is not None
    return console if wanted and not os.environ.get("NO_COLOR") else None


def column_after(text: str, column: int, width: int) -> int:
    """Column of the cursor after `text` on a terminal that wraps at `width`."""
    from rich.cells import cell_len

    for character in text:
        if character == "\n":
            column = 0
        elif character == "\t":
            column = min(width - 1, (column // 8 + 1) * 8)
        else:
            cells = cell_len(character)
            column = cells if column + cells > width else column + cells
    return column


def _cut(text: str, cells: int) -> str:
    """The longest start of `text` that fits into `cells` columns."""
    from rich.cells import cell_len

    while text and cell_len(text) > max(cells, 0):
        text = text[:-1]
    return text


def legend(output: TextIO) -> str | None:
    """What the colours mean, in these colours; None where there are none."""
    console = colour_console(output)
    if console is None:
        return None
    parts = [
        (ACCEPTED, "accepted draft"),
        (CORRECTED, "the target's correction of a wrong draft"),
        ("default", "first token, always the target's"),
        (IN_FLIGHT, "drafts in flight"),
    ]
    with console.capture() as captured:
        console.print("   ".join(f"[{style}]{meaning}[/]" for style, meaning in parts), soft_wrap=True, end="")
    return captured.get()
