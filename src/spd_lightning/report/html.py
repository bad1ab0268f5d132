"""The run report: one HTML file about one or several runs, that needs no network, prints, and reads on a phone.

Everything comes from run directories: run.json, metrics.jsonl, generations.json, and records of `bench` if there are
some. Plots are SVG inside the file.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from spd_lightning.data.journal import flat
from spd_lightning.errors import InputError
from spd_lightning.files import write_whole
from spd_lightning.report.generations import FORMAT, as_html
from spd_lightning.report.plots import FATES

#: Keys of a configuration that differ between any two runs and say nothing.
_OWN = ("run_dir", "ckpt_path", "config")
#: Cycles of the occupancy picture that are shown.
_CYCLES = 96


@dataclass
class Run:
    """What a run directory holds.

    Attributes:
        record: run.json.
        generations: generations.json; None where the run has none.
        benches: records of `bench` about this head.
    """

    directory: Path
    record: Mapping[str, Any]
    generations: Mapping[str, Any] | None = None
    benches: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def results(self) -> Mapping[str, Any]:
        return self.record.get("results", {})

    def arm(self, drafter: str, temperature: float = 0.0) -> Mapping[str, Any] | None:
        """The final decoding of a drafter."""
        rows = self.results.get("final", [])
        return next((r for r in rows if r["drafter"] == drafter and r["temperature"] == temperature), None)


def read_run(directory: Path, benches: Sequence[Path] = ()) -> Run:
    """Read a run directory.

    Raises:
        InputError: it is none.
    """
    try:
        record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        if not isinstance(record, dict) or "config" not in record:
            raise ValueError("it has no configuration")
    except (OSError, ValueError) as error:
        raise InputError(f"{directory} is no run directory: run.json: {error}. Give a directory of fit.") from error
    kept = directory / "generations.json"
    try:
        generations = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{kept} is damaged ({error}): remove it, and the report is made without it.") from error
    if generations is not None and (not isinstance(generations, dict) or generations.get("format") != FORMAT):
        raise InputError(f'{kept} is damaged (its "format" is not {FORMAT!r}): remove it, or make the run again.')
    beside = [record for path in sorted(directory.glob("bench*.json")) if (record := _bench_record(path)) is not None]
    return Run(directory, record, generations, beside + [_read_bench(path) for path in benches])


def _bench_record(path: Path) -> Mapping[str, Any] | None:
    """A record of bench; None for a file that is something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"metrics", "head"} <= set(record) else None


def _read_bench(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"--bench {path}: no such file.")
    record = _bench_record(path)
    if record is None:
        raise InputError(f"--bench {path} is no record of spd-lightning bench.")
    return record


