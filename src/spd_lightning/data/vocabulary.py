"""Choose a draft vocabulary: which ids a head may propose, counted on what it is trained to draft.

A draft outside the vocabulary cannot be made, so the target's token is rejected there for certain; a smaller lm_head
is read faster. What is counted are the labels that are drafted: all tokens of an assistant turn but its first.

Shapes: V ids of the target's vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from spd_lightning.data.store import TokenStore
from spd_lightning.errors import InputError
from spd_lightning.files import write_whole

#: Table sizes: this and its doubles, but no more of them than fit on a screen.
SMALLEST, MOST_SIZES = 256, 9


def label_counts(store: TokenStore, vocab_size: int) -> np.ndarray:
    """[V] int64: how often each id is a drafted label. Memory holds one batch of the mapped file at a time.

    Raises:
        InputError: for ids outside the vocabulary.
    """
    import pyarrow

    largest = int(store.manifest["largest_token"])
    if largest >= vocab_size:
        raise InputError(
            f"--tokenizer {store.manifest['tokenizer']} makes id {largest}, but the vocabulary has {vocab_size} ids: "
            "expected the tokenizer of --target."
        )
    counts = np.zeros(vocab_size, np.int64)
    with pyarrow.memory_map(str(store.path / "samples.arrow")) as mapped:
        for batch in pyarrow.ipc.open_stream(mapped):
            counts += np.bincount(_drafted(batch), minlength=vocab_size)
    return counts


def _drafted(batch: Any) -> np.ndarray:
    """Ids of the drafted labels of an Arrow batch of samples."""
    ids, turns = batch.column("ids"), batch.column("turns")
    turns_of_each = np.diff(turns.offsets.to_numpy()) // 2
    first_tokens = np.repeat(ids.offsets.to_numpy()[:-1], turns_of_each)
    bounds = turns.values.to_numpy().reshape(-1, 2) + first_tokens[:, None]
    values = ids.values.to_numpy()
    change = np.zeros(len(values) + 1, np.int64)
    np.add.at(change, bounds[:, 0] + 1, 1)  # a turn's first token comes from the target
    np.add.at(change, bounds[:, 1], -1)
    return np.asarray(values[np.cumsum(change[:-1]) > 0])


def ranking(counts: np.ndarray, always: Iterable[int]) -> np.ndarray:
    """[V] ids in the order in which a vocabulary takes them: `always`, then the most frequent; ties by id."""
    later = np.ones(len(counts), bool)
    later[list(always)] = False
    return np.lexsort((-counts, later))  # stable, so that ties stay in the order of ids


def size_for_coverage(counts: np.ndarray, order: np.ndarray, coverage: float) -> int:
    """The fewest ids of `order` that cover this share (0, 1] of the counted labels."""
    covered = np.cumsum(counts[order])
    # as written, not as its binary neighbour: 0.07 of 100 labels are 7, not 8
    needed = math.ceil(Fraction(str(coverage)) * int(covered[-1]))
    return int(np.searchsorted(covered, needed)) + 1


def check_size(size: int, always: Sequence[int], vocab_size: int) -> None:
    """InputError where a vocabulary cannot have `size` ids."""
    if size > vocab_size:
        raise InputError(f"--size {size}: expected at most {vocab_size}, the ids of the whole vocabulary.")
    if size < len(always):
        raise InputError(f"--size {size}: expected at least {len(always)}, the special tokens, which are always in.")


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """The first `size` ids of a ranking, and the counts of both sides of the split.

    Attributes:
        order: [V] all ids as `ranking` orders them.
        size: how many of them a head can propose.
        train, heldout: [V] counts of the labels; neither is all zeros.
    """

    order: np.ndarray
    size: int
    train: np.ndarray
    heldout: np.ndarray

    @property
    def token_ids(self) -> np.ndarray:
        """[size] ascending."""
        return np.sort(self.order[: self.size])

    def coverage(self, size: int | None = None) -> tuple[float, float]:
        """Share of the training and of the held-out labels that the first `size` ids cover; None: the chosen size."""
        taken = self.order[: self.size if size is None else size]
        train, heldout = (float(each[taken].sum() / each.sum()) for each in (self.train, self.heldout))
        return train, heldout


def table_sizes(vocab_size: int, least: int, chosen: int) -> list[int]:
    """Sizes worth comparing, ascending: powers of two from `least` on, the chosen one, and the whole vocabulary."""
    powers = [SMALLEST << k for k in range(vocab_size.bit_length()) if least <= SMALLEST << k < vocab_size]
    return sorted({*powers[-MOST_SIZES:], chosen, vocab_size})


def constant_speedup(num_stages: int, acceptance: float) -> float:
    """Theoretical speedup S of a long run in which each draft is accepted with the same probability."""
    return num_stages / (1 + (num_stages - 1) * (1 - acceptance))


@dataclass(frozen=True)
class Timing:
    """Median seconds of one draft's lm_head by vocabulary size, and the threads it ran on."""

    seconds: Mapping[int, float]
    threads: int


def time_lm_head(hidden_size: int, sizes: Sequence[int], budget: float = 3.0) -> Timing | None:
    """Measure [1, H] x [H, size] in float32 on this machine's CPU.

    Sizes take turns, so that other work on the machine falls on all of them alike.

    Args:
        hidden_size: H.
        sizes: ascending.
        budget: seconds after which no further round begins; there are at least 5 and at most 200.

    Returns:
        None where the largest matrix would fill more than half of the free memory.
    """
    import torch

    if 4 * hidden_size * sizes[-1] > _free_memory() / 2:
        return None
    with torch.inference_mode():
        weight = torch.full((sizes[-1], hidden_size), 0.01)  # written, as unwritten pages would all be one
        feature = torch.ones(1, hidden_size)
        found: dict[int, list[float]] = {size: [] for size in sizes}
        end = time.perf_counter() + budget
        for number in range(201):
            for size, seconds in found.items():
                began = time.perf_counter()
                torch.nn.functional.linear(feature, weight[:size])
                seconds.append(time.perf_counter() - began)
            if number >= 5 and time.perf_counter() > end:
                break
    return Timing({size: median(seconds[1:]) for size, seconds in found.items()}, torch.get_num_threads())


def _free_memory() -> float:
    """Bytes; infinite where the system does not say."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def write_vocabulary(path: Path, vocabulary: DraftVocabulary, provenance: Mapping[str, Any]) -> None:
    """Write what `read_draft_vocabulary` reads, under a temporary name first.

    Args:
        path: the JSON file.
        vocabulary: what was chosen.
        provenance: what it was counted on, and by what.
    """
    token_ids = vocabulary.token_ids
    content = {
        "vocab_size": len(vocabulary.order),
        "size": vocabulary.size,
        "coverage": dict(zip(("train", "heldout"), vocabulary.coverage(), strict=True)),
        "provenance": dict(provenance),
        "token_ids": token_ids.tolist(),
        "counts": vocabulary.train[token_ids].tolist(),
    }
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value, default=str)}" for name, value in content.items())
    write_whole(path, f"{{\n{lines}\n}}\n", "--out")
