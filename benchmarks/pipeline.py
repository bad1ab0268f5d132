"""Wall clock of the pipeline on real processes: two stages on two cores against plain decoding on one and on both.

Random fp32 targets of about 50M, 150M and 400M parameters; forced acceptance, so that speed does not depend on a
trained head; n = 2, the head (1 layer, 4,096 draft ids) beside stage 0, which gets fewer layers for it. All arms take
turns in ONE run; the table gives medians of ratios within a turn. Also measured: transformers' own generate, the memory
bandwidth that one core gets alone and that two get together (which bounds everything here), what a message costs, and
a cycle whose stages are empty. It needs two cores for itself, and refuses to measure where others keep them busy.

    .venv/bin/python benchmarks/pipeline.py                    writes records/pipeline.json, about 12 minutes
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from common import RECORDS, ROOT, cores_of_others, renew_readme, write_record  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from spd_lightning.decoding.decoder import autoregressive_generate  # noqa: E402
from spd_lightning.decoding.drafters import PromptLookupDrafter  # noqa: E402
from spd_lightning.decoding.launch import launched, member  # noqa: E402
from spd_lightning.decoding.pipeline import PipelineDecoder  # noqa: E402
from spd_lightning.decoding.simulator import Costs, simulate  # noqa: E402
from spd_lightning.decoding.trace import DECODING, Work, breakdown  # noqa: E402
from spd_lightning.decoding.workers import run_ranks  # noqa: E402
from spd_lightning.head.loading import new_head  # noqa: E402
from spd_lightning.report.timeline import plot_timeline  # noqa: E402
from spd_lightning.speed.measure import measure_link  # noqa: E402
from spd_lightning.staircase import Staircase, default_anchors  # noqa: E402
from spd_lightning.target.target import Target  # noqa: E402


@dataclass(frozen=True)
class Size:
    """A Llama of random weights; heads of 64 where nothing else is said."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    heads: int | None = None
    head_dim: int = 64


SIZES = {
    "50M": Size(512, 1408, 12, 8192),
    "150M": Size(768, 2048, 18, 16384),
    "400M": Size(1024, 2816, 28, 16384),
}
#: Hidden states of a usual size, and hardly a weight: what is left of a cycle is hand-over, verdict and Python.
EMPTY = Size(1024, 8, 2, 64, heads=1, head_dim=8)
ACCEPTANCES = (0.7, 0.85, 1.0)
DRAFT_IDS = 4096
PROMPT, NEW = 16, 96
PICTURED = ("150M", 0.85)
#: Cores that others may keep busy while something is measured.
QUIET = 0.1


def target_of(size: Size) -> Target:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = size.heads or size.hidden // 64
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), head_dim=size.head_dim,
        vocab_size=size.vocab, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None,
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


def layers_ms(target: Target, layers: range, tokens: int = 24) -> float:
    """Milliseconds of some layers for one token, alone in this process."""
    cache, rotary = target.new_cache(tokens), target.rotary_table(tokens)
    hidden, nothing, found = target.embed(1), torch.empty(0, target.hidden_size), []
    with torch.inference_mode():
        for position in range(tokens):
            began = time.perf_counter()
            target.run_layers(hidden, layers, position, rotary, cache, {}, nothing)
            found.append(time.perf_counter() - began)
    return 1e3 * statistics.median(found)


def turn(what: Any, leads: bool) -> Any:
    """What the leader measures while the other rank waits without using its core."""
    found = what() if leads else None
    dist.barrier()
    return found


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """One thread on this rank's own core, or a thread on each of both."""
    with on_all_cores() if count > 1 else nullcontext():
        torch.set_num_threads(count)
        yield
        torch.set_num_threads(1)


@contextmanager
def on_all_cores() -> Iterator[None]:
    """All threads of this process on any core, as if its rank had none of its own."""
    own = os.sched_getaffinity(0)
    _place(range(os.cpu_count() or 1))
    yield
    _place(own)


