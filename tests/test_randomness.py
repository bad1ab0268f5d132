"""Counter-based randomness: a draw depends on what it is for, and on nothing else."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from spd_lightning.randomness import Purpose, generator, philox, uniform


def test_the_same_counters_give_the_same_number_in_any_order_of_calls() -> None:
    counters = list(product((0, 7), Purpose, (0, 5, 4095), (0, 1)))
    first = {counter: uniform(*counter) for counter in counters}
    again = {counter: uniform(*counter) for counter in reversed(counters)}
    assert first == again


def test_a_number_does_not_change_between_versions() -> None:
    """Resumed runs and other engines rely on the values; computed once with Philox4x64-10 of NumPy."""
    word = np.random.Philox(counter=np.array([0, 17, 2, 0], np.uint64), key=np.array([5, 2], np.uint64)).random_raw()
    assert uniform(5, Purpose.ACCEPT, 17, 2) == (int(word) >> 11) / 2**53
    assert [purpose.value for purpose in Purpose] == list(range(len(Purpose))), "numbers of purposes are a format"
    assert Purpose.TARGET == 0 and Purpose.DRAFT == 1 and Purpose.ACCEPT == 2 and Purpose.RESIDUAL == 3


def test_another_seed_purpose_position_or_attempt_gives_another_number() -> None:
    counters = list(product((0, 1, 2**63), Purpose, range(20), range(4)))
    assert len({uniform(*counter) for counter in counters}) == len(counters)


@settings(max_examples=200, deadline=None)
@given(st.integers(-(2**70), 2**70), st.sampled_from(Purpose), st.integers(0, 2**40), st.integers(0, 2**20))
def test_a_number_lies_in_0_to_1_for_any_counters(seed: int, purpose: Purpose, position: int, attempt: int) -> None:
    assert 0.0 <= uniform(seed, purpose, position, attempt) < 1.0


def test_numbers_are_uniform_along_every_counter() -> None:
    along = {
        "seed": [uniform(i, Purpose.DRAFT, 3, 0) for i in range(4000)],
        "position": [uniform(3, Purpose.DRAFT, i, 0) for i in range(4000)],
        "attempt": [uniform(3, Purpose.DRAFT, 3, i) for i in range(4000)],
    }
    for counter, numbers in along.items():
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3, counter
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06, counter


def test_two_purposes_are_uncorrelated() -> None:
    coins = np.array([[uniform(1, purpose, i, 0) for i in range(4000)] for purpose in Purpose])
    correlations = np.corrcoef(coins) - np.eye(len(Purpose))
    assert np.abs(correlations).max() < 0.06


def test_a_generator_of_one_sample_is_a_stream_of_its_own() -> None:
    first = generator(9, Purpose.RESTART, 2, 100).random(1000)
    assert np.array_equal(first, generator(9, Purpose.RESTART, 2, 100).random(1000))
    for other in ((8, Purpose.RESTART, 2, 100), (9, Purpose.ORDER, 2, 100), (9, Purpose.RESTART, 2, 101)):
        assert not np.intersect1d(first, generator(*other).random(1000)).size
    with pytest.raises(ValueError, match="at most three counters"):
        philox(0, Purpose.COIN, 1, 2, 3, 4)
