"""The one kind of error that a user's input can cause, and the line that others are told in."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input: one line that names the value, what was expected and the field or flag to change.

    The command line prints it without a traceback and exits with status 2.
    """


class BrokenInvariantError(RuntimeError):
    """Something contradicted what must hold always, such as losslessness: a bug, never a matter of training."""


def first_line(error: BaseException) -> str:
    """What an error of any library says, in one line; of one that says nothing, its cause's or its name."""
    cause = error.__cause__ if error.__cause__ is not None and not str(error).strip() else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0][:300]
