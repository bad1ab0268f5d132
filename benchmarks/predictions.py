"""PREDICTIONS of the simulator for GPUs that were not there: n = 4, 8, 16 on one node and across nodes.

Nothing here is measured. A stage's time is its bytes over the memory bandwidth that is achieved, plus what launching
its kernels costs; hand-over is a latency and a sender's time; the last rank tells its verdict to one rank after
another. All assumptions are in the record, beside the published
figures (arXiv 2605.30852, n = 4, 8, 16 with 4, 3, 2 head layers, T = 0).

    .venv/bin/python benchmarks/predictions.py     writes records/predictions.json, renews docs/pipeline.md; seconds
"""

from __future__ import annotations

from typing import Any

from common import renew_readme, write_record

from spd_lightning.decoding.simulator import Costs, coins, simulate
from spd_lightning.staircase import even_stage_layers

#: Sizes as assumed: numbers of weights of one layer, of lm_head, and hidden size.
TARGETS = {
    "Qwen3.5-4B": {"layers": 32, "layer": 105e6, "lm_head": 636e6, "hidden": 2560},
    "Qwen3.5-9B": {"layers": 32, "layer": 220e6, "lm_head": 1017e6, "hidden": 4096},
}
ASSUMED: dict[str, Any] = {
    "bytes_per_weight": 2,
    "memory_bandwidth_bytes_per_second": 4.8e12,
    "bandwidth_achieved": 0.7,
    "seconds_of_launches_per_layer": 60e-6,
    "seconds_of_host_per_cycle": 60e-6,
    "draft_vocabulary": 32_000,
    "links": {
        "one node": {"latency": 30e-6, "send": 20e-6, "tell": 15e-6},
        "across nodes": {"latency": 90e-6, "send": 30e-6, "tell": 15e-6},
    },
    "tokens": 4000,
}
#: (target, n): S and wall-clock speedup as published, and head layers.
PUBLISHED = {
    ("Qwen3.5-4B", 4): (2.64, 2.27, 4), ("Qwen3.5-4B", 8): (3.39, 2.53, 3), ("Qwen3.5-4B", 16): (3.70, 1.43, 2),
    ("Qwen3.5-9B", 4): (2.70, 2.32, 4), ("Qwen3.5-9B", 8): (3.61, 2.67, 3), ("Qwen3.5-9B", 16): (3.90, 1.49, 2),
}  # fmt: skip


def acceptance(n: int, S: float) -> float:
    """p of an endless generation with this S: S = n / (1 + (n - 1)(1 - p))."""
    return 1 - (n / S - 1) / (n - 1)


def seconds(weights: float, layers: float) -> float:
    """Reading so many weights once, in so many layers."""
    rate = ASSUMED["memory_bandwidth_bytes_per_second"] * ASSUMED["bandwidth_achieved"]
    return weights * ASSUMED["bytes_per_weight"] / rate + layers * ASSUMED["seconds_of_launches_per_layer"]


def predict(name: str, n: int, link: str) -> dict[str, Any]:
    target, (S, wall, head_layers) = TARGETS[name], PUBLISHED[name, n]
    H, layers = target["hidden"], even_stage_layers(int(target["layers"]), n)
    rows = 5 * 3 * H * H  # W_k of five blocks, (k + 1) H x H each
    overhead = ASSUMED["seconds_of_host_per_cycle"]
    costs = Costs(
        stages=tuple(seconds(count * target["layer"], count) + overhead for count in layers),
        verification=seconds(target["lm_head"], 1),
        head=seconds(head_layers * target["layer"] + rows + ASSUMED["draft_vocabulary"] * H, head_layers + 1),
        head_alone=True,
        layers_per_stage=max(layers),
        **ASSUMED["links"][link],
    )
    p = acceptance(n, S)
    tokens = int(ASSUMED["tokens"])
    played = simulate(costs, coins(p), tokens)
    plain = seconds(target["layers"] * target["layer"] + target["lm_head"], target["layers"] + 1)
    return {
        "target": name, "n": n, "link": link, "acceptance": p, "S": n * tokens / played.cycles,
        "wall_clock": played.speedup_over(plain), "published_S": S, "published_wall_clock": wall,
        "cycle_ms": 1e3 * played.seconds / played.cycles, "stage_ms": 1e3 * max(costs.stages),
        "head_ms": 1e3 * costs.head, "verification_ms": 1e3 * costs.verification,
        "implied_cycle_ms": 1e3 * plain / n * S / wall, "plain_ms": 1e3 * plain,
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| target | n | link | S | wall clock, PREDICTED | of S | S / wall clock, published | of S |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['target']} | {row['n']} | {row['link']} | {row['S']:.2f} | {row['wall_clock']:.2f} | "
            f"{row['wall_clock'] / row['S']:.2f} | {row['published_S']:.2f} / {row['published_wall_clock']:.2f} | "
            f"{row['published_wall_clock'] / row['published_S']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    rows = [predict(name, n, link) for name, n in PUBLISHED for link in ("one node", "across nodes")]
    write_record("predictions", {"measured": False, "assumed": ASSUMED, "targets": TARGETS, "rows": rows}, threads=1)
    print(markdown(rows))
    renew_readme("predictions", markdown(rows), "docs/pipeline.md")


if __name__ == "__main__":
    main()
