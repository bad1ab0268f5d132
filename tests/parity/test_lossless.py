"""Greedy speculative decoding == autoregressive decoding == transformers' own generate; what a Generation reports.

A random head is rarely right for long, so the interesting cases come from an oracle that knows the continuation and
is corrupted by seeded coins: runs of every length, restarts everywhere, and acceptance exactly 1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lightning.decoding.decoder import CycleEvent, SpdDecoder, autoregressive_generate
from spd_lightning.decoding.drafters import Draft, PromptLookupDrafter
from spd_lightning.decoding.generation import Generation, Pooled
from spd_lightning.decoding.sampling import Sampling
from spd_lightning.decoding.schedule import Cycle
from spd_lightning.errors import InputError
from spd_lightning.head.loading import new_head
from spd_lightning.staircase import Staircase, default_anchors
from spd_lightning.target.target import Target

VOCABULARY = 60
NEW_TOKENS = 14

# (family, layers, num_stages or stage_layers, tie, embedding_scale). A large embedding_scale (with little spread)
# lets an untrained head be right half of the time.
TARGETS: list[tuple[str, int, int | tuple[int, ...], bool, float]] = [
    ("llama", 2, 2, False, 1.0),
    ("llama", 4, 4, True, 1.0),
    ("llama", 5, (1, 3, 1), False, 4.0),
    ("llama", 8, 8, False, 1.0),
    ("qwen3", 3, (2, 1), False, 4.0),
    ("qwen3", 4, 3, True, 1.0),
    ("qwen3", 6, (1, 1, 3, 1), False, 4.0),
    ("qwen3", 6, 6, False, 4.0),
]
PROMPT_LENGTHS = (1, 2, 5, 11)
DRAFTERS = (
    "head",
    "head with draft vocabulary",
    "prompt lookup",
    "oracle 1.0",
    "oracle 0.9",
    "oracle 0.7",
    "oracle 0.4",
)
CASES = list(product(range(len(TARGETS)), PROMPT_LENGTHS, DRAFTERS))


class OracleDrafter:
    """Knows the continuation; a coin decides whether it proposes it or another token."""

    draft_ids: Tensor | None = None

    def __init__(
        self,
        staircase: Staircase,
        tokens: Sequence[int],
        acceptance: float = 1.0,
        seed: int = 0,
        vocab: int = VOCABULARY,
    ) -> None:
        self.staircase, self.right, self.acceptance, self.vocab = staircase, list(tokens), acceptance, vocab
        self.coins = random.Random(seed)

    def start(self, prompt: Sequence[int], states: list[Tensor], capacity: int) -> None:
        assert list(prompt) == self.right[: len(prompt)] and states[0].shape[:2] == (1, len(prompt))

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        position = cycle.newest + 1
        assert len(tokens) == position, "everything up to the newest token is known"
        right = self.right[position] if position < len(self.right) else 0
        wrong = (right + self.coins.randrange(1, VOCABULARY)) % VOCABULARY
        return Draft(right if self.coins.random() < self.acceptance else wrong, None)


def build(make_target: Callable[..., Target], index: int) -> Target:
    family, layers, stages, tie, scale = TARGETS[index]
    split: dict[str, Any] = {"num_stages": stages} if isinstance(stages, int) else {"stage_layers": stages}
    spread = 0.05 if scale > 1 else 0.25
    return make_target(
        family, layers, vocab=VOCABULARY, seed=index, tie=tie, spread=spread, embedding_scale=scale, **split
    )


def library_greedy(target: Target, prompt: list[int], new_tokens: int, eos: int | list[int] | None = None) -> list[int]:
    """transformers' own generate: the new tokens."""
    ids = torch.tensor([prompt])
    settings: dict[str, Any] = {} if eos is None else {"eos_token_id": eos}
    out = target.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )
    return out[0, len(prompt) :].tolist()


def make_drafter(kind: str, target: Target, tokens: list[int], seed: int) -> Any:
    assert target.stage_layers is not None
    staircase = Staircase(target.stage_layers, default_anchors(target.stage_layers))
    if kind.startswith("oracle"):
        return OracleDrafter(staircase, tokens, float(kind.split()[1]), seed)
    if kind == "prompt lookup":
        return PromptLookupDrafter(staircase, VOCABULARY)
    ids = random.Random(seed).sample(range(VOCABULARY), 25) if "vocabulary" in kind else None
    return new_head(target, num_layers=1 + seed % 2, draft_token_ids=ids, seed=seed)


