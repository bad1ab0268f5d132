"""The command line: `spd-lightning COMMAND` and `python -m spd_lightning COMMAND` are one program.

A dispatcher of our own, because stock LightningCLI subcommands take 5 s to print a help and cannot resolve absolute
`${...}` interpolations. It imports a command's module only when that command is called, and turns everything that a
user's input can cause into one line on stderr and exit status 2.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from spd_lightning.commands.parsing import did_you_mean
from spd_lightning.errors import InputError
from spd_lightning.processes import die_with_parent, started_here

PROGRAM = "spd-lightning"
INPUT_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # the last two as a shell reports SIGINT and SIGPIPE


@dataclass(frozen=True)
class Command:
    """A command: `entry` is "module:function", called with the arguments after the command's name."""

    name: str
    group: str
    summary: str
    entry: str


COMMANDS = (
    Command("fit", "Main job", "train a speculation head for a frozen target", "fit:fit"),
    Command("validate", "Main job", "measure a head: loss, and acceptance in real decoding", "fit:validate"),
    Command("plan", "Main job", "say before a run what each GPU will hold in memory, and what fits", "plan:run"),
    Command("generate", "Main job", "decode with a head and see which tokens were drafts", "generate:run"),
    Command(
        "export",
        "Deploy",
        "write a head as a sealed folder that proves itself, or in a published format",
        "export:run_export",
    ),
    Command("import", "Deploy", "turn a published version-11 head into such a folder", "export:run_import"),
    Command("bench", "Deploy", "measure a head on prompt sets: acceptance, speedup, losslessness", "bench:run"),
    Command("sweep", "Track and compare", "run a W&B sweep file here, without a server", "sweep:run"),
    Command("profile", "Track and compare", "measure what a cycle's parts cost on this machine", "profile:run"),
    Command("report", "Track and compare", "one HTML file about one or several runs", "report:run"),
    Command("doctor", "Track and compare", "look at this machine, prove that it works, say what to mend", "doctor:run"),
    Command("data", "Data", "prepare, preview and regenerate conversations, count a draft vocabulary", "data:run"),
)

_ABOUT = """\
Speculative pipeline decoding (SPD): a frozen language model is cut into stages that work on several tokens of ONE
sequence at once, because a small trained head drafts the next token in time; the output is exactly the model's own."""

_EXAMPLE = f"""\
First example (a tiny target that is part of the package; minutes on a CPU)
  {PROGRAM} fit --config tiny                              train a head, into runs/tiny
  {PROGRAM} generate --target tiny --head runs/tiny        ask questions, watch drafts being accepted

`{PROGRAM} COMMAND --help` explains a command; `python -m spd_lightning` is the same program.
Wrong input ends with one line and exit status 2; SPD_DEBUG=1 adds the traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    die_with_parent()
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        if os.environ.get("SPD_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return INPUT_ERROR
    except KeyboardInterrupt:
        if not started_here():  # one process of the job says it
            print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader (`| head`) has left; Python would complain once more when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except SystemExit as end:  # argparse's and jsonargparse's way to end after --help or --print_config
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def _dispatch(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"{PROGRAM} {_version()}")
        return 0
    command = next((command for command in COMMANDS if command.name == name), None)
    if command is None:
        names = [command.name for command in COMMANDS]
        raise InputError(
            f"unknown command {name!r}: expected one of {', '.join(names)}.{did_you_mean(name, names)} "
            f"See {PROGRAM} --help"
        )
    module, _, function = command.entry.partition(":")
    return int(getattr(import_module(f"spd_lightning.commands.{module}"), function)(rest) or 0)


def help_text() -> str:
    """The top-level help: what SPD is, the commands in their groups, a first example."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [_ABOUT, "", f"Usage: {PROGRAM} COMMAND [arguments]"]
    for group in dict.fromkeys(command.group for command in COMMANDS):
        lines += ["", group]
        lines += [f"  {c.name:<{width}}  {c.summary}" for c in COMMANDS if c.group == group]
    return "\n".join([*lines, "", _EXAMPLE])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("spd_lightning")
    except PackageNotFoundError:  # run from a checkout by its path
        return "(not installed)"
