"""What a generation returns, and the statistics that are pooled over prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from spd_lightning.staircase import theoretical_speedup


@dataclass(frozen=True)
class Generation:
    """One decoded continuation.

    Attributes:
        token_ids: new tokens only, the end-of-sequence token included.
        prompt_length: tokens of the prompt; the first new token has this position.
        num_stages: n of the pipeline that decoded it (1 for autoregressive decoding).
        cycles: pipeline cycles after prefill; for autoregressive decoding full target passes.
        drafts_verified: drafts that met the target's verdict (flushed drafts and the first token are none).
        drafts_accepted: how many of them were kept.
        restart_positions: absolute positions whose token came from the target, the first generated token first.
        prefill_seconds: prompt through target and head, up to the first token.
        decode_seconds: everything after it.
        widths: in a draft tree, the cycles whose widest stage pass had 1, 2, ... rows; empty: all passes have one.
        ranks: processes that ran the stages at the same time; 1: one after another, and seconds are a simulated clock.
    """

    token_ids: list[int]
    prompt_length: int
    num_stages: int
    cycles: int
    drafts_verified: int
    drafts_accepted: int
    restart_positions: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    widths: tuple[int, ...] = ()
    ranks: int = 1

    @property
    def acceptance(self) -> float | None:
        """p = accepted / verified drafts; None where nothing was verified."""
        return self.drafts_accepted / self.drafts_verified if self.drafts_verified else None

    @property
    def theoretical_speedup(self) -> float | None:
        """S = n (new tokens - 1) / cycles; None where no cycle ran."""
        return theoretical_speedup(self.num_stages, len(self.token_ids), self.cycles)

    @property
    def rows(self) -> float:
        """Of a cycle's widest stage pass, on average over cycles: a cycle lasts as long as its slowest stage."""
        return self.cycle_cost(range(1, max(1, len(self.widths)) + 1))

    def cycle_cost(self, costs: Sequence[float]) -> float:
        """Mean length of a cycle where a pass of r rows takes costs[r - 1]; costs[0] where all passes have one row."""
        counted = zip(self.widths, costs, strict=False)
        return sum(count * cost for count, cost in counted) / self.cycles if any(self.widths) else costs[0]

    def row_charged_speedup(self, costs: Sequence[float]) -> float | None:
        """S where a pass of r rows, and with it a cycle, takes costs[r - 1] times as long as one of a single row."""
        free = self.theoretical_speedup
        return None if free is None else free / self.cycle_cost(costs)

    @property
    def accepted_flags(self) -> list[bool]:
        """For every new token after the first: was it an accepted draft (True) or the target's correction (False)?"""
        restarts = set(self.restart_positions)
        return [self.prompt_length + index not in restarts for index in range(1, len(self.token_ids))]


@dataclass(frozen=True)
class Pooled:
    """Sums over generations; ratios are taken last (a mean of ratios would weigh short answers too much)."""

    num_stages: int
    generations: int
    new_tokens: int
    cycles: int
    drafts_verified: int
    drafts_accepted: int
    prefill_seconds: float
    decode_seconds: float

    @classmethod
    def of(cls, generations: Iterable[Generation], num_stages: int) -> Pooled:
        items = list(generations)
        return cls(
            num_stages=num_stages,
            generations=len(items),
            new_tokens=sum(len(g.token_ids) for g in items),
            cycles=sum(g.cycles for g in items),
            drafts_verified=sum(g.drafts_verified for g in items),
            drafts_accepted=sum(g.drafts_accepted for g in items),
            prefill_seconds=sum(g.prefill_seconds for g in items),
            decode_seconds=sum(g.decode_seconds for g in items),
        )

    @property
    def acceptance(self) -> float | None:
        return self.drafts_accepted / self.drafts_verified if self.drafts_verified else None

    @property
    def theoretical_speedup(self) -> float | None:
        return self.num_stages * (self.new_tokens - self.generations) / self.cycles if self.cycles else None

    @property
    def accepted_per_restart(self) -> float | None:
        """A, the mean number of accepted drafts between restarts: accepted / rejected."""
        rejected = self.drafts_verified - self.drafts_accepted
        return self.drafts_accepted / rejected if rejected else None
