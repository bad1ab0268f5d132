"""Files that are there in full or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spd_lightning.errors import InputError


def recipe_folder(package: Path = Path(__file__).resolve().parent) -> Path:  # noqa: B008 (a constant)
    """A wheel carries the recipes inside the package; in a checkout they lie at its root."""
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parents[1] / "recipes"


def write_whole(path: Path, content: str | Callable[[Any], None], flag: str = "") -> None:
    """A file that appears under its name only when it is complete; one process at a time.

    Args:
        path: the file.
        content: its text, or what writes it to an open text stream.
        flag: what named it, for the error.

    Raises:
        InputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")  # what a killed process left of it is written over
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            if isinstance(content, str):
                stream.write(content)
            else:
                content(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be written: {error.strerror}.".lstrip()) from error
    finally:
        temporary.unlink(missing_ok=True)
