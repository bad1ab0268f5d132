"""A Gantt chart of some cycles of a pipeline: what every rank did when.

matplotlib is imported inside the function and used through Figure objects: no pyplot state, no display needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from spd_lightning.decoding.trace import Span, Work
from spd_lightning.report.plots import AMBER, BLUE, GREEN, GREY, INK, PALE, RED, _figure, _save

COLOURS = {
    Work.STAGE: BLUE,
    Work.HEAD: AMBER,
    Work.VERIFY: GREEN,
    Work.HAND_OVER: RED,
    Work.IDLE: PALE,
    Work.PREFILL: GREY,
}
CYCLES = 12


def plot_timeline(
    spans: Sequence[Span], roles: Mapping[int, str], out: Path, cycles: tuple[int, int] | None = None, title: str = ""
) -> Path:
    """Draw the ranks' work in some cycles.

    Args:
        roles: rank -> what to write beside its row.
        cycles: first and last; default: `CYCLES` of them in the middle.
        title: default: says which cycles.
    """
    last = max((span.cycle for span in spans), default=0)
    if cycles is None:
        first = max(0, last // 2 - CYCLES // 2)
        cycles = first, min(last, first + CYCLES - 1)
    verifying = max((span.rank for span in spans if span.work is Work.VERIFY), default=max(roles))
    own = [span for span in spans if span.rank == verifying and cycles[0] <= span.cycle <= cycles[1]]
    begin, end = min(span.begin for span in own), max(span.end for span in own)
    figure = _figure(11.0, 1.5 + 0.55 * len(roles))
    axes = figure.subplots()
    rows = {rank: row for row, rank in enumerate(sorted(roles, reverse=True))}
    for work, colour in COLOURS.items():
        for rank, row in rows.items():
            bars = [
                (1e3 * (max(span.begin, begin) - begin), 1e3 * (min(span.end, end) - max(span.begin, begin)))
                for span in spans
                if span.rank == rank and span.work is work and span.end > begin and span.begin < end
            ]
            axes.broken_barh(bars, (row - 0.36, 0.72), facecolors=colour, label=str(work) if row == 0 else None)
    for cycle in range(cycles[0], cycles[1] + 1):
        starts = [span.begin for span in own if span.cycle == cycle]
        if starts:
            at = 1e3 * (min(starts) - begin)
            axes.axvline(at, color=INK, lw=0.5, alpha=0.35)
            axes.text(at, len(rows) - 0.55, f" {cycle}", fontsize=7, color=INK, ha="left", va="bottom")
    axes.set_yticks(list(rows.values()), [roles[rank] for rank in rows], color=INK)
    axes.set_ylim(-0.6, len(rows) - 0.25)
    axes.set_xlim(0, 1e3 * (end - begin))
    axes.set_xlabel("milliseconds (numbers above: cycles of the last stage)", color=INK)
    axes.set_title(title or f"Cycles {cycles[0]} to {cycles[1]} of the pipeline", loc="left", color=INK, fontsize=11)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    figure.legend(ncols=len(COLOURS), loc="outside lower center", frameon=False, fontsize=8)
    return _save(figure, out)
