"""Heads in ZeRO checkpoints: those that DeepSpeed itself writes here, read without it, bit for bit; damage is told."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_lightning import cli
from spd_lightning.errors import InputError
from spd_lightning.head.loading import load_head
from spd_lightning.head.zero import zero_fields

WRITER = Path(__file__).with_name("zero_checkpoint.py")
#: DeepSpeed's own merge of a folder, in a process of its own: importing it changes much.
THEIRS = """
import sys, torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as merge
torch.save(dict(merge(sys.argv[1])), sys.argv[2])
"""


def write(out: Path, stage: int, dtype: str, ranks: int) -> Path:
    """A checkpoint by so many processes, after one step of training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WRITER), str(out), str(stage), dtype],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    texts = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), texts[0][-2000:]
    return out


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3], ids=lambda stage: f"stage {stage}")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two ranks in float32."""
    return write(tmp_path_factory.mktemp("zero") / "last.ckpt", request.param, "fp32", 2)


def equals_deepspeeds_own(folder: Path, scratch: Path) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", THEIRS, str(folder), str(scratch / "theirs.pt")]
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=120)
    theirs = torch.load(scratch / "theirs.pt", weights_only=True)
    ours = zero_fields(folder)["state_dict"]
    assert set(ours) - set(theirs) == {"head.norm.weight"}
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_the_weights_are_those_that_deepspeed_itself_would_merge(checkpoint: Path, tmp_path: Path) -> None:
    equals_deepspeeds_own(checkpoint, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_dtype_and_number_of_ranks_is_read(tmp_path: Path, stage: int, dtype: str, ranks: int) -> None:
    folder = write(tmp_path / "last.ckpt", stage, dtype, ranks)
    equals_deepspeeds_own(folder, tmp_path)
    assert load_head(folder).dtype == torch.float32


def test_a_checkpoint_folder_is_a_source_like_any_other_without_deepspeed(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints" / "last.ckpt")
    code = f"""
import sys
from spd_lightning import load_head, load_target
target = load_target("tiny")
head = load_head({str(run)!r}, target)
print(head.staircase.num_stages, [name for name in ("deepspeed", "lightning") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "3 []", done.stderr
    assert cli.main(["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "head")]) == 0
    ours = load_head(checkpoint, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in load_head(tmp_path / "head").state_dict().items())


class _Dangerous:
    def __reduce__(self) -> Any:
        return (open, ("was_executed", "w"))


@pytest.mark.parametrize(
    "damage", ["a missing rank", "a cut file", "no latest", "a tag elsewhere", "code", "no shapes"]
)
def test_damage_is_one_line_that_names_the_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy.ckpt"))
    parts = sorted((folder / "checkpoint").glob("*optim_states.pt"))
    model = sorted((folder / "checkpoint").glob("*model_states.pt"))[0]
    if damage == "a missing rank":
        parts[1].unlink()
    elif damage == "a cut file":
        parts[1].write_bytes(parts[1].read_bytes()[:-1000])
    elif damage == "no latest":
        (folder / "latest").unlink()
    elif damage == "a tag elsewhere":
        (folder / "latest").write_text("../copy.ckpt/checkpoint")
    elif damage == "code":
        torch.save({"optimizer_state_dict": _Dangerous()}, parts[0])
    else:
        torch.save({"param_shapes": [], "head_config": {}}, model)
    with pytest.raises(InputError) as caught:
        load_head(folder)
    assert "copy.ckpt" in str(caught.value) or "rank" in str(caught.value) or "group" in str(caught.value)
    assert not Path("was_executed").exists()
