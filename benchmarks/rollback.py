"""What going back costs a hybrid target: does a cycle become slower, or memory grow, with the restarts that lie behind?

    python benchmarks/rollback.py                    # writes benchmarks/records/rollback.json
    python benchmarks/performance.py                 # renews the tables of docs/performance.md

A random Qwen3.5 (gated delta rule in three layers of four) is cut into 8 stages. Its pipeline is filled, the draft
behind the first token is rejected, every layer returns; then again, thousands of times. After some restarts the same
is done beside it with a FRESH cache of the same context, which has no restart behind it: the two alternate, so that
whatever else the machine does falls on both. What a deep copy of the cache takes, the usual substitute for a rollback,
is timed too. Then the real decoder generates with a drafter that is always wrong.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import torch
from common import console, write_record
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from spd_lightning.decoding.decoder import CycleEvent, SpdDecoder
from spd_lightning.decoding.drafters import Draft
from spd_lightning.decoding.sampling import Sampling
from spd_lightning.decoding.schedule import Cycle, PipelineSchedule
from spd_lightning.staircase import Staircase, default_anchors
from spd_lightning.target.cache import RecurrentLayer, RollbackCache
from spd_lightning.target.target import Target

STAGES, PROMPT, WARM_UP = 8, 64, 3


def hybrid(num_layers: int, hidden: int) -> Target:
    config = AutoConfig.for_model(
        "qwen3_5_text", hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4, vocab_size=1024,
        linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32,
        max_position_embeddings=8192, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return Target(AutoModelForCausalLM.from_config(config)).partition(num_stages=STAGES)


class Pipeline:
    """A cache behind a prompt: `fill` the pipeline, `go_back` because the draft behind its first token was wrong."""

    def __init__(self, target: Target, context: int, capacity: int) -> None:
        self.target, self.context = target, context
        assert target.stage_layers is not None
        self.staircase = Staircase(target.stage_layers, default_anchors(target.stage_layers))
        self.cache = target.new_cache(capacity, target.stage_layers)
        self.rotary = target.rotary_table(capacity)
        target(torch.arange(context)[None] % 1000, (), cache=self.cache)

    def fill(self) -> float:
        """Run cycles until the first token leaves; returns seconds per cycle."""
        schedule = PipelineSchedule(self.staircase, self.context)
        bounds = self.staircase.boundaries
        hidden: dict[int, Tensor] = {}
        nothing = torch.empty(0, self.target.hidden_size)
        began = time.perf_counter()
        while True:
            plan = schedule.plan()
            hidden[plan.newest] = self.target.embed(plan.newest % 1000)
            for stage, position in plan.stages:
                layers = range(bounds[stage], bounds[stage + 1])
                hidden[position] = self.target.run_layers(
                    hidden[position], layers, position, self.rotary, self.cache, {}, nothing
                )
            if plan.leaving is not None:
                return (time.perf_counter() - began) / STAGES
            schedule.advance(None)

    def go_back(self) -> float:
        """Return to the state behind the token that left; returns seconds."""
        began = time.perf_counter()
        self.cache.truncate(self.context + 1)
        self.context += 1
        return time.perf_counter() - began


class CountOperations(TorchDispatchMode):
    """How many tensor operations, hence allocations of tensors, happen inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


class AlwaysWrong:
    """A drafter whose drafts are never what a random target chooses for long: every cycle of n restarts."""

    draft_ids: Tensor | None = None

    def __init__(self, staircase: Staircase, vocabulary: int) -> None:
        self.staircase, self.coins, self.vocabulary = staircase, random.Random(0), vocabulary

    def start(self, prompt: Sequence[int], states: list[Tensor], capacity: int) -> None:
        pass

    def draft(
        self, cycle: Cycle, kept: dict[int, Tensor], tokens: Sequence[int], sampling: Sampling, u: float
    ) -> Draft:
        return Draft(self.coins.randrange(self.vocabulary), None)