def check_generation(generation: Generation, events: list[CycleEvent], prompt: list[int], n: int) -> None:
    """Every field against what happened, cycle by cycle, and against its definition."""
    P, new = len(prompt), len(generation.token_ids)
    assert (generation.prompt_length, generation.num_stages) == (P, n)
    assert [event.emitted for event in events if event.emitted is not None] == generation.token_ids
    assert events[0].cycle is None and all(event.cycle is not None for event in events[1:])
    assert generation.cycles == len(events) - 1
    verdicts = [event.accepted for event in events if event.accepted is not None]
    assert generation.drafts_verified == len(verdicts) == new - 1
    assert generation.drafts_accepted == sum(verdicts)
    assert generation.accepted_flags == verdicts
    starts = [P, *(P + 1 + index for index, verdict in enumerate(verdicts) if not verdict)]
    assert generation.restart_positions == starts
    runs = [stop - start for start, stop in zip(starts, [*starts[1:], P + new - 1], strict=True)]
    assert generation.cycles == sum(run + n - 1 for run in runs if run >= 1)
    if new == 1:
        assert generation.acceptance is None and generation.theoretical_speedup is None
    else:
        assert generation.acceptance == pytest.approx(sum(verdicts) / (new - 1))
        assert generation.theoretical_speedup == pytest.approx(n * (new - 1) / generation.cycles)
    assert generation.prefill_seconds > 0 and generation.decode_seconds >= 0


def test_the_cases_below_are_more_than_200() -> None:
    assert len(CASES) == 224


@pytest.mark.parametrize("index", range(len(TARGETS)), ids=lambda i: "-".join(map(str, TARGETS[i][:3])))
def test_greedy_output_is_the_targets_own_for_every_drafter(make_target: Callable[..., Target], index: int) -> None:
    generator = random.Random(index)
    acceptances: dict[str, list[Generation]] = {kind: [] for kind in DRAFTERS}
    for length in PROMPT_LENGTHS:
        target = build(make_target, index)
        assert target.stage_layers is not None
        n = len(target.stage_layers)
        prompt = [generator.randrange(VOCABULARY) for _ in range(length)]
        expected = library_greedy(target, prompt, NEW_TOKENS)
        assert len(expected) == NEW_TOKENS
        baseline = autoregressive_generate(target, prompt, NEW_TOKENS)
        assert baseline.token_ids == expected
        assert (baseline.num_stages, baseline.cycles, baseline.drafts_verified) == (1, NEW_TOKENS - 1, 0)
        for seed, kind in enumerate(DRAFTERS):
            drafter = make_drafter(kind, target, prompt + expected, 10 * length + seed)
            events: list[CycleEvent] = []
            generation = SpdDecoder(target, drafter).generate(prompt, NEW_TOKENS, observer=events.append)
            assert generation.token_ids == expected, (kind, prompt)
            check_generation(generation, events, prompt, n)
            if kind == "oracle 1.0":
                assert generation.acceptance == 1 and generation.restart_positions == [length]
                assert generation.cycles == NEW_TOKENS - 1 + n - 1
            acceptances[kind].append(generation)
    pooled = {kind: Pooled.of(generations, n) for kind, generations in acceptances.items()}
    print({kind: f"p={one.acceptance:.2f} S={one.theoretical_speedup:.2f}" for kind, one in pooled.items()})
    for kind in ("oracle 0.9", "oracle 0.7", "oracle 0.4"):
        assert 0 < pooled[kind].drafts_accepted < pooled[kind].drafts_verified


def test_one_decoder_decodes_many_prompts_without_remembering_any(make_target: Callable[..., Target]) -> None:
    target = build(make_target, 2)
    decoder = SpdDecoder(target, new_head(target))
    prompts = [[3], [5, 6, 7], [1, 2], [3]]
    generations = [decoder.generate(prompt, NEW_TOKENS) for prompt in prompts]
    for prompt, generation in zip(prompts, generations, strict=True):
        assert generation.token_ids == autoregressive_generate(target, prompt, NEW_TOKENS).token_ids
    first, last = generations[0], generations[-1]
    assert (first.token_ids, first.cycles, first.restart_positions) == (
        last.token_ids,
        last.cycles,
        last.restart_positions,
    )


