"""Read the published implementation's checkpoint format, version 11 (`torch.save` of state_dict and config)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spd_lightning.errors import InputError
from spd_lightning.head.config import HeadConfig
from spd_lightning.head.loading import fields_from_target
from spd_lightning.head.module import SpeculationHead
from spd_lightning.staircase import resolve_stage_layers

if TYPE_CHECKING:
    from spd_lightning.target.target import Target

_NAMES = {"aggr_projs.": "aggregation.", "spec_layers.": "layers."}


def read_version_11(path: Path, target: Target | None) -> SpeculationHead:
    """A published head, with the final norm and the RoPE of `target`, which the file does not carry.

    Raises:
        InputError: without a target, for a damaged file, another version, or a head of another target.
    """
    if target is None:
        raise InputError(
            f"{path} is a version-11 file, which carries neither final norm nor RoPE: load it with the target it was "
            "trained for, load_head(path, target)."
        )
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        weights, published = dict(data["state_dict"]), dict(data["config"])
    except Exception as error:  # zip, pickle, key and type errors: a damaged file raises any of them
        raise InputError(f"{path} cannot be read as a version-11 head: it is damaged or of another kind.") from error
    if published.get("version") != 11:
        raise InputError(f"{path} has checkpoint version {published.get('version')!r}: only version 11 can be read.")
    for what, value in (("hidden_size", target.hidden_size), ("vocab_size", target.vocab_size)):
        if published.get(what) != value:
            raise InputError(
                f"The head does not fit the target: {what} is {published.get(what)} in {path}, {value} there."
            )
    try:
        head = SpeculationHead(_config(published, weights, target))
    except KeyError as error:
        raise InputError(f"{path} is no complete version-11 head: {error} is missing.") from error
    renamed = {_rename(name): tensor.float() for name, tensor in weights.items()}
    if head.config.kind == "target" and target.norms_store_minus_one:
        renamed |= {name: tensor + 1 for name, tensor in renamed.items() if name.endswith("norm.weight")}
    renamed["norm.weight"] = target.norm_weight()
    try:
        head.load_state_dict(renamed)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit its own config: {str(error).splitlines()[1].strip()[:300]}") from error
    return head


def _config(published: dict[str, Any], weights: dict[str, torch.Tensor], target: Target) -> HeadConfig:
    head_dim = weights["spec_layers.0.self_attn.q_norm.weight"].shape[0]
    queries, attended = (weights[f"spec_layers.0.self_attn.{name}.weight"] for name in ("q_proj", "o_proj"))
    kind = "target" if queries.shape[0] == 2 * attended.shape[1] else "qwen3"  # Qwen3.5's own layers have a gate
    ids = published.get("draft_token_ids")
    return HeadConfig(
        stage_layers=resolve_stage_layers(target.num_layers, published["num_stages"], published.get("stage_layers")),
        anchors=tuple(published["aggr_feature_bound"]),
        num_layers=published["num_spec_layers"],
        hidden_size=published["hidden_size"],
        intermediate_size=weights["spec_layers.0.mlp.gate_proj.weight"].shape[0],
        num_attention_heads=attended.shape[1] // head_dim,
        num_key_value_heads=weights["spec_layers.0.self_attn.k_proj.weight"].shape[0] // head_dim,
        head_dim=head_dim,
        vocab_size=published["vocab_size"],
        draft_token_ids=None if ids is None else tuple(sorted(int(i) for i in ids)),
        **fields_from_target(target, kind),
    )


def _rename(name: str) -> str:
    for theirs, ours in _NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
