"""What every rank of a pipeline spends its time on: contiguous spans, the trace to look at, the sum that adds up.

A rank does exactly one kind of work at every moment. It says `switch` when that changes, and one reading of the clock
both ends the old span and begins the new one: spans have no holes and no overlaps, so the parts of a cycle add up to
the whole by construction. The clock is time.perf_counter, which all processes of one machine share.

Spans are what the host sees. A device that works behind the host's back is waited for before a switch, or its time
would fall into whatever waits for it next: a trace costs a GPU some overlap of launching and computing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from time import perf_counter
from typing import Any


class Work(str, Enum):
    """What a rank is doing. (enum.StrEnum would say the same, but Python 3.10 has none.)"""

    STAGE = "stage"
    HEAD = "head"
    VERIFY = "verify"
    HAND_OVER = "hand-over"  # packing, sending, receiving what is already there
    IDLE = "idle"  # waiting for another rank
    PREFILL = "prefill"

    def __str__(self) -> str:
        return self.value


#: Kinds of work of a decoding cycle, in the order of tables.
DECODING = (Work.STAGE, Work.HEAD, Work.VERIFY, Work.HAND_OVER, Work.IDLE)
PREFILL_CYCLE = -1


@dataclass(frozen=True, slots=True)
class Span:
    """One kind of work of one rank, from `begin` to `end` in seconds of time.perf_counter.

    `cycle` is the schedule's, -1 for what comes before the first.
    """

    rank: int
    work: Work
    cycle: int
    begin: float
    end: float


class Tracer:
    """Records the spans of one rank; a switch costs a clock reading and a tuple.

    Args:
        settle: waits for the device.
    """

    def __init__(self, rank: int, settle: Callable[[], None] | None = None) -> None:
        self._rank, self._settle = rank, settle
        self._marks: list[tuple[Work, int, float]] = []  # what began, and when; it ends where the next begins

    def switch(self, work: Work, cycle: int) -> None:
        """End the running span and begin the next; the same work in the same cycle just goes on."""
        if self._marks:
            running = self._marks[-1]
            if running[0] is work and running[1] == cycle:
                return
        if self._settle is not None:
            self._settle()
        self._marks.append((work, cycle, perf_counter()))

    def stop(self) -> list[Span]:
        """End the last span; return everything since the last stop and forget it."""
        if self._settle is not None:
            self._settle()
        now, marks = perf_counter(), self._marks
        self._marks = []
        ends = [*(begin for _, _, begin in marks[1:]), now]
        return [Span(self._rank, *mark, end) for mark, end in zip(marks, ends, strict=False)]


class NoTracer:
    """Stands where a tracer would and records nothing."""

    def switch(self, work: Work, cycle: int) -> None:
        pass

    def stop(self) -> list[Span]:
        return []


def as_rows(spans: Iterable[Span]) -> list[list[Any]]:
    """Spans as plain lists [rank, work, cycle, begin, end], to be gathered as JSON."""
    return [[span.rank, span.work.value, span.cycle, span.begin, span.end] for span in spans]


def from_rows(rows: Iterable[Sequence[Any]], shift: float = 0.0) -> list[Span]:
    """The spans that `as_rows` wrote, later by `shift` seconds."""
    return [
        Span(int(rank), Work(work), int(cycle), begin + shift, end + shift) for rank, work, cycle, begin, end in rows
    ]


# -- the trace to look at --------------------------------------------------------------------------------------------

#: Names out of the viewer's own palette. Perfetto colours by name of the span instead, which tells them apart as well.
_CHROME_COLORS = {
    Work.STAGE: "thread_state_running",
    Work.HEAD: "rail_response",
    Work.VERIFY: "rail_load",
    Work.HAND_OVER: "thread_state_iowait",
    Work.IDLE: "grey",
    Work.PREFILL: "thread_state_runnable",
}


def chrome_trace(spans: Iterable[Span], roles: Mapping[int, str]) -> dict[str, Any]:
    """The spans as a trace for chrome://tracing or ui.perfetto.dev: write it with json.dump.

    Args:
        spans: of all ranks, in any order.
        roles: what a rank is, such as {0: "stage 0 + head"}; a rank without a role is called by its number.

    Returns:
        {"traceEvents": [...]}: one row per rank, microseconds since the earliest span.
    """
    spans = sorted(spans, key=lambda span: (span.begin, span.rank))
    start = spans[0].begin if spans else 0.0
    ranks = sorted({span.rank for span in spans} | set(roles))
    events: list[dict[str, Any]] = []
    for rank in ranks:
        row = {"ph": "M", "pid": 0, "tid": rank}
        name = roles.get(rank, f"rank {rank}")
        events.append(row | {"name": "thread_name", "args": {"name": name}})
        events.append(row | {"name": "thread_sort_index", "args": {"sort_index": rank}})
    for span in spans:
        events.append(
            {
                "ph": "X",
                "name": span.work.value,
                "cat": span.work.value,
                "cname": _CHROME_COLORS[span.work],
                "pid": 0,
                "tid": span.rank,
                "ts": 1e6 * (span.begin - start),
                "dur": 1e6 * (span.end - span.begin),
                "args": {"cycle": span.cycle},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


# -- the sum that adds up --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Breakdown:
    """Mean milliseconds per cycle.

    Attributes:
        cycles: number of cycles that were measured.
        cycle_ms: how long one took.
        parts: rank -> work -> milliseconds per cycle. The parts of every rank add up to `cycle_ms`.
    """

    cycles: int
    cycle_ms: float
    parts: dict[int, dict[Work, float]]

    def busy_ms(self, rank: int) -> float:
        """Milliseconds per cycle in which a rank did not wait."""
        return sum(ms for work, ms in self.parts[rank].items() if work is not Work.IDLE)

    @property
    def slowest(self) -> tuple[int, float]:
        """(rank, its busy milliseconds per cycle): who sets the pace; the first of equals."""
        rank = max(self.parts, key=self.busy_ms)
        return rank, self.busy_ms(rank)

    @property
    def head_slack_ms(self) -> float | None:
        """How much longer the head could take before it were the slowest; negative if it is. None if it shares a rank.

        Other waits may bind earlier: a draft takes two hand-overs from the deepest states to the first stage.
        """
        heads = [rank for rank, parts in self.parts.items() if parts[Work.HEAD] > 0]
        stages = [rank for rank, parts in self.parts.items() if parts[Work.STAGE] > 0]
        if len(heads) != 1 or not stages or heads[0] in stages:
            return None
        return max(self.busy_ms(rank) for rank in stages) - self.busy_ms(heads[0])

    @property
    def bubble_share(self) -> float:
        """Share of all ranks' time that is idle, 0..1."""
        whole = self.cycle_ms * len(self.parts)
        return sum(parts[Work.IDLE] for parts in self.parts.values()) / whole if whole else 0.0

    def table(self, roles: Mapping[int, str] | None = None) -> str:
        """Markdown: a row per rank, a column per work that occurs, and their total, which is the cycle's time."""
        works = [work for work in DECODING if any(parts[work] for parts in self.parts.values())]
        lines = [
            "| rank | " + " | ".join(f"{work}, ms" for work in works) + " | cycle, ms |",
            "|---" * (len(works) + 2) + "|",
        ]
        for rank, parts in sorted(self.parts.items()):
            name = roles[rank] if roles and rank in roles else f"rank {rank}"
            cells = [*(parts[work] for work in works), sum(parts[work] for work in works)]
            lines.append(f"| {name} | " + " | ".join(f"{ms:.3f}" for ms in cells) + " |")
        return "\n".join(lines)


