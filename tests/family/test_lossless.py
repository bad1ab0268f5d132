"""Every family decodes losslessly: greedy speculative output == autoregressive output == transformers' own generate.

Proven over stages, prompt lengths on both sides of a window's edge, drafters of every quality, a rejection in every
phase of the fill, and depths that no number of stages divides. After every rollback the cache of every layer holds,
bit for bit, what a run without any rejection holds.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from parity.test_lossless import OracleDrafter, check_generation, library_greedy
from torch import Tensor

from spd_lightning.decoding.decoder import CycleEvent, SpdDecoder, autoregressive_generate
from spd_lightning.head.loading import new_head
from spd_lightning.target.cache import FullAttentionLayer, RecurrentLayer, RollbackCache, SlidingAttentionLayer
from spd_lightning.target.target import Target

from .common import (
    FAMILIES,
    HYBRID,
    SLIDING,
    VARIED,
    WINDOW,
    EveryPhase,
    WrongAt,
    build,
    every_family,
    random_prompt,
    rejected_phases,
    staircase_of,
    tokens_for_every_phase,
)

NEW_TOKENS = 12
SPLITS = {2: (2, 3), 4: (1, 2, 1, 2), 8: (1, 1, 1, 2, 1, 1, 1, 1)}
PROMPT_LENGTHS = (1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW)
DRAFTERS = ("head", "oracle 0.9", "oracle 0.6", "oracle 0.3")


def make_drafter(kind: str, target: Target, tokens: Sequence[int], seed: int) -> Any:
    if kind == "head":
        return new_head(target, num_layers=1, seed=seed)
    return OracleDrafter(staircase_of(target), tokens, float(kind.split()[1]), seed)


def expected_tokens(target: Target, prompt: list[int], count: int) -> list[int]:
    """What transformers' own generate says, which the autoregressive baseline must say too."""
    expected = library_greedy(target, prompt, count)
    assert autoregressive_generate(target, prompt, count).token_ids == expected, prompt
    return expected


def check_decoding(target: Target, drafter: Any, prompt: list[int], expected: list[int]) -> list[CycleEvent]:
    assert target.stage_layers is not None
    events: list[CycleEvent] = []
    generation = SpdDecoder(target, drafter).generate(prompt, len(expected), observer=events.append)
    assert generation.token_ids == expected, (target.stage_layers, prompt)
    check_generation(generation, events, prompt, len(target.stage_layers))
    return events


