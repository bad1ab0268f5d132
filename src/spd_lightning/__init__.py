"""Speculative pipeline decoding: train, decode with and export speculation heads.

The public names live here and are imported on first use (PEP 562): `import spd_lightning` and `spd-lightning --help`
must not pay the seconds that torch takes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
    from spd_lightning.decoding.generation import Generation
    from spd_lightning.head.config import HeadConfig
    from spd_lightning.head.loading import draft_logits, load_head, new_head
    from spd_lightning.head.module import SpeculationHead
    from spd_lightning.staircase import Staircase
    from spd_lightning.target.loading import load_target
    from spd_lightning.target.target import Target

__all__ = [
    "Generation",
    "HeadConfig",
    "SpdDecoder",
    "SpeculationHead",
    "Staircase",
    "Target",
    "autoregressive_generate",
    "draft_logits",
    "load_head",
    "load_target",
    "new_head",
]

_HOME = {
    "Generation": "decoding.generation",
    "HeadConfig": "head.config",
    "SpdDecoder": "decoding.decoder",
    "SpeculationHead": "head.module",
    "Staircase": "staircase",
    "Target": "target.target",
    "autoregressive_generate": "decoding.decoder",
    "draft_logits": "head.loading",
    "load_head": "head.loading",
    "load_target": "target.loading",
    "new_head": "head.loading",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access is an ordinary one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
