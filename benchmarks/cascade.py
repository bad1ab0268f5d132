"""The price of early re-drafts at temperature 1, where a draft may only be replaced so that its law stays exact.

A deeper row's law Q_k takes over a draft y that was drawn from Q_0 like this: y stays with probability
min(1, Q_k(y) / Q_0(y)), else another is drawn from what Q_k has over Q_0. Whatever comes of it is a draft from Q_k, and
is verified as such; whether to look at row k may depend on the laws, never on y. With P the target's law, a look at
depth d costs A + (alpha_k - A)(d + 1) + (1 - alpha_k) n cycles on average: alpha_k = sum min(P, Q_k) is the chance of a
token that stands, A that of one that was never replaced. Not looking costs alpha_0 + (1 - alpha_0) n.

Both are worked out exactly for every position of real generations. A gate looks at the first row where it expects a
gain: a linear regression of the gain, per row, on what both laws say of themselves and of each other, fitted on the
first half of the prompts and priced on the second.

    .venv/bin/python benchmarks/cascade.py --run RUN      adds to records/cascade.json, renews docs/quality.md

RUN trained on the tiny target with model.loss.deeper_rows: without it deeper rows know nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from common import add_head, prompts_to_halve, run_folder, told_by  # noqa: E402
from torch import Tensor  # noqa: E402
from tree import NEW, prompts_of  # noqa: E402

from spd_lightning.decoding.decoder import SpdDecoder  # noqa: E402
from spd_lightning.head.layout import StaircaseLayout  # noqa: E402
from spd_lightning.head.loading import load_head  # noqa: E402
from spd_lightning.target.loading import load_target  # noqa: E402


@dataclass(frozen=True)
class Looks:
    """Positions of a generation.

    Attributes:
        alpha: [T, m], chances of acceptance of every row's law.
        cycles: [T, 1 + r], without a look, then with one at each of the r deeper rows that are early enough.
        known: [T, r, features], before each look.
    """

    alpha: Tensor
    cycles: Tensor
    known: Tensor


def cycles_of_looks(P: Tensor, laws: Tensor, depths: list[int], n: int) -> Tensor:
    """Cycles per token: [T, V], [m, T, V] -> [T, m], without a look, then with one at each deeper row."""
    alpha = torch.minimum(P, laws).sum(-1)
    first, later = laws[0], laws[1:]
    untouched = (torch.minimum(first, later) * torch.minimum(P / later, torch.ones(()))).sum(-1)
    gaps = torch.tensor([depth + 1.0 for depth in depths[1:]])[:, None]
    looks = untouched + (alpha[1:] - untouched) * gaps + (1 - alpha[1:]) * n
    return torch.cat([(alpha[0] + (1 - alpha[0]) * n)[None], looks]).T


def known_of(laws: Tensor) -> Tensor:
    """[m, T, V] -> [T, m - 1, features]: what both laws say of themselves and of each other."""
    shared = torch.minimum(laws[0], laws[1:]).sum(-1)
    sure = laws.square().sum(-1)
    best = laws.amax(-1)
    entropy = -(laws * laws.clamp(min=1e-30).log()).sum(-1)
    both = [torch.cat([x[:1].expand_as(x[1:]), x[1:]]).view(2, *x[1:].shape) for x in (sure, best, entropy)]
    columns = [shared, shared.square(), *(part for pair in both for part in pair), torch.ones_like(shared)]
    return torch.stack(columns, -1).transpose(0, 1)


@torch.inference_mode()
def looks_of(run: Path, prompts: list[list[int]]) -> tuple[list[Looks], list[int], int]:
    """The looks of each generation; d_min of all rows; n."""
    target = load_target("tiny")
    head = load_head(run, target)
    decoder, n, found = SpdDecoder(target, head), head.staircase.num_stages, []
    depths = list(head.staircase.first_depths)
    for number, prompt in enumerate(prompts):
        made = decoder.generate(prompt, NEW, 1.0, seed=number)
        whole = [*prompt, *made.token_ids]
        states, last = target(torch.tensor([whole]), head.config.anchors)
        layout = StaircaseLayout.from_restarts(head.staircase, [made.restart_positions], len(whole))
        here = slice(len(prompt), len(whole) - 1)
        laws = head.logits(head(states, layout, all_rows=True))[0, :, here].double().softmax(-1)
        P = target.logits(last[0, here]).double().softmax(-1)
        early = laws[: sum(depth + 1 < n for depth in depths)]
        alpha = torch.minimum(P, laws).sum(-1).T
        found.append(Looks(alpha, cycles_of_looks(P, early, depths[: len(early)], n), known_of(early)))
    return found, depths, n


def gate(looks: list[Looks]) -> list[Tensor]:
    """Weights per deeper row, of the gain that is expected."""
    cycles, known = torch.cat([one.cycles for one in looks]), torch.cat([one.known for one in looks])
    weights = []
    for row in range(known.shape[1]):
        seen, gain = known[:, row], cycles[:, 0] - cycles[:, row + 1]
        ridge = 1e-3 * len(seen) * torch.eye(seen.shape[1], dtype=seen.dtype)
        weights.append(torch.linalg.solve(seen.T @ seen + ridge, seen.T @ gain))
    return weights


def gated(looks: Looks, weights: list[Tensor]) -> Tensor:
    """Cycles [T] of a gate that looks once, at the first row where it expects a gain."""
    chosen = looks.cycles[:, 0].clone()
    open_ = torch.ones_like(chosen, dtype=torch.bool)
    for row, weight in enumerate(weights):
        acts = open_ & (looks.known[:, row] @ weight > 0)
        chosen = torch.where(acts, looks.cycles[:, row + 1], chosen)
        open_ &= ~acts
    return chosen


def markdown(name: str, found: dict[str, Any]) -> str:
    alphas = zip(found["alpha"], found["depths"], strict=True)
    base = found["policies"][0]["S"]
    return "\n".join(
        [
            f"`{name}`: {found['prompts']} held-out prompts x {NEW} tokens, temperature 1, priced on the second half. "
            f"alpha of rows, by block: {', '.join(f'{alpha:.3f} (depth {depth})' for alpha, depth in alphas)}.",
            "",
            "| looks | S | over never |",
            "|---|---|---|",
            *(f"| {row['name']} | {row['S']:.2f} | {row['S'] / base - 1:+.1%} |" for row in found["policies"]),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=run_folder, required=True, help="a finished run on the tiny target")
    parser.add_argument("--prompts", type=prompts_to_halve, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with told_by(parser):
        looks, depths, n = looks_of(options.run, prompts_of(200, 200 + options.prompts))
    half = len(looks) // 2
    weights, priced = gate(looks[:half]), looks[half:]
    cycles = torch.cat([one.cycles for one in priced])
    policies = [
        ("never", cycles[:, 0]),
        *((f"always, at depth {depths[row]}", cycles[:, row]) for row in range(1, cycles.shape[1])),
        (
            "where the gate, fitted on the first half, expects a gain",
            torch.cat([gated(one, weights) for one in priced]),
        ),
        ("where it gains (what is to be had)", cycles.amin(1)),
    ]
    found = {
        "prompts": options.prompts, "depths": depths, "alpha": torch.cat([one.alpha for one in looks]).mean(0).tolist(),
        "policies": [{"name": name, "S": float(n / spent.mean())} for name, spent in policies],
    }  # fmt: skip
    add_head("cascade", options.run, found, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
