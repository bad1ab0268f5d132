"""The draft vocabulary: the token ids a head can propose, as a JSON file {"token_ids": [...]}."""

from __future__ import annotations

import json
from pathlib import Path

from spd_lightning.errors import InputError


def read_draft_vocabulary(path: str | Path, vocab_size: int, name: str = "draft_vocabulary") -> tuple[int, ...]:
    """Ascending ids.

    Args:
        path: the file.
        vocab_size: V of the target.
        name: the field or flag that the path comes from, for errors.

    Raises:
        InputError: naming field, file and the offending value.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}={str(path)!r} cannot be read: {error}. Expected the JSON file of data vocab."
        ) from error
    ids = data.get("token_ids") if isinstance(data, dict) else None
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise InputError(f'{name}={str(path)!r}: expected {{"token_ids": [one or more integers]}}.')
    ordered = tuple(sorted(set(ids)))
    if len(ordered) != len(ids) or ordered[0] < 0 or ordered[-1] >= vocab_size:
        raise InputError(
            f"{name}={str(path)!r}: expected distinct ids in 0..{vocab_size - 1} (the target's vocabulary), "
            f"found {len(ids) - len(ordered)} duplicates and the range {ordered[0]}..{ordered[-1]}."
        )
    return ordered
