"""What measurements here share: interleaved timing, peak memory in a fresh process, a record, a table in README.md.

A record is benchmarks/records/NAME.json: the command, the commit, the versions, the processor and the numbers. It holds
no host name and no path, so that records of different machines can lie side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from spd_lightning.errors import InputError
from spd_lightning.export.background import without_paths
from spd_lightning.memory.resident import resident

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
MIB = 2**20
console = Console(stderr=True)


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: on the clock, and of this process on the processor (a busy machine shows in the first)."""

    wall: float
    cpu: float


def interleaved(cases: Mapping[str, Callable[[], object]], repeats: int, title: str) -> dict[str, list[Timing]]:
    """Run A B C A B C ...: whatever else the machine does meanwhile falls on all cases alike. One warm-up round."""
    timings: dict[str, list[Timing]] = {name: [] for name in cases}
    for index in range(-1, repeats):
        for name, run in cases.items():
            with console.status(f"{title}: {name}, {'warm-up' if index < 0 else f'run {index + 1} of {repeats}'}"):
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                timing = Timing(time.perf_counter() - wall, time.process_time() - cpu)
            if index >= 0:
                timings[name].append(timing)
    for name, runs in timings.items():
        console.print(f"{title}: {name} {median_wall(runs) * 1e3:.1f} ms (cpu {median_cpu(runs) * 1e3:.1f})")
    return timings


def cores_of_others(seconds: float = 2.0) -> float | None:
    """Processor cores that other processes keep busy now: what is measured next to them is not worth much.

    None where the system does not tell.
    """
    if not Path("/proc/stat").exists():
        return None

    def busy() -> float:
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for disks

    before = busy()
    time.sleep(seconds)
    return round((busy() - before) / seconds, 2)


def median_wall(runs: list[Timing]) -> float:
    return statistics.median(run.wall for run in runs)


def median_cpu(runs: list[Timing]) -> float:
    return statistics.median(run.cpu for run in runs)


def ratios(slow: list[Timing], fast: list[Timing]) -> dict[str, float]:
    """Medians over rounds of the ratio within a round: neighbours in time are compared with each other."""
    rounds = list(zip(slow, fast, strict=True))
    return {
        "wall": statistics.median(a.wall / b.wall for a, b in rounds),
        "cpu": statistics.median(a.cpu / b.cpu for a, b in rounds),
    }


def peak_memory(script: str, *arguments: str) -> float:
    """MiB above start that `script *arguments` prints, in a fresh process (see `peak_above_start`)."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def peak_above_start(run: Callable[[], object]) -> float:
    """MiB by which `run` raises the peak of this process's resident memory over what is resident now."""
    start = resident("VmRSS")
    run()
    return (resident("VmHWM") - start) / MIB


def run_folder(text: str) -> Path:
    """The type of a --run argument."""
    if not (Path(text) / "head").is_dir():
        raise argparse.ArgumentTypeError(f"{text}: expected the folder of a finished run, with head/ in it")
    return Path(text)


def prompts_to_halve(text: str) -> int:
    """The type of a --prompts argument where one half is fitted on and the other priced."""
    if not text.isdigit() or not 2 <= int(text) <= 200:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 2 to 200, one half to fit on, one to price")
    return int(text)


@contextmanager
def told_by(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Bad input ends the script in the parser's one line."""
    try:
        yield
    except InputError as error:
        parser.error(str(error))


def write_record(name: str, results: Mapping[str, Any], threads: int, folder: Path = RECORDS) -> Path:
    """Write benchmarks/records/NAME.json, under a temporary name first."""
    changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    record = {
        "argv": [f"benchmarks/{Path(sys.argv[0]).name}", *without_paths(sys.argv[1:])],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "versions": {"python": platform.python_version()} | {x: version(x) for x in ("torch", "transformers")},
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads_used": threads},
        "load_average": [round(load, 1) for load in os.getloadavg()],  # above threads_used: others were at work
        **results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    path = temporary.replace(folder / f"{name}.json")
    console.print(f"wrote {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return path


def add_head(name: str, run: Path, found: Mapping[str, Any], table: Callable[[str, Any], str]) -> None:
    """Keep what was found of a run's head beside what the record has of others; docs/quality.md shows all of them."""
    path = RECORDS / f"{name}.json"
    heads = json.loads(path.read_text())["heads"] if path.exists() else {}
    heads[run.name] = found
    write_record(name, {"heads": heads}, threads=1)
    renew_readme(name, "\n\n".join(table(*head) for head in heads.items()), "docs/quality.md")
    print(table(run.name, found))


def renew_readme(mark: str, table: str, page: str = "README.md") -> None:
    """Put a table between a page's marks, `<!-- mark ... -->` and `<!-- /mark ... -->`."""
    readme = ROOT / page
    before, opening, rest = readme.read_text().partition(f"<!-- {mark}")
    comment, _, after = rest.partition("-->\n")
    closing = after[after.index(f"<!-- /{mark}") :]
    readme.write_text(f"{before}{opening}{comment}-->\n{table}\n{closing}")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git here: the record says that nothing is known of the tree
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
