"""Weights that ZeRO stage 3 keeps in pieces, brought together where something else than their own module reads them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn


def in_pieces(module: nn.Module) -> bool:
    """Whether ZeRO stage 3 has cut up a module's own parameters, or those of the modules in it."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def gathered(*modules: nn.Module) -> AbstractContextManager[Any]:
    """The whole weights of these modules, for a while; a meeting of all ranks. Nothing to do without stage 3.

    Within it call `module.forward`: the hooks around `module(...)` would give the weights away again.
    """
    pieces = [p for module in modules for p in module.parameters() if hasattr(p, "ds_id")]
    if not pieces:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(dict.fromkeys(pieces)))
