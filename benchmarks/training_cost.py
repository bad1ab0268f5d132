"""What a training step of the head costs: the staircase attention alone, and the whole step; time and memory.

Everything is measured against a dense computation IN THE SAME RUN, alternately (A B A B ...), on one thread in float32:

  attention  forward and backward of `staircase_attention`, fast path against dense mask (which is built beforehand).
  step       target forward, head forward, loss, backward and AdamW on a tiny Llama (hidden 128, 8 layers; n = 8, 2 head
             layers, m = 5, batch 1). Dense: as published, with one (m S)^2 mask per length, every row in every layer,
             logits at every position and a float32 copy of the target's. Ours: what `fit` runs.
  memory     peak memory of both above start, each in a fresh process.
  profile    where the time of both steps goes, by phase and kind of work, with the arithmetic of the heavy kinds.

Examples:
  python benchmarks/training_cost.py                                   all of it (some 20 minutes on an idle core)
  python benchmarks/training_cost.py --parts step --lengths 512        one comparison, one minute
  python benchmarks/training_cost.py --name trial --repeats 3          a record of another name

Prints tables and writes benchmarks/records/NAME.json. On a busy machine trust ratios and processor times only.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    Timing,
    console,
    interleaved,
    median_cpu,
    median_wall,
    peak_above_start,
    peak_memory,
    ratios,
    write_record,
)
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import LlamaConfig, LlamaForCausalLM

from spd_lightning.head.attention import staircase_attention
from spd_lightning.head.layout import Rows, StaircaseLayout
from spd_lightning.head.loading import new_head
from spd_lightning.staircase import Staircase
from spd_lightning.target.target import Target
from spd_lightning.training.losses import chunked_draft_loss

N_STAGES, LAYERS, HIDDEN, INTERMEDIATE, HEADS, HEAD_LAYERS = 8, 8, 128, 344, 4, 2
ANCHORS = (0, 1, 3, 6, 7)
STAIRCASE = Staircase((LAYERS // N_STAGES,) * N_STAGES, ANCHORS)
RESTART_RATE = 0.15
PARTS = ("attention", "step", "memory", "profile")


def random_entries(S: int, seed: int = 0) -> Tensor:
    """[1, S] entry cycles with restarts."""
    draws = torch.rand(1, S, generator=torch.Generator().manual_seed(seed))
    return torch.where(draws < RESTART_RATE, N_STAGES, 1).cumsum(1)


# -- attention alone ---------------------------------------------------------------------------------------------------


class MaskOnce(StaircaseLayout):
    """Builds its dense mask once, so that the dense path is timed without building it."""

    @cached_property
    def _mask(self) -> Tensor:
        return super().dense_mask()

    def dense_mask(self) -> Tensor:
        return self._mask


def attention_case(S: int, head_dim: int, dense: bool) -> Callable[[], None]:
    """Forward and backward of one call over all m blocks."""
    m = len(STAIRCASE.reachable_blocks)
    random = torch.Generator().manual_seed(0)
    rows = [torch.randn(1, S, m, HEADS, head_dim, generator=random).transpose(1, 2) for _ in range(4)]
    query, key, value = (x.requires_grad_() for x in rows[:3])
    layout = MaskOnce(STAIRCASE, random_entries(S))
    if dense:
        layout.dense_mask()

    def run() -> None:
        out = staircase_attention(query, key, value, layout, range(m), dense=dense)
        torch.autograd.grad(out, (query, key, value), rows[3])

    return run


def measure_attention(lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    results = []
    for head_dim in (HIDDEN // HEADS, 64):
        for S in lengths:
            cases = {name: attention_case(S, head_dim, dense=name == "dense") for name in ("dense", "fast")}
            runs = interleaved(cases, rounds(repeats, S), f"attention {HEADS}x{head_dim}, S={S}")
            results += [{"head_dim": head_dim, **row} for row in compared(runs, S)]
    return results


# -- the whole training step -------------------------------------------------------------------------------------------


class Setting:
    """A target with random weights, a new head and its optimizer."""

    def __init__(self, vocabulary: int) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            vocab_size=vocabulary,
            max_position_embeddings=8192,
        )
        self.target = Target(LlamaForCausalLM(config)).partition(num_stages=N_STAGES)
        self.head = new_head(self.target, HEAD_LAYERS, ANCHORS)
        trained = [p for p in self.head.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.masks: dict[int, Tensor] = {}

    def tokens(self, S: int) -> Tensor:
        return torch.randint(self.target.vocab_size, (1, S), generator=torch.Generator().manual_seed(S))

    def update(self, loss: Tensor) -> None:
        with record_function("phase: backward"):
            loss.backward()
        with record_function("phase: optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def our_step(self, S: int, supervised: float = 1.0) -> None:
        """This package's step; the last `supervised` share of the positions feeds the loss."""
        head, target = self.head, self.target
        select = torch.arange(S)[None] >= round((1 - supervised) * S)
        with record_function("phase: target forward"):
            states, last = target(self.tokens(S), ANCHORS)
        with record_function("phase: head forward"):
            layout = StaircaseLayout(STAIRCASE, random_entries(S))
            hidden = head.norm(head(states, layout, select=select))
        with record_function("phase: loss"):
            loss, _ = chunked_draft_loss(
                hidden=hidden,
                lm_head=head.lm_head.weight,
                target_hidden=target.normed(last[select]),
                target_logits=target.logits_of_normed,
                draft_ids=None,
                fills=layout.fills()[select],
                num_stages=N_STAGES,
                statistics=False,
            )
        self.update(loss / select.sum())

    def dense_step(self, S: int) -> None:
        """As published: a dense mask per length kept for ever, all rows in all layers, full logits in float32."""
        head, target = self.head, self.target
        with record_function("phase: target forward"):
            states, last = target(self.tokens(S), ANCHORS)
            teacher = target.logits(last).float().clone()
        with record_function("phase: head forward"):
            if S not in self.masks:
                allowed = StaircaseLayout(STAIRCASE, random_entries(S)).dense_mask()[:, None]
                self.masks[S] = torch.zeros(allowed.shape).masked_fill_(~allowed, -math.inf)
            every = Rows(torch.ones(1, S, len(ANCHORS), dtype=torch.bool), range(len(ANCHORS)))
            x = head.aggregate(states, every)[None]  # [1, m S, H], block after block
            rotary = head.rotary(x, torch.arange(S).repeat(len(ANCHORS))[None])
            for layer in head.layers:
                normed = layer.input_layernorm(x)
                query, (key, value) = layer.self_attn.query(normed, rotary), layer.self_attn.key_value(normed, rotary)
                q, k, v = (y.transpose(1, 2) for y in (query, key, value))
                attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.masks[S])
                x = layer.finish(x, attended.transpose(1, 2))
        with record_function("phase: loss"):
            log_q = head.logits(x[:, :S]).float().log_softmax(-1)
            log_p = teacher.log_softmax(-1)
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        self.update(loss)