def breakdown(spans: Iterable[Span], cycles: int) -> Breakdown:
    """Where the time of a cycle went, rank by rank.

    All ranks are judged over the same time: from the earliest begin to the latest end of any rank's decoding. What a
    rank recorded nothing for, such as the end after its last work, counts as idle.

    Args:
        spans: of all ranks and of ONE generation; prefill is left out.
        cycles: how many cycles the generation took (the schedule's count).

    Raises:
        ValueError: no cycles, or no span of decoding.
    """
    decoding = [span for span in spans if span.cycle > PREFILL_CYCLE and span.work is not Work.PREFILL]
    if cycles < 1 or not decoding:
        raise ValueError(f"nothing to break down: {cycles} cycles, {len(decoding)} spans of decoding")
    begin, end = min(span.begin for span in decoding), max(span.end for span in decoding)
    cycle_ms = 1e3 * (end - begin) / cycles
    parts = {rank: dict.fromkeys(DECODING, 0.0) for rank in sorted({span.rank for span in decoding})}
    for span in decoding:
        parts[span.rank][span.work] += 1e3 * (span.end - span.begin) / cycles
    for works in parts.values():
        # the remainder, so that the sum is the cycle's time: recorded waiting and gaps alike
        works[Work.IDLE] = max(0.0, cycle_ms - sum(ms for work, ms in works.items() if work is not Work.IDLE))
    return Breakdown(cycles, cycle_ms, parts)
