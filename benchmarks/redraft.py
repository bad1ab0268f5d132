"""The price of early re-drafts: what deeper rows know of the token after them, and what acting on it would save.

In cycle e(T) + d_min(k) row (k, T) predicts x_{T+1} once more, from deeper states than the draft had. Where it says
that the token in flight there is wrong, the pipeline could restart at once: the gap is then d_min(k) + 1 instead of n.
Nothing is built for it here: real greedy generations of a trained head are passed through the training view once, all
rows, and the gaps that a policy would have had are added up. A token that is replaced wrongly costs a full restart.

    .venv/bin/python benchmarks/redraft.py --run runs/tiny      writes records/redraft.json, renews docs/quality.md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
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

THRESHOLDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01)  # the last one never acts

#: Of one verified position: the target's token, then (token, probability) of each row, shallow to deep.
Position = tuple[int, list[tuple[int, float]]]


@torch.inference_mode()
def rows_of(run: Path, prompts: list[list[int]]) -> tuple[list[list[Position]], list[int], int]:
    """Positions of each generation; d_min of the rows; n."""
    target = load_target("tiny")
    head = load_head(run, target)
    decoder, found = SpdDecoder(target, head), []
    for prompt in prompts:
        made = decoder.generate(prompt, NEW)
        whole = [*prompt, *made.token_ids]
        states, _ = target(torch.tensor([whole]), head.config.anchors)
        layout = StaircaseLayout.from_restarts(head.staircase, [made.restart_positions], len(whole))
        laws = head.logits(head(states, layout, all_rows=True))[0].softmax(-1)  # [m, S, V_d]
        best = laws.max(-1)
        positions = []
        for at in range(len(prompt), len(whole) - 1):
            said = [
                (head.full_vocabulary_id(int(best.indices[k, at])), float(best.values[k, at])) for k in range(len(laws))
            ]
            positions.append((whole[at + 1], said))
        found.append(positions)
    return found, list(head.staircase.first_depths), head.staircase.num_stages


def priced(generations: list[list[Position]], depths: list[int], n: int, threshold: float) -> dict[str, float]:
    """S if a deeper row that is at least so sure of another token replaced the one in flight."""
    cycles = tokens = caught = alarms = wrong = 0
    for positions in generations:
        cycles += n - 1
        for token, said in positions:
            flying, gap = said[0][0], 1
            for depth, (other, sure) in zip(depths[1:], said[1:], strict=True):
                if other != flying and sure >= threshold and depth + 1 < n:
                    flying, gap = other, depth + 1
            wrong += said[0][0] != token
            caught += said[0][0] != token == flying
            alarms += said[0][0] == token != flying
            cycles += gap if flying == token else n
            tokens += 1
    return {
        "threshold": threshold, "S": n * tokens / cycles, "caught": caught / max(1, wrong),
        "false_alarms": alarms / max(1, tokens - wrong),
    }  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    lines = [
        f"{found['prompts']} held-out prompts x {NEW} tokens, greedy. Accuracy of rows about the same token, by block: "
        + ", ".join(f"{share:.3f} (depth {d})" for d, share in zip(found["depths"], found["accuracy"], strict=True))
        + ".",
        "",
        "| acts where a deeper row is surer than | wrong drafts caught | right drafts replaced | S | over none |",
        "|---|---|---|---|---|",
    ]
    base = found["policies"][-1]["S"]
    for row in found["policies"]:
        name = "never" if row["threshold"] > 1 else f"{row['threshold']:g}"
        lines.append(
            f"| {name} | {row['caught']:.1%} | {row['false_alarms']:.1%} | {row['S']:.2f} | "
            f"{row['S'] / base - 1:+.1%} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run of the tiny recipe")
    parser.add_argument("--prompts", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generations, depths, n = rows_of(options.run, prompts_of(200, 200 + options.prompts))
    every = [position for positions in generations for position in positions]
    found = {
        "prompts": options.prompts, "depths": depths,
        "accuracy": [sum(token == said[k][0] for token, said in every) / len(every) for k in range(len(depths))],
        "policies": [priced(generations, depths, n, threshold) for threshold in THRESHOLDS],
    }  # fmt: skip
    write_record("redraft", found, threads=1)
    renew_readme("redraft", markdown(json.loads((RECORDS / "redraft.json").read_text())), "docs/quality.md")
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
