"""Pipelines of up to 16 stages, their ranks as threads: same tokens, nobody waits for room, no message is left."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from family.common import build

from pipeline.threads import run
from spd_lightning.decoding.decoder import CycleEvent, SpdDecoder
from spd_lightning.decoding.pipeline import PipelineDecoder
from spd_lightning.decoding.topology import Roles, edges
from spd_lightning.head.loading import new_head
from spd_lightning.staircase import Staircase
from spd_lightning.target.target import Target

MakeTarget = Callable[..., Target]
VOCABULARY = 50


def pair(make_target: MakeTarget, family: str, layers: list[int], seed: int, **head: Any) -> Any:
    target = build(make_target, family, layers, vocab=VOCABULARY, seed=seed)
    target.model.double()
    return target, new_head(target, seed=seed, **head).double().eval()


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("n", [8, 13, 16])
def test_a_deep_pipeline_neither_stops_nor_waits_for_room(
    make_target: MakeTarget, monkeypatch: pytest.MonkeyPatch, n: int, apart: bool
) -> None:
    from spd_lightning.decoding.links import Link

    target, head = pair(make_target, "llama", [1] * n, seed=n, num_layers=1)
    settings: dict[str, Any] = {"eos_token_id": [], "forced_acceptance": 0.9, "seed": n}
    full: list[Link] = []
    send = Link.send

    def watched(self: Link, message: Any) -> None:
        if len(self._pending) == len(self._buffers) and not self._pending[0][1].over.is_set():
            full.append(self)
        send(self, message)

    monkeypatch.setattr(Link, "send", watched)
    outcome = run(monkeypatch, n + apart, target, lambda: head, lambda d: d.generate([1, 2, 3], 3 * n, **settings))
    assert not outcome.errors and not outcome.unread and not full
    expected = SpdDecoder(target, head).generate([1, 2, 3], 3 * n, **settings)
    assert (outcome.found.token_ids, outcome.found.cycles) == (expected.token_ids, expected.cycles)


def random_case(make_target: MakeTarget, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    draw = random.Random(number)
    n, apart = draw.choice((2, 3, 5, 6, 10)), draw.random() < 0.5
    layers = [draw.randint(0, 2) for _ in range(n)]
    layers[draw.randrange(n)] += 1
    family = draw.choice(("llama", "qwen3", "qwen3_5_text", "gemma2", "gemma3_text", "olmo3"))
    layers[0] += max(0, 4 - sum(layers))  # a hybrid needs a layer that attends
    depth = sum(layers)
    anchors = sorted({0, *draw.sample(range(1, depth + 1), draw.randint(0, min(4, depth)))})
    target, head = pair(make_target, family, layers, number, num_layers=draw.choice((1, 2)), anchors=anchors)
    prompt = [draw.randrange(VOCABULARY) for _ in range(draw.choice((1, 2, 9)))]
    new = draw.choice((1, 2, n, n + 1, 3 * n + 2, 40))
    settings: dict[str, Any] = {"seed": number, "eos_token_id": draw.sample(range(VOCABULARY), draw.choice((0, 2)))}
    kind = draw.choice(("greedy", "sampled", "forced", "stopped"))
    if kind == "sampled":
        settings |= {"temperature": 0.9, "top_k": 40, "top_p": 0.95}
    elif kind == "forced":
        settings |= {"forced_acceptance": draw.choice((0.0, 0.5, 0.9, 1.0))}
    elif kind == "stopped":
        settings |= {"stop": lambda tokens: len(tokens) >= 4}

    def script(decoder: PipelineDecoder) -> Any:
        events: list[CycleEvent] = []
        silent = decoder.generate(prompt, new, **settings)
        return silent, decoder.generate(prompt, new, observer=events.append, **settings), events

    chunk = draw.choice((1, 4, 256))
    outcome = run(monkeypatch, n + apart, target, lambda: head, script, prefill_chunk=chunk)
    about = f"case {number}: {family}, layers {layers}, anchors {anchors}, apart {apart}, {kind}, new {new}"
    assert not outcome.errors, f"{about}: {outcome.errors}"
    assert not outcome.unread, f"{about}: left behind {outcome.unread}"
    events: list[CycleEvent] = []
    expected = SpdDecoder(target, head).generate(prompt, new, observer=events.append, **settings)
    for found in outcome.found[:2]:
        for name in ("token_ids", "cycles", "drafts_verified", "drafts_accepted", "restart_positions"):
            assert getattr(found, name) == getattr(expected, name), f"{about}: {name}"
    assert outcome.found[2] == events, about


@pytest.mark.parametrize("number", range(12))
def test_random_pipelines_decode_what_one_process_does(
    make_target: MakeTarget, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    random_case(make_target, monkeypatch, number)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
def test_many_random_pipelines_decode_what_one_process_does(
    make_target: MakeTarget, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    for number in range(100 + 15 * block, 115 + 15 * block):
        with monkeypatch.context() as patches:
            random_case(make_target, patches, number)


def test_an_error_inside_a_generation_leaves_the_decoder_unusable(
    make_target: MakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for a verdict that never comes: another prompt must not be begun."""
    from pipeline import threads

    monkeypatch.setattr(threads, "LIMIT", 3.0)
    target, head = pair(make_target, "llama", [1, 1], 0, num_layers=1)

    def script(decoder: PipelineDecoder) -> Any:
        told: list[str] = []
        assert not decoder.broken
        for observer in (_raise, None):
            try:
                decoder.generate([1, 2], 20, observer=observer, eos_token_id=[])
            except (ValueError, RuntimeError) as error:
                told.append(str(error))
        return told, decoder.broken

    outcome = run(monkeypatch, 2, target, lambda: head, script)
    assert outcome.found == (["a bad token", _UNUSABLE], True)


