"""The pictures of a run: learning curve, acceptance by fill, and one decoded prompt as a stage-by-cycle diagram.

matplotlib is imported inside the functions and used through Figure objects: no pyplot state, no display needed.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from spd_lightning.decoding.decoder import CycleEvent

BLUE, GREEN, AMBER, RED, PINK, GREY, PALE, INK = (
    "#33658a", "#2a9d8f", "#e9b949", "#d1495b", "#f3c5cb", "#c3cad1", "#f2f4f6", "#2b2d33",
)  # fmt: skip
#: Colours of runs side by side.
SERIES = (BLUE, GREEN, AMBER, RED, "#7a5195", "#8d6a4f", "#5b8e7d", "#bc4b51")
#: What became of the token in a cell of the occupancy diagram, in the order of the legend.
FATES = {
    "accepted": (GREEN, "accepted draft"),
    "restart": (AMBER, "the target's token (start or restart)"),
    "rejected": (RED, "wrong draft"),
    "flushed": (PINK, "flushed with it"),
    "open": (GREY, "not verified before the end"),
    "empty": (PALE, "empty"),
}
CYCLES_PER_ROW = 30

Row = Mapping[str, Any]


# -- learning curve --------------------------------------------------------------------------------------------------


def plot_training(metrics: Path, out: Path) -> Path:
    """Loss, and acceptance of real decoding with S at every validation, over training tokens.

    Args:
        metrics: metrics.jsonl, one dict per logged step with "tokens" and the metrics' names.
        out: the PNG or SVG to write.
    """
    lines = metric_lines(metrics)
    figure = _figure(8.0, 6.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.0, 1.15))
    tokens, loss = _series(lines, "train/loss")
    scale, unit = _token_unit(max([*tokens, *_series(lines, "val/acceptance")[0], 0.0]))
    _line(above, [t / scale for t in tokens], loss, BLUE)
    if loss:
        above.set_ylim(0, 1.08 * max(loss))
    _dress(above, "Training loss of the head", "loss per token")
    _acceptance_panel(below, lines, scale)
    below.set_xlabel(f"training tokens{unit}", color=INK)
    below.set_xlim(left=0)
    return _save(figure, out)


def _acceptance_panel(axes: Axes, lines: Sequence[Row], scale: float) -> None:
    """Real acceptance as points with S; the teacher-forced metric of the data's text, thin, for orientation."""
    tokens, values = _series(lines, "val/acceptance")
    _, speedups = _series(lines, "val/theoretical_speedup")
    forced_at, forced = _series(lines, "val/teacher_forced_top1")
    if forced:
        x = [t / scale for t in forced_at]
        axes.plot(x, forced, color=GREY, lw=1.2, marker=".", ms=5, label="teacher-forced top-1, on the data's text")
    x = [t / scale for t in tokens]
    axes.plot(
        x, values, color=GREEN, lw=2, marker="o", ms=6, mec="white", label="real decoding, on the target's own text"
    )
    for index, (t, p, s) in enumerate(zip(x, values, speedups, strict=False)):
        under = index < len(forced) and forced[index] > p  # keep the label off the other curve
        axes.annotate(
            f"S {s:.2f}", (t, p), xytext=(0, -15 if under else 8), textcoords="offset points",
            ha="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_ylim(0, 1)
    _dress(axes, "Share of drafts accepted when the real decoder runs, with its speedup S", "acceptance p")
    if values or forced:
        axes.legend(loc="best", fontsize=8, frameon=False)
    else:
        _nothing(axes, "no validation yet")


def _series(lines: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """(tokens, values) of a metric; lines without a token count fall back to the step."""
    found = [(float(line.get("tokens", line.get("step", 0))), float(line[name])) for line in lines if name in line]
    return [t for t, _ in found], [value for _, value in found]


def _token_unit(most: float) -> tuple[float, str]:
    for scale, unit in ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)")):
        if most >= scale:
            return scale, unit
    return 1.0, ""


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], color: str) -> None:
    """The values, pale, with their centred running mean on top where there are enough of them."""
    if not y:
        _nothing(axes, "nothing logged yet")
        return
    window = max(1, len(y) // 30)
    if window == 1:
        axes.plot(x, y, color=color, lw=1.8, marker="." if len(y) < 40 else None)
        return
    around = [y[max(0, i - window // 2) : i + window // 2 + 1] for i in range(len(y))]
    mean = [sum(values) / len(values) for values in around]
    axes.plot(x, y, color=color, lw=0.8, alpha=0.3)
    axes.plot(x, mean, color=color, lw=1.8)


def plot_runs(runs: Mapping[str, Path], out: Path) -> Path:
    """Acceptance of real decoding over training tokens, of several runs.

    Args:
        runs: metrics.jsonl by the run's name.
        out: the PNG or SVG to write.
    """
    figure = _figure(8.0, 4.0)
    axes = figure.subplots()
    found = {name: _series(metric_lines(path), "val/acceptance") for name, path in runs.items()}
    scale, unit = _token_unit(max((t for tokens, _ in found.values() for t in tokens), default=0.0))
    for index, (name, (tokens, values)) in enumerate(found.items()):
        color = SERIES[index % len(SERIES)]
        axes.plot([t / scale for t in tokens], values, color=color, lw=1.8, marker="o", ms=5, mec="white", label=name)
    _dress(axes, "Share of drafts accepted when the real decoder runs", "acceptance p")
    axes.set_ylim(0, 1)
    axes.set_xlabel(f"training tokens{unit}", color=INK)
    if any(tokens for tokens, _ in found.values()):
        axes.legend(loc="best", fontsize=8, frameon=False)
    else:
        _nothing(axes, "no validation yet")
    return _save(figure, out)


def plot_acceptance_by_position(rows: Sequence[Row], out: Path) -> Path:
    """Acceptance over the length of a generation.

    Args:
        rows: {"position", "count", "top1"}: new tokens before the draft, number of drafts, share accepted.
        out: the PNG or SVG to write.
    """
    figure = _figure(8.0, 3.2)
    axes = figure.subplots()
    positions, values = [row["position"] for row in rows], [row["top1"] for row in rows]
    # two standard errors of a share, clipped where a share ends
    errors = [2 * (p * (1 - p) / max(row["count"], 1)) ** 0.5 for p, row in zip(values, rows, strict=True)]
    low = [max(0.0, p - e) for p, e in zip(values, errors, strict=True)]
    high = [min(1.0, p + e) for p, e in zip(values, errors, strict=True)]
    axes.fill_between(positions, low, high, color=GREEN, alpha=0.18, lw=0)
    axes.plot(positions, values, color=GREEN, lw=1.8, marker="o", ms=5, mec="white")
    _dress(axes, "Acceptance along a generation (band: two standard errors)", "acceptance p")
    axes.set_ylim(0, 1)
    axes.set_xlabel("new tokens before the draft", color=INK)
    return _save(figure, out)


def plot_sweep(
    values: Sequence[float | None], importances: Mapping[str, float], metric: str, maximise: bool, out: Path
) -> Path:
    """What every trial of a sweep reached, with the best so far, and which fields the metric depends on.

    Args:
        values: of trials in the order in which they ran; None for those without one.
        importances: share of each field; may be empty.
        out: the PNG or SVG to write.
    """
    figure = _figure(10.0, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1.0))
    shown = [(number, value) for number, value in enumerate(values) if value is not None]
    best: list[float] = []
    for _, value in shown:
        best.append(value if not best else max(best[-1], value) if maximise else min(best[-1], value))
    left.scatter([n for n, _ in shown], [v for _, v in shown], color=BLUE, s=26, zorder=3, label="trial")
    left.step([n for n, _ in shown], best, where="post", color=GREEN, lw=1.8, label="best so far")
    _dress(left, "Trials", metric)
    left.set_xlabel("trial", color=INK)
    left.legend(fontsize=8, frameon=False)
    names = sorted(importances, key=lambda name: importances[name])
    right.barh(names, [importances[name] for name in names], color=BLUE)
    _dress(right, "Which fields it depends on (PED-ANOVA)", "")
    right.grid(False, axis="y")
    right.set_xlabel("share", color=INK)
    if not names:
        _nothing(right, "too few finished trials, or one field")
    return _save(figure, out)


def metric_lines(metrics: Path) -> list[Row]:
    """Lines of a metrics.jsonl; none where it is not there yet, and not one that is being written."""
    found = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


# -- acceptance by fill ----------------------------------------------------------------------------------------------


def plot_acceptance_by_fill(teacher_forced: Sequence[Row], out: Path, decoded: Sequence[Row] | None = None) -> Path:
    """Bars of acceptance by the number of tokens in flight when the draft was made.

    Args:
        teacher_forced: {"fill", "count", "top1"} per fill, on the data's text.
        out: the PNG to write.
        decoded: the same from real decoding.
    """
    figure = _figure(8.0, 4.4)
    axes = figure.subplots()
    series = [(decoded or [], GREEN, "real decoding"), (teacher_forced, BLUE, "teacher-forced, on the data's text")]
    shown = [item for item in series if item[0]]
    fills = sorted({int(row["fill"]) for rows, _, _ in shown for row in rows})
    width = 0.8 / max(1, len(shown))
    for index, (rows, color, label) in enumerate(shown):
        offset = (index - (len(shown) - 1) / 2) * width
        total = sum(row["count"] for row in rows)
        pooled = sum(row["top1"] * row["count"] for row in rows) / max(1, total)
        axes.bar(
            [row["fill"] + offset for row in rows],
            [row["top1"] for row in rows],
            0.92 * width,
            color=color,
            label=f"{label}: {pooled:.3f} over {_count(total)} drafts",
        )
        for row in rows:
            _bar_labels(axes, row["fill"] + offset, row, compact=len(fills) * len(shown) > 10)
    _dress(axes, "Acceptance by tokens in flight: a fuller pipeline hands the head shallower features", "acceptance p")
    axes.set_xlabel("fill: tokens in flight when the draft was made (upright: number of drafts)")
    axes.set_ylim(0, 1.18)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axes.grid(False, axis="x")
    if shown:
        axes.set_xticks(fills)
        axes.legend(loc="upper left", ncols=2, fontsize=8, frameon=False)
    else:
        _nothing(axes, "no drafts counted")
    return _save(figure, out)


def _bar_labels(axes: Axes, x: float, row: Row, compact: bool) -> None:
    size = 6.5 if compact else 8
    value = f"{row['top1']:.2f}".removeprefix("0") if compact else f"{row['top1']:.2f}"
    axes.annotate(
        value, (x, row["top1"]), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=size, color=INK
    )
    inside = row["top1"] > 0.12
    axes.annotate(
        _count(row["count"]), (x, 0 if inside else row["top1"]), xytext=(0, 4 if inside else 11),
        textcoords="offset points", ha="center", va="bottom", fontsize=size, rotation=90,
        color="white" if inside else "#8a9299",
    )  # fmt: skip


def _count(number: float) -> str:
    for scale, unit in ((1e6, "M"), (1e3, "k")):
        if number >= 10 * scale:
            return f"{number / scale:.0f}{unit}"
    return f"{number:.0f}"


# -- who is where in the pipeline ------------------------------------------------------------------------------------


def occupancy(events: Sequence[CycleEvent], num_stages: int) -> list[list[tuple[str, int | None]]]:
    """What was in which stage, cycle by cycle: grid[cycle][stage] = (fate, token).

    Whether a draft in flight is accepted or flushed turns out up to n cycles later, so every token that enters is
    followed to its end first; the cells it went through then take its fate.
    """
    tokens: dict[tuple[int, int], int] = {}  # (position, entry cycle) -> token
    fate: dict[tuple[int, int], str] = {}
    entered: dict[int, int] = {}  # position -> its latest entry cycle
    executed = [event for event in events if event.cycle is not None]

    def enter(position: int, cycle: int, token: int | None, outcome: str) -> None:
        entered[position] = cycle
        fate[position, cycle] = outcome
        if token is not None:
            tokens[position, cycle] = token

    if executed and executed[0].cycle is not None:
        first = next((event.emitted for event in events if event.cycle is None), None)
        enter(executed[0].cycle.newest, executed[0].cycle.index, first, "restart")
    for event in executed:
        plan = event.cycle
        assert plan is not None
        if event.accepted is False:
            assert plan.leaving is not None
            wrong = plan.leaving + 1
            for position in range(wrong, plan.newest + 1):
                fate[position, entered[position]] = "rejected" if position == wrong else "flushed"
            enter(wrong, plan.index + 1, event.emitted, "restart")
            continue
        if event.accepted:
            assert plan.leaving is not None
            fate[plan.leaving + 1, entered[plan.leaving + 1]] = "accepted"
        enter(plan.newest + 1, plan.index + 1, event.drafted, "open")
    grid: list[list[tuple[str, int | None]]] = []
    for event in executed:
        assert event.cycle is not None
        row: list[tuple[str, int | None]] = [("empty", None)] * num_stages
        for stage, position in event.cycle.stages:
            key = (position, event.cycle.index - stage)
            row[stage] = (fate[key], tokens.get(key))
        grid.append(row)
    return grid


def plot_occupancy(
    events: Sequence[CycleEvent],
    num_stages: int,
    out: Path,
    text: Callable[[int], str] | None = None,
    max_cycles: int = 60,
) -> Path:
    """Stage-by-cycle diagram of one decoded prompt.

    Args:
        events: everything the decoder's observer saw, in order.
        num_stages: n.
        out: the PNG to write.
        text: token id to text, for labels in the cells.
        max_cycles: only the first cycles are drawn (fates are taken from all of them).
    """
    from matplotlib.patches import Patch

    grid = occupancy(events, num_stages)
    shown = grid[:max_cycles]
    strips = [shown[start : start + CYCLES_PER_ROW] for start in range(0, len(shown), CYCLES_PER_ROW)] or [[]]
    columns = min(CYCLES_PER_ROW, max(1, len(shown)))
    cell = 0.46 if text else 0.32
    figure = _figure(max(7.5, 1.2 + cell * columns), 1.3 + len(strips) * (0.65 + 0.26 * num_stages))
    rows = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for index, (axes, strip) in enumerate(zip(rows, strips, strict=True)):
        _strip(axes, strip, index * CYCLES_PER_ROW, columns, num_stages, text)
    rows[-1].set_xlabel("cycle")
    emitted = sum(event.emitted is not None for event in events)
    part = f", first {len(shown)} of {len(grid)} cycles" if len(shown) < len(grid) else ""
    figure.suptitle(
        f"Who is where in the pipeline: {emitted} tokens in {len(grid)} cycles through {num_stages} stages{part}",
        fontsize=11,
        fontweight="bold",
        color=INK,
    )
    kinds = {fate for row in shown for fate, _ in row}
    patches = [Patch(fc=color, ec=GREY, lw=0.5, label=label) for f, (color, label) in FATES.items() if f in kinds]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    return _save(figure, out)


def _strip(
    axes: Axes,
    strip: Sequence[Sequence[tuple[str, int | None]]],
    first: int,
    columns: int,
    num_stages: int,
    text: Callable[[int], str] | None,
) -> None:
    """One row of cycles; stage 1 on top, a token moves one cell right and down per cycle."""
    from matplotlib.colors import ListedColormap

    number = {fate: index for index, fate in enumerate(FATES)}
    cells = [[number[column[stage][0]] for column in strip] for stage in range(num_stages)]
    if strip:
        colors = ListedColormap([color for color, _ in FATES.values()])
        axes.pcolormesh(cells, cmap=colors, vmin=-0.5, vmax=len(FATES) - 0.5, edgecolors="white", linewidth=2)
    labels = [(x, y, *cell) for x, column in enumerate(strip) for y, cell in enumerate(column) if cell[1] is not None]
    for x, y, fate, token in labels if text is not None else []:
        assert text is not None and token is not None
        ink = "white" if fate in ("accepted", "rejected") else INK
        axes.text(
            x + 0.5, y + 0.52, _label(text(token)), ha="center", va="center", fontsize=6.5, color=ink, parse_math=False
        )
    axes.set_xlim(0, columns)
    axes.set_ylim(num_stages, 0)
    ticks = [c for c in range(columns) if (first + c) % 5 == 0]
    axes.set_xticks([c + 0.5 for c in ticks], [str(first + c) for c in ticks], fontsize=8)
    axes.set_yticks([s + 0.5 for s in range(num_stages)], [str(s + 1) for s in range(num_stages)], fontsize=8)
    axes.set_ylabel("stage", fontsize=9)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _label(text: str, width: int = 7) -> str:
    shown = text.replace("\n", "⏎").replace("\t", "⇥").strip(" ") or "␣"
    shown = "".join(character if character.isprintable() else "·" for character in shown)
    return shown if len(shown) <= width else f"{shown[: width - 1]}…"


# -- common look -----------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _dress(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(True, color="#e3e7eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)


def _nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#8a9299")


def _save(figure: Figure, out: Path) -> Path:
    """Write a PNG or SVG under a temporary name first: a reader never sees half a picture."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # token text in any script
        figure.savefig(temporary, format=out.suffix.removeprefix("."), dpi=150)
    temporary.replace(out)
    return out
