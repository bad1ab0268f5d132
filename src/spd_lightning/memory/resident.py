"""Memory of this process as the system counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def resident(field: str = "VmHWM") -> int:
    """Bytes of a field of /proc/self/status: VmRSS now, VmHWM at most; elsewhere the peak from getrusage.

    VmHWM belongs to this program. ru_maxrss does not: it is inherited from the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
