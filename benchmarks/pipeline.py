"""Wall clock of the pipeline on real processes: two stages on two cores against plain decoding on one and on both.

Random fp32 targets of about 50M, 150M and 400M parameters; forced acceptance, so that speed does not depend on a
trained head; n = 2, the head (1 layer, 4,096 draft ids) beside stage 0, which gets fewer layers for it. All arms take
turns in ONE run; the table gives medians of ratios within a turn. Also measured: transformers' own generate, the memory
bandwidth that one core gets alone and that two get together (which bounds everything here), and the cost of a cycle
whose stages are nearly empty.

    .venv/bin/python benchmarks/pipeline.py                    writes records/pipeline.json, about 15 minutes
    .venv/bin/python benchmarks/pipeline.py --sizes 50M --repeats 2 --name try
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from common import RECORDS, ROOT, renew_readme, write_record  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from spd_lightning.decoding.decoder import autoregressive_generate  # noqa: E402
from spd_lightning.decoding.drafters import PromptLookupDrafter  # noqa: E402
from spd_lightning.decoding.launch import launched, member, run_ranks  # noqa: E402
from spd_lightning.decoding.pipeline import PipelineDecoder  # noqa: E402
from spd_lightning.decoding.simulator import Costs, simulate  # noqa: E402
from spd_lightning.decoding.trace import Work, breakdown  # noqa: E402
from spd_lightning.head.loading import new_head  # noqa: E402
from spd_lightning.report.timeline import plot_timeline  # noqa: E402
from spd_lightning.staircase import Staircase, default_anchors  # noqa: E402
from spd_lightning.target.target import Target  # noqa: E402


@dataclass(frozen=True)
class Size:
    """A Llama of random weights."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int


SIZES = {
    "50M": Size(512, 1408, 12, 8192),
    "150M": Size(768, 2048, 18, 16384),
    "400M": Size(1024, 2816, 28, 16384),
}
EMPTY = Size(1024, 8, 2, 64)
ACCEPTANCES = (0.7, 0.85, 1.0)
DRAFT_IDS = 4096
PROMPT, NEW = 16, 96
PICTURED = ("150M", 0.85)
#: Seconds from sending to having it, gloo on one machine: half of a round trip of one message.
LATENCY = 51e-6


def target_of(size: Size) -> Target:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = size.hidden // 64
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), vocab_size=size.vocab,
        max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Target(LlamaForCausalLM(config).float())


def numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def split(target: Target, head_numbers: int) -> tuple[int, int]:
    """Layers per stage whose fuller rank reads least, the head beside stage 0 and lm_head beside stage 1."""
    layer, lm_head, L = numbers(target.layer(0)), numbers(target.lm_head), target.num_layers
    first = min(range(1, L), key=lambda k: max(k * layer + head_numbers, (L - k) * layer + lm_head))
    return first, L - first


