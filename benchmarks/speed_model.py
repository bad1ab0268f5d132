"""The speed model against the clock: predicted S and tokens per second of designs, beside measured ones.

Two ranks of one thread each measure a hardware profile of a target, as `spd-lightning profile` does, and then decode
with heads of several designs on the same two ranks, n = 2, in the same run. Verdicts are a coin's (forced acceptance),
so that predictions and measurements are about the same p. Trained heads then: S from their acceptance by fill alone.

    .venv/bin/python benchmarks/speed_model.py --run runs/tiny      writes records/speed_model.json; some minutes
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from common import RECORDS, cores_of_others, renew_readme, write_record  # noqa: E402
from pipeline import QUIET, SIZES, leave, target_of  # noqa: E402

from spd_lightning.decoding.launch import launched, member  # noqa: E402
from spd_lightning.decoding.pipeline import PipelineDecoder  # noqa: E402
from spd_lightning.decoding.workers import run_ranks  # noqa: E402
from spd_lightning.head.loading import new_head  # noqa: E402
from spd_lightning.speed.measure import measure_profile  # noqa: E402
from spd_lightning.speed.model import Design, places, predict  # noqa: E402
from spd_lightning.target.loading import load_target  # noqa: E402
from spd_lightning.target.target import Target  # noqa: E402

#: (target, layers per stage, head layers, draft ids, acceptance).
DESIGNS = (
    ("tiny", (4, 4), 1, 4096, 0.7),
    ("tiny", (4, 4), 1, 4096, 0.9),
    ("tiny", (1, 7), 1, 1024, 0.8),
    ("tiny", (3, 5), 2, 4096, 0.8),
    ("150M", (9, 9), 1, 4096, 0.7),
    ("150M", (9, 9), 1, 4096, 0.9),
    ("150M", (7, 11), 1, 16384, 0.8),
    ("150M", (5, 13), 2, 4096, 0.8),
    ("150M", (5, 13), 3, 4096, 0.9),
)
NEW, PROMPT = 96, 64
SPEED = "tokens_per_second"


def target_named(name: str) -> Target:
    return load_target("tiny") if name == "tiny" else target_of(SIZES[name])


def as_rank(options: argparse.Namespace) -> None:
    """Rounds of profile and designs, one after another: the machine is never the same for long."""
    torch.set_num_threads(1)
    with member() as me:
        rounds: list[dict[str, Any]] = []
        for number in range(options.rounds):
            for name in dict.fromkeys(design[0] for design in DESIGNS):
                rounds.append(one_round(name, number, me.rank, me.world))
                if me.rank == me.world - 1:
                    print(f"round {number + 1} of {options.rounds}: {name} done", file=sys.stderr, flush=True)
        if me.rank == me.world - 1:
            Path(options.raw).write_text(json.dumps({"rounds": rounds, "designs": summed_up(rounds)}))


def one_round(name: str, number: int, rank: int, world: int) -> dict[str, Any]:
    profile = measure_profile(target_named(name), name, rank, world)
    costs = {
        "plain": profile.plain, "layer": statistics.mean(profile.layers), "embedding": profile.embedding,
        "verification": profile.verification, "head": vars(profile.head), "link": vars(profile.link),
    }  # fmt: skip
    rows = []
    for index, (of, split, head_layers, ids, p) in enumerate(DESIGNS):
        if of != name:
            continue
        target = target_named(name)
        target.partition(stage_layers=split)
        head = new_head(target, head_layers, draft_token_ids=range(ids)).eval()
        decoder = PipelineDecoder(target, head)
        found = []
        for seed in (number, 1000 + number):  # the first one warms up
            dist.barrier()
            if decoder.leads:
                prompt = [i * 37 % target.vocab_size for i in range(PROMPT)]
                found.append(decoder.generate(prompt, NEW, eos_token_id=[], forced_acceptance=p, seed=seed))
            else:
                decoder.follow(generations=1)
        leave(decoder)
        predicted = predict(profile, Design(tuple(split), head_layers, len(head.config.anchors), ids), [p], NEW - 1)
        rows.append(
            {
                "design": index, "predicted_S": predicted.S,
                "predicted_tokens_per_second": predicted.tokens_per_second,
                "predicted_over_plain": predicted.speedup,
                "S": statistics.mean(one.theoretical_speedup or 0.0 for one in found[1:]) if found else None,
                "tokens_per_second": statistics.median((NEW - 1) / one.decode_seconds for one in found[1:])
                if found
                else None,
            }
        )  # fmt: skip
    return {"target": name, "round": number, "profile": costs, "rows": rows}


def summed_up(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over rounds, and the error of every round: its prediction against its own measurement."""
    designs = []
    for index, (name, split, head_layers, ids, p) in enumerate(DESIGNS):
        rows = [row for one in rounds for row in one["rows"] if row["design"] == index]
        names = ("S", "predicted_S", "tokens_per_second", "predicted_tokens_per_second", "predicted_over_plain")
        designs.append(
            {"target": name, "stage_layers": list(split), "head_layers": head_layers, "draft_ids": ids, "acceptance": p}
            | {key: statistics.median(row[key] for row in rows) for key in names}
            | {f"errors_of_{key}": [row[f"predicted_{key}"] / row[key] - 1 for row in rows] for key in ("S", SPEED)}
        )
    return designs


