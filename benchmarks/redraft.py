"""The price of early re-drafts: what deeper rows know of the token after them, and what acting on it would save.

In cycle e(T) + d_min(k) row (k, T) predicts x_{T+1} once more, from deeper states than the draft had. Where it says
that the token in flight there is wrong, the pipeline could restart at once: the gap is then d_min(k) + 1 instead of n.
Nothing is built for it here: real greedy generations of a trained head are passed through the training view once, all
rows, and the gaps that a policy would have had are added up. A token that is replaced wrongly costs a full restart.

A policy acts where a row gives another token so many times the probability of the one in flight. Its factors, one per
depth, are chosen on the first half of the prompts and priced on the second. What no policy can pass is the S of one
that acts where the other token is the right one, and nowhere else.

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
from common import RECORDS, renew_readme, write_record  # noqa: E402
from tree import NEW, prompts_of  # noqa: E402

from spd_lightning.decoding.decoder import SpdDecoder  # noqa: E402
from spd_lightning.head.layout import StaircaseLayout  # noqa: E402
from spd_lightning.head.loading import load_head  # noqa: E402
from spd_lightning.target.loading import load_target  # noqa: E402

FACTORS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, math.inf)  # the last one never acts


@dataclass(frozen=True)
class Position:
    """A verified position: the target's token, the draft, and of each deeper row its token and how much it prefers it.

    `others` holds, shallow to deep, (token, its probability over that of the draft in the same row).
    """

    token: int
    draft: int
    others: list[tuple[int, float]]


@torch.inference_mode()
def rows_of(run: Path, prompts: list[list[int]]) -> tuple[list[list[Position]], list[int], int]:
    """Positions of each generation; d_min of all rows; n."""
    target = load_target("tiny")
    head = load_head(run, target)
    decoder, found = SpdDecoder(target, head), []
    for prompt in prompts:
        made = decoder.generate(prompt, NEW)
        whole = [*prompt, *made.token_ids]
        states, _ = target(torch.tensor([whole]), head.config.anchors)
        layout = StaircaseLayout.from_restarts(head.staircase, [made.restart_positions], len(whole))
        logits = head.logits(head(states, layout, all_rows=True))[0]  # [m, S, V_d]
        best = logits.max(-1)
        positions = []
        for at in range(len(prompt), len(whole) - 1):
            draft = int(best.indices[0, at])
            others = [
                (int(best.indices[k, at]), float((best.values[k, at] - logits[k, at, draft]).exp()))
                for k in range(1, len(logits))
            ]
            named = [(head.full_vocabulary_id(token), factor) for token, factor in others]
            positions.append(Position(whole[at + 1], head.full_vocabulary_id(draft), named))
        found.append(positions)
    return found, list(head.staircase.first_depths), head.staircase.num_stages


def priced(
    generations: list[list[Position]], depths: list[int], n: int, factors: list[float] | None
) -> dict[str, float]:
    """What one policy makes of the generations: `factors` per deeper row; None: it acts where that is right."""
    cycles = tokens = caught = alarms = wrong = 0
    for positions in generations:
        cycles += n - 1
        for position in positions:
            flying, gap = position.draft, 1
            for index, (depth, (other, factor)) in enumerate(zip(depths[1:], position.others, strict=True)):
                acts = other == position.token if factors is None else factor >= factors[index]
                if other != flying and acts and depth + 1 < n:
                    flying, gap = other, depth + 1
                    if factors is None:
                        break
            missed = position.draft != position.token
            wrong += missed
            caught += missed and flying == position.token
            alarms += not missed and flying != position.token
            cycles += gap if flying == position.token else n
            tokens += 1
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
    parser.add_argument("--run", type=Path, required=True, help="a finished run on the tiny target")
    parser.add_argument("--prompts", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
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
        ("and is right (no policy can pass this)", None),
    ]
    every = [position for positions in generations for position in positions]
    accuracy = [sum(p.token == p.draft for p in every) / len(every)]
    accuracy += [sum(p.token == p.others[k][0] for p in every) / len(every) for k in range(deeper)]
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