_UNUSABLE = "an earlier generation failed on this rank while the others were in it: start anew"


def _raise(event: CycleEvent) -> None:
    if event.cycle is not None:
        raise ValueError("a bad token")


def test_only_ranks_with_something_to_hand_over_are_joined_by_an_edge() -> None:
    staircase = Staircase((2, 2, 2, 2), (0, 4))  # stage 1 alone makes an anchor
    assert edges(Roles(4, (0, 1, 2, 3)), staircase) == [(0, 1), (1, 0), (1, 2), (2, 3)]
    assert edges(Roles(4, (0, 1, 2, 3, 4)), staircase) == [(0, 1), (1, 2), (1, 4), (2, 3)]


def test_a_rank_on_a_gpu_asks_for_verdicts_no_further_than_two_layers_ahead_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from spd_lightning.decoding.rank_run import Paced

    order: list[str] = []

    class Event:
        count = 0

        def record(self) -> None:
            Event.count += 1
            self.name = f"layer {Event.count}"

        def synchronize(self) -> None:
            order.append(self.name)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    useless = Paced(lambda: bool(order.append("asks")))
    for _ in range(4):
        useless()
    assert order == ["asks", "asks", "layer 1", "asks", "layer 2", "asks"]


@pytest.mark.parametrize("observed", [False, True])
def test_a_stage_stops_between_layers_when_its_own_cycle_is_rejected(
    make_target: MakeTarget, monkeypatch: pytest.MonkeyPatch, observed: bool
) -> None:
    """Four slow layers and a quick one, and every draft is wrong: half of the work of stage 0 is for nothing."""
    target, head = pair(make_target, "llama", [4, 1], 0, num_layers=1)
    calls, plain = [0], target.run_layer

    def slow(index: int, hidden: Any, *arguments: Any) -> Any:
        if index < 4 and hidden.shape[1] == 1:
            calls[0] += 1
            time.sleep(0.03)
        return plain(index, hidden, *arguments)

    monkeypatch.setattr(target, "run_layer", slow)
    settings: dict[str, Any] = {"eos_token_id": [], "forced_acceptance": 0.0}
    observer = (lambda event: None) if observed else None
    outcome = run(monkeypatch, 2, target, lambda: head, lambda d: d.generate([1, 2], 9, observer=observer, **settings))
    assert not outcome.errors and outcome.found.cycles == 16
    tokens, useful = 8, 4 * 8  # the first token and all corrections but the last enter stage 0
    if observed:  # every draft is shown, so every cycle is worked out
        assert calls[0] >= useful + 4 * (tokens - 1)
    else:
        assert useful <= calls[0] <= useful + 2 * tokens
