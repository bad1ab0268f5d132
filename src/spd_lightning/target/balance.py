"""`stage_layers: auto`: stages of equal measured time.

A cycle lasts as long as its slowest stage, and stages are not only layers: the first also embeds, the last also runs
the final norm, the lm_head (over the whole vocabulary) and the choice of the token that verifies a draft. For a small
model with a large vocabulary this is worth several layers, so the last stage should hold fewer, or none.

The clock is one token through one layer with a cache that is already filled: what a stage does in a cycle. Layers that
are built alike (same kind, same shapes of weights) share the median of all their times, so that noise does not make the
split lopsided. Among splits with the least slowest stage, the one with the least sum of squares is taken.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn

from spd_lightning.errors import InputError
from spd_lightning.staircase import even_stage_layers
from spd_lightning.target.target import Target

CONTEXT, WARM_UP, REPEATS = 256, 3, 9


@dataclass(frozen=True)
class Costs:
    """Seconds that one token takes.

    Attributes:
        embedding: lookup (and scale) of the embedding.
        layers: each decoder layer.
        verification: final norm, lm_head and the greedy choice.
    """

    embedding: float
    layers: tuple[float, ...]
    verification: float

    def of_stages(self, stage_layers: Sequence[int]) -> list[float]:
        """Seconds of every stage."""
        bounds = (0, *accumulate(stage_layers))
        times = [sum(self.layers[start:stop]) for start, stop in pairwise(bounds)]
        times[0] += self.embedding
        times[-1] += self.verification
        return times


@dataclass(frozen=True)
class Split:
    """A split and what it was computed from."""

    stage_layers: tuple[int, ...]
    costs: Costs

    def table(self) -> str:
        """One line per stage: layers, milliseconds, share of the slowest stage."""
        times = self.costs.of_stages(self.stage_layers)
        slowest, n = max(times), len(times)
        bounds = (0, *accumulate(self.stage_layers))
        lines = [f"stage_layers: auto -> {list(self.stage_layers)}", "stage  layers     ms   of slowest"]
        for stage, ((start, stop), seconds) in enumerate(zip(pairwise(bounds), times, strict=True)):
            layers = "none" if start == stop else str(start) if stop == start + 1 else f"{start}-{stop - 1}"
            extra = {0: " + embedding", n - 1: " + norm, lm_head, verification"}.get(stage, "")
            lines.append(f"{stage:5d}  {layers:>6} {1e3 * seconds:7.3f}   {seconds / slowest:5.0%}{extra}")
        whole = sum(times)
        lines.append(f"a full pass takes {1e3 * whole:.3f} ms: at best {whole / slowest:.2f} x from {n} stages")
        return "\n".join(lines)


def measured_split(target: Target, num_stages: int) -> Split:
    """The split of `target` into `num_stages` stages whose slowest stage is fastest, by measuring every layer.

    Raises:
        InputError: for fewer than two stages.
    """
    costs = measure(target)
    return Split(balanced_stage_layers(costs, num_stages), costs)


@torch.inference_mode()
def measure(target: Target, context: int = CONTEXT, repeats: int = REPEATS) -> Costs:
    """Time one token through the embedding, every layer and the verification, behind `context` cached tokens."""
    context = min(context, target.context_length - WARM_UP - repeats - 1)
    if context < 1:
        raise InputError(
            f"stage_layers=auto measures {WARM_UP + repeats} tokens behind a prompt, and the target's context is "
            f"{target.context_length} tokens: set stage_layers by hand, or num_stages alone."
        )
    prompt = torch.arange(context, device=target.device)[None] % target.vocab_size
    tokens = range(context, context + WARM_UP + repeats)
    cache, rotary = target.new_cache(tokens.stop), target.rotary_table(tokens.stop)
    target(prompt, (), cache=cache)
    nothing = torch.empty(0, target.hidden_size, device=target.device)
    embedding: list[float] = []
    verification: list[float] = []
    layers: dict[int, list[float]] = defaultdict(list)
    for position in tokens:
        began = _clock(target)
        hidden = target.embed(0)
        embedding.append(_clock(target) - began)
        for index in range(target.num_layers):
            began = _clock(target)
            hidden = target.run_layers(hidden, range(index, index + 1), position, rotary, cache, {}, nothing)
            layers[index].append(_clock(target) - began)
        began = _clock(target)
        target.logits(hidden).argmax(-1)
        verification.append(_clock(target) - began)
    alike: dict[object, list[int]] = defaultdict(list)
    for index in layers:
        alike[_construction(target.layer_kinds[index], target.layer(index))].append(index)
    of_layer = {
        index: statistics.median(seconds for other in group for seconds in layers[other][WARM_UP:])
        for group in alike.values()
        for index in group
    }
    return Costs(
        statistics.median(embedding[WARM_UP:]),
        tuple(of_layer[index] for index in range(target.num_layers)),
        statistics.median(verification[WARM_UP:]),
    )


def balanced_stage_layers(costs: Costs, num_stages: int) -> tuple[int, ...]:
    """The contiguous split with the least slowest stage, and among those the least sum of squares (exact).

    Raises:
        InputError: for fewer than two stages, or more than twice as many as layers.
    """
    L, n = len(costs.layers), num_stages
    even_stage_layers(L, n)  # refuses an impossible n
    sums = (0.0, *accumulate(costs.layers))

    def seconds(stage: int, start: int, stop: int) -> float:
        extra = costs.embedding if stage == 0 else costs.verification if stage == n - 1 else 0.0
        return sums[stop] - sums[start] + extra

    Plan = tuple[float, float, tuple[int, ...]]  # slowest stage, sum of squares, sizes

    def extend(plan: Plan, stage: int, start: int, stop: int) -> Plan:
        slowest, squares, sizes = plan
        time = seconds(stage, start, stop)
        return max(slowest, time), squares + time**2, (*sizes, stop - start)

    best: list[Plan] = [extend((0.0, 0.0, ()), 0, 0, stop) for stop in range(L + 1)]  # layers 0 .. stop - 1 are placed
    for stage in range(1, n):
        best = [min(extend(best[start], stage, start, stop) for start in range(stop + 1)) for stop in range(L + 1)]
    return best[L][2]


def _construction(kind: str, layer: nn.Module) -> object:
    """Equal for layers that are built alike."""
    return kind, tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())


def _clock(target: Target) -> float:
    """Seconds, once everything asked for so far is done."""
    if target.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
