"""What wall clock to expect: the protocol of `pipeline` played with measured times instead of tensors.

The real schedule says which stage has a token in which cycle; the simulator follows, rank by rank, when its input is
there, when it is done, and when its results are known to be of use. It predicts the clock of other numbers of stages,
of other links and of a head on a rank of its own from what was measured on one machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from spd_lightning.decoding.schedule import Cycle, PipelineSchedule
from spd_lightning.randomness import Purpose, uniform
from spd_lightning.staircase import Staircase, default_anchors


@dataclass(frozen=True)
class Costs:
    """Seconds of one token.

    Attributes:
        stages: layers of each stage, shallow to deep.
        verification: final norm, lm_head and verdict, after the last stage's layers.
        head: rows and draft.
        send: that a rank is busy with handing over what it has in one cycle.
        latency: from there until the other rank has it.
        head_alone: whether the head has a rank of its own; otherwise it follows stage 0 on its rank.
        layers_per_stage: dropped work ends at the next border of a layer.
        tell: that the last stage's rank is busy with telling one other rank a verdict; it tells them one by one.
    """

    stages: tuple[float, ...]
    verification: float
    head: float
    send: float = 0.0
    latency: float = 0.0
    head_alone: bool = False
    layers_per_stage: int = 4
    tell: float = 0.0

    @property
    def others(self) -> int:
        """Ranks that are told verdicts."""
        return len(self.stages) - 1 + self.head_alone

    @property
    def steady_cycle(self) -> float:
        """Seconds of a cycle without rejections: the longest work of a rank, or a round of draft and token."""
        busy = [seconds + self.send for seconds in self.stages]
        busy[-1] += self.verification + self.tell * self.others
        if not self.head_alone:
            busy[0] += self.head
            return max(busy)
        around = (self.head + self.stages[0]) / 2 + self.send + self.latency  # draft to anchors to draft: two cycles
        return max(*busy, self.head + self.send, around)


@dataclass(frozen=True)
class Simulated:
    """A simulated generation.

    Attributes:
        seconds: from the entry of the first token to the last verdict.
        cycles, new_tokens: of the schedule; new tokens do not count the first.
        busy: work of each rank as a share of the time, dropped work included, and that of the last cycle whole, though
            the first stages do it after the last verdict: in a short generation a share may exceed 1.
        verified: when each new token is verified, in seconds.
    """

    seconds: float
    cycles: int
    new_tokens: int
    busy: tuple[float, ...]
    verified: tuple[float, ...]

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.new_tokens

    def speedup_over(self, autoregressive_seconds: float) -> float:
        """Wall clock over plain decoding at so many seconds per token."""
        return autoregressive_seconds / self.seconds_per_token


def coins(acceptance: float, seed: int = 0) -> Iterator[bool]:
    """Verdicts at a constant rate, without end."""
    position = 0
    while True:
        yield uniform(seed, Purpose.COIN, position, 0) < acceptance
        position += 1


def simulate(costs: Costs, verdicts: Iterable[bool], new_tokens: int) -> Simulated:
    """Play a generation.

    Args:
        verdicts: accepted or not, draft by draft in the order of verification; at least `new_tokens`.
        new_tokens: after the first.
    """
    return _Play(costs).run(list(islice(iter(verdicts), new_tokens)))


class _Play:
    """Clock of every rank: stage s is rank s, a head on its own is rank n."""

    def __init__(self, costs: Costs) -> None:
        n = len(costs.stages)
        self.costs, self.n, self.head = costs, n, n if costs.head_alone else 0
        self.free = [0.0] * (n + costs.head_alone)
        self.busy = [0.0] * len(self.free)
        self.hidden = [0.0] * n  # when stage s has its input
        self.anchors = 0.0  # when the head has everything of the last cycle
        self.entering = 0.0  # when stage 0 has the token that enters
        self.own_draft = 0.0
        self.told = [0.0] * len(self.free)  # when a rank has the last verdict

    def run(self, verdicts: Sequence[bool]) -> Simulated:
        layers = [1] * self.n
        schedule = PipelineSchedule(Staircase(tuple(layers), default_anchors(layers)), 0)
        times: list[float] = []
        while len(times) < len(verdicts):
            plan = schedule.plan()
            ahead = schedule.plan(ahead=True)
            if plan.leaving is None:
                self._cycle(plan, accepted=True)
                schedule.advance(None)
                continue
            accepted = verdicts[len(times)]
            times.append(self._cycle(plan, accepted))
            schedule.advance(accepted)
            if not accepted:
                self._drop(ahead)
        at = times[-1] if times else 0.0
        share = tuple(busy / at if at else 0.0 for busy in self.busy)
        return Simulated(at, schedule.cycle, len(verdicts), share, tuple(times))

    def _cycle(self, plan: Cycle, accepted: bool) -> float:
        """All ranks' work of one cycle; returns when the last stage has verified.

        The last stage comes first: stages that are still at work when a rejection is told stop there.
        """
        costs, n = self.costs, self.n
        hidden, sent_anchors = list(self.hidden), 0.0
        verified, entering, told = 0.0, self.entering, list(self.told)
        for stage in sorted((stage for stage, _ in plan.stages), reverse=True):
            begin = max(self.free[stage], entering if stage == 0 else self.hidden[stage])
            if stage < n - 1 and not accepted:
                done = begin + self._work(stage, self._until_told(stage, begin, costs.stages[stage]))
            else:
                done = begin + self._work(stage, costs.stages[stage])
            beside = stage == 0 and not costs.head_alone
            known = told[stage] <= done or not beside  # else the head comes first, and results wait for both
            sent = max(done, told[stage]) if known else done
            if beside:
                begin = max(sent + (costs.send if known else 0.0), self.anchors)
                drafted = begin + self._work(stage, costs.head)
                sent = sent if known else max(drafted, told[stage])
                self.free[stage] = max(drafted, told[stage]) + (0.0 if known else costs.send)
                self.entering = self.free[stage]
            else:
                self.free[stage] = sent + costs.send
            self._work(stage, costs.send)
            arrives = sent + costs.send + costs.latency
            if stage + 1 < n:
                hidden[stage + 1] = arrives
            sent_anchors = max(sent_anchors, arrives if stage != self.head else sent)
            if stage == n - 1:
                verified = self.free[stage] + self._work(stage, costs.verification)
                self.free[stage] = verified
                if plan.leaving is not None:
                    self._tell(verified)
        if costs.head_alone:
            begin = max(self.free[n], self.anchors, self.own_draft)
            drafted = max(begin + self._work(n, costs.head), told[n])
            self.free[n] = self.own_draft = drafted + self._work(n, costs.send)
            self.entering = drafted + costs.send + costs.latency
        self.hidden, self.anchors = hidden, sent_anchors
        return verified

    def _until_told(self, rank: int, begin: float, seconds: float) -> float:
        """How long a stage works if it stops at the first border of a layer at which it knows of a rejection."""
        piece = seconds / self.costs.layers_per_stage
        if piece <= 0:
            return seconds
        pieces = max(0, -(-(self.told[rank] - begin) // piece))
        return min(seconds, pieces * piece)

    def _tell(self, at: float) -> None:
        """The last stage's rank sends its verdict to every other one, in their order."""
        costs, last = self.costs, self.n - 1
        others = [rank for rank in range(len(self.free)) if rank != last]
        for number, rank in enumerate(others, start=1):
            self.told[rank] = at + number * costs.tell + costs.latency
        self.told[last] = at
        self.free[last] = at + self._work(last, len(others) * costs.tell)

    def _drop(self, ahead: Cycle) -> None:
        """A rejection: whoever works on the next cycle already stops at the next border of a layer."""
        stages = {stage for stage, _ in ahead.stages}
        for rank in range(len(self.free)):
            told, begin = self.told[rank], self.free[rank]
            end = told
            if rank in stages and rank != self.n - 1:
                begin = max(begin, self.entering if rank == 0 else self.hidden[rank])
                if begin < told:
                    end = max(told, begin + self._work(rank, self._until_told(rank, begin, self.costs.stages[rank])))
            self.free[rank] = max(self.free[rank], end)
        self.entering = self.told[0]
        self.own_draft = self.told[self.head]

    def _work(self, rank: int, seconds: float) -> float:
        """So much work on a rank."""
        self.busy[rank] += seconds
        return seconds
