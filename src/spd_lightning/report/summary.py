"""The result of a run, printed for people: the headline figures, what they mean, what to try next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(record: dict[str, Any], directory: Path, num_stages: int, console: Console | None = None) -> None:
    """Print run.json's results as tables and point to the files."""
    console = console or Console()
    results = record["results"]
    if "final" in results:
        console.print(_decoding_table(results, num_stages))
        for line in _verdicts(results):
            console.print(line)
    console.print(_time_table(record["seconds"]))
    console.print(f"\nRun directory [bold]{directory}[/]: run.json, metrics.jsonl, checkpoints/, head/, plots/")
    console.print(f"Look at it: [bold]{directory}/report.html[/], in any browser, no network needed")
    console.print("Try next:")
    console.print(f"  spd-lightning generate --target {record['config']['model']['target']} --head {directory}")
    console.print(f"  spd-lightning export --checkpoint {directory} --output heads/{directory.name}")
    if results.get("tokens"):
        console.print(
            f"  more training: this head has seen {results['tokens'] / 1e6:.2f} M tokens; "
            f"add --trainer.max_steps {2 * record['config']['trainer']['max_steps']}"
            if record["config"]["trainer"].get("max_steps", -1) > 0
            else "  other stages: --model.num_stages 4"
        )


def _decoding_table(results: dict[str, Any], num_stages: int) -> Table:
    prompts, tokens = results["prompts"], results["max_new_tokens"]
    table = Table(title=f"Real decoding of {prompts} held-out prompts x {tokens} tokens, n = {num_stages} stages")
    for name in ("drafter", "T", "p", "95 % of p", "S", "cycles", "tokens", "s *"):
        table.add_column(name, justify="left" if name == "drafter" else "right")
    for row in results["final"]:
        drafted = row["acceptance"] is not None
        table.add_row(
            row["drafter"],
            f"{row['temperature']:g}",
            f"{row['acceptance']:.3f}" if drafted else "-",
            "{:.3f} - {:.3f}".format(*row["acceptance_interval"]) if drafted else "-",
            f"{row['theoretical_speedup']:.2f}" if drafted else "1",
            str(row["cycles"]),
            str(row["new_tokens"]),
            f"{row['seconds']:.0f}",
            style="bold" if row["drafter"] == "trained head" else None,
        )
    table.caption = (
        "p: accepted / verified drafts. S: tokens per full target pass in theory.\n"
        "* simulated clock: the stages run one after another in one process"
    )
    return table


def _verdicts(results: dict[str, Any]) -> list[str]:
    lines = []
    if lossless := results.get("lossless"):
        wrong, ties = lossless["mismatches"], lossless["ties"]
        answer = "[green]yes[/]" if not wrong else "[red]NO[/]"
        lines.append(
            f"lossless {answer}: {lossless['identical']} of {results['prompts']} greedy outputs equal plain decoding "
            f"token for token, {ties} ties, {wrong} mismatches"
        )
    if drift := results.get("drift"):
        lines.append(
            f"drift {drift['differing_flags'] - drift['ties']}: accept flags that the training view scores differently "
            f"({drift['ties']} ties)"
        )
    for name, figures in results.get("versus", {}).items():
        low, high = figures["interval"]
        lines.append(f"p above {name}: {figures['difference']:+.3f} (95 % interval {low:+.3f} .. {high:+.3f})")
    return lines


def _time_table(seconds: dict[str, float]) -> Table:
    table = Table(title="Time by phase")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.1f}")
    table.add_row("total", f"{sum(seconds.values()):.1f}", style="bold")
    return table
