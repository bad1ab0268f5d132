"""Where something that this package wrote comes from: command, date, commit, versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "lightning", "transformers", "datasets", "spd_lightning")


def provenance(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """argv, date, commit and versions of this process, for a record."""
    return {"argv": command_line(), "date": now(), "commit": commit(), "versions": versions(packages)}


def command_line() -> list[str]:
    """The command as it was typed."""
    return ["spd-lightning", *sys.argv[1:]]


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    """Commit of the source tree, `+` appended if it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parent
    options: dict[str, Any] = {"cwd": root, "capture_output": True, "text": True, "timeout": 10}
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], **options)
        dirty = subprocess.run(["git", "status", "--porcelain"], **options)
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], **options)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode or tracked.returncode:  # installed into an environment that lies in somebody's repository
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """Processor, cores and GPU; no host name and no path."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed, and the number of cores."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):  # a source tree on the path need not be installed
            found[name] = version(name)
    return {"python": platform.python_version(), "cores": str(os.cpu_count()), **found}
