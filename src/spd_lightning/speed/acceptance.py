"""What a plan knows of acceptance: numbers that are given, or what runs measured; and what follows for other n."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spd_lightning.errors import InputError
from spd_lightning.speed.model import rescaled


@dataclass(frozen=True)
class Acceptance:
    """Acceptance by fill of some numbers of stages, and what is assumed for the others.

    Attributes:
        known: n -> acceptance of drafts made with 1, 2, ..., n tokens in flight. Under None: of every n; the last
            entry holds for all fuller pipelines.
        origin: where it comes from, for people.
    """

    known: Mapping[int | None, tuple[float, ...]]
    origin: str

    def of(self, num_stages: int) -> tuple[float, ...]:
        """Acceptance by fill at n: as known; else between the two nearest known n, by log n; else as the nearest."""
        if None in self.known:
            return self.known[None]
        known = sorted((n, values) for n, values in self.known.items() if n is not None)
        below = [item for item in known if item[0] <= num_stages]
        above = [item for item in known if item[0] >= num_stages]
        low, high = (below or above)[-1 if below else 0], (above or below)[0 if above else -1]
        a, b = (rescaled(values, num_stages) for _, values in (low, high))
        share = math.log(num_stages / low[0]) / math.log(high[0] / low[0]) if low[0] != high[0] else 0.0
        return tuple((1 - share) * x + share * y for x, y in zip(a, b, strict=True))

    def assumed(self, num_stages: int) -> bool:
        """Whether nothing was measured or given for this n itself."""
        return None not in self.known and num_stages not in self.known


def given(words: Sequence[str], flag: str = "--acceptance") -> Acceptance:
    """Of words such as 0.8 (constant, every n) or 4:0.83 8:0.81 (per n) or 8:0.9,0.85,0.8 (by fill).

    Raises:
        InputError: naming the word.
    """
    known: dict[int | None, tuple[float, ...]] = {}
    for word in words:
        found = re.fullmatch(r"(?:(\d+):)?((?:0|1|0?\.\d+|1\.0+)(?:,(?:0|1|0?\.\d+|1\.0+))*)", word)
        n = int(found[1]) if found and found[1] else None
        if found is None or n in known or (n is not None and n < 2):
            raise InputError(f"{flag} {word}: expected shares of accepted drafts such as 0.8, or 4:0.83 8:0.81 per n.")
        shares = tuple(float(part) for part in found[2].split(","))
        if n is not None and len(shares) > n:
            raise InputError(f"{flag} {word}: {len(shares)} shares, but no more than {n} tokens are in flight.")
        known[n] = shares if n is None else shares + shares[-1:] * (n - len(shares))
    if None in known and len(known) > 1:
        raise InputError(f"{flag} {' '.join(words)}: expected one share for every n, or n:share for each word.")
    return Acceptance(known, "given")


def of_runs(folders: Sequence[Path], flag: str = "--run") -> Acceptance:
    """As greedy decoding at the end of runs measured it.

    Raises:
        InputError: a folder holds no finished run, or two have the same number of stages.
    """
    known: dict[int | None, tuple[float, ...]] = {}
    for folder in folders:
        try:
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            final = record["results"]["final"]
            row = next(row for row in final if row["drafter"] == "trained head" and row["temperature"] == 0)
        except (OSError, ValueError, KeyError, StopIteration) as error:
            raise InputError(
                f"{flag} {folder}: no run whose final decoding at temperature 0 is finished is there. Give a run "
                "directory of fit, or --acceptance."
            ) from error
        n, p = row["num_stages"], row["acceptance"]
        if n in known:
            raise InputError(f"{flag} {folder}: another run has {n} stages too.")
        by_fill = {entry["fill"]: entry["top1"] for entry in row["by_fill"]}
        known[n] = tuple(by_fill.get(fill, p) for fill in range(1, n + 1))
    return Acceptance(known, "measured by " + ", ".join(folder.name for folder in folders))
