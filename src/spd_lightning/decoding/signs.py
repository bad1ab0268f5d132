"""Signs of life: what every rank of a job says of itself in the job's store, and what can be told from it."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

#: Said instead of a sign by a rank that left in order.
DONE = "done"


class Beats:
    """Signs of life of all ranks in the job's store.

    Args:
        store: of the job.
        world: number of ranks.
        patience: seconds without a sign after which a rank counts as lost.
    """

    def __init__(self, store: Any, world: int, patience: float) -> None:
        self.store, self.world, self.patience = store, world, patience
        self._count = 0
        self._seen: dict[int, tuple[str, float]] = {}
        self._moved: tuple[str, float] = ("", time.monotonic())
        self._looked = time.monotonic()

    def beat(self, rank: int, role: str, state: str) -> None:
        self._count += 1
        self.store.set(f"beat{rank}", json.dumps([self._count, role, state]))

    def done(self, rank: int) -> None:
        with contextlib.suppress(RuntimeError):
            self.store.set(f"beat{rank}", DONE)

    def failed(self, rank: int, why: str) -> None:
        with contextlib.suppress(RuntimeError):
            self.store.set(f"failed{rank}", why)

    def why(self, rank: int) -> str | None:
        """What a rank that failed said."""
        key = f"failed{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else None

    def last(self, rank: int) -> str:
        """The last sign of a rank; empty if it never gave one."""
        key = f"beat{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def missing(self) -> list[int]:
        return [rank for rank in range(self.world) if not self.last(rank)]

    def all_done(self) -> bool:
        return all(self.last(rank) == DONE for rank in range(self.world))

    def name(self, rank: int) -> str:
        """The rank with its stage, as far as it is known."""
        beat = self.last(rank)
        role = "" if beat in ("", DONE) else json.loads(beat)[1]
        return role if role.startswith("rank") else f"rank {rank}" + (f" ({role})" if role else "")

    def lost(self) -> str | None:
        """A line about a rank that gives no sign of life, or about a job that stands still; None while all is well."""
        now, states = time.monotonic(), {}
        if now - self._looked > max(2.0, self.patience / 2):  # who looks was stopped itself, and so were the others
            self._seen, self._moved = {}, ("", now)
        self._looked = now
        for rank in range(self.world):
            beat = self.last(rank)
            before, since = self._seen.get(rank, (None, now))
            if beat != before or beat == DONE:
                self._seen[rank] = (beat, now)
            elif beat and now - since > self.patience:  # who never came is told by those who wait for it
                return (
                    f"{self.name(rank)} gave no sign of life for {self.patience:g} s: it hangs, or its machine is gone"
                )
            if beat and beat != DONE:
                states[rank] = json.loads(beat)[2]
        everything = json.dumps(states)
        if everything != self._moved[0] or not any("cycle" in state for state in states.values()):
            self._moved = (everything, now)
        elif now - self._moved[1] > self.patience:
            rank = min(states, key=lambda rank: ("waits" in states[rank], _cycle(states[rank])))
            return (
                f"{self.name(rank)} stands still for {self.patience:g} s ({states[rank]}); if it only is slow, set "
                "--patience higher or --prefill-chunk lower"
            )
        return None


def _cycle(state: str) -> int:
    """The cycle that a rank says it is in; who is behind holds up the others."""
    words = state.replace(",", " ").split()
    return int(words[1]) if words[:1] == ["cycle"] else 0