def trained(run: Path) -> list[dict[str, Any]]:
    """p and S of a finished run's drafters from nothing but acceptance by fill, beside what its decoding measured."""
    rows = []
    for row in json.loads((run / "run.json").read_text())["results"]["final"]:
        if row["by_fill"]:
            n, length = row["num_stages"], round(row["new_tokens"] / row["generations"]) - 1
            by_fill = {entry["fill"]: entry["top1"] for entry in row["by_fill"]}
            shares = [by_fill.get(fill, row["acceptance"]) for fill in range(1, n + 1)]
            found, _ = places(shares, n + 1, length)
            rows.append(
                {
                    "drafter": row["drafter"], "temperature": row["temperature"], "n": n, "p": row["acceptance"],
                    "predicted_p": sum(share * p for share, p in zip(found, [*shares, shares[-1]], strict=True)),
                    "S": row["theoretical_speedup"], "predicted_S": n / (1 + (n - 1) * found[0]),
                }
            )  # fmt: skip
    return rows


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "| target | stages | head layers | draft ids | p | S | predicted | tokens/s | predicted | errors, by round |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["designs"]:
        lines.append(
            f"| {row['target']} | {row['stage_layers']} | {row['head_layers']} | {row['draft_ids']:,} | "
            f"{row['acceptance']:g} | {row['S']:.2f} | {row['predicted_S']:.2f} | "
            f"{row['tokens_per_second']:.1f} | {row['predicted_tokens_per_second']:.1f} | "
            f"{', '.join(f'{error:+.0%}' for error in row['errors_of_tokens_per_second'])} |"
        )
    errors = [abs(error) for row in found["designs"] for error in row["errors_of_tokens_per_second"]]
    of_S = [abs(error) for row in found["designs"] for error in row["errors_of_S"]]
    lines += [
        "",
        f"Single predictions of tokens per second are off by {statistics.mean(errors):.0%} on average and "
        f"{max(errors):.0%} at most, those of S by {statistics.mean(of_S):.0%} and {max(of_S):.0%} (one generation of "
        f"{NEW} tokens each). Two ranks of one thread on two cores, n = 2; figures are medians of {found['repeats']} "
        "rounds, in each of which the profile is measured anew, because the machine's speed drifts.",
    ]
    if found["trained"]:
        lines += [
            "",
            "Drafters of a real run, p and S from acceptance by fill and the mean length of its generations alone:",
            "",
        ]
        lines += ["| drafter | T | n | p | predicted | S | predicted | error |", "|---|---|---|---|---|---|---|---|"]
        for row in found["trained"]:
            lines.append(
                f"| {row['drafter']} | {row['temperature']:g} | {row['n']} | {row['p']:.3f} | "
                f"{row['predicted_p']:.3f} | {row['S']:.2f} | {row['predicted_S']:.2f} | "
                f"{row['predicted_S'] / row['S'] - 1:+.1%} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", type=Path, help="a finished run of the tiny recipe")
    parser.add_argument("--anyway", action="store_true", help="also where other processes keep the cores busy")
    parser.add_argument("--raw", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="renew docs/speed.md from the record, measure nothing")
    options = parser.parse_args()
    if options.table:
        renew_readme("speed_model", markdown(json.loads((RECORDS / "speed_model.json").read_text())), "docs/speed.md")
        return 0
    if launched():
        as_rank(options)
        return 0
    busy = cores_of_others()
    if busy is not None and busy > QUIET and not options.anyway:
        print(f"Other processes keep {busy} cores busy: end them, or measure --anyway, for a try.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "found.json"
        status = run_ranks([sys.executable, *sys.argv, "--raw", str(raw)], 2, threads=1)
        if status:
            return status
        found = json.loads(raw.read_text()) | {"repeats": options.rounds}
    found["trained"] = trained(options.run) if options.run else []
    write_record("speed_model", {"cores_of_others_before": busy, **found}, threads=1)
    print(markdown(found))
    if not options.anyway:
        renew_readme("speed_model", markdown(found), "docs/speed.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
