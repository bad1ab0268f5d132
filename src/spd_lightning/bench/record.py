"""From rows to figures: pooled by prompt set and category, with bootstrap intervals; a journal that survives a kill."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from spd_lightning.bench.measure import Row
from spd_lightning.data.journal import Journal, flat, whole_lines
from spd_lightning.errors import InputError

FORMAT = "spd-bench/1"
DRAWS = 2000
#: Why no wall-clock speedup is given by one process.
CLOCK = "one process runs the stages one after another: its seconds are a simulated clock, and no speedup"


def clock(ranks: int) -> str:
    """What the seconds of a record are."""
    if ranks == 1:
        return CLOCK
    return f"{ranks} ranks run the stages at the same time; the baseline runs on the hardware of one rank"


def figures(rows: Sequence[Row], num_stages: int, seed: int, ranks: int = 1) -> list[dict[str, Any]]:
    """One entry per prompt set, category and temperature, sets before their categories; `all` if there are several.

    Wall clock is a figure of several `ranks` only.
    """
    groups: dict[tuple[str, str | None, float], list[Row]] = defaultdict(list)
    several = len({row.prompts for row in rows}) > 1
    for row in rows:
        groups[row.prompts, None, row.temperature].append(row)
        if row.category is not None:
            groups[row.prompts, row.category, row.temperature].append(row)
        if several:
            groups["all", None, row.temperature].append(row)
    ordered = sorted(groups.items(), key=lambda item: (item[0][2], item[0][0], item[0][1] or ""))
    return [
        {"prompts": name, "category": category, "temperature": temperature}
        | _pooled(members, num_stages, seed, parallel=ranks > 1)
        for (name, category, temperature), members in ordered
    ]


def _pooled(rows: Sequence[Row], n: int, seed: int, parallel: bool) -> dict[str, Any]:
    """Ratios of sums, as everywhere; prompts (with all their turns) are what the bootstrap draws."""
    new = sum(row.new_tokens for row in rows)
    verified, accepted = sum(row.drafts_verified for row in rows), sum(row.drafts_accepted for row in rows)
    cycles, decode = sum(row.cycles for row in rows), sum(row.decode_seconds for row in rows)
    plain, plain_decode = sum(row.plain_tokens for row in rows), sum(row.plain_decode_seconds for row in rows)
    after_first = plain - len(rows)
    greedy = [row.lossless for row in rows if row.lossless is not None]
    per_prompt = _by_prompt(rows)
    return {
        "count": len(per_prompt),
        "turns": len(rows),
        "new_tokens": new,
        "cycles": cycles,
        "drafts_verified": verified,
        "drafts_accepted": accepted,
        "acceptance": _ratio(accepted, verified),
        "acceptance_interval": bootstrap(per_prompt, lambda s: (s[:, 3], s[:, 2]), seed),
        "accepted_per_restart": _ratio(accepted, verified - accepted),
        "accepted_per_restart_interval": bootstrap(per_prompt, lambda s: (s[:, 3], s[:, 2] - s[:, 3]), seed),
        "theoretical_speedup": _ratio(n * (new - len(rows)), cycles),
        "theoretical_speedup_interval": bootstrap(per_prompt, lambda s: (n * (s[:, 0] - s[:, 4]), s[:, 1]), seed),
        "equivalent_accept_length": _ratio(n * new, cycles),
        "wall_clock_speedup": _ratio((new - len(rows)) * plain_decode, decode * after_first) if parallel else None,
        "tokens_per_second": _ratio(new - len(rows), decode),
        "seconds_to_first_token": _ratio(sum(row.prefill_seconds for row in rows), len(rows)),
        "plain_tokens_per_second": _ratio(plain - len(rows), plain_decode),
        "plain_seconds_to_first_token": _ratio(sum(row.plain_prefill_seconds for row in rows), len(rows)),
        "identical": greedy.count("identical") if greedy else None,
        "ties": greedy.count("tie") if greedy else None,
        "mismatches": greedy.count("mismatch") if greedy else None,
    }


def row_fields(row: Row, num_stages: int) -> dict[str, Any]:
    """A row as it stands in a record: counts and seconds, and the ratios that people look for."""
    after_first = row.new_tokens - 1
    return asdict(row) | {
        "acceptance": _ratio(row.drafts_accepted, row.drafts_verified),
        "accepted_per_restart": _ratio(row.drafts_accepted, row.drafts_verified - row.drafts_accepted),
        "theoretical_speedup": _ratio(num_stages * after_first, row.cycles),
        "tokens_per_second": _ratio(after_first, row.decode_seconds),
    }


def _by_prompt(rows: Iterable[Row]) -> np.ndarray:
    """[prompts, 5]: new tokens, cycles, verified, accepted, turns."""
    sums: dict[tuple[str, str], np.ndarray] = {}
    for row in rows:
        counts = np.array([row.new_tokens, row.cycles, row.drafts_verified, row.drafts_accepted, 1], float)
        key = (row.prompts, row.key)
        sums[key] = sums[key] + counts if key in sums else counts
    return np.stack(list(sums.values()))


def bootstrap(
    per_prompt: np.ndarray, parts: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], seed: int
) -> tuple[float, float] | None:
    """95 % interval of a pooled ratio over prompts drawn with replacement; None for fewer than two prompts."""
    if len(per_prompt) < 2:
        return None
    picks = np.random.default_rng(seed).integers(0, len(per_prompt), (DRAWS, len(per_prompt)))
    above, below = parts(per_prompt[picks].sum(1))
    values = np.divide(above, below, out=np.full(DRAWS, np.nan), where=below > 0)
    if np.isnan(values).any():  # a draw without any rejection, or without a cycle
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


class Rows:
    """Finished rows beside the record, so that a bench that was stopped goes on where it was.

    The journal's first line says what is measured; rows of anything else are never mixed in, and one process at a
    time writes.

    Raises:
        InputError: another process writes it, it is damaged, or it belongs to another bench; naming what differs.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self._journal = Journal(path)
        self.rows: list[Row] = []
        try:
            entries = [json.loads(line) for _, line in whole_lines(path)]
            if entries:
                _same(path, flat(entries[0]["about"]), flat(json.loads(json.dumps(about))))
                self.rows = [Row(**row) for entry in entries[1:] for row in entry["rows"]]
            else:
                self._journal.append({"about": about})
        except BaseException as error:
            self._journal.close()
            if isinstance(error, (ValueError, KeyError, TypeError)) and not isinstance(error, InputError):
                raise InputError(f"{path} is no journal of a bench: remove it to start anew.") from error
            raise

    def add(self, rows: Sequence[Row]) -> None:
        """Keep the rows of one prompt at one temperature, together or not at all."""
        self._journal.append({"rows": [asdict(row) for row in rows]})
        self.rows += rows

    def done(self) -> set[tuple[str, str, float]]:
        """(prompt set, key, temperature) of what need not be measured again."""
        return {(row.prompts, row.key, row.temperature) for row in self.rows}

    def close(self, remove: bool = False) -> None:
        """Let others write; `remove` the journal too, once the record is there."""
        if remove:
            self._journal.path.unlink(missing_ok=True)
        self._journal.close()
        if remove:
            Path(f"{self._journal.path}.lock").unlink(missing_ok=True)


