"""The price of early re-drafts: what deeper rows know of the token after them, and what acting on it would save.

In cycle e(T) + d_min(k) row (k, T) predicts x_{T+1} once more, from deeper states than the draft had. Where it says
that the token in flight there is wrong, the pipeline could restart at once: the gap is then d_min(k) + 1 instead of n.
Nothing is built for it here: real greedy generations of a trained head are passed through the training view once, all
rows, and the gaps that a policy would have had are added up. A token that is replaced wrongly costs a full restart.

A policy acts where a row gives another token so many times the probability of the one in flight. Its factors, one per
depth, are chosen on the first half of the prompts and priced on the second. So is a gate: per depth a logistic
regression, from what the draft and the row say of both tokens, of the chances that acting catches an error or replaces
what was right; it acts where that gains cycles on average. One that acts where the other token is the right one, and
nowhere else, shows what is to be had. All are priced on the restarts and drafts of the generation as it was: what an
earlier restart would change in the drafts after it is left out.

    .venv/bin/python benchmarks/redraft.py --run RUN      adds to records/redraft.json, renews docs/quality.md

RUN trained on the tiny target with model.loss.deeper_rows: without it deeper rows know nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import add_head, prompts_to_halve, run_folder, told_by  # noqa: E402
from torch import Tensor  # noqa: E402
from tree import NEW, prompts_of  # noqa: E402

from spd_lightning.decoding.decoder import SpdDecoder  # noqa: E402
from spd_lightning.head.layout import StaircaseLayout  # noqa: E402
from spd_lightning.head.loading import load_head  # noqa: E402
from spd_lightning.target.loading import load_target  # noqa: E402

FACTORS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, math.inf)  # the last one never acts


@dataclass(frozen=True)
class Position:
    """A verified position: the target's token, and what each row says, shallow to deep.

    `said[0]` is the draft; `laws[k][token]` is row k's log-probability of each token that any row says.
    """

    token: int
    said: list[int]
    laws: list[dict[int, float]]


#: Whether to act: the position, the deeper row (from 1), and the token in flight.
Policy = Callable[[Position, int, int], bool]


def never(position: Position, row: int, flying: int) -> bool:
    return False


def where_right(position: Position, row: int, flying: int) -> bool:
    """What nobody can know."""
    return position.said[row] == position.token


def by_factors(factors: Sequence[float]) -> Policy:
    """Where a row gives another token so many times the probability, a factor per deeper row."""

    def acts(position: Position, row: int, flying: int) -> bool:
        law = position.laws[row]
        return law[position.said[row]] - law[flying] >= math.log(factors[row - 1])

    return acts


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
        laws = head.logits(head(states, layout, all_rows=True))[0].log_softmax(-1)  # [m, S, V_d]
        best = laws.argmax(-1).tolist()
        positions = []
        for at in range(len(prompt), len(whole) - 1):
            rows = [best[k][at] for k in range(len(laws))]
            named = [{head.full_vocabulary_id(t): float(row[at, t]) for t in rows} for row in laws]
            positions.append(Position(whole[at + 1], [head.full_vocabulary_id(t) for t in rows], named))
        found.append(positions)
        gaps = gaps_of(positions, list(head.staircase.first_depths), n, never)
        assert cycles_of(gaps, n) == made.cycles, "a policy that never acts is the generation itself"
    return found, list(head.staircase.first_depths), n


def gaps_of(positions: Sequence[Position], depths: list[int], n: int, acts: Policy) -> list[int]:
    """The gap before every token after the first, where a policy acts."""
    gaps = []
    for position in positions:
        flying, gap = position.said[0], 1
        for row, depth in enumerate(depths[1:], start=1):
            other = position.said[row]
            if other != flying and depth + 1 < n and acts(position, row, flying):
                flying, gap = other, depth + 1
        gaps.append(gap if flying == position.token else n)
    return gaps


def cycles_of(gaps: list[int], n: int) -> int:
    """Cycles of a generation: up to the entry of the token whose successor is the last, and n until it is verified."""
    return sum(gaps[:-1]) + n if gaps else 0


def priced(generations: list[list[Position]], depths: list[int], n: int, acts: Policy) -> dict[str, float]:
    """What one policy makes of the generations."""
    cycles = tokens = caught = alarms = wrong = 0
    for positions in generations:
        gaps = gaps_of(positions, depths, n, acts)
        cycles += cycles_of(gaps, n)
        tokens += len(gaps)
        missed = [position.said[0] != position.token for position in positions]
        wrong += sum(missed)
        caught += sum(miss and gap < n for miss, gap in zip(missed, gaps, strict=True))
        alarms += sum(not miss and gap > 1 for miss, gap in zip(missed, gaps, strict=True))
    return {
        "S": n * tokens / cycles, "caught": caught / max(1, wrong), "false_alarms": alarms / max(1, tokens - wrong)
    }  # fmt: skip


def gain(generations: list[list[Position]], depths: list[int], n: int, acts: Policy, draws: int = 2000) -> list[float]:
    """S over that of never acting, less 1: the 95 % interval over prompts."""
    cycles = [[cycles_of(gaps_of(p, depths, n, policy), n) for p in generations] for policy in (never, acts)]
    counts = torch.tensor(cycles, dtype=torch.float64)
    drawn = torch.randint(len(generations), (draws, len(generations)), generator=torch.Generator().manual_seed(0))
    base, ours = counts[:, drawn].sum(-1)
    return (base / ours - 1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def fitted(generations: list[list[Position]], depths: list[int], n: int) -> list[float]:
    """A factor per deeper row, each chosen in turn for the greatest S, until none changes."""
    factors = [math.inf] * (len(depths) - 1)
    while True:
        before = list(factors)
        for index in range(len(factors)):
            tried = {
                f: priced(generations, depths, n, by_factors([*factors[:index], f, *factors[index + 1 :]]))
                for f in FACTORS
            }
            factors[index] = max(FACTORS, key=lambda f: (tried[f]["S"], f))
        if factors == before:
            return factors


def gate(generations: list[list[Position]], depths: list[int], n: int) -> Policy:
    """Acts where a caught error, worth n - depth - 1 cycles, outweighs a false alarm, which costs n - 1.

    The chances of both are a logistic regression per deeper row, fitted to its disagreements with the draft.
    """
    models: dict[int, tuple[Tensor, Tensor]] = {}
    every = [position for positions in generations for position in positions]
    for row, depth in enumerate(depths[1:], start=1):
        cases = [position for position in every if position.said[row] != position.said[0]]
        if depth + 1 < n and cases:
            seen = torch.tensor([features(position, row, position.said[0]) for position in cases])
            # neither, an error caught, something right replaced
            kinds = torch.tensor([(p.said[row] == p.token) + 2 * (p.said[0] == p.token) for p in cases])
            models[row] = logistic(seen, kinds)

    def acts(position: Position, row: int, flying: int) -> bool:
        if row not in models:
            return False
        weight, bias = models[row]
        _, caught, replaced = (torch.tensor(features(position, row, flying)) @ weight + bias).softmax(-1).tolist()
        return caught * (n - depths[row] - 1) > replaced * (n - 1)

    return acts


def logistic(seen: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [features, 3] and bias of a multinomial logistic regression; a little ridge keeps them finite."""
    weight, bias = torch.zeros(seen.shape[1], 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def surprise() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(seen @ weight + bias, kinds) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(surprise)
    return weight.detach(), bias.detach()


def features(position: Position, row: int, flying: int) -> list[float]:
    """What the draft and the row say of the token in flight and of the row's own, and how many rows agree with it."""
    other = position.said[row]
    laws = [position.laws[k][token] for k in (0, row) for token in (flying, other)]
    agree = sum(said == other for said in position.said[1:row])
    return [*laws, *(math.exp(law) for law in laws), float(agree)]


def markdown(name: str, found: dict[str, Any]) -> str:
    accuracy = zip(found["accuracy"], found["depths"], strict=True)
    lines = [
        f"`{name}`: {found['prompts']} held-out prompts x {NEW} tokens, greedy, priced on the second half. "
        "Accuracy of rows "
        f"about the same token, by block: {', '.join(f'{share:.3f} (depth {depth})' for share, depth in accuracy)}.",
        "",
        "| acts where a deeper row says another token | wrong drafts caught | right ones replaced | S | over never |",
        "|---|---|---|---|---|",
    ]
    base = found["policies"][0]["S"]
    for row in found["policies"]:
        low, high = row.get("interval", (0, 0))
        interval = f" ({low:+.1%} to {high:+.1%})" if low < high else ""
        lines.append(
            f"| {row['name']} | {row['caught']:.1%} | {row['false_alarms']:.1%} | {row['S']:.2f} | "
            f"{row['S'] / base - 1:+.1%}{interval} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=run_folder, required=True, help="a finished run on the tiny target")
    parser.add_argument("--prompts", type=prompts_to_halve, default=200)
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
    policies: list[tuple[str, Policy]] = [
        ("never", never),
        ("at all", by_factors([1.0] * deeper)),
        *((f"{factor:g} times as likely", by_factors([factor] * deeper)) for factor in (2.0, 5.0, 30.0)),
        (f"as fitted on the first half: {said or 'nowhere'}", by_factors(chosen)),
        ("where the gate, fitted on the first half, expects a gain", gate(generations[:half], depths, n)),
        ("and is right (what is to be had)", where_right),
    ]
    every = [position for positions in generations for position in positions]
    accuracy = [sum(p.token == p.said[k] for p in every) / len(every) for k in range(len(depths))]
    found = {
        "prompts": options.prompts, "depths": depths, "accuracy": accuracy,
        "policies": [
            {"name": name, "interval": gain(generations[half:], depths, n, policy)}
            | priced(generations[half:], depths, n, policy)
            for name, policy in policies
        ],
    }  # fmt: skip
    add_head("redraft", options.run, found, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
