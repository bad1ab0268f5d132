"""Where a step's time goes, told for the device that the run is on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spd_lightning.head.loading import new_head
from spd_lightning.target.target import Target
from spd_lightning.training.throughput import Throughput


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_uses_the_clock(
    make_target: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_target(num_layers=4, num_stages=4)
    head = new_head(target, num_layers=1)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), precision="32-true")
    module = SimpleNamespace(parts=lambda: (target, head))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    throughput = Throughput()
    throughput.on_train_start(trainer, module)
    target(torch.tensor([[1, 2, 3]]), head.config.anchors)
    throughput.on_train_end(trainer, module)
    line = throughput.line()
    assert 0 < line["throughput/share_target"] <= 1 and "throughput/mfu" not in line
