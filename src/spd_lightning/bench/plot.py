"""A picture of a bench: acceptance and speedup by category, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_bench(metrics: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Write a PNG: p (left) and S (right), one bar per category (or prompt set) and temperature."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in metrics if row["acceptance"] is not None and row["theoretical_speedup"] is not None]
    labels = list(dict.fromkeys(_label(row) for row in rows))
    temperatures = sorted({row["temperature"] for row in rows})
    figure = Figure(figsize=(11, 1.4 + 0.32 * len(labels) * max(1, len(temperatures) * 0.7)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    height = 0.8 / len(temperatures)
    names = (("acceptance", "acceptance p"), ("theoretical_speedup", "theoretical speedup S"))
    for axes, (name, meaning) in zip(figure.subplots(1, 2, sharey=True), names, strict=True):
        for number, temperature in enumerate(temperatures):
            of_one = [row for row in rows if row["temperature"] == temperature]
            places = [labels.index(_label(row)) + (number - (len(temperatures) - 1) / 2) * height for row in of_one]
            values = [row[name] for row in of_one]
            intervals = [row[f"{name}_interval"] or (row[name], row[name]) for row in of_one]
            errors = [
                [max(0.0, v - low) for v, (low, _) in zip(values, intervals, strict=True)],
                [max(0.0, high - v) for v, (_, high) in zip(values, intervals, strict=True)],
            ]
            axes.barh(places, values, height * 0.9, xerr=errors, capsize=2, label=f"T = {temperature:g}", alpha=0.85)
        axes.set_xlabel(f"{meaning} (95 % over prompts)")
        axes.set_yticks(range(len(labels)), labels)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.axes[1].legend(frameon=False)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=130, format="png")
    temporary.replace(path)


def _label(row: Mapping[str, Any]) -> str:
    return str(row["prompts"] if row["category"] is None else row["category"])