def _place(cores: Iterable[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def plain(target: Target, prompt: list[int], cores: int) -> float:
    with on_cores(cores):
        found = autoregressive_generate(target, prompt, NEW, eos_token_id=[])
    return (NEW - 1) / found.decode_seconds


def library(target: Target, prompt: list[int], cores: int) -> float:
    """transformers' generate, its prefill taken off by a run of one token."""
    ids = torch.tensor([prompt])
    seconds = []
    with on_cores(cores):
        for new in (1, NEW):
            began = time.perf_counter()
            target.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new,
                pad_token_id=0,
            )  # fmt: skip
            seconds.append(time.perf_counter() - began)
    return (NEW - 1) / (seconds[1] - seconds[0])


def measure_size(name: str, repeats: int, leads: bool, latency: float) -> dict[str, Any] | None:
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
    own = range(layers[0], sum(layers)) if leads else range(layers[0])
    alone_ms = turn(lambda: layers_ms(target, own), leads)
    beside_ms = layers_ms(target, own)  # both ranks at once
    dist.barrier()
    turns: list[dict[str, Any]] = []
    tables: dict[str, Any] = {}
    played: dict[str, list[Any]] = {str(p): [] for p in ACCEPTANCES}
    for number in range(repeats + 1):  # the first one warms up
        one: dict[str, Any] = {}
        one["plain, 1 core"] = turn(lambda: plain(target, prompt, 1), leads)
        one["plain, 2 cores"] = turn(lambda: plain(target, prompt, 2), leads)
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
        "stage_alone_ms": alone_ms, "stage_beside_ms": beside_ms,
        "results": results(turns, whole / 2 / max(shares)),
        "rest": {p: where_the_rest_goes(runs, turns, shares, whole) for p, runs in played.items()},
        "simulated": simulated(played, layers[0], latency),
    }  # fmt: skip


def where_the_rest_goes(
    runs: list[Any], turns: list[dict[str, Any]], shares: list[int], whole: int
) -> dict[str, dict[str, float]]:
    """Milliseconds per cycle and rank: what its bytes take in plain decoding on one core, and what comes on top of it.

    Plain decoding reads the whole target per token, so the bytes of a rank's share take their part of its time.
    """
    plain = statistics.median(1e3 / one["plain, 1 core"] for one in turns)
    found = {}
    for rank, share in enumerate(shares):
        parts = {work: statistics.median(one[2].parts[rank][work] for one in runs) for work in Work if work in DECODING}
        work = parts[Work.STAGE] + parts[Work.HEAD] + parts[Work.VERIFY]
        found[f"rank {rank}"] = {
            "by_bytes": plain * share / whole, "work": work, "hand_over": parts[Work.HAND_OVER],
            "idle": parts[Work.IDLE], "cycle": work + parts[Work.HAND_OVER] + parts[Work.IDLE],
        }  # fmt: skip
    return found


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


