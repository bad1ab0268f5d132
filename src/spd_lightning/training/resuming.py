"""Go on from a checkpoint of any strategy, on any number of ranks, with the same global batches in the same order.

What a run is made of after k optimizer steps does not name a rank: float32 weights, AdamW's moments, step numbers and a
place in the common order of micro-batches. A checkpoint of one file holds just that; one of ZeRO holds it in pieces,
which are merged where stage or number of ranks differ, so that all strategies can take up each other's runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spd_lightning.errors import InputError
from spd_lightning.head.checkpoint import CHECKPOINT_PREFIX
from spd_lightning.head.pickled import read_pickled
from spd_lightning.head.zero import MOMENTS, open_parts, zero_fields

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a checkpoint is, read before anything large is.

    Attributes:
        path: where it lies.
        stage, ranks: of ZeRO, and how many wrote it; 0 and 1 for one file.
        shapes: of the head's weights, by name; what is frozen may be missing in those of ZeRO.
        fields: everything but weights and optimizer.
    """

    path: Path
    stage: int
    ranks: int
    shapes: dict[str, Shape]
    fields: dict[str, Any]

    @property
    def data(self) -> dict[str, Any]:
        """What the data module put down, see `SpdDataModule.state_dict`."""
        return dict(self.fields.get("SpdDataModule", {}))

    @property
    def step(self) -> int:
        return int(self.fields["global_step"])

    @property
    def validates(self) -> bool:
        """Whether the validation after this step is to be repeated."""
        return bool(self.fields.get("callbacks", {}).get("SaveProgress", {}).get("validates", False))


def read_header(path: Path) -> Header:
    """InputError for what is no checkpoint, or a damaged one."""
    if path.is_dir():
        parts = open_parts(path)
        shapes = {name: shape for group in parts.shapes for name, shape in group.items()}
        return Header(path, parts.stage, parts.ranks, shapes, parts.content)
    fields = read_pickled(path, "a checkpoint", mmap=True)
    if not isinstance(fields, dict) or "state_dict" not in fields or "global_step" not in fields:
        raise InputError(f"ckpt_path={str(path)!r} is not a checkpoint of a training run.")
    shapes = {name: tuple(tensor.shape) for name, tensor in fields["state_dict"].items()}
    kept = {name: value for name, value in fields.items() if name not in ("state_dict", "optimizer_states")}
    return Header(path, 0, 1, shapes, kept)


def read_merged(path: Path) -> dict[str, Any]:
    """A checkpoint as one file would hold it, whatever wrote it."""
    if path.is_dir():
        return zero_fields(path, optimizer=True)
    return dict(read_pickled(path, "a checkpoint", mmap=True))


def check_weights(found: dict[str, Shape], module: nn.Module, source: str) -> None:
    """Refuse weights that lack a trained one of the head, or hold others.

    Args:
        found: names and shapes; the head's frozen ones may be missing.
        module: what is to be trained on.
        source: what the weights are of, for the error.

    Raises:
        InputError: naming the first ones.
    """
    ours = {name: shape_of(p) for name, p in module.named_parameters() if p.requires_grad}
    frozen = {n for n, p in module.named_parameters() if n.startswith(CHECKPOINT_PREFIX) and not p.requires_grad}
    theirs = {name: shape for name, shape in found.items() if name not in frozen}
    if ours == theirs:
        return
    both = sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name])
    raise InputError(
        f"{source} does not hold this head: missing {sorted(ours.keys() - theirs.keys())[:3]}, foreign "
        f"{sorted(theirs.keys() - ours.keys())[:3]}, of another shape {both[:3]}. Resume with the configuration of the "
        "run that wrote it."
    )


def shape_of(parameter: Tensor) -> Shape:
    """Of the whole weight, also where ZeRO stage 3 holds a piece."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def trained_groups(parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[list[str], list[str]]:
    """Names of the trained weights in the optimizer's two groups: matrices, and the rest."""
    trained = [(name, shape_of(p)) for name, p in parameters if p.requires_grad]
    return [n for n, shape in trained if len(shape) >= 2], [n for n, shape in trained if len(shape) < 2]


def load_into_engine(fields: dict[str, Any], module: nn.Module, engine: Any) -> None:
    """Merged weights and AdamW's state into a DeepSpeed engine of any stage; each rank takes its part."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    weights = fields["state_dict"]
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if parameter.numel():  # of stage 3, all ranks hold it now and rank 0's stays
                parameter.copy_(weights[name])
        if engine.optimizer is not None and not hasattr(parameter, "ds_id"):
            safe_set_full_fp32_param(parameter, weights[name])
    inner = getattr(engine.optimizer, "optimizer", None)
    if inner is None or not fields.get("optimizer_states"):  # validation
        return
    saved = fields["optimizer_states"][0]
    names = [name for group in trained_groups(parameters.items()) for name in group]
    by_stage = {True: "fp32_partitioned_groups_flat", False: "single_partition_of_fp32_groups"}
    stage_3 = hasattr(next(iter(parameters.values())), "ds_id")
    for flat in getattr(engine.optimizer, by_stage[stage_3]):  # DeepSpeed would make them in the first step
        empty = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        inner.state[flat] = {"step": saved["state"][0]["step"].clone(), **empty}
    place = _place_in_pieces if stage_3 else _place_in_groups
    for number, name in enumerate(names):
        if stage_3:
            place(engine.optimizer, parameters[name], weights[name], None)
        for moment in MOMENTS:
            place(engine.optimizer, parameters[name], saved["state"][number][moment], moment)
    for groups in (inner.param_groups, engine.optimizer.param_groups):
        for group, theirs in zip(groups, saved["param_groups"], strict=True):
            group.update({name: value for name, value in theirs.items() if name != "params"})


def _place_in_groups(optimizer: Any, parameter: nn.Parameter, whole: Tensor, moment: str | None) -> None:
    """Stages 1 and 2: this rank's part of a moment, in the flat piece of the weight's group that the rank holds."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:  # all of the weight is another rank's
        return
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
    part = whole.flatten().narrow(0, here.start, here.numel)
    optimizer.optimizer.state[flat][moment].narrow(0, there.start, there.numel).copy_(part)


def _place_in_pieces(optimizer: Any, parameter: nn.Parameter, whole: Tensor, moment: str | None) -> None:
    """Stage 3: this rank's piece of a float32 weight, or of a moment of it; the last rank's ends with padding."""
    import torch.distributed as dist
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    piece = math.ceil(whole.numel() / dist.get_world_size())
    padded = torch.nn.functional.pad(whole.flatten(), (0, piece * dist.get_world_size() - whole.numel()))
    mine = padded[dist.get_rank() * piece :][:piece]
    if moment is None:
        safe_set_local_fp32_param(parameter, mine)
    else:
        safe_set_local_optimizer_state(parameter, mine, moment)


def rescale_progress(loops: dict[str, Any], accumulate: int, before: int) -> None:
    """Count micro-batches as they are now: a run that went through k steps of `before` has seen k x `accumulate`."""
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        for name, value in counts.items():
            counts[name] = value // before * accumulate
