"""Spans of ranks: contiguous as recorded, the same after a journey as JSON, and parts that add up to the cycle."""

from __future__ import annotations

import json

import pytest

from spd_lightning.decoding import trace
from spd_lightning.decoding.trace import (
    NoTracer,
    Span,
    Tracer,
    Work,
    as_rows,
    breakdown,
    chrome_trace,
    from_rows,
)

ROLES = {0: "stage 0", 1: "stage 1", 2: "head"}


def two_cycles() -> list[Span]:
    """Two stages and a head of its own; seconds that are easy to add up. Cycles of 10 s, from 5 to 25."""
    return [
        Span(0, Work.PREFILL, -1, 0, 5),
        Span(0, Work.STAGE, 0, 5, 11),
        Span(0, Work.HAND_OVER, 0, 11, 12),
        Span(0, Work.IDLE, 0, 12, 15),
        Span(0, Work.STAGE, 1, 15, 21),
        Span(1, Work.PREFILL, -1, 0, 6),
        Span(1, Work.IDLE, 0, 6, 15),  # begins a second late and is still counted from 5 on
        Span(1, Work.STAGE, 1, 15, 22),
        Span(1, Work.VERIFY, 1, 22, 25),
        Span(2, Work.HEAD, 0, 5, 8),
        Span(2, Work.HEAD, 1, 15, 18),
    ]


def test_spans_are_contiguous_and_take_one_clock_reading_each(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(trace, "perf_counter", lambda: float(next(ticks)))
    tracer = Tracer(3)
    for work, cycle in ((Work.PREFILL, -1), (Work.STAGE, 0), (Work.STAGE, 0), (Work.STAGE, 1), (Work.IDLE, 1)):
        tracer.switch(work, cycle)
    spans = tracer.stop()
    assert spans == [
        Span(3, Work.PREFILL, -1, 0.0, 1.0),
        Span(3, Work.STAGE, 0, 1.0, 2.0),  # said twice, one span
        Span(3, Work.STAGE, 1, 2.0, 3.0),
        Span(3, Work.IDLE, 1, 3.0, 4.0),
    ]
    assert tracer.stop() == []


def test_a_stopped_tracer_starts_anew():
    tracer = Tracer(0)
    tracer.switch(Work.STAGE, 0)
    tracer.stop()
    tracer.switch(Work.STAGE, 0)
    (span,) = tracer.stop()
    assert span.end >= span.begin


def test_no_tracer_records_nothing():
    tracer = NoTracer()
    tracer.switch(Work.STAGE, 0)
    assert tracer.stop() == []


def test_spans_survive_json():
    assert from_rows(json.loads(json.dumps(as_rows(two_cycles())))) == two_cycles()
    assert str(Work.HAND_OVER) == f"{Work.HAND_OVER}" == "hand-over"


def test_the_chrome_trace_names_ranks_and_counts_microseconds_from_the_earliest_span():
    found = json.loads(json.dumps(chrome_trace(reversed(two_cycles()), ROLES)))
    assert found["displayTimeUnit"] == "ms"
    names = {e["tid"]: e["args"]["name"] for e in found["traceEvents"] if e["name"] == "thread_name"}
    assert names == ROLES
    events = [e for e in found["traceEvents"] if e["ph"] == "X"]
    assert len(events) == len(two_cycles()) and {e["pid"] for e in events} == {0}
    verify = next(e for e in events if e["name"] == "verify")
    assert (verify["ts"], verify["dur"], verify["tid"], verify["args"]) == (22e6, 3e6, 1, {"cycle": 1})
    assert min(e["ts"] for e in events) == 0
    assert chrome_trace([], {})["traceEvents"] == []


def test_the_parts_of_every_rank_add_up_to_the_cycle():
    found = breakdown(two_cycles(), cycles=2)
    assert found.cycle_ms == 10_000
    assert found.parts[0] == {
        Work.STAGE: 6000, Work.HEAD: 0, Work.VERIFY: 0, Work.HAND_OVER: 500, Work.IDLE: 3500,
    }  # fmt: skip
    assert found.parts[1][Work.STAGE] == 3500 and found.parts[1][Work.VERIFY] == 1500
    assert found.parts[1][Work.IDLE] == 5000  # 9 s recorded and the second before
    assert found.parts[2][Work.IDLE] == 7000  # nothing of it recorded
    assert all(sum(parts.values()) == found.cycle_ms for parts in found.parts.values())


def test_who_is_slowest_and_what_the_head_could_still_take():
    found = breakdown(two_cycles(), cycles=2)
    assert found.slowest == (0, 6500)
    assert found.head_slack_ms == 6500 - 3000
    assert found.bubble_share == pytest.approx((3500 + 5000 + 7000) / 30_000)
    shared = [Span(0 if s.rank == 2 else s.rank, s.work, s.cycle, s.begin, s.end) for s in two_cycles()]
    assert breakdown(shared, 2).head_slack_ms is None  # co-located
    assert breakdown([s for s in two_cycles() if s.rank != 2], 2).head_slack_ms is None  # no head at all


def test_the_table_has_a_row_per_rank_and_a_total_that_is_the_cycle():
    lines = breakdown(two_cycles(), cycles=2).table(ROLES).splitlines()
    assert lines[0] == "| rank | stage, ms | head, ms | verify, ms | hand-over, ms | idle, ms | cycle, ms |"
    assert lines[2] == "| stage 0 | 6000.000 | 0.000 | 0.000 | 500.000 | 3500.000 | 10000.000 |"
    assert len(lines) == 5 and all(line.endswith("| 10000.000 |") for line in lines[2:])


def test_real_clocks_add_up_too():
    tracer = Tracer(0)
    for cycle in range(50):
        for work in (Work.STAGE, Work.HAND_OVER, Work.IDLE):
            tracer.switch(work, cycle)
    spans = tracer.stop()
    assert all(a.end == b.begin for a, b in zip(spans, spans[1:], strict=False))
    found = breakdown(spans, 50)
    assert sum(found.parts[0].values()) == pytest.approx(found.cycle_ms, rel=1e-9)


@pytest.mark.parametrize("spans, cycles", [([], 1), (two_cycles(), 0), (two_cycles()[:1], 1)])
def test_nothing_to_break_down_is_said(spans, cycles):
    with pytest.raises(ValueError, match="nothing to break down"):
        breakdown(spans, cycles)
