"""One run under every strategy, side by side; and, on a GPU, the rate of a target of about a billion parameters.

    python benchmarks/scale.py          CPUs: the recipe `tiny`, 50 steps, one rank and two over gloo, some 7 minutes
    python benchmarks/scale.py --gpu    one GPU: random Llama 3.1-shaped target of 1.2 B parameters, ZeRO-2, bf16-mixed

CPU: how far the losses of two ranks are from those of one, whether real decoding counts the same, what a state holds on
the disk and how large it is beside the target. GPU: tokens per second, MFU, peak memory. Writes
benchmarks/records/scale.json or scale_gpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import MIB, console, renew_readme, write_record
from rich.table import Table

from spd_lightning.head.zero import open_parts
from spd_lightning.training.saving import progress_checkpoints

STRATEGIES = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
STEPS = 50
#: Where the tiny recipe has Muon: what DeepSpeed knows.
ADAMW = {"model.optimizer": "adamw", "model.learning_rate": 2e-3}
FIELDS: dict[str, Any] = {
    "trainer.max_steps": STEPS,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": False,
    "trainer.accelerator": "cpu",
    "data.batch_size": 4,
    "data.global_batch_size": 16,
    "decoding.every_steps": STEPS,
    "decoding.prompts": 8,
    "decoding.max_new_tokens": 32,
    "final.prompts": 0,
    **ADAMW,
}


def fit(directory: Path, **changes: Any) -> list[dict[str, float]]:
    """A run of the recipe `tiny`; what it logged."""
    fields = FIELDS | {"run_dir": directory} | {name.replace("__", "."): value for name, value in changes.items()}
    words = [f"--{name}={value}" for name, value in fields.items()]
    with console.status(f"fit {directory.name}"):
        done = subprocess.run(
            [sys.executable, "-m", "spd_lightning", "fit", "--config", "tiny", *words],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        raise RuntimeError(f"{directory.name} failed:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def values(lines: list[dict[str, float]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def names_in(state: Path) -> set[str]:
    """Names of the tensors in a state."""
    if state.is_dir():
        return {name for group in open_parts(state).shapes for name in group}
    import torch

    return set(torch.load(state, weights_only=True, mmap=True)["state_dict"])


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def on_cpus(folder: Path) -> dict[str, Any]:
    """Every strategy on two ranks beside one rank."""
    from spd_lightning.target.loading import embedded_target_path

    runs = {"one rank": fit(folder / "one")}
    for strategy in STRATEGIES:
        runs[strategy] = fit(folder / strategy, trainer__devices=2, trainer__strategy=strategy)
    alone = runs["one rank"]
    target = size(embedded_target_path() / "model.safetensors")
    rows = []
    for name, lines in runs.items():
        state = progress_checkpoints(folder / ("one" if name == "one rank" else name) / "checkpoints")[-1]
        held = names_in(state)
        losses = values(lines, "train/loss")
        apart = [abs(a / b - 1) for a, b in zip(losses, values(alone, "train/loss"), strict=True)]
        rates = values(lines, "throughput/tokens_per_second")[5:]
        rows.append(
            {
                "run": name,
                "largest_relative_difference_of_losses": max(apart),
                "last_loss": losses[-1],
                "cycles": values(lines, "val/cycles"),
                "acceptance": values(lines, "val/acceptance"),
                "tokens_per_second": round(sorted(rates)[len(rates) // 2]),
                "state_mib": round(size(state) / MIB, 1),
                "tensors": len(held),
                "tensors_of_target": sum(not tensor.startswith("head.") for tensor in held),
            }
        )
    return {"steps": STEPS, "target_layers": 8, "target_mib": round(target / MIB, 1), "runs": rows}


def on_gpu(folder: Path) -> dict[str, Any]:
    """ZeRO-2 in bf16-mixed on one GPU, S = 2048."""
    import random

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from spd_lightning import cli
    from spd_lightning.target.loading import embedded_target_path

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    model.save_pretrained(folder / "target")
    AutoTokenizer.from_pretrained(embedded_target_path()).save_pretrained(folder / "target")
    draw = random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(1200):
            text = " ".join(
                draw.choice(["def", "return", "path", "the", "list", "of", "x", "open"]) for _ in range(900)
            )
            turns = [{"role": "user", "content": "Write."}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": turns}) + "\n")
    steps, rows = 12, []
    for batch in (1, 2, 4):
        torch.cuda.reset_peak_memory_stats()
        run = folder / f"batch{batch}"
        fields = {
            "run_dir": run,
            "model.target": folder / "target",
            "model.num_stages": 8,
            "data.train": folder / "data.jsonl",
            "data.validation": folder / "data.jsonl",
            "data.max_length": 2048,
            "data.batch_size": batch,
            "data.packing": True,
            "data.validation_samples": 4,
            "decoding.every_steps": steps,
            "decoding.prompts": 1,
            "decoding.max_new_tokens": 16,
            "final.prompts": 0,
            **ADAMW,
            "trainer.accelerator": "gpu",
            "trainer.strategy": "deepspeed_stage_2",
            "trainer.precision": "bf16-mixed",
            "trainer.max_steps": steps,
            "trainer.log_every_n_steps": 2,
            "trainer.enable_progress_bar": False,
        }
        code = cli.main(["fit", "--config", "tiny", *(f"--{name}={value}" for name, value in fields.items())])
        if code:
            raise RuntimeError(f"batch {batch}: exit status {code}")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        later = {
            name: values(lines, f"throughput/{name}")[2:]
            for name in ("tokens_per_second", "mfu", "share_target", "share_head", "share_data")
        }
        row = {name: sorted(found)[len(found) // 2] for name, found in later.items() if found}
        rows.append({"batch_size": batch, **row, "peak_gib": torch.cuda.max_memory_allocated() / 2**30})
    return {"target_parameters": count, "length": 2048, "gpu": torch.cuda.get_device_name(), "runs": rows}


def table(record: dict[str, Any]) -> str:
    """The section of README."""
    steps = record["steps"]
    lines = [
        f"{steps} steps of the recipe `tiny`, 16 rows per step, on two CPU cores; losses beside those of one rank, "
        "real decoding of 8 prompts x 32 tokens:",
        "",
        "| run | losses apart by at most | cycles decoded | state on the disk, MiB | tensors of the target in it |",
        "|---|---|---|---|---|",
    ]
    for row in record["runs"]:
        ranks = "" if row["run"] == "one rank" else ", 2 ranks"
        lines.append(
            f"| {row['run']}{ranks} | {row['largest_relative_difference_of_losses']:.0e} | {row['cycles'][0]:.0f} | "
            f"{row['state_mib']:.1f} | {row['tensors_of_target']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the GPU's measurement instead of the CPU's")
    gpu = parser.parse_args().gpu
    with tempfile.TemporaryDirectory() as folder:
        results = on_gpu(Path(folder)) if gpu else on_cpus(Path(folder))
    printed = Table(*results["runs"][0])
    for row in results["runs"]:
        printed.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
    console.print(printed)
    path = write_record("scale_gpu" if gpu else "scale", results, threads=1 if gpu else 2)
    if not gpu:
        renew_readme("scale", table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
