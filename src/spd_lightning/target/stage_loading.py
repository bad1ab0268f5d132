"""Load what one rank of a pipeline needs of a target: the layers of its stage, and the ends where it has them.

The other weights are never read: they are given a place on disk, where safetensors files leave them until somebody
asks, and afterwards they lie on the meta device.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from spd_lightning.errors import InputError
from spd_lightning.target.loading import Loading, load_target, resolve_dtype, shapes_of_target
from spd_lightning.target.target import Target


def load_stage(
    path_or_id: str | Path,
    stage_layers: Sequence[int],
    stage: int | None,
    embeds: bool,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    loading: Loading | None = None,
) -> Target:
    """The target with the weights of one stage; the last stage has final norm and lm_head.

    Args:
        stage_layers: layers per stage.
        stage: which; None for a rank that only drafts.
        embeds: whether tokens are looked up here.
        path_or_id, dtype, device, loading: as in `load_target`.

    Raises:
        InputError: as `load_target`; and for weights that are placed or quantised, which cannot be taken apart.
    """
    loading = loading or Loading()
    if loading.device_map is not None or loading.quantization != "none":
        raise InputError(
            "device_map and quantization place whole targets, and in a pipeline every rank holds its own stage: leave "
            "them out, or decode in one process."
        )
    bounds = (0, *accumulate(stage_layers))
    own = range(0) if stage is None else range(bounds[stage], bounds[stage + 1])
    verifies = stage == len(stage_layers) - 1
    here = str(torch.device(device or "cpu"))
    if find_spec("accelerate") is None:  # the core of the package does without it: read all, keep what is needed
        kind = resolve_dtype(dtype or loading.dtype, torch.device(here))
        target = load_target(path_or_id, stage_layers=stage_layers, dtype=kind, loading=loading)
        names = dict(target.model.named_modules())
        for name, place in _places(target, own, embeds, verifies, here).items():
            names[name].to("meta" if place == "disk" else here)
        target.home = torch.device(here)
        return target
    places = _places(shapes_of_target(path_or_id, loading), own, embeds, verifies, here)
    with tempfile.TemporaryDirectory() as nothing, _without_remarks():
        target = load_target(
            path_or_id,
            stage_layers=stage_layers,
            dtype=dtype,
            device=device,
            loading=replace(loading, device_map=places, offload_folder=nothing),
        )
        _forget_placement(target)
    target.loading, target.home = loading, torch.device(device or "cpu")
    return target


@contextmanager
def _without_remarks() -> Iterator[None]:
    """accelerate tells that weights are not here, which is the purpose."""
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _places(shapes: Target, own: range, embeds: bool, verifies: bool, here: str) -> dict[str, int | str]:
    """Where every module goes: here, or nowhere (`disk`)."""
    names = {module: name for name, module in shapes.model.named_modules()}
    decoder: Any = shapes.model.get_decoder()
    tied = shapes.lm_head.weight is decoder.embed_tokens.weight
    wanted = {
        decoder.embed_tokens: embeds or (tied and verifies),
        decoder.norm: verifies,
        shapes.lm_head: verifies or (tied and embeds),
        **{shapes.layer(index): index in own for index in range(shapes.num_layers)},
    }
    layers = {shapes.layer(index) for index in range(shapes.num_layers)}
    others = [child for child in decoder.children() if child not in wanted and not layers & set(child.modules())]
    places: dict[str, int | str] = {names[module]: here for module in others}
    return places | {names[module]: here if needed else "disk" for module, needed in wanted.items()}


def _forget_placement(target: Target) -> None:
    """What is here stays, what is not is on the meta device, and no hook fetches it."""
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(target.model, recurse=True)
    if hasattr(target.model, "hf_device_map"):
        del target.model.hf_device_map
