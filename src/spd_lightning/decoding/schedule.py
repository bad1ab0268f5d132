"""The pipeline schedule: who does what in which cycle, as a state machine of integers.

Engines execute what `plan` says and report the verdict on the verified draft to `advance`; the schedule knows neither
tensors nor tokens, so one schedule drives every engine, and simulated coins drive it too. In cycle c
- stage s works on the position that entered s cycles ago;
- the head computes the rows that are due: position T reaches block k in cycle e(T) + d_min(k);
- the position that leaves the last stage verifies the draft at the next position.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from spd_lightning.staircase import Staircase


@dataclass(frozen=True)
class Cycle:
    """The work of one cycle.

    Attributes:
        index: cycle number, 0 for the first cycle after prefill.
        stages: (stage, position) pairs, deepest stage first.
        rows: (block, position) pairs the head computes, oldest position first, the newest position's block-0 row last.
        newest: the position that entered in this cycle; its row drafts position newest + 1.
        leaving: the position that finishes its last stage in this cycle, or None while the pipeline fills. Its target
            logits verify the draft at position leaving + 1.
        attempt: how often position newest + 1 was drafted before; a counter of the draws for this draft.
    """

    index: int
    stages: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int], ...]
    newest: int
    leaving: int | None
    attempt: int = 0


@dataclass
class PipelineSchedule:
    """Entry cycles of the tokens in flight.

    Args:
        staircase: stages and blocks.
        first_position: position of the first generated token (the target's own, from prefill); all earlier positions
            are finished. It enters in cycle 0 and counts as the first restart.
    """

    staircase: Staircase
    first_position: int
    cycle: int = 0
    restart_positions: list[int] = field(default_factory=list)
    _entered: dict[int, int] = field(default_factory=dict)  # entry cycle -> position, of the last n + 1 cycles
    _attempts: dict[int, int] = field(default_factory=dict)  # position -> how often it was drafted, unless it is final

    def __post_init__(self) -> None:
        self._enter(self.first_position)
        self.restart_positions.append(self.first_position)

    def plan(self, ahead: bool = False) -> Cycle:
        """What has to be done in the current cycle; `ahead`: in the next one, if this one's verdict is acceptance."""
        n, c, entered = self.staircase.num_stages, self.cycle, self._entered
        if ahead:
            entered, c = {**entered, c + 1: entered[c] + 1}, c + 1
        stages = tuple((s, entered[c - s]) for s in reversed(range(n)) if c - s in entered)
        due = zip(self.staircase.reachable_blocks, self.staircase.first_depths, strict=True)
        rows = tuple((k, entered[c - depth]) for k, depth in reversed(list(due)) if c - depth in entered)
        newest = entered[c]
        attempt = self._attempts.get(newest + 1, 0)
        return Cycle(c, stages, rows, newest, leaving=entered.get(c - n + 1), attempt=attempt)

    def attempt_of(self, position: int) -> int:
        """The attempt that made the draft in flight at `position`."""
        return self._attempts[position] - 1

    def advance(self, accepted: bool | None) -> None:
        """End the cycle: let the fresh draft in, or flush everything in flight and restart.

        Args:
            accepted: verdict on the draft that the leaving position verified; None if nothing left the pipeline.
        """
        n, leaving = self.staircase.num_stages, self._entered.get(self.cycle - self.staircase.num_stages + 1)
        assert (accepted is None) == (leaving is None), "a verdict belongs to every cycle in which a position leaves"
        newest = self._entered[self.cycle]
        self._attempts[newest + 1] = self._attempts.get(newest + 1, 0) + 1
        self.cycle += 1
        if leaving is not None:
            self._attempts.pop(leaving + 1, None)
        if accepted is False:
            assert leaving is not None
            # the leaving position stays: it may still owe its deepest row, which is due in the restart's cycle
            self._entered = {cycle: position for cycle, position in self._entered.items() if position <= leaving}
            self._enter(leaving + 1)
            self.restart_positions.append(leaving + 1)
        else:
            self._enter(newest + 1)
        self._entered.pop(self.cycle - n - 1, None)

    def _enter(self, position: int) -> None:
        self._entered[self.cycle] = position
