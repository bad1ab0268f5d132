"""Layers of the cache against a plain model of them: a list that keeps every state, under random steps and rollbacks.

What a pipeline does to one layer: a prompt, then steps of one token and truncations that take back at most `rollback`
tokens in a row. The buffers hold numbers that name their position, so that a wrong one cannot pass for the right one.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from spd_lightning.target.cache import RecurrentLayer, SlidingAttentionLayer

KERNEL = 4
ROLLBACKS = (0, 1, 2, 3, 7)
WINDOWS = (1, 2, 3, 6)
STEPS = 150


def numbered(*values: int) -> Tensor:
    """Keys [1, 2, T, 3] that name their positions and heads."""
    heads = torch.arange(2)[None, :, None, None] * 0.5
    return torch.tensor(values, dtype=torch.float64)[None, None, :, None] + heads + torch.zeros(1, 2, len(values), 3)


def prompt_lengths(window: int, rollback: int) -> list[int]:
    needed = window - 1 + rollback
    return sorted({1, 2, max(1, window - 1), window, window + 1, max(1, needed), needed + 1, 2 * needed + 3})


# -- a sliding window ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rollback", ROLLBACKS)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_shows_what_a_list_of_all_keys_shows_under_random_steps_and_rollbacks(
    window: int, rollback: int
) -> None:
    generator, moved = random.Random(100 * window + rollback), 0
    for length in prompt_lengths(window, rollback):
        for capacity in (length + STEPS, length + window + rollback):
            layer = SlidingAttentionLayer(capacity, window, rollback)
            history = [generator.randrange(10**6) for _ in range(length)]
            keys, values = layer.update(numbered(*history), -numbered(*history))
            assert torch.equal(keys, numbered(*history)) and torch.equal(values, -numbered(*history))
            furthest = length  # rolling back never reaches further than `rollback` behind the longest it has been
            for _ in range(STEPS):
                if len(history) < length + STEPS and len(history) < capacity and generator.random() < 0.7:
                    token = generator.randrange(10**6)
                    assert layer.get_mask_sizes(1) == (min(len(history) + 1, window), max(0, len(history) + 1 - window))
                    history.append(token)
                    keys, values = layer.update(numbered(token), -numbered(token))
                    assert torch.equal(keys, numbered(*history[-window:])), (length, len(history))
                    assert torch.equal(values, -numbered(*history[-window:]))
                    furthest = max(furthest, len(history))
                else:
                    least = max(length, furthest - rollback)
                    to = generator.randint(min(least, len(history)), len(history) + 2)
                    layer.truncate(to)
                    del history[to:]
                assert layer.get_seq_length() == len(history)
            moved += layer.first > max(0, length - window + 1 - rollback)
            layer.reset()
            assert layer.get_seq_length() == 0
            assert torch.equal(layer.update(numbered(3), numbered(3))[0], numbered(3))
    assert moved, "some buffer was full"


def test_a_window_refuses_to_go_back_further_than_agreed() -> None:
    window, rollback = 4, 2
    layer = SlidingAttentionLayer(100, window, rollback)
    layer.update(numbered(*range(20)), numbered(*range(20)))
    for token in range(20, 23):
        layer.update(numbered(token), numbered(token))
    layer.truncate(23 - rollback)
    layer.update(numbered(21), numbered(21))
    with pytest.raises(AssertionError, match="further than agreed"):
        layer.truncate(layer.first + window - 2)


# -- a recurrent layer -----------------------------------------------------------------------------------------


class PlainRecurrence:
    """Every state there ever was, by number of tokens: the convolution's inputs and a decaying sum."""

    def __init__(self, prompt: list[int]) -> None:
        self.inputs, self.sums = list(prompt), [0.0]
        for token in prompt:
            self.sums.append(self.sums[-1] * 0.5 + token)

    def step(self, token: int) -> None:
        self.inputs.append(token)
        self.sums.append(self.sums[-1] * 0.5 + token)

    def truncate(self, length: int) -> None:
        del self.inputs[length:], self.sums[length + 1 :]

    @property
    def conv(self) -> Tensor:
        last = [0] * KERNEL + self.inputs
        return torch.tensor(last[-KERNEL:], dtype=torch.float64).expand(1, 2, KERNEL)

    @property
    def state(self) -> Tensor:
        return torch.full((1, 2, 3, 3), self.sums[-1], dtype=torch.float64)


