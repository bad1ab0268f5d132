"""The static cycle decodes what SpdDecoder decodes, draft by draft, and is fit to be captured: it never waits for the
device, allocates nothing that lasts, and what is computed for nobody harms nobody.

On the CPU the cycle runs eagerly; the tests marked `gpu` capture it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from family.common import VARIED, EveryPhase, WrongAt, random_prompt, rejected_phases, tokens_for_every_phase
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spd_lightning.decoding import graph
from spd_lightning.decoding.decoder import CycleEvent, SpdDecoder, autoregressive_generate
from spd_lightning.decoding.drafters import Draft, HeadDrafter, PromptLookupDrafter
from spd_lightning.decoding.generation import Generation
from spd_lightning.decoding.graph import GraphAutoregressive, GraphDecoder, GraphRun, bucket
from spd_lightning.decoding.sampling import Sampling
from spd_lightning.decoding.schedule import Cycle
from spd_lightning.decoding.static import StaticCycle
from spd_lightning.errors import InputError
from spd_lightning.head.loading import new_head
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.static_cache import StaticAttentionLayer, StaticRecurrentLayer
from spd_lightning.target.target import Target

FAMILIES = ("llama", "qwen3", "qwen3_5_text", "gemma3_text")
SPLITS = {2: (2, 3), 3: (1, 2, 2), 4: (1, 2, 1, 1)}
#: Prompts around the edge of a window of six; a longer one before a shorter one leaves its keys behind it.
LENGTHS = (11, 1, 6, 5)
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
MakeTarget = Callable[..., Target]


def lively(make_target: MakeTarget, family: str, split: Sequence[int], **more: Any) -> Target:
    """A target whose text varies: what is wrong in a cache shows in its tokens."""
    return make_target(family, sum(split), stage_layers=split, seed=sum(split), **(VARIED.get(family, {}) | more))


def agreeable(make_target: MakeTarget, family: str, split: Sequence[int]) -> Target:
    """A target that an untrained head often guesses right."""
    return make_target(family, sum(split), stage_layers=split, seed=1, spread=0.05, embedding_scale=4.0)


def decode(decoder: SpdDecoder, prompt: list[int], count: int, **settings: Any) -> tuple[Generation, list[CycleEvent]]:
    events: list[CycleEvent] = []
    return decoder.generate(prompt, count, observer=events.append, **settings), events


def check_same(one: SpdDecoder, other: SpdDecoder, prompt: list[int], count: int, **settings: Any) -> Generation:
    """Every event of every cycle, flushed drafts included, and all figures."""
    (a, events_a), (b, events_b) = (decode(decoder, prompt, count, **settings) for decoder in (one, other))
    assert events_a == events_b, (prompt, settings)
    assert (a.token_ids, a.cycles, a.restart_positions) == (b.token_ids, b.cycles, b.restart_positions)
    assert (a.drafts_verified, a.drafts_accepted, a.num_stages) == (b.drafts_verified, b.drafts_accepted, b.num_stages)
    return a


# -- the same tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", SPLITS)
def test_every_draft_and_token_is_that_of_spd_decoder_greedy_and_sampled(
    make_target: MakeTarget, family: str, n: int
) -> None:
    accepted = rejected = 0
    for build in (lively, agreeable):
        target = build(make_target, family, SPLITS[n])
        ids = random.Random(n).sample(range(60), 40) if n == 3 else None
        head = new_head(target, num_layers=2, draft_token_ids=ids, seed=n, anchor_norm=n == 3)
        static, dynamic = GraphDecoder(target, head), SpdDecoder(target, head)
        for index, length in enumerate(LENGTHS):
            prompt = random_prompt(length, random.Random(length))
            for settings in ({}, SAMPLED) if index % 2 else ({},):
                found = check_same(static, dynamic, prompt, 18, **settings)
                accepted += found.drafts_accepted
                rejected += found.drafts_verified - found.drafts_accepted
    assert accepted > 10 and rejected > 10


DENSE = ("qwen2", "mistral", "olmo2", "olmo3", "smollm3")


# Gemma 2 caps attention scores, for which transformers has the eager kernel alone
@pytest.mark.parametrize(("family", "kernel"), [*product(DENSE, ("sdpa", "eager")), ("gemma2", "eager")])
def test_the_other_dense_families_and_both_kernels(make_target: MakeTarget, family: str, kernel: str) -> None:
    target = lively(make_target, family, SPLITS[3])
    target.model.set_attn_implementation(kernel)
    head = new_head(target, num_layers=1)
    check_same(GraphDecoder(target, head), SpdDecoder(target, head), random_prompt(7, random.Random(7)), 15)


@pytest.mark.parametrize("split", [(2, 0, 3), (0, 2, 3), (2, 3, 0), (1,) * 6], ids=str)
def test_empty_and_many_stages(make_target: MakeTarget, split: tuple[int, ...]) -> None:
    target = lively(make_target, "qwen3_5_text", split)
    head = new_head(target, num_layers=1)
    check_same(GraphDecoder(target, head), SpdDecoder(target, head), [4, 9], 15)


@pytest.mark.parametrize("anchors", [(0,), (0, 2), (0, 1, 2, 3, 4, 5)], ids=str)
def test_any_anchors(make_target: MakeTarget, anchors: tuple[int, ...]) -> None:
    """Fewer rows than stages, no row at full depth, and blocks that no depth reaches."""
    target = agreeable(make_target, "qwen3", (2, 3))
    head = new_head(target, num_layers=2, anchors=anchors)
    check_same(GraphDecoder(target, head), SpdDecoder(target, head), [4, 9, 1], 25, temperature=1.0, seed=3)


class ScriptedHead(HeadDrafter):
    """The head computes, a script chooses: what it computed can be compared in every phase of the fill."""

    def __init__(self, head: SpeculationHead, script: EveryPhase | WrongAt) -> None:
        super().__init__(head)
        self.script, self.logits = script, list[Tensor]()

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        self.logits.append(self.head.logits(self.head.step(cycle.rows, kept, self.cache, self.rotary)))
        return self.script.draft(cycle, kept, tokens, sampling, u)


def check_scripted(
    target: Target, prompt: list[int], count: int, script: Callable[[list[int]], Any], patch: pytest.MonkeyPatch
) -> list[CycleEvent]:
    """A script drafts in both engines; tokens, events and the head's logits of every cycle are the same."""
    head = new_head(target, num_layers=2, seed=7)
    expected = autoregressive_generate(target, prompt, count).token_ids
    drafter = ScriptedHead(head, script(prompt + expected))
    _, dynamic = decode(SpdDecoder(target, drafter), prompt, count)
    again, logits = script(prompt + expected), list[Tensor]()

    def draft(run: GraphRun, plan: Cycle, likeliest: int) -> Draft:
        logits.append(run.runner.cycle.draft_logits.clone())
        return again.draft(plan, {}, range(plan.newest + 1), run.sampling, 0.0)

    with patch.context() as scripted:
        scripted.setattr(GraphRun, "_draft", draft)
        found, static = decode(GraphDecoder(target, head), prompt, count)
    assert found.token_ids == expected and static == dynamic
    torch.testing.assert_close(torch.stack(logits), torch.stack(drafter.logits), rtol=1e-3, atol=1e-4)
    return static


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", SPLITS)
def test_a_rejection_in_every_phase_of_the_fill_leaves_target_and_head_as_they_should_be(
    make_target: MakeTarget, family: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = lively(make_target, family, SPLITS[n])
    prompt = random_prompt(2 + n, random.Random(n))
    head = new_head(target)

    def script(tokens: list[int]) -> EveryPhase:
        return EveryPhase(head.staircase, tokens, seed=n)

    events = check_scripted(target, prompt, 2 * tokens_for_every_phase(n), script, monkeypatch)
    assert set(rejected_phases(events)) == set(range(1, n + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_storm_of_restarts(make_target: MakeTarget, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = lively(make_target, family, SPLITS[4])
    staircase = new_head(target).staircase
    events = check_scripted(
        target, [5, 6, 7], 60, lambda tokens: WrongAt(staircase, tokens, range(len(tokens))), monkeypatch
    )
    assert sum(event.accepted is False for event in events) == 59


@pytest.mark.parametrize("family", FAMILIES)
def test_the_baseline_decodes_what_autoregressive_generate_decodes(make_target: MakeTarget, family: str) -> None:
    target = lively(make_target, family, SPLITS[2])
    baseline = GraphAutoregressive(target)
    for length in LENGTHS:
        prompt = random_prompt(length, random.Random(length))
        for settings in ({}, SAMPLED):
            expected = autoregressive_generate(target, prompt, 12, **settings)
            assert baseline.generate(prompt, 12, **settings).token_ids == expected.token_ids


def test_ends_stops_and_single_tokens(make_target: MakeTarget) -> None:
    target = lively(make_target, "llama", SPLITS[3])
    head = new_head(target, num_layers=1)
    static, dynamic = GraphDecoder(target, head), SpdDecoder(target, head)
    whole = check_same(static, dynamic, [1, 2], 12).token_ids
    assert check_same(static, dynamic, [1, 2], 1).cycles == 0
    for token in whole[0], whole[5]:
        assert check_same(static, dynamic, [1, 2], 12, eos_token_id=token).token_ids[-1] == token
    assert len(check_same(static, dynamic, [1, 2], 12, stop=lambda tokens: len(tokens) == 4).token_ids) == 4


def test_a_coin_decides_the_verdicts_alike(make_target: MakeTarget) -> None:
    target = lively(make_target, "llama", SPLITS[4])
    head = new_head(target, num_layers=1)
    both = [
        engine(target, head).generate([1, 2], 60, forced_acceptance=0.8, seed=3)
        for engine in (GraphDecoder, SpdDecoder)
    ]
    assert both[0].token_ids == both[1].token_ids and both[0].restart_positions == both[1].restart_positions
    assert 0.6 < (both[0].acceptance or 0) < 0.95 and len(both[0].token_ids) == 60


# -- capacity ----------------------------------------------------------------------------------------------------


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(places) for places in (1, 256, 257, 512, 1000)] == [256, 256, 512, 512, 1024]


def test_the_last_place_of_a_bucket_and_the_first_of_the_next(make_target: MakeTarget) -> None:
    target = lively(make_target, "qwen3_5_text", SPLITS[4], max_position_embeddings=600)
    head = new_head(target, num_layers=1)
    static, fixed, dynamic = (
        GraphDecoder(target, head),
        GraphDecoder(target, head, capacity=200),
        SpdDecoder(target, head),
    )
    new, n = 5, 4
    most = 256 - new - n - 2
    prompt = random_prompt(most, random.Random(0))
    check_same(static, dynamic, prompt, new)
    assert list(static.engine.runners) == [256]
    check_same(fixed, dynamic, prompt, new)
    with pytest.raises(InputError, match="raise capacity"):
        fixed.generate([*prompt, 1], new)
    check_same(static, dynamic, [*prompt, 1], new)
    assert list(static.engine.runners) == [256, 512]
    check_same(static, dynamic, [1], new)
    check_same(fixed, dynamic, [1], new)
    assert list(static.engine.runners) == [256, 512] and list(fixed.engine.runners) == [256]


# -- fit to be captured ------------------------------------------------------------------------------------------

#: What makes the host wait for a value, gives a shape that depends on one, or brings a number from the host.
WAITING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique", "lift_fresh",
           "scalar_tensor", "pin_memory")  # fmt: skip


class Operations(TorchDispatchMode):
    """Names of all tensor operations, and shapes and arguments that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [value for value in args if not isinstance(value, (Tensor, list, tuple))]
        shapes = [tuple(value.shape) for value in args if isinstance(value, Tensor)]
        self.calls.append((function.overloadpacket.__name__, str(plain), shapes))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_cycles_differ_in_values_alone(make_target: MakeTarget, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operations on the same shapes with the same numbers every cycle, none of which waits for a value; and
    everything that lasts stays where it is, also for the next prompt."""
    target = agreeable(make_target, family, SPLITS[3])
    head = new_head(target, num_layers=2)
    seen: list[Any] = []
    addresses: list[list[int]] = []
    original = StaticCycle.run

    def run(cycle: StaticCycle, *arguments: Any) -> None:
        with Operations() as operations:
            original(cycle, *arguments)
        seen.append(operations.calls)
        addresses.append([buffer.data_ptr() for buffer in cycle.buffers])

    monkeypatch.setattr(StaticCycle, "run", run)
    decoder = GraphDecoder(target, head)
    for length in (3, 9):
        decoder.generate(random_prompt(length, random.Random(length)), 10, **SAMPLED)
    assert len(seen) > 20 and len(seen[0]) > 100
    assert all(calls == seen[0] for calls in seen)
    assert all(places == addresses[0] for places in addresses)
    assert not {name for name, *_ in seen[0]} & set(WAITING)
    assert all(numbers == "[]" for name, numbers, _ in seen[0] if name == "where"), "a number would be copied over"


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_cycle_runs_where_tensors_have_no_values(make_target: MakeTarget, family: str) -> None:
    """On the meta device whatever asks for a value fails, and so does every tensor that lies on another device."""
    target = agreeable(make_target, family, SPLITS[3])
    head = new_head(target, num_layers=2, draft_token_ids=range(40))
    static = GraphDecoder(target, head)
    static.generate([1, 2, 3], 5)
    (runner,) = static.engine.runners.values()
    cycle = StaticCycle(target.to("meta"), head.to("meta"), 256)
    for ours, theirs in zip(cycle.cache.static_layers, runner.cycle.cache.static_layers, strict=True):
        ours.lazy_initialization(*(buffer[:1].to("meta") for buffer in theirs.buffers))
    cycle.run()
    assert [buffer.shape for buffer in cycle.buffers] == [buffer.shape for buffer in runner.cycle.buffers]
    assert {buffer.device.type for buffer in cycle.buffers} == {"meta"}
    with pytest.raises(RuntimeError):
        cycle.results.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_may_run_in_any_order(make_target: MakeTarget, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None reads what another one writes, bit for bit: nothing is left to the order in which streams run."""
    target = agreeable(make_target, family, SPLITS[4])
    head = new_head(target, num_layers=2)
    prompt, shuffle = [3, 1, 4, 1, 5], random.Random(0)
    logits: dict[bool, list[Tensor]] = {True: [], False: []}
    original = StaticCycle.run

    def shuffled(branches: Sequence[Callable[[], None]]) -> None:
        for branch in shuffle.sample(branches, len(branches)):
            branch()

    found = []
    for mixed in (False, True):

        def run(cycle: StaticCycle, mixed: bool = mixed) -> None:
            original(cycle, *((shuffled,) if mixed else ()))
            logits[mixed].append(torch.cat([cycle.draft_logits, cycle.target_logits]))

        monkeypatch.setattr(StaticCycle, "run", run)
        found.append(decode(GraphDecoder(target, head), prompt, 24))
    assert found[0][1] == found[1][1]
    assert torch.equal(torch.stack(logits[True]), torch.stack(logits[False]))


def states(cycle: StaticCycle) -> list[Tensor]:
    """Copies of all caches without their spare places."""
    found = [part[:, :, :-1] for part in (cycle.head.cache.keys, cycle.head.cache.values)] if cycle.head else []
    for layer in cycle.cache.static_layers:
        for buffer in layer.buffers:
            found.append(buffer[:-1] if isinstance(layer, StaticRecurrentLayer) else buffer[:, :, : cycle.spare])
    return [part.clone() for part in found]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_what_does_not_exist_is_written_where_nobody_looks(make_target: MakeTarget, family: str) -> None:
    """Warming up and capturing run at the spare position: a loaded prompt is as it was, bit for bit."""
    target = agreeable(make_target, family, SPLITS[3])
    decoder = GraphDecoder(target, new_head(target, num_layers=2))
    decoder.generate([1, 2, 3], 7)
    (runner,) = decoder.engine.runners.values()
    before = states(runner.cycle)
    for token in (4, 5, 6, 7):
        runner([runner.cycle.spare] * 4, token)
    assert all(torch.equal(one, other) for one, other in zip(before, states(runner.cycle), strict=True))
    runner([20, *[runner.cycle.spare] * 3], 4)
    changed = [not torch.equal(one, other) for one, other in zip(before, states(runner.cycle), strict=True)]
    assert sum(changed) == 4, "one token: two caches of the head, and two of the only layer of stage 0"


@pytest.mark.parametrize("family", FAMILIES)
def test_rubbish_behind_a_position_is_hidden(
    make_target: MakeTarget, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every place that holds no token of this prompt, the spare one included, may hold anything finite."""
    target = lively(make_target, family, SPLITS[3])
    head = new_head(target, num_layers=2)
    prompt = [7, 7, 1, 9]
    original = StaticCycle.load

    def load(cycle: StaticCycle, *arguments: Any) -> None:
        original(cycle, *arguments)
        assert cycle.head is not None
        for part in (cycle.head.cache.keys, cycle.head.cache.values):
            part[:, :, len(prompt) :] = 30.0
        for layer in cycle.cache.static_layers:
            for buffer in layer.buffers:
                if isinstance(layer, StaticAttentionLayer):
                    buffer[:, :, len(prompt) :] = 30.0
                else:
                    others = [slot for slot in range(len(buffer)) if slot != len(prompt) % layer.position.slots]
                    buffer[others] = 30.0
        for part in (cycle.entering, cycle.leaving, cycle.kept):
            part[1:] = 30.0

    expected = check_same(GraphDecoder(target, head), SpdDecoder(target, head), prompt, 20)
    monkeypatch.setattr(StaticCycle, "load", load)
    assert decode(GraphDecoder(target, head), prompt, 20)[0].token_ids == expected.token_ids


# -- what cannot be captured -------------------------------------------------------------------------------------


def test_what_cannot_be_captured_is_refused_with_reason_and_alternative(make_target: MakeTarget) -> None:
    target = make_target("llama", 2, num_stages=2)
    head = new_head(target, num_layers=1)

    def refused(change: Callable[[], None], reason: str) -> None:
        change()
        with pytest.raises(InputError, match=rf"cannot be captured.*{reason}.*SpdDecoder"):
            GraphDecoder(target, head)

    kernel = target.config._attn_implementation
    refused(lambda: setattr(target.config, "_attn_implementation", "flash_attention_2"), "no mask")
    target.config._attn_implementation = kernel
    refused(lambda: setattr(target.model, "is_quantized", True), "quantised")
    del target.model.is_quantized
    refused(lambda: setattr(target.layer(1), "_hf_hook", object()), "offloaded")
    del target.layer(1)._hf_hook
    refused(lambda: setattr(head.lm_head.weight, "ds_id", 1), "ZeRO stage 3")
    del head.lm_head.weight.ds_id
    GraphDecoder(target, head)
    mixture = make_target("qwen3_moe", 2, num_stages=2)
    with pytest.raises(InputError, match="mixture of experts"):
        GraphDecoder(mixture, new_head(mixture, num_layers=1))
    with pytest.raises(InputError, match="use SpdDecoder"):
        GraphDecoder(target, PromptLookupDrafter(head.staircase, 60))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="capacity=0"):
        GraphDecoder(target, head, capacity=0)


# -- on CUDA -----------------------------------------------------------------------------------------------------


# -- capturing, as far as it goes without a GPU ------------------------------------------------------------------------


class BrokenCapture:
    """Stands for torch.cuda.graph: the end of a capture in which something went wrong raises once more."""

    def __init__(self, *unused: object, **settings: object) -> None:
        self.settings = settings

    def __enter__(self) -> None:
        pass

    def __exit__(self, *unused: object) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (RuntimeError("a tensor was read by the host\nmore"), InputError, "as a CUDA graph: a tensor was read by"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "out of memory"),
        (AttributeError("a bug of ours"), AttributeError, "a bug of ours"),
        (None, InputError, "previous error during capture"),
    ],
    ids=["illegal", "memory", "bug", "end"],
)
def test_a_capture_that_fails_tells_what_failed_first(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, expected: type[Exception], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", BrokenCapture)

    def run() -> None:
        if error is not None:
            raise error

    with pytest.raises(expected, match=message):
        graph._captured(run, None)  # type: ignore[arg-type]


def test_weights_that_moved_are_captured_anew(make_target: MakeTarget) -> None:
    target = lively(make_target, "llama", SPLITS[2])
    head = new_head(target, num_layers=1)
    decoder = GraphDecoder(target, head)
    prompt = random_prompt(5, random.Random(0))
    decoder.generate(prompt, 8)
    (first,) = decoder.engine.runners.values()
    decoder.generate(prompt, 8)
    assert list(decoder.engine.runners.values()) == [first], "one graph serves all prompts"
    weight = target.layer(1).mlp.up_proj.weight
    weight.data = torch.zeros_like(weight)
    assert decoder.generate(prompt, 8).token_ids == autoregressive_generate(target, prompt, 8).token_ids
    assert list(decoder.engine.runners.values()) != [first]


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", SPLITS)
def test_a_captured_cycle_decodes_what_spd_decoder_decodes(make_target: MakeTarget, family: str, n: int) -> None:
    for build in (lively, agreeable):
        target = build(make_target, family, SPLITS[n]).to("cuda")
        head = new_head(target, num_layers=2, seed=n).to("cuda")
        static, dynamic = GraphDecoder(target, head), SpdDecoder(target, head)
        for length in LENGTHS:
            prompt = random_prompt(length, random.Random(length))
            for settings in ({}, SAMPLED):
                check_same(static, dynamic, prompt, 18, **settings)
        assert all(runner.graph is not None for runner in static.engine.runners.values())


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_serves_many_prompts(make_target: MakeTarget, family: str) -> None:
    target = lively(make_target, family, SPLITS[4], max_position_embeddings=600).to("cuda")
    head = new_head(target, num_layers=2).to("cuda")
    static, baseline = GraphDecoder(target, head), GraphAutoregressive(target)
    for length in (3, 200, 1, 300, 40):
        prompt = random_prompt(length, random.Random(length))
        expected = autoregressive_generate(target, prompt, 20).token_ids
        assert baseline.generate(prompt, 20).token_ids == expected
        assert static.generate(prompt, 20).token_ids == expected
    assert set(static.engine.runners) == {256, 512}
