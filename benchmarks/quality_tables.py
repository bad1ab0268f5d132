"""What quality.py makes of the counts of its heads: ratios of rejection rates, their intervals, tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from spd_lightning.decoding.generation import Generation

NEW = 64  # tokens of every generation


def counts_of_generations(made: Sequence[Generation]) -> list[list[int]]:
    """[prompts, 4]: accepted and verified drafts, tokens, cycles."""
    return [[g.drafts_accepted, g.drafts_verified, len(g.token_ids), g.cycles] for g in made]


def counts_of(judged: dict[str, Any]) -> np.ndarray:
    """[prompts, 4] of what a record holds of a prompt set."""
    return np.array([[int(count) for count in word.split("/")] for word in judged["counts"].split()])


def pooled(counts: np.ndarray, n: int) -> dict[str, float]:
    """p and S of counts [..., 4], summed over all but the last dimension."""
    accepted, verified, tokens, cycles = counts.reshape(-1, 4).sum(0)
    return {"p": accepted / verified, "S": n * (tokens - len(counts.reshape(-1, 4))) / cycles}


def rejection_ratio(ours: np.ndarray, theirs: np.ndarray, draws: int = 4000) -> tuple[float, float, float]:
    """(1 - p) over the baseline's (1 - p), counts [seeds, prompts, 4]; with the 95 % interval.

    What chance there is in the prompts is seen by drawing them with replacement, the same for both sides; what there is
    in the seeds, from how far a side's seeds are apart, by Student's t for so few. A side of one seed says nothing of
    others: its interval is over prompts.
    """
    random = np.random.default_rng(0)

    def rejected(counts: np.ndarray) -> np.ndarray:
        """Logarithms, by seed."""
        accepted, verified = np.moveaxis(counts[..., :2].sum(1), -1, 0)
        return np.log(1 - accepted / verified)

    def redrawn() -> float:
        prompts = random.integers(0, ours.shape[1], ours.shape[1])
        return float(rejected(ours[:, prompts]).mean() - rejected(theirs[:, prompts]).mean())

    sides = [rejected(ours), rejected(theirs)]
    several = [seeds for seeds in sides if len(seeds) > 1]
    of_seeds = sum(seeds.var(ddof=1) / len(seeds) for seeds in several) ** 0.5
    freedom = sum(len(seeds) - 1 for seeds in several)
    of_prompts = np.std([redrawn() for _ in range(draws)])
    reach = np.hypot(1.96 * of_prompts, student_t.ppf(0.975, freedom) * of_seeds if freedom else 0.0)
    middle = sides[0].mean() - sides[1].mean()
    ratio, low, high = np.exp([middle, middle - reach, middle + reach]).tolist()
    return ratio, low, high


def judged_rows(
    rows: list[dict[str, Any]], stages: dict[str, int], baseline: str, earlier: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row per recipe, prompt set and temperature, over its seeds.

    `earlier` are such rows of which the record holds no counts; they stand while their recipe has `rows` and fewer of
    its seeds are counted.
    """
    found: dict[str, dict[str, list[Any]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        for key, judged in row.get("judged", {}).items():
            found.setdefault(row["name"], {}).setdefault(key, []).append(judged)
    seconds: dict[str, list[float]] = {}
    for row in rows:
        seconds.setdefault(row["name"], []).append(row["seconds"])
    judged = {(row["name"], row["set"]): row for row in earlier if row["name"] in seconds and not row.get("counted")}
    for name, sets in found.items():
        for key, seeds in sets.items():
            if (name, key) in judged and judged[name, key]["seeds"] > len(seeds):
                continue
            n, counts = stages[name], np.array([counts_of(one) for one in seeds])
            row = {"name": name, "set": key, "seeds": len(seeds), "prompts": counts.shape[1], "n": n, "counted": True}
            row |= pooled(counts, n)
            row["p_by_seed"] = [pooled(one, n)["p"] for one in counts]
            row["by_fill"] = seeds[0]["by_fill"]
            if theirs := found.get(baseline, {}).get(key):
                row["ratio"] = rejection_ratio(counts, np.array([counts_of(one) for one in theirs]))
                row["baseline_seeds"] = len(theirs)
            judged[name, key] = row
    return [row | {"minutes": float(np.mean(seconds[row["name"]])) / 60} for row in judged.values()]


def judged_markdown(rows: list[dict[str, Any]], baseline: str) -> str:
    """One table per prompt set and temperature."""
    lines: list[str] = []
    for key in dict.fromkeys(row["set"] for row in rows):
        these = sorted((row for row in rows if row["set"] == key), key=lambda row: -row["p"])
        most = max((row["seeds"] for row in these if row["name"] == baseline), default=0)
        lines += [
            f"{key}, {these[0]['prompts']} prompts x {NEW} tokens:",
            "",
            f"| recipe | seeds | minutes | p (by seed) | S | (1 - p) over {baseline} | 95 % |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in these:
            seeds = ", ".join(f"{p:.3f}" for p in row["p_by_seed"])
            ratio, interval = "", ""
            if "ratio" in row:
                value, low, high = row["ratio"]
                ratio = f"{value:.3f}"
                interval = "" if row["name"] == baseline else f"{low:.2f} - {high:.2f}"
                if row.get("baseline_seeds", most) != most:
                    interval += f" (against {row['baseline_seeds']} seed)"
            values = f"{row['p']:.3f} ({seeds}) | {row['S']:.2f} | {ratio} | {interval}"
            lines.append(f"| {row['name']} | {row['seeds']} | {row['minutes']:.0f} | {values} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def markdown(rows: list[dict[str, Any]]) -> str:
    """Acceptance beside the best published run's, with what was changed."""
    baseline = max((row for row in rows if row["name"].startswith("published")), key=lambda row: row["p"])
    fewest, most = (choose(row["tokens"] for row in rows) / 1e6 for choose in (min, max))
    lines = [
        f"{fewest:.2f} to {most:.2f} M training tokens, one seed, 60 held-out prompts x 64 tokens, greedy. The last "
        "column is the rejection rate over that of the best published run. Top-1, hit@2, alpha and KL are "
        "teacher-forced, on 128 held-out conversations.",
        "",
        "| run | batch | p | 95 % | S | top-1 | hit@2 | alpha | KL | minutes | (1 - p) ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["p"]):
        low, high = row["interval"]
        ratio = (1 - row["p"]) / (1 - baseline["p"])
        lines.append(
            f"| {row['name']} | {row['batch']} | {row['p']:.3f} | {low:.3f} - {high:.3f} | {row['S']:.2f} | "
            f"{row['teacher_forced_top1']:.3f} | {row['teacher_forced_hit2']:.3f} | "
            f"{row['teacher_forced_alpha']:.3f} | {row['teacher_forced_kl']:.3f} | {row['seconds'] / 60:.0f} | "
            f"{ratio:.2f} |"
        )
    return "\n".join(lines)


def forced_markdown(rows: list[dict[str, Any]]) -> str:
    """Teacher-forced figures on the target's own text, by alpha."""
    fewest, most = (choose(row["tokens"] for row in rows) / 1e6 for choose in (min, max))
    lines = [
        f"{fewest:.2f} to {most:.2f} M training tokens, one seed; teacher-forced on the target's own responses of "
        "temperature 1 to 392 held-out prompts.",
        "",
        "| run | alpha | KL | top-1 | hit@4 | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["teacher_forced_alpha"]):
        forced = " | ".join(f"{row[f'teacher_forced_{name}']:.4f}" for name in ("alpha", "kl", "top1", "hit4"))
        lines.append(f"| {row['name']} | {forced} | {row['seconds'] / 60:.0f} |")
    return "\n".join(lines)