def write_report(directories: Sequence[Path], out: Path, benches: Sequence[Path] = ()) -> Path:
    """Write the report about some runs.

    Args:
        benches: records of `bench`, shown with the only run beside those that lie in its directory; each names the head
            that it measured.

    Raises:
        InputError: a directory is no run, matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError("A report needs matplotlib: pip install 'spd_lightning[train]'.") from error
    if benches and len(directories) > 1:
        raise InputError("--bench belongs to one run: give one run, or put the record into its directory.")
    runs = [read_run(directory, benches) for directory in directories]
    write_whole(out, render(runs), "--output")
    return out


def render(runs: Sequence[Run]) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    template = files("spd_lightning.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": _size, "duration": _duration}
    context = {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "runs": [_view(run) for run in runs],
        "compared": _compared(runs) if len(runs) > 1 else None,
        "fates": FATES,
    }
    return environment.from_string(template).render(context)


# -- one run ---------------------------------------------------------------------------------------------------------


def _view(run: Run) -> dict[str, Any]:
    """What the template shows of a run."""
    record, results = run.record, run.results
    head = run.arm("trained head")
    model = record["config"].get("model", {})
    seconds = record.get("seconds", {})
    longest = max(seconds.values(), default=1.0) or 1.0
    return {
        "name": run.name,
        "status": record.get("status", "unknown"),
        "target": model.get("target"),
        "num_stages": _stages(run),
        "head_layers": model.get("head", {}).get("num_layers"),
        "cards": _cards(run),
        "table": [_row(row) for row in results.get("final", [])],
        "prompts": results.get("prompts"),
        "max_new_tokens": results.get("max_new_tokens"),
        "verdicts": _verdicts(run),
        "plots": _plots(run, head),
        "benches": [_bench(record) for record in run.benches],
        "samples": _samples(run),
        "seconds": [(name, value, 100 * value / longest) for name, value in seconds.items()],
        "total": sum(seconds.values()),
        "memory": results.get("peak_memory_bytes"),
        "tokens": results.get("tokens"),
        "provenance": _provenance(record),
        "config": sorted(flat(record["config"]).items()),
    }


def _stages(run: Run) -> int | None:
    head = run.arm("trained head")
    if head is not None:
        return int(head["num_stages"])
    found = run.record["config"].get("model", {}).get("num_stages")
    return int(found) if found is not None else None


def _cards(run: Run) -> list[dict[str, str]]:
    """The headline: p, S, wall clock, lossless; each with what it means."""
    head, last = run.arm("trained head"), _last_metrics(run.directory / "metrics.jsonl")
    cards = []
    if head is not None and head["acceptance"] is not None:
        low, high = head["acceptance_interval"]
        cards.append(_card("Acceptance p", f"{head['acceptance']:.3f}", f"95 %: {low:.3f} – {high:.3f}, greedy"))
        speedup = head["theoretical_speedup"]
        cards.append(_card("Theoretical speedup S", f"{speedup:.2f}", f"of at most n = {head['num_stages']}"))
    elif "val/acceptance" in last:
        cards.append(_card("Acceptance p", f"{last['val/acceptance']:.3f}", f"last validation; {run.record['status']}"))
        cards.append(_card("Theoretical speedup S", f"{last['val/theoretical_speedup']:.2f}", "last validation"))
    if "val/wall_clock_speedup" in last:
        wall = f"{last['val/wall_clock_speedup']:.2f} ×"
        cards.append(_card("Wall clock", wall, "over plain decoding on one rank, last validation"))
    else:
        cards.append(_card("Wall clock", "–", "not measured: needs one rank per stage"))
    if "val/predicted_tokens_per_second" in last:
        rate = last["val/predicted_tokens_per_second"]
        times = f"{last['val/predicted_speedup']:.2f} × plain decoding, predicted"
        cards.append(_card("Predicted tokens/s", f"{rate:,.1f}", times))
    if lossless := run.results.get("lossless"):
        wrong = lossless["mismatches"]
        said = f"{lossless['identical']} of {run.results['prompts']} outputs identical, {lossless['ties']} ties"
        cards.append(_card("Lossless", "NO" if wrong else "yes", said, "bad" if wrong else "good"))
    elif "val/lossless" in last:
        fine = last["val/lossless"] == 1
        cards.append(_card("Lossless", "yes" if fine else "NO", "last validation", "good" if fine else "bad"))
    return cards


def _card(name: str, value: str, note: str, look: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "note": note, "look": look}


def _last_metrics(path: Path) -> dict[str, float]:
    """The newest value of every metric."""
    from spd_lightning.report.plots import metric_lines

    found: dict[str, float] = {}
    for line in metric_lines(path):
        found |= line
    return found


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    drafted = row["acceptance"] is not None
    return {
        "drafter": row["drafter"],
        "temperature": f"{row['temperature']:g}",
        "p": f"{row['acceptance']:.3f}" if drafted else "–",
        "interval": "{:.3f} – {:.3f}".format(*row["acceptance_interval"]) if drafted else "–",
        "S": f"{row['theoretical_speedup']:.2f}" if drafted else "1",
        "cycles": f"{row['cycles']:,}",
        "tokens": f"{row['new_tokens']:,}",
    }


def _verdicts(run: Run) -> list[str]:
    lines = []
    if drift := run.results.get("drift"):
        found = drift["differing_flags"] - drift["ties"]
        lines.append(f"Drift: {found} verdicts that the training view scores differently ({drift['ties']} ties).")
    for name, figures in run.results.get("versus", {}).items():
        low, high = figures["interval"]
        lines.append(f"p above {name}: {figures['difference']:+.3f} (95 %: {low:+.3f} … {high:+.3f}).")
    return lines


def _plots(run: Run, head: Mapping[str, Any] | None) -> list[dict[str, str]]:
    from spd_lightning.report import plots

    metrics, found = run.directory / "metrics.jsonl", []
    if metrics.is_file():
        found.append(("Loss and acceptance", _svg(lambda out: plots.plot_training(metrics, out))))
    forced = run.results.get("teacher_forced_by_fill") or []
    if head is not None and head.get("by_fill"):
        picture = _svg(lambda out: plots.plot_acceptance_by_fill(forced, out, decoded=head["by_fill"]))
        found.append(("Acceptance by fill", picture))
    if head is not None and head.get("by_position"):
        picture = _svg(lambda out: plots.plot_acceptance_by_position(head["by_position"], out))
        found.append(("Acceptance by position", picture))
    return [{"title": title, "uri": uri} for title, uri in found]


def _svg(draw: Callable[[Path], Any]) -> str:
    """A plot as a data: URI."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plot.svg"
        draw(out)
        return "data:image/svg+xml;base64," + base64.b64encode(out.read_bytes()).decode()


