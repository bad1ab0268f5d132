"""The command plan: what each rank of a run will hold in memory, and how fast its head would decode.

It reads recipes as fit does, but by `merging` and not by fit's parser. What fit refuses is fit's business; here only
what the plan depends on is checked.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.fit import SECTIONS, check_arguments, check_files, config_files, resolve_config_names
from spd_lightning.commands.merging import Config, merged
from spd_lightning.commands.parsing import CommandParser, did_you_mean
from spd_lightning.commands.plan_speed import Speed, add_speed_flags, check_speed, fields_of, speed_of, tables
from spd_lightning.commands.plan_speed import advice as speed_advice
from spd_lightning.errors import InputError

if TYPE_CHECKING:
    from spd_lightning.memory.ranks import Job, RankMemory, Strategy

_ABOUT = """\
What each rank (GPU) of a training run will hold, computed before the run: the frozen target, the head's weights,
gradients and optimizer state, and what a step needs, for DDP and every ZeRO stage; whether it fits, and the largest
batch size that does. Nothing is loaded or allocated: of the target only config.json is read.
With --hardware also the decoding side: predicted tokens per second for n = 2..16, heads of 1 to 4 layers, even and
uneven splits, the head beside stage 0 or on its own rank; which to train, and where the head stops being hidden."""

_EXAMPLES = """\
examples
  spd-lightning plan --config llama31                                    on the devices that the recipe names
  spd-lightning plan --config llama31_70b --gpus 16 --nodes 2 --gpu-memory 80GB
  spd-lightning plan --config llama31 --model.activation_checkpointing true --data.batch_size 8
  spd-lightning plan --config tiny --device cpu --json
  spd-lightning plan --config tiny --device cpu --hardware cpu_tiny --run runs/tiny         predicted tokens/s
  spd-lightning plan --config llama31 --gpus 8 --hardware h100.json --acceptance 4:0.83 8:0.81 16:0.78

Recipes, overlays and --SECTION.FIELD VALUE as in fit. 1 GB is 10^9 bytes, 1 GiB 2^30. Counted is a full batch of the
configured length in the worst moment of a step; docs/memory.md says what that is, and how plans compare with
measurements; docs/speed.md has the formulas of the decoding side. The exit status is 0 also if nothing fits."""

_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
#: Ids of the draft vocabulary that is tried where nothing fits.
SMALL_VOCABULARY = 32_000


def parser() -> CommandParser:
    """The arguments of plan itself; recipes and fields are read as fit reads them."""
    made = CommandParser("spd-lightning plan", _ABOUT, _EXAMPLES)
    made.usage = "spd-lightning plan --config RECIPE [--gpus N] [--gpu-memory SIZE] [--SECTION.FIELD VALUE ...]"
    made.add_argument("--gpus", type=int, metavar="N", help="ranks in all; default: the recipe's devices and nodes")
    made.add_argument("--nodes", type=int, metavar="N", help="machines they are spread over; default: the recipe's")
    made.add_argument("--gpu-memory", default="80GB", metavar="SIZE", help="of each GPU, such as 80GB, 141GB, 24GiB")
    made.add_argument("--device", choices=("cuda", "cpu"), help="cpu: processes and their resident memory")
    made.add_argument(
        "--supervised", type=float, default=1.0, metavar="SHARE", help="of the positions feeds the loss (default: 1)"
    )
    made.add_argument("--json", action="store_true", help="print the plan as JSON")
    add_speed_flags(made)
    return made


@dataclass(frozen=True)
class Asked:
    """What a plan is made for.

    Attributes:
        job: the run.
        strategy, batch_size: as configured.
        memory: bytes per rank.
    """

    job: Job
    strategy: Strategy
    batch_size: int
    memory: int


def run(argv: list[str]) -> int:
    """`spd-lightning plan`."""
    options, rest = parser().parse_known_args(argv)
    _check(options)
    if not rest:
        raise InputError(
            "spd-lightning plan needs a configuration, for example --config llama31. See spd-lightning plan --help"
        )
    _check_words(rest)
    arguments = resolve_config_names(rest)
    files = config_files(arguments)
    check_files(files)
    check_arguments(arguments, files)
    memory = parse_bytes(options.gpu_memory, "--gpu-memory")
    config = Config(merged(arguments, files))
    asked = asked_of(config, options, memory)
    speed = None
    if options.hardware is not None:
        head, anchors = asked.job.head, config["model.head.anchors"]
        layers = sum(head.staircase.stage_layers)
        speed = speed_of(
            options, asked.job.target.V, layers, head.num_layers, head.V_d, len(anchors) if anchors else None
        )
    return _report(asked, speed, as_json=options.json)


# -- arguments -------------------------------------------------------------------------------------------------------


def _check(options: Namespace) -> None:
    for name in ("gpus", "nodes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected at least 1.")
    check_speed(options)
    if not 0 < options.supervised <= 1:
        raise InputError(f"--supervised {options.supervised}: expected a share above 0 and up to 1.")


def _check_words(words: Sequence[str]) -> None:
    """Refuse flags of plan that are misspelt; the sections are checked as in fit."""
    own = [option for action in parser()._actions for option in action.option_strings]
    for word in words:
        flag = word.partition("=")[0]
        if word.startswith("--") and "." not in flag and flag[2:] not in (*SECTIONS, "config"):
            raise InputError(f"unknown argument {flag}.{did_you_mean(flag, own)} See spd-lightning plan --help")


def parse_bytes(text: str, flag: str) -> int:
    """80GB, 24 GiB, 512MB as bytes; InputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]) > 0:
        raise InputError(f"{flag} {text}: expected a size such as 80GB or 24GiB.")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** ("KMGT".index(found[2].upper()) + 1))


