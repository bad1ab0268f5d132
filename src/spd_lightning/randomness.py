"""Counter-based randomness: a draw is a function of what it is for, never of what was drawn before.

Two engines, a resumed run or another number of ranks therefore agree on every draw without exchanging any state.
The generator is Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) from NumPy.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_MASK64 = (1 << 64) - 1


class Purpose(IntEnum):
    """What a draw decides. A purpose of its own keeps two decisions about the same token independent."""

    TARGET = 0  # a token drawn from the target's own distribution
    DRAFT = 1  # a token drawn from the head's distribution
    ACCEPT = 2  # whether the verified draft is kept
    RESIDUAL = 3  # the correction after a rejection
    RESTART = 4  # the restarts of a training sequence
    ORDER = 5  # the order of training samples
    COIN = 6  # simulated acceptance
    MIX = 7  # which conversations of a weighted source an epoch shows, and the order of streamed sources
    CERTIFICATE = 8  # seeds and uniform numbers of the lossless certificate
    SHARED = 9  # noise of a position that its drafts and the target's own token share


def philox(seed: int, purpose: Purpose, *counters: int) -> np.random.Philox:
    """The Philox stream of (seed, purpose) at up to three counters; the fourth counter word runs inside the stream."""
    words = [0, *(int(counter) & _MASK64 for counter in counters)]
    if len(words) > 4:
        raise ValueError(f"at most three counters fit a Philox stream, got {counters}")
    words += [0] * (4 - len(words))
    return np.random.Philox(counter=np.array(words, np.uint64), key=np.array([seed & _MASK64, purpose], np.uint64))


def uniform(seed: int, purpose: Purpose, position: int, attempt: int) -> float:
    """One number in [0, 1) for the `attempt`-th time that `position` is decided for this purpose."""
    return (int(philox(seed, purpose, position, attempt).random_raw()) >> 11) * 2.0**-53


def gumbel(seed: int, position: int, size: int) -> np.ndarray:
    """[size] Gumbel noise of a position: argmax of log p plus it is a draw from p, whatever p is."""
    numbers = generator(seed, Purpose.SHARED, position).random(size)
    return -np.log(-np.log(np.maximum(numbers, 2.0**-53)))


def generator(seed: int, purpose: Purpose, *counters: int) -> np.random.Generator:
    """A NumPy generator for many numbers of one (seed, purpose, counters), such as the restarts of one sample."""
    return np.random.Generator(philox(seed, purpose, *counters))
