"""The step preview: see what the target would learn from."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.data import common
from spd_lightning.commands.parsing import CommandParser
from spd_lightning.errors import InputError
from spd_lightning.files import write_whole

if TYPE_CHECKING:
    from rich.console import Console

    from spd_lightning.data.preview import Piece, Scan
    from spd_lightning.data.store import Encoding

_ABOUT = """\
See what the target would learn from: samples as training tokenises them, with the mask and the special tokens, and
figures of the first rows (lengths, labelled share, bad rows and why). Writes nothing but --html."""

_EXAMPLES = f"""\
{common.SOURCES}

examples
  spd-lightning data preview documentation:heldout --samples 2
  spd-lightning data preview chats.jsonl --tokenizer Qwen/Qwen3-8B --html preview.html
  spd-lightning data preview chats.jsonl --tokenizer Qwen/Qwen3-8B --skip 1741 --samples 1 | less

colours: green = labelled and drafted, yellow = first token of a turn (labelled, never drafted), dim = prompt, blue =
special token; in a pipe or with NO_COLOR: \u2039first token\u00a6other labelled tokens\u203a"""

_STYLES = {"prompt": "dim", "first": "black on yellow", "label": "black on green"}
_SPECIAL = {"prompt": "blue", "first": "bold blue on yellow", "label": "bold blue on green"}


def parser() -> CommandParser:
    """The arguments of data preview."""
    made = CommandParser("spd-lightning data preview", _ABOUT, _EXAMPLES)
    common.add_sources(made)
    view = made.add_argument_group("view")
    view.add_argument("--samples", type=int, default=5, metavar="N", help="samples that are shown (5)")
    view.add_argument("--skip", type=int, default=0, metavar="N", help="pass over the first N rows (0)")
    view.add_argument("--scan", type=int, default=1000, metavar="N", help="rows that the figures are of (1000)")
    view.add_argument("--max-length", type=int, default=2048, metavar="N", help="tokens of a sample (2048)")
    view.add_argument("--html", type=Path, metavar="FILE", help="write the samples as one page, token by token")
    view.add_argument("--no-color", action="store_true", help="mark the mask by signs instead of colours")
    common.add_chat(made)
    common.add_cleaning(made)
    return made


def run(argv: list[str]) -> int:
    """`spd-lightning data preview`."""
    options = parser().parse_args(argv)
    _check(options)
    encoding, found = _scan(options)
    summary = found.lines(options.max_length)
    if found.tally.bad_share > options.max_bad_share:
        summary.append(
            f"{found.tally.bad_share:.1%} of the rows are bad: the other steps and fit end with an error above "
            f"--max-bad-share {options.max_bad_share:.1%}"
        )
    if hasattr(sys.stdout, "reconfigure"):  # an encoding without some character must not end the command
        sys.stdout.reconfigure(errors="backslashreplace")
    _print(options, encoding, found, summary)
    if not found.lengths:
        names = ", ".join(map(str, encoding.cleaner.sources))
        raise InputError(f"SOURCE: none of {found.tally.read} rows of {names} gave a sample, see the lines above.")
    if options.html is not None:
        _write_html(options.html, encoding, found, summary)
    return 0


def _check(options: Namespace) -> None:
    """Refuse what cannot be, before anything is imported or loaded."""
    for name, least in (("samples", 0), ("skip", 0), ("scan", 1), ("max_length", 2)):
        if getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least {least}.")
    if options.html is not None:
        if not options.html.parent.is_dir():
            raise InputError(f"--html {options.html}: the folder {options.html.parent} does not exist.")
        if options.html.is_dir():
            raise InputError(f"--html {options.html} is a folder: expected the name of a file.")


def _scan(options: Namespace) -> tuple[Encoding, Scan]:
    from spd_lightning.data.cleaning import Cleaner
    from spd_lightning.data.preview import scan
    from spd_lightning.data.progress import progress_bar
    from spd_lightning.data.reading import read
    from spd_lightning.data.store import Encoding

    sources = common.sources(options)
    cleaner = Cleaner(sources, common.cleaning(options))
    encoding = Encoding(
        cleaner, options.tokenizer, common.loading(options), common.chat(options), options.max_length
    )  # fmt: skip
    rows = (
        row._replace(source=number)
        for number, source in enumerate(sources)
        for row in read([source], streaming=True)  # the first rows of a hub data set without the rest of it
    )
    skipped = sum(1 for _ in islice(rows, options.skip))
    with progress_bar("reading") as progress:
        found = scan(encoding, islice(rows, options.scan), options.samples, progress)
    if not found.tally.read:
        names = ", ".join(map(str, sources))
        reason = (
            f"--skip {options.skip}: {names} has only {skipped} rows" if skipped else f"SOURCE: {names} has no rows"
        )
        raise InputError(f"{reason}.")
    return encoding, found


# -- terminal --------------------------------------------------------------------------------------------------------


def _print(options: Namespace, encoding: Encoding, found: Scan, summary: list[str]) -> None:
    from spd_lightning.commands.streaming import colour_console
    from spd_lightning.data.preview import heading, pieces, visible

    console = None if options.no_color else colour_console(sys.stdout)
    for shown in found.shown:
        _line(console, f"-- {visible(heading(shown))}", "bold")
        listed = pieces(shown.sample, encoding.encoder)
        if console is None:
            print(plain(listed), end="\n\n")
            continue
        for text, style in styled(listed):
            console.out(text, style=style, end="", highlight=False)
        console.out("\n", highlight=False)
    if found.shown:
        _legend(console)
    for line in summary:
        _line(console, visible(line))


def _line(console: Console | None, text: str, style: str | None = None) -> None:
    if console is None:
        print(text)
    else:
        console.out(text, style=style, highlight=False)


def _legend(console: Console | None) -> None:
    if console is None:
        print("\u2039first token of a turn, never drafted\u00a6labelled and drafted\u203a; everything else: prompt\n")
        return
    for style, meaning in (
        (_STYLES["label"], "labelled and drafted"),
        (_STYLES["first"], "first token of a turn, never drafted"),
        (_STYLES["prompt"], "prompt"),
        (_SPECIAL["prompt"], "special token"),
    ):
        console.out(meaning, style=style, end="", highlight=False)
        console.out("   ", end="", highlight=False)
    console.out("\n", highlight=False)


def styled(listed: Iterable[Piece]) -> Iterator[tuple[str, str]]:
    """Text and style for a terminal; a line break is outside of any style, which would colour the rest of the line."""
    for style, group in groupby(listed, lambda piece: (_SPECIAL if piece.special else _STYLES)[piece.kind]):
        first, *lines = "".join(map(_shown, group)).split("\n")
        yield first, style
        for line in lines:
            yield "\n", "none"
            yield line, style


def plain(listed: Iterable[Piece]) -> str:
    """The text with the labelled parts between signs."""
    result, before = "", "prompt"
    for piece in listed:
        if before != "prompt" and piece.kind != "label":
            result += "\u203a"
        if piece.kind == "first":
            result += "\u2039"
        elif before == "first" and piece.kind == "label":
            result += "\u00a6"
        result, before = result + _shown(piece), piece.kind
    return result + ("" if before == "prompt" else "\u203a")


def _shown(piece: Piece) -> str:
    from spd_lightning.data.preview import visible

    return visible(piece.text).replace("\n", "\u23ce\n")


# -- page ------------------------------------------------------------------------------------------------------------


def _write_html(path: Path, encoding: Encoding, found: Scan, summary: list[str]) -> None:
    from spd_lightning.data.preview import html_page

    page: Any = html_page(found.shown, encoding.encoder, summary)
    write_whole(path, page, "--html")
    print(f"wrote {path}", file=sys.stderr)
