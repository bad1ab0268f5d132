"""The speed model: predicted tokens per second of a design, from a hardware profile and acceptance by fill.

The clock is the simulator's: the schedule of the decoder, rank by rank, with the profile's costs. docs/speed.md tells
the formulas, what goes in, and how predictions compare with measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

from spd_lightning.decoding.simulator import Costs, simulate
from spd_lightning.head.config import HeadConfig
from spd_lightning.randomness import Purpose, uniform
from spd_lightning.speed.hardware import HardwareProfile
from spd_lightning.staircase import default_anchors, even_stage_layers
from spd_lightning.target.balance import Costs as PartCosts
from spd_lightning.target.balance import balanced_stage_layers

#: Tokens of a simulated generation: p is within about a point of what was asked for.
TOKENS = 4000
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
    profile: HardwareProfile,
    design: Design,
    by_fill: Sequence[float],
    length: int | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
) -> Prediction:
    """Play generations whose drafts are accepted by fill.

    Args:
        by_fill: acceptance of drafts made with 1, 2, ... tokens in flight; the last entry holds for all fuller
            pipelines. One entry: constant.
        length: new tokens of a generation after the first; each begins with an empty pipeline. None: one without end.
        tokens: played in all, about.
    """
    costs = costs_of(profile, design)
    length = length or tokens
    runs = [list(islice(verdicts(by_fill, seed + i), length)) for i in range(max(1, tokens // length))]
    played = [simulate(costs, flags, length) for flags in runs]
    seconds, cycles = sum(one.seconds for one in played), sum(one.cycles for one in played)
    unhindered = sum(simulate(replace(costs, head=0.0), flags, length).seconds for flags in runs)
    new = length * len(runs)
    work = [*costs.stages[:-1], costs.stages[-1] + costs.verification]
    return Prediction(
        design,
        acceptance=sum(map(sum, runs)) / new,
        S=design.num_stages * new / cycles,
        tokens_per_second=new / seconds,
        speedup=profile.plain / 1e3 * new / seconds,
        cycle_ms=1e3 * seconds / cycles,
        stage_ms=1e3 * max(work),
        head_ms=1e3 * costs.head,
        head_hidden=seconds <= (1 + HIDDEN) * unhindered,
    )


def seconds_of(profile: HardwareProfile, design: Design, flags: Sequence[bool]) -> float:
    """What a generation with these verdicts would take, after its first token."""
    return simulate(costs_of(profile, design), flags, len(flags)).seconds if flags else 0.0


def verdicts(by_fill: Sequence[float], seed: int = 0) -> Iterator[bool]:
    """Accepted or not, draft by draft, without end: fill counts up from 1 after every rejection."""
    since = 0
    for position in count():
        since += 1
        accepted = uniform(seed, Purpose.COIN, position, 0) < by_fill[min(since, len(by_fill)) - 1]
        yield accepted
        if not accepted:
            since = 0


def expected_acceptance(by_fill: Sequence[float]) -> float:
    """p of an endless generation: of all drafts, those of fill f come as often as a run of accepted ones reaches f.

    With Q_k the chance that k drafts in a row are accepted, A = Q_1 + Q_2 + ... of them lie between two restarts, and
    p = A / (A + 1); the last entry of `by_fill` repeats for ever. Then S = n / (1 + (n - 1)(1 - p)).
    """
    reached, A = 1.0, 0.0
    for p in by_fill[:-1]:
        reached *= p
        A += reached
    last = by_fill[-1]
    if last >= 1.0:
        return 1.0 if reached > 0 else A / (A + 1)
    A += reached * last / (1 - last)
    return A / (A + 1)


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