@torch.inference_mode()
def old_and_fresh(target: Target, restarts: int, groups: int, window: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of a cycle with many restarts behind and with none at the same context; what going back allocates."""
    capacity = PROMPT + WARM_UP + restarts + 4 * STAGES
    old = Pipeline(target, PROMPT, capacity)
    for _ in range(WARM_UP):
        old.fill()
        old.go_back()
    addresses, rows, returns = buffers(old.cache), [], []
    due = [WARM_UP + round(index * (restarts - window) / (groups - 1)) for index in range(groups)]
    with console.status("restarts") as status:
        while due:
            behind = old.context - PROMPT
            if behind >= due[0]:
                status.update(f"restarts: {behind} of {restarts} behind, beside a fresh cache")
                rows.append(_beside(target, old, capacity, window))
                due.pop(0)
            else:
                old.fill()
                returns.append(old.go_back())
    moved = sum(one != other for one, other in zip(addresses, buffers(old.cache), strict=True))
    old.fill()
    with CountOperations() as counted:
        old.go_back()
    old.fill()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    old.go_back()
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    copying = []
    for _ in range(20):
        began = time.perf_counter()
        copy.deepcopy(old.cache)
        copying.append(time.perf_counter() - began)
    timing = {
        "groups": rows,
        "return_us": 1e6 * statistics.median(returns),
        "deep_copy_us": 1e6 * statistics.median(copying),
    }
    memory = {
        "tensor_operations_while_going_back": counted.count,
        "python_bytes_kept_by_going_back": kept,
        "buffers": len(addresses),
        "buffers_that_moved_or_were_replaced": moved,
        "snapshots_of_a_recurrent_layer_by_stage": [STAGES - stage for stage in range(STAGES)],
        "snapshot_mib": sum(
            buffer.nbytes
            for layer in old.cache.rollback_layers
            if isinstance(layer, RecurrentLayer)
            for buffer in layer.buffers
        )
        / 2**20,
    }
    return timing, memory


def _beside(target: Target, old: Pipeline, capacity: int, window: int) -> dict[str, Any]:
    """Fill the old and a fresh pipeline in turn; both go back one token further each time, so contexts stay equal."""
    fresh, behind = Pipeline(target, old.context, capacity), old.context - PROMPT
    times: dict[str, list[float]] = {"old": [], "fresh": []}
    for _ in range(window):
        for name, pipeline in (("old", old), ("fresh", fresh)):
            times[name].append(pipeline.fill())
            pipeline.go_back()
    return {
        "restarts_behind": behind,
        "context": behind + PROMPT,
        "cycle_ms": 1e3 * statistics.median(times["old"]),
        "fresh_cycle_ms": 1e3 * statistics.median(times["fresh"]),
        "old_over_fresh": statistics.median(a / b for a, b in zip(times["old"], times["fresh"], strict=True)),
    }


def buffers(cache: RollbackCache) -> list[int]:
    """Addresses of everything that a cache holds."""
    return [buffer.data_ptr() for layer in cache.rollback_layers for buffer in layer.buffers]


def real_decoder(target: Target, new_tokens: int, window: int) -> dict[str, Any]:
    """Seconds per cycle of a generation in which nearly every draft is wrong."""
    assert target.stage_layers is not None
    staircase = Staircase(target.stage_layers, default_anchors(target.stage_layers))
    stamps: list[float] = []
    restarts: list[int] = []

    def observe(event: CycleEvent) -> None:
        stamps.append(time.perf_counter())
        restarts.append((restarts[-1] if restarts else 0) + (event.accepted is False))

    decoder = SpdDecoder(target, AlwaysWrong(staircase, target.vocab_size))
    generation = decoder.generate(list(range(PROMPT)), new_tokens, observer=observe)
    groups = []
    for start in range(0, restarts[-1] - window + 1, max(window, (restarts[-1] - window) // 4)):
        first, last = restarts.index(start + 1), restarts.index(start + window)
        groups.append(
            {
                "restarts_behind": [start, start + window],
                "cycle_ms": 1e3 * (stamps[last] - stamps[first]) / (last - first),
            }
        )
    return {
        "new_tokens": new_tokens,
        "restarts": restarts[-1],
        "cycles": generation.cycles,
        "groups": groups,
        "last_over_first_cycle": groups[-1]["cycle_ms"] / groups[0]["cycle_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=2000)
    parser.add_argument("--groups", type=int, default=6, help="how often the old cache is set beside a fresh one")
    parser.add_argument("--window", type=int, default=50, help="restarts whose median is one figure")
    parser.add_argument("--new-tokens", type=int, default=400, help="of the real decoder")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = hybrid(options.layers, options.hidden)
    timing, memory = old_and_fresh(target, options.restarts, options.groups, options.window)
    decoder = real_decoder(target, options.new_tokens, options.window)
    setting = {"family": "qwen3_5_text", "num_stages": STAGES, "prompt": PROMPT} | vars(options)
    write_record("rollback", {"setting": setting, "cycles": timing, "memory": memory, "decoder": decoder}, threads=1)


if __name__ == "__main__":
    main()
