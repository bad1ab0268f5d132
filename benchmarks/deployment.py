"""What it costs to load and run an exported head where nothing of training is installed.

    python benchmarks/deployment.py runs/tiny            writes benchmarks/records/deployment.json (some minutes)

Exports the run, makes a virtual environment with the package and its core dependencies alone (at the pins of
constraints.txt), and there, in fresh processes side by side, takes time and peak resident memory of: importing torch,
importing transformers' model loader, importing spd_lightning, loading the head, and decoding with it. Then the commands
generate and bench are run in it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, console, renew_readme, write_record

TRAINING = ("lightning", "deepspeed", "wandb", "datasets", "omegaconf", "matplotlib")
CASES = {
    "import torch": "import torch",
    "import transformers' model loader": "import torch; from transformers import AutoModelForCausalLM",
    "import spd_lightning": "import spd_lightning",
    "load_head": "from spd_lightning import load_head; load_head({head!r})",
    "load target and head, decode 16 tokens": (
        "from spd_lightning import *; t = load_target('tiny'); "
        "SpdDecoder(t, load_head({head!r}, t)).generate([1, 2, 3], 16)"
    ),
}
MEASURE = """
import time
began = time.perf_counter()
{code}
seconds = time.perf_counter() - began
status = open("/proc/self/status").read()  # getrusage would tell the peak of the process that started this one
print(seconds, int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""


def table(record: dict[str, Any]) -> str:
    """The markdown that stands in README.md."""
    lines = [
        f"In such an environment ({record['installed']['packages']} packages, {record['machine']['processor']}, one "
        "thread; medians of fresh processes side by side):",
        "",
        "| process | seconds | over importing torch | peak memory, MiB |",
        "|---|---|---|---|",
    ]
    for name, case in record["cases"].items():
        lines.append(
            f"| {name} | {case['seconds']:.2f} | {case['seconds_over_import_torch']:.2f}x | {case['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of the tiny recipe, or its head")
    parser.add_argument("--environment", type=Path, help="where to make, or find, the virtual environment")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = options.environment or Path(folder) / "environment"
        python = fresh_environment(environment.resolve())
        head = Path(folder) / "head"
        export = ["-m", "spd_lightning", "export", "--checkpoint", str(options.run.resolve()), "--output", str(head)]
        subprocess.run([sys.executable, *export], check=True, stdout=subprocess.DEVNULL)
        results = {
            "installed": packages(python),
            "cases": measure(python, str(head), options.repeats),
            "commands": commands(python, head, Path(folder)),
        }
    path = write_record("deployment", results, threads=1)
    renew_readme("deployment", table(json.loads(path.read_text())))
    return 0


def fresh_environment(folder: Path) -> Path:
    """Python of an environment with core dependencies only."""
    python = folder / "bin" / "python"
    if not python.exists():
        console.print(f"installing into {folder.name}")
        pins = ROOT / "constraints.txt"
        pinned = re.search(r"^torch==(\S+)", pins.read_text(), re.MULTILINE)
        assert pinned is not None
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(pins)]
        subprocess.run([*install, f"torch=={pinned[1]}+cpu"], check=True)
        subprocess.run([*install, str(ROOT)], check=True)
    return python


def packages(python: Path) -> dict[str, Any]:
    """How many there are, and that those of training are not among them."""
    code = "import json, importlib.metadata as m; print(json.dumps(sorted({d.name for d in m.distributions()})))"
    names = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    found = [name for name in names if name in TRAINING]
    assert not found, f"the environment is not fresh: {found}"
    return {"packages": len(names), "of_training": found}


def measure(python: Path, head: str, repeats: int) -> dict[str, Any]:
    """Medians over fresh processes, the cases one after another in every round; the first round warms the disk."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for index in range(-1, repeats):
        for name, code in CASES.items():
            script = MEASURE.format(code=code.format(head=head))
            done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True, env=quiet())
            seconds, peak = map(float, done.stdout.split())
            if index >= 0:
                seen[name].append((seconds, peak))
    base = seen["import torch"]
    results = {}
    for name, runs in seen.items():
        results[name] = {
            "seconds": round(statistics.median(run[0] for run in runs), 3),
            "peak_mib": round(statistics.median(run[1] for run in runs), 1),
            "seconds_over_import_torch": round(
                statistics.median(a[0] / b[0] for a, b in zip(runs, base, strict=True)), 3
            ),
            "runs": [[round(a, 3), round(b, 1)] for a, b in runs],
        }
        console.print(f"{name}: {results[name]['seconds']} s, peak {results[name]['peak_mib']} MiB")
    return results


def commands(python: Path, head: Path, folder: Path) -> dict[str, Any]:
    """README's lines for a deployed head, in that environment."""
    (folder / "asked.txt").write_text("What does `join` of the module posixpath do?\nWhat is itertools for?\n")
    program = [str(python.with_name("spd-lightning"))]
    models = ["--target", "tiny", "--head", str(head)]
    lines = {
        "generate": [*program, "generate", *models, "--prompt", "What does os.path.join do?", "--baseline"],
        "bench": [*program, "bench", *models, "--prompts", "asked.txt", "--output", "bench.json"],
    }
    results = {}
    for name, line in lines.items():
        done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env=quiet())
        assert done.returncode == 0, done.stderr
        results[name] = {"exit": done.returncode}
    results["generate"]["identical"] = "identical output" in done_text(lines["generate"], folder)
    results["bench"] |= {"metrics": json.loads((folder / "bench.json").read_text())["metrics"][0]}
    return results


def done_text(line: list[str], folder: Path) -> str:
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env=quiet())
    return done.stdout + done.stderr


def quiet() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}


if __name__ == "__main__":
    sys.exit(main())
