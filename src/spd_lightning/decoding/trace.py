"""placeholder of the interface"""
from __future__ import annotations
import time
from dataclasses import dataclass
from enum import StrEnum


class Work(StrEnum):
    STAGE = "stage"
    HEAD = "head"
    VERIFY = "verify"
    HAND_OVER = "hand-over"
    IDLE = "idle"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class Span:
    rank: int
    work: Work
    cycle: int
    begin: float
    end: float


class Tracer:
    def __init__(self, rank: int) -> None:
        self.rank, self._spans, self._open = rank, [], None

    def switch(self, work: Work, cycle: int) -> None:
        if self._open is not None and self._open[:2] == (work, cycle):
            return
        now = time.perf_counter()
        if self._open is not None:
            self._spans.append((*self._open, now))
        self._open = (work, cycle, now)

    def stop(self) -> list[Span]:
        now = time.perf_counter()
        if self._open is not None:
            self._spans.append((*self._open, now))
        spans = [Span(self.rank, *s) for s in self._spans]
        self._spans, self._open = [], None
        return spans


class NoTracer:
    def switch(self, work: Work, cycle: int) -> None: ...
    def stop(self) -> list[Span]:
        return []
