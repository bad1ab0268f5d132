"""Commands on several ranks: flags, start of the processes, and what each rank loads."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.models import check_tree
from spd_lightning.commands.parsing import CommandParser
from spd_lightning.errors import InputError
from spd_lightning.files import write_whole

if TYPE_CHECKING:
    from spd_lightning.commands.models import Models
    from spd_lightning.decoding.launch import Member
    from spd_lightning.decoding.pipeline import PipelineDecoder
    from spd_lightning.decoding.trace import Span


def add_rank_flags(parser: CommandParser) -> None:
    """How the pipeline runs on several processes."""
    ranks = parser.add_argument_group(
        "parallel stages", "one process per stage; also by torchrun --nproc-per-node N -m spd_lightning ..."
    )
    ranks.add_argument(
        "--workers", type=int, metavar="N", help="start N local processes: one per stage, one more for the head alone"
    )
    ranks.add_argument("--patience", type=float, default=60.0, metavar="S", help="a rank silent for S seconds is lost")
    ranks.add_argument("--port", type=int, default=0, metavar="P", help="where workers meet (default: a free port)")
    ranks.add_argument(
        "--prefill-chunk", type=int, default=256, metavar="N", help="prompt positions per piece (default: 256)"
    )
    ranks.add_argument("--trace", type=Path, metavar="FILE.json", help="what every rank did when, and a .png beside it")


def on_ranks(command: str, argv: Sequence[str], options: Namespace, run: Callable[[Member | None], int]) -> int:
    """Run a command here, or as one of several ranks, or start them.

    Raises:
        InputError: for flags that contradict each other.
    """
    from spd_lightning.decoding.launch import check_patience, launched, member
    from spd_lightning.processes import started_here

    check_patience(options.patience)
    if options.workers is not None and options.workers < 2:
        raise InputError(f"--workers {options.workers}: expected at least 2, one per stage.")
    if options.trace is not None and options.trace.suffix != ".json":
        raise InputError(f"--trace {options.trace}: expected a name that ends in .json; a .png is put beside it.")
    if options.trace is not None and not options.trace.parent.is_dir():
        raise InputError(f"--trace {options.trace}: the folder {options.trace.parent} does not exist.")
    if options.workers is not None and launched() and not started_here():
        raise InputError(f"--workers {options.workers}: a launcher has started ranks already: leave --workers out.")
    check_tree(options, launched() or options.workers is not None)  # before any process is started
    if not launched():
        if options.workers is not None:
            from spd_lightning.decoding.workers import start_workers

            _check_workers(options)
            return start_workers([command, *argv], options.workers, options.patience, options.port)
        if options.trace is not None:
            raise InputError(f"--trace {options.trace} shows ranks at work: give --workers N, or start by torchrun.")
        return run(None)
    if options.head is None:
        raise InputError("several ranks are a pipeline, and a pipeline needs a head: give --head.")
    with member(options.patience) as me:
        return run(me)


def _check_workers(options: Namespace) -> None:
    """Find a wrong number of workers before any process is started, where the head can be read so early."""
    from spd_lightning.decoding.topology import Roles
    from spd_lightning.head.folder import CONFIG_FILE
    from spd_lightning.head.loading import find_head

    if options.head is None:
        raise InputError("--workers runs a pipeline, and a pipeline needs a head: give --head.")
    found, layers = find_head(options.head), None
    if found.kind == "folder":
        with suppress(OSError, ValueError, AttributeError):  # a damaged head is told of by those who load it
            layers = json.loads((found.path / CONFIG_FILE).read_text()).get("stage_layers")
        if isinstance(layers, list) and layers:
            Roles(len(layers), tuple(range(options.workers)))


def load_rank(options: Namespace, me: Member, whole: bool) -> Models:
    """What this rank needs of tokenizer, target and head.

    Args:
        whole: whether the leading rank keeps the whole target, for baselines.
    """
    from transformers.utils.logging import disable_progress_bar

    from spd_lightning.commands.models import Models, loading_of
    from spd_lightning.decoding.pipeline import PipelineDecoder
    from spd_lightning.decoding.topology import Roles
    from spd_lightning.head.digest import weights_digest
    from spd_lightning.head.loading import check_fits, find_head, read_source
    from spd_lightning.target.loading import load_target, load_tokenizer
    from spd_lightning.target.stage_loading import load_stage
    from spd_lightning.target.target import check_head_fits

    disable_progress_bar()
    device, loading = rank_device(options.device, me.rank), loading_of(options)
    found = find_head(options.head)
    if found.kind == "version 11":
        raise InputError(f"--head {options.head}: turn it into a folder first (spd-lightning import).")
    head = read_source(found)
    roles = Roles(head.staircase.num_stages, tuple(range(me.world)))
    if options.num_stages is not None and options.num_stages != roles.num_stages:
        raise InputError(f"--num-stages {options.num_stages}: the head has {roles.num_stages} stages.")
    me.play(roles.name(me.rank))
    leads, drafts = me.rank == roles.last, me.rank == roles.head
    layers, digest = head.staircase.stage_layers, weights_digest(head)
    if leads and whole:
        target = load_target(options.target, stage_layers=layers, device=device, loading=loading)
    else:
        stage = roles.stage_of(me.rank)
        target = load_stage(options.target, layers, stage, me.rank in (roles.first, roles.head), None, device, loading)
    if leads:
        check_fits(head, target)
    else:
        check_head_fits(target, head.staircase, head.config.hidden_size, head.config.vocab_size)
    if drafts or whole and leads:
        head = head.to(device=device, dtype=target.dtype).eval()
    else:  # this rank needs sizes and draft ids, no weights
        head = head.to("meta")
        head.make_tables()
    tokenizer = load_tokenizer(options.target, loading)
    decoder = PipelineDecoder(
        target,
        head,
        prefill_chunk=options.prefill_chunk,
        traced=options.trace is not None,
        names=_names(options, digest),
        on_state=lambda state: setattr(me, "state", state),
    )
    return Models(tokenizer, target, head, decoder)


def rank_device(wanted: str | None, rank: int) -> Any:
    """The device of this rank: a GPU of its own where GPUs are wanted and there.

    Args:
        wanted: --device.
    """
    import torch

    from spd_lightning.commands.models import torch_device

    if not torch.cuda.is_available() or not (wanted or "cuda").startswith("cuda"):
        return torch_device(wanted or "cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise InputError(
            f"rank {rank} has no GPU of its own ({torch.cuda.device_count()} on this machine): start fewer "
            "ranks, or set --device cpu."
        )
    torch.cuda.set_device(local)
    return torch_device(f"cuda:{local}")


def _names(options: Namespace, head_digest: str) -> dict[str, str]:
    """What tells files of this rank from those of another."""
    from spd_lightning.target.loading import embedded_target_path
    from spd_lightning.target.samples import sampled_digest

    folder = embedded_target_path() if options.target == "tiny" else Path(options.target)
    weights = {"target's weights": sampled_digest(folder)} if folder.is_dir() else {}
    return {"head": head_digest, **weights}


def follow(decoder: PipelineDecoder) -> int:
    """What every rank does that does not lead."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all ranks; the leader and its parent act upon it
    decoder.follow()
    return 0


