"""The command sweep: a W&B sweep file run on this machine by Optuna, without a server or an account."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.parsing import CommandParser, did_you_mean
from spd_lightning.errors import InputError
from spd_lightning.files import recipe_folder, write_whole

if TYPE_CHECKING:
    from spd_lightning.sweep.file import SweepFile
    from spd_lightning.sweep.local import LocalSweep

_ABOUT = """\
Run the trials of a W&B sweep file on this machine: same file, same command line, same metric, without a server. Optuna
chooses (bayes: TPE), and successive halving ends poor trials early where the file says hyperband. Whatever is killed
goes on where it was when the same command is given again. With W&B: `wandb sweep FILE`, then `wandb agent ID`."""

_EXAMPLES = """\
examples
  spd-lightning sweep recipes/sweeps/tiny_training.yaml --local                 into sweeps/tiny_training
  spd-lightning sweep recipes/sweeps/tiny_training.yaml --local --trials 12     until 12 trials are finished
  spd-lightning sweep recipes/sweeps/tiny_structure.yaml --show                 the command line of a first trial"""


def parser() -> CommandParser:
    """The arguments of sweep."""
    made = CommandParser("spd-lightning sweep", _ABOUT, _EXAMPLES)
    made.add_argument("file", metavar="FILE", help="a sweep file, or the name of one in recipes/sweeps")
    how = made.add_mutually_exclusive_group(required=True)
    how.add_argument("--local", action="store_true", help="run trials here, one after another")
    how.add_argument("--show", action="store_true", help="print a command line that an agent would run, and end")
    made.add_argument("--output", type=Path, metavar="DIR", help="study, runs and results (default: sweeps/NAME)")
    made.add_argument("--trials", type=int, metavar="N", help="finished trials in all (default: the file's run_cap)")
    made.add_argument("--seed", type=int, default=0, help="of the choice of parameters (default: 0)")
    return made


def run(argv: list[str]) -> int:
    """`spd-lightning sweep`."""
    from spd_lightning.sweep.file import read_sweep

    options = parser().parse_args(argv)
    if options.trials is not None and options.trials < 1:
        raise InputError(f"--trials {options.trials}: expected at least 1.")
    sweep = read_sweep(find_sweep(options.file))
    if options.show:
        print(" ".join(_quoted(word) for word in sweep.render(_first_values(sweep))))
        return 0
    if "fit" not in sweep.command:
        raise InputError(f"{sweep.path}: command: `sweep --local` runs trials of fit, and the command has no fit.")
    return _local(sweep, options)


def find_sweep(name: str) -> Path:
    """A file, or a sweep of recipes/sweeps by name."""
    if Path(name).is_file():
        return Path(name)
    folder = recipe_folder() / "sweeps"
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name.removesuffix(".yaml") in known:
        return known[name.removesuffix(".yaml")]
    raise InputError(
        f"sweep {name}: no such file, and no sweep of that name. Sweeps: {', '.join(known) or 'none'}."
        f"{did_you_mean(Path(name).stem, known)}"
    )


def _first_values(sweep: SweepFile) -> dict[str, Any]:
    return {
        name: p.values[0] if p.values else int(p.low) if p.integer else p.low for name, p in sweep.parameters.items()
    }


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)


def _local(sweep: SweepFile, options: Namespace) -> int:
    from rich.console import Console

    from spd_lightning.sweep.local import LocalSweep

    console = Console(stderr=True)
    folder = options.output or Path("sweeps") / sweep.path.stem
    count = options.trials or sweep.run_cap
    made = LocalSweep(sweep, folder, options.seed)
    console.print(f"{sweep.name}: {sweep.metric}, {len(made.rows())} of {count or 'endless'} trials done, in {folder}")
    try:
        with console.status("starting a trial") as status:

            def tick(number: int, text: str) -> None:
                status.update(f"trial {number}: {text}")

            def say(line: str) -> None:
                console.print(line, highlight=False)
                write_results(made)

            status.update("running a trial")
            made.run(count, say, tick)
    finally:
        if made.rows():
            write_results(made)
            console.print(_table(made))
            print(folder / "results.md", file=sys.stderr)
    return 0


def write_results(made: LocalSweep) -> None:
    """results.json, results.md and sweep.png in the sweep's folder."""
    from spd_lightning.provenance import commit, versions

    rows, importances = made.rows(), made.importances()
    content = {
        "sweep": made.sweep.name, "metric": made.sweep.metric,
        "goal": "maximize" if made.sweep.maximise else "minimize",
        "commit": commit(), "versions": versions(), "importances": importances, "trials": rows,
    }  # fmt: skip
    write_whole(made.folder / "results.json", json.dumps(content, indent=1) + "\n", "--output")
    write_whole(made.folder / "results.md", markdown(content), "--output")
    from spd_lightning.report.plots import plot_sweep

    in_order = sorted(rows, key=lambda row: row["trial"])
    values = [row["value"] for row in in_order]
    plot_sweep(values, importances, made.sweep.metric, made.sweep.maximise, made.folder / "sweep.png")


def varied(content: dict[str, Any]) -> list[str]:
    """Fields that differ between trials."""
    names = list(dict.fromkeys(name for row in content["trials"] for name in row["parameters"]))
    return [name for name in names if len({str(row["parameters"].get(name)) for row in content["trials"]}) > 1]


def markdown(content: dict[str, Any]) -> str:
    """The table of a sweep's trials."""
    names = varied(content)
    lines = [f"| trial | state | {content['metric']} | {' | '.join(names)} | s |", "|---" * (4 + len(names)) + "|"]
    for row in content["trials"]:
        cells = [_short(row["parameters"].get(name)) for name in names]
        value = "-" if row["value"] is None else f"{row['value']:.4g}"
        lines.append(f"| {row['trial']} | {row['state']} | {value} | {' | '.join(cells)} | {row['seconds']:.0f} |")
    if content["importances"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in content["importances"].items())
        finished = sum(row["state"] == "complete" for row in content["trials"])
        lines += ["", f"Importance (PED-ANOVA over the {finished} finished trials): {shares}."]
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(made: LocalSweep) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    content = {"trials": made.rows()}
    names = varied(content)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"{made.sweep.name}: {made.sweep.metric}")
    for name in ("trial", "state", "value", *(name.rpartition(".")[2] for name in names), "s"):
        table.add_column(name, justify="left" if name == "state" else "right")
    for row in content["trials"][:20]:
        value = "-" if row["value"] is None else f"{row['value']:.4g}"
        cells = [_short(row["parameters"].get(name)) for name in names]
        table.add_row(str(row["trial"]), row["state"], value, *cells, f"{row['seconds']:.0f}")
    return table
