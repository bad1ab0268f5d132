"""`stage_layers: auto`: the split is optimal for the measured costs, and a run keeps the one it began with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement

import pytest

from spd_lightning.errors import InputError
from spd_lightning.staircase import even_stage_layers
from spd_lightning.target.balance import Costs, Split, balanced_stage_layers, measure, measured_split
from spd_lightning.target.loading import load_target
from spd_lightning.target.target import Target


def splits(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    for cuts in combinations_with_replacement(range(num_layers + 1), num_stages - 1):
        bounds = (0, *cuts, num_layers)
        yield tuple(stop - start for start, stop in zip(bounds, bounds[1:], strict=False))


def score(costs: Costs, split: tuple[int, ...]) -> tuple[float, float]:
    times = costs.of_stages(split)
    return max(times), sum(time**2 for time in times)


@pytest.mark.parametrize("seed", range(40))
def test_no_other_split_has_a_faster_slowest_stage_or_is_more_even(seed: int) -> None:
    coins = random.Random(seed)
    L, n = coins.randint(1, 9), coins.randint(2, 5)
    n = min(n, 2 * L)
    layers = tuple(coins.choice((1.0, 1.0, 2.5)) * coins.uniform(0.9, 1.1) for _ in range(L))
    costs = Costs(coins.choice((0.01, 2.0)), layers, coins.choice((0.1, 1.5, 20.0)))
    found = balanced_stage_layers(costs, n)
    assert len(found) == n and sum(found) == L
    assert score(costs, found) == pytest.approx(min(score(costs, split) for split in splits(L, n)))


def test_equal_layers_and_free_ends_give_a_balanced_split() -> None:
    for L, n in ((32, 8), (31, 4), (36, 8), (7, 3), (5, 2)):
        assert sorted(balanced_stage_layers(Costs(0.0, (1.0,) * L, 0.0), n)) == sorted(even_stage_layers(L, n))


def test_a_large_vocabulary_takes_layers_from_the_last_stage() -> None:
    assert balanced_stage_layers(Costs(0.0, (1.0,) * 8, 2.0), 2) == (5, 3)
    assert balanced_stage_layers(Costs(0.0, (1.0,) * 6, 9.0), 4) == (2, 2, 2, 0)
    assert balanced_stage_layers(Costs(3.0, (1.0,) * 9, 0.0), 3) == (1, 4, 4)


def test_an_impossible_number_of_stages_is_refused() -> None:
    for n in (0, 1, 9):
        with pytest.raises(InputError, match=f"num_stages={n} .*4 layers"):
            balanced_stage_layers(Costs(0.0, (1.0,) * 4, 0.0), n)


def test_layers_that_are_built_alike_share_one_measured_time(make_target: Callable[..., Target]) -> None:
    target = make_target("qwen3_5_text", num_layers=6)
    costs = measure(target, context=12, repeats=3)
    kinds = dict(zip(target.layer_kinds, costs.layers, strict=True))
    assert len(costs.layers) == 6 and set(kinds) == {"linear_attention", "full_attention"}
    assert all(costs.layers[index] == kinds[kind] > 0 for index, kind in enumerate(target.layer_kinds))
    assert costs.embedding > 0 and costs.verification > 0


def test_the_table_names_layers_time_and_share_of_every_stage() -> None:
    split = Split((2, 1, 0), Costs(0.001, (0.002, 0.002, 0.004), 0.006))
    lines = split.table().splitlines()
    assert lines[0] == "stage_layers: auto -> [2, 1, 0]"
    assert [line.split() for line in lines[2:5]] == [
        ["0", "0-1", "5.000", "83%", "+", "embedding"],
        ["1", "2", "4.000", "67%"],
        ["2", "none", "6.000", "100%", "+", "norm,", "lm_head,", "verification"],
    ]
    assert "2.50 x from 3 stages" in lines[5]


def test_a_target_can_be_loaded_with_a_measured_split(make_target: Callable[..., Target], tmp_path: object) -> None:
    make_target("llama", num_layers=5).model.save_pretrained(str(tmp_path))
    target = load_target(str(tmp_path), num_stages=3, stage_layers="auto")
    assert target.stage_layers is not None and len(target.stage_layers) == 3 and sum(target.stage_layers) == 5
    with pytest.raises(InputError, match="set num_stages"):
        load_target(str(tmp_path), stage_layers="auto")
    assert sum(measured_split(target, 2).stage_layers) == 5
