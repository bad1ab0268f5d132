"""The price of early re-drafts: what deeper rows know of the token after them, and what acting on it would save.

In cycle e(T) + d_min(k) row (k, T) predicts x_{T+1} once more, from deeper states than the draft had. Where it says
that the token in flight there is wrong, the pipeline could restart at once: the gap is then d_min(k) + 1 instead of n.
Nothing is built for it here: real greedy generations of a trained head are passed through the training view once, all
rows, and the gaps that a policy would have had are added up. A token that is replaced wrongly costs a full restart.

A policy acts where a row gives another token so many times the probability of the one in flight. Its factors, one per
depth, are chosen on the first half of the prompts and priced on the second. One that acts where the other token is the
right one, and nowhere else, shows what is to be had. All are priced on the restarts and drafts of the generation as it
was: what an earlier restart would change in the drafts after it is left out.

    .venv/bin/python benchmarks/redraft.py --run RUN      writes records/redraft.json, renews docs/quality.md

RUN trained on the tiny target with model.loss.deeper_rows: without it deeper rows know nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from common import RECORDS, renew_readme, run_folder, told_by, write_record  # noqa: E402
from tree import NEW, prompts_of  # noqa: E402

from spd_lightning.decoding.decoder import SpdDecoder  # noqa: E402
from spd_lightning.head.layout import StaircaseLayout  # noqa: E402
from spd_lightning.head.loading import load_head  # noqa: E402
from spd_lightning.target.loading import load_target  # noqa: E402

FACTORS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, math.inf)  # the last one never acts


@dataclass(frozen=True)
class Position:
    """A verified position: the target's token, and what each row says, shallow to deep.

    `said[0]` is the draft; `logits[k][token]` is row k's logit of each token that any row says.
    """

    token: int
    said: list[int]
    logits: list[dict[int, float]]


@torch.inference_mode()
def rows_of(run: Path, prompts: list[list[int]]) -> tuple[list[list[Position]], list[int], int]:
    """Positions of each generation; d_min of all rows; n."""
    target = load_target("tiny")
    head = load_head(run, target)
    decoder, n, found = SpdDecoder(target, head), head.staircase.num_stages, []
    for prompt in prompts:
        made = decoder.generate(prompt, NEW)
        whole = [*prompt, *made.token_ids]
        states, _ = target(torch.tensor([whole]), head.config.anchors)
        layout = StaircaseLayout.from_restarts(head.staircase, [made.restart_positions], len(whole))
        logits = head.logits(head(states, layout, all_rows=True))[0]  # [m, S, V_d]
        best = logits.argmax(-1).tolist()
        positions = []
        for at in range(len(prompt), len(whole) - 1):
            rows = [best[k][at] for k in range(len(logits))]
            named = [{head.full_vocabulary_id(t): float(row[at, t]) for t in rows} for row in logits]
            positions.append(Position(whole[at + 1], [head.full_vocabulary_id(t) for t in rows], named))
        found.append(positions)
        gaps = gaps_of(positions, list(head.staircase.first_depths), n, [math.inf] * (len(logits) - 1))
        assert cycles_of(gaps, n) == made.cycles, "a policy that never acts is the generation itself"
    return found, list(head.staircase.first_depths), n


def gaps_of(positions: list[Position], depths: list[int], n: int, factors: list[float] | None) -> list[int]:
    """The gap before every token after the first, where a policy acts: see `priced`."""
    gaps = []
    for position in positions:
        flying, gap = position.said[0], 1
        for index, depth in enumerate(depths[1:]):
            other, logits = position.said[index + 1], position.logits[index + 1]
            if other == flying or depth + 1 >= n:
                continue
            right = factors is None and other == position.token
            if right or (factors is not None and logits[other] - logits[flying] >= math.log(factors[index])):
                flying, gap = other, depth + 1
        gaps.append(gap if flying == position.token else n)
    return gaps


def cycles_of(gaps: list[int], n: int) -> int:
    """Cycles of a generation: up to the entry of the token whose successor is the last, and n until it is verified."""
    return sum(gaps[:-1]) + n if gaps else 0


def priced(
    generations: list[list[Position]], depths: list[int], n: int, factors: list[float] | None
) -> dict[str, float]:
    """What one policy makes of the generations: `factors` per deeper row; None: it acts where that is right."""
    cycles = tokens = caught = alarms = wrong = 0
    for positions in generations:
        gaps = gaps_of(positions, depths, n, factors)
        cycles += cycles_of(gaps, n)
        tokens += len(gaps)
        missed = [position.said[0] != position.token for position in positions]
        wrong += sum(missed)
        caught += sum(miss and gap < n for miss, gap in zip(missed, gaps, strict=True))
        alarms += sum(not miss and gap > 1 for miss, gap in zip(missed, gaps, strict=True))
    return {
        "S": n * tokens / cycles, "caught": caught / max(1, wrong), "false_alarms": alarms / max(1, tokens - wrong)
    }  # fmt: skip


def fitted(generations: list[list[Position]], depths: list[int], n: int) -> list[float]:
    """A factor per deeper row, each chosen in turn for the greatest S, until none changes."""
    factors = [math.inf] * (len(depths) - 1)
    while True:
        before = list(factors)
        for index in range(len(factors)):
            tried = {f: priced(generations, depths, n, [*factors[:index], f, *factors[index + 1 :]]) for f in FACTORS}
            factors[index] = max(FACTORS, key=lambda f: (tried[f]["S"], f))
        if factors == before:
            return factors


def markdown(found: dict[str, Any]) -> str:
    accuracy = zip(found["accuracy"], found["depths"], strict=True)
    lines = [
        f"{found['prompts']} held-out prompts x {NEW} tokens, greedy, priced on the second half. Accuracy of rows "
        f"about the same token, by block: {', '.join(f'{share:.3f} (depth {depth})' for share, depth in accuracy)}.",
        "",
        "| acts where a deeper row says another token | wrong drafts caught | right ones replaced | S | over never |",
        "|---|---|---|---|---|",
    ]
    base = found["policies"][0]["S"]
    for row in found["policies"]:
        lines.append(
            f"| {row['name']} | {row['caught']:.1%} | {row['false_alarms']:.1%} | {row['S']:.2f} | "
            f"{row['S'] / base - 1:+.1%} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=run_folder, required=True, help="a finished run on the tiny target")
    parser.add_argument("--prompts", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with told_by(parser):
        generations, depths, n = rows_of(options.run, prompts_of(200, 200 + options.prompts))
    half = len(generations) // 2
    deeper = len(depths) - 1
    chosen = fitted(generations[:half], depths, n)
    said = ", ".join(
        f"{factor:g} x at depth {depth}" for factor, depth in zip(chosen, depths[1:], strict=True) if factor < math.inf
    )
    policies: list[tuple[str, list[float] | None]] = [
        ("never", [math.inf] * deeper),
        ("at all", [1.0] * deeper),
        *((f"{factor:g} times as likely", [factor] * deeper) for factor in (2.0, 5.0, 30.0)),
        (f"as fitted on the first half: {said or 'nowhere'}", chosen),
        ("and is right (what is to be had)", None),
    ]
    every = [position for positions in generations for position in positions]
    accuracy = [sum(p.token == p.said[k] for p in every) / len(every) for k in range(len(depths))]
    found = {
        "prompts": options.prompts, "depths": depths, "accuracy": accuracy,
        "policies": [{"name": name} | priced(generations[half:], depths, n, policy) for name, policy in policies],
    }  # fmt: skip
    write_record("redraft", found, threads=1)
    renew_readme("redraft", markdown(json.loads((RECORDS / "redraft.json").read_text())), "docs/quality.md")
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
