"""What the commands share when they read their arguments: one-line errors that name the closest known word."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

from spd_lightning.errors import InputError


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be, or None."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A sentence for the end of an error, empty where nothing is close."""
    match = closest(word, known)
    return f" Did you mean {prefix}{match}?" if match else ""


class CommandParser(argparse.ArgumentParser):
    """argparse with whole option names only, and errors as `InputError` instead of a page of usage."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            word = message.removeprefix(prefix).split()[0].partition("=")[0]
            options = [option for action in self._actions for option in action.option_strings]
            message = f"unknown argument {word}.{did_you_mean(word, options)}"
        raise InputError(f"{message}{'' if message[-1] in '.?' else '.'} See {self.prog} --help")
