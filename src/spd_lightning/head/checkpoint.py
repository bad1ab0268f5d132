"""Heads in training checkpoints: one file of Lightning, or the folder that DeepSpeed ZeRO writes, sharded or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spd_lightning.errors import InputError
from spd_lightning.head.config import HeadConfig
from spd_lightning.head.folder import head_from
from spd_lightning.head.module import SpeculationHead
from spd_lightning.head.pickled import read_pickled
from spd_lightning.target.identity import TargetIdentity

#: Prefix of the head's parameters in a training checkpoint.
CHECKPOINT_PREFIX = "head."


def is_checkpoint(path: Path) -> bool:
    """Whether a path looks like a training checkpoint."""
    return path.suffix == ".ckpt" and path.exists()


def read_checkpoint(path: Path) -> SpeculationHead:
    """The head of a checkpoint, in the dtype it is stored in.

    Raises:
        InputError: for a damaged file, or one of another kind.
    """
    content = checkpoint_fields(path)
    weights = {
        name.removeprefix(CHECKPOINT_PREFIX): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith(CHECKPOINT_PREFIX)
    }
    head = head_from(checkpoint_head_config(path, content), weights, path)
    head.origin = TargetIdentity.from_fields(content.get("target") or {})
    return head


def checkpoint_head_config(path: Path, content: Mapping[str, Any] | None = None) -> HeadConfig:
    """The configuration of the head in a checkpoint; InputError where there is none."""
    content = checkpoint_fields(path) if content is None else content
    try:
        return HeadConfig(**content["head_config"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: its head_config describes no head: {error}") from error


def checkpoint_fields(path: Path) -> dict[str, Any]:
    """What a checkpoint holds: head_config, state_dict, hyper_parameters, ...; tensors stay on disk until used."""
    if path.is_dir():
        from spd_lightning.head.zero import zero_fields

        data = zero_fields(path)
    else:
        data = read_pickled(path, "a checkpoint", mmap=True)
    if not isinstance(data, dict) or "head_config" not in data or "state_dict" not in data:
        raise InputError(f"{path} is not a checkpoint of a head training run (no head_config in it).")
    return data
