"""A hardware profile that is computed: every part takes its bytes over the memory bandwidth, and its launches.

At batch 1 decoding reads every active weight once per token and computes next to nothing, so bytes are what takes time
(docs/method.md). What a real machine adds is in `achieved` and `launch_ms`, which are assumptions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from spd_lightning.provenance import provenance
from spd_lightning.speed.hardware import HardwareProfile, HeadCosts, LinkCosts
from spd_lightning.target.sizes import active_stage_parameters, head_parameters

#: Bytes of a weight, by the types that a profile is computed for.
WEIGHT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Machine:
    """One rank's hardware, as described.

    Attributes:
        bandwidth: of its memory, in bytes per second.
        achieved: share of it that reading weights reaches.
        launch_ms: what a layer costs beside its bytes: launches, attention over the cache.
        link: between two ranks.
        name: for tables.
    """

    bandwidth: float
    achieved: float
    launch_ms: float
    link: LinkCosts
    name: str

    def ms(self, parameters: float, weight_bytes: int, launches: float = 0.0) -> float:
        """Milliseconds of reading so many weights."""
        return 1e3 * parameters * weight_bytes / (self.bandwidth * self.achieved) + launches * self.launch_ms


def roofline(config: Any, name: str, machine: Machine, dtype: str) -> HardwareProfile:
    """The profile of a target that `config` describes; no weight is read.

    Args:
        config: a Hugging Face configuration.
        name: the target's id or folder.
        dtype: of target and head, one of `WEIGHT_BYTES`.
    """
    from spd_lightning.head.loading import head_config
    from spd_lightning.target.sizes import weightless_target

    text, weight_bytes = config.get_text_config(), WEIGHT_BYTES[dtype]
    L, H = text.num_hidden_layers, text.hidden_size
    sizes = active_stage_parameters(config, (1,) * L)
    layers = tuple(machine.ms(count, weight_bytes, 1) for count in sizes.stages)
    verification = machine.ms(sizes.verification, weight_bytes, 1)
    head = head_parameters(head_config(weightless_target(config, (1,) * L), 1, None, range(1000), "qwen3", None))
    return HardwareProfile(
        target=name,
        device=machine.name,
        dtype=dtype,
        plain=sum(layers) + verification,
        embedding=0.0,
        layers=layers,
        verification=verification,
        head=HeadCosts(
            fixed=machine.launch_ms,
            layer=machine.ms(head.layers, weight_bytes, 1),
            aggregation=machine.ms(H * H, weight_bytes),
            thousand_ids=machine.ms(1000 * H, weight_bytes),
        ),
        link=machine.link,
        vocabulary=text.vocab_size,
        measured=False,
        made=provenance() | {"assumed": asdict(machine)},
    )
