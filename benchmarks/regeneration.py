"""Does it pay to train on responses that the target wrote? The same conversations, with their own responses and with
the target's; the same head, steps and seed; real acceptance on the same held-out prompts.

    python benchmarks/regeneration.py            # writes benchmarks/records/regeneration.json; a quarter of an hour
    python benchmarks/performance.py             # renews the tables of docs/performance.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import console, write_record


def command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "spd_lightning", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def fit(train: Path, run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train with the tiny recipe; tokens seen, and the final decoding of the trained head by temperature."""
    command(
        "fit", "--config", "tiny", "--run_dir", run, "--data.train", train, "--final.baselines", "false",
        "--final.prompts", options.prompts, "--trainer.max_steps", options.steps,
        "--data.batch_size", 16,
        "--trainer.val_check_interval", options.steps, "--trainer.enable_progress_bar", "false",
    )  # fmt: skip
    results = json.loads((run / "run.json").read_text())["results"]
    wanted = ("acceptance", "acceptance_interval", "theoretical_speedup")
    rows = [row for row in results["final"] if row["drafter"] == "trained head"]
    return {
        "tokens": results["tokens"],
        "final": {f"{row['temperature']:g}": {name: row[name] for name in wanted} for row in rows},
        "lossless_mismatches": results["lossless"]["mismatches"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=2000, help="training conversations (2000)")
    parser.add_argument("--steps", type=int, default=120, help="steps of 16 conversations (120)")
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts of the final decoding (40)")
    options = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command(
            "data", "prepare", "documentation:train", "--limit", options.conversations,
            "--heldout-share", 0, "--out", folder / "own",
        )  # fmt: skip
        corpora = {"of the corpus": folder / "own"}
        for temperature in (0, 1):
            corpora[f"the target's, T = {temperature}"] = folder / f"T{temperature}"
            command(
                "data", "regenerate", folder / "own" / "train.jsonl", "--target", "tiny",
                "--temperature", temperature, "--max-new-tokens", 128, "--out", folder / f"T{temperature}",
            )  # fmt: skip
        for responses, corpus in corpora.items():
            found = fit(corpus / "train.jsonl", folder / f"run-{len(cases)}", options)
            cases.append({"responses": responses, **found})
            console.print(cases[-1])
    write_record("regeneration", {**vars(options), "cases": cases}, threads=2)


if __name__ == "__main__":
    main()
