"""The record of a local sweep: trials, what they reached, which fields mattered, and the time it took.

.venv/bin/spd-lightning sweep tiny_training --local --trials 14
.venv/bin/python benchmarks/sweep_tiny.py sweeps/tiny_training     writes records/sweep_tiny.json, renews the docs
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from common import ROOT, renew_readme, write_record

from spd_lightning.commands.sweep import markdown as table


def markdown(found: dict[str, Any]) -> str:
    rows = found["trials"]
    ended = {state: sum(row["state"] == state for row in rows) for state in ("complete", "pruned", "failed")}
    minutes = sum(row["seconds"] for row in rows) / 60
    best, usual = rows[0], found["recipe"]
    lines = [
        f"`sweep {found['sweep']} --local` on 2 cores: {len(rows)} trials in {minutes:.0f} minutes of trials, "
        f"{ended['complete']} finished, {ended['pruned']} ended early, {ended['failed']} failed. Best "
        f"{found['metric']} {best['value']:.3f}.",
        "",
        table({**found, "trials": rows}).rstrip(),
        "",
        "![Trials of the sweep, and which fields mattered](pictures/sweep_tiny.png)",
    ]
    if usual:
        lines += ["", usual]
    return "\n".join(lines)


def main() -> int:
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "results.json").is_file():
        print("give the folder of a sweep that has results: sweeps/tiny_training", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    found = json.loads((folder / "results.json").read_text()) | {"recipe": " ".join(sys.argv[2:])}
    shutil.copy(folder / "sweep.png", ROOT / "docs" / "pictures" / "sweep_tiny.png")
    write_record("sweep_tiny", {"results": found}, threads=2)
    renew_readme("sweep", markdown(found), "docs/tracking.md")
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
