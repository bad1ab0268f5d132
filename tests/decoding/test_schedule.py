"""The pipeline schedule, driven by coins: who works on what, and how many cycles a continuation takes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import product

import pytest

from spd_lightning.decoding.schedule import PipelineSchedule
from spd_lightning.staircase import Staircase, count_cycles, default_anchors, even_stage_layers


def uneven(generator: random.Random, num_stages: int) -> tuple[int, ...]:
    return tuple(generator.randint(1, 5) for _ in range(num_stages))


def block_after(stages_done: int, stage_layers: Sequence[int], anchors: Sequence[int]) -> int:
    layers = sum(stage_layers[:stages_done])
    return max(k for k, anchor in enumerate(anchors) if anchor <= layers)


def run_coins(n: int, acceptance: float, tokens: int, seed: int) -> tuple[int, int, int]:
    """Cycles, accepted and rejected drafts until `tokens` tokens after the first are final."""
    schedule = PipelineSchedule(Staircase((1,) * n, (0, n)), first_position=0)
    coins = random.Random(seed)
    accepted = rejected = 0
    while accepted + rejected < tokens:
        verdict: bool | None = None
        if schedule.plan().leaving is not None:
            verdict = coins.random() < acceptance
            accepted += verdict
            rejected += not verdict
        schedule.advance(verdict)
    return schedule.cycle, accepted, rejected


@pytest.mark.parametrize("acceptance", [0.7, 0.9])
@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_coins_reproduce_both_formulas_of_the_speedup_within_one_percent(n: int, acceptance: float) -> None:
    tokens = 100_000
    cycles, accepted, rejected = run_coins(n, acceptance, tokens, seed=n)
    speedup = n * tokens / cycles
    between = accepted / rejected
    print(f"n={n} p={acceptance}: S={speedup:.4f}, n(1+A)/(n+A)={n * (1 + between) / (n + between):.4f}")
    assert speedup == pytest.approx(n * (1 + between) / (n + between), rel=0.01)
    assert speedup == pytest.approx(n / (1 + (n - 1) * (1 - acceptance)), rel=0.01)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_acceptance_0_decodes_one_token_per_pass_and_acceptance_1_one_per_cycle(n: int) -> None:
    assert run_coins(n, 0.0, 50, seed=0)[0] == 50 * n
    assert run_coins(n, 1.0, 50, seed=0)[0] == 50 + n - 1


class Watcher:
    """An independent account of the pipeline: every entry ever made, and which of them were flushed."""

    def __init__(self, stage_layers: Sequence[int], anchors: Sequence[int], first: int) -> None:
        self.stage_layers, self.anchors, self.n = stage_layers, anchors, len(stage_layers)
        self.alive: dict[int, int] = {first: 0}  # position -> entry cycle
        self.computed: Counter[tuple[int, int, int]] = Counter()  # (block, position, entry cycle)

    def check(self, schedule: PipelineSchedule) -> int | None:
        """Compare one plan with the account; returns the position that leaves."""
        plan, now = schedule.plan(), schedule.cycle
        assert plan == schedule.plan(), "planning changes nothing"
        assert plan.index == now
        working = sorted((now - entry, T) for T, entry in self.alive.items() if now - entry < self.n)
        assert list(plan.stages) == working[::-1], "every token in flight is in one stage, deepest first"
        assert plan.newest == max(self.alive) and self.alive[plan.newest] == now
        due = []
        for position, entry in sorted(self.alive.items()):
            depth = min(self.n, now - entry)
            block = block_after(depth, self.stage_layers, self.anchors)
            reached_before = depth and block_after(depth - 1, self.stage_layers, self.anchors) == block
            if not reached_before and now - entry <= self.n:
                due.append((block, position))
        assert list(plan.rows) == due, "rows are due when a position reaches a block, oldest first"
        assert plan.rows[-1] == (0, plan.newest)
        assert len(plan.rows) <= len(self.anchors)
        for block, position in plan.rows:
            self.computed[(block, position, self.alive[position])] += 1
        leaving = [T for T, entry in self.alive.items() if now - entry == self.n - 1]
        assert plan.leaving == (leaving[0] if leaving else None)
        return plan.leaving

    def advance(self, verdict: bool | None, leaving: int | None, now: int) -> None:
        if verdict is False:
            assert leaving is not None
            self.alive = {T: entry for T, entry in self.alive.items() if leaving >= T}
        self.alive[max(self.alive) + 1] = now + 1


def drive(
    stage_layers: tuple[int, ...], anchors: tuple[int, ...], first: int, verdicts: Sequence[bool]
) -> tuple[PipelineSchedule, Watcher]:
    schedule = PipelineSchedule(Staircase(stage_layers, anchors), first)
    watcher, remaining = Watcher(stage_layers, anchors, first), list(verdicts)
    while remaining:
        leaving = watcher.check(schedule)
        verdict = remaining.pop(0) if leaving is not None else None
        now = schedule.cycle
        schedule.advance(verdict)
        watcher.advance(verdict, leaving, now)
    return schedule, watcher


def random_case(seed: int) -> tuple[tuple[int, ...], tuple[int, ...], int, list[bool]]:
    generator = random.Random(seed)
    stage_layers = uneven(generator, generator.choice((2, 3, 4, 5, 8, 16)))
    L = sum(stage_layers)
    anchors = (0, *sorted(generator.sample(range(1, L + 1), generator.randint(0, min(L, 9)))))
    if generator.random() < 0.3:
        anchors = default_anchors(stage_layers)
    acceptance = generator.choice((0.0, 0.5, 0.8, 0.95, 1.0))
    verdicts = [generator.random() < acceptance for _ in range(40)]
    return stage_layers, anchors, generator.randint(0, 30), verdicts


@pytest.mark.parametrize("block", range(6))
def test_every_plan_equals_an_independent_account_of_the_pipeline(block: int) -> None:
    """Stages, rows, leaving position, cycle by cycle; flushed positions never appear: the account drops them."""
    for seed in range(block * 50, block * 50 + 50):
        stage_layers, anchors, first, verdicts = random_case(seed)
        schedule, watcher = drive(stage_layers, anchors, first, verdicts)
        assert set(watcher.computed.values()) == {1}, "a row is computed once per entry"
        starts = [first, *(first + 1 + index for index, verdict in enumerate(verdicts) if not verdict)]
        assert schedule.restart_positions == starts
        assert schedule.cycle == count_cycles(len(verdicts) + 1, starts, first, len(stage_layers))


@pytest.mark.parametrize("seed", range(300, 330))
def test_every_block_that_a_final_position_reaches_is_computed_exactly_once(seed: int) -> None:
    stage_layers, anchors, first, verdicts = random_case(seed)
    n = len(stage_layers)
    _, watcher = drive(stage_layers, anchors, first, [*verdicts, *[True] * (2 * n)])
    reachable = {block_after(depth, stage_layers, anchors) for depth in range(n + 1)}
    for position in range(first, first + len(verdicts)):
        last_entry = watcher.alive[position]
        final = {block for block, T, entry in watcher.computed if position == T and entry == last_entry}
        assert final == reachable, position


def test_executed_cycles_equal_the_definition_for_every_pattern_of_6_verdicts() -> None:
    for n, verdicts in product((2, 3, 5), product((False, True), repeat=6)):
        stage_layers = even_stage_layers(2 * n, n)
        schedule, _ = drive(stage_layers, default_anchors(stage_layers), 4, verdicts)
        starts = [4, *(5 + index for index, verdict in enumerate(verdicts) if not verdict)]
        runs = [stop - start for start, stop in zip(starts, [*starts[1:], 10], strict=True)]
        assert schedule.cycle == sum(run + n - 1 for run in runs if run)


def test_a_verdict_without_a_leaving_position_or_a_missing_one_is_a_bug_of_the_engine() -> None:
    schedule = PipelineSchedule(Staircase((1, 1), (0, 2)), 0)
    with pytest.raises(AssertionError):
        schedule.advance(True)
    schedule.advance(None)
    with pytest.raises(AssertionError):
        schedule.advance(None)
