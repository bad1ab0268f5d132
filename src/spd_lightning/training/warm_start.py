"""A head that starts as the end of its target instead of at random.

Its layers become the target's last ones. What these are used to read is the hidden state that enters the first of them,
so each W_k is fitted to it: the ridge regression from k + 1 anchors, over some thousand tokens of the training texts,
that is least wrong relative to the state's size. Row (k, T) is then what k + 1 anchors can tell of that state, and for
a deepest row that is nearly all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from spd_lightning.data.batches import Batch, is_packed, position_ids
from spd_lightning.data.progress import progress_bar
from spd_lightning.errors import InputError
from spd_lightning.head.config import LayerStyle
from spd_lightning.head.loading import target_style
from spd_lightning.head.module import Aggregation, HeadLayer, SpeculationHead
from spd_lightning.target.families import has_rope_per_kind
from spd_lightning.target.target import Target

#: Tokens that W_k are fitted to, at least, and per feature: with fewer than some per feature a regression learns noise.
TOKENS, TOKENS_PER_FEATURE = 16_384, 8
#: Of the regression, relative to each feature's own square.
RIDGE = 1e-3


@torch.no_grad()
def warm_start(target: Target, head: SpeculationHead, batches: Iterable[Batch]) -> None:
    """Let the head start as the target's last layers, linear attention left out.

    Rows are brought to a root mean square of about 1 where the head norms its anchors, as those of a new head are, and
    what its layers write is divided by as much: the same head, at rates that suit new ones.

    A head's layer attends to everything and turns queries and keys by the angles of full attention. Where the target
    has other angles for windows (Gemma 3, OLMo 3) its full-attention layers are taken; what else it lacks (windows,
    soft-capped scores, layers without angles) is not made up for.

    Args:
        target: whole, on its device, with room for two matrices [F, F] of float64, F = anchors x H: 3.4 GB each for
            five anchors of 4,096.
        head: a new one, with layers like the target's.
        batches: of training texts; as many are read as are needed.

    Raises:
        InputError: where the head's layers are built otherwise than the target's, or in other sizes, where the target's
            are quantised or offloaded, or where there is no text.
    """
    check_style(target, head.config.style)
    first = _copy_last_layers(target, head)
    squares, products, size = _moments(target, head, first, batches)
    diagonal = squares.diagonal()
    diagonal += RIDGE * (diagonal + 1e-6 * diagonal.mean())  # a feature may be 0 throughout
    factor = torch.linalg.cholesky(squares)  # and its first rows and columns are that of the first features
    for k in head.staircase.reachable_blocks:
        F = (k + 1) * head.config.hidden_size
        cast(Aggregation, head.aggregation[k]).weight.copy_(torch.cholesky_solve(products[:F], factor[:F, :F]).T)
    if head.config.anchor_norm and head.config.style.norms != "after":  # those read rows as they are, whatever size
        shrink(head, size)


def check_style(target: Target, style: LayerStyle) -> None:
    """Refuse a head whose layers are built otherwise than the target's; the target needs no weights."""
    if style != target_style(target):
        raise InputError(
            "model.head.warm_start: the target's layers are of another kind than the head's. Set model.head.kind to "
            "target, or warm_start to false."
        )


def shrink(head: SpeculationHead, size: float) -> None:
    """Divide rows and what layers add to them by `size`: the same head, up to the eps of its norms."""
    for k in head.staircase.reachable_blocks:
        cast(Aggregation, head.aggregation[k]).weight.div_(size)
    for layer in cast("list[HeadLayer]", list(head.layers)):
        writers = ("self_attn.o_proj", "mlp.down_proj")
        if layer.norms_outputs:
            writers = ("post_attention_layernorm", "post_feedforward_layernorm")
        for name, weight in layer.named_parameters():
            if name.startswith(writers):
                weight.div_(size)


def _moments(
    target: Target, head: SpeculationHead, depth: int, batches: Iterable[Batch]
) -> tuple[Tensor, Tensor, float]:
    """X^T X [F, F] and X^T Y [F, H] of anchors X and states Y = h_depth, each token divided by its |Y|; their |Y|.

    Hidden states of a sequence's first tokens are often a hundred times larger than the rest: without the division the
    regression would be about them.
    """
    wanted = sorted({*head.config.anchors, depth})
    deepest = cast(Aggregation, head.aggregation[-1])
    features, H = deepest.weight.shape[1], head.config.hidden_size
    place = torch.device("cpu") if target.device.type == "mps" else target.device  # which knows no float64
    squares, products = (torch.zeros(features, n, dtype=torch.float64, device=place) for n in (features, H))
    tokens = max(TOKENS, TOKENS_PER_FEATURE * features)
    seen, inverse = 0, 0.0
    with progress_bar("warm start", "tokens") as progress:
        for batch in batches:
            documents = batch["documents"].to(target.device)
            packed = is_packed(batch)
            positions = position_ids(batch).to(target.device) if packed else None
            states, _ = target(batch["input_ids"].to(target.device), wanted, positions, documents if packed else None)
            here = dict(zip(wanted, (state[documents >= 0].float() for state in states), strict=True))
            x = deepest.normed(torch.cat([here[anchor] for anchor in head.config.anchors], -1)).to(place).double()
            y = here[depth].to(place).double()
            weight = y.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
            x *= weight
            squares.addmm_(x.T, x)
            products.addmm_(x.T, y * weight)
            inverse += float(weight.square().sum())
            seen += len(y)
            progress(min(seen, tokens), tokens)
            if seen >= tokens:
                break
    if not seen:
        raise InputError("model.head.warm_start: there is no training text to fit the head to. Give data.train more.")
    return squares, products, (seen / inverse) ** 0.5


def _copy_last_layers(target: Target, head: SpeculationHead) -> int:
    """The target's last layers, weight by weight of the same name; returns the first one's number."""
    apart = has_rope_per_kind(target.config)
    taken = [
        i
        for i, kind in enumerate(target.layer_kinds)
        if (kind == "full_attention" if apart else kind != "linear_attention")
    ][-len(head.layers) :]
    if len(taken) < len(head.layers):
        raise InputError(
            f"model.head.warm_start: model.head.num_layers={len(head.layers)}, and the target has {len(taken)} layers "
            "of full attention. Lower model.head.num_layers, or set warm_start to false."
        )
    for index, layer in zip(taken, head.layers, strict=True):
        theirs = dict(target.layer(index).named_parameters())
        for name, weight in layer.named_parameters():
            source = theirs.get(name)
            if source is not None and (source.is_meta or not source.is_floating_point() or source.itemsize < 2):
                raise InputError(
                    f"model.head.warm_start: {name} of the target's layer {index} is quantised or offloaded, and no "
                    "weight to copy. Change model.loading, or set warm_start to false."
                )
            if source is not None and source.shape == weight.shape:
                less = 1 if "norm" in name and target.norms_store_minus_one else 0
                weight.copy_(source.detach().to("cpu", torch.float32) + less)
            elif weight.ndim == 2:
                shape = "no such weight" if source is None else f"shape {tuple(source.shape)}"
                raise InputError(
                    f"model.head.warm_start: the head's {name} has shape {tuple(weight.shape)}, layer {index} of the "
                    f"target has {shape}. Set model.head.intermediate_size to null, or warm_start to false."
                )
    return taken[0]
