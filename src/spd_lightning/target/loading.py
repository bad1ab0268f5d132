"""Load a Hugging Face causal language model as a frozen target, refusing early what cannot work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from spd_lightning.errors import InputError
from spd_lightning.staircase import resolve_stage_layers
from spd_lightning.target.families import unsupported_reason
from spd_lightning.target.target import Target


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """`auto`/None: bfloat16 on a GPU, float32 on a CPU; names as in torch otherwise."""
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise InputError(f"dtype={dtype!r} is not a floating-point type: expected auto, float32, bfloat16 or float16.")
    return resolved


def embedded_target_path() -> Path:
    """The tiny documentation target that ships with the package (`tiny`)."""
    return Path(__file__).resolve().parent.parent / "embedded" / "target"


def load_target(
    path_or_id: str | Path,
    num_stages: int | None = None,
    stage_layers: Sequence[int] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> Target:
    """Load and freeze a causal language model, cut into stages where `num_stages` or `stage_layers` is given.

    Args:
        path_or_id: a local folder, a hub id, or `tiny` for the embedded target.
        num_stages: n, an even split of the L layers.
        stage_layers: layers per stage by hand; their sum is L.
        dtype: `auto` (default): bfloat16 on a GPU, float32 on a CPU.
        device: default `cpu`; move the target like any module.
        revision: hub revision.

    Raises:
        InputError: for a missing or truncated folder, an unsupported family or an impossible split; all but truncated
            weights are found before any weight is read.
    """
    from transformers import AutoModelForCausalLM

    config = check_target(path_or_id, revision)
    split = None
    if num_stages is not None or stage_layers is not None:
        split = resolve_stage_layers(config.num_hidden_layers, num_stages, stage_layers)
    place = torch.device(device or "cpu")
    kind = resolve_dtype(dtype, place)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            _source(path_or_id), dtype=kind, revision=revision, output_loading_info=True
        )
    except Exception as error:  # safetensors, torch, OS and hub errors have no common base
        raise InputError(
            f"target={str(path_or_id)!r}: its weights cannot be read ({_first_line(error)}). Expected complete "
            "*.safetensors files that match config.json; download or copy the model again."
        ) from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers would leave them random
        raise InputError(
            f"target={str(path_or_id)!r}: its weights lack {missing[0]} ({len(missing)} tensors that config.json "
            "describes). Expected complete *.safetensors files that match config.json."
        )
    model.to(place)
    return Target(model, split, source=str(path_or_id), revision=revision)


def check_target(path_or_id: str | Path, revision: str | None = None) -> PretrainedConfig:
    """The target's configuration, refused where it cannot be a target; reads no weight.

    Raises:
        InputError: for a missing or damaged folder or an unsupported family.
    """
    from transformers import AutoConfig

    source = _source(path_or_id)
    _check_folder(source)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except Exception as error:  # a field of a wrong type raises an error class of huggingface_hub's own
        raise InputError(f"target={str(path_or_id)!r} has no readable config.json: {_first_line(error)}") from error
    if reason := unsupported_reason(config):
        raise InputError(f"target={str(path_or_id)!r} cannot be a target: {reason}.")
    return config


def load_tokenizer(path_or_id: str | Path, revision: str | None = None):  # type: ignore[no-untyped-def]
    """The target's tokenizer; InputError where it is missing or damaged."""
    from transformers import AutoTokenizer

    source = _source(path_or_id)
    _check_folder(source)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except Exception as error:  # the Rust tokenizer raises bare Exception for damaged files
        raise InputError(f"tokenizer of {str(path_or_id)!r} cannot be read: {_first_line(error)}") from error


def _source(path_or_id: str | Path) -> str | Path:
    return embedded_target_path() if str(path_or_id) == "tiny" else path_or_id


def _check_folder(source: str | Path) -> None:
    """A local path that exists must look like a model folder; anything else is left to the hub."""
    path = Path(source)
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            raise InputError(f"target={str(path)!r} is a folder without config.json: expected a Hugging Face model.")
        try:
            json.loads(config.read_text())
        except ValueError as error:
            raise InputError(f"{config} is not valid JSON ({error}): the file is truncated or damaged.") from error
        if not list(path.glob("*.safetensors")) and not list(path.glob("*.bin")):
            raise InputError(f"target={str(path)!r} has no weights: expected model.safetensors in the folder.")
    elif path.exists():
        raise InputError(f"target={str(path)!r} is a file: expected a model folder or a hub id.")
    elif path.is_absolute() or str(source).startswith((".", "~")):
        raise InputError(f"target={str(source)!r} does not exist: expected a model folder, a hub id or 'tiny'.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