# -- what is planned -------------------------------------------------------------------------------------------------


def asked_of(config: Config, options: Namespace, memory: int) -> Asked:
    """The run that a configuration describes, on the machines that the flags describe."""
    from spd_lightning.memory.ranks import STRATEGIES, Job

    cuda = _device(config, options) == "cuda"
    nodes = options.nodes or config.integer("trainer.num_nodes")
    ranks = options.gpus or _devices(config) * nodes
    if ranks % nodes:
        raise InputError(f"--gpus {ranks}: expected a multiple of --nodes {nodes} (trainer.num_nodes).")
    rate = config["model.restart_rate"]
    if not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise InputError(f"model.restart_rate={rate!r}: expected a number from 0 to 1.")
    head, target, packed = _models(config)
    job = Job(
        head=head,
        target=target,
        length=config.integer("data.max_length"),
        ranks=ranks,
        ranks_per_node=ranks // nodes,
        cuda=cuda,
        precision=_precision(config, cuda),
        target_bytes=None if config["model.loading.dtype"] in ("auto", None) else _target_bytes(config),
        quantised_bytes=_quantised(config),
        loss_chunk=config.integer("model.loss_chunk"),
        checkpointing=config.truth("model.activation_checkpointing"),
        restart_rate=rate,
        restart_draws=config.integer("model.restart_draws"),
        accumulate=_accumulated(config, ranks),
        supervised=options.supervised,
        packed=packed,
    )
    name = str(config["trainer.strategy"])
    name = {"auto": "ddp", "deepspeed": "deepspeed_stage_2"}.get(name, name)
    known = {strategy.name: strategy for strategy in STRATEGIES}
    if name not in known:
        raise InputError(
            f"trainer.strategy={name!r}: a plan knows auto, {', '.join(known)}.{did_you_mean(name, known)}"
        )
    return Asked(job, known[name], config.integer("data.batch_size"), memory)


def _device(config: Config, options: Namespace) -> str:
    if options.device is not None:
        return str(options.device)
    return "cpu" if config["trainer.accelerator"] == "cpu" else "cuda"


def _devices(config: Config) -> int:
    devices = config["trainer.devices"]
    if devices in ("auto", None, -1, "-1"):
        raise InputError(f"trainer.devices={devices!r} depends on the machine: say how many with --gpus.")
    return len(devices) if isinstance(devices, list) else config.integer("trainer.devices")


def _precision(config: Config, cuda: bool) -> str:
    precision = config["trainer.precision"]
    if precision is None:
        return "bf16-mixed" if cuda else "32-true"
    name = _PRECISIONS.get(str(precision), str(precision))
    known = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")
    if name not in known:
        raise InputError(f"trainer.precision={precision!r}: expected {', '.join(known)}.{did_you_mean(name, known)}")
    return name


