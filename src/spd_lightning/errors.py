"""The one kind of error that a user's input can cause."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input: one line that names the value, what was expected and the field or flag to change.

    The command line prints it without a traceback and exits with status 2.
    """
