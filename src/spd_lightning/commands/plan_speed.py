"""The decoding side of plan: predicted tokens per second of every design, which to train, where the head shows."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.parsing import CommandParser
from spd_lightning.errors import InputError

if TYPE_CHECKING:
    from spd_lightning.speed.acceptance import Acceptance
    from spd_lightning.speed.hardware import HardwareProfile
    from spd_lightning.speed.model import Prediction

_DEEPEST = 16
_HEAD_LAYERS = (1, 2, 3, 4)


def add_speed_flags(parser: CommandParser) -> None:
    """What predicts the speed of decoding."""
    speed = parser.add_argument_group("decoding", "predicted tokens per second, where --hardware is given")
    speed.add_argument("--hardware", metavar="FILE", help="profile of the machine that decodes (spd-lightning profile)")
    speed.add_argument(
        "--acceptance",
        nargs="+",
        metavar="P",
        help="share of accepted drafts: 0.8 for every n, 4:0.83 8:0.81 per n, 8:0.9,0.85,0.8 by tokens in flight",
    )
    speed.add_argument("--run", nargs="+", type=Path, metavar="DIR", help="or as finished runs measured it")
    speed.add_argument("--stages", default=f"2-{_DEEPEST}", metavar="N-M", help=f"n to look at (default: 2-{_DEEPEST})")


@dataclass(frozen=True)
class Speed:
    """The decoding side of a plan.

    Attributes:
        predictions: of every design.
        head_layers: as configured.
    """

    profile: HardwareProfile
    acceptance: Acceptance
    predictions: Sequence[Prediction]
    head_layers: int

    def best(self, **fields: Any) -> Prediction | None:
        """The fastest design with these fields of `Design`."""
        found = [p for p in self.predictions if all(getattr(p.design, name) == value for name, value in fields.items())]
        return max(found, key=lambda p: p.tokens_per_second, default=None)

    @property
    def stages(self) -> list[int]:
        return sorted({p.design.num_stages for p in self.predictions})


def check_speed(options: Namespace) -> None:
    """Refuse flags that contradict each other."""
    if options.hardware is None:
        for name in ("acceptance", "run"):
            if getattr(options, name) is not None:
                raise InputError(f"--{name} says how many drafts are accepted; give --hardware too.")
        return
    if (options.acceptance is None) == (options.run is None):
        raise InputError("--hardware needs --acceptance P or --run DIR, one of them: how many drafts are accepted.")


def speed_of(
    options: Namespace, vocabulary: int, num_layers: int, head_layers: int, draft_ids: int, anchors: int | None
) -> Speed:
    """Predict every design.

    Args:
        vocabulary, num_layers: of the target.
        head_layers, draft_ids, anchors: as configured; other numbers of head layers are looked at too.
    """
    from spd_lightning.speed import acceptance
    from spd_lightning.speed.hardware import read_profile
    from spd_lightning.speed.model import designs, predict

    profile = read_profile(options.hardware, "--hardware")
    profile.check_fits(num_layers, vocabulary, f"--hardware {options.hardware}")
    known = acceptance.given(options.acceptance) if options.acceptance else acceptance.of_runs(options.run)
    stages = _stages(options.stages, num_layers)
    depths = sorted({*_HEAD_LAYERS, head_layers})
    made = list(designs(profile, stages, depths, draft_ids, anchors))
    return Speed(
        profile, known, [predict(profile, design, known.of(design.num_stages)) for design in made], head_layers
    )


def _stages(text: str, num_layers: int) -> list[int]:
    first, _, last = text.partition("-")
    if not first.isdigit() or (last and not last.isdigit()) or not 2 <= int(first) <= int(last or first) <= 64:
        raise InputError(f"--stages {text}: expected a range such as 2-16, from 2 to 64.")
    found = [n for n in range(int(first), int(last or first) + 1) if n <= num_layers]  # no stage without a layer
    if not found:
        raise InputError(f"--stages {text}: the target has {num_layers} layers, and a stage needs one.")
    return found


def fields_of(speed: Speed) -> dict[str, Any]:
    """For --json."""
    best = speed.best()
    return {
        "hardware": {
            "target": speed.profile.target,
            "device": speed.profile.device,
            "measured": speed.profile.measured,
        },
        "acceptance": speed.acceptance.origin,
        "designs": [asdict(prediction) for prediction in speed.predictions],
        "best": asdict(best) if best else None,
        "advice": advice(speed),
    }


def advice(speed: Speed) -> list[str]:
    """What to train, and where the head stops being hidden."""
    lines = []
    for alone in (False, True):
        best = speed.best(head_alone=alone, head_layers=speed.head_layers)
        if best is None:
            continue
        design = best.design
        ranks = design.num_stages + alone
        lines.append(
            f"{ranks} ranks, head {'alone' if alone else 'beside stage 0'}: train model.num_stages="
            f"{design.num_stages}, model.stage_layers={list(design.stage_layers)}: {best.tokens_per_second:,.1f} "
            f"tokens/s, {best.speedup:.2f} x plain decoding on one rank."
        )
    lines.append(_hidden(speed))
    return lines


def _hidden(speed: Speed) -> str:
    alone = [speed.best(num_stages=n, head_alone=True, head_layers=speed.head_layers) for n in speed.stages]
    showing = [p.design.num_stages for p in alone if p is not None and not p.head_hidden]
    layers = f"{speed.head_layers} head layer{'s' if speed.head_layers > 1 else ''}"
    if not showing:
        return f"On a rank of its own a head with {layers} stays hidden behind a stage at every n that was looked at."
    if len(showing) == len(speed.stages):
        return f"Even on a rank of its own a head with {layers} is slower than a stage at every n: it sets the cycle."
    n = min(showing)
    return f"On a rank of its own a head with {layers} stops being hidden at n = {n}: from there it sets the cycle."


def tables(speed: Speed) -> Iterable[Any]:
    """Tables for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    how = "" if speed.profile.measured else " (a computed profile)"
    title = (
        f"Predicted tokens/s on {speed.profile.device}{how}; acceptance {speed.acceptance.origin}; "
        f"plain decoding {1e3 / speed.profile.plain:,.1f}"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title)
    for name in ("n", "p", "S", "head ms", "stage ms", "beside", "x", "alone", "x", "split"):
        table.add_column(name, justify="left" if name == "split" else "right", no_wrap=name != "split")
    best = speed.best(head_layers=speed.head_layers)
    for n in speed.stages:
        beside, alone = (speed.best(num_stages=n, head_alone=a, head_layers=speed.head_layers) for a in (False, True))
        assert beside is not None and alone is not None
        table.add_row(
            f"{n}{'~' if speed.acceptance.assumed(n) else ''}",
            f"{alone.acceptance:.2f}",
            f"{alone.S:.2f}",
            f"{alone.head_ms:.2f}{'' if alone.head_hidden else '!'}",
            f"{alone.stage_ms:.2f}",
            *(cell for p in (beside, alone) for cell in (f"{p.tokens_per_second:,.1f}", f"{p.speedup:.2f}")),
            " | ".join(dict.fromkeys(short_split(p.design.stage_layers) for p in (beside, alone))),
            style="bold" if best in (beside, alone) else None,
        )
    table.caption = (
        "beside: head on stage 0's rank, n ranks; alone: n + 1 ranks; x: over plain decoding on one rank\n"
        "split: layers of the stages, where the head is beside | alone\n"
        "~ acceptance assumed from other n   ! not hidden: it makes cycles longer"
    )
    yield table
    yield _by_depth(speed)


def short_split(stage_layers: Sequence[int]) -> str:
    """[5, 4, 4, 4, 3] as 5 3x4 3."""
    runs: list[list[int]] = []
    for layers in stage_layers:
        if runs and runs[-1][1] == layers:
            runs[-1][0] += 1
        else:
            runs.append([1, layers])
    return " ".join(f"{count}x{layers}" if count > 1 else str(layers) for count, layers in runs)


def _by_depth(speed: Speed) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    depths = sorted({p.design.head_layers for p in speed.predictions})
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="by head layers, at the same acceptance (beside / alone)")
    table.add_column("n", justify="right")
    for depth in depths:
        table.add_column(f"{depth}", justify="right")
    for n in speed.stages:
        pairs = [[speed.best(num_stages=n, head_layers=d, head_alone=a) for a in (False, True)] for d in depths]
        table.add_row(str(n), *(" / ".join(f"{p.tokens_per_second:,.1f}" for p in pair if p) for pair in pairs))
    return table