@pytest.mark.parametrize("form", ["list", "row", "batch of one"])
def test_a_prompt_may_be_a_list_or_a_tensor(make_target: Callable[..., Target], form: str) -> None:
    target = build(make_target, 0)
    prompt: Any = [3, 1, 4]
    expected = autoregressive_generate(target, prompt, 5).token_ids
    given = {"list": prompt, "row": torch.tensor(prompt), "batch of one": torch.tensor([prompt])}[form]
    assert SpdDecoder(target, new_head(target)).generate(given, 5).token_ids == expected


# -- length and end of sequence ------------------------------------------------------------------------------


@pytest.fixture
def endless(make_target: Callable[..., Target]) -> tuple[Target, list[int], list[int], Staircase]:
    """A target of 4 stages, a prompt and 20 greedy tokens, the first 6 of which differ from one another."""
    for seed in range(100):
        target = make_target(num_layers=4, vocab=VOCABULARY, num_stages=4, seed=seed, spread=0.3)
        tokens = library_greedy(target, [7, 8, 9], 20)
        if len(set(tokens[:6])) == 6:
            return target, [7, 8, 9], tokens, Staircase((1, 1, 1, 1), (0, 1, 2, 3, 4))
    raise AssertionError("no such target")


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 5, 20])
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 1.0])
def test_max_new_tokens_is_exact(endless: Any, new_tokens: int, acceptance: float) -> None:
    target, prompt, tokens, staircase = endless
    drafter = OracleDrafter(staircase, prompt + tokens, acceptance)
    events: list[CycleEvent] = []
    generation = SpdDecoder(target, drafter).generate(prompt, new_tokens, observer=events.append)
    assert generation.token_ids == tokens[:new_tokens]
    check_generation(generation, events, prompt, 4)
    if new_tokens == 1:
        assert generation.cycles == 0


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0], ids=["as correction", "as either", "as draft"])
@pytest.mark.parametrize("at", [0, 1, 2, 5])
@pytest.mark.parametrize("form", ["id", "list", "tuple", "config", "several"])
def test_generation_ends_with_the_end_of_sequence_and_emits_nothing_after_it(
    endless: Any, form: str, at: int, acceptance: float
) -> None:
    """First token, accepted draft or correction: at = 0 is the target's own first token."""
    target, prompt, tokens, staircase = endless
    end = tokens[at]
    unused = next(token for token in range(VOCABULARY) if token not in tokens)
    given = {
        "id": end,
        "list": [end],
        "tuple": (end,),
        "config": None,
        "several": [unused, end, tokens[at + 1]],
    }[form]
    if form == "config":
        target.model.generation_config.eos_token_id = [unused, end]
    ids = given if given is None else ([given] if isinstance(given, int) else list(given))
    assert library_greedy(target, prompt, 20, ids) == tokens[: at + 1]
    events: list[CycleEvent] = []
    decoder = SpdDecoder(target, OracleDrafter(staircase, prompt + tokens, acceptance, seed=at))
    generation = decoder.generate(prompt, 20, eos_token_id=given, observer=events.append)
    assert generation.token_ids == tokens[: at + 1]
    check_generation(generation, events, prompt, 4)
    assert autoregressive_generate(target, prompt, 20, eos_token_id=given).token_ids == tokens[: at + 1]


def test_a_wrong_end_of_sequence_in_flight_ends_nothing(endless: Any) -> None:
    target, prompt, tokens, staircase = endless
    end = next(token for token in range(VOCABULARY) if token not in tokens)

    class Ender(OracleDrafter):
        def draft(self, *args: Any) -> Draft:
            return Draft(end, None)

    generation = SpdDecoder(target, Ender(staircase, prompt + tokens)).generate(prompt, 20, eos_token_id=end)
    assert generation.token_ids == tokens and generation.acceptance == 0


def test_an_empty_list_means_never_and_none_means_the_configured_ids(endless: Any) -> None:
    target, prompt, tokens, staircase = endless
    decoder = SpdDecoder(target, OracleDrafter(staircase, prompt + tokens))
    target.model.generation_config.eos_token_id = None
    target.model.config.eos_token_id = tokens[2]
    assert decoder.generate(prompt, 20).token_ids == tokens[:3]
    target.model.generation_config.eos_token_id = tokens[1]
    assert decoder.generate(prompt, 20).token_ids == tokens[:2]
    assert decoder.generate(prompt, 20, eos_token_id=[]).token_ids == tokens
    assert autoregressive_generate(target, prompt, 20, eos_token_id=[]).token_ids == tokens


def test_an_end_of_sequence_inside_the_prompt_ends_nothing(endless: Any) -> None:
    target, prompt, tokens, staircase = endless
    unused = next(token for token in prompt if token not in tokens)
    decoder = SpdDecoder(target, OracleDrafter(staircase, prompt + tokens))
    assert decoder.generate(prompt, 20, eos_token_id=unused).token_ids == tokens


