"""Progress of anything long: a bar with a rate and the time that is left, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with what is done so far and the total, where that is known.
Progress = Callable[[int, "int | None"], None]


#: Seconds between the lines that a log gets in place of a bar.
LOG_INTERVAL = 30.0


@contextmanager
def progress_bar(description: str, unit: str = "rows") -> Iterator[Progress]:
    """A bar on stderr from the first call to the end of the work; in a log, a line now and then."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(description, unit)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.{0 if speed >= 10 else 1}f} {unit}/s", style="cyan")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        task = None

        def update(done: int, total: int | None) -> None:
            nonlocal task
            if task is None:
                task = bars.add_task(description, total=total)
            bars.update(task, completed=done, total=total)

        yield update


def _lines(description: str, unit: str) -> Progress:
    began = last = time.monotonic()

    def update(done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LOG_INTERVAL:
            last, rate = now, done / (now - began)
            left = f" of {total:,}, {(total - done) / rate:,.0f} s left" if total is not None and rate else ""
            print(f"{description}: {done:,}{left} ({rate:,.0f} {unit}/s)", file=sys.stderr, flush=True)

    return update
