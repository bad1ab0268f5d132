"""The staircase: every integer of Speculative Pipeline Decoding, and no tensor.

Training masks, decoders, benchmarks and plots all import this module; nobody else computes a depth.

A frozen target of L decoder layers is cut into n stages; stage s holds layers [l_s, l_{s+1}). A position T enters
stage 1 in its *entry cycle* e(T) and finishes one stage per cycle, so at the start of cycle c its *depth* is
min(n, c - e(T)) and the hidden states h_0 .. h_{l_depth} of it exist. The head reads the states at a few *anchors*
b_0 < ... < b_{m-1}; the deepest anchor available at depth d is the *block* f(d). Row (k, T), the aggregated feature of
position T in block k, is computed once: in cycle e(T) + d_min(k), when T first reaches that block. In that cycle
position T' <= T shows the row of block f(min(n, d_min(k) + e(T) - e(T'))), which is all the mask there is. It depends
on entry cycles of positions <= T alone, so nothing that happens later can change a row.

Everything is written in entry cycles (or in *gaps*, their differences), never in "positions since the restart": a
decoder that re-drafts early has gaps between 1 and n and needs no new rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from spd_lightning.errors import InputError


def even_stage_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Number of layers per stage, as even as possible: stage s ends at layer ceil((s + 1) L / n).

    The last stage never gets an extra layer, because it also runs the final norm, the lm_head and the verification.
    With more stages than layers some stages only pass their token on (`empty_stages` tells): everything stays exact,
    but a cycle still lasts as long as a layer, so S counts more than a clock would.

    Raises:
        InputError: unless 2 <= num_stages <= 2 * num_layers.
    """
    if type(num_stages) is not int or not 2 <= num_stages <= 2 * num_layers:
        raise InputError(
            f"num_stages={num_stages!r} does not fit a target of {num_layers} layers: expected 2 <= num_stages <= "
            f"{2 * num_layers}. Set num_stages (or stage_layers)."
        )
    boundaries = [-(-stage * num_layers // num_stages) for stage in range(num_stages + 1)]
    return tuple(stop - start for start, stop in pairwise(boundaries))


def resolve_stage_layers(
    num_layers: int, num_stages: int | None = None, stage_layers: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The split that a user asked for by `num_stages`, by `stage_layers`, or by both if they agree."""
    if stage_layers is None:
        if num_stages is None:
            raise InputError("Set num_stages (an even split) or stage_layers (layers per stage).")
        return even_stage_layers(num_layers, num_stages)
    if isinstance(stage_layers, str) or not isinstance(stage_layers, Sequence):
        raise InputError(f"stage_layers={stage_layers!r}: expected a list of layers per stage, such as [8, 8, 8, 8].")
    if any(isinstance(count, str) or int(count) != count for count in stage_layers):
        raise InputError(f"stage_layers={list(stage_layers)}: expected whole numbers of layers.")
    layers = tuple(int(count) for count in stage_layers)
    wrong = None
    if len(layers) < 2:
        wrong = "expected at least two stages"
    elif min(layers) < 0:
        wrong = "expected no negative number"
    elif sum(layers) != num_layers:
        wrong = f"expected a sum of {num_layers}, but the sum is {sum(layers)}"
    if wrong:
        raise InputError(
            f"stage_layers={list(layers)} does not fit a target of {num_layers} layers: {wrong}. Set stage_layers."
        )
    if num_stages is not None and num_stages != len(layers):
        raise InputError(
            f"num_stages={num_stages} contradicts stage_layers={list(layers)}, which has {len(layers)} stages. "
            "Set only one of them."
        )
    return layers


def empty_stages(stage_layers: Sequence[int]) -> str | None:
    """What to tell a user whose split has stages without layers; None where it has none."""
    empty = sum(1 for count in stage_layers if not count)
    if not empty:
        return None
    return (
        f"{empty} of the {len(stage_layers)} stages {list(stage_layers)} hold no layer: they cost a cycle and share no "
        f"work, so no clock can gain more than {sum(stage_layers)} x, whatever S says."
    )


def default_anchors(stage_layers: Sequence[int]) -> tuple[int, ...]:
    """Anchors at stage boundaries, so that every block is reachable for any split.

    n <= 4: one anchor per depth. Larger n: the depths 0, n/8, 3n/8, 6n/8 and n, dense where a token has just entered
    and features change most from stage to stage (n=8, 32 layers: 0, 4, 12, 24, 32).
    """
    boundaries = (0, *accumulate(stage_layers))
    n = len(stage_layers)
    depths = range(n + 1) if n <= 4 else (0, max(1, n // 8), 3 * n // 8, 6 * n // 8, n)
    return tuple(sorted({boundaries[depth] for depth in depths}))


@dataclass(frozen=True)
class Staircase:
    """Stages, anchors and the rule which row sees which.

    Attributes:
        stage_layers: layers per stage, shallow to deep; n = len(stage_layers), L = sum(stage_layers).
        anchors: hidden-state indices the head may read, 0 = b_0 < b_1 < ... <= L.
    """

    stage_layers: tuple[int, ...]
    anchors: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage_layers", tuple(int(x) for x in self.stage_layers))
        object.__setattr__(self, "anchors", tuple(int(x) for x in self.anchors))
        resolve_stage_layers(sum(self.stage_layers), stage_layers=self.stage_layers)
        ordered = all(a < b for a, b in pairwise(self.anchors))
        if not self.anchors or self.anchors[0] != 0 or not ordered or self.anchors[-1] > self.num_layers:
            raise InputError(
                f"anchors={list(self.anchors)} are not valid: expected strictly increasing hidden-state indices that "
                f"start at 0 (the embedding output) and end at most at {self.num_layers} (the last layer). Set anchors."
            )

    @property
    def num_stages(self) -> int:
        return len(self.stage_layers)

    @property
    def num_layers(self) -> int:
        return sum(self.stage_layers)

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """l_0 = 0 .. l_n = L: a token of depth d has the hidden states h_0 .. h_{l_d}."""
        return (0, *accumulate(self.stage_layers))

    @cached_property
    def block_of_depth(self) -> tuple[int, ...]:
        """f(d) for d = 0..n: the index of the deepest anchor that exists at depth d."""
        return tuple(
            max(k for k, anchor in enumerate(self.anchors) if anchor <= boundary) for boundary in self.boundaries
        )

    @cached_property
    def reachable_blocks(self) -> tuple[int, ...]:
        """Blocks that some depth maps to. The others have no rows; their anchors only feed deeper blocks."""
        return tuple(sorted(set(self.block_of_depth)))

    @cached_property
    def unreachable_blocks(self) -> tuple[int, ...]:
        return tuple(k for k in range(len(self.anchors)) if k not in self.reachable_blocks)

    @cached_property
    def first_depths(self) -> tuple[int, ...]:
        """d_min of every reachable block, in the order of `reachable_blocks`."""
        return tuple(self.block_of_depth.index(k) for k in self.reachable_blocks)

    @cached_property
    def windows(self) -> tuple[int, ...]:
        """w = n - d_min per reachable block: positions at least w back show their deepest row to it."""
        return tuple(self.num_stages - depth for depth in self.first_depths)

    @cached_property
    def shown(self) -> tuple[tuple[int, ...], ...]:
        """shown[r][elapsed]: the row that T' shows to row r of T, with elapsed = min(n, e(T) - e(T')).

        Both r and the value count REACHABLE blocks (0 .. len(reachable_blocks) - 1), the order in which training lays
        rows side by side.
        """
        index = {block: r for r, block in enumerate(self.reachable_blocks)}
        n = self.num_stages
        return tuple(
            tuple(index[self.block_of_depth[min(n, depth + elapsed)]] for elapsed in range(n + 1))
            for depth in self.first_depths
        )

    @cached_property
    def anchors_of_stages(self) -> tuple[tuple[int, ...], ...]:
        """Per stage, the anchors that its layers produce; h_0, the embedding, belongs to none."""
        return tuple(
            tuple(anchor for anchor in self.anchors if start < anchor <= stop)
            for start, stop in pairwise(self.boundaries)
        )

    def visible_block(self, block: int, elapsed: int) -> int:
        """The block through which T' is seen by row (block, T), elapsed = e(T) - e(T') >= 0 cycles apart."""
        depth = self.first_depths[self.reachable_blocks.index(block)]
        return self.block_of_depth[min(self.num_stages, depth + elapsed)]


def gaps_from_restarts(length: int, restarts: Iterable[int], num_stages: int) -> list[int]:
    """Gaps e(T) - e(T-1) of `length` positions: n at restart positions, 1 elsewhere."""
    marked = set(restarts)
    outside = [position for position in marked if not 0 <= position < length]
    if outside:
        raise InputError(f"restart positions {sorted(outside)} lie outside the sequence of {length} tokens.")
    return [num_stages if position in marked else 1 for position in range(length)]


def entry_cycles(gaps: Sequence[int]) -> list[int]:
    """Entry cycles of positions 0, 1, ... from their gaps, counted from the entry of position 0 (whose gap is moot)."""
    if any(gap < 1 for gap in gaps[1:]):
        raise InputError(f"gaps must be at least 1 (one token enters per cycle), got {min(gaps[1:])}.")
    return [0, *accumulate(gaps[1:])] if gaps else []


def fills(entries: Sequence[int], num_stages: int) -> list[int]:
    """Tokens in flight, 1..n, with position t the newest: positions T <= t that entered less than n cycles before."""
    result, oldest = [], 0
    for newest, entered in enumerate(entries):
        while entered - entries[oldest] >= num_stages:
            oldest += 1
        result.append(newest - oldest + 1)
    return result


def count_cycles(new_tokens: int, restart_positions: Sequence[int], first_position: int, num_stages: int) -> int:
    """Cycles of a generation by definition: r + n - 1 for each start that is followed by r >= 1 more tokens.

    A start is the first token or a restart; r counts the tokens after it up to and including the next start (the
    correction that ends a run is paid for by that run). `restart_positions` are absolute, the first token included.
    """
    ends = [*restart_positions[1:], first_position + new_tokens - 1]
    runs = [end - start for start, end in zip(restart_positions, ends, strict=True)]
    return sum(run + num_stages - 1 for run in runs if run >= 1)


def theoretical_speedup(num_stages: int, new_tokens: int, cycles: int) -> float | None:
    """S = n (new_tokens - 1) / cycles: tokens per full target pass; None where nothing was decoded after the first."""
    return num_stages * (new_tokens - 1) / cycles if cycles else None


def long_run_speedup(num_stages: int, acceptance: float) -> float:
    """S of an endless generation at constant acceptance p: n / (1 + (n - 1)(1 - p))."""
    return num_stages / (1 + (num_stages - 1) * (1 - acceptance))