def bandwidth(megabytes: int = 400, repeats: int = 5) -> float:
    """GB/s of matrix-vector products over weights far larger than any cache, on this process's one thread."""
    weights = [torch.ones(2048, 2048) for _ in range(megabytes * 10**6 // (4 * 2048 * 2048))]
    x, rates = torch.ones(1, 2048), []
    for _ in range(repeats):
        began = time.perf_counter()
        for weight in weights:
            F.linear(x, weight)
        rates.append(megabytes / 1e3 / (time.perf_counter() - began))
    return statistics.median(rates)


def turn(what: Any, leads: bool) -> Any:
    """What the leader measures while the other rank waits without using its core."""
    found = what() if leads else None
    dist.barrier()
    return found


def plain(target: Target, prompt: list[int], threads: int) -> float:
    torch.set_num_threads(threads)
    found = autoregressive_generate(target, prompt, NEW, eos_token_id=[])
    torch.set_num_threads(1)
    return (NEW - 1) / found.decode_seconds


def library(target: Target, prompt: list[int], threads: int) -> float:
    """transformers' generate, its prefill taken off by a run of one token."""
    torch.set_num_threads(threads)
    ids = torch.tensor([prompt])
    seconds = []
    for new in (1, NEW):
        began = time.perf_counter()
        target.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new,
            pad_token_id=0,
        )  # fmt: skip
        seconds.append(time.perf_counter() - began)
    torch.set_num_threads(1)
    return (NEW - 1) / (seconds[1] - seconds[0])


def measure_size(name: str, repeats: int, leads: bool) -> dict[str, Any] | None:
    size = SIZES[name]
    target = target_of(size)
    # the head's size depends on its anchors, and those on the split: it is made once for an even split to count it
    target.partition(num_stages=2)
    probe = new_head(target, num_layers=1, draft_token_ids=range(DRAFT_IDS))
    layers = split(target, numbers(probe) - numbers(probe.norm))
    target.partition(stage_layers=layers)
    head = new_head(target, num_layers=1, draft_token_ids=range(DRAFT_IDS)).eval()
    decoder = PipelineDecoder(target, head, traced=True)
    prompt = [i * 37 % size.vocab for i in range(PROMPT)]
    shares = [
        4 * (layers[0] * numbers(target.layer(0)) + numbers(head)),
        4 * (layers[1] * numbers(target.layer(0)) + numbers(target.lm_head)),
    ]
    whole = 4 * (target.num_layers * numbers(target.layer(0)) + numbers(target.lm_head))
    turns: list[dict[str, Any]] = []
    tables: dict[str, Any] = {}
    played: dict[str, list[Any]] = {str(p): [] for p in ACCEPTANCES}
    for number in range(repeats + 1):  # the first one warms up
        one: dict[str, Any] = {}
        one["plain, 1 core"] = turn(lambda: plain(target, prompt, 1), leads)
        one["plain, 2 cores"] = turn(lambda: plain(target, prompt, 2), leads)
        if number % 2:
            one["transformers, 1 core"] = turn(lambda: library(target, prompt, 1), leads)
            one["transformers, 2 cores"] = turn(lambda: library(target, prompt, 2), leads)
        for p in ACCEPTANCES:
            if leads:
                found = decoder.generate(prompt, NEW, eos_token_id=[], forced_acceptance=p, seed=number)
                one[f"pipeline p={p}"] = (NEW - 1) / found.decode_seconds
                one[f"S p={p}"] = found.theoretical_speedup
            else:
                decoder.follow(generations=1)
            spans = decoder.spans_of_all()
            if leads and number:
                played[str(p)].append((found.accepted_flags, found.decode_seconds, breakdown(spans, found.cycles)))
            if leads and number == repeats and (name, p) == PICTURED:
                plot_timeline(spans, decoder.roles.names, ROOT / "docs" / "pictures" / "pipeline_timeline.png")
            if leads and number == repeats:
                parts = breakdown(spans, found.cycles)
                tables[str(p)] = {
                    "cycle_ms": parts.cycle_ms,
                    "bubble_share": parts.bubble_share,
                    "table": parts.table(decoder.roles.names).splitlines(),
                }
            dist.barrier()
        if number:
            turns.append(one)
    leave(decoder)
    if not leads:
        return None
    return {
        "parameters": numbers(target.model), "layers_per_stage": list(layers), "megabytes_per_token": whole / 1e6,
        "megabytes_per_rank": [share / 1e6 for share in shares], "turns": turns, "cycle": tables,
        "results": results(turns, whole / 2 / max(shares)),
        "simulated": simulated(played, layers[0]),
    }  # fmt: skip


def leave(decoder: PipelineDecoder) -> None:
    if decoder.leads:
        decoder.close()
    else:
        decoder.follow()


def results(turns: list[dict[str, Any]], balance: float) -> list[dict[str, Any]]:
    """Medians over turns of ratios within a turn."""

    def ratio(above: str, below: str) -> float:
        return statistics.median(one[above] / one[below] for one in turns if above in one and below in one)

    rows = []
    for p in ACCEPTANCES:
        S = statistics.median(one[f"S p={p}"] for one in turns)
        bound = S * balance
        gain = ratio(f"pipeline p={p}", "plain, 1 core")
        rows.append(
            {
                "acceptance": p, "tokens_per_second": statistics.median(one[f"pipeline p={p}"] for one in turns),
                "S": S, "work_bound": bound, "over_one_core": gain, "of_work_bound": gain / bound,
                "over_both_cores": ratio(f"pipeline p={p}", "plain, 2 cores"),
                "over_transformers_one_core": ratio(f"pipeline p={p}", "transformers, 1 core"),
                "over_transformers_both_cores": ratio(f"pipeline p={p}", "transformers, 2 cores"),
                "plain_two_over_one_core": ratio("plain, 2 cores", "plain, 1 core"),
            }
        )  # fmt: skip
    return rows


def simulated(played: dict[str, list[Any]], layers: int) -> dict[str, Any]:
    """Predicted over measured seconds: costs from the runs without rejections, verdicts as they fell."""
    parts = [one[2].parts for one in played["1.0"]]

    def mean(rank: int, *works: Work) -> float:
        return statistics.median(sum(one[rank][work] for work in works) for one in parts) / 1e3

    costs = Costs(
        stages=(mean(0, Work.STAGE), mean(1, Work.STAGE)),
        verification=mean(1, Work.VERIFY),
        head=mean(0, Work.HEAD),
        send=max(mean(0, Work.HAND_OVER), mean(1, Work.HAND_OVER)),
        latency=LATENCY,
        layers_per_stage=layers,
    )
    ratios = {
        p: statistics.median(simulate(costs, flags, len(flags)).seconds / seconds for flags, seconds, _ in runs)
        for p, runs in played.items()
    }
    return {"costs": asdict(costs), "predicted_over_measured": ratios}


def measure_hand_over(leads: bool) -> dict[str, Any] | None:
    """A cycle whose stages are nearly empty: what remains is hand-over, verdict and Python."""
    target = target_of(EMPTY)
    target.partition(stage_layers=(1, 1))
    assert target.stage_layers is not None
    drafter = PromptLookupDrafter(Staircase(target.stage_layers, default_anchors(target.stage_layers)), EMPTY.vocab)
    decoder = PipelineDecoder(target, drafter, traced=True)
    prompt, found = list(range(16)), []
    for number in range(6):
        if leads:
            one = decoder.generate(prompt, 500, eos_token_id=[], forced_acceptance=1.0, seed=number)
            found.append(1e6 * one.decode_seconds / one.cycles)
        else:
            decoder.follow(generations=1)
    spans = decoder.spans_of_all()
    leave(decoder)
    if not leads:
        return None
    parts = breakdown(spans, one.cycles)
    alone = autoregressive_generate(target, prompt, 500, eos_token_id=[])
    return {
        "microseconds_per_cycle": statistics.median(found[1:]),
        "microseconds_per_token_of_the_same_work_in_one_process": 1e6 * alone.decode_seconds / 499,
        "table": parts.table(decoder.roles.names).splitlines(),
    }


def as_rank(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with member() as me:
        leads = me.rank == me.world - 1
        one = turn(bandwidth, leads)
        dist.barrier()
        both = bandwidth()
        together = [None, None]
        dist.all_gather_object(together, both)
        found: dict[str, Any] = {"bandwidth_one_core": one, "bandwidth_together": together}
        found["hand_over"] = measure_hand_over(leads)
        found["sizes"] = {}
        for name in options.sizes:
            found["sizes"][name] = measure_size(name, options.repeats, leads)
            if leads:
                print(name, json.dumps(found["sizes"][name]["results"], indent=1), flush=True)
                Path(options.raw).write_text(json.dumps(found))


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "| target | p | S | work bound | over one core | of the bound | over both cores | "
        "over transformers, 1 / 2 cores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found["sizes"].items():
        for row in one["results"]:
            lines.append(
                f"| {name} | {row['acceptance']:g} | {row['S']:.2f} | {row['work_bound']:.2f} | "
                f"{row['over_one_core']:.2f} | {row['of_work_bound']:.2f} | {row['over_both_cores']:.2f} | "
                f"{row['over_transformers_one_core']:.2f} / {row['over_transformers_both_cores']:.2f} |"
            )
    return "\n".join(lines)


def page(found: dict[str, Any]) -> str:
    """What docs/pipeline.md says of the record."""
    machine, hand = found["machine"], found["hand_over"]
    two = ", ".join(f"{rate:.1f}" for rate in found["bandwidth_together"])
    lines = [
        f"`{' '.join(found['argv'])}`, {found['date'][:10]}, commit {(found['commit'] or '-')[:7]}, torch "
        f"{found['versions']['torch']}, {machine['processor']}, {machine['cores']} cores; medians of "
        f"{len(next(iter(found['sizes'].values()))['turns'])} turns.",
        "",
        markdown(found),
        "",
        f"One core alone reads {found['bandwidth_one_core']:.1f} GB/s, two at once {two} GB/s.",
        "",
        f"A cycle of two nearly empty stages (one small layer each, hidden size {EMPTY.hidden}) takes "
        f"{hand['microseconds_per_cycle'] / 1e3:.2f} ms, the same work in one process "
        f"{hand['microseconds_per_token_of_the_same_work_in_one_process'] / 1e3:.2f} ms per token. Where it goes:",
        "",
        *hand["table"],
        "",
    ]
    for name, one in found["sizes"].items():
        ratios = one["simulated"]["predicted_over_measured"]
        told = ", ".join(f"{ratio:.2f} at p = {float(p):g}" for p, ratio in ratios.items())
        lines += [
            f"**{name}**: {one['parameters'] / 1e6:.0f}M parameters, layers {one['layers_per_stage']}, MB read per "
            f"token and rank {[round(share) for share in one['megabytes_per_rank']]} of "
            f"{one['megabytes_per_token']:.0f}. Simulated over measured seconds: {told}. A cycle at p = 0.85:",
            "",
            *one["cycle"]["0.85"]["table"],
            "",
        ]
    return "\n".join(lines).rstrip()


def renew(found: dict[str, Any]) -> None:
    """The tables of docs/pipeline.md and README.md."""
    renew_readme("pipeline", page(found), "docs/pipeline.md")
    renew_readme("pipeline", markdown(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--name", default="pipeline", help="of the record")
    parser.add_argument("--raw", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="renew docs/pipeline.md from the record, measure nothing")
    options = parser.parse_args()
    if options.table:
        renew(json.loads((RECORDS / f"{options.name}.json").read_text()))
        return 0
    if launched():
        as_rank(options)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "found.json"
        status = run_ranks([sys.executable, *sys.argv, "--raw", str(raw)], 2, threads=1)
        if status:
            return status
        found = json.loads(raw.read_text())
    written = write_record(options.name, found, threads=1)
    print(markdown(found))
    if options.name == "pipeline":
        renew(json.loads(written.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
