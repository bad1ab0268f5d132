"""Files of torch.save, read without running anything and without allocating more than they hold."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from spd_lightning.errors import InputError, first_line


def read_pickled(path: Path, what: str, mmap: bool = False) -> Any:
    """Tensors and plain values of a file; a pickle that asks for anything else is refused.

    Args:
        what: the kind of file, for the error, such as "a checkpoint".
        mmap: leave tensors on disk until they are used.

    Raises:
        InputError: a damaged file, one with code in it, or one that unpacks to more than its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            size = sum(entry.file_size for entry in archive.infolist())
            if packed or size > path.stat().st_size:
                raise InputError(f"{path} cannot be read as {what}: it unpacks to more than it holds.")
            if damaged := archive.testzip():  # torch itself compares no checksum
                raise InputError(f"{path} cannot be read as {what}: it is damaged (checksum of {damaged}).")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except InputError:
        raise
    except Exception as error:  # zip, pickle and runtime errors: a damaged file raises any of them
        reason = "it is truncated, damaged or of another kind"
        if "weights_only" in str(error) or "Unsupported global" in str(error) or "GLOBAL" in str(error):
            reason = "it holds Python objects, which could run code; nothing of it was executed"
        raise InputError(f"{path} cannot be read as {what}: {reason} ({first_line(error)[:120]}).") from error
