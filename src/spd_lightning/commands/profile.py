"""The command profile: what the parts of a cycle cost on this machine, or on one that is described."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.models import add_target_flags, loading_of
from spd_lightning.commands.parsing import CommandParser
from spd_lightning.errors import InputError
from spd_lightning.processes import cores, started_here

if TYPE_CHECKING:
    from spd_lightning.speed.hardware import HardwareProfile

_ABOUT = """\
How long the parts of a pipeline's cycle take: each layer of the target, verification, the head's layers, W_k and draft
ids, and handing over between ranks. The file is what `plan --hardware` and `decoding.hardware` predict tokens per
second from. With --bandwidth nothing is run: every part is its bytes over the memory bandwidth, and the profile says
that it was computed."""

#: Of a machine that is described, where nothing else is said.
_ASSUMED = {"achieved": 0.7, "launch_ms": 0.06, "send_ms": 0.02, "latency_ms": 0.03, "tell_ms": 0.015}

_EXAMPLES = """\
examples
  spd-lightning profile --target tiny --output hardware.json                  on this machine, two ranks at once
  spd-lightning plan --config tiny --hardware hardware.json --acceptance 0.8  what to expect, and what to train
  spd-lightning profile --target Qwen/Qwen3-8B --bandwidth 3.35TB/s --output h100.json     not measured: computed

Measure on a quiet machine: what else runs is measured too. docs/speed.md has the formulas and how well they predict."""


def parser() -> CommandParser:
    """The arguments of profile."""
    made = CommandParser("spd-lightning profile", _ABOUT, _EXAMPLES)
    add_target_flags(made)
    made.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="the profile to write")
    measured = made.add_argument_group("measured")
    measured.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="ranks that are timed at once, each with the whole target; 1: no links (default: 2 where there are 2 GPUs "
        "or cores); also by torchrun, for links across machines",
    )
    measured.add_argument("--patience", type=float, default=60.0, metavar="S", help="a silent rank is lost after S s")
    measured.add_argument("--port", type=int, default=0, metavar="P", help="where ranks meet (default: a free port)")
    given = made.add_argument_group("computed", "from a description of the machine; only the target's config is read")
    given.add_argument("--bandwidth", metavar="RATE", help="of memory, such as 3.35TB/s or 40GB/s")
    given.add_argument("--achieved", type=float, metavar="SHARE", help=f"of it (default: {_ASSUMED['achieved']})")
    given.add_argument(
        "--launch-ms", type=float, metavar="MS", help=f"of a layer, beside its bytes (default: {_ASSUMED['launch_ms']})"
    )
    given.add_argument(
        "--send-ms", type=float, metavar="MS", help=f"busy handing over (default: {_ASSUMED['send_ms']})"
    )
    given.add_argument(
        "--latency-ms", type=float, metavar="MS", help=f"of a message (default: {_ASSUMED['latency_ms']})"
    )
    given.add_argument("--tell-ms", type=float, metavar="MS", help=f"of a verdict (default: {_ASSUMED['tell_ms']})")
    return made


def run(argv: list[str]) -> int:
    """`spd-lightning profile`."""
    from spd_lightning.decoding.launch import check_patience, launched, member

    options = parser().parse_args(argv)
    _check(options)
    check_patience(options.patience)
    if options.bandwidth is not None:
        return _write(_computed(options), options)
    layers = _config(options).get_text_config().num_hidden_layers
    if launched():
        if options.workers is not None and not started_here():
            raise InputError(f"--workers {options.workers}: torchrun has started the ranks. Leave it out.")
        with member(options.patience) as me:
            me.play(f"rank {me.rank}")
            profile = _measured(options, me.rank, me.world)
            return _write(profile, options) if me.rank == 0 else 0
    workers = options.workers or _workers(options)
    if workers > layers:
        raise InputError(f"--workers {workers}: expected at most {layers}, one for each layer of the target.")
    if workers == 1:
        return _write(_measured(options, 0, 1), options)
    from spd_lightning.decoding.workers import start_workers

    return start_workers(["profile", *argv], workers, options.patience, options.port)


def _check(options: Namespace) -> None:
    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers {options.workers}: expected at least 1.")
    if options.output.suffix != ".json":
        raise InputError(f"--output {options.output}: expected a name that ends in .json.")
    if not options.output.parent.is_dir():
        raise InputError(f"--output {options.output}: the folder {options.output.parent} does not exist.")
    unused = ("workers",) if options.bandwidth is not None else _ASSUMED
    for name in unused:
        if getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            why = "nothing runs with --bandwidth" if name == "workers" else "it belongs to --bandwidth"
            raise InputError(f"{flag} {getattr(options, name):g}: {why}. Leave it out.")
    for name, value in _ASSUMED.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not 0 < options.achieved <= 1:
        raise InputError(f"--achieved {options.achieved:g}: expected a share above 0 and up to 1.")
    for name in ("launch", "send", "latency", "tell"):
        value = getattr(options, f"{name}_ms")
        if not 0 <= value < 1e4:
            raise InputError(f"--{name}-ms {value:g}: expected milliseconds of at least 0.")
    if options.bandwidth is not None and options.quantization != "none":
        raise InputError(
            f"--quantization {options.quantization}: what unpacking weights costs follows from no bandwidth. Measure, "
            "without --bandwidth."
        )


def _workers(options: Namespace) -> int:
    """Two ranks, where each finds hardware of its own."""
    import torch

    gpu = torch.cuda.is_available() and (options.device or "cuda").startswith("cuda")
    return min(2, torch.cuda.device_count() if gpu else cores())


def _measured(options: Namespace, rank: int, world: int) -> HardwareProfile:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from spd_lightning.commands.ranks import rank_device
    from spd_lightning.speed.measure import measure_profile
    from spd_lightning.target.loading import load_target

    disable_progress_bar()
    loading = loading_of(options)
    device = rank_device(options.device, rank)
    if world == 1 and device.type == "cpu":
        torch.set_num_threads(1)  # what one of several ranks on these cores would have
    target = load_target(options.target, device=device, loading=loading)

    def say(what: str) -> None:
        if rank == 0:
            print(f"timing {what} ...", file=sys.stderr, flush=True)

    return measure_profile(target, options.target, rank, world, say)


def _computed(options: Namespace) -> HardwareProfile:
    from spd_lightning.commands.plan import parse_bytes
    from spd_lightning.speed.hardware import LinkCosts
    from spd_lightning.speed.roofline import WEIGHT_BYTES, Machine, roofline

    rate = options.bandwidth.strip().removesuffix("/s")
    machine = Machine(
        bandwidth=parse_bytes(rate, "--bandwidth"),
        achieved=options.achieved,
        launch_ms=options.launch_ms,
        link=LinkCosts(options.send_ms, options.latency_ms, options.tell_ms),
        name=f"{options.bandwidth} of memory bandwidth",
    )
    dtype = "bfloat16" if options.dtype == "auto" else options.dtype
    if dtype not in WEIGHT_BYTES:
        raise InputError(f"--dtype {dtype}: expected auto, {', '.join(WEIGHT_BYTES)}.")
    return roofline(_config(options), options.target, machine, dtype)


def _config(options: Namespace) -> Any:
    """The target's configuration; a computed profile asks for no weights."""
    from spd_lightning.target.loading import check_target

    return check_target(
        options.target, loading_of(options), lambda name: "--" + name.replace("_", "-"), options.bandwidth is None
    )


