"""The parity fixture: inputs and the draft logits they must give, so that a head proves itself wherever it is loaded.

A few sequences of random anchor states with random restarts, and the logits of the training view in float32 at the last
positions. No target is needed to make or to check it, and another implementation of the head can be tested with it.
Keys: caseN.states [A, S, H] (one per anchor), caseN.restarts [r] (positions whose gap is n), caseN.positions [Q],
caseN.logits [Q, V_d].
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from spd_lightning.errors import InputError, first_line
from spd_lightning.head.layout import StaircaseLayout
from spd_lightning.head.module import SpeculationHead

FIXTURE_FILE = "parity_fixture.safetensors"
CASES, POSITIONS = 3, 4
#: Largest allowed difference, relative to the largest logit: kernels of other machines round otherwise.
TOLERANCE = 1e-4


def make_fixture(head: SpeculationHead, seed: int = 0) -> dict[str, Tensor]:
    """Inputs and expected logits of a head, whatever its dtype computed in float32."""
    config, random = head.config, torch.Generator().manual_seed(seed)
    length = head.staircase.num_stages + 8  # so that every depth occurs
    exact = _in_float32(head)
    tensors: dict[str, Tensor] = {}
    for case in range(CASES):
        states = torch.randn(len(config.anchors), length, config.hidden_size, generator=random)
        restarts = [0, *(torch.randperm(length - 1, generator=random)[:case] + 1).sort().values.tolist()]
        positions = torch.arange(length - POSITIONS, length)
        tensors |= {
            f"case{case}.states": states,
            f"case{case}.restarts": torch.tensor(restarts),
            f"case{case}.positions": positions,
            f"case{case}.logits": _logits(exact, states, restarts)[positions],
        }
    return tensors


def write_fixture(head: SpeculationHead, path: Path) -> None:
    """Write the fixture of a head as safetensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in make_fixture(head).items()}, path)


def check_fixture(head: SpeculationHead, path: Path) -> float:
    """The largest difference between what a head computes and what the fixture expects, relative to its largest logit.

    Raises:
        InputError: for an unreadable fixture, one of another head, or a difference beyond `TOLERANCE`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}): the file is missing or damaged.") from error
    exact, worst = _in_float32(head), 0.0
    shape = (len(head.config.anchors), head.config.hidden_size)
    for case in range(CASES):
        try:
            states, restarts, positions, expected = (
                tensors[f"case{case}.{name}"] for name in ("states", "restarts", "positions", "logits")
            )
            if (states.shape[0], states.shape[2]) != shape:
                raise InputError(f"{path} is the fixture of another head: states of shape {list(states.shape)}.")
            found = _logits(exact, states, restarts.tolist())[positions]
            apart = float((found - expected).abs().max() / expected.abs().max())
        except (KeyError, IndexError, RuntimeError) as error:
            raise InputError(f"{path} is no parity fixture of this head: {first_line(error)}") from error
        worst = max(worst, apart if apart == apart else float("inf"))
    if worst > TOLERANCE:
        raise InputError(
            f"{path}: the head's logits differ from the fixture by {worst:.2g} of the largest logit (allowed "
            f"{TOLERANCE:g}): the head is damaged, or computed otherwise than where it was exported."
        )
    return worst


def _in_float32(head: SpeculationHead) -> SpeculationHead:
    return copy.deepcopy(head).to(device="cpu", dtype=torch.float32).eval()


@torch.no_grad()
def _logits(head: SpeculationHead, states: Tensor, restarts: list[int]) -> Tensor:
    """[A, S, H] -> [S, V_d] by the readable attention, which every machine has."""
    layout = StaircaseLayout.from_restarts(head.staircase, [restarts], states.shape[1])
    return head.logits(head([state[None] for state in states], layout, dense=True))[0]
