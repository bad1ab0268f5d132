"""What a draft tree is worth: S by width beside the chain's, what more rows cost, and S with that cost charged.

One head, the same prompts and draws for all, one generation after another in turn, so that whatever else the machine
does falls on all alike. The sharpness of a tree is fitted on prompts of its own. What rows cost is measured twice: the
time of a cycle of this engine, which runs all stages of the tiny target one after another, against the chain's; and the
time of as many rows through one decoder layer of Llama 3.1 8B's sizes, against one row. What a pass costs is
a matter of size: a small layer is arithmetic and calls, a large one is the reading of its weights.

    .venv/bin/python benchmarks/tree.py --run runs/tiny      writes records/tree.json, renews docs/quality.md
    .venv/bin/python benchmarks/tree.py --run runs/tiny --widths 2 3 --prompts 100      records/tree_widths.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import RECORDS, ROOT, console, renew_readme, write_record  # noqa: E402

from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate  # noqa: E402
from spd_lightning.decoding.evaluation import bootstrap_difference  # noqa: E402
from spd_lightning.decoding.generation import Pooled  # noqa: E402
from spd_lightning.decoding.tree import Tree, TreeDecoder, fitted_sharpness  # noqa: E402
from spd_lightning.head.loading import load_head  # noqa: E402
from spd_lightning.target.loading import load_target, load_tokenizer  # noqa: E402
from spd_lightning.target.tree_cache import TreeCache  # noqa: E402

HELDOUT = ROOT / "src/spd_lightning/embedded/documentation/heldout.jsonl.gz"
WIDTHS = (1, 2, 3, 4)
GATES = (0.02, 0.05, 0.1)
NEW = 64


def prompts_of(start: int, stop: int) -> list[list[int]]:
    """Held-out conversations up to their first answer; no validation of the tiny recipe sees those from 128 on."""
    tokenizer = load_tokenizer("tiny")
    with gzip.open(HELDOUT, "rt") as file:
        rows = [json.loads(line) for line in file][start:stop]
    return [
        tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=True, return_dict=False)
        for row in rows
    ]


def measured(run: Path, count: int, temperature: float, widths: Sequence[int] | None) -> dict[str, Any]:
    """All arms on so many prompts; the chain and trees of some widths alone where `widths` are given."""
    target = load_target("tiny")
    head = load_head(run, target)
    sharpness = fitted_sharpness(target, head, prompts_of(128, 168), NEW, temperature=temperature)
    console.print(f"temperature {temperature:g}: sharpness {sharpness:.2f}")
    arms: dict[str, SpdDecoder] = {"chain": SpdDecoder(target, head)}
    arms |= {f"tree {k}": TreeDecoder(target, head, Tree(k, sharpness)) for k in widths or WIDTHS}
    if widths is None:
        for gate in GATES:
            arms[f"tree 4, gate {gate:g}"] = TreeDecoder(target, head, Tree(4, sharpness, gate=gate))
        arms["tree 3, newest only"] = TreeDecoder(target, head, Tree(3, sharpness, late=False))
        arms["tree 3, sharpness 1"] = TreeDecoder(target, head, Tree(3, 1.0))
    found: dict[str, list[Any]] = {name: [] for name in arms}
    different = 0
    prompts = prompts_of(200, 200 + count)
    for number, prompt in enumerate(prompts):
        plain = autoregressive_generate(target, prompt, NEW, temperature, seed=number, coupled=True).token_ids
        for name, decoder in arms.items():
            one = decoder.generate(prompt, NEW, temperature, seed=number)
            found[name].append(one)
            if one.token_ids != plain and (temperature == 0 or name != "chain"):
                different += 1
        if (number + 1) % 20 == 0:
            console.print(f"temperature {temperature:g}: {number + 1} of {len(prompts)} prompts")
    rows = []
    for name, generations in found.items():
        pooled = Pooled.of(generations, len(target.stage_layers or ()))
        pairs = zip(generations, found["chain"], strict=True)
        ratios = [
            (a.decode_seconds / a.cycles) / (b.decode_seconds / b.cycles) for a, b in pairs if a.cycles and b.cycles
        ]
        rows.append(
            {
                "name": name, "p": pooled.acceptance, "interval": bootstrap_difference(generations),
                "S": pooled.theoretical_speedup, "cycles": pooled.cycles, "cycle_cost": statistics.median(ratios),
                "seconds": pooled.decode_seconds,
                "widths": np.sum([one.widths or (one.cycles,) for one in generations], axis=0).tolist(),
                "over_chain": speedup_interval(generations, found["chain"]),
            }
        )  # fmt: skip
    about = {"temperature": temperature, "sharpness": sharpness, "prompts": len(prompts), "different": different}
    return about | {"rows": rows}


def speedup_interval(ours: list[Any], chain: list[Any], draws: int = 4000) -> tuple[float, float]:
    """95 % interval of S over the chain's, over prompts drawn with replacement."""
    counts = np.array([[(len(one.token_ids) - 1), one.cycles] for side in (ours, chain) for one in side], float)
    both = counts.reshape(2, len(ours), 2)
    drawn = np.random.default_rng(0).integers(0, len(ours), (draws, len(ours)))
    tokens, cycles = np.moveaxis(both[:, drawn].sum(2), -1, 0)
    speeds = tokens / cycles
    low, high = np.quantile(speeds[0] / speeds[1], [0.025, 0.975])
    return float(low), float(high)


