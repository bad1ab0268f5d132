"""A second target to check findings on: a Llama of 12 layers that speaks Python documentation and school mathematics.

It grows out of the embedded one: behind every second layer comes a copy of it that writes nothing yet, and all of them
are trained further, by data_prep/documentation/03_target.py, on the embedded documentation and on GSM8K's training
questions. Its tokenizer is the embedded target's. Three of GSM8K's training questions in a hundred are held out.

    .venv/bin/python benchmarks/second_target.py --gsm8k FOLDER --minutes 25     writes runs/second: corpus and target
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import ROOT, console
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = ROOT / "runs" / "second"
DOCUMENTATION = ROOT / "src/spd_lightning/embedded/documentation"
TARGET = ROOT / "src/spd_lightning/embedded/target"
LAYERS = 12


def conversations(gsm8k: Path, split: str) -> list[str]:
    """Both corpora as JSON lines, in one shuffled order; GSM8K without the marks of its calculator."""
    with gzip.open(DOCUMENTATION / f"{split}.jsonl.gz", "rt") as file:
        lines = [line.strip() for line in file]
    for number, line in enumerate((gsm8k / "train.jsonl").read_text().splitlines()):
        row = json.loads(line)
        if (number % 100 < 3) == (split == "heldout"):
            answer = re.sub(r"<<[^>]*>>", "", row["answer"])
            messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": messages, "id": f"gsm8k.{number}", "source": "gsm8k"}))
    random.Random(0).shuffle(lines)
    return lines


def grow(steps: Any) -> None:
    """The checkpoint that training goes on from: the embedded target with a silent layer behind every second one."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizer")
    small = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    model = steps.new_model(steps.model_config(tokenizer, LAYERS), seed=0)
    weights = {name: value for name, value in small.state_dict().items() if ".layers." not in name}
    place = 0
    for index, layer in enumerate(small.model.layers):
        for silent in (False, True)[: 1 + index % 2]:
            for name, value in layer.state_dict().items():
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                weights[f"model.layers.{place}.{name}"] = torch.zeros_like(value) if silent and writes else value
            place += 1
    model.load_state_dict(weights)
    steps.save_checkpoint(FOLDER / "target-checkpoint.pt", model, steps.new_optimizer(model), steps.Progress())
    (FOLDER / "target-run.json").write_text(json.dumps({"argv": ["second_target.py"], "settings": {"grown": True}}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with GSM8K's train.jsonl")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not (options.gsm8k / "train.jsonl").is_file():
        parser.error(f"--gsm8k {options.gsm8k}: expected a folder with GSM8K's train.jsonl")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        lines = conversations(options.gsm8k, split)
        (FOLDER / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        console.print(f"{split}: {len(lines)} conversations")
    AutoTokenizer.from_pretrained(TARGET).save_pretrained(FOLDER / "tokenizer")
    # its file name is no module name
    steps = runpy.run_path(str(ROOT / "data_prep/documentation/03_target.py"))
    grow(SimpleNamespace(**steps))
    words = [
        sys.executable, "data_prep/documentation/03_target.py", "--corpus", str(FOLDER), "--out",
        str(FOLDER / "target"), "--layers", str(LAYERS), "--minutes", f"{options.minutes:g}", "--threads",
        str(options.threads), "--lr", "1e-3", "--resume",
    ]  # fmt: skip
    return subprocess.run(words, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
