"""What became of the rows of a corpus: how many were kept, left out on purpose, or bad, with examples of the last."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from spd_lightning.errors import InputError

#: Examples kept per reason.
EXAMPLES = 3
#: Rows that must have been read before a run is stopped early for its share of bad ones.
ENOUGH = 1000


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used.

    Attributes:
        reason: the kind of fault; rows are counted by it.
        place: file and line, or data set and row.
        detail: what exactly is wrong with this one.
    """

    reason: str
    place: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}{f' ({self.detail})' if self.detail else ''}"


class BadRowError(Exception):
    """Raised where a fault is found; `at` makes it a `Bad` with its place."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def at(self, place: str) -> Bad:
        return Bad(self.reason, place, self.detail)


@dataclass
class Tally:
    """Counts that add up over chunks, processes and sources.

    Attributes:
        read: rows read.
        kept: conversations that went on.
        bad: unusable rows by reason.
        left_out: usable conversations left out on purpose (duplicates, benchmark prompts, ...) by reason.
        notes: kept conversations by something worth knowing of them.
        examples: the first few bad rows of every reason.
    """

    read: int = 0
    kept: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add_bad(self, bad: Bad) -> None:
        self.bad[bad.reason] += 1
        kept = self.examples.setdefault(bad.reason, [])
        if len(kept) < EXAMPLES:
            kept.append(str(bad))

    def add(self, other: Tally) -> None:
        self.read += other.read
        self.kept += other.kept
        self.bad += other.bad
        self.left_out += other.left_out
        self.notes += other.notes
        for reason, examples in other.examples.items():
            known = self.examples.setdefault(reason, [])
            known += examples[: EXAMPLES - len(known)]

    @property
    def bad_share(self) -> float:
        return sum(self.bad.values()) / self.read if self.read else 0.0

    def check(self, where: str, most: float, flag: str, over: bool = True) -> None:
        """InputError with examples where more than `most` of the rows are bad.

        Args:
            where: what was read, for the message.
            most: the share that is tolerated.
            flag: the field or flag that sets it.
            over: whether everything was read; before that, only a clear case among enough rows counts.
        """
        if self.bad_share <= most or not (over or self.read >= ENOUGH):
            return
        count = sum(self.bad.values())
        reasons = ", ".join(f"{n} x {reason}" for reason, n in self.bad.most_common())
        examples = "; ".join(example for found in self.examples.values() for example in found[:1])
        raise InputError(
            f"{where}: {count} of {self.read} rows are bad ({self.bad_share:.1%}, {flag} allows {most:.1%}): {reasons}."
            f" For example {examples[:600]}. Mend the data, or raise {flag}."
        )

    def as_dict(self) -> dict[str, Any]:
        """For manifests."""
        return {
            "read": self.read,
            "kept": self.kept,
            "bad": dict(self.bad.most_common()),
            "left_out": dict(self.left_out.most_common()),
            "notes": dict(self.notes.most_common()),
            "examples": self.examples,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Tally:
        counters = {name: Counter(content[name]) for name in ("bad", "left_out", "notes")}
        return cls(content["read"], content["kept"], examples=dict(content["examples"]), **counters)

    def lines(self) -> list[str]:
        """For people."""
        result = [f"{self.read} rows read, {self.kept} conversations kept"]
        result += [f"  left out: {n} x {reason}" for reason, n in self.left_out.most_common()]
        result += [f"  bad: {n} x {reason}, e.g. {self.examples[reason][0]}" for reason, n in self.bad.most_common()]
        result += [f"  note: {n} x {reason}" for reason, n in self.notes.most_common()]
        return result