@torch.inference_mode()
def layer_cost(rows: tuple[int, ...], rounds: int = 40, cached: int = 512) -> dict[int, float]:
    """Time of rows through a decoder layer of Llama 3.1 8B's sizes (float32, random weights) over that of one row.

    The shortest of the rounds: whatever else the machine does can only lengthen them.
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8,
        attn_implementation="sdpa",
    )  # fmt: skip
    layer, rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)
    times: dict[int, list[float]] = {count: [] for count in rows}
    for number in range(rounds + 1):
        for count in rows:
            cache = TreeCache(1, cached + count)
            past = torch.zeros(1, 8, cached, 128)
            cache.update(past, past, 0)
            cache.write_to(torch.arange(cached, cached + count), cached + count)
            x = torch.randn(1, count, 4096)
            mask = torch.zeros(1, 1, count, cached + count)
            here = rotary(x, torch.full((1, count), cached))
            began = time.perf_counter()
            layer(x, attention_mask=mask, past_key_values=cache, use_cache=True, position_embeddings=here)
            if number:
                times[count].append(time.perf_counter() - began)
    return {count: min(values) / min(times[1]) for count, values in times.items()}


def markdown(found: dict[str, Any]) -> str:
    layer = {int(rows): cost for rows, cost in found["layer_cost"].items()}
    lines = [
        "Rows through a layer of Llama 3.1 8B's sizes cost, over one row: "
        + ", ".join(f"{cost:.2f} ({rows})" for rows, cost in layer.items())
        + ".",
        "",
    ]
    for part in found["parts"]:
        chain = part["rows"][0]
        lines += [
            f"Temperature {part['temperature']:g}, {part['prompts']} held-out prompts x {NEW} tokens, sharpness "
            f"{part['sharpness']:.2f} (fitted on 40 others); outputs other than plain decoding's: {part['different']}.",
            "",
            "| | p | 95 % | S | over the chain | rows of a cycle's widest pass | large layer's rows charged | this "
            "engine's cycle charged |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in part["rows"]:
            low, high = row["interval"]
            least, most = row.get("over_chain", (math.nan, math.nan))
            over = f"{row['S'] / chain['S'] - 1:+.0%}"
            over += f" ({least - 1:+.0%} to {most - 1:+.0%})" if row is not chain and least == least else ""
            rows, large = (_mean(row["widths"], costs) for costs in (range(1, 1 + len(layer)), layer.values()))
            charged = [row["S"] / cost for cost in (large, row["cycle_cost"])]
            prices = " | ".join(f"{S:.2f} ({S / chain['S'] - 1:+.0%})" for S in charged)
            lines.append(
                f"| {row['name']} | {row['p']:.3f} | {low:.3f} - {high:.3f} | {row['S']:.2f} | "
                f"{over} | {rows:.2f} | {prices} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _mean(widths: Sequence[int], costs: Iterable[float]) -> float:
    """Mean cost of a cycle, as long as its widest pass; widths: cycles whose widest pass had 1, 2, ... rows."""
    return sum(count * cost for count, cost in zip(widths, costs, strict=False)) / sum(widths)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "tiny", help="a finished run of the tiny recipe")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument(
        "--widths", type=int, nargs="+", help="trees of these and the chain alone, in a record of their own"
    )
    parser.add_argument("--costs", action="store_true", help="measure only what rows cost, keep the record's decoding")
    parser.add_argument("--table", action="store_true", help="renew docs/quality.md from the record, measure nothing")
    options = parser.parse_args()
    name, mark = ("tree", "tree") if options.widths is None else ("tree_widths", "widths")
    if unknown := set(options.widths or ()) - set(WIDTHS):
        parser.error(f"--widths {min(unknown)}: expected some of {WIDTHS}, whose rows are priced")
    torch.set_num_threads(1)
    if options.costs:
        known = json.loads((RECORDS / f"{name}.json").read_text())
        about = ("argv", "date", "commit", "dirty", "versions", "machine")
        decoded = known.get("decoded") or {field: known[field] for field in about}
        write_record(name, {"parts": known["parts"], "decoded": decoded, "layer_cost": layer_cost(WIDTHS)}, 1)
    elif not options.table:
        if not options.run.is_dir():
            parser.error(f"--run {options.run}: expected the folder of a finished run of the tiny recipe")
        parts = [measured(options.run, options.prompts, temperature, options.widths) for temperature in (0.0, 1.0)]
        write_record(name, {"parts": parts, "layer_cost": layer_cost(WIDTHS)}, threads=1)
    table = markdown(json.loads((RECORDS / f"{name}.json").read_text()))
    renew_readme(mark, table, "docs/quality.md")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
