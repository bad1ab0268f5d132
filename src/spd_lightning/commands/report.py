"""The command report: one HTML file about one or several runs."""

from __future__ import annotations

from pathlib import Path

from spd_lightning.commands.parsing import CommandParser
from spd_lightning.errors import InputError

_ABOUT = """\
One self-contained HTML file about runs: p, S, wall clock and losslessness; acceptance over tokens against loss, by
tokens in flight, by position, by category; generations token by token; who was where in the pipeline; time and memory;
what differs between configurations; provenance. It needs no network, prints, and reads on a phone. `fit` writes one
into every run directory when it ends; a run that still goes on can be looked at too."""

_EXAMPLES = """\
examples
  spd-lightning report runs/tiny                                   runs/tiny/report.html
  spd-lightning report runs/a runs/b runs/c --output compare.html  side by side
  spd-lightning report runs/tiny --bench bench.json                with acceptance by prompt set and category"""


def parser() -> CommandParser:
    """The arguments of report."""
    made = CommandParser("spd-lightning report", _ABOUT, _EXAMPLES)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    made.add_argument(
        "--output", type=Path, metavar="FILE.html", help="default: report.html in the run, or here for several"
    )
    made.add_argument(
        "--bench", type=Path, action="append", default=[], metavar="FILE.json", help="record of spd-lightning bench"
    )
    return made


def run(argv: list[str]) -> int:
    """`spd-lightning report`."""
    from spd_lightning.report.html import write_report

    options = parser().parse_args(argv)
    out = options.output or (options.runs[0] if len(options.runs) == 1 else Path()) / "report.html"
    if out.suffix != ".html":
        raise InputError(f"--output {out}: expected a name that ends in .html.")
    if options.output is not None and not out.parent.is_dir():
        raise InputError(f"--output {out}: the folder {out.parent} does not exist.")
    print(f"written: {write_report(options.runs, out, options.bench)} (open it in a browser)")
    return 0
