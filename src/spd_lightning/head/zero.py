"""Heads in the folders that DeepSpeed ZeRO writes, of any stage and number of ranks, read without DeepSpeed.

Each rank leaves its part of the float32 weights in an `optim_states` file: in stages 1 and 2 a piece of every flat
parameter group, in stage 3 a piece of every parameter. Names and shapes lie in the `model_states` files, beside what
the training module added. The pickles name three classes of DeepSpeed, for which inert ones stand in; anything else in
them is refused and not executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_lightning.errors import InputError, first_line
from spd_lightning.head.pickled import read_pickled


class _Stage(int):
    """In place of DeepSpeed's enumeration of stages."""


class _Inert:
    """In place of DeepSpeed's records: holds whatever was stored and does nothing."""


_STAND_INS = [
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def zero_fields(folder: Path) -> dict[str, Any]:
    """As of a checkpoint file: head_config, state_dict with float32 weights, target, hyper_parameters, ...

    Raises:
        InputError: a file is missing, damaged, of another kind, or parts do not add up; naming it.
    """
    parts = folder / _tag(folder)
    optimizers = _by_rank(parts, r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
    states = [_read(path)["optimizer_state_dict"] for path in optimizers]
    try:
        stage, count = int(states[0]["zero_stage"]), states[0]["partition_count"]
        ranks = max(count) if isinstance(count, list) else int(count)
        if ranks != len(states):
            raise InputError(f"{parts} holds the parts of {len(states)} ranks, {ranks} wrote it: some are missing.")
        if stage == 3:
            models = _by_rank(parts, r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")
        else:
            models = [parts / "mp_rank_00_model_states.pt"]
        content = _read(models[0])
        shapes = [{name: tuple(shape) for name, shape in group.items()} for group in content["param_shapes"]]
        if stage == 3:
            flat = [torch.cat([piece.flatten() for piece in state["fp32_flat_groups"]]) for state in states]
            weights = _pieces_of_parameters(flat, dict(chain.from_iterable(group.items() for group in shapes)))
        elif stage in (1, 2):
            weights = _pieces_of_groups([state["single_partition_of_fp32_groups"] for state in states], shapes, states)
        else:
            raise InputError(f"{parts} was written by ZeRO stage {stage}: expected 1, 2 or 3.")
        frozen = {f"head.{name}": tensor for name, tensor in content.get("head_frozen", {}).items()}
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"{parts} is no complete ZeRO checkpoint: {type(error).__name__}: {first_line(error)}"
        ) from error
    kept = {name: value for name, value in content.items() if name not in ("module", "optimizer", "param_shapes")}
    return kept | {"state_dict": weights | frozen}


def _pieces_of_groups(
    parts: Sequence[Sequence[Tensor]], shapes: Sequence[dict[str, tuple[int, ...]]], states: Sequence[Any]
) -> dict[str, Tensor]:
    """Stages 1 and 2: [rank][group] pieces of flat groups; a group ends with padding, a parameter may."""
    paddings = states[0].get("param_alignment_paddings")
    weights = {}
    for index, group in enumerate(shapes):
        flat, offset = torch.cat([part[index] for part in parts]), 0
        after = paddings[index] if paddings is not None else [0] * len(group)
        for (name, shape), padding in zip(group.items(), after, strict=True):
            size = math.prod(shape)
            weights[name] = flat[offset : offset + size].view(shape).float().clone()
            offset += size + padding
        if not 0 <= flat.numel() - offset < 2 * len(parts) * max(1, len(group)) + 2 * len(parts):
            raise InputError(f"group {index} has {flat.numel()} numbers, its parameters need {offset}.")
    return weights


def _pieces_of_parameters(flat: Sequence[Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Stage 3: [rank] flat vectors; each parameter is cut into as many equal pieces as there are ranks."""
    weights, offset, ranks = {}, 0, len(flat)
    for name, shape in shapes.items():
        size = math.prod(shape)
        piece = math.ceil(size / ranks)
        joined = torch.cat([vector[offset : offset + piece] for vector in flat])
        weights[name] = joined[:size].view(shape).float().clone()
        offset += piece
    if any(vector.numel() != offset for vector in flat):
        raise InputError(f"the ranks hold {[v.numel() for v in flat]} numbers each, the parameters need {offset}.")
    return weights


def _tag(folder: Path) -> str:
    """The sub-folder that `latest` names."""
    try:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no ZeRO checkpoint: its file `latest` cannot be read.") from error
    if not re.fullmatch(r"[\w.-]+", tag) or tag in (".", "..") or not (folder / tag).is_dir():
        raise InputError(f"{folder / 'latest'} names {tag[:60]!r}, which is no folder beside it.")
    return tag


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """Files of ranks 0, 1, 2, ..., none missing."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))}
    if not found or sorted(found) != list(range(len(found))):
        raise InputError(
            f"{folder} holds the parts of ranks {sorted(found)}: expected 0, 1, 2, ... without a "
            "gap. Copy the whole folder."
        )
    return [found[rank] for rank in range(len(found))]


def _read(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals(_STAND_INS):  # type: ignore[arg-type]
        content = read_pickled(path, "a part of a ZeRO checkpoint", mmap=True)
    if not isinstance(content, dict) or not ({"optimizer_state_dict", "param_shapes"} & set(content)):
        raise InputError(f"{path} is no part of a ZeRO checkpoint.")
    return content