def _same(path: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    names = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
    if names:
        differs = [f"{name} was {str(known.get(name))[:60]}, now {str(wanted.get(name))[:60]}" for name in names]
        raise InputError(
            f"{path} is the journal of another bench: {'; '.join(differs)[:600]}. Give the same again, another "
            "--output, or remove the journal."
        )


def markdown(metrics: Sequence[Mapping[str, Any]], head: str, num_stages: int) -> str:
    """A table for a README: one row per prompt set and category."""
    lines = [
        f"| {head}, n = {num_stages} | prompts | T | p (95 %) | A | S (95 %) | equivalent accept length | lossless |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in metrics:
        name = row["prompts"] if row["category"] is None else f"- {row['category']}"
        checked = row["turns"] if row["identical"] is not None else None
        lossless = "-" if checked is None else f"{row['identical']} of {checked}, {row['ties']} ties"
        lines.append(
            f"| {name} | {row['count']} | {row['temperature']:g} | {_with(row, 'acceptance', 3)} | "
            f"{_number(row['accepted_per_restart'], 2)} | {_with(row, 'theoretical_speedup', 2)} | "
            f"{_number(row['equivalent_accept_length'], 2)} | {lossless} |"
        )
    return "\n".join(lines) + "\n"


def _with(row: Mapping[str, Any], name: str, digits: int) -> str:
    interval = row[f"{name}_interval"]
    text = _number(row[name], digits)
    return text if interval is None else f"{text} ({interval[0]:.{digits}f} - {interval[1]:.{digits}f})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
