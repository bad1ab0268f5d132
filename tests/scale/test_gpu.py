"""The same strategies on a GPU, where Lightning's own DeepSpeedStrategy is in charge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scale_runs import logged

from spd_lightning import cli
from spd_lightning.training.saving import progress_checkpoints

STRATEGIES = ("auto", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "deepspeed_stage_2_offload")


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_trains_decodes_and_resumes_on_a_gpu(
    base_fields: dict[str, Any], tmp_path: Path, strategy: str
) -> None:
    fields = base_fields | {
        "trainer__accelerator": "gpu",
        "trainer__devices": 1,
        "trainer__strategy": strategy,
        "trainer__precision": "bf16-mixed",
        "trainer__max_steps": 6,
        "decoding__every_steps": 3,
        "survival__save_every_steps": 2,
        "run_dir": tmp_path / "run",
    }
    words = ["fit", "--config", "tiny", *(f"--{name.replace('__', '.')}={value}" for name, value in fields.items())]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert len(logged(tmp_path / "run", "train/loss")) == 6 and logged(tmp_path / "run", "val/drift") == [0.0, 0.0]
    assert all(rate > 0 for rate in logged(tmp_path / "run", "throughput/tokens_per_second"))
    older = progress_checkpoints(tmp_path / "run" / "checkpoints")[0]
    again = [word for word in words if "run_dir" not in word]
    assert cli.main([*again, f"--run_dir={tmp_path / 'again'}", f"--ckpt_path={older}"]) == 0
    resumed, whole = (logged(tmp_path / name, "train/loss") for name in ("again", "run"))
    assert resumed == pytest.approx(whole[-len(resumed) :], rel=0.05)
