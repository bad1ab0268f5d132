"""Which levers raise acceptance: heads trained with one thing changed at a time, and what the real decoder accepts.

Every run is `fit` on one target: the same conversations, tokens, stages, layers and anchors. Runs that are finished are
kept and not run again, and a record keeps what it knows of runs of the same words that are not here, so a study can be
stopped, extended, and spread over days and machines.

    .venv/bin/python benchmarks/quality.py screen --jobs 2      runs what is missing, writes records/quality_screen.json
    .venv/bin/python benchmarks/quality.py final --jobs 2       the baseline and the finalists: three seeds, 200 prompts
    .venv/bin/python benchmarks/quality.py second --jobs 2      the same on the target of second_target.py
    .venv/bin/python benchmarks/quality.py four --jobs 2        the same with four stages
    .venv/bin/python benchmarks/quality.py long --jobs 2        the same with twice the tokens
    .venv/bin/python benchmarks/quality.py sampled --jobs 2     levers on responses of temperature 1, teacher-forced
    .venv/bin/python benchmarks/quality.py screen --only "*ce*" --list

A screening run is judged by its own final evaluation (60 prompts, greedy). The heads of the other studies decode more
prompts afterwards, greedy and at temperature 1; what a rejection rate is worth beside the baseline is a ratio with an
interval over prompts and seeds.
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import RECORDS, ROOT, console, renew_readme, write_record
from quality_tables import (
    NEW,
    counts_of_generations,
    forced_markdown,
    judged_markdown,
    judged_rows,
    markdown,
    pooled,
)

RUNS = ROOT / "runs" / "quality"
HELD_OUT = ROOT / "src/spd_lightning/embedded/documentation/heldout.jsonl.gz"
OVERLAY = "recipes/overlays/published.yaml"
#: What all runs share; a number of tokens, not of steps, is what batches of other sizes are compared at.
SHARED = {
    "tracking.wandb": "disabled", "tracking.samples": 0, "final.baselines": "false", "decoding.prompts": 4,
    "trainer.log_every_n_steps": 40, "survival.save_every_minutes": 60,
}  # fmt: skip
#: What a run has unless its change says otherwise, whatever the recipe's own choice is by now; the overlay of the
#: published recipe says all of it.
PLAIN = {
    "model.optimizer": "adamw", "model.adamw_learning_rate": "null", "model.schedule": "cosine",
    "model.final_learning_rate": 0.1, "model.head.anchor_norm": "false", "model.loss.hidden": 0.0,
}  # fmt: skip
#: Words that runs of the time before these fields existed lack: they say what such a run did.
LATER = {"--model.loss.hidden=0.0"}
FORCED = ("kl", "top1", "hit2", "hit4", "alpha")
ROWS = 4480  # conversations of a run: half of the corpus, 0.54 M tokens
OWN = "runs/regenerated/{}/train.jsonl".format
#: Who wrote the assistant's turns: files, and conversations that make as many tokens as `ROWS` original ones. The
#: target wrote them by `data regenerate documentation:train --target tiny --temperature T --max-new-tokens N --out
#: FOLDER`: greedily or at T = 1, and up to 200 tokens or up to 64, which is as far as decoding goes; `again` with
#: `--seed 1`, and `heldout64` to documentation:heldout. The second target wrote its own to the first 6,500 of its
#: training conversations.
RESPONSES: dict[str, tuple[list[str], int]] = {
    "original": ([], ROWS),
    "greedy": (["runs/regenerated/train.jsonl"], 2620),
    "greedy64": ([OWN("greedy64")], 6104),
    "sampled": ([OWN("sampled")], 4336),
    "sampled64": ([OWN("sampled64")], 7312),
    "sampled64-twice": ([OWN("sampled64"), OWN("sampled64-again")], 7312),
    "half-sampled64": (["documentation:train,weight=0.25", f"{OWN('sampled64')},weight=0.41"], 5900),
    "both64": ([f"{OWN('greedy64')},weight=0.4", f"{OWN('sampled64')},weight=0.4"], 6668),
    "second-greedy64": (["runs/second/greedy64/train.jsonl"], 6100),
    "second-sampled64": (["runs/second/sampled64/train.jsonl"], 6340),
}


@dataclass(frozen=True)
class Variant:
    """A run: fields over the tiny recipe, and whether it starts from the published overlay.

    `corpus` is a folder with another target and its conversations (benchmarks/second_target.py); the embedded one
    otherwise. `responses` is who wrote the assistant's turns, see `RESPONSES`; `judged` are the temperatures at which a
    study decodes with it.
    """

    name: str
    fields: dict[str, Any]
    published: bool = False
    batch: int = 16
    seed: int = 0
    prompts: int = 60
    temperatures: str = "[0.0]"
    corpus: Path | None = None
    responses: str = "original"
    judged: tuple[float, ...] = (0.0, 1.0)
    stages: int = 8
    times: int = 1  # the tokens of the other studies

    @property
    def target(self) -> str:
        return "tiny" if self.corpus is None else str(self.corpus / "target")

    def written(self) -> str | None:
        """Which target of second_target.py lies in the folder, where one does: every call makes another."""
        weights = None if self.corpus is None else ROOT / self.corpus / "target" / "model.safetensors"
        return hashlib.sha256(weights.read_bytes()).hexdigest()[:16] if weights and weights.exists() else None

    def held_out(self) -> list[dict[str, Any]]:
        """Conversations that no training has seen."""
        if self.corpus is None:
            text = gzip.decompress(HELD_OUT.read_bytes()).decode()
        else:
            text = (ROOT / self.corpus / "heldout.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    @property
    def folder(self) -> Path:
        return RUNS / f"{self.name}-s{self.seed}"

    def words(self) -> list[str]:
        files, rows = RESPONSES[self.responses]
        steps = self.times * rows // self.batch
        fields = SHARED | {
            "data.batch_size": self.batch, "trainer.max_steps": steps, "trainer.val_check_interval": steps,
            "seed_everything": self.seed, "model.seed": self.seed, "final.prompts": self.prompts,
            "final.temperatures": self.temperatures,
        } | ({} if self.published else PLAIN) | self.fields  # fmt: skip
        if self.corpus is not None:
            train, heldout = (str(self.corpus / f"{split}.jsonl") for split in ("train", "heldout"))
            fields |= {"model.target": self.target, "data.train": train, "data.validation": heldout}
        if files:
            fields |= {"data.train": json.dumps(files)}
        if self.seed:
            fields |= {"data.seed": self.seed}
        if self.stages != 8:
            fields |= {"model.num_stages": self.stages}
        words = ["fit", "--config", "tiny", *(["--config", OVERLAY] if self.published else [])]
        return [*words, *(f"--{key}={value}" for key, value in fields.items())]


def _lr(value: float) -> dict[str, Any]:
    return {"model.learning_rate": value}


def _loss(**weights: float) -> dict[str, Any]:
    return {f"model.loss.{name}": value for name, value in ({"kl": 0.0} | weights).items()}


NORM = {"model.head.anchor_norm": "true"}
MUON = {"model.optimizer": "muon"}

LINEAR = {"model.schedule": "linear", "model.final_learning_rate": 0.0}
DRAWS = {"model.restart_draws": 2}
DEEPER = _loss(kl=1.0, deeper_rows=0.3)
WARM = {"model.head.kind": "target", "model.head.warm_start": "true"}


def _both(change: dict[str, Any], name: str, lr: float, batch: int, published: bool = False) -> Variant:
    return Variant(f"{name}-b{batch}-lr{lr:g}", change | _lr(lr), published, batch)


def _muon(name: str, change: dict[str, Any], lr: float = 6e-3, lm_head: float = 5e-4, batch: int = 4) -> Variant:
    """Muon with a rate of its own for what AdamW takes."""
    return _both(MUON | {"model.adamw_learning_rate": lm_head} | change, name, lr, batch)


def _warm(name: str, change: dict[str, Any]) -> Variant:
    return _muon(name, NORM | LINEAR | WARM | change, lr=2e-3)


BEST_WARM = _warm("best-warm", {})

SCREEN = [
    *(_both({}, "published", lr, 16, published=True) for lr in (2e-3, 4e-3)),
    *(_both({}, "published", lr, 4, published=True) for lr in (1e-3, 2e-3)),
    _both(MUON, "muon", 6e-3, 16),
    *(_both(MUON, "muon", lr, 4) for lr in (3e-3, 6e-3)),
    _muon("muon-lmhead1e-3", {}, lm_head=1e-3),
    _muon("muon-lmhead5e-4", {}),
    _muon("muon-lmhead5e-4-norm", NORM),
    _muon("muon-lmhead5e-4-linear", LINEAR),
    _muon("muon-lmhead5e-4-norm-linear", NORM | LINEAR),
    # one thing left out of the best recipe
    _both(MUON | NORM | LINEAR | {"model.adamw_learning_rate": 6e-3}, "muon-norm-linear", 6e-3, 4),
    *(_both(NORM | LINEAR, "norm-linear", lr, 4) for lr in (1e-3, 2e-3)),
    *(_both(NORM | LINEAR | _loss(kl=1.0, hidden=3.0), "norm-linear-hidden3", lr, 4) for lr in (1e-3, 2e-3)),
    _muon("best-published-restarts", NORM | LINEAR | {"model.restarts": "published"}),
    _muon("muon-lmhead5e-4-norm-linear", NORM | LINEAR, batch=16),
    # one thing added to it, or changed
    _muon("muon-lmhead5e-4-norm-linear", NORM | LINEAR, batch=2),
    _muon("best-lk_hybrid", NORM | LINEAR | _loss(lk_hybrid=1.0)),
    _muon("best-ce", NORM | LINEAR | _loss(kl=1.0, ce=0.5)),
    _muon("best-deeper", NORM | LINEAR | DEEPER),
    BEST_WARM,
    *(_warm(f"best-warm-hidden{weight:g}", _loss(kl=1.0, hidden=weight)) for weight in (1.0, 3.0)),
    *(_muon(f"best-hidden{weight:g}", NORM | LINEAR | _loss(kl=1.0, hidden=weight)) for weight in (1.0, 3.0, 10.0)),
    _muon("best-target-kind", NORM | LINEAR | {"model.head.kind": "target"}),
    _muon("best-restart0.25", NORM | LINEAR | {"model.restart_rate": 0.25}),
    _muon("best-all-anchors", NORM | LINEAR | {"model.head.anchors": "[0,1,2,3,4,5,6,7,8]"}),
    _muon("best-draws2", NORM | LINEAR | DRAWS),
    _muon("best-draws2-deeper", NORM | LINEAR | DRAWS | DEEPER),
    _muon("best-rejected", NORM | LINEAR | DRAWS | {"model.restarts": "rejected"}),
    _muon("best-lmhead3e-4", NORM | LINEAR, lm_head=3e-4),
    _muon("best-lmhead1e-3", NORM | LINEAR, lm_head=1e-3),
    *(_muon("best", NORM | LINEAR, lr=lr) for lr in (2e-3, 1e-2)),
    _muon("best-tv", NORM | LINEAR | _loss(kl=1.0, tv=1.0)),
]


def same(words: list[str], others: list[str]) -> bool:
    """Whether two commands ask for the same run, in whatever order."""
    return set(words) - LATER == set(others) - LATER


def finished(variant: Variant) -> dict[str, Any] | None:
    """The record of a finished run of exactly these words."""
    try:
        record = json.loads((variant.folder / "run.json").read_text())
        words = json.loads((variant.folder / "words.json").read_text())
    except (OSError, ValueError):
        return None
    return record if record["status"] == "finished" and same(words, variant.words()) else None


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
        "commit": record["commit"], "tokens": results["tokens"], "seconds": record["seconds"]["train and validate"],
        "p": greedy["acceptance"], "interval": greedy["acceptance_interval"], "S": greedy["theoretical_speedup"],
        "drafts": greedy["drafts_verified"], "by_fill": greedy["by_fill"],
        "p_T1": final[1.0]["acceptance"] if 1.0 in final else None,
        "S_T1": final[1.0]["theoretical_speedup"] if 1.0 in final else None,
        **{f"teacher_forced_{key}": last[f"val/teacher_forced_{key}"] for key in FORCED},
        "target": variant.written(), "judged": judged_of(variant),
    }  # fmt: skip


def judged_of(variant: Variant) -> dict[str, Any]:
    """By prompt set: counts of every prompt, written as accepted/verified/tokens/cycles, and acceptance by fill."""
    path = variant.folder / "judged.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return {
        key: one | {"counts": " ".join("/".join(map(str, counts)) for counts in one["counts"])}
        for key, one in known.items()
    }


# -- more prompts for the heads of a final study -----------------------------------------------------------------------

PROMPTS = 200
#: Prompt sets besides held-out conversations: a file under the folder of --data, and how many of its prompts.
SETS = {
    "GSM8K": "gsm8k/test.jsonl",
    "HumanEval": "human_eval/HumanEval.jsonl",
    "Spec-Bench": "spec_bench/question.jsonl",
}
OF_A_SET = 40


def prompts_of(variant: Variant, data: Path | None) -> dict[str, list[list[int]]]:
    """Token ids by prompt set; those of the files for the first seed alone."""
    from spd_lightning.bench.prompts import read_prompts, spread
    from spd_lightning.target.loading import load_tokenizer

    tokenizer = load_tokenizer(str(ROOT / variant.target) if variant.corpus else variant.target)
    held_out = variant.held_out()
    sets = {"held-out": [row["messages"][:1] for row in held_out[len(held_out) - PROMPTS :]]}
    if data is not None and variant.seed == 0:
        for name, file in SETS.items():
            chosen = spread([p for p in read_prompts(data / file).prompts if len(p.turns[0]) < 1500], OF_A_SET)
            sets[name] = [[{"role": "user", "content": prompt.turns[0]}] for prompt in chosen]
    template = partial(tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=True, return_dict=False)
    return {name: [template(messages) for messages in chats] for name, chats in sets.items()}


def judge(variant: Variant, data: Path | None) -> str:
    """Decode with the head of a finished run; keeps counts per prompt in the run's judged.json."""
    import torch

    from spd_lightning.decoding.decoder import SpdDecoder
    from spd_lightning.head.loading import load_head
    from spd_lightning.target.loading import load_target
    from spd_lightning.training.run import acceptance_by_fill

    path = variant.folder / "judged.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    torch.set_num_threads(1)
    target = load_target(str(ROOT / variant.target) if variant.corpus else variant.target)
    decoder = SpdDecoder(target, load_head(variant.folder, target))
    for name, prompts in prompts_of(variant, data).items():
        for temperature in variant.judged:
            key = f"{name} T={temperature:g}"
            if key in known:
                continue
            made = [decoder.generate(ids, NEW, temperature, seed=number) for number, ids in enumerate(prompts)]
            known[key] = {
                "counts": counts_of_generations(made),
                "by_fill": acceptance_by_fill(made),
            }
            path.write_text(json.dumps(known))
    found = {key: pooled(np.array(one["counts"]), variant.stages)["p"] for key, one in known.items()}
    return f"{variant.name} seed {variant.seed}: " + ", ".join(f"{key} p {p:.4f}" for key, p in found.items())