@every_family
def test_greedy_output_is_the_targets_own(
    make_target: Callable[..., Target], family: str, record_property: Any
) -> None:
    generator = random.Random(family)
    cases, texts, verdicts = 0, [], []
    for n, split in SPLITS.items():
        target = build(make_target, family, split, seed=n, **VARIED.get(family, {}))
        for index, length in enumerate(PROMPT_LENGTHS if n < 8 else PROMPT_LENGTHS[::2]):
            prompt = random_prompt(length, generator)
            script = index == 0 or (index == 3 and n < 8)
            expected = expected_tokens(target, prompt, max(NEW_TOKENS, script * tokens_for_every_phase(n)))
            texts.append(expected)
            for kind in (DRAFTERS[index % 4], DRAFTERS[(index + 1 + n // 4) % 4]):
                drafter = make_drafter(kind, target, prompt + expected[:NEW_TOKENS], seed=10 * n + index)
                events = check_decoding(target, drafter, prompt, expected[:NEW_TOKENS])
                verdicts += [event.accepted for event in events if event.accepted is not None]
                cases += 1
            if script:
                drafter = EveryPhase(staircase_of(target), prompt + expected, seed=index)
                found = rejected_phases(check_decoding(target, drafter, prompt, expected))
                assert set(found) == set(range(1, n + 1)), "a rejection in every phase of the fill"
                cases += 1
    distinct = [len(set(text)) for text in texts]
    print(f"{family}: {cases} cases, {min(distinct)}..{max(distinct)} distinct tokens, {sum(verdicts)} accepted")
    assert cases >= 30
    assert 0 < sum(verdicts) < len(verdicts)
    assert sum(count >= 4 for count in distinct) > 0.75 * len(texts), "a text that repeats one token proves little"
    record_property("cases", cases)


# -- what a rollback leaves behind -----------------------------------------------------------------------------


def states_of(layer: FullAttentionLayer | RecurrentLayer) -> list[Tensor]:
    """What the next token can see of a layer's past."""
    if isinstance(layer, RecurrentLayer):
        assert layer.conv_state is not None and layer.recurrent_state is not None
        return [layer.conv_state, layer.recurrent_state]
    assert layer.keys is not None and layer.values is not None
    seen = slice(0, layer.length)
    if isinstance(layer, SlidingAttentionLayer):
        stop = layer.length - layer.first
        seen = slice(max(0, stop - layer.window + 1), stop)
    return [layer.keys[:, :, seen], layer.values[:, :, seen]]


@torch.inference_mode()
def states_without_rejection(target: Target, prompt: list[int], tokens: list[int]) -> dict[int, list[list[Tensor]]]:
    """Length -> layer -> states, of a fresh run: the prompt at once, then token by token."""
    capacity = len(prompt) + len(tokens) + 1
    cache, rotary = target.new_cache(capacity), target.rotary_table(capacity)
    _, last = target(torch.tensor([prompt]), (), cache=cache)
    nothing, found = last.new_empty(0, target.hidden_size), {}
    for position, token in enumerate(tokens, len(prompt)):
        target.run_layers(target.embed(token), range(target.num_layers), position, rotary, cache, {}, nothing)
        found[position + 1] = [[state.clone() for state in states_of(layer)] for layer in cache.rollback_layers]
    return found


def check_states_after_every_restart(
    target: Target, prompt: list[int], drafter: Any, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> int:
    """Number of restarts; after each, every layer's states equal those of a run without rejection, bit for bit."""
    reference = states_without_rejection(target, prompt, expected)
    caches: list[RollbackCache] = []
    make = target.new_cache
    with monkeypatch.context() as patch:
        patch.setattr(target, "new_cache", lambda *args: caches.append(make(*args)) or caches[-1])
        restarts = 0

        def observe(event: CycleEvent) -> None:
            nonlocal restarts
            if event.accepted is not False:
                return
            assert event.cycle is not None and event.cycle.leaving is not None
            length = event.cycle.leaving + 1
            for index, layer in enumerate(caches[-1].rollback_layers):
                assert layer.length == length, (index, "every layer is at the position before the restart")
                for ours, theirs in zip(states_of(layer), reference[length][index], strict=True):
                    assert torch.equal(ours, theirs), (target.layer_kinds[index], index, length)
            restarts += 1

        generation = SpdDecoder(target, drafter).generate(prompt, len(expected), observer=observe)
    assert generation.token_ids == expected
    return restarts


@every_family
def test_a_rollback_leaves_every_layer_as_if_nothing_had_been_drafted(
    make_target: Callable[..., Target], family: str, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    cases = 0
    for n, split in SPLITS.items():
        target = build(make_target, family, split, seed=10 + n, **VARIED.get(family, {}))
        prompt = random_prompt(3 + n // 4, random.Random(n))
        expected = expected_tokens(target, prompt, tokens_for_every_phase(n) + 3)
        drafter = EveryPhase(staircase_of(target), prompt + expected, seed=n)
        assert check_states_after_every_restart(target, prompt, drafter, expected, monkeypatch) >= n
        cases += 1
    record_property("cases", cases)


@pytest.mark.parametrize("family", HYBRID)
def test_200_restarts_in_a_row_leave_recurrent_states_bit_equal_to_a_fresh_run(
    make_target: Callable[..., Target], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = build(make_target, family, (1, 1, 1, 1), seed=4)
    assert {"linear_attention", "full_attention"} == set(target.layer_kinds)
    prompt = [5, 6, 7]
    expected = expected_tokens(target, prompt, 202)
    never = OracleDrafter(staircase_of(target), prompt + expected, acceptance=0.0)
    assert check_states_after_every_restart(target, prompt, never, expected, monkeypatch) >= 200


# -- the edge of a window --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SLIDING)
def test_restarts_right_before_at_and_right_after_the_windows_edge_change_nothing(
    make_target: Callable[..., Target], family: str, record_property: Any
) -> None:
    cases = 0
    for n, split in SPLITS.items():
        target = build(make_target, family, split, seed=20 + n, **VARIED.get(family, {}))
        assert "sliding_attention" in target.layer_kinds and target.config.sliding_window == WINDOW
        for length in (1, 3, WINDOW - 1, WINDOW, WINDOW + 1):
            prompt = random_prompt(length, random.Random(length))
            expected = expected_tokens(target, prompt, 2 * WINDOW)
            edge = [at for at in range(WINDOW - 1, WINDOW + 3) if at > length]
            edge = edge or [length + 1, length + 2]
            chosen = [*combinations(edge, 1), tuple(edge)]
            for wrong in chosen[:: 1 if n == 4 else 2]:
                drafter = WrongAt(staircase_of(target), prompt + expected, wrong)
                events = check_decoding(target, drafter, prompt, expected)
                restarts = [event.cycle.leaving for event in events if event.cycle and event.accepted is False]
                assert restarts == [at - 1 for at in wrong]
                cases += 1
    record_property("cases", cases)


@pytest.mark.parametrize("family", SLIDING)
def test_a_long_generation_moves_its_windows_again_and_again(
    make_target: Callable[..., Target], family: str, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """The buffer holds 2 (window + rollback) positions; what is still needed moves to its front when it is full."""
    moves: Counter[SlidingAttentionLayer] = Counter()
    original = SlidingAttentionLayer._make_room

    def counted(layer: SlidingAttentionLayer) -> None:
        moves[layer] += 1
        original(layer)

    monkeypatch.setattr(SlidingAttentionLayer, "_make_room", counted)
    cases = 0
    for n, prompt_length, acceptance in ((2, 1, 0.8), (4, WINDOW + 3, 0.5)):
        target = build(make_target, family, SPLITS[n], seed=30 + n, **VARIED.get(family, {}))
        prompt = random_prompt(prompt_length, random.Random(n))
        expected = library_greedy(target, prompt, 64)
        moves.clear()
        assert autoregressive_generate(target, prompt, 64).token_ids == expected
        check_decoding(target, OracleDrafter(staircase_of(target), prompt + expected, acceptance), prompt, expected)
        layers = target.layer_kinds.count("sliding_attention")
        assert len(moves) == 2 * layers and min(moves.values()) >= 3, "every window of both runs moved"
        cases += 1
    record_property("cases", cases)


# -- depths and stages -----------------------------------------------------------------------------------------

DEPTHS = [(layers, n) for layers in (5, 7, 31, 36) for n in (2, 3, 4, 8)]


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text"])
@pytest.mark.parametrize(("layers", "n"), DEPTHS)
def test_any_depth_decodes_losslessly_on_any_number_of_stages(
    make_target: Callable[..., Target], layers: int, n: int, family: str
) -> None:
    spread = 0.25 if layers < 10 else 0.1
    target = build(make_target, family, n, layers, seed=layers, spread=spread)
    prompt = [1, 2, 3]
    expected = expected_tokens(target, prompt, 8)
    check_decoding(target, OracleDrafter(staircase_of(target), prompt + expected, 0.6, seed=n), prompt, expected)
    if layers < 10:
        check_decoding(target, new_head(target, num_layers=1), prompt, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text", "gemma3_text"])
@pytest.mark.parametrize("split", [(2, 0, 3), (0, 2, 3), (2, 3, 0), (0, 0, 5), (1, 0, 0, 4)], ids=str)
def test_a_split_with_empty_stages_decodes_losslessly(
    make_target: Callable[..., Target], split: tuple[int, ...], family: str
) -> None:
    target = build(make_target, family, split, seed=3, **VARIED.get(family, {}))
    prompt = [4, 9]
    expected = expected_tokens(target, prompt, tokens_for_every_phase(len(split)) + 4)
    check_decoding(target, EveryPhase(staircase_of(target), prompt + expected, seed=1), prompt, expected)
    check_decoding(target, OracleDrafter(staircase_of(target), prompt + expected, 0.7), prompt, expected)
    check_decoding(target, new_head(target, num_layers=1), prompt, expected)


def test_hybrid_and_sliding_families_are_named_by_their_layers(make_target: Callable[..., Target]) -> None:
    kinds = {family: set(build(make_target, family, (2, 4)).layer_kinds) for family in FAMILIES}
    assert tuple(family for family in FAMILIES if "linear_attention" in kinds[family]) == HYBRID
    assert tuple(family for family in FAMILIES if "sliding_attention" in kinds[family]) == SLIDING
