"""What the scripts of benchmarks/ make of what they counted: ratios, intervals, prices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scripts import benchmark

quality, redraft, rivals, cascade = map(benchmark, ("quality_tables", "redraft", "rivals", "cascade"))


def counted(rejection: list[float], prompts: int = 200, seed: int = 0) -> np.ndarray:
    """[seeds, prompts, 4] with these rejection rates."""
    random = np.random.default_rng(seed)
    verified = np.full((len(rejection), prompts), 63)
    accepted = random.binomial(verified, 1 - np.array(rejection)[:, None])
    return np.stack([accepted, verified, verified + 1, 2 * verified], -1)


def test_a_side_is_level_with_itself() -> None:
    counts = counted([0.2])
    assert quality.rejection_ratio(counts, counts) == (1.0, 1.0, 1.0)


def test_half_the_rejections_are_a_ratio_of_one_half_within_its_interval() -> None:
    ratio, low, high = quality.rejection_ratio(counted([0.1, 0.1]), counted([0.2, 0.2], seed=1))
    assert low < ratio < high and abs(ratio - 0.5) < 0.03 and 0.02 < high - low < 0.12


@pytest.mark.parametrize("k", [2, 3])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(k: int) -> None:
    """Seeds that differ more than prompts do: a bootstrap of two holds it in 70 cases of a hundred."""
    random = np.random.default_rng(k)
    held = 0
    for trial in range(100):
        rates = random.normal(0.2, 0.04, (2, k)).clip(0.02)
        ours, theirs = (counted(list(side), 20, 2 * trial + i) for i, side in enumerate(rates))
        _, low, high = quality.rejection_ratio(ours, theirs, draws=60)
        held += low <= 1 <= high
    assert held >= 88


def row(name: str, seed: int, counts: np.ndarray, seconds: float = 60.0) -> dict[str, Any]:
    judged = {"counts": " ".join("/".join(map(str, one)) for one in counts), "by_fill": []}
    return {"name": name, "seed": seed, "seconds": seconds, "judged": {"held-out T=0": judged}}


def test_recipes_are_pooled_over_their_seeds_and_held_against_the_baseline() -> None:
    ours, theirs = counted([0.1, 0.12]), counted([0.2], seed=1)
    rows = [row("b", 1, ours[1]), row("b", 0, ours[0], 180.0), row("a", 0, theirs[0])]
    found = {one["name"]: one for one in quality.judged_rows(rows, {"a": 8, "b": 8}, "a", [])}
    assert found["b"]["p_by_seed"] == [pytest.approx(quality.pooled(one, 8)["p"]) for one in ours]
    assert found["b"]["ratio"] == quality.rejection_ratio(ours, theirs) and found["b"]["baseline_seeds"] == 1
    assert found["b"]["minutes"] == 2 and found["b"]["S"] == pytest.approx(8 * 63 / 126)


def test_rows_without_counts_stand_while_they_are_over_more_seeds() -> None:
    earlier = [{"name": name, "set": "held-out T=0", "seeds": 2, "p": 0.5} for name in ("a", "gone")]
    rows = [row("a", 0, counted([0.2])[0])]
    (kept,) = quality.judged_rows(rows, {"a": 8, "gone": 8}, "a", earlier)
    assert kept["p"] == 0.5 and "counted" not in kept
    rows += [row("a", 1, counted([0.2])[0])]
    (replaced,) = quality.judged_rows(rows, {"a": 8, "gone": 8}, "a", earlier)
    assert replaced["counted"] and replaced["seeds"] == 2


def position(token: int, said: list[int], favour: float) -> Any:
    """Rows after the draft prefer what they say to what flies by this factor."""
    laws = [{t: math.log(favour) * (t == own) for t in said} for own in said]
    return redraft.Position(token, said, laws)


def test_the_price_of_early_re_drafts_is_what_counting_by_hand_gives() -> None:
    n, depths = 8, [0, 1, 3, 7]
    positions = [
        position(5, [5, 5, 5, 5], 4.0),  # right, and nobody objects: 1
        position(5, [6, 5, 5, 5], 4.0),  # wrong, noticed at depth 1: 2
        position(5, [6, 6, 5, 5], 4.0),  # at depth 3: 4
        position(5, [6, 6, 6, 5], 4.0),  # at depth 7, too late to save a cycle: 8
        position(5, [5, 6, 6, 6], 4.0),  # right, replaced by a wrong one: 8
    ]
    assert redraft.gaps_of(positions, depths, n, redraft.by_factors([3.0] * 3)) == [1, 2, 4, 8, 8]
    assert redraft.gaps_of(positions, depths, n, redraft.by_factors([5.0] * 3)) == [1, 8, 8, 8, 1]  # not sure enough
    assert redraft.gaps_of(positions, depths, n, redraft.where_right) == [1, 2, 4, 8, 1]  # where it is right
    assert redraft.cycles_of([1, 2, 4, 8, 8], n) == 1 + 2 + 4 + 8 + n
    price = redraft.priced([positions], depths, n, redraft.by_factors([3.0] * 3))
    assert price["S"] == pytest.approx(8 * 5 / 23) and price["caught"] == 2 / 3 and price["false_alarms"] == 1 / 2


def test_a_gate_learns_when_to_believe_a_row() -> None:
    """Planted: the row at depth 1 is right where it is sure, and says nonsense where it is not."""
    random = np.random.default_rng(0)
    planted = []
    for _ in range(400):
        sure = random.random() < 0.3
        law = {5: -0.1, 6: -3.0} if sure else {5: -1.0, 6: -1.5}  # of the row, which always says 5
        planted.append(redraft.Position(5 if sure else 6, [6, 5], [{5: -1.2, 6: -0.5}, law]))
    acts = redraft.gate([planted[:200]], [0, 1], 8)
    assert redraft.gaps_of(planted[200:], [0, 1], 8, acts) == [2 if p.token == 5 else 1 for p in planted[200:]]


def test_passes_of_a_chain_and_cycles_of_an_early_exit_are_what_counting_by_hand_gives() -> None:
    kept = np.ones((3, 20), bool)
    # x_1 of the prefill, then a pass gives three drafts and one token of its own: 2-5, 6-9, and 10
    assert rivals.chain_passes(kept, 1, 11, 3) == (3, 6)
    assert rivals.chain_passes(np.zeros((3, 20), bool), 1, 11, 3) == (9, 8)
    assert rivals.exit_cycles(kept, 1, 11, 2, 8) == 8 * 3 + 8
    assert rivals.exit_cycles(np.zeros((1, 20), bool), 1, 11, 2, 8) == 8 * 8 + 8


def test_cycles_of_a_look_are_those_of_drawing_replacing_and_verifying() -> None:
    random, n, depth, draws = np.random.default_rng(0), 8, 3, 100_000
    P, first, later = (torch.tensor(random.dirichlet(np.ones(5))) for _ in range(3))
    (found,) = cascade.cycles_of_looks(P[None], torch.stack([first, later])[:, None], [0, depth], n).tolist()
    p, q0, qk = (law.numpy() for law in (P, first, later))
    y = random.choice(5, draws, p=q0)
    replaced = random.random(draws) > (qk / q0)[y]
    over = (qk - q0).clip(0)
    y = np.where(replaced, random.choice(5, draws, p=over / over.sum()), y)
    assert np.abs(np.bincount(y, minlength=5) / draws - qk).max() < 0.01  # the law is that of the later row
    stands = random.random(draws) <= (p / qk)[y]
    spent = np.where(stands, np.where(replaced, depth + 1, 1), n)
    assert found[1] == pytest.approx(spent.mean(), abs=0.04)
    y = random.choice(5, draws, p=q0)
    assert found[0] == pytest.approx(np.where(random.random(draws) <= (p / q0)[y], 1, n).mean(), abs=0.04)


def test_a_gate_looks_where_it_pays_and_once() -> None:
    """Planted: a look at the first deeper row pays where the first feature is positive; at the second one, always."""
    torch.manual_seed(0)
    sign = torch.randn(300, dtype=torch.float64).sign()
    known = torch.stack([torch.stack([sign, torch.ones_like(sign)], -1)] * 2, 1)
    cycles = torch.stack([torch.full_like(sign, 4.0), 4 - sign, torch.full_like(sign, 3.5)], -1)
    looks = cascade.Looks(cycles[:, :1], cycles, known)
    assert cascade.gated(looks, cascade.gate([looks])).equal(torch.where(sign > 0, 3.0, 3.5).double())
