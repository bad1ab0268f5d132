"""What every rank of a pipeline does when: spans without gaps, so that the parts of a cycle add up to the cycle.

A rank switches from one kind of work to the next with one reading of the clock. `chrome_trace` is for
https://ui.perfetto.dev, `breakdown` says where a cycle's time goes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Work(StrEnum):
    """Kinds of work; a rank does exactly one at a time."""

    STAGE = "stage"  # layers of the target
    HEAD = "head"  # rows and the draft
    VERIFY = "verify"  # final norm, lm_head and the verdict
    HAND_OVER = "hand-over"  # giving results to other ranks
    IDLE = "idle"  # waiting for another rank
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of work.

    Attributes:
        rank: global rank.
        cycle: of the pipeline; -1 in prefill.
        begin, end: seconds on the clock that all processes of a machine share.
    """

    rank: int
    work: Work
    cycle: int
    begin: float
    end: float


class Tracer:
    """Collects the spans of one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._changes: list[tuple[Work, int, float]] = []

    def switch(self, work: Work, cycle: int) -> None:
        """From now on this rank does `work` for `cycle`."""
        if not self._changes or self._changes[-1][:2] != (work, cycle):
            self._changes.append((work, cycle, time.perf_counter()))

    def stop(self) -> list[Span]:
        """End the last span; return all of them and forget them."""
        ends = [when for _, _, when in self._changes[1:]] + [time.perf_counter()]
        spans = [
            Span(self.rank, work, cycle, begin, end)
            for (work, cycle, begin), end in zip(self._changes, ends, strict=False)
        ]
        self._changes = []
        return spans


class NoTracer:
    """Keeps nothing."""

    def switch(self, work: Work, cycle: int) -> None:
        """Nothing."""

    def stop(self) -> list[Span]:
        """Nothing was kept."""
        return []


def as_rows(spans: Iterable[Span]) -> list[list[Any]]:
    """Spans as plain lists, to be sent or stored."""
    return [[span.rank, str(span.work), span.cycle, span.begin, span.end] for span in spans]


def from_rows(rows: Iterable[Sequence[Any]]) -> list[Span]:
    """The inverse of `as_rows`."""
    return [Span(rank, Work(work), cycle, begin, end) for rank, work, cycle, begin, end in rows]


def chrome_trace(spans: Sequence[Span], roles: Mapping[int, str]) -> dict[str, Any]:
    """A trace for Perfetto or chrome://tracing, one row per rank; microseconds from the earliest span."""
    start = min((span.begin for span in spans), default=0.0)
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": name}}
        for rank, name in roles.items()
    ]
    events += [
        {
            "ph": "X",
            "name": str(span.work),
            "cat": str(span.work),
            "pid": 0,
            "tid": span.rank,
            "ts": 1e6 * (span.begin - start),
            "dur": 1e6 * (span.end - span.begin),
            "args": {"cycle": span.cycle},
        }
        for span in spans
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


@dataclass(frozen=True)
class Breakdown:
    """Where the mean cycle's time goes.

    Attributes:
        cycle_ms: milliseconds per cycle, from the first to the last moment of decoding.
        parts: rank -> work -> milliseconds per cycle; the parts of a rank add up to cycle_ms.
        slowest: the rank that is busy longest, and its milliseconds.
        head_slack_ms: how much longer the head could take before it sets the pace; None unless it has its own rank.
        bubble_share: idle share of all ranks' time.
    """

    cycle_ms: float
    parts: dict[int, dict[Work, float]]
    slowest: tuple[int, float]
    head_slack_ms: float | None
    bubble_share: float

    def table(self, roles: Mapping[int, str]) -> str:
        """Plain text, a row per rank; the last column is the sum of the others."""
        kinds = [work for work in Work if work is not Work.PREFILL]
        width = max(map(len, roles.values()), default=4)
        lines = ["ms per cycle".ljust(width) + "".join(f"{work:>11}" for work in kinds) + "      total"]
        for rank, parts in sorted(self.parts.items()):
            values = [parts.get(work, 0.0) for work in kinds]
            name = roles.get(rank, f"rank {rank}")
            lines.append(name.ljust(width) + "".join(f"{value:11.3f}" for value in [*values, sum(values)]))
        return "\n".join(lines)


def breakdown(spans: Sequence[Span], cycles: int) -> Breakdown:
    """Mean times per cycle over the spans of decoding (cycle >= 0); time before a rank's first span counts as idle."""
    decoding = [span for span in spans if span.cycle >= 0]
    assert decoding and cycles > 0, "nothing was decoded"
    begin, end = min(span.begin for span in decoding), max(span.end for span in decoding)
    whole = 1e3 * (end - begin) / cycles
    parts: dict[int, dict[Work, float]] = {}
    for span in decoding:
        mine = parts.setdefault(span.rank, dict.fromkeys((work for work in Work if work is not Work.PREFILL), 0.0))
        mine[span.work] += 1e3 * (span.end - span.begin) / cycles
    for mine in parts.values():
        mine[Work.IDLE] += whole - sum(mine.values())
    busy = {rank: whole - mine[Work.IDLE] for rank, mine in parts.items()}
    slowest = max(busy, key=lambda rank: busy[rank])
    stages = [rank for rank, mine in parts.items() if mine[Work.STAGE]]
    alone = [rank for rank, mine in parts.items() if mine[Work.HEAD] and not mine[Work.STAGE]]
    slack = max(busy[rank] for rank in stages) - busy[alone[0]] if alone and stages else None
    bubble = sum(mine[Work.IDLE] for mine in parts.values()) / (whole * len(parts))
    return Breakdown(whole, parts, (slowest, busy[slowest]), slack, bubble)