def simulated(played: dict[str, list[Any]], layers: int, latency: float) -> dict[str, Any]:
    """Predicted over measured seconds: costs from the runs without rejections, verdicts as they fell."""
    parts = [one[2].parts for one in played["1.0"]]

    def mean(rank: int, *works: Work) -> float:
        return statistics.median(sum(one[rank][work] for work in works) for one in parts) / 1e3

    costs = Costs(
        stages=(mean(0, Work.STAGE), mean(1, Work.STAGE)),
        verification=mean(1, Work.VERIFY),
        head=mean(0, Work.HEAD),
        send=max(mean(0, Work.HAND_OVER), mean(1, Work.HAND_OVER)),
        latency=latency,
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
    prompt = list(range(16))
    found: dict[str, list[float]] = {"own core": [], "any core": []}
    for number in range(12):
        arm = list(found)[number % 2]
        with on_all_cores() if arm == "any core" else nullcontext():
            dist.barrier()
            if leads:
                one = decoder.generate(prompt, 500, eos_token_id=[], forced_acceptance=1.0, seed=number)
                found[arm].append(1e6 * one.decode_seconds / one.cycles)
            else:
                decoder.follow(generations=1)
            spans = decoder.spans_of_all()
        if arm == "own core" and leads:
            table = breakdown(spans, one.cycles).table(decoder.roles.names)
    leave(decoder)
    if not leads:
        return None
    alone = [autoregressive_generate(target, prompt, 500, eos_token_id=[]).decode_seconds for _ in range(3)]
    return {
        "microseconds_per_cycle": statistics.median(found["own core"][1:]),
        "microseconds_per_cycle_on_any_core": statistics.median(found["any core"][1:]),
        "microseconds_per_token_of_the_same_work_in_one_process": 1e6 * statistics.median(alone) / 499,
        "table": table.splitlines(),
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
        shape, device = (1024,), torch.device("cpu")
        latency, send = measure_link(me.rank, me.world, shape, torch.float32, device, messages=2000)
        found["link"] = {"latency": latency, "send": send}
        found["hand_over"] = measure_hand_over(leads)
        found["sizes"] = {}
        for name in options.sizes:
            found["sizes"][name] = measure_size(name, options.repeats, leads, latency)
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
    alone_ms = hand["microseconds_per_token_of_the_same_work_in_one_process"] / 1e3
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
        f"Hand-over by gloo: a hidden state of 1,024 numbers is with the other rank after "
        f"{1e6 * found['link']['latency']:.0f} microseconds, and sending it takes a rank "
        f"{1e6 * found['link']['send']:.0f}. A cycle of two empty stages (one layer of hardly any weights each, "
        f"hidden size {EMPTY.hidden}) takes {hand['microseconds_per_cycle'] / 1e3:.2f} ms; the same two layers and "
        f"lm_head in one process take {alone_ms:.2f} ms per token. Were the ranks' threads free to run on either core, "
        f"a cycle would take {hand['microseconds_per_cycle_on_any_core'] / 1e3:.2f} ms. Where it goes:",
        "",
        *hand["table"],
        "",
    ]
    for name, one in found["sizes"].items():
        ratios = one["simulated"]["predicted_over_measured"]
        told = ", ".join(f"{ratio:.2f} at p = {float(p):g}" for p, ratio in ratios.items())
        two, beside = one["results"][0]["plain_two_over_one_core"], one["stage_beside_ms"] / one["stage_alone_ms"]
        lines += [
            f"**{name}**: {one['parameters'] / 1e6:.0f}M parameters, layers {one['layers_per_stage']}, MB read per "
            f"token and rank {[round(share) for share in one['megabytes_per_rank']]} of "
            f"{one['megabytes_per_token']:.0f}. Plain decoding on both cores is {two:.2f} times as fast as on one; "
            f"layers take {beside:.2f} times as long while the other core runs layers too, which the work bound does "
            f"not know. Simulated over measured seconds: {told}. A cycle, in milliseconds:",
            "",
            *rest(one["rest"]),
            "",
        ]
    return "\n".join(lines).rstrip()


def rest(of: dict[str, Any]) -> list[str]:
    """Rows of where a cycle's time goes, for every acceptance and rank."""
    lines = [
        "| p | rank | its bytes, read as in plain decoding | stage, head, verification | hand-over | idle | cycle |",
        "|---|---|---|---|---|---|---|",
    ]
    for p, ranks in of.items():
        for rank, parts in ranks.items():
            values = (parts[name] for name in ("by_bytes", "work", "hand_over", "idle", "cycle"))
            lines.append(f"| {float(p):g} | {rank} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return lines


def renew(found: dict[str, Any]) -> None:
    """The tables of docs/pipeline.md and README.md."""
    renew_readme("pipeline", page(found), "docs/pipeline.md")
    renew_readme("pipeline", markdown(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--name", default="pipeline", help="of the record")
    parser.add_argument("--anyway", action="store_true", help="also where other processes keep the cores busy")
    parser.add_argument("--raw", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="renew docs/pipeline.md from the record, measure nothing")
    options = parser.parse_args()
    if options.table:
        renew(json.loads((RECORDS / f"{options.name}.json").read_text()))
        return 0
    if launched():
        as_rank(options)
        return 0
    busy = cores_of_others()
    if busy is not None and busy > QUIET and not options.anyway:
        print(f"Other processes keep {busy} cores busy: end them, or measure --anyway, for a try.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "found.json"
        status = run_ranks([sys.executable, *sys.argv, "--raw", str(raw)], 2, threads=1)
        if status:
            return status
        found = json.loads(raw.read_text())
    written = write_record(options.name, {"cores_of_others_before": busy, **found}, threads=1)
    print(markdown(found))
    if options.name == "pipeline":
        renew(json.loads(written.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