def finish(decoder: PipelineDecoder, options: Namespace) -> None:
    """The leader's last act: free the others; write the trace that was asked for."""
    from spd_lightning.decoding.trace import breakdown, chrome_trace

    spans = decoder.close()
    if options.trace is None:
        return
    if not decoder.cycles:
        print(f"--trace {options.trace}: nothing was written, because no cycle ran.", file=sys.stderr)
        return
    write_whole(options.trace, json.dumps(chrome_trace(spans, decoder.roles.names)), "--trace")
    parts = breakdown(spans, decoder.cycles)
    print(parts.table(decoder.roles.names), describe(parts, decoder.roles.names), sep="\n", file=sys.stderr)
    print(
        f"written: {options.trace} (open it in https://ui.perfetto.dev)" + _picture(options, spans, decoder),
        file=sys.stderr,
    )


def describe(parts: Any, names: dict[int, str]) -> str:
    """One line: cycle, slowest rank, slack of the head, bubbles."""
    rank, busy = parts.slowest
    slack = "" if parts.head_slack_ms is None else f"; the head could take {parts.head_slack_ms:.3f} ms longer"
    return (
        f"cycle {parts.cycle_ms:.3f} ms; {names[rank]} is busy longest, {busy:.3f} ms{slack}; "
        f"{parts.bubble_share:.0%} of all ranks' time is idle"
    )


def _picture(options: Namespace, spans: Sequence[Span], decoder: PipelineDecoder) -> str:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return "; no picture: matplotlib is not installed"
    from spd_lightning.report.timeline import plot_timeline

    path = options.trace.with_suffix(".png")
    plot_timeline(spans, decoder.roles.names, path)
    return f", {path}"