def _write(profile: HardwareProfile, options: Namespace) -> int:
    profile.write(options.output)
    _show(profile)
    print(f"written: {options.output}", file=sys.stderr)
    print(
        f"next: spd-lightning plan --config RECIPE --hardware {options.output} --acceptance 0.8 (or --run RUN)",
        file=sys.stderr,
    )
    return 0


def _show(profile: HardwareProfile) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    how = "measured" if profile.measured else "computed, not measured"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"{profile.target} on {profile.device}, {how}")
    table.add_column("one token")
    table.add_column("ms", justify="right")
    for name, value in _lines(profile):
        table.add_row(name, f"{value:.3f}")
    Console().print(table)


def _lines(profile: HardwareProfile) -> list[tuple[str, float]]:
    layers, head, link = profile.layers, profile.head, profile.link
    kinds: dict[float, int] = {}
    for value in layers:
        kinds[value] = kinds.get(value, 0) + 1
    lines = [("plain decoding, alone", profile.plain), ("embedding", profile.embedding)]
    lines += [(f"a layer ({count} of {len(layers)})", value) for value, count in kinds.items()]
    return [
        *lines, ("final norm, lm_head, verdict", profile.verification), ("head: each layer", head.layer),
        ("head: each H x H of its W_k", head.aggregation), ("head: each 1,000 draft ids", head.thousand_ids),
        ("head: the rest", head.fixed), ("link: busy handing over, per cycle", link.send),
        ("link: latency", link.latency), ("link: telling one rank a verdict", link.tell),
    ]  # fmt: skip
