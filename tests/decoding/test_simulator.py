"""The simulator of the pipeline's clock: small cases by hand, bounds, and what each cost can do."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from spd_lightning.decoding.simulator import Costs, coins, simulate
from spd_lightning.staircase import count_cycles


def cycles_of(verdicts: list[bool], n: int) -> int:
    starts = [0, *(index + 1 for index, accepted in enumerate(verdicts) if not accepted)]
    return count_cycles(len(verdicts) + 1, [start for start in starts if start <= len(verdicts)], 0, n)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("alone", [False, True])
def test_without_other_costs_time_is_cycles_times_a_stage(n: int, alone: bool) -> None:
    """Also with rejections: dropped work ends where the restart begins."""
    draw = random.Random(n)
    for _ in range(10):
        verdicts = [draw.random() < 0.8 for _ in range(60)]
        found = simulate(Costs((1.0,) * n, 0.0, 0.0, head_alone=alone), verdicts, 60)
        assert found.cycles == cycles_of(verdicts, n)
        assert found.seconds == pytest.approx(found.cycles)


def test_a_small_case_by_hand() -> None:
    """n = 2, stage 0 and head 3 + 1 s, stage 1 and verification 2 + 1 s, all accepted: the first rank sets the pace."""
    costs = Costs((3.0, 2.0), 1.0, 1.0)
    # stage 0: 0-3, head 3-4; again 4-7 while stage 1 works 4-6 and verifies 6-7: 3 + (2 + 1) for the first token
    assert simulate(costs, [True], 1).seconds == pytest.approx(3 + 2 + 1)
    many = simulate(costs, [True] * 101, 101).seconds - simulate(costs, [True] * 1, 1).seconds
    assert many / 100 == pytest.approx(4.0, rel=0.02)
    assert costs.steady_cycle == 4.0


def test_the_last_rank_tells_verdicts_one_by_one() -> None:
    """n = 4 and a head apart: four others. The last stage takes 1 + 1 + 4 x 0.5 s per cycle, longer than any other."""
    costs = Costs((2.0, 2.0, 2.0, 1.0), 1.0, 0.5, head_alone=True, tell=0.5)
    assert costs.others == 4 and costs.steady_cycle == 4.0
    found = [simulate(costs, [True] * count, count).seconds for count in (101, 201)]
    assert (found[1] - found[0]) / 100 == pytest.approx(4.0, rel=0.02)


def test_a_head_on_its_own_rank_costs_nothing_while_it_is_faster_than_a_stage() -> None:
    verdicts = list(zip(range(300), coins(0.85), strict=False))
    accepted = [verdict for _, verdict in verdicts]
    base = Costs((1.0,) * 4, 0.1, 0.0, head_alone=True)
    free = simulate(base, accepted, 300).seconds
    for head in (0.3, 0.9):
        assert simulate(replace(base, head=head), accepted, 300).seconds == pytest.approx(free, rel=0.01)
    assert simulate(replace(base, head=2.0), accepted, 300).seconds > 1.5 * free


@pytest.mark.parametrize("alone", [False, True])
def test_no_cost_makes_it_faster_and_no_rank_does_more_than_it_can(alone: bool) -> None:
    draw = random.Random(1)
    for _ in range(40):
        n = draw.randint(2, 6)
        costs = Costs(
            tuple(draw.uniform(0.5, 2) for _ in range(n)), draw.random(), draw.random(), draw.random() / 9,
            draw.random() / 9, alone,
        )  # fmt: skip
        verdicts = [draw.random() < 0.8 for _ in range(50)]
        found = simulate(costs, verdicts, 50)
        # work of the last cycle counts on every rank, and stage 0 does it up to n - 1 cycles later than the last stage
        assert all(0 <= share * found.seconds <= found.seconds + n * costs.steady_cycle for share in found.busy)
        for name in ("verification", "head", "send", "latency", "tell"):
            slower = simulate(replace(costs, **{name: getattr(costs, name) + 0.5}), verdicts, 50)
            # not exactly: whoever comes later to work that is dropped drops less of it
            assert slower.seconds >= 0.9 * found.seconds, name
