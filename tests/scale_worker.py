"""One rank that goes through several runs in one process: `python scale_worker.py CASES.json`.

CASES.json lists {"name", "arguments", "stop_at", "break_at"}. A case with `stop_at` sends itself SIGTERM in that step,
with "validation" while it decodes its first prompt; one with `break_at` (step, rank) makes a loss not a number. Ranks
come by torchrun's environment variables; without them there is one. What each case returned is printed as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from spd_lightning import cli


def stop_in(step: int) -> None:
    """Have this process told to stop while the batch of a step is computed."""
    from spd_lightning.training.module import SpdModule

    original = SpdModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step and self.trainer.is_global_zero:  # one rank knows, all must act
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    SpdModule.training_step = training_step  # type: ignore[method-assign]


def stop_in_validation() -> None:
    """Have this process told to stop while the first prompt of the first validation is decoded."""
    from spd_lightning.training.validation import DecodingValidation

    original = DecodingValidation.measure

    def measure(self: Any, *args: Any) -> Any:
        DecodingValidation.measure = original  # type: ignore[method-assign]
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    DecodingValidation.measure = measure  # type: ignore[method-assign]


def break_gradient(step: int, rank: int) -> None:
    """Make the loss of one rank not a number in one step."""
    from spd_lightning.training.module import SpdModule

    original = SpdModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = original(self, batch, batch_idx)
        return loss * float("nan") if (self.global_step, self.global_rank) == (step, rank) else loss

    SpdModule.training_step = training_step  # type: ignore[method-assign]


def tell_what_is_held() -> None:
    """Print how many numbers of the target each rank holds when training begins, and whether it read them."""
    from spd_lightning.training import module
    from spd_lightning.training.strategies import ZeroStrategy

    read = []
    load, start = module.load_target, module.SpdModule.on_train_start

    def load_target(*args: Any, **options: Any) -> Any:
        read.append(args)
        return load(*args, **options)

    def on_train_start(self: Any) -> None:
        start(self)
        strategy = self.trainer.strategy
        stage = strategy.stage if isinstance(strategy, ZeroStrategy) else 0
        numbers = sum(getattr(p, "ds_tensor", p).numel() for p in self.target.parameters())
        found = {"stage": stage, "rank": self.global_rank, "of": "target", "numbers": numbers, "read": bool(read)}
        print("HELD", json.dumps(found), flush=True)
        read.clear()

    module.load_target = load_target  # type: ignore[attr-defined]
    module.SpdModule.on_train_start = on_train_start  # type: ignore[method-assign]


def main(cases: list[dict[str, Any]]) -> None:
    from spd_lightning.training.module import SpdModule

    original = SpdModule.training_step
    tell_what_is_held()
    for case in cases:
        SpdModule.training_step = original  # type: ignore[method-assign]
        if case.get("stop_at") == "validation":
            stop_in_validation()
        elif case.get("stop_at") is not None:
            stop_in(case["stop_at"])
        if case.get("break_at") is not None:
            break_gradient(*case["break_at"])
        print("RETURNED", json.dumps([case["name"], cli.main(case["arguments"])]), flush=True)


def go_through(cases: list[dict[str, Any]], folder: Path, output: Path, environment: dict[str, str]) -> None:
    """`main` as a process that was forked: in a session, a folder and an environment of its own."""
    import torch
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    os.setsid()
    os.chdir(folder)
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ |= environment
    rank_zero_only.rank = int(environment.get("RANK", 0))  # which Lightning reads when it is imported
    torch.set_num_threads(1)
    main(cases)


if __name__ == "__main__":
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))
