"""Which levers raise acceptance: heads trained with one thing changed at a time, and what the real decoder accepts.

Every run is `fit` on the embedded target: the same conversations, tokens, stages, layers and anchors. Runs that are
finished are kept and not run again, so a study can be stopped, extended, and spread over days.

    .venv/bin/python benchmarks/quality.py screen --jobs 2      runs what is missing, writes records/quality_screen.json
    .venv/bin/python benchmarks/quality.py final --jobs 2       three seeds of the baseline and the finalists
    .venv/bin/python benchmarks/quality.py screen --only ce --list
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, console, renew_readme, write_record

RUNS = ROOT / "runs" / "quality"
PUBLISHED = "recipes/overlays/published.yaml"
#: What all runs share; a number of tokens, not of steps, is what batches of other sizes are compared at.
SHARED = {
    "tracking.wandb": "disabled", "tracking.samples": 0, "final.baselines": "false", "decoding.prompts": 4,
    "trainer.log_every_n_steps": 40, "survival.save_every_minutes": 60,
}  # fmt: skip
FORCED = ("kl", "top1", "hit2", "hit4", "alpha")
ROWS = 4480  # conversations of a run: half of the corpus


@dataclass(frozen=True)
class Variant:
    """A run: fields over the tiny recipe, and whether it starts from the published overlay."""

    name: str
    fields: dict[str, Any]
    published: bool = False
    batch: int = 16
    seed: int = 0
    prompts: int = 60
    temperatures: str = "[0.0]"

    @property
    def folder(self) -> Path:
        return RUNS / f"{self.name}-s{self.seed}"

    def words(self) -> list[str]:
        steps = ROWS // self.batch
        fields = SHARED | {
            "data.batch_size": self.batch, "trainer.max_steps": steps, "trainer.val_check_interval": steps,
            "seed_everything": self.seed, "model.seed": self.seed, "final.prompts": self.prompts,
            "final.temperatures": self.temperatures,
        } | self.fields  # fmt: skip
        words = ["fit", "--config", "tiny", *(["--config", PUBLISHED] if self.published else [])]
        return [*words, *(f"--{key}={value}" for key, value in fields.items())]


def _lr(value: float) -> dict[str, Any]:
    return {"model.learning_rate": value}


def _loss(**weights: float) -> dict[str, Any]:
    return {f"model.loss.{name}": value for name, value in ({"kl": 0.0} | weights).items()}


NORM = {"model.head.anchor_norm": "true"}
MUON = {"model.optimizer": "muon"}

WARM = {"model.head.kind": "target", "model.head.warm_start": "true"}


def _both(change: dict[str, Any], name: str, lr: float, batch: int, published: bool = False) -> Variant:
    return Variant(f"{name}-b{batch}-lr{lr:g}", change | _lr(lr), published, batch)


SCREEN = [
    *(_both({}, "published", lr, 16, published=True) for lr in (1e-3, 2e-3, 4e-3)),
    *(_both({}, "published", lr, 4, published=True) for lr in (1e-3, 2e-3)),
    *(_both(MUON, "muon", lr, 16) for lr in (6e-3, 1.2e-2)),
    *(_both(MUON, "muon", lr, 4) for lr in (3e-3, 6e-3)),
    _both(MUON | NORM, "muon-norm", 6e-3, 4),
    _both(MUON | WARM, "muon-warm", 6e-3, 4),
    _both({}, "adamw", 2e-3, 4),
    _both(NORM, "norm", 2e-3, 4),
]


def finished(variant: Variant) -> dict[str, Any] | None:
    """The record of a finished run of exactly these words."""
    try:
        record = json.loads((variant.folder / "run.json").read_text())
        words = json.loads((variant.folder / "words.json").read_text())
    except (OSError, ValueError):
        return None
    return record if record["status"] == "finished" and words == variant.words() else None


def run(variant: Variant, threads: int) -> None:
    if finished(variant):
        return
    shutil.rmtree(variant.folder, ignore_errors=True)
    variant.folder.parent.mkdir(parents=True, exist_ok=True)
    log = variant.folder.with_name(f"{variant.folder.name}.log")
    words = [sys.executable, "-m", "spd_lightning", *variant.words(), f"--run_dir={variant.folder}"]
    began = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "WANDB_MODE": "disabled"}
    with log.open("w") as out:
        done = subprocess.run(words, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        console.print(f"{variant.folder.name} FAILED, see {log}")
        return
    (variant.folder / "words.json").write_text(json.dumps(variant.words()))
    row = row_of(variant)
    console.print(f"{row['name']} seed {row['seed']}: p {row['p']:.4f}  {time.monotonic() - began:.0f} s")


def row_of(variant: Variant) -> dict[str, Any]:
    record = finished(variant)
    assert record is not None
    results = record["results"]
    final = {row["temperature"]: row for row in results["final"] if row["drafter"] == "trained head"}
    greedy = final[0.0]
    steps = [json.loads(line) for line in (variant.folder / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for line in steps for key, value in line.items()}
    return {
        "name": variant.name, "seed": variant.seed, "words": variant.words()[1:], "batch": variant.batch,
        "tokens": results["tokens"], "seconds": record["seconds"]["train and validate"],
        "p": greedy["acceptance"], "interval": greedy["acceptance_interval"], "S": greedy["theoretical_speedup"],
        "drafts": greedy["drafts_verified"], "by_fill": greedy["by_fill"],
        "p_T1": final[1.0]["acceptance"] if 1.0 in final else None,
        "S_T1": final[1.0]["theoretical_speedup"] if 1.0 in final else None,
        **{f"teacher_forced_{key}": last[f"val/teacher_forced_{key}"] for key in FORCED},
    }  # fmt: skip


def chosen(study: list[Variant], only: str | None) -> Iterator[Variant]:
    return (v for v in study if only is None or any(fnmatch.fnmatch(v.name, part) for part in only.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--only", help="names or patterns, separated by commas")
    parser.add_argument("--list", action="store_true", help="show what there is; run nothing")
    options = parser.parse_args()
    study = STUDIES[options.study]
    if not options.list:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda v: run(v, max(1, (os.cpu_count() or 1) // options.jobs)), chosen(study, options.only)))
    rows = [row_of(v) for v in study if finished(v)]
    for row in sorted(rows, key=lambda row: -row["p"]):
        forced = " ".join(f"{key} {row[f'teacher_forced_{key}']:.4f}" for key in FORCED)
        reached = f"p {row['p']:.4f} S {row['S']:.2f} T1 {row['p_T1'] or 0:.4f}"
        console.print(f"{row['name']:28s} s{row['seed']} {reached} | {forced} | {row['seconds']:.0f} s")
    if not options.list:
        write_record(f"quality_{options.study}", {"rows": rows, "conversations": ROWS}, threads=options.jobs)
        renew_readme(f"quality_{options.study}", markdown(rows), "docs/quality.md")
    return 0


def markdown(rows: list[dict[str, Any]]) -> str:
    """Acceptance beside the best published run's, with what was changed."""
    baseline = max((row for row in rows if row["name"].startswith("published")), key=lambda row: row["p"])
    lines = [
        f"{rows[0]['tokens'] / 1e6:.2f} M training tokens, one seed, 60 held-out prompts x 64 tokens, greedy. The last "
        "column is the rejection rate over that of the best published run.",
        "",
        "| run | batch | p | 95 % | S | teacher-forced top-1 | hit@2 | minutes | (1 - p) ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["p"]):
        low, high = row["interval"]
        ratio = (1 - row["p"]) / (1 - baseline["p"])
        lines.append(
            f"| {row['name']} | {row['batch']} | {row['p']:.3f} | {low:.3f} - {high:.3f} | {row['S']:.2f} | "
            f"{row['teacher_forced_top1']:.3f} | {row['teacher_forced_hit2']:.3f} | {row['seconds'] / 60:.0f} | "
            f"{ratio:.2f} |"
        )
    return "\n".join(lines)


STUDIES = {"screen": SCREEN}

if __name__ == "__main__":
    sys.exit(main())
