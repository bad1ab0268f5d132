"""Which drafts are rejected: acceptance by what the token is, where it stands and how sure the target is of it.

Real generations of one head are passed through the training view once, with the restarts that they had: this gives the
law that every draft came from, and with it the rank that the target's token had there. What limits a head shows in the
rows that hold most rejections: few of them at certain positions, many where the target itself is unsure.

    .venv/bin/python benchmarks/rejections.py --run runs/tiny    writes records/rejections.json, renews docs/quality.md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from common import RECORDS, console, renew_readme, run_folder, told_by, write_record  # noqa: E402
from tree import NEW, prompts_of  # noqa: E402

from spd_lightning.decoding.decoder import SpdDecoder  # noqa: E402
from spd_lightning.head.layout import StaircaseLayout  # noqa: E402
from spd_lightning.head.loading import load_head  # noqa: E402
from spd_lightning.target.loading import load_target, load_tokenizer  # noqa: E402


@dataclass(frozen=True)
class Verdict:
    """One verified draft: whether it was kept, the rank of the target's token in its law, alpha, and its classes."""

    kept: bool
    rank: int
    alpha: float
    classes: dict[str, str]


def kind_of(text: str) -> str:
    """What a token is, from the text it stands for."""
    if not text.strip():
        return "line break" if "\n" in text else "space"
    if text.strip()[0].isalpha() or text.strip()[0] == "_":
        return "begins a word" if text[0].isspace() else "goes on in a word"
    return "number" if text.strip()[0].isdigit() else "punctuation"


def sureness(probability: float) -> str:
    return next(name for least, name in ((0.9, "over .9"), (0.5, ".5 to .9"), (0.0, "under .5")) if probability > least)


def repeats(ids: list[int], at: int, width: int = 2) -> bool:
    """Whether token `at` and the `width` tokens before it stand earlier in the text, too."""
    piece = ids[at - width : at + 1]
    return any(ids[i : i + width + 1] == piece for i in range(at - width))


@torch.inference_mode()
def verdicts(run: Path, prompts: list[list[int]], temperature: float) -> Iterator[Verdict]:
    target, tokenizer = load_target("tiny"), load_tokenizer("tiny")
    head = load_head(run, target)
    assert head.draft_token_ids is None, "laws are compared over the whole vocabulary"
    decoder, ends = SpdDecoder(target, head), target.end_of_sequence_ids()
    for number, prompt in enumerate(prompts):
        made = decoder.generate(prompt, NEW, temperature, seed=number)
        ids = [*prompt, *made.token_ids]
        states, last = target(torch.tensor([ids]), head.config.anchors)
        layout = StaircaseLayout.from_restarts(head.staircase, [made.restart_positions], len(ids))
        drafted = head.logits(head(states, layout))[0, len(prompt) : -1]
        verified = target.logits(last[0, len(prompt) : -1])
        said = torch.tensor(ids[len(prompt) + 1 :])
        ranks = (drafted > drafted.gather(-1, said[:, None])).sum(-1)
        probabilities, law = (logits.softmax(-1) for logits in (verified, drafted))
        alphas = torch.minimum(probabilities, law).sum(-1)
        fills = layout.fills()[0, len(prompt) : -1].tolist()
        for index, kept in enumerate(made.accepted_flags):
            at = len(prompt) + 1 + index
            classes = {
                "the token": "ends the text" if ids[at] in ends else kind_of(tokenizer.decode(ids[at])),
                "the target's greatest probability": sureness(float(probabilities[index].max())),
                "with the two before it": "stood there before" if repeats(ids, at) else "is new",
                "its place among the drafted ones": f"{index // 16 * 16 + 1} to {index // 16 * 16 + 16}",
                "drafted at fill": str(fills[index]),
            }
            yield Verdict(kept, int(ranks[index]), float(alphas[index]), classes)


def counted(found: list[Verdict]) -> list[dict[str, Any]]:
    """Per class: share of all drafts, p, hits at 2 and 4, alpha, share of all rejections."""
    rejected = sum(not v.kept for v in found)
    rows = []
    for name in found[0].classes:
        for value in sorted({v.classes[name] for v in found}, key=lambda text: (len(text), text)):
            these = [v for v in found if v.classes[name] == value]
            rows.append(
                {
                    "class": name, "value": value, "share": len(these) / len(found),
                    "p": sum(v.kept for v in these) / len(these),
                    **{f"hit{k}": sum(v.rank < k for v in these) / len(these) for k in (1, 2, 4)},
                    "alpha": sum(v.alpha for v in these) / len(these),
                    "of_rejections": sum(not v.kept for v in these) / rejected,
                }
            )  # fmt: skip
    return rows


def markdown(found: dict[str, Any]) -> str:
    lines = []
    for temperature, rows in found["rows"].items():
        lines += [
            f"Temperature {temperature}, {found['prompts']} held-out prompts x {NEW} tokens:",
            "",
            "| | | share | p | hit@1 | hit@2 | hit@4 | alpha | of rejections |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        seen = ""
        for row in rows:
            name, seen = ("" if row["class"] == seen else row["class"]), row["class"]
            hits = " | ".join(f"{row[f'hit{k}']:.3f}" for k in (1, 2, 4))
            lines.append(
                f"| {name} | {row['value']} | {row['share']:.1%} | {row['p']:.3f} | {hits} | {row['alpha']:.3f} | "
                f"{row['of_rejections']:.1%} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=run_folder, required=True, help="a finished run on the tiny target")
    parser.add_argument("--prompts", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prompts, rows = prompts_of(200, 200 + options.prompts), {}
    for temperature in (0.0, 1.0):
        with told_by(parser):
            rows[f"{temperature:g}"] = counted(list(verdicts(options.run, prompts, temperature)))
        console.print(f"temperature {temperature:g} done")
    write_record("rejections", {"prompts": options.prompts, "rows": rows}, threads=1)
    table = markdown(json.loads((RECORDS / "rejections.json").read_text()))
    renew_readme("rejections", table, "docs/quality.md")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
