"""Measures a hardware profile: every part of a cycle, timed as ranks of a pipeline run it, beside others at work.

Plain decoding is timed alone on one rank's hardware, because that is what a speedup is over. Layers and heads are timed
by all ranks at once: on one machine they share memory and heat, and a stage is slower beside a working neighbour. Then
the ranks form a pipeline of the target's own layers. Its traces tell what handing over costs, and what layers and
verification really take there, where the neighbour works on other weights: more than each layer by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
from spd_lightning.decoding.drafters import Draft, HeadDrafter, PromptLookupDrafter
from spd_lightning.decoding.links import Link
from spd_lightning.decoding.pipeline import PipelineDecoder
from spd_lightning.decoding.sampling import Sampling
from spd_lightning.decoding.schedule import Cycle
from spd_lightning.decoding.trace import Work, breakdown
from spd_lightning.errors import InputError
from spd_lightning.head.loading import new_head
from spd_lightning.provenance import machine, provenance
from spd_lightning.speed.hardware import HardwareProfile, HeadCosts, LinkCosts
from spd_lightning.staircase import Staircase, default_anchors, even_stage_layers
from spd_lightning.target.balance import CONTEXT, measure
from spd_lightning.target.target import Target

#: Tokens of a timed generation, and measurements of a layer.
TOKENS, REPEATS = 48, 24
#: Tokens of a generation in which a head's drafts are timed.
DRAFTS = 32
MESSAGES = 1000
#: Depth, anchors and draft ids of the heads that are timed; their differences are what the parts cost.
_STAGES = 4


def measure_profile(
    target: Target, name: str, rank: int = 0, world: int = 1, say: Callable[[str], None] = lambda text: None
) -> HardwareProfile:
    """Time a target on this machine; called by every rank of a job, with the whole target, at the same time.

    Args:
        target: loaded, not yet cut into stages.
        name: its id or folder, for the record.
        rank, world: of this process; with one rank links are not measured and cost nothing.
        say: told what is measured now.

    Raises:
        InputError: the target's context is too short.
    """
    context = min(CONTEXT, target.context_length - max(TOKENS, 2 * REPEATS))
    if context < 1:
        raise InputError(
            f"--target {name}: its context of {target.context_length} tokens is too short to time {TOKENS} of them."
        )
    prompt = [i * 37 % target.vocab_size for i in range(context)]
    say("plain decoding, alone")
    plain = _in_turn(lambda: _plain(target, prompt), rank, world)
    say("layers and verification, all ranks at once")
    parts = measure(target, context, REPEATS)
    say("heads, all ranks at once")
    head = _head_costs(target, prompt)
    mine = {
        "embedding": 1e3 * parts.embedding,
        "layers": [1e3 * seconds for seconds in parts.layers],
        "verification": 1e3 * parts.verification,
        "head": asdict(head),
    }
    means = _mean(_gathered(mine, world))
    link = LinkCosts()
    if world > 1:
        say("a pipeline of its layers")
        link, stages, verification = _in_a_pipeline(target, prompt, rank, world)
        slower = stages / (means["embedding"] + sum(means["layers"]))
        means["layers"] = [slower * ms for ms in means["layers"]]
        means["embedding"], means["verification"] = slower * means["embedding"], verification
    return HardwareProfile(
        target=name,
        device=machine()["gpu"] or machine()["processor"],
        dtype=str(target.dtype).removeprefix("torch."),
        plain=_gathered(plain, world)[0],
        embedding=means["embedding"],
        layers=tuple(means["layers"]),
        verification=means["verification"],
        head=HeadCosts(**means["head"]),
        link=link,
        vocabulary=target.vocab_size,
        measured=True,
        made=provenance() | {"machine": machine(), "ranks": world, "context": context},
    )


def _plain(target: Target, prompt: Sequence[int]) -> float:
    """Milliseconds per token of plain decoding."""
    runs = [autoregressive_generate(target, prompt, TOKENS, eos_token_id=[]).decode_seconds for _ in range(3)]
    return 1e3 * statistics.median(runs[1:]) / (TOKENS - 1)


# -- heads -----------------------------------------------------------------------------------------------------------


class _TimedHead(HeadDrafter):
    """A head that notes how long each of its drafts takes, and how many rows it had."""

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        self.settle()
        began = time.perf_counter()
        drafted = super().draft(cycle, kept, tokens, sampling, u)
        self.settle()
        self.taken.append((len(cycle.rows), time.perf_counter() - began))
        return drafted

    def reset(self) -> None:
        self.taken: list[tuple[int, float]] = []

    def settle(self) -> None:
        if self.head.device.type == "cuda":
            torch.cuda.synchronize()


def _head_costs(target: Target, prompt: Sequence[int]) -> HeadCosts:
    """What layers, W_k and draft ids add to a draft, as differences of heads of other sizes."""
    stages = even_stage_layers(target.num_layers, min(_STAGES, target.num_layers))
    all_anchors = default_anchors(stages)
    few = max(1, target.vocab_size // 16)
    target.partition(stage_layers=stages)

    def timed(layers: int, anchors: Sequence[int], ids: int) -> float:
        head = new_head(target, layers, tuple(anchors), range(ids)).eval()
        drafter = _TimedHead(head)
        decoder, runs = SpdDecoder(target, drafter), []
        for _ in range(3):  # the first one warms up
            drafter.reset()
            decoder.generate(prompt, DRAFTS, eos_token_id=[], forced_acceptance=1.0)
            full = max(rows for rows, _ in drafter.taken)
            runs.append(statistics.median(seconds for rows, seconds in drafter.taken if rows == full))
        return 1e3 * min(runs[1:])

    base = timed(1, all_anchors, few)
    layer = max(0.0, timed(3, all_anchors, few) - base) / 2
    fewer = (all_anchors[0], all_anchors[-1])
    squares = len(all_anchors) * (len(all_anchors) + 1) // 2 - 3
    aggregation = max(0.0, base - timed(1, fewer, few)) / squares if squares else 0.0
    thousand = max(0.0, timed(1, all_anchors, target.vocab_size) - base) / (target.vocab_size - few) * 1e3
    rest = base - layer - (squares + 3) * aggregation - few / 1e3 * thousand
    return HeadCosts(max(0.0, rest), layer, aggregation, thousand)


# -- links -----------------------------------------------------------------------------------------------------------


def measure_link(
    rank: int, world: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, messages: int = MESSAGES
) -> tuple[float, float]:
    """Seconds from the first rank to the last (half a round trip), and that sending a message takes a rank.

    Args:
        shape, dtype, device: of the message.
    """
    ends = (0, world - 1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    groups = [dist.new_group(list(ends), backend=backend) for _ in ends]  # one per direction
    rounds: list[float] = []
    sends: list[float] = []
    if rank in ends:
        there, back = (
            Link(source, ends[1 - i], shape, dtype, device, groups[i], tag=1 + i, slots=4)
            for i, source in enumerate(ends)
        )
        message = torch.zeros(shape, dtype=dtype, device=device)
        mine, theirs = (there, back) if rank == ends[0] else (back, there)
        for _ in range(messages):
            if rank != ends[0]:
                theirs.receive()
            began = time.perf_counter()
            mine.send(message)
            sends.append(time.perf_counter() - began)
            if rank == ends[0]:
                theirs.receive()
                rounds.append(time.perf_counter() - began)
    half = statistics.median(rounds) / 2 if rounds else 0.0
    return max(_gathered(half, world)), max(_gathered(statistics.median(sends) if sends else 0.0, world))


def _in_a_pipeline(
    target: Target, prompt: Sequence[int], rank: int, world: int, generations: int = 5
) -> tuple[LinkCosts, float, float]:
    """What handing over costs in a pipeline of all ranks, and milliseconds per token of all stages and of verification.

    Prompt lookup drafts, which costs nothing, and every draft is kept.
    """
    latency, one_send = measure_link(rank, world, (target.hidden_size,), target.dtype, target.device)
    stages = even_stage_layers(target.num_layers, world)
    target.partition(stage_layers=stages)
    drafter = PromptLookupDrafter(Staircase(stages, default_anchors(stages)), target.vocab_size)
    decoder = PipelineDecoder(target, drafter, traced=True)
    seen: list[tuple[float, float, float]] = []
    for _ in range(generations):
        if decoder.leads:
            decoder.generate(prompt, TOKENS, eos_token_id=[], forced_acceptance=1.0)
        else:
            decoder.follow(generations=1)
        spans = decoder.spans_of_all()
        if decoder.leads:
            parts = breakdown(spans, decoder.cycles).parts
            cycles = decoder.cycles  # stage s has nothing to do in the first s of them
            stage = sum(parts[r][Work.STAGE] * cycles / (cycles - s) for s, r in enumerate(decoder.roles.ranks))
            last = parts[decoder.roles.last][Work.VERIFY] * cycles / (TOKENS - 1)
            # the first stage's rank tells nobody a verdict
            seen.append((parts[decoder.roles.first][Work.HAND_OVER], stage, last))
    if decoder.leads:
        decoder.close()
    else:
        decoder.follow()
    # the last rank leads, and only it has seen anything
    busy, stage, last = (statistics.median(values) for values in zip(*(seen[1:] or [(0.0, 0.0, 0.0)]), strict=True))
    busy, stage, last = _gathered((busy, stage, last), world)[-1]
    return LinkCosts(send=busy, latency=1e3 * latency, tell=1e3 * one_send), stage, last


# -- ranks -----------------------------------------------------------------------------------------------------------


def _in_turn(measured: Callable[[], float], rank: int, world: int) -> float:
    """One rank after another, the others waiting."""
    value = 0.0
    for turn in range(world):
        if turn == rank:
            value = measured()
        if world > 1:
            dist.barrier()
    return value


def _gathered(value: Any, world: int) -> list[Any]:
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def _mean(values: Sequence[Any]) -> Any:
    """Number by number, of dicts and lists of the same form."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_mean(items) for items in zip(*values, strict=True)]
    return sum(values) / len(values)