def measure_steps(setting: Setting, lengths: list[int], dense_up_to: int, repeats: int) -> list[dict[str, Any]]:
    results = []
    for S in lengths:
        cases: dict[str, Callable[[], object]] = {
            "dense": partial(setting.dense_step, S),
            "ours": partial(setting.our_step, S),
            "ours, half of S supervised": partial(setting.our_step, S, 0.5),
            "target forward alone": partial(setting.target, setting.tokens(S), ANCHORS),
        }
        if dense_up_to < S:
            del cases["dense"]
        runs = interleaved(cases, rounds(repeats, S), f"step, S={S}")
        setting.masks.clear()  # measured one length at a time, so that the longest fits
        results += compared(runs, S)
    return results


def compared(runs: dict[str, list[Timing]], S: int) -> list[dict[str, Any]]:
    """A row per case; `dense_over` is how many times as long the dense case of the same round took."""
    rows = []
    for name, times in runs.items():
        row: dict[str, Any] = {"S": S, "case": name, "rounds": len(times), "ms": 1e3 * median_wall(times)}
        row |= {"cpu_ms": 1e3 * median_cpu(times), "tokens_per_s": S / median_wall(times)}
        if "dense" in runs:
            row |= {"dense_over": ratios(runs["dense"], times)}
        rows.append(row)
    return rows


# -- memory ------------------------------------------------------------------------------------------------------------


def memory_case(case: str, S: int, vocabulary: int) -> float:
    """MiB above start of one case; runs in a process of its own, warmed up at S = 64."""
    if case.startswith("attention"):
        dense = case == "attention dense"
        attention_case(64, 64, dense)()
        return peak_above_start(lambda: attention_case(S, 64, dense)())
    setting = Setting(vocabulary)
    step = setting.dense_step if case == "step dense" else setting.our_step
    step(64)
    return peak_above_start(lambda: step(S))


def measure_memory(parts: Iterable[str], lengths: list[int], dense_up_to: int, vocabulary: int) -> list[dict[str, Any]]:
    results = []
    for part in parts:
        for kind in ("dense", "ours"):
            mib = {}
            for S in lengths:
                if kind == "dense" and dense_up_to < S:
                    continue
                with console.status(f"memory: {part} {kind}, S={S}"):
                    arguments = (
                        "--memory-case",
                        f"{part} {kind}",
                        "--lengths",
                        str(S),
                        "--vocabulary",
                        str(vocabulary),
                    )
                    mib[S] = peak_memory(sys.argv[0], *arguments)
                console.print(f"memory: {part} {kind}, S={S}: {mib[S]:.0f} MiB above start")
            results.append({"part": part, "kind": kind, "mib_above_start": mib, "exponent": fitted_exponent(mib)})
    return results


