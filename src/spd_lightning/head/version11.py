"""The published implementation's checkpoint format, version 11 (`torch.save` of state_dict and config), both ways.

Its file carries neither the final norm nor the RoPE nor the layers' activation and eps of its target, so reading one
takes the target. docs/interchange.md tells what only the authors' own code could prove.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spd_lightning.errors import InputError, first_line
from spd_lightning.head.config import HeadConfig, LayerStyle
from spd_lightning.head.folder import head_from
from spd_lightning.head.loading import fields_from_target
from spd_lightning.head.module import SpeculationHead
from spd_lightning.head.pickled import read_pickled
from spd_lightning.staircase import resolve_stage_layers
from spd_lightning.target.families import FAMILIES

if TYPE_CHECKING:
    from spd_lightning.target.target import Target

VERSION = 11
_NAMES = {"aggr_projs.": "aggregation.", "spec_layers.": "layers."}
#: Entries of a published config that `HeadConfig` holds in its own way; all others are kept as they are.
_OURS = (
    "version", "hidden_size", "vocab_size", "draft_vocab_size", "num_stages", "num_spec_layers", "num_aggr_types",
    "aggr_feature_bound", "draft_token_ids", "stage_layers",
)  # fmt: skip


def read_version_11(path: Path, target: Target | None) -> SpeculationHead:
    """A published head, with the final norm and the RoPE of `target`, which the file does not carry.

    In the dtype of the file (bfloat16), or float32 where its norms are stored minus one: their sum has more digits.

    Raises:
        InputError: without a target, for a damaged file, another version, or a head of another target.
    """
    if target is None:
        raise InputError(
            f"{path} is a version-11 file, which carries neither final norm nor RoPE: load it with the target it was "
            "trained for, load_head(path, target)."
        )
    weights, published = _content(path)
    for what, value in (("hidden_size", target.hidden_size), ("vocab_size", target.vocab_size)):
        if published.get(what) != value:
            raise InputError(
                f"The head does not fit the target: {what} is {str(published.get(what))[:40]} in {path}, {value} there."
            )
    try:
        config = _config(published, weights, target)
    except KeyError as error:
        raise InputError(f"{path} is no complete version-11 head: {error} is missing.") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path} does not fit its own config: {first_line(error)}") from error
    renamed = {_rename(name): tensor for name, tensor in weights.items()}
    if config.kind == "target" and target.norms_store_minus_one:
        renamed |= {name: tensor.float() + 1 for name, tensor in renamed.items() if name.endswith("norm.weight")}
    norm = target.norm_weight()
    dtypes = {tensor.dtype for tensor in renamed.values()}
    alone = dtypes.pop() if len(dtypes) == 1 else torch.float32
    exact = torch.equal(norm.to(alone).to(norm.dtype), norm)  # a target in float32 may have more digits than the file
    renamed["norm.weight"] = norm.to(alone) if exact and alone.is_floating_point else norm
    head = head_from(config, renamed, path)
    head.origin = target.identity
    return head


def published_fields(path: Path) -> dict[str, Any]:
    """What a published config says beyond the fields of `HeadConfig`, as far as JSON can hold it.

    Raises:
        InputError: as `read_version_11`.
    """
    _, published = _content(path)
    kept = {name: value for name, value in published.items() if name not in _OURS}
    return {str(name): value for name, value in kept.items() if _is_json(value)}


def write_version_11(
    head: SpeculationHead,
    path: Path,
    base_model_path: str,
    published: Mapping[str, Any] | None = None,
    train_span: int | None = None,
) -> float:
    """Write a head for the authors' loader: bfloat16, their names, under a temporary name first.

    Args:
        head: in any dtype.
        path: the .pt file.
        base_model_path: id or path of the target.
        published: entries of the file that the head was imported from; they win over our own.
        train_span: tokens of the longest sequence the head was trained on; default: the context it has RoPE for.

    Returns:
        The largest change of a weight by rounding to bfloat16, relative to the tensor's largest weight.

    Raises:
        InputError: an option of the head that the format cannot express, by name; the file cannot be written.
    """
    weights, rounding = version_11_weights(head)
    config = version_11_config(head, base_model_path, published, train_span)
    temporary = path.with_name(f".{path.name}.part")
    try:
        torch.save({"state_dict": weights, "config": config}, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} cannot be written: {first_line(error)}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return rounding


def version_11_weights(head: SpeculationHead) -> tuple[dict[str, Tensor], float]:
    """Tensors in bfloat16 under the published names, without the target's norm; and the largest relative rounding."""
    _check_expressible(head)
    made, rounding = {}, 0.0
    for name, tensor in head.state_dict().items():
        if name == "norm.weight":
            continue
        exact = tensor.detach().cpu()
        if head.config.style.gate and name.endswith("norm.weight"):
            exact = exact.float() - 1
        rounded = exact.to(torch.bfloat16, copy=True)
        made[_published_name(name)] = rounded
        largest = float(exact.abs().max().float())
        rounding = max(rounding, float((rounded.double() - exact.double()).abs().max()) / max(largest, 1e-30))
    return made, rounding


