"""The speed model: predicted tokens per second of a design, from a hardware profile and acceptance by fill.

The clock is the simulator's: the schedule of the decoder, rank by rank, with the profile's costs. docs/speed.md tells
the formulas, what goes in, and how predictions compare with measurements.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from operator import mul

from spd_lightning.decoding.simulator import Costs, simulate
from spd_lightning.head.config import HeadConfig
from spd_lightning.speed.hardware import HardwareProfile
from spd_lightning.staircase import default_anchors, even_stage_layers
from spd_lightning.target.balance import Costs as PartCosts
from spd_lightning.target.balance import balanced_stage_layers

#: So many tokens after the n-th since a restart the pipeline is in its steady state.
SETTLED = 8
#: A head is hidden if it makes cycles longer by no more than this share.
HIDDEN = 0.02


@dataclass(frozen=True)
class Design:
    """What a head is trained for, as far as speed depends on it.

    Attributes:
        stage_layers: layers of each stage.
        head_layers: decoder layers of the head.
        anchors: number of hidden states it reads.
        draft_ids: size of the draft vocabulary.
        head_alone: the head has a rank of its own (n + 1 ranks); otherwise it follows stage 0 on its rank.
    """

    stage_layers: tuple[int, ...]
    head_layers: int
    anchors: int
    draft_ids: int
    head_alone: bool = False

    @property
    def num_stages(self) -> int:
        return len(self.stage_layers)


@dataclass(frozen=True)
class Prediction:
    """What to expect of a design.

    Attributes:
        acceptance, S: of the simulated verdicts.
        tokens_per_second, speedup: the latter over plain decoding on one rank's hardware.
        cycle_ms: mean time of a cycle; stage_ms: of the slowest stage's work in it, without the head.
        head_ms: of a draft.
        head_hidden: it makes a cycle no longer than `HIDDEN` says.
    """

    design: Design
    acceptance: float
    S: float
    tokens_per_second: float
    speedup: float
    cycle_ms: float
    stage_ms: float
    head_ms: float
    head_hidden: bool


def design_of(head: HeadConfig, head_alone: bool) -> Design:
    """The design that a head was made for."""
    return Design(head.stage_layers, head.num_layers, len(head.anchors), head.draft_vocab_size, head_alone)


def costs_of(profile: HardwareProfile, design: Design) -> Costs:
    """The simulator's costs of a design; refuses no depth (see `HardwareProfile.check_fits`)."""
    stages = PartCosts(profile.embedding, profile.layers, 0.0).of_stages(design.stage_layers)
    link = profile.link
    return Costs(
        stages=tuple(ms / 1e3 for ms in stages),
        verification=profile.verification / 1e3,
        head=profile.head.of(design.head_layers, design.anchors, design.draft_ids) / 1e3,
        send=link.send / 1e3,
        latency=link.latency / 1e3,
        head_alone=design.head_alone,
        layers_per_stage=max(1, *design.stage_layers),
        tell=link.tell / 1e3,
    )


def predict(
    profile: HardwareProfile, design: Design, by_fill: Sequence[float], length: int | None = None
) -> Prediction:
    """What generations whose drafts are accepted by fill take on average: exact, nothing is drawn.

    Args:
        by_fill: acceptance of drafts made with 1, 2, ... tokens in flight; the last entry holds for all fuller
            pipelines. One entry: constant.
        length: new tokens of a generation after the first; each begins with an empty pipeline. None: one without end.
    """
    costs, n = costs_of(profile, design), design.num_stages
    accepted = _padded(by_fill, n + SETTLED)
    shares, after = places(by_fill, n + SETTLED, length)
    seconds, unhindered = (_seconds(shares, after, c) for c in (costs, replace(costs, head=0.0)))
    cycles = 1 + (n - 1) * shares[0]
    work = [*costs.stages[:-1], costs.stages[-1] + costs.verification]
    return Prediction(
        design,
        acceptance=_dot(shares, accepted),
        S=n / cycles,
        tokens_per_second=1 / seconds,
        speedup=profile.plain / 1e3 / seconds,
        cycle_ms=1e3 * seconds / cycles,
        stage_ms=1e3 * max(work),
        head_ms=1e3 * costs.head,
        head_hidden=seconds <= (1 + HIDDEN) * unhindered,
    )


