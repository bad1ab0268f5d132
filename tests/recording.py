"""A record of the whole test run, for `make test-all`: SPD_TEST_RECORD names the file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

_BEGAN = time.time()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Date, commit, machine and counts; a run that failed is recorded as it is."""
    path = os.environ.get("SPD_TEST_RECORD")
    if not path or hasattr(config, "workerinput"):
        return
    from spd_lightning.provenance import commit, machine, now, versions

    kinds = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
    counts = {kind: len(terminalreporter.stats.get(kind, [])) for kind in kinds}
    slow = [r for r in terminalreporter.stats.get("passed", []) if "slow" in r.keywords]
    record = {
        "argv": ["pytest", *config.invocation_params.args],
        "date": now(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "exit_status": int(exitstatus),
        "minutes": round((time.time() - _BEGAN) / 60, 1),
        "counts": counts,
        "slow_passed": len(slow),
        "slowest": {r.nodeid: round(r.duration, 1) for r in sorted(slow, key=lambda r: -r.duration)[:12]},
        "not_passed": [r.nodeid for kind in ("failed", "error") for r in terminalreporter.stats.get(kind, [])],
    }
    Path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