def _accumulated(config: Config, ranks: int) -> int:
    """Micro-batches per optimizer step."""
    if config["data.global_batch_size"] is None:
        return config.integer("trainer.accumulate_grad_batches")
    return max(1, config.integer("data.global_batch_size") // (config.integer("data.batch_size") * ranks))


def _target_bytes(config: Config) -> int:
    return _BYTES[config.choice("model.loading.dtype", tuple(_BYTES))]


def _quantised(config: Config) -> int | None:
    """Twice the bytes per weight: a weight of 4 bits is half a byte."""
    return {"none": None, "8bit": 2, "4bit": 1}[config.choice("model.loading.quantization", ("none", "8bit", "4bit"))]


def _models(config: Config) -> tuple[Any, Any, bool]:
    """Sizes of head and target, and whether rows are packed."""
    from spd_lightning.head.loading import head_config
    from spd_lightning.head.vocabulary import read_draft_vocabulary
    from spd_lightning.memory.shapes import shape_of_head, shape_of_target
    from spd_lightning.staircase import resolve_stage_layers
    from spd_lightning.target.families import packing_refusal
    from spd_lightning.target.sizes import weightless_target

    found = _target_config(config)
    text = found.get_text_config()
    by_hand = config["model.stage_layers"]
    stages = resolve_stage_layers(
        text.num_hidden_layers, config["model.num_stages"], None if by_hand == "auto" else by_hand
    )
    vocabulary = config["model.head.draft_vocabulary"]
    target = weightless_target(found, stages)
    ids = None
    if vocabulary is not None:
        ids = read_draft_vocabulary(vocabulary, target.vocab_size, "model.head.draft_vocabulary")
    head = head_config(
        target,
        config.integer("model.head.num_layers"),
        config["model.head.anchors"],
        ids,
        str(config["model.head.kind"]),
        config["model.head.intermediate_size"],
    )
    kernel = config["model.loading.attention"]
    packing = config["data.packing"]
    refused = packing_refusal(text, None if kernel == "auto" else kernel) is not None
    return shape_of_head(head), shape_of_target(target), packing is True or (packing == "auto" and not refused)


def _target_config(config: Config) -> Any:
    """The target's configuration: of a hub id, a folder, or a folder that holds config.json alone."""
    from spd_lightning.target.loading import Loading, check_target

    name = config["model.target"]
    loading = Loading(
        revision=config["model.loading.revision"],
        offline=config.truth("model.loading.offline"),
        trust_remote_code=config.truth("model.loading.trust_remote_code"),
    )
    return check_target(name, loading=loading, named="model.loading.{}".format, needs_weights=False)


# -- advice ----------------------------------------------------------------------------------------------------------


def advice(asked: Asked, largest: Mapping[str, int]) -> str:
    """What to set, in one line.

    Args:
        largest: the largest batch size that fits, by strategy.
    """
    most = largest[asked.strategy.name]
    if most >= asked.batch_size:
        room = f"; up to data.batch_size={most} would" if most > asked.batch_size else ""
        return (
            f"It fits as configured: trainer.strategy={asked.strategy.name}, data.batch_size={asked.batch_size}{room}."
        )
    if whole := [name for name, size in largest.items() if size >= asked.batch_size]:
        smaller = f", or data.batch_size={most}" if most else ""
        return f"Set trainer.strategy={whole[0]}{smaller}."
    if most:
        return f"Set data.batch_size={most}, and trainer.accumulate_grad_batches higher in proportion."
    if some := [name for name, size in largest.items() if size]:
        return f"Set trainer.strategy={some[0]} and data.batch_size={largest[some[0]]}."
    return f"Nothing fits. {_rescue(asked)}"


def _rescue(asked: Asked) -> str:
    """What would make something fit that does not as configured: the first of a few changes, or that there is none."""
    from spd_lightning.memory.ranks import STRATEGIES, largest_batch

    job = asked.job
    changes: list[tuple[str, Job]] = []
    lighter = replace(job, checkpointing=True)
    if not job.checkpointing:
        changes.append(("model.activation_checkpointing=true", lighter))
    if job.head.V_d > SMALL_VOCABULARY:
        saved = (job.head.V_d - SMALL_VOCABULARY) * job.head.H
        parameters = list(job.head.parameters)
        parameters[parameters.index(job.head.lm_head)] -= saved
        smaller = replace(job.head, V_d=SMALL_VOCABULARY, parameters=tuple(parameters))
        words = f"a model.head.draft_vocabulary of {SMALL_VOCABULARY} ids"
        changes.append((words, replace(job, head=smaller)))
        changes.append((f"model.activation_checkpointing=true and {words}", replace(lighter, head=smaller)))
    for words, changed in changes:
        for strategy in STRATEGIES:
            if size := largest_batch(changed, strategy, asked.memory):
                return f"With {words} it does: trainer.strategy={strategy.name}, data.batch_size={size}."
    return (
        "Neither does it with activation checkpointing and a draft vocabulary: take more or larger GPUs, a smaller "
        "model.head.num_layers or data.max_length."
    )


# -- telling ---------------------------------------------------------------------------------------------------------


def _report(asked: Asked, speed: Speed | None, as_json: bool) -> int:
    from spd_lightning.memory.ranks import STRATEGIES, largest_batch, rank_memory

    plans = [rank_memory(asked.job, strategy, asked.batch_size) for strategy in STRATEGIES]
    largest = {strategy.name: largest_batch(asked.job, strategy, asked.memory) for strategy in STRATEGIES}
    said = advice(asked, largest)
    if as_json:
        decoding = {} if speed is None else {"decoding": fields_of(speed)}
        print(json.dumps(_fields(asked, plans, largest, said) | decoding, indent=1))
        return 0
    from rich.console import Console

    console = Console()
    console.print(_title(asked), highlight=False)
    console.print(_table(asked, plans, largest))
    for line in _notes(asked, plans):
        console.print(line, highlight=False)
    console.print(said, style="bold", highlight=False)
    if speed is not None:
        for table in tables(speed):
            console.print(table)
        for line in speed_advice(speed):
            console.print(line, style="bold", highlight=False)
    return 0


def _fields(asked: Asked, plans: Sequence[RankMemory], largest: Mapping[str, int], said: str) -> dict[str, Any]:
    job = asked.job
    return {
        "ranks": job.ranks,
        "ranks_per_node": job.ranks_per_node,
        "memory": asked.memory,
        "device": "cuda" if job.cuda else "cpu",
        "precision": job.precision,
        "strategy": asked.strategy.name,
        "batch_size": asked.batch_size,
        "max_length": job.length,
        "supervised": job.supervised,
        "activation_checkpointing": job.checkpointing,
        "trained_parameters": job.head.trained,
        "target_parameters": job.target.stored,
        "strategies": [
            {
                "strategy": plan.strategy.name,
                "parts": dict(plan.parts),
                "total": plan.total,
                "moment": plan.moment,
                "moments": dict(plan.moments),
                "fits": plan.total <= asked.memory,
                "largest_batch_size": largest[plan.strategy.name],
                "host_per_node": plan.host,
            }
            for plan in plans
        ],
        "advice": said,
    }


def _title(asked: Asked) -> str:
    job = asked.job
    unit = "GPU" if job.cuda else "process"
    share = "every position" if job.supervised == 1 else f"{job.supervised:.0%} of the positions"
    return (
        f"Memory of each {unit}, {job.ranks} x {_gb(asked.memory)} GB: {job.precision}, {asked.batch_size} x "
        f"{job.length} tokens, {share} supervised;\n{job.head.trained / 1e6:,.0f} M trained parameters, "
        f"target {job.target.stored / 1e6:,.0f} M"
    )


def _table(asked: Asked, plans: Sequence[RankMemory], largest: Mapping[str, int]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from spd_lightning.memory.ranks import PARTS

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("GB")
    for plan in plans:
        name = plan.strategy.name.replace("deepspeed_stage_", "ZeRO-").replace("_", " ")
        chosen = plan.strategy == asked.strategy
        table.add_column(f"{name}{' *' if chosen else ''}", justify="right", style="bold" if chosen else None)
    for part in PARTS:
        table.add_row(part, *(_gb(plan.parts[part]) for plan in plans), end_section=part == PARTS[-1])
    table.add_row("total", *(_gb(plan.total) for plan in plans))
    table.add_row("fits", *("yes" if plan.total <= asked.memory else "NO" for plan in plans))
    table.add_row("largest batch", *(str(largest[plan.strategy.name] or "-") for plan in plans))
    if any(plan.host for plan in plans):
        table.add_row("host per node", *(_gb(plan.host) if plan.host else "-" for plan in plans))
    return table


def _notes(asked: Asked, plans: Sequence[RankMemory]) -> list[str]:
    chosen = next(plan for plan in plans if plan.strategy == asked.strategy)
    lines = [f"* trainer.strategy={chosen.strategy.name}, as configured; it needs most in: {chosen.moment}."]
    if asked.job.cuda and asked.job.precision == "32-true":
        lines.append("In float32 on a GPU attention has no fast kernel here; its dense mask is NOT counted.")
    return lines


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f}" if count >= 1e9 else f"{count / 1e9:.2f}"
