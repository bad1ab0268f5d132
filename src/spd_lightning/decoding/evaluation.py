"""Side-by-side evaluation of drafters on the same prompts through the same decoder, with bootstrap intervals.

Arms are independent, so on a CPU they are shared out among one-thread processes, one per core; on a GPU they run one
after another in this process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spd_lightning.decoding.checks import drift, lossless_divergence
from spd_lightning.decoding.decoder import SpdDecoder, autoregressive_generate
from spd_lightning.decoding.drafters import PromptLookupDrafter
from spd_lightning.decoding.generation import Generation, Pooled
from spd_lightning.head.loading import load_head, new_head
from spd_lightning.target.loading import Loading, load_target
from spd_lightning.target.target import Target, is_placed


@dataclass(frozen=True)
class Arm:
    """What decodes (`trained head`, `untrained head`, `prompt lookup`, `plain` = autoregressive) at one temperature."""

    drafter: str
    temperature: float = 0.0


@dataclass(frozen=True)
class Subject:
    """What is evaluated: where the target and the trained head lie, and the seed the head was initialised from."""

    target: str
    head: str
    loading: Loading = Loading()
    device: str = "cpu"
    init_seed: int = 0


@dataclass(frozen=True)
class Result:
    """Generations of one arm, in prompt order."""

    arm: Arm
    generations: list[Generation]
    pooled: Pooled
    seconds: float


def evaluate(
    subject: Subject,
    arms: Sequence[Arm],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seed: int = 0,
    on_progress: Callable[[Arm, int], None] | None = None,
    target: Target | None = None,
) -> dict[Arm, Result]:
    """Decode all prompts with every arm.

    Args:
        subject: target and head.
        arms: drafters and temperatures.
        prompts: token ids.
        max_new_tokens: new tokens per prompt.
        seed: of sampled arms; prompt i uses seed + i.
        on_progress: called with (arm, prompts done by this task) as tasks finish.
        target: the subject's target where it is loaded already. Used where a second copy must not be loaded: on a
            GPU, and for a target that is spread, offloaded or quantised. On a CPU processes load their own.
    """
    alone = subject.device != "cpu" or (target is not None and is_placed(target.model))
    workers = 0 if alone else os.cpu_count() or 1
    # slices of a few prompts keep all cores busy to the end, whatever the arms cost
    size = max(1, len(prompts) // 5)
    tasks = [
        (subject, arm, start, [list(p) for p in prompts[start : start + size]], max_new_tokens, seed)
        for arm in arms
        for start in range(0, len(prompts), size)
    ]
    pieces: dict[Arm, list[tuple[int, list[Generation], float]]] = {arm: [] for arm in arms}

    def keep(task: Any, outcome: tuple[list[Generation], float]) -> None:
        pieces[task[1]].append((task[2], *outcome))
        if on_progress:
            on_progress(task[1], len(outcome[0]))

    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_quiet_thread) as pool:
            for task, outcome in zip(tasks, pool.map(_decode, tasks), strict=True):
                keep(task, outcome)
    else:
        models = _models(subject) if target is None else _Models(subject, target)
        for task in tasks:
            keep(task, _decode(task, models))
    results = {}
    for arm, parts in pieces.items():
        generations = [g for _, part, _ in sorted(parts, key=lambda piece: piece[0]) for g in part]
        stages = max(g.num_stages for g in generations)
        results[arm] = Result(arm, generations, Pooled.of(generations, stages), sum(part[2] for part in parts))
    return results


def losslessness(
    target: Target, prompts: Sequence[Sequence[int]], found: Result, plain: Result
) -> tuple[int, int, int]:
    """(identical, ties, mismatches) of greedy generations against plain decoding of the same prompts."""
    verdicts = [
        lossless_divergence(target, prompt, a, b)
        for prompt, a, b in zip(prompts, found.generations, plain.generations, strict=True)
    ]
    ties = sum(verdict is not None and verdict.tie for verdict in verdicts)
    wrong = sum(verdict is not None and not verdict.tie for verdict in verdicts)
    return len(verdicts) - ties - wrong, ties, wrong


def drift_count(target: Target, head: Any, prompts: Sequence[Sequence[int]], found: Result) -> tuple[int, int]:
    """(differing flags, of which ties) when greedy generations are re-scored by the training view."""
    differences = [
        d for prompt, g in zip(prompts, found.generations, strict=True) for d in drift(target, head, prompt, g)
    ]
    return len(differences), sum(d.tie for d in differences)


def bootstrap_difference(
    a: Sequence[Generation], b: Sequence[Generation] | None = None, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval over prompts of pooled acceptance of `a`, or of a - b on the same (paired) prompts."""
    random = np.random.default_rng(seed)
    picks = random.integers(0, len(a), (draws, len(a)))

    def pooled(generations: Sequence[Generation]) -> np.ndarray:
        accepted = np.array([g.drafts_accepted for g in generations], float)[picks].sum(1)
        return accepted / np.array([g.drafts_verified for g in generations], float)[picks].sum(1).clip(1)

    values = pooled(a) - (pooled(b) if b is not None else 0.0)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _one_quiet_thread() -> None:
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()  # the bar of all tasks is the parent's


def _decode(
    task: tuple[Subject, Arm, int, list[list[int]], int, int], models: _Models | None = None
) -> tuple[list[Generation], float]:
    subject, arm, start, prompts, max_new_tokens, seed = task
    began = time.perf_counter()
    generate = (models or _models(subject)).generator(arm.drafter)
    found = [
        generate(prompt, max_new_tokens, temperature=arm.temperature, seed=seed + start + i)
        for i, prompt in enumerate(prompts)
    ]
    return found, time.perf_counter() - began


class _Models:
    """Target, head and what decodes with them, made once."""

    def __init__(self, subject: Subject, target: Target) -> None:
        self.target, self.head = target, load_head(Path(subject.head), target)
        self.init_seed = subject.init_seed
        self._generators: dict[str, Callable[..., Generation]] = {}

    def generator(self, drafter: str) -> Callable[..., Generation]:
        if drafter not in self._generators:
            self._generators[drafter] = self._make(drafter)
        return self._generators[drafter]

    def _make(self, drafter: str) -> Callable[..., Generation]:
        if drafter == "plain":
            return lambda *args, **options: autoregressive_generate(self.target, *args, **options)
        if drafter == "prompt lookup":
            return SpdDecoder(self.target, PromptLookupDrafter(self.head.staircase, self.target.vocab_size)).generate
        head, config = self.head, self.head.config
        if drafter == "untrained head":
            head = new_head(
                self.target,
                config.num_layers,
                config.anchors,
                config.draft_token_ids,
                self.init_seed,
                config.kind,
                config.intermediate_size,
            )
        return SpdDecoder(self.target, head.eval()).generate


@lru_cache(maxsize=1)
def _models(subject: Subject) -> _Models:
    """The models of a process of its own."""
    return _Models(subject, load_target(subject.target, device=subject.device, loading=subject.loading))
