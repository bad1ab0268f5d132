"""Make a new head for a target, save one, and load one from any source that holds one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from spd_lightning.errors import InputError, first_line
from spd_lightning.head.checkpoint import is_checkpoint, read_checkpoint
from spd_lightning.head.config import HeadConfig, LayerStyle
from spd_lightning.head.folder import CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE, read_head
from spd_lightning.head.layout import StaircaseLayout
from spd_lightning.head.module import SpeculationHead
from spd_lightning.staircase import default_anchors
from spd_lightning.target.families import (
    FAMILIES,
    activation,
    dense_intermediate_size,
    full_attention_rope,
    logit_softcap,
)

if TYPE_CHECKING:
    from spd_lightning.target.target import Target


def head_config(
    target: Target,
    num_layers: int = 2,
    anchors: Sequence[int] | None = None,
    draft_token_ids: Sequence[int] | None = None,
    kind: str = "auto",
    intermediate_size: int | None = None,
    anchor_norm: bool = False,
) -> HeadConfig:
    """The configuration of a head that fits `target` (which must be cut into stages); arguments as in `new_head`."""
    if target.stage_layers is None:
        target.partition(num_stages=min(8, target.num_layers))
    assert target.stage_layers is not None
    text = target.config
    return HeadConfig(
        stage_layers=target.stage_layers,
        anchors=tuple(anchors) if anchors is not None else default_anchors(target.stage_layers),
        num_layers=num_layers,
        hidden_size=text.hidden_size,
        intermediate_size=dense_intermediate_size(text) if intermediate_size is None else intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=target.vocab_size,
        draft_token_ids=None if draft_token_ids is None else tuple(sorted(set(draft_token_ids))),
        anchor_norm=anchor_norm,
        **fields_from_target(target, resolve_head_kind(kind, text)),
    )


def fields_from_target(target: Target, kind: str) -> dict[str, Any]:
    """Fields of a `HeadConfig` that no head chooses: everything but its sizes comes from the target and the kind."""
    text = target.config
    return {
        "rms_norm_eps": text.rms_norm_eps,
        "hidden_act": activation(text),
        "rope_parameters": full_attention_rope(text),
        "max_position_embeddings": text.max_position_embeddings,
        "kind": kind,
        "style": target_style(target) if kind == "target" else LayerStyle(),
        "logit_softcap": logit_softcap(text),
    }


def resolve_head_kind(kind: str, config: Any) -> str:
    """`auto` is the kind that published heads of the target's family have.

    Raises:
        InputError: for an unknown kind.
    """
    if kind not in ("auto", "qwen3", "target"):
        raise InputError(f"head.kind={kind!r}: expected auto, qwen3 (the published kind) or target (the target's own).")
    return FAMILIES[config.model_type].head if kind == "auto" else kind


def target_style(target: Target) -> LayerStyle:
    """The style of the target's own attention layers, read off the first of them.

    Raises:
        InputError: where the head's layers cannot be built like it.
    """
    from torch import nn

    index = min(i for i, kind in enumerate(target.layer_kinds) if kind != "linear_attention")
    layer: Any = target.layer(index)
    attention, mlp = layer.self_attn, layer.mlp
    head_dim, config = attention.head_dim, target.config
    lacking = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if not hasattr(attention, name)]
    if lacking or not hasattr(layer, "post_attention_layernorm"):
        raise InputError(
            f"head.kind=target: the layers of family {config.model_type!r} are built otherwise than a head's "
            f"(no {', '.join(lacking) or 'post_attention_layernorm'}). Set head.kind to qwen3."
        )
    qk_norm: Literal["head", "row", "none"] = "none"
    if isinstance(getattr(attention, "q_norm", None), nn.Module):
        qk_norm = "head" if attention.q_norm.weight.shape[-1] == head_dim else "row"
    norms: Literal["before", "after", "both"] = "before"
    if hasattr(layer, "post_feedforward_layernorm"):
        norms = "both" if hasattr(layer, "input_layernorm") else "after"
    return LayerStyle(
        norms=norms,
        qk_norm=qk_norm,
        gate=attention.q_proj.out_features == 2 * config.num_attention_heads * head_dim,
        qkv_bias=attention.q_proj.bias is not None,
        output_bias=attention.o_proj.bias is not None,
        mlp_bias=getattr(getattr(mlp, "gate_proj", None), "bias", None) is not None,
        query_scale=None if math.isclose(attention.scaling, head_dim**-0.5) else float(attention.scaling),
    )


def new_head(
    target: Target,
    num_layers: int = 2,
    anchors: Sequence[int] | None = None,
    draft_token_ids: Sequence[int] | None = None,
    seed: int = 0,
    kind: str = "auto",
    intermediate_size: int | None = None,
    anchor_norm: bool = False,
) -> SpeculationHead:
    """An untrained head, initialised from the target.

    The lm_head starts as the target's rows of the draft vocabulary and the norm is the target's. W_k starts as the
    identity on its deepest anchor, so that a row is a hidden state the target itself could have passed on (normed
    embeddings are brought back to their own size). The layers start from normal weights of variance 1 / fan_in,
    whatever the width, and what writes into the residual stream is divided by the number of writers: weights of the
    usual 0.02 hardly speak at a hidden size of 256 and learn late.

    Args:
        target: cut into stages already, or it is now, into 8 (or as many as it has layers).
        num_layers: decoder layers of the head.
        anchors: hidden-state indices it reads; default: stage boundaries, see `default_anchors`.
        draft_token_ids: the draft vocabulary; None = all ids.
        seed: of the initial weights of its layers.
        kind: `qwen3`, the layers that most published heads have; `target`, layers like the target's own; `auto`, the
            kind that published heads of the target's family have (Qwen3.5: its own gated attention).
        intermediate_size: width of its MLPs; default: the target's dense width, see `dense_intermediate_size`.
        anchor_norm: RMSNorm of each anchor's hidden state before W_k.

    Raises:
        InputError: for anchors, a draft vocabulary or a kind that do not fit the target.
    """
    random = torch.Generator().manual_seed(seed)
    # on the CPU, so that a seed gives the same head everywhere: Lightning sets the accelerator as default device
    with torch.no_grad(), torch.device("cpu"):
        config = head_config(target, num_layers, anchors, draft_token_ids, kind, intermediate_size, anchor_norm)
        head = SpeculationHead(config)
        for name, weight in head.layers.named_parameters():
            if weight.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.normal_(0, weight.shape[1] ** -0.5 / (2 * num_layers if writes else 1), generator=random)
            elif name.endswith("bias"):
                weight.zero_()
        identity = torch.eye(head.config.hidden_size)
        for k, weight in enumerate(head.aggregation.parameters()):
            weight.zero_()
            # the lm_head reads block 0's rows: an embedding blown up to 1 would name its own token, loud and wrong
            size = target.embedding_size() if anchor_norm and k == 0 else 1.0
            weight[:, -head.config.hidden_size :] = identity * size
        head.lm_head.weight.copy_(target.lm_head_rows(head.draft_token_ids))
        head.norm.weight.copy_(target.norm_weight())
    head.origin = target.identity
    return head.to(target.device)


def shapes_of_head(target: Target, config: HeadConfig) -> SpeculationHead:
    """A head without weights, on the meta device; what no weight holds (RoPE, draft ids) is meta, too."""
    with torch.device("meta"):
        head = SpeculationHead(config)
    head.origin = target.identity
    return head


@torch.no_grad()
def draft_logits(target: Target, head: SpeculationHead, input_ids: Tensor, restarts: Sequence[int] = (0,)) -> Tensor:
    """The training view of a head, without gradient.

    Args:
        input_ids: [B, S].
        restarts: positions whose gap is n, the same for every sequence; (0,) is saturated everywhere.

    Returns:
        Draft logits [B, S, V_d]: entry t drafts token t + 1.

    Raises:
        InputError: if the head was made for another target or other stages.
    """
    from spd_lightning.target.target import check_head_fits

    check_head_fits(target, head.staircase, head.config.hidden_size, head.config.vocab_size)
    states, _ = target(input_ids, head.config.anchors)
    layout = StaircaseLayout.from_restarts(
        head.staircase, [restarts] * input_ids.shape[0], input_ids.shape[1], device=input_ids.device
    )
    return head.logits(head([state.to(head.dtype) for state in states], layout))


def load_head(
    source: str | Path,
    target: Target | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> SpeculationHead:
    """Load a head from wherever one is.

    Args:
        source: a head folder (config.json + model.safetensors), a run directory, a training checkpoint (.ckpt), a
            published version-11 file (.pt), or a hub id with optional @revision.
        target: checked against the head; its stages are set from the head where it has none. Needed for .pt files,
            which carry neither the norm nor the RoPE of their target.
        dtype: default: the target's, else as stored.
        device: default: the target's, else the CPU.

    Raises:
        InputError: for a missing, truncated or foreign file, or a head that does not fit the target.
    """
    head = read_source(find_head(source), target)
    if target is not None:
        check_fits(head, target)
        if target.stage_layers is None:
            target.partition(stage_layers=head.staircase.stage_layers)
        dtype, device = dtype or target.dtype, device or target.device
    return head.to(device=device, dtype=dtype).eval()


def check_fits(head: SpeculationHead, target: Target) -> None:
    """Refuse a head of other stages or sizes, or one that was made for another target, showing both values."""
    from spd_lightning.target.target import check_head_fits

    check_head_fits(target, head.staircase, head.config.hidden_size, head.config.vocab_size)
    of_target = target.identity
    for what, ours, theirs in (
        ("family", head.origin.model_type, of_target.model_type),
        ("tokenizer digest", head.origin.tokenizer_digest, of_target.tokenizer_digest),
        ("RoPE", dict(head.config.rope_parameters), full_attention_rope(target.config)),
    ):
        if ours is not None and theirs is not None and ours != theirs:
            raise InputError(
                f"The head does not fit the target: {what} is {ours} in the head and {theirs} in the target. Load the "
                "target that the head was trained for."
            )
    norm = target.norm_weight()
    apart = float((head.norm.weight.detach().float().cpu() - norm).abs().max())
    if apart > 1e-2 * float(norm.abs().max()):  # either may have been rounded to bfloat16
        raise InputError(
            f"The head does not fit the target: their final norms differ by up to {apart:.3g} (the target's largest "
            f"weight is {float(norm.abs().max()):.3g}). Load the target that the head was trained for."
        )


@dataclass(frozen=True)
class HeadSource:
    """Where a head lies.

    Attributes:
        path: a folder with config.json and model.safetensors, a checkpoint or a version-11 file.
        kind: which of them.
        run: the run directory that it belongs to, if it lies in one.
    """

    path: Path
    kind: Literal["folder", "checkpoint", "version 11"]
    run: Path | None = None


def find_head(source: str | Path) -> HeadSource:
    """The one resolver of sources; a hub id is fetched.

    Raises:
        InputError: where there is no head.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".pt":
        return HeadSource(path, "version 11")
    if is_checkpoint(path):
        return HeadSource(path, "checkpoint", _run_around(path.parent, "checkpoints"))
    if path.is_dir():
        for folder in (path, path / "head"):
            if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
                return HeadSource(folder, "folder", _run_around(folder, "head"))
        checkpoints = sorted((path / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime)
        if checkpoints:
            return find_head(checkpoints[-1])
        raise InputError(
            f"head={str(source)!r} holds no head: expected {CONFIG_FILE} and {WEIGHTS_FILE} in it or in its head/ "
            "folder, or a checkpoint in its checkpoints/ folder."
        )
    if path.exists() or path.is_absolute() or str(source).startswith((".", "~")) or path.suffix in (".pt", ".ckpt"):
        raise InputError(
            f"head={str(source)!r} does not exist or is of no known kind: expected a folder, .ckpt or .pt file."
        )
    return HeadSource(_from_hub(str(source)), "folder")


def read_source(found: HeadSource, target: Target | None = None) -> SpeculationHead:
    """The head that lies there, as it is stored; a version-11 file needs its target."""
    if found.kind == "folder":
        return read_head(found.path)
    if found.kind == "checkpoint":
        return read_checkpoint(found.path)
    from spd_lightning.head.version11 import read_version_11

    return read_version_11(found.path, target)


def _run_around(folder: Path, name: str) -> Path | None:
    run = folder.resolve().parent
    return run if folder.resolve().name == name and (run / "run.json").is_file() else None


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download

    repo, _, revision = source.partition("@")
    try:
        folder = snapshot_download(
            repo, revision=revision or None, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE]
        )
    except Exception as error:  # the hub client's errors have no common base
        raise InputError(
            f"head={source!r} is no local path and cannot be fetched from the hub: {first_line(error)}"
        ) from error
    return Path(folder)
