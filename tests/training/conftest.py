"""Modules to train, for every test of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spd_lightning.training.module import SpdModule


@pytest.fixture(scope="module")
def make_module(model_folder: Path) -> Callable[..., SpdModule]:
    """A module whose target and head exist, without a trainer."""

    def make(configured: bool = True, **options: Any) -> SpdModule:
        module = SpdModule(**({"target": str(model_folder), "num_stages": 4, "restart_rate": 0.3} | options))
        if configured:
            module.configure_model()
        return module

    return make
