"""Stands in for fit in tests of sweeps: logs a metric as fit does, goes on after a kill, fails when told to."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from spd_lightning.processes import die_with_parent

die_with_parent()
given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
folder = Path(given["run_dir"])
folder.mkdir(parents=True, exist_ok=True)
x, steps = float(given["x"]), int(given.get("steps", 3))
if given.get("mode") == "bad":
    sys.exit("error: x=bad: expected something else")
metrics = folder / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
with (folder / "starts").open("a") as file:
    file.write(f"{done}\n")
for step in range(done, steps):
    time.sleep(float(given.get("seconds", 0)))
    score = (1 - (x - 0.3) ** 2) * (step + 1) / steps if given.get("mode") != "nan" else float("nan")
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step, "val/score": score}) + "\n")
    if given.get("mode") == "always killed" or (given.get("mode") == "killed" and done == 0):
        os.kill(os.getpid(), signal.SIGKILL)