def places(by_fill: Sequence[float], last: int, length: int | None = None) -> tuple[list[float], list[float]]:
    """The shares of tokens that are the 1st, 2nd, ..., `last`-or-later since a restart, and what came before the 1st.

    With Q_k the chance that k drafts in a row are accepted, the k-th place of an endless generation is proportional to
    Q_{k-1}; one of `length` tokens is followed token by token from its empty pipeline.

    Returns:
        shares of the places, which sum up to 1; shares of tokens that follow a rejection at each place.
    """
    accepted = _padded(by_fill, last)
    if length is None:
        reached = [1.0, *accumulate(accepted[:-1], mul)]
        if accepted[-1] >= 1.0 and reached[-1]:
            return [0.0] * (last - 1) + [1.0], [0.0] * last
        reached[-1] /= max(1 - accepted[-1], sys.float_info.min)
        shares = [q / sum(reached) for q in reached]
        return shares, [share * (1 - a) for share, a in zip(shares, accepted, strict=True)]
    now, shares, after = [1.0] + [0.0] * (last - 1), [0.0] * last, [0.0] * last
    for token in range(length):
        shares = [so_far + p / length for so_far, p in zip(shares, now, strict=True)]
        rejected = [p * (1 - a) for p, a in zip(now, accepted, strict=True)]
        if token < length - 1:
            after = [so_far + p / length for so_far, p in zip(after, rejected, strict=True)]
        kept = [p - q for p, q in zip(now, rejected, strict=True)]
        now = [sum(rejected), *kept[:-2], kept[-2] + kept[-1]]
    return shares, after


def _padded(by_fill: Sequence[float], last: int) -> list[float]:
    return [by_fill[min(place, len(by_fill) - 1)] for place in range(last)]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _seconds(shares: Sequence[float], after: Sequence[float], costs: Costs) -> float:
    """Mean seconds of a token, with the shares of `places`.

    One generation is played whose rejections come at the 1st place, at the 2nd, and so on: what follows a restart is
    the same after all of them, but for the first token: more work is dropped where more was in flight.
    """
    last = len(shares)
    flags = [place == end for end in range(1, last + 1) for place in range(1, end + 1)]
    times = simulate(costs, [not rejected for rejected in [*flags, False]], len(flags) + 1).verified
    ends = [at for at, rejected in enumerate(flags) if rejected]
    first = [times[at + 1] - times[at] for at in ends]
    steps = [b - a for a, b in pairwise(times[ends[-2] + 1 : ends[-1] + 1])]
    steps[-1] = sum(steps[-4:]) / 4  # a head on a rank of its own may take turns of two cycles
    begins = shares[0] - sum(after)
    return begins * times[0] + _dot(after, first) + _dot(shares[1:], steps)


def seconds_of(profile: HardwareProfile, design: Design, flags: Sequence[bool]) -> float:
    """What a generation with these verdicts would take, after its first token."""
    return simulate(costs_of(profile, design), flags, len(flags)).seconds if flags else 0.0


def expected_acceptance(by_fill: Sequence[float]) -> float:
    """p of an endless generation: by the place of every token since a restart. Then S = n / (1 + (n - 1)(1 - p))."""
    last = len(by_fill) + 1
    return _dot(places(by_fill, last)[0], _padded(by_fill, last))


def rescaled(by_fill: Sequence[float], num_stages: int) -> tuple[float, ...]:
    """Acceptance by fill of another number of stages, ASSUMED: what counts is the share of the pipeline that is filled.

    Measured at n_0 = len(by_fill); fill f of n stages takes the value of fill f n_0 / n, linear in between. A deeper
    pipeline really knows less of its newest tokens than this says, so it flatters larger n; see docs/speed.md.
    """
    known = len(by_fill)

    def at(fill: float) -> float:
        place = min(max(fill, 1.0), float(known)) - 1
        low = min(int(place), known - 1)
        high = min(low + 1, known - 1)
        return by_fill[low] + (place - low) * (by_fill[high] - by_fill[low])

    return tuple(at((fill + 1) * known / num_stages) for fill in range(num_stages))


def best_split(profile: HardwareProfile, num_stages: int, head_ms: float, head_alone: bool) -> tuple[int, ...]:
    """The split whose slowest rank is fastest, a head beside stage 0 counted."""
    beside = 0.0 if head_alone else head_ms
    return balanced_stage_layers(
        PartCosts(profile.embedding + beside, profile.layers, profile.verification), num_stages
    )


def designs(
    profile: HardwareProfile,
    stages: Iterable[int],
    head_layers: Iterable[int],
    draft_ids: int,
    anchors: int | None = None,
) -> Iterator[Design]:
    """All designs worth a look: every n and depth of head, the even and the best split, the head beside and alone.

    Args:
        anchors: number of them; default: as many as `default_anchors` chooses.
    """
    for n in stages:
        for layers in head_layers:
            for alone in (False, True):
                even = even_stage_layers(len(profile.layers), n)
                head_ms = profile.head.of(layers, anchors or len(default_anchors(even)), draft_ids)
                for split in dict.fromkeys((even, best_split(profile, n, head_ms, alone))):
                    yield Design(split, layers, anchors or len(default_anchors(split)), draft_ids, alone)