def known_rows(study: list[Variant], record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per variant that is finished here, or that the record has under the same words."""
    recorded = {(row["name"], row["seed"]): row for row in record["rows"]}
    rows = []
    for variant in study:
        row = recorded.get((variant.name, variant.seed))
        target = variant.written()
        another_target = target is not None and row is not None and row.get("target") != target
        if row is not None and (another_target or not same(row["words"], variant.words()[1:])):
            console.print(f"{variant.name} seed {variant.seed}: what the record has is of another run, and dropped")
            row = None
        if finished(variant):
            ours = row_of(variant)
            same_run = row is not None and row["seconds"] == ours["seconds"]
            row = ours | {"judged": row["judged"] | ours["judged"]} if row is not None and same_run else ours
        if row is not None:
            rows.append(row)
    return rows


def chosen(study: list[Variant], only: str | None) -> Iterator[Variant]:
    """Those whose name, or name-sSEED, fits one of the patterns."""
    patterns = ["*"] if only is None else only.split(",")
    return (v for v in study if any(fnmatch.fnmatch(name, p) for p in patterns for name in (v.name, v.folder.name)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--only", help="names or patterns of names, or of name-sSEED, separated by commas")
    parser.add_argument("--list", action="store_true", help="show what there is; run nothing")
    parser.add_argument("--data", type=Path, help="final: folder with gsm8k, human_eval and spec_bench")
    options = parser.parse_args()
    missing = [] if options.data is None else [file for file in SETS.values() if not (options.data / file).is_file()]
    if missing:
        parser.error(f"--data {options.data}: expected a folder with {', '.join(missing)}")
    study = STUDIES[options.study]
    if not options.list:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that judge
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda v: run(v, options.threads), chosen(study, options.only)))
        if options.study in BASELINES:
            heads = [variant for variant in chosen(study, options.only) if finished(variant)]
            with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as processes:
                for line in processes.map(partial(judge, data=options.data), heads):
                    console.print(line)
    path = RECORDS / f"quality_{options.study}.json"
    record = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = known_rows(study, record)
    for row in sorted(rows, key=lambda row: -row["p"]):
        forced = " ".join(f"{key} {row[f'teacher_forced_{key}']:.4f}" for key in FORCED)
        reached = f"p {row['p']:.4f} S {row['S']:.2f} T1 {row['p_T1'] or 0:.4f}"
        console.print(f"{row['name']:28s} s{row['seed']} {reached} | {forced} | {row['seconds']:.0f} s")
    if rows and not options.list:
        found: dict[str, Any] = {"rows": rows}
        if baseline := BASELINES.get(options.study):
            stages = {variant.name: variant.stages for variant in study}
            found["judged"] = judged_rows(rows, stages, baseline, record.get("judged", []))
            table = judged_markdown(found["judged"], baseline)
        else:
            table = {"screen": markdown, "sampled": forced_markdown}[options.study](rows)
        write_record(f"quality_{options.study}", found, threads=options.jobs)
        renew_readme(f"quality_{options.study}", table, "docs/quality.md")
    return 0


def _seeds(variant: Variant) -> list[Variant]:
    return [replace(variant, seed=seed) for seed in range(3)]


BEST = _muon("muon-lmhead5e-4-norm-linear", NORM | LINEAR)
BEST_DRAWS = _muon("best-draws2", NORM | LINEAR | DRAWS)
BEST_DEEPER = _muon("best-draws2-deeper", NORM | LINEAR | DRAWS | DEEPER)
#: What a decoder at temperature 1 gains from, all together: it rejects more often than a greedy one.
BEST_ALL = _muon("best-all", NORM | LINEAR | DRAWS | DEEPER | {"model.restart_rate": 0.2})
PUBLISHED = _both({}, "published", 1e-3, 4, published=True)
#: Everything but `hidden` that lowers the teacher-forced KL or raises alpha at temperature 1.
WARM_ALL = _warm("best-warm-all", DRAWS | DEEPER | {"model.loss.tv": 1.0})
BEST_HIDDEN = _muon("best-hidden3", NORM | LINEAR | _loss(kl=1.0, hidden=3.0))
HIDDEN_TV = _muon("best-hidden3-tv", NORM | LINEAR | _loss(kl=1.0, hidden=3.0, tv=1.0))
#: Folder of benchmarks/second_target.py.
SECOND = Path("runs/second")


def _sampled(variant: Variant, name: str) -> Variant:
    """Trained and judged on what the target itself writes at temperature 1; it decodes little."""
    fields = variant.fields | {"data.validation": OWN("heldout64"), "data.validation_samples": 392}
    return replace(variant, name=f"sampled-{name}", fields=fields, responses="sampled64", prompts=8)


WARM_HIDDEN_TV = _warm("", _loss(kl=1.0, hidden=10.0, tv=1.0))
SAMPLED_WARM_HIDDEN = replace(_sampled(WARM_HIDDEN_TV, "warm-hidden10-tv"), judged=(1.0,))
SAMPLED_HIDDEN = replace(_sampled(HIDDEN_TV, "hidden3-tv"), judged=(1.0,))
SAMPLED_ALL = replace(_sampled(WARM_ALL, "warm-all"), judged=(1.0,))
FINAL = [
    *_seeds(PUBLISHED),
    # the baseline's other rates and batches, on the same prompts
    *(_both({}, "published", lr, 4, published=True) for lr in (5e-4, 2e-3)),
    _both({}, "published", 1e-3, 2, published=True),
    *_seeds(BEST),
    *_seeds(BEST_DRAWS),
    *_seeds(BEST_DEEPER),
    *_seeds(BEST_WARM),
    *_seeds(BEST_HIDDEN),
    replace(BEST, name="best-greedy", responses="greedy", judged=(0.0,)),
    *_seeds(replace(BEST, name="best-greedy64", responses="greedy64", judged=(0.0,))),
    *(
        replace(BEST, name=f"best-{kind}", responses=kind)
        for kind in ("sampled", "sampled64", "half-sampled64", "both64")
    ),
    *_seeds(replace(BEST_DRAWS, name="best-draws2-sampled64", responses="sampled64", judged=(1.0,))),
    *_seeds(replace(BEST_ALL, name="best-all-sampled64", responses="sampled64", judged=(1.0,))),
    SAMPLED_ALL,
    *_seeds(SAMPLED_HIDDEN),
    *_seeds(SAMPLED_WARM_HIDDEN),
]
OTHER = [
    replace(variant, name=f"second-{variant.name}", corpus=SECOND)
    for variant in (
        *_seeds(PUBLISHED),
        *_seeds(BEST_DRAWS),
        *_seeds(BEST_HIDDEN),
        replace(BEST_HIDDEN, name="best-hidden3-greedy64", responses="second-greedy64", judged=(0.0,)),
        replace(HIDDEN_TV, name="best-hidden3-tv-sampled64", responses="second-sampled64", judged=(1.0,)),
    )
]
FOUR = [replace(variant, name=f"n4-{variant.name}", stages=4) for variant in (PUBLISHED, BEST, BEST_HIDDEN)]

SAMPLED_BEST = _sampled(BEST, "best")
SAMPLED_TV = _sampled(_muon("", NORM | LINEAR | _loss(kl=1.0, tv=1.0)), "best-tv")
TWICE = [
    replace(variant, name=f"{variant.name}-twice", responses="sampled64-twice", times=2, judged=(1.0,))
    for variant in (SAMPLED_BEST, SAMPLED_TV)
]
# studies share them: not to be run at the same time
LEVERS = [SAMPLED_BEST, SAMPLED_TV, *TWICE, SAMPLED_ALL, SAMPLED_HIDDEN, SAMPLED_WARM_HIDDEN]
LONG = [*(replace(variant, name=f"long-{variant.name}", times=2) for variant in (PUBLISHED, BEST, BEST_HIDDEN)), *TWICE]

STUDIES = {"screen": SCREEN, "final": FINAL, "second": OTHER, "four": FOUR, "long": LONG, "sampled": LEVERS}
#: Studies whose heads decode more prompts, and the recipe that the others are held against.
BASELINES = {
    "final": PUBLISHED.name, "second": f"second-{PUBLISHED.name}", "four": f"n4-{PUBLISHED.name}",
    "long": f"long-{PUBLISHED.name}",
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