# -- what must be refused, or be right -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "input_ids is empty"),
        ([3, VOCABULARY], {}, f"{VOCABULARY}.*vocabulary"),
        ([-1], {}, "-1"),
        ([[1, 2], [3, 4]], {}, "2 sequences"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1] * 250, {"max_new_tokens": 7}, "250.*max_new_tokens=7.*256"),
        ([1], {"temperature": -0.5}, "temperature=-0.5"),
        ([1], {"temperature": float("nan")}, "temperature=nan"),
        ([1], {"top_k": -1}, "top_k=-1"),
        ([1], {"top_p": 0.0}, "top_p=0.0"),
        ([1], {"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_impossible_requests_are_refused_by_name_and_value(
    make_target: Callable[..., Target], prompt: Any, settings: dict[str, Any], message: str
) -> None:
    target = build(make_target, 0)
    arguments = {"max_new_tokens": 3, **settings}
    for generate in (
        SpdDecoder(target, new_head(target)).generate,
        lambda *a, **k: autoregressive_generate(target, *a, **k),
    ):
        with pytest.raises(InputError, match=message):
            generate(prompt, **arguments)


def test_a_head_of_other_stages_is_refused_showing_both(make_target: Callable[..., Target]) -> None:
    head = new_head(make_target(num_layers=4, stage_layers=(1, 3)))
    with pytest.raises(InputError, match=r"\[1, 3\].*\[3, 1\]"):
        SpdDecoder(make_target(num_layers=4, stage_layers=(3, 1)), head)
    with pytest.raises(InputError, match=r"number of layers is 4 .* 5 "):
        SpdDecoder(make_target(num_layers=5), head)
    with pytest.raises(InputError, match=r"vocabulary size is 60 .* 61 "):
        SpdDecoder(make_target(num_layers=4, vocab=61), head)


ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 1e4},
    "linear": {"rope_theta": 1e4, "factor": 2.0},
    "llama3": {
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "yarn": {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8},
    "dynamic": {"rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_theta": 1e4,
        "factor": 2.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("rope", ROPE)
def test_greedy_output_is_the_targets_own_up_to_the_last_position_of_the_context_or_the_target_is_refused(
    make_target: Callable[..., Target], rope: str
) -> None:
    parameters = {"rope_type": rope, **ROPE[rope]}
    try:
        target = make_target(num_layers=4, num_stages=4, max_position_embeddings=32, rope_parameters=parameters)
    except InputError:
        return
    expected = library_greedy(target, [1, 2, 3, 4], 28)
    for acceptance in (0.5, 1.0):
        staircase = Staircase((1, 1, 1, 1), (0, 1, 4))
        drafter = OracleDrafter(staircase, [1, 2, 3, 4, *expected], acceptance)
        assert SpdDecoder(target, drafter).generate([1, 2, 3, 4], 28).token_ids == expected


@pytest.mark.parametrize("what", ["sliding window", "eager attention"])
def test_a_target_whose_attention_is_not_plain_causal_is_refused_or_decoded_right(
    make_target: Callable[..., Target], what: str
) -> None:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    prompt = list(range(12))
    try:
        target = make_target("qwen3", 4, num_stages=2, **(window if what == "sliding window" else {}))
        if what == "eager attention":
            target.model.set_attn_implementation("eager")
        tokens = autoregressive_generate(target, prompt, 20).token_ids
    except InputError:
        return
    assert tokens == library_greedy(target, prompt, 20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_new_head_decodes_over_a_target_of_any_dtype(make_target: Callable[..., Target], dtype: torch.dtype) -> None:
    target = make_target(num_layers=4, num_stages=2, dtype=dtype)
    generation = SpdDecoder(target, new_head(target)).generate([1, 2, 3], 8)
    assert generation.token_ids == autoregressive_generate(target, [1, 2, 3], 8).token_ids


def test_a_head_in_bfloat16_keeps_the_frequencies_of_its_rope(make_target: Callable[..., Target]) -> None:
    """8 bits of frequency turn far positions by whole radians; training in float32 never saw such angles."""
    head = new_head(make_target(num_layers=4, num_stages=2))
    exact = head.rotary_table(256)[0]
    rounded = head.to(torch.bfloat16).rotary_table(256)[0]
    assert (rounded.float() - exact).abs().max() < 0.01
