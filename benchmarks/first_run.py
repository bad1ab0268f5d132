"""Turn a finished run of `make fit` into the record behind README's table, and print that table.

    python benchmarks/first_run.py runs/tiny            writes benchmarks/records/first_run.json, renews README.md

The record is run.json less what only that machine needs; README's table is generated from it, and a test holds the two
together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from common import renew_readme

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "records" / "first_run.json"


def table(record: dict[str, Any]) -> str:
    """The markdown that stands in README.md."""
    results = record["results"]
    prompts, tokens = results["prompts"], results["max_new_tokens"]
    stages = next(row["num_stages"] for row in results["final"] if row["drafter"] == "trained head")
    lines = [
        f"`make fit` on {record['machine']}: {results['tokens'] / 1e6:.2f} M training tokens in "
        f"{record['seconds']['train and validate']:.0f} s (validations included), then real decoding of {prompts} "
        f"held-out prompts x {tokens} tokens, n = {stages}:",
        "",
        "| drafter | T | acceptance p (95 %) | theoretical speedup S | cycles |",
        "|---|---|---|---|---|",
    ]
    for row in results["final"]:
        if row["drafter"] == "plain":
            continue
        low, high = row["acceptance_interval"]
        name = f"**{row['drafter']}**" if row["drafter"] == "trained head" else row["drafter"]
        lines.append(
            f"| {name} | {row['temperature']:g} | {row['acceptance']:.3f} ({low:.3f} - {high:.3f}) | "
            f"{row['theoretical_speedup']:.2f} | {row['cycles']} |"
        )
    lossless, drift = results["lossless"], results["drift"]
    lines += [
        "",
        f"Lossless: {lossless['identical']} of {prompts} greedy outputs equal plain decoding token for token "
        f"({lossless['ties']} ties, {lossless['mismatches']} mismatches). Drift between decoder and training view: "
        f"{drift['differing_flags']} flags. S counts pipeline cycles: it is what parallel stages gain in theory, not "
        "a wall-clock measurement.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of a finished fit")
    parser.add_argument("--print", action="store_true", help="print the table only, write nothing")
    args = parser.parse_args()
    try:
        record = json.loads((args.run / "run.json").read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{args.run} holds no readable run.json: {error}")
    if record.get("status") != "finished" or "final" not in record.get("results", {}):
        parser.error(f"{args.run} is no finished run with a final evaluation (status {record.get('status')!r})")
    record["machine"] = f"{os.cpu_count()} cores, {_processor()}"
    text = table(record)
    print(text)
    if not args.print:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        temporary = RECORD.with_name(f".{RECORD.name}")
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.replace(RECORD)
        renew_readme("first-run", text)
    return 0


def _processor() -> str:
    """The processor's model name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
