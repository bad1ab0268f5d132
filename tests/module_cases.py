"""What tests of the Lightning module share: random samples, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from spd_lightning.data.batches import Batch, Share, collate
from spd_lightning.data.chat import Sample

VOCABULARY = 300


def random_samples(count: int, seed: int, longest: int = 24) -> list[Sample]:
    """Random tokens with two turns, of different lengths."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        length = draw.randint(12, longest)
        starts = (draw.randint(1, 4), draw.randint(7, 10))
        ids = np.array([draw.randrange(VOCABULARY) for _ in range(length)], np.int32)
        made.append(Sample(100 + number, ids, ((starts[0], starts[0] + 3), (starts[1], length))))
    return made


def padded(samples: Sequence[Sample], epoch: int = 0) -> Batch:
    """One sample per row; a global batch of its own."""
    return collate([[sample] for sample in samples], share=Share.of(samples, epoch=epoch))