def absorb(layer: RecurrentLayer, prompt: list[int]) -> PlainRecurrence:
    plain = PlainRecurrence(prompt)
    inputs = torch.tensor(prompt, dtype=torch.float64).expand(1, 2, len(prompt))
    assert layer.next_conv_state() is None and layer.recurrent_state is None, "nothing before the prompt"
    padded = layer.update_conv_state(inputs, conv_kernel_size=KERNEL)
    assert padded.shape[-1] == max(KERNEL, len(prompt)) and torch.equal(padded[..., -len(prompt) :], inputs)
    assert torch.equal(layer.update_recurrent_state(plain.state), plain.state)
    return plain


def step(layer: RecurrentLayer, plain: PlainRecurrence, token: int) -> None:
    """As the library's layers do it: the convolution's state is updated in place, the recurrent one handed over."""
    state = layer.next_conv_state()
    assert state is not None and torch.equal(state, plain.conv)
    state.copy_(torch.cat((state[..., 1:], state.new_full((1, 2, 1), token)), dim=-1))
    before = layer.recurrent_state
    assert before is not None and torch.equal(before, plain.state)
    plain.step(token)
    assert torch.equal(layer.update_recurrent_state(before * 0.5 + token), plain.state)


@pytest.mark.parametrize("rollback", ROLLBACKS)
def test_a_ring_of_snapshots_equals_a_list_of_all_states_under_random_steps_and_rollbacks(rollback: int) -> None:
    generator, deepest = random.Random(rollback), 0
    for length in range(1, 2 * KERNEL + 2):
        layer = RecurrentLayer(rollback)
        plain = absorb(layer, [generator.randrange(1, 1000) for _ in range(length)])
        furthest = length
        for _ in range(STEPS):
            if generator.random() < 0.7:
                step(layer, plain, generator.randrange(1, 1000))
                furthest = max(furthest, layer.length)
            else:
                least = max(length, furthest - rollback)
                to = generator.randint(min(least, layer.length), layer.length + 2)
                deepest = max(deepest, layer.length - to)
                layer.truncate(to)
                plain.truncate(to)
            assert layer.length == len(plain.inputs)
            assert layer.conv_state is not None and torch.equal(layer.conv_state, plain.conv)
            assert layer.recurrent_state is not None and torch.equal(layer.recurrent_state, plain.state)
        layer.reset()
        step(layer, absorb(layer, [1, 2]), 3)
    assert deepest == rollback


@pytest.mark.parametrize("rollback", ROLLBACKS)
def test_a_ring_refuses_to_go_back_further_than_agreed_and_never_into_the_prompt(rollback: int) -> None:
    layer = RecurrentLayer(rollback)
    plain = absorb(layer, [1, 2, 3])
    with pytest.raises(AssertionError, match="further than agreed"):
        layer.truncate(2)
    for token in range(10):
        step(layer, plain, token)
        least = max(3, layer.length - rollback)
        with pytest.raises(AssertionError, match="further than agreed"):
            layer.truncate(least - 1)
        assert layer.length == 4 + token, "a refusal moves nothing"
    layer.truncate(13 - rollback)
    with pytest.raises(AssertionError, match="further than agreed"):
        layer.truncate(12 - rollback)
    plain.truncate(13 - rollback)
    step(layer, plain, 99)
    assert torch.equal(layer.recurrent_state, plain.state)  # type: ignore[arg-type]
