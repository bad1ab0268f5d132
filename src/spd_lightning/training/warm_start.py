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
from spd_lightning.head.loading import target_style
from spd_lightning.head.module import Aggregation, HeadLayer, SpeculationHead
from spd_lightning.target.target import Target

#: Tokens that W_k are fitted to.
TOKENS = 16_384
#: Of the regression, relative to each feature's own square.
RIDGE = 1e-3


@torch.no_grad()
def warm_start(target: Target, head: SpeculationHead, batches: Iterable[Batch]) -> None:
    """Let the head start as the target's last full-attention layers.

    Rows are brought to a root mean square of about 1 where the head norms its anchors, as those of a new head are, and
    what its layers write is divided by as much: the same head, at rates that suit new ones.

    Args:
        target: whole, on its device, which also has room for [F, F] float64, F = anchors x H: 3.4 GB for five of 4,096.
        head: a new one, of kind `target`.
        batches: of training texts; as many are read as hold `TOKENS` tokens.

    Raises:
        InputError: where the head's layers are built otherwise than the target's, or in other sizes: a part of a layer
            is worth nothing without the rest.
    """
    if head.config.style != target_style(target):
        raise InputError(
            f"model.head.warm_start: the target's layers are of another kind than the head's {head.config.kind}. Set "
            "model.head.kind to target, or warm_start to false."
        )
    first = _copy_last_layers(target, head)
    squares, products, size = _moments(target, head, first, batches)
    if not head.config.anchor_norm or head.config.style.norms == "after":  # these read rows as they are, whatever size
        size = 1.0
    ridge = RIDGE * (squares.diagonal() + 1e-6 * squares.diagonal().mean())  # a feature may be 0 throughout
    for k, weight in enumerate(head.aggregation.parameters()):
        F = (k + 1) * head.config.hidden_size
        fitted = torch.linalg.solve(squares[:F, :F] + ridge[:F].diag(), products[:F])
        weight.copy_(fitted.T / size)
    for layer in cast("list[HeadLayer]", list(head.layers)):
        for name, weight in layer.named_parameters():
            if name.startswith(_writers(layer)):
                weight.div_(size)


def _writers(layer: HeadLayer) -> tuple[str, ...]:
    """The modules that decide how much a layer adds to the residual stream."""
    if layer.norms_outputs:
        return ("post_attention_layernorm", "post_feedforward_layernorm")
    return ("self_attn.o_proj", "mlp.down_proj")


def _moments(
    target: Target, head: SpeculationHead, depth: int, batches: Iterable[Batch]
) -> tuple[Tensor, Tensor, float]:
    """X^T X [F, F] and X^T Y [F, H] of anchors X and states Y = h_depth, each token divided by its |Y|; their |Y|.

    Hidden states of a sequence's first tokens are often a hundred times larger than the rest: without the division the
    regression would be about them.
    """
    wanted = sorted({*head.config.anchors, depth})
    deepest = cast(Aggregation, head.aggregation[-1])
    squares = products = torch.zeros((), dtype=torch.float64)
    seen, inverse = 0, 0.0
    with progress_bar("warm start", "tokens") as progress:
        for batch in batches:
            documents = batch["documents"].to(target.device)
            packed = is_packed(batch)
            positions = position_ids(batch).to(target.device) if packed else None
            states, _ = target(batch["input_ids"].to(target.device), wanted, positions, documents if packed else None)
            here = dict(zip(wanted, (state[documents >= 0].float() for state in states), strict=True))
            y = here[depth].double()
            weight = y.square().mean(-1, keepdim=True).rsqrt()
            x = deepest.normed(torch.cat([here[anchor] for anchor in head.config.anchors], -1)).double() * weight
            squares, products = squares.to(x.device) + x.T @ x, products.to(x.device) + x.T @ (y * weight)
            inverse += float(weight.square().sum())
            seen += len(y)
            progress(min(seen, TOKENS), TOKENS)
            if seen >= TOKENS:
                break
    return squares.cpu(), products.cpu(), (seen / inverse) ** 0.5


def _copy_last_layers(target: Target, head: SpeculationHead) -> int:
    """The target's last full-attention layers, weight by weight of the same name; returns the first one's number."""
    full = [i for i, kind in enumerate(target.layer_kinds) if kind != "linear_attention"][-len(head.layers) :]
    if len(full) < len(head.layers):
        raise InputError(
            f"model.head.warm_start: model.head.num_layers={len(head.layers)}, and the target has {len(full)} layers "
            "of full attention. Lower model.head.num_layers, or set warm_start to false."
        )
    for index, layer in zip(full, head.layers, strict=True):
        theirs = dict(target.layer(index).named_parameters())
        for name, weight in layer.named_parameters():
            source = theirs.get(name)
            if source is not None and source.shape == weight.shape:
                less = 1 if "norm" in name and target.norms_store_minus_one else 0
                weight.copy_(source.detach().to("cpu", torch.float32) + less)
            elif weight.ndim == 2:
                shape = "no such weight" if source is None else f"shape {tuple(source.shape)}"
                raise InputError(
                    f"model.head.warm_start: the head's {name} has shape {tuple(weight.shape)}, layer {index} of the "
                    f"target has {shape}. Set model.head.intermediate_size to null, or warm_start to false."
                )
    return full[0]
