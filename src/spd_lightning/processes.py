"""What processes of one job owe each other: a core each, and an end with the one that started them. Imports nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

#: Set for the ranks that `--workers` starts: the process number of who did.
PARENT = "SPD_WORKER"
#: Set for a command that another one runs and ends with; not handed on to what the command starts itself.
OWNER = "SPD_OWNER"
#: Exit status of a rank that ends because another one is gone.
VICTIM = 75


def started_here() -> bool:
    """Whether this process is a rank that `--workers` started, and is watched by who did."""
    return PARENT in os.environ


def die_with_parent() -> None:
    """End when the process that started this one does, if it says so; to be called before anything that takes time.

    Linux alone does it at once. Elsewhere the lost store of the job tells. Where a launcher stands between the two, it
    is the launcher's end that counts.
    """
    parent = os.environ.pop(OWNER, "") or os.environ.get(PARENT, "")
    if not parent.isdigit() or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(parent) and not _alive(int(parent)):  # it ended before this
        os._exit(VICTIM)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def pin(process: int, rank: int, ranks: int) -> None:
    """Give a process (0: this one) its own share of the cores; where there are fewer cores than ranks, none.

    A rank's threads (its work, gloo, verdicts) then never disturb another rank's work. On two idle cores a cycle of
    empty stages takes 8 % less for it (benchmarks/records/pipeline.json).
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // ranks
    if share:
        with contextlib.suppress(OSError):  # a process that is gone already, or a place that forbids it
            os.sched_setaffinity(process, cores[rank * share : (rank + 1) * share])


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def all_cores_are_ours() -> bool:
    """Whether nobody, such as a scheduler, has chosen cores for this process."""
    return hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == os.cpu_count()
