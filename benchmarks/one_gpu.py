"""Speedup on ONE GPU: the pipeline as a CUDA graph with parallel branches, against plain decoding as a CUDA graph.

    python benchmarks/one_gpu.py                         writes benchmarks/records/one_gpu.json (needs CUDA)
    python benchmarks/one_gpu.py --shapes Qwen3-0.6B --records DIR     one shape, elsewhere; renewed shape by shape
    python benchmarks/one_gpu.py --dry-run               a tiny shape on the CPU, nothing written: does it run?

Both decode with the same static layers and caches, one replay per cycle or token, the token handed to the host every
time; the baseline is the same code with one stage and no head. Targets have random weights of the shapes of Qwen3, so a
seeded coin decides every verdict: acceptance is a setting, and S, which follows from it, no result. What is measured is
how long a cycle takes, and with it tokens per second over the same GPU's plain decoding. Runs are interleaved: A B C A
B C ...; speedups are medians over rounds of the ratio within a round.

A coin does not look at logits, so before anything is timed every decoder has to prove itself: greedy tokens equal to
plain decoding by the same kernels, finite logits, and a replay with branches side by side bit-equal to the same cycles
run branch after branch (branches that touch each other's memory differ here).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# the branches of a graph get hardware queues of their own: 8, the default, are fewer than n + 1
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import torch  # noqa: E402
from common import RECORDS, console, write_record  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen3Config  # noqa: E402

from spd_lightning.decoding.generation import Generation  # noqa: E402
from spd_lightning.decoding.graph import CycleRunner, GraphAutoregressive, GraphDecoder, kernels  # noqa: E402
from spd_lightning.head.loading import new_head  # noqa: E402
from spd_lightning.target.target import Target  # noqa: E402

#: hidden, layers, query heads, key heads, head_dim, width of the MLP, vocabulary, lm_head tied to the embedding
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "tiny": (32, 4, 4, 2, 8, 64, 64, True),
    "Qwen3-0.6B": (1024, 28, 16, 8, 128, 3072, 151936, True),
    "Qwen3-1.7B": (2048, 28, 16, 8, 128, 6144, 151936, True),
    "Qwen3-4B": (2560, 36, 32, 8, 128, 9728, 151936, True),
    "Qwen3-8B": (4096, 36, 32, 8, 128, 12288, 151936, False),
}
BASELINE = "autoregressive"


def make_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    """A random Qwen3 of a published shape."""
    hidden, layers, heads, keys, head_dim, intermediate, vocabulary, tied = SHAPES[shape]
    config = Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def make_decoder(model: Any, stages: int, options: argparse.Namespace) -> GraphDecoder:
    target = Target(model).partition(stages)
    ids = None if options.draft_vocabulary >= target.vocab_size else range(options.draft_vocabulary)
    head = new_head(target, num_layers=options.head_layers, draft_token_ids=ids)
    return GraphDecoder(target, head.to(target.device, target.dtype))


def prove(decoder: GraphDecoder, baseline: GraphAutoregressive, prompt: list[int], tokens: int) -> None:
    """Refuse to time a decoder whose numbers are wrong."""
    expected = baseline.generate(prompt, tokens, eos_token_id=[]).token_ids
    found = decoder.generate(prompt, tokens, eos_token_id=[]).token_ids
    if found != expected:
        at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        raise SystemExit(f"wrong: greedy token {at} of {tokens} is {found[at]}, plain decoding gives {expected[at]}")
    (runner,) = decoder.engine.runners.values()
    replayed, eager = (_logits(decoder, runner, prompt, how) for how in ("replayed", "eager"))
    for name, ours, theirs in zip(("draft", "target"), replayed, eager, strict=True):
        if not ours.isfinite().all():
            raise SystemExit(f"wrong: {name} logits are not finite")
        if not torch.equal(ours, theirs):
            raise SystemExit(f"wrong: {name} logits of a replay differ from the same cycles run branch after branch")


@torch.inference_mode()
def _logits(decoder: GraphDecoder, runner: CycleRunner, prompt: list[int], how: str) -> list[torch.Tensor]:
    """Draft and target logits after some cycles of a full pipeline with made-up tokens."""
    n, cycle, first = decoder.head.staircase.num_stages, runner.cycle, len(prompt)
    decoder.engine.start(prompt, len(prompt) + 3 * n)
    graph = runner.graph
    if how == "eager":
        runner.graph = None
    with kernels(cycle.device, masked=True):
        for step in range(2 * n):
            positions = [first + step - depth if step >= depth else cycle.spare for depth in range(n + 1)]
            runner(positions, (step * 17 + 1) % decoder.target.vocab_size)
        found = [cycle.draft_logits.clone(), cycle.target_logits.clone()]
    runner.graph = graph
    return found


def replay_times(decoder: GraphDecoder, replays: int = 50) -> dict[str, float]:
    """Milliseconds of one replay: until the host is free again, and on the device."""
    (runner,) = decoder.engine.runners.values()
    if runner.graph is None:
        return {}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    started = time.perf_counter()
    for _ in range(replays):
        runner.graph.replay()
    host = time.perf_counter() - started
    end.record()
    torch.cuda.synchronize()
    return {"replay_host_ms": 1e3 * host / replays, "replay_device_ms": begin.elapsed_time(end) / replays}


def measure(shape: str, device: str, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """All cases of one shape, in turn."""
    model = make_model(shape, device, dtype)
    prompt = [1 + index % (SHAPES[shape][6] - 1) for index in range(options.prompt)]
    cases: dict[str, Callable[[int], Generation]] = {}
    settings: dict[str, dict[str, Any]] = {BASELINE: {}}
    baseline = GraphAutoregressive(Target(model))
    cases[BASELINE] = lambda seed: baseline.generate(prompt, options.new_tokens, eos_token_id=[])

    def decode(decoder: GraphDecoder, acceptance: float, seed: int) -> Generation:
        return decoder.generate(prompt, options.new_tokens, eos_token_id=[], seed=seed, forced_acceptance=acceptance)

    for stages in options.stages:
        decoder = make_decoder(model, stages, options)
        prove(decoder, baseline, prompt, options.new_tokens)
        console.print(f"{shape}, n={stages}: greedy tokens, logits and branches are right")
        for acceptance in options.acceptance:
            name = f"n={stages}, p={acceptance}"
            cases[name] = partial(decode, decoder, acceptance)
            settings[name] = {
                "num_stages": stages,
                "asked_acceptance": acceptance,
                "stage_layers": list(decoder.head.staircase.stage_layers),
                "head_parameters": sum(p.numel() for p in decoder.head.parameters()),
                **replay_times(decoder),
            }
    runs: dict[str, list[Generation]] = {name: [] for name in cases}
    for round_ in range(-1, options.repeats):  # the first round captures the graphs
        for name, run in cases.items():
            with console.status(f"{shape}: {name}, {'warm-up' if round_ < 0 else f'run {round_ + 1}'}"):
                found = run(round_ % options.repeats)
            if round_ >= 0:
                runs[name].append(found)
    rows = [row_of(name, settings[name], runs[name], runs[BASELINE]) for name in cases]
    for row in rows:
        console.print(
            f"{shape}, {row['case']}: {row['tokens_per_second']:,.1f} tokens/s, cycle {row['cycle_ms']:.3f} ms, "
            f"speedup {row['speedup']:.2f}"
        )
    return {
        "shape": shape,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "cases": rows,
    }


def row_of(name: str, setting: dict[str, Any], runs: list[Generation], baseline: list[Generation]) -> dict[str, Any]:
    """Medians over rounds; ratios are taken within a round."""
    rates, plain = ([(len(g.token_ids) - 1) / g.decode_seconds for g in of] for of in (runs, baseline))
    cycles, tokens = ([g.decode_seconds / g.cycles for g in of] for of in (runs, baseline))
    verified = sum(g.drafts_verified for g in runs)
    return {
        "case": name,
        **setting,
        "acceptance": sum(g.drafts_accepted for g in runs) / verified if verified else None,
        "theoretical_speedup": statistics.median(g.theoretical_speedup or 0.0 for g in runs),
        "tokens_per_second": statistics.median(rates),
        "cycle_ms": 1e3 * statistics.median(cycles),
        "cycle_over_plain_token": statistics.median(a / b for a, b in zip(cycles, tokens, strict=True)),
        "speedup": statistics.median(a / b for a, b in zip(rates, plain, strict=True)),
        "speedups": [a / b for a, b in zip(rates, plain, strict=True)],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), default=[name for name in SHAPES if name != "tiny"]
    )
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--acceptance", nargs="+", type=float, default=[0.8, 0.9])
    parser.add_argument("--head-layers", type=int, default=1)
    parser.add_argument("--draft-vocabulary", type=int, default=32768, help="most frequent ids; all if there are fewer")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the record")
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape on the CPU; writes no record")
    options = parser.parse_args(arguments)
    device, dtype = "cuda", torch.bfloat16
    if options.dry_run:
        device, dtype = "cpu", torch.float32
        options.shapes, options.stages, options.repeats = ["tiny"], [2, 4], 2
        options.prompt, options.new_tokens = 5, 16
    elif not torch.cuda.is_available():
        print("one_gpu.py measures on a CUDA device, and there is none here (--dry-run needs none).", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"setting": {**vars(options), "records": None, "dtype": str(dtype)}, "shapes": []}
    if device == "cuda":
        results["gpu"] = torch.cuda.get_device_name()
        results["connections"] = os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    for shape in options.shapes:
        results["shapes"].append(measure(shape, device, dtype, options))
        if not options.dry_run:  # after each: what is measured is kept
            write_record("one_gpu", results, threads=torch.get_num_threads(), folder=options.records)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if options.dry_run:
        print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
