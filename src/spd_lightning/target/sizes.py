"""How much a stage and a head read per token, counted without a weight: is the head hidden behind a stage?

At batch 1 time goes with the bytes read from memory. The head drafts while every stage advances its token, so it costs
no time as long as it reads no more than the slowest stage does (method.md, section 9):

    bytes(head layers) + bytes(all W_k) + bytes(V_d x H) <= bytes of a stage

Models are built on the meta device, where a target of any size takes a second and no memory. Heavy imports wait until
something is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spd_lightning.head.config import HeadConfig
    from spd_lightning.target.target import Target


@dataclass(frozen=True)
class TargetParameters:
    """Parameters of a target.

    Attributes:
        stages: per stage, those that one token reads: of a mixture only the experts it passes.
        verification: final norm and lm_head, read once per cycle by whoever verifies; in no stage's count.
        stored: all of them, every expert and the embedding included; what memory has to hold.
    """

    stages: tuple[int, ...]
    verification: int
    stored: int


@dataclass(frozen=True)
class HeadParameters:
    """Trained parameters of a head, all of which every draft reads; the frozen final norm (H of them) is left out."""

    layers: int
    aggregation: int
    """All W_k."""
    lm_head: int
    """V_d x H."""

    @property
    def total(self) -> int:
        return self.layers + self.aggregation + self.lm_head


@dataclass(frozen=True)
class ByteRule:
    """A head beside the stage it has to hide behind.

    Parameters stand for bytes, which holds while head and target have the same dtype. A quantised target breaks that:
    its stages read 1 (8bit) or about 0.5 (4bit) bytes per parameter and the head 2 in bfloat16, so a stage hides only
    half or a quarter as many of the head's parameters.

    Attributes:
        stage: parameters that one token reads in the largest stage: a cycle lasts as long as the slowest one.
        head: the head's.
        hidden_size: H.
    """

    stage: int
    head: HeadParameters
    hidden_size: int

    @property
    def hidden(self) -> bool:
        return self.head.total <= self.stage

    @property
    def largest_vocabulary(self) -> int:
        """Draft ids with which the same layers and W_k are still hidden; 0 where those alone are too large."""
        return max(0, self.stage - self.head.layers - self.head.aggregation) // self.hidden_size


def active_stage_parameters(config: Any, stage_layers: Sequence[int]) -> TargetParameters:
    """Parameters per stage that one token reads.

    The embedding counts nothing, being one row of it; of the routed experts `num_experts_per_tok` count, and routers,
    shared experts and everything else in a layer count whole.

    Args:
        config: a Hugging Face configuration; no weights are needed.
        stage_layers: layers per stage.
    """
    target = weightless_target(config, stage_layers)
    layers = [_active_parameters(target.layer(index), target.config) for index in range(target.num_layers)]
    bounds = (0, *accumulate(stage_layers))
    return TargetParameters(
        stages=tuple(sum(layers[start:stop]) for start, stop in pairwise(bounds)),
        verification=sum(p.numel() for module in (target.norm, target.lm_head) for p in module.parameters()),
        stored=sum(p.numel() for p in target.parameters()),
    )


def head_parameters(config: HeadConfig) -> HeadParameters:
    """Trained parameters of the head that a configuration describes."""
    import torch

    from spd_lightning.head.module import SpeculationHead

    with torch.device("meta"):
        head = SpeculationHead(config)
    counts = [sum(p.numel() for p in part.parameters()) for part in (head.layers, head.aggregation, head.lm_head)]
    return HeadParameters(*counts)


def byte_rule(config: Any, head: HeadConfig) -> ByteRule:
    """Whether `head` is hidden behind the largest stage of the target that `config` describes."""
    stages = active_stage_parameters(config, head.stage_layers).stages
    return ByteRule(max(stages), head_parameters(head), head.hidden_size)


def weightless_target(config: Any, stage_layers: Sequence[int] | None = None) -> Target:
    """A target of shapes alone, on the meta device: enough for `head_config`, not for anything that computes."""
    import torch
    from transformers import AutoModelForCausalLM

    from spd_lightning.target.target import Target

    with torch.device("meta"):
        return Target(AutoModelForCausalLM.from_config(config), stage_layers)


def _active_parameters(layer: Any, config: Any) -> int:
    """Parameters of a decoder layer that one token reads."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    count = 0
    for name, parameter in layer.named_parameters():
        size = parameter.numel()
        count += size * config.num_experts_per_tok // experts if "experts" in name.split(".") else size
    return count
