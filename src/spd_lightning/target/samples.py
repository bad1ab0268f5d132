"""Whether two places hold the same weights, told from a few bytes of every tensor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from spd_lightning.errors import InputError

_BYTES = 256


def sampled_digest(folder: Path) -> str:
    """SHA-256 of names, sizes and headers of a folder's safetensors files, and of some bytes of each of their tensors.

    Reads kilobytes where the files hold gigabytes. Two folders that differ in a tensor that was trained on differ here;
    one that differs in a single number may not.

    Raises:
        InputError: for a file that is not safetensors.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(min(size, 10**8))
            digest.update(f"{path.name} {path.stat().st_size}".encode() + header)
            try:
                tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
                places = sorted(tuple(tensor["data_offsets"]) for tensor in tensors.values())
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise InputError(f"{path} is no safetensors file: download or copy the model again.") from error
            for begin, end in places:
                for at in (begin, (begin + end) // 2):
                    file.seek(8 + size + at)
                    digest.update(file.read(min(_BYTES, end - at)))
    return digest.hexdigest()
