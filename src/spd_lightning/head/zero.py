"""Heads in the folders that DeepSpeed ZeRO writes, of any stage and number of ranks, read without DeepSpeed.

Each rank leaves its part of the float32 weights in an `optim_states` file: in stages 1 and 2 a piece of every flat
parameter group, in stage 3 a piece of every parameter. Names and shapes lie in the `model_states` files, beside what
the training module added. The pickles name three classes of DeepSpeed, for which inert ones stand in; anything else in
them is refused and not executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
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


#: What AdamW keeps of every weight.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ZeroParts:
    """The parts that the ranks of a run wrote, opened but not merged.

    Attributes:
        folder: where they lie.
        stage: of ZeRO.
        content: what the training module added: head_config, target, hyper_parameters, loops, callbacks, ...
        shapes: names and shapes of the trained weights, per group of the optimizer.
        states: of every rank, weights and optimizer.
    """

    folder: Path
    stage: int
    content: dict[str, Any]
    shapes: list[dict[str, tuple[int, ...]]]
    states: list[dict[str, Any]]

    @property
    def ranks(self) -> int:
        return len(self.states)

    def weights(self) -> dict[str, Tensor]:
        """The trained weights in float32, merged."""
        return self._merged(
            [
                state["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"]
                for state in self.states
            ]
        )

    def optimizer(self) -> dict[str, Any]:
        """AdamW's state as torch saves it, weights numbered group after group in the order of `shapes`."""
        inner = [state["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"] for state in self.states]
        inner = [state.get("optimizer_state_dict", state) for state in inner]
        merged = {
            name: self._merged([[state["state"][i][name] for i in sorted(state["state"])] for state in inner])
            for name in MOMENTS
        }
        step = next(iter(inner[0]["state"].values()))["step"]
        numbers = count()
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            | {"params": [next(numbers) for _ in shapes]}
            for group, shapes in zip(inner[0]["param_groups"], self.shapes, strict=True)
        ]
        state = {
            number: {"step": torch.as_tensor(float(step)), **{moment: merged[moment][name] for moment in MOMENTS}}
            for number, name in enumerate(chain.from_iterable(self.shapes))
        }
        return {"state": state, "param_groups": groups}

    def _merged(self, parts: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """[rank][group] pieces to whole weights by name."""
        if self.stage == 3:
            flat = [torch.cat([piece.flatten() for piece in part]) for part in parts]
            return _pieces_of_parameters(flat, dict(chain.from_iterable(group.items() for group in self.shapes)))
        return _pieces_of_groups(parts, self.shapes, self.states)


def zero_fields(folder: Path, optimizer: bool = False) -> dict[str, Any]:
    """As of a checkpoint file: head_config, state_dict with float32 weights, target, hyper_parameters, ...

    Args:
        folder: the checkpoint.
        optimizer: also optimizer_states, of torch's AdamW.

    Raises:
        InputError: a file is missing, damaged, of another kind, or parts do not add up; naming it.
    """
    with _complete(folder):
        parts = open_parts(folder)
        frozen = {f"head.{name}": tensor for name, tensor in parts.content.get("head_frozen", {}).items()}
        fields = parts.content | {"state_dict": parts.weights() | frozen}
        return fields | {"optimizer_states": [parts.optimizer()]} if optimizer else fields


def open_parts(folder: Path) -> ZeroParts:
    """The parts of a ZeRO checkpoint; raises as `zero_fields` does."""
    with _complete(folder):
        parts = folder / _tag(folder)
        optimizers = _by_rank(parts, r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
        states = [_read(path)["optimizer_state_dict"] for path in optimizers]
        stage, pieces = int(states[0]["zero_stage"]), states[0]["partition_count"]
        ranks = max(pieces) if isinstance(pieces, list) else int(pieces)
        if ranks != len(states):
            raise InputError(f"{parts} holds the parts of {len(states)} ranks, {ranks} wrote it: some are missing.")
        if stage == 3:
            models = _by_rank(parts, r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")
        elif stage in (1, 2):
            models = [parts / "mp_rank_00_model_states.pt"]
        else:
            raise InputError(f"{parts} was written by ZeRO stage {stage}: expected 1, 2 or 3.")
        content = _read(models[0])
        shapes = [{name: tuple(shape) for name, shape in group.items()} for group in content["param_shapes"]]
        kept = {name: value for name, value in content.items() if name not in ("module", "optimizer", "param_shapes")}
        return ZeroParts(parts, stage, kept, shapes, states)


@contextmanager
def _complete(folder: Path) -> Iterator[None]:
    """Tell in one line what is missing or wrong in the parts."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError, StopIteration) as error:
        raise InputError(
            f"{folder} is no complete ZeRO checkpoint: {type(error).__name__}: {first_line(error)}"
        ) from error


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
