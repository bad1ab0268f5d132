"""Does the head cost time? Cycles with heads of growing size on a rank of their own, against a head that costs nothing.

Three ranks need three cores, and small machines have two. So the whole target is stage 0, and stage 1 is empty: it
verifies over a vocabulary of 64 ids and hardly works. Stage 0 and the head then have a core each, which is all that
matters here; n = 2, hand-over, verdicts and restarts are the real ones. The reference is prompt lookup in the head's
place. Random fp32 weights, forced acceptance; all heads take turns in ONE run.

    .venv/bin/python benchmarks/hidden_head.py           writes records/hidden_head.json, about 7 minutes
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
from common import RECORDS, cores_of_others, renew_readme, write_record  # noqa: E402
from pipeline import Size, leave, numbers, target_of  # noqa: E402

from spd_lightning.decoding.drafters import PromptLookupDrafter  # noqa: E402
from spd_lightning.decoding.launch import launched, member  # noqa: E402
from spd_lightning.decoding.pipeline import PipelineDecoder  # noqa: E402
from spd_lightning.decoding.trace import Work, breakdown  # noqa: E402
from spd_lightning.decoding.workers import run_ranks  # noqa: E402
from spd_lightning.head.loading import new_head  # noqa: E402
from spd_lightning.staircase import Staircase  # noqa: E402

SIZE = Size(hidden=768, intermediate=2048, layers=8, vocab=64)
HEAD_LAYERS = (1, 2, 4, 6, 8, 10)
ACCEPTANCES = (0.85, 1.0)
PROMPT, NEW = 16, 128


def measure(repeats: int, leads: bool) -> list[dict[str, Any]]:
    """Rows per acceptance and head: milliseconds of stage, head and cycle, and the ratio to the empty head's cycle."""
    target = target_of(SIZE).partition(stage_layers=(SIZE.layers, 0))
    staircase = Staircase((SIZE.layers, 0), (0, SIZE.layers))
    drafters: dict[int, Any] = {0: PromptLookupDrafter(staircase, SIZE.vocab)}
    drafters |= {count: new_head(target, num_layers=count, anchors=staircase.anchors).eval() for count in HEAD_LAYERS}
    decoders = {count: PipelineDecoder(target, drafter, traced=True) for count, drafter in drafters.items()}
    prompt = [i * 37 % SIZE.vocab for i in range(PROMPT)]
    found: dict[tuple[float, int], list[dict[str, float]]] = {}
    for number in range(repeats + 1):  # the first one warms up
        for p in ACCEPTANCES:
            for count, decoder in decoders.items():
                if leads:
                    one = decoder.generate(prompt, NEW, eos_token_id=[], forced_acceptance=p, seed=number)
                else:
                    decoder.follow(generations=1)
                spans = decoder.spans_of_all()
                if leads and number:
                    parts = breakdown(spans, one.cycles)
                    found.setdefault((p, count), []).append(
                        {
                            "cycle": 1e3 * one.decode_seconds / one.cycles,
                            "stage": parts.parts[0][Work.STAGE],
                            "head": parts.parts[2][Work.HEAD],
                        }
                    )
    for decoder in decoders.values():
        leave(decoder)
    layer = numbers(target.layer(0))
    return [
        {
            "acceptance": p,
            "head_layers": count,
            "bytes_over_stage": (numbers(drafters[count]) if count else 0) / (SIZE.layers * layer),
            **{f"{what}_ms": statistics.median(turn[what] for turn in turns) for what in ("stage", "head", "cycle")},
            "cycle_over_empty_head": statistics.median(
                turn["cycle"] / empty["cycle"] for turn, empty in zip(turns, found[p, 0], strict=True)
            ),
        }
        for (p, count), turns in found.items()
    ]


def as_rank(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with member() as me:
        rows = measure(options.repeats, leads=me.rank == 1)
        if rows:
            Path(options.raw).write_text(json.dumps({"rows": rows}))


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| p | head layers | head, bytes of the stage | stage, ms | head, ms | cycle, ms | beyond the stage, ms | "
        "over the empty head's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['acceptance']:g} | {row['head_layers'] or 'none'} | {row['bytes_over_stage']:.2f} | "
            f"{row['stage_ms']:.2f} | {row['head_ms']:.2f} | {row['cycle_ms']:.2f} | "
            f"{row['cycle_ms'] - row['stage_ms']:.2f} | {row['cycle_over_empty_head']:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--raw", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="renew docs/pipeline.md from the record, measure nothing")
    options = parser.parse_args()
    if options.table:
        rows = json.loads((RECORDS / "hidden_head.json").read_text())["rows"]
        renew_readme("hidden head", markdown(rows), "docs/pipeline.md")
        return 0
    if launched():
        as_rank(options)
        return 0
    busy = cores_of_others()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "found.json"
        status = run_ranks([sys.executable, *sys.argv, "--raw", str(raw)], 3, threads=1)
        if status:
            return status
        found = json.loads(raw.read_text())
    write_record("hidden_head", {"cores_of_others_before": busy, **found}, threads=1)
    print(markdown(found["rows"]))
    renew_readme("hidden head", markdown(found["rows"]), "docs/pipeline.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
