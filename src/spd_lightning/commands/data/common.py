"""Arguments that the data commands share: sources, cleaning, tokenizer and chat template."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.parsing import CommandParser
from spd_lightning.errors import InputError

if TYPE_CHECKING:  # help is light
    from spd_lightning.data.chat import ChatOptions
    from spd_lightning.data.cleaning import Cleaning
    from spd_lightning.data.sources import Source
    from spd_lightning.target.loading import Loading

SOURCES = """\
sources
  chats.jsonl, chats.json, chats.parquet, a folder of them, HuggingFaceH4/ultrachat_200k, documentation:train; further
  options after commas: hub/id,config=NAME,split=train_sft,revision=COMMIT,weight=2 and names of columns:
  gsm8k.jsonl,prompt=question,response=answer. Several are read one after the other."""


def add_sources(parser: CommandParser) -> None:
    """Positional SOURCE arguments."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="where conversations come from, see below")


def add_cleaning(parser: CommandParser) -> None:
    """--tools, --max-bad-share, --decontaminate, --ngram."""
    group = parser.add_argument_group("cleaning")
    group.add_argument("--tools", choices=("keep", "drop"), default="drop", help="tool calls and results (drop)")
    group.add_argument(
        "--max-bad-share", type=float, default=0.05, metavar="X", help="unusable rows that are tolerated (0.05)"
    )
    group.add_argument(
        "--decontaminate", action="append", default=[], metavar="FILE", help="leave out what shares text with these"
    )
    group.add_argument("--ngram", type=int, default=13, metavar="N", help="words in a row that count as shared (13)")


def add_chat(parser: CommandParser) -> None:
    """--tokenizer, --chat-template, --chat-arguments, --date, --turns, --revision, --offline, --trust-remote-code."""
    group = parser.add_argument_group("tokenizer and template")
    group.add_argument("--tokenizer", default="tiny", help="folder or hub id, normally the target's (tiny: built in)")
    group.add_argument("--chat-template", metavar="FILE", help="another chat template than the tokenizer's own")
    group.add_argument("--chat-arguments", metavar="JSON", help='for the template: {"enable_thinking": false}')
    group.add_argument("--date", default="2025-01-01", help="today, for templates that ask (2025-01-01)")
    group.add_argument("--turns", choices=("all", "last"), default="all", help="assistant turns that count (all)")
    group.add_argument("--revision", help="hub revision of the tokenizer: branch, tag or commit")
    group.add_argument("--offline", action="store_true", help="use only what is on this machine already")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the tokenizer")


def sources(arguments: Namespace) -> tuple[Source, ...]:
    """The SOURCE arguments, refused early where one is not there."""
    from spd_lightning.data.cleaning import check_sources

    return check_sources("SOURCE", arguments.sources)


def cleaning(arguments: Namespace) -> Cleaning:
    """What `add_cleaning` read."""
    from spd_lightning.data.cleaning import Cleaning

    return Cleaning(arguments.tools, arguments.max_bad_share, arguments.decontaminate, arguments.ngram)


def chat(arguments: Namespace) -> ChatOptions:
    """What `add_chat` read of the template."""
    from spd_lightning.data.chat import ChatOptions

    return ChatOptions(
        arguments.chat_template, json_object("--chat-arguments", arguments.chat_arguments), arguments.date,
        arguments.turns,
    )  # fmt: skip


def loading(arguments: Namespace) -> Loading:
    """What `add_chat` read of the tokenizer's origin."""
    from spd_lightning.target.loading import Loading

    return Loading(
        revision=arguments.revision, offline=arguments.offline, trust_remote_code=arguments.trust_remote_code
    )


def json_object(flag: str, text: str | None) -> dict[str, Any]:
    """A JSON object given on the command line."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"{flag} {text!r}: expected a JSON object: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f'{flag} {text!r}: expected a JSON object such as {{"enable_thinking": false}}.')
    return found


def output_folder(text: str) -> Path:
    """An output folder; refused where a file is in the way."""
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {text!r} is a file: expected a folder.")
    return path
