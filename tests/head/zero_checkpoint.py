"""Write a real DeepSpeed checkpoint of a head: `python zero_checkpoint.py OUT STAGE fp32|bf16`.

By the call that Lightning's strategy makes. Started once per rank, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
set; gloo on a CPU.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_RANK"] = os.environ["RANK"]

import deepspeed  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from spd_lightning.head.loading import new_head  # noqa: E402
from spd_lightning.target.loading import load_target  # noqa: E402


class Trained(nn.Module):
    """A head and something frozen beside it, as in the Lightning module."""

    def __init__(self) -> None:
        super().__init__()
        target = load_target("tiny", num_stages=3)
        self.head = new_head(target, num_layers=1, draft_token_ids=range(0, 4096, 41), intermediate_size=33)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)

    def forward(self) -> torch.Tensor:
        """Every weight by its own module's forward, where ZeRO-3 gathers it."""
        total = torch.zeros(())
        for module in self.head.modules():
            if isinstance(module, nn.Linear):
                total = (
                    total + module(torch.ones(1, module.in_features, dtype=module.weight.dtype)).float().square().sum()
                )
            elif isinstance(module, nn.RMSNorm) and module.weight.requires_grad:
                ones = torch.arange(module.normalized_shape[0], dtype=module.weight.dtype)[None]
                total = total + module(ones).float().square().sum()
        return total


def main(out: str, stage: int, dtype: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    model = Trained()
    norm = model.head.norm.weight.detach().clone()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trainable,
        optimizer=torch.optim.AdamW(trainable, lr=1e-3),
        config=config,
        dist_init_required=False,
    )
    engine.backward(engine())
    engine.step()
    client = {
        "head_config": asdict(model.head.config),
        "target": asdict(model.head.origin),
        "head_frozen": {"norm.weight": norm},
        "hyper_parameters": {},
    }
    engine.save_checkpoint(out, client_state=client, tag="checkpoint", exclude_frozen_parameters=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