def version_11_config(
    head: SpeculationHead,
    base_model_path: str,
    published: Mapping[str, Any] | None = None,
    train_span: int | None = None,
) -> dict[str, Any]:
    """The config entry of the file; see `write_version_11`."""
    config = head.config
    made: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "num_stages": len(config.stage_layers),
        "num_spec_layers": config.num_layers,
        "num_aggr_types": len(config.anchors),
        "version": VERSION,
        "trained_with_use_deepest": True,
        "aggr_feature_bound": list(config.anchors),
        "base_model_path": base_model_path,
        "spec_intermediate_size_fallback": config.intermediate_size,
        "stage_layers": list(config.stage_layers),
        "train_span": train_span or config.max_position_embeddings,
    }
    if config.draft_token_ids is not None:
        made["draft_token_ids"] = list(config.draft_token_ids)
    return made | {name: value for name, value in (published or {}).items() if name not in _OURS}


def _content(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """state_dict and config of a version-11 file, their outer form checked."""
    data = read_pickled(path, "a version-11 head")
    parts = (data.get("state_dict"), data.get("config")) if isinstance(data, dict) else (None, None)
    weights, published = parts
    if not isinstance(weights, dict) or not isinstance(published, dict):
        raise InputError(f"{path} is no version-11 head: expected a dictionary with state_dict and config.")
    version = published.get("version")
    if version == 10:
        raise InputError(
            f"{path} has checkpoint version 10: its head has one group of anchors per depth and queries of block 0 "
            "alone, which is another network than the staircase of version 11. Only version 11 can be read."
        )
    if type(version) is not int or version != VERSION:
        raise InputError(f"{path} has checkpoint version {str(version)[:40]!r}: only version 11 can be read.")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{path}: state_dict[{str(name)[:60]!r}] is no tensor.")
    return weights, published


def _config(published: Mapping[str, Any], weights: Mapping[str, Tensor], target: Target) -> HeadConfig:
    head_dim = weights["spec_layers.0.self_attn.q_norm.weight"].shape[0]
    queries, attended = (weights[f"spec_layers.0.self_attn.{name}.weight"] for name in ("q_proj", "o_proj"))
    kind = "target" if queries.shape[0] == 2 * attended.shape[1] else "qwen3"  # Qwen3.5's own layers have a gate
    anchors, ids = published["aggr_feature_bound"], published.get("draft_token_ids")
    num_stages = published["num_stages"]
    if type(num_stages) is not int or num_stages < 1:
        raise InputError(f"num_stages={str(num_stages)[:40]}: expected an integer of at least 1.")
    config = HeadConfig(
        stage_layers=resolve_stage_layers(target.num_layers, num_stages, published.get("stage_layers")),
        anchors=tuple(anchors),
        num_layers=published["num_spec_layers"],
        hidden_size=published["hidden_size"],
        intermediate_size=weights["spec_layers.0.mlp.gate_proj.weight"].shape[0],
        num_attention_heads=attended.shape[1] // head_dim,
        num_key_value_heads=weights["spec_layers.0.self_attn.k_proj.weight"].shape[0] // head_dim,
        head_dim=head_dim,
        vocab_size=published["vocab_size"],
        draft_token_ids=None if ids is None else tuple(sorted(_integers("draft_token_ids", ids))),
        **fields_from_target(target, kind),
    )
    for name, expected in (("draft_vocab_size", config.draft_vocab_size), ("num_aggr_types", len(config.anchors))):
        if published.get(name, expected) != expected:
            raise InputError(f"{name}={str(published[name])[:40]}: its other fields say {expected}.")
    return config


def _integers(name: str, values: Any) -> list[int]:
    if not isinstance(values, (list, tuple)) or any(type(value) is not int for value in values):
        raise InputError(f"{name}={str(values)[:80]}: expected a list of integers.")
    return list(values)


def _check_expressible(head: SpeculationHead) -> None:
    """Refuse by name what the format has no word for."""
    config, style = head.config, head.config.style
    if config.anchor_norm:
        raise InputError(
            "--format v11 or manifest cannot express anchor_norm=True: version 11 knows no norm of anchors. Train with "
            "head.anchor_norm false, or export with --format folder."
        )
    plain = LayerStyle()
    for name in ("norms", "qk_norm", "qkv_bias", "output_bias", "mlp_bias", "query_scale"):
        if getattr(style, name) != getattr(plain, name):
            raise InputError(
                f"--format v11 or manifest cannot express style.{name}={getattr(style, name)!r}: version 11 knows "
                "Qwen3's layers and Qwen3.5's gated ones. Train with head.kind qwen3, or export with --format folder."
            )
    family = FAMILIES.get(head.origin.model_type or "")
    if style.gate and (family is None or family.head != "target"):
        raise InputError(
            f"--format v11 or manifest cannot express style.gate=True for a target of family "
            f"{head.origin.model_type!r}: version 11 has gated layers for Qwen3.5 alone. "
            "Train with head.kind qwen3, or export with --format folder."
        )
    if config.logit_softcap is not None:
        raise InputError(
            f"--format v11 or manifest cannot express logit_softcap={config.logit_softcap}: its reader would "
            "leave the cap out. Export with --format folder."
        )


def _rename(name: str) -> str:
    for theirs, ours in _NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _published_name(name: str) -> str:
    for theirs, ours in _NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
