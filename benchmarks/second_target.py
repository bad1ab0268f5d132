"""A second target to check findings on: a Llama of 12 layers that speaks Python documentation and school mathematics.

It is trained by data_prep/documentation/03_target.py on the embedded documentation and on GSM8K's training questions;
its tokenizer is the embedded target's. Three of GSM8K's training questions in a hundred are held out.

    .venv/bin/python benchmarks/second_target.py --gsm8k FOLDER --minutes 25     writes runs/second: corpus and target
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

from common import ROOT, console

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with GSM8K's train.jsonl")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        lines = conversations(options.gsm8k, split)
        (FOLDER / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        console.print(f"{split}: {len(lines)} conversations")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(TARGET).save_pretrained(FOLDER / "tokenizer")
    words = [
        sys.executable, "data_prep/documentation/03_target.py", "--corpus", str(FOLDER), "--out",
        str(FOLDER / "target"), "--layers", str(LAYERS), "--minutes", f"{options.minutes:g}", "--threads",
        str(options.threads),
    ]  # fmt: skip
    return subprocess.run(words, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
