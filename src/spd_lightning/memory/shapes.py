"""What memory depends on: the sizes of head and target, the arithmetic, and the rows of a micro-batch.

Everything is plain integers, so that a plan can be computed on any machine. Bytes are bytes, parameters are numbers of
weights. How the rows of a batch come about is told in head/layout.py, what a row is in docs/method.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spd_lightning.staircase import Staircase

if TYPE_CHECKING:
    from spd_lightning.head.config import HeadConfig, LayerStyle
    from spd_lightning.head.module import SpeculationHead
    from spd_lightning.target.target import Target

#: Span of the near part of attention: a tile holds at least so many positions (`StaircaseLayout.span`).
SMALLEST_SPAN = 8


@dataclass(frozen=True)
class Arithmetic:
    """In which dtypes a step computes, and where.

    Attributes:
        weight: bytes per weight of the head as the step sees it, and per element of its gradient.
        compute: bytes per element of matrix products. Smaller than `weight` under autocast, else the same.
        target: bytes per element of the target's activations.
        cuda: computed by CUDA kernels (fused norms, near part of attention in float32, foreach AdamW), else on a CPU.
    """

    weight: int
    compute: int
    target: int
    cuda: bool

    @property
    def autocast(self) -> bool:
        return self.compute < self.weight


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a head, in the letters of head/module.py.

    Attributes:
        H, I, N, K, D: hidden size, MLP width, query heads, key/value heads, head_dim.
        rotary: dimensions of a head that turn.
        style: how its layers are built.
        staircase: stages and anchors.
        V, V_d: size of the target's and of the draft vocabulary.
        capped: whether logits are squeezed.
        parameters: numbers of trained weights, tensor by tensor, in the order in which the optimizer has them.
        layer: trained weights of one decoder layer.
        aggregation: trained weights of all W_k that some row passes.
    """

    H: int
    I: int  # noqa: E741
    N: int
    K: int
    D: int
    rotary: int
    num_layers: int
    style: LayerStyle
    staircase: Staircase
    V: int
    V_d: int
    capped: bool
    parameters: tuple[int, ...]
    layer: int
    aggregation: int

    @property
    def trained(self) -> int:
        """P: all trained weights."""
        return sum(self.parameters)

    @property
    def lm_head(self) -> int:
        return self.V_d * self.H

    @property
    def m(self) -> int:
        """Reachable blocks."""
        return len(self.staircase.reachable_blocks)

    @property
    def span(self) -> int:
        """c: positions of a tile of the near part of attention."""
        return max(SMALLEST_SPAN, self.staircase.num_stages)


def shape_of_head(config: HeadConfig) -> HeadShape:
    """The sizes of the head that a configuration describes, counted on the meta device."""
    import torch

    from spd_lightning.head.module import SpeculationHead

    with torch.device("meta"):
        head = SpeculationHead(config)
    names = _trained(head)
    return HeadShape(
        H=config.hidden_size,
        I=config.intermediate_size,
        N=config.num_attention_heads,
        K=config.num_key_value_heads,
        D=config.head_dim,
        rotary=config.rotary_dim,
        num_layers=config.num_layers,
        style=config.style,
        staircase=config.staircase,
        V=config.vocab_size,
        V_d=config.draft_vocab_size,
        capped=config.logit_softcap is not None,
        parameters=tuple(names.values()),
        layer=sum(size for name, size in names.items() if name.startswith("layers.0.")),
        aggregation=sum(size for name, size in names.items() if name.startswith("aggregation.")),
    )


def _trained(head: SpeculationHead) -> dict[str, int]:
    """Trained weights by name: matrices first, then the rest, as the optimizer has them."""
    dead = set(range(len(head.aggregation))) - set(head.staircase.reachable_blocks)
    prefixes = tuple(f"aggregation.{k}." for k in dead)
    trained = {n: p for n, p in head.named_parameters() if p.requires_grad and not n.startswith(prefixes or ("-",))}
    ordered = sorted(trained.items(), key=lambda item: item[1].ndim < 2)
    return {name: parameter.numel() for name, parameter in ordered}


@dataclass(frozen=True)
class TargetShape:
    """Sizes of a frozen target.

    Attributes:
        stored: all weights.
        quantisable: those of them that 8bit or 4bit loading stores in fewer bits (matrices of decoder layers).
        largest_layer: weights of its largest decoder layer.
        output: weights of final norm and lm_head.
        H, N, K, D, V: as of the head.
        I: width of the MLP that one token passes.
        kinds: of attention masks: kinds of layers that need one when documents are packed.
    """

    stored: int
    quantisable: int
    largest_layer: int
    output: int
    H: int
    I: int  # noqa: E741
    N: int
    K: int
    D: int
    V: int
    kinds: int


def shape_of_target(target: Target) -> TargetShape:
    """The sizes of a target, which may be without weights (`weightless_target`)."""
    from spd_lightning.target.families import dense_intermediate_size

    text: Any = target.config
    layers = [list(target.layer(index).parameters()) for index in range(target.num_layers)]
    return TargetShape(
        stored=sum(p.numel() for p in target.parameters()),
        quantisable=sum(p.numel() for layer in layers for p in layer if p.ndim == 2),
        largest_layer=max(sum(p.numel() for p in layer) for layer in layers),
        output=sum(p.numel() for module in (target.norm, target.lm_head) for p in module.parameters()),
        H=text.hidden_size,
        I=dense_intermediate_size(text),
        N=text.num_attention_heads,
        K=text.num_key_value_heads,
        D=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        V=target.vocab_size,
        kinds=len(set(target.layer_kinds)),
    )


@dataclass(frozen=True)
class Rows:
    """The rows of a micro-batch.

    Attributes:
        B, S: sequences, and positions of each.
        blocks: rows per reachable block, deepest last; the first layer computes them all.
        asked: P, supervised positions; the last layer computes an output for their block-0 rows alone.
        documents: whether several documents share a sequence.
    """

    B: int
    S: int
    blocks: tuple[int, ...]
    asked: int
    documents: bool = False

    @property
    def positions(self) -> int:
        return self.B * self.S

    @property
    def all(self) -> int:
        return sum(self.blocks)


def expected_rows(
    head: HeadShape, batch: int, length: int, restart_rate: float, supervised: float = 1.0, documents: bool = False
) -> Rows:
    """The rows that a batch has on average.

    A position's block-k row is seen by whoever comes d_min(k) positions later, unless a restart falls in between:
    with probability (1 - restart rate) ** d_min(k). The deepest row of every position exists; the others only where
    something is supervised.

    Args:
        batch: sequences of `length` positions, none of them padding.
        supervised: share of the positions that feed the loss, together at the end of each document.
    """
    positions = batch * length
    asked = math.ceil(supervised * positions)
    counts = [math.ceil(asked * (1 - restart_rate) ** depth) for depth in head.staircase.first_depths[:-1]]
    return Rows(batch, length, (*counts, positions), asked, documents)
