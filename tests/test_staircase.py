"""The staircase's integers against brute force: every expected value is counted out here, cycle by cycle."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spd_lightning.errors import InputError
from spd_lightning.head.layout import StaircaseLayout
from spd_lightning.staircase import (
    Staircase,
    count_cycles,
    default_anchors,
    empty_stages,
    entry_cycles,
    even_stage_layers,
    fills,
    gaps_from_restarts,
    long_run_speedup,
    resolve_stage_layers,
    theoretical_speedup,
)

# -- oracles -------------------------------------------------------------------------------------------------


def compositions(total: int) -> Iterator[tuple[int, ...]]:
    """All ways to cut `total` layers into at least two stages."""
    for cuts in product((False, True), repeat=total - 1):
        if any(cuts):
            parts, run = [], 1
            for cut in cuts:
                if cut:
                    parts.append(run)
                    run = 1
                else:
                    run += 1
            yield (*parts, run)


def block_after(stages_done: int, stage_layers: Sequence[int], anchors: Sequence[int]) -> int:
    """The deepest anchor that exists after this many stages, found by walking up."""
    layers = 0
    for stage in range(stages_done):
        layers += stage_layers[stage]
    block = 0
    while block + 1 < len(anchors) and anchors[block + 1] <= layers:
        block += 1
    return block


def watch_rows(
    stage_layers: Sequence[int], anchors: Sequence[int], entered: Sequence[int]
) -> dict[tuple[int, int], dict[int, int]]:
    """Play the pipeline: row (block, T) -> {T': the block that T' showed when this row was computed}."""
    n = len(stage_layers)
    shown: dict[int, int] = {}
    seen: dict[tuple[int, int], dict[int, int]] = {}
    for cycle in range(entered[-1] + n + 1):
        changed = []
        for position, entry in enumerate(entered):
            if entry > cycle:
                break
            block = block_after(min(n, cycle - entry), stage_layers, anchors)
            if shown.get(position) != block:
                shown[position] = block
                changed.append(position)
        for position in changed:
            visible = {earlier: block for earlier, block in shown.items() if earlier <= position}
            assert (shown[position], position) not in seen, "a row is computed once"
            seen[(shown[position], position)] = visible
    return seen


def play_generation(accepted: Sequence[bool], num_stages: int) -> tuple[int, list[int]]:
    """Cycles of a pipeline until len(accepted) tokens after the first are final, and where it restarted.

    A conveyor belt of n places: belt[i] is the token that has been through i + 1 stages.
    """
    belt: list[int | None] = [None] * num_stages
    waiting, final, cycles, restarts = 0, 0, 0, [0]
    while final < len(accepted):
        cycles += 1
        belt = [waiting, *belt[:-1]]
        fresh = waiting + 1
        if belt[-1] is not None:
            verdict = accepted[belt[-1]]
            final += 1
            if not verdict:
                fresh = belt[-1] + 1
                restarts.append(fresh)
                belt = [None] * num_stages
        waiting = fresh
    return cycles, restarts


def some_anchors(generator: random.Random, num_layers: int) -> tuple[int, ...]:
    deeper = range(1, num_layers + 1)
    return (0, *sorted(generator.sample(deeper, generator.randint(0, num_layers))))


@st.composite
def staircases(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    stage_layers = tuple(draw(st.lists(st.integers(1, 7), min_size=2, max_size=9)))
    deeper = draw(st.sets(st.integers(1, sum(stage_layers)), max_size=8))
    return stage_layers, (0, *sorted(deeper))


# -- stages --------------------------------------------------------------------------------------------------


def test_an_even_split_covers_all_layers_and_gives_extra_layers_to_stages_before_the_last() -> None:
    for num_layers in range(2, 70):
        for num_stages in range(2, num_layers + 1):
            layers = even_stage_layers(num_layers, num_stages)
            assert len(layers) == num_stages and sum(layers) == num_layers
            assert max(layers) - min(layers) <= 1
            assert layers[-1] == min(layers) == num_layers // num_stages
            for stage in range(num_stages):
                assert sum(layers[: stage + 1]) == math.ceil(Fraction((stage + 1) * num_layers, num_stages))


def test_stages_without_layers_are_allowed_and_announced() -> None:
    assert even_stage_layers(5, 8) == (1, 1, 0, 1, 1, 0, 1, 0)
    assert resolve_stage_layers(5, stage_layers=[5, 0]) == (5, 0)
    assert empty_stages((2, 2)) is None
    message = empty_stages(even_stage_layers(5, 8))
    assert message is not None and "3 of the 8 stages" in message and "5 x" in message
    for num_layers in range(1, 20):
        for num_stages in range(num_layers + 1, 2 * num_layers + 1):
            layers = even_stage_layers(num_layers, num_stages)
            assert sum(layers) == num_layers and set(layers) == {0, 1}


@pytest.mark.parametrize(("num_layers", "num_stages"), [(8, 1), (8, 0), (8, -3), (8, 17), (1, 3), (0, 2)])
def test_an_impossible_number_of_stages_is_refused_by_name_and_value(num_layers: int, num_stages: int) -> None:
    with pytest.raises(InputError, match=rf"num_stages={num_stages} .*{num_layers} layers.*Set num_stages"):
        even_stage_layers(num_layers, num_stages)


@pytest.mark.parametrize("stage_layers", [[4, 3], [4, 5], [8], [], [0, 9], [-1, 9], [4.5, 3.5]])
def test_an_impossible_split_is_refused_by_name_and_value(stage_layers: list[float]) -> None:
    with pytest.raises(InputError) as error:
        resolve_stage_layers(8, stage_layers=stage_layers)  # type: ignore[arg-type]
    assert f"stage_layers={stage_layers}" in str(error.value) and "layers" in str(error.value)


def test_stages_must_be_asked_for_once_and_without_contradiction() -> None:
    assert resolve_stage_layers(8, 3) == (3, 3, 2)
    assert resolve_stage_layers(8, 2, [3, 5]) == (3, 5)
    with pytest.raises(InputError, match=r"num_stages=4 contradicts stage_layers=\[3, 5\]"):
        resolve_stage_layers(8, 4, [3, 5])
    with pytest.raises(InputError, match="num_stages .*or stage_layers"):
        resolve_stage_layers(8)


@pytest.mark.parametrize("anchors", [(), (1, 2), (0, 0), (0, 3, 2), (0, 9), (-1, 0, 3)])
def test_anchors_that_do_not_fit_are_refused_by_name_and_value(anchors: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as error:
        Staircase((4, 4), anchors)
    assert f"anchors={list(anchors)}" in str(error.value) and "at most at 8" in str(error.value)


# -- depths and blocks ---------------------------------------------------------------------------------------


def test_blocks_and_first_depths_equal_a_walk_up_the_layers_for_every_split_of_up_to_9_layers() -> None:
    generator, cases = random.Random(0), 0
    for num_layers in range(2, 10):
        for stage_layers in compositions(num_layers):
            for anchors in (
                default_anchors(stage_layers),
                *(some_anchors(generator, num_layers) for _ in range(6)),
            ):
                staircase = Staircase(stage_layers, anchors)
                n = len(stage_layers)
                expected = [block_after(depth, stage_layers, anchors) for depth in range(n + 1)]
                reachable = [k for k in range(len(anchors)) if k in expected]
                first = [next(d for d in range(n + 1) if expected[d] == k) for k in reachable]
                assert (staircase.num_stages, staircase.num_layers) == (n, num_layers)
                assert list(staircase.block_of_depth) == expected
                assert list(staircase.reachable_blocks) == reachable
                assert list(staircase.unreachable_blocks) == [k for k in range(len(anchors)) if k not in reachable]
                assert list(staircase.first_depths) == first
                assert list(staircase.windows) == [n - depth for depth in first]
                cases += 1
    assert cases > 3000


def test_default_anchors_make_every_block_reachable_for_every_split() -> None:
    generator = random.Random(1)
    splits = [split for num_layers in range(2, 12) for split in compositions(num_layers)]
    splits += [even_stage_layers(L, n) for L in range(2, 81) for n in range(2, L + 1)]
    splits += [tuple(generator.randint(1, 9) for _ in range(generator.randint(2, 40))) for _ in range(500)]
    for stage_layers in splits:
        anchors = default_anchors(stage_layers)
        staircase = Staircase(stage_layers, anchors)
        assert staircase.unreachable_blocks == (), stage_layers
        assert anchors[-1] == sum(stage_layers), "finished tokens are read at full depth"
        if len(stage_layers) <= 4:
            assert staircase.block_of_depth == tuple(range(len(stage_layers) + 1)), stage_layers


def test_default_anchors_of_8_stages_over_32_layers_are_0_4_12_24_32() -> None:
    assert default_anchors(even_stage_layers(32, 8)) == (0, 4, 12, 24, 32)


# -- which row sees which ------------------------------------------------------------------------------------


def check_shown(stage_layers: tuple[int, ...], anchors: tuple[int, ...], entered: list[int]) -> int:
    """Every row of the played pipeline sees what `shown`, `visible_block` and the mask say it sees."""
    staircase = Staircase(stage_layers, anchors)
    n, S, reachable = len(stage_layers), len(entered), staircase.reachable_blocks
    seen = watch_rows(stage_layers, anchors, entered)
    assert set(seen) == set(product(reachable, range(S)))
    mask = StaircaseLayout(staircase, torch.tensor([entered])).dense_mask()[0]
    expected = torch.zeros(len(reachable) * S, len(reachable) * S, dtype=torch.bool)
    for (block, position), visible in seen.items():
        row = reachable.index(block)
        for earlier, shown in visible.items():
            elapsed = entered[position] - entered[earlier]
            assert staircase.visible_block(block, elapsed) == shown
            assert reachable[staircase.shown[row][min(n, elapsed)]] == shown
            expected[row * S + position, reachable.index(shown) * S + earlier] = True
    assert torch.equal(mask, expected)
    return len(seen)


def test_every_row_sees_what_the_played_pipeline_showed_it() -> None:
    generator, rows = random.Random(2), 0
    for num_layers in range(2, 10):
        for stage_layers in compositions(num_layers):
            n = len(stage_layers)
            for largest_gap in (1, n):
                gaps = [generator.choice((1, generator.randint(1, largest_gap))) for _ in range(2 * n)]
                entered = [sum(gaps[1 : T + 1]) for T in range(len(gaps))]
                rows += check_shown(stage_layers, some_anchors(generator, num_layers), entered)
    assert rows > 10_000


@settings(max_examples=60, deadline=None)
@given(staircases(), st.data())
def test_every_row_sees_what_the_played_pipeline_showed_it_for_arbitrary_gaps(
    shape: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    stage_layers, anchors = shape
    n = len(stage_layers)
    gaps = data.draw(st.lists(st.one_of(st.just(1), st.just(n), st.integers(1, n + 2)), min_size=1, max_size=14))
    check_shown(stage_layers, anchors, [sum(gaps[1 : T + 1]) for T in range(len(gaps))])


def test_the_mask_of_a_small_case_reads_as_the_definition_says() -> None:
    """Two stages of one layer, three blocks, and a restart at position 2: entry cycles 0, 1, 3."""
    staircase = Staircase((1, 1), (0, 1, 2))
    layout = StaircaseLayout.from_restarts(staircase, [(0, 2)], 3)
    # blocks:    0   1   2
    # T':       012 012 012
    expected = """
        (0,0)   1.. ... ...
        (0,1)   .1. 1.. ...
        (0,2)   ..1 ... 11.
        (1,0)   ... 1.. ...
        (1,1)   ... .1. 1..
        (1,2)   ... ..1 11.
        (2,0)   ... ... 1..
        (2,1)   ... ... 11.
        (2,2)   ... ... 111
    """
    lines = []
    for index, row in enumerate(layout.dense_mask()[0].int().tolist()):
        marks = "".join(".1"[value] for value in row)
        lines.append(f"({index // 3},{index % 3})   {marks[:3]} {marks[3:6]} {marks[6:]}")
    assert lines == [line.strip() for line in expected.strip().splitlines()], "\n".join(lines)


def test_packed_documents_do_not_see_each_other() -> None:
    staircase = Staircase((1, 2, 1), (0, 1, 4))
    entered = [0, 1, 4, 0, 3, 4, 5]
    documents = [5, 5, 5, 2, 2, 2, 2]
    packed = StaircaseLayout(staircase, torch.tensor([entered]), torch.tensor([documents])).dense_mask()[0]
    m, S = len(staircase.reachable_blocks), len(entered)
    expected = torch.zeros(m, S, m, S, dtype=torch.bool)
    for where in (slice(0, 3), slice(3, 7)):
        own = entered[where]
        for (block, position), visible in watch_rows((1, 2, 1), (0, 1, 4), own).items():
            row = staircase.reachable_blocks.index(block)
            for earlier, shown in visible.items():
                column = staircase.reachable_blocks.index(shown)
                expected[row, where.start + position, column, where.start + earlier] = True
    assert torch.equal(packed, expected.view(m * S, m * S))


# -- entry cycles, fills, cycles -----------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 12), st.data())
def test_fill_counts_the_tokens_that_entered_less_than_n_cycles_ago(n: int, data: st.DataObject) -> None:
    gaps = data.draw(st.lists(st.integers(1, n + 1), min_size=1, max_size=40))
    entered = [sum(gaps[1 : T + 1]) for T in range(len(gaps))]
    expected = [sum(1 for T in range(t + 1) if entered[t] - entered[T] < n) for t in range(len(gaps))]
    assert fills(entered, n) == expected
    assert entry_cycles(gaps) == entered


def test_fill_is_the_distance_from_the_last_restart_when_gaps_are_1_or_n() -> None:
    for n, marks in product((2, 3, 5), product((False, True), repeat=9)):
        restarts = [0, *(T for T, mark in enumerate(marks) if mark and T)]
        gaps = gaps_from_restarts(9, restarts, n)
        assert gaps == [n if T in restarts else 1 for T in range(9)]
        expected = [min(n, t - max(T for T in restarts if t >= T) + 1) for t in range(9)]
        assert fills(entry_cycles(gaps), n) == expected


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_the_fills_of_a_layout_count_the_tokens_of_the_own_document_in_flight(packed: bool) -> None:
    generator = random.Random(4)
    for n in (2, 3, 8):
        lengths = (5, 9, 1, 6) if packed else (21,)
        entered, expected, documents = [], [], []
        for number, length in enumerate(lengths):
            own = [0]
            for _ in range(length - 1):
                own.append(own[-1] + generator.choice((1, 1, n, generator.randint(1, n))))
            expected += [sum(1 for T in range(t + 1) if own[t] - own[T] < n) for t in range(length)]
            entered += own
            documents += [number] * length
        staircase = Staircase((1,) * n, (0, n))
        layout = StaircaseLayout(staircase, torch.tensor([entered]), torch.tensor([documents]) if packed else None)
        assert layout.fills().tolist() == [expected]


def test_entry_cycles_refuse_two_tokens_in_one_cycle() -> None:
    assert entry_cycles([]) == [] and entry_cycles([0]) == [0]
    with pytest.raises(InputError, match="at least 1.*got 0"):
        entry_cycles([1, 2, 0, 1])


@pytest.mark.parametrize("outside", [(-1,), (5,), (0, 7)])
def test_restarts_outside_the_sequence_are_refused(outside: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=rf"{outside[-1]}.*5 tokens"):
        gaps_from_restarts(5, outside, 4)


def test_cycles_equal_a_played_conveyor_belt_for_every_pattern_of_up_to_9_verdicts() -> None:
    cases = 0
    for n in range(2, 6):
        for verified in range(10):
            for accepted in product((False, True), repeat=verified):
                cycles, restarts = play_generation(accepted, n)
                for first in (0, 7):
                    positions = [first + restart for restart in restarts]
                    assert count_cycles(verified + 1, positions, first, n) == cycles, (n, accepted)
                speedup = theoretical_speedup(n, verified + 1, cycles)
                assert speedup == (pytest.approx(n * verified / cycles) if verified else None)
                cases += 1
    assert cases == 4 * 1023


def test_the_long_run_speedup_is_the_published_table() -> None:
    for acceptance, expected in ((0.80, 3.33), (0.82, 3.54), (0.85, 3.90), (0.88, 4.35), (0.90, 4.71)):
        assert long_run_speedup(8, acceptance) == pytest.approx(expected, abs=0.005)
    assert long_run_speedup(16, 1.0) == 16 and long_run_speedup(16, 0.0) == 1