def fitted_exponent(values: dict[int, float]) -> float | None:
    """b of the least-squares fit value = a S^b."""
    if len(values) < 2:
        return None
    x, y = torch.tensor(list(values)).double().log(), torch.tensor(list(values.values())).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


# -- where the time goes -----------------------------------------------------------------------------------------------


def kind_of_work(name: str, shapes: list[list[int]], phase: str, S: int, vocabulary: int) -> tuple[str, float]:
    """(kind, floating point operations) of a profiled operation, told by its name and input shapes."""
    if name == "aten::mm":
        sizes = [*shapes[0], shapes[1][1]]
        flops = 2.0 * math.prod(sizes)
        if vocabulary in sizes:
            return "matrix products, logits", flops
        if INTERMEDIATE in sizes:
            return "matrix products, MLP", flops
        return "matrix products, other", flops
    if name.startswith("aten::_scaled_dot_product_flash_attention"):
        backward = name.endswith("backward")
        query, key = shapes[1:3] if backward else shapes[0:2]
        flops = (10.0 if backward else 4.0) * math.prod(query) * key[2]
        if phase == "target forward":
            return "attention, target", flops / 2  # causal
        if query[2] == S * len(ANCHORS):
            return "attention, dense mask", flops
        return ("attention, near part" if query[0] > 1 else "attention, far part"), flops
    return "elementwise, copies, calls", 0.0


def measure_profile(step: Callable[[], None], S: int, vocabulary: int, repeats: int) -> list[dict[str, Any]]:
    """Self time by phase and kind of work; of several steps the one that took least."""
    best: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            step()
        times: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for event in profiled.events():
            phase = phase_of(event)
            if phase:
                kind, flops = kind_of_work(event.name, event.input_shapes, phase, S, vocabulary)
                times[phase, kind][0] += event.self_cpu_time_total / 1e3
                times[phase, kind][1] += flops / 1e9
        if not best or sum(ms for ms, _ in times.values()) < sum(ms for ms, _ in best.values()):
            best = dict(times)
    return [
        {"S": S, "phase": phase, "kind": kind, "ms": ms, "gflop": gflop or None}
        for (phase, kind), (ms, gflop) in sorted(best.items())
    ]


def phase_of(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith("phase: "):
            return event.name.removeprefix("phase: ")
        event = event.cpu_parent
    return None


# -- the program -------------------------------------------------------------------------------------------------------


def rounds(repeats: int, S: int) -> int:
    """Fewer rounds of long sequences: the dense side grows with the square."""
    return max(3, repeats * 512 // S) if S > 512 else repeats


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys as a table; nested values become further columns."""
    if not rows:
        return
    flat = [dict(flattened(row)) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    table = Table(*columns, title=title)
    for row in flat:
        table.add_row(
            *(f"{row[key]:.4g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in columns)
        )
    console.print(table)


def flattened(row: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096], metavar="S", help="tokens")
    parser.add_argument("--dense-up-to", type=int, default=4096, metavar="S", help="longest dense STEP (default 4096)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds at S=512, fewer for longer S (default 9)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="size of the target's vocabulary (default 4096)")
    parser.add_argument("--name", default="training_cost", help="name of the record (default training_cost)")
    parser.add_argument("--memory-case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_case:
        print(memory_case(args.memory_case, args.lengths[0], args.vocabulary))
        return
    results: dict[str, Any] = {}
    results["setting"] = {
        "hidden": HIDDEN,
        "intermediate": INTERMEDIATE,
        "layers": LAYERS,
        "heads": HEADS,
        "vocabulary": args.vocabulary,
        "num_stages": N_STAGES,
        "anchors": ANCHORS,
        "head_layers": HEAD_LAYERS,
        "restart_rate": RESTART_RATE,
    }
    if "attention" in args.parts:
        results["attention"] = measure_attention(args.lengths, args.repeats)
        show("Attention alone, forward + backward", results["attention"])
        write_record(args.name, results, threads=1)
    setting = Setting(args.vocabulary)
    if "step" in args.parts:
        results["step"] = measure_steps(setting, args.lengths, args.dense_up_to, args.repeats)
        show("Training step", results["step"])
        write_record(args.name, results, threads=1)
    if "memory" in args.parts:
        results["memory"] = measure_memory(("attention", "step"), args.lengths, args.dense_up_to, args.vocabulary)
        show("Peak memory above start", results["memory"])
        write_record(args.name, results, threads=1)
    if "profile" in args.parts:
        results["profile"] = {}
        for kind, step, longest in (("ours", setting.our_step, 4096), ("dense", setting.dense_step, 2048)):
            lengths = [S for S in args.lengths if longest >= S]
            rows = [row for S in lengths for row in measure_profile(partial(step, S), S, args.vocabulary, 3)]
            show(f"Where the time of the {kind} step goes", rows)
            results["profile"][kind] = rows
    write_record(args.name, results, threads=1)


if __name__ == "__main__":
    main()