def _bench(record: Mapping[str, Any]) -> dict[str, Any]:
    """Acceptance by prompt set and category."""
    rows = []
    for row in record["metrics"]:
        if row["acceptance"] is None:
            continue
        interval = row.get("acceptance_interval")
        rows.append(
            {
                "name": row["prompts"] if row["category"] is None else row["category"],
                "whole": row["category"] is None,
                "temperature": f"{row['temperature']:g}",
                "count": row["count"],
                "p": f"{row['acceptance']:.3f}",
                "share": 100 * row["acceptance"],
                "interval": "–" if interval is None else f"{interval[0]:.3f} – {interval[1]:.3f}",
                "S": f"{row['theoretical_speedup']:.2f}",
                "wall": "–" if row.get("wall_clock_speedup") is None else f"{row['wall_clock_speedup']:.2f}",
            }
        )
    head = record["head"]
    return {"rows": rows, "head": f"{head['name']}, {head['digest'][:12]}", "quality": record.get("quality", True)}


def _samples(run: Run) -> list[dict[str, Any]]:
    if run.generations is None:
        return []
    return [
        {
            "prompt": sample["prompt"],
            "html": as_html(sample["tokens"]),
            "p": "–" if sample["acceptance"] is None else f"{sample['acceptance']:.2f}",
            "S": "–" if sample["theoretical_speedup"] is None else f"{sample['theoretical_speedup']:.2f}",
            "cycles": sample["cycles"],
            "rows": _stages_by_cycle(sample["grid"][:_CYCLES]),
            "shown": min(_CYCLES, len(sample["grid"])),
        }
        for sample in run.generations["samples"]
    ]


def _stages_by_cycle(grid: Sequence[Sequence[Sequence[Any]]]) -> list[list[dict[str, str]]]:
    """Rows of the occupancy table: one per stage, cycles from left to right."""
    stages = len(grid[0]) if grid else 0
    return [[{"fate": column[stage][0], "text": column[stage][1] or ""} for column in grid] for stage in range(stages)]


def _provenance(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [
        ("command", " ".join(map(str, record.get("argv", [])))),
        ("began", str(record.get("began", "–"))),
        ("commit", str(record.get("commit") or "–")),
        ("versions", ", ".join(f"{name} {number}" for name, number in record.get("versions", {}).items())),
    ]
    for name, part in record.get("data", {}).items():
        tokens = f"{part['samples']:,} samples, {part['tokens']:,} tokens"
        found.append((f"data, {name}", f"{tokens}, fingerprint {part['fingerprint']}"))
    for part in record.get("resumed", []):
        found.append(("resumed", f"began {part['began']}, {part['status']}"))
    if wandb := record.get("tracking", {}).get("wandb"):
        found.append(("W&B", f"{wandb['project']}/{wandb['id']} ({wandb['mode']})"))
    return found


# -- several runs ----------------------------------------------------------------------------------------------------


def _compared(runs: Sequence[Run]) -> dict[str, Any]:
    from spd_lightning.report import plots

    names = _distinct([run.name for run in runs])
    metrics = {name: run.directory / "metrics.jsonl" for name, run in zip(names, runs, strict=True)}
    rows = [{card["name"]: f"{card['value']} ({card['note']})" for card in _cards(run)} for run in runs]
    return {
        "names": names,
        "rows": dict(zip(names, rows, strict=True)),
        "figures": list(dict.fromkeys(name for row in rows for name in row)),
        "plot": _svg(lambda out: plots.plot_runs(metrics, out)),
        "differences": config_differences([run.record["config"] for run in runs]),
    }


def _distinct(names: Sequence[str]) -> list[str]:
    """Names of runs; numbered where folders of the same name lie in different places."""
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def config_differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(field, value in each run) where they differ; a field that a run does not have is a dash."""
    flats = [flat(dict(config)) for config in configs]
    keys = sorted({key for one in flats for key in one if key.partition(".")[0] not in _OWN})
    rows = [(key, [str(one[key]) if key in one else "–" for one in flats]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


# -- words -----------------------------------------------------------------------------------------------------------


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
