"""The command bench: real decoding of prompt sets, with the autoregressive baseline beside it."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.models import add_model_flags, load_models
from spd_lightning.commands.parsing import CommandParser
from spd_lightning.commands.ranks import add_rank_flags, finish, follow, on_ranks
from spd_lightning.errors import InputError
from spd_lightning.files import write_whole

if TYPE_CHECKING:
    from spd_lightning.bench.measure import Settings
    from spd_lightning.bench.prompts import PromptSet
    from spd_lightning.bench.record import Rows
    from spd_lightning.commands.models import Models
    from spd_lightning.decoding.launch import Member

_ABOUT = """\
Decode prompt sets with a head and report, per prompt, category and set: acceptance p, A, theoretical speedup S, cycles,
the published "equivalent accept length", time to first token, tokens per second, and the autoregressive baseline in the
same process. Greedy output is compared with the baseline token for token; any difference but a tie is exit status 1.

p, A, S and cycles depend on the seed alone. With --workers N (or torchrun) every stage is a process of its own, and
the wall-clock speedup over plain decoding on one rank's hardware is measured; without, one process runs the stages one
after another, and its seconds are a simulated clock."""

_EXAMPLES = """\
examples
  spd-lightning bench --target tiny --head runs/tiny --prompts question.jsonl --limit 80
  spd-lightning bench --target tiny --head heads/tiny --prompts gsm8k.jsonl HumanEval.jsonl --temperature 0 1
  spd-lightning bench --target tiny --head runs/tiny --prompts question.jsonl --workers 4 --trace trace.json
  spd-lightning bench --target big --head untrained --prompts question.jsonl --workers 8 --forced-acceptance 0.85
  spd-lightning export --checkpoint runs/tiny --output heads/tiny --bench bench.json     put the figures on the card

prompts: JSON lines with `turns` (Spec-Bench, MT-Bench), `question` (GSM8K), `prompt` (HumanEval), `messages` or
`conversations` (chats); any other file is text, one prompt per line. Each becomes the user's turn of a chat;
--raw takes it as it is, as a base model would complete it (HumanEval). Interrupted? The same command goes on."""


def parser() -> CommandParser:
    """The arguments of bench."""
    made = CommandParser("spd-lightning bench", _ABOUT, _EXAMPLES)
    add_model_flags(made, head_required=True)
    prompts = made.add_argument_group("prompts")
    prompts.add_argument("--prompts", type=Path, nargs="+", required=True, metavar="FILE", help="see below")
    prompts.add_argument(
        "--limit", type=int, metavar="N", help="so many prompts per file, spread evenly over its categories"
    )
    prompts.add_argument("--turns", choices=("first", "all"), default="first", help="of several turns (default: first)")
    prompts.add_argument("--raw", action="store_true", help="take prompts as they are, without the chat template")
    text = made.add_argument_group("decoding")
    text.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="upper bound (default: 64)")
    text.add_argument("--temperature", type=float, nargs="+", default=[0.0], metavar="T", help="default: 0, greedy")
    text.add_argument("--top-k", type=int, default=0, metavar="K", help="the K likeliest tokens; 0 = all (default)")
    text.add_argument("--top-p", type=float, default=1.0, metavar="P", help="the likeliest of mass P (default: 1)")
    text.add_argument("--seed", type=int, default=0, help="of draws and of the bootstrap (default: 0)")
    clock = made.add_argument_group("time")
    clock.add_argument("--warmup", type=int, default=1, metavar="N", help="generations before any counts (default: 1)")
    clock.add_argument(
        "--forced-acceptance", type=float, metavar="P", help="for time alone: a coin keeps drafts at this rate"
    )
    clock.add_argument("--repeats", type=int, default=1, metavar="N", help="medians over N generations (default: 1)")
    add_rank_flags(made)
    made.add_argument(
        "--output", type=Path, default=Path("bench.json"), metavar="FILE", help="the record; .md and .png lie beside it"
    )
    return made


def run(argv: list[str]) -> int:
    """`spd-lightning bench`."""
    options = parser().parse_args(argv)
    _check(options)
    if os.environ.get("RANK", "0") == "0":  # before anything is loaded; the rank that writes looks once more
        _check_output(options)
    return on_ranks("bench", argv, options, lambda me: _run(options, me))


def _run(options: Namespace, me: Member | None) -> int:
    from spd_lightning.bench.measure import Settings, fits
    from spd_lightning.bench.prompts import read_prompts
    from spd_lightning.bench.record import FORMAT, Rows, clock, figures, markdown, row_fields
    from spd_lightning.decoding.pipeline import PipelineDecoder
    from spd_lightning.decoding.sampling import Sampling
    from spd_lightning.decoding.tree import TreeDecoder
    from spd_lightning.head.digest import weights_digest
    from spd_lightning.provenance import machine, provenance

    began = provenance()  # the state of the tree before anything is written into it
    sets = [read_prompts(path) for path in options.prompts]
    if len({one.name for one in sets}) < len(sets):
        raise InputError("--prompts: the same file, or one of the same folder's and file's name, is given twice.")
    for temperature in options.temperature:
        Sampling(temperature, options.top_k, options.top_p)
    models = load_models(options, me)
    assert models.head is not None and models.decoder is not None
    pipeline = models.decoder if isinstance(models.decoder, PipelineDecoder) else None
    if pipeline is not None and not pipeline.leads:
        return follow(pipeline)
    _check_output(options)
    ranks = models.decoder.ranks
    if not models.chats and not options.raw:
        raise InputError(f"--target {options.target}: its tokenizer has no chat template. Add --raw.")
    settings = Settings(
        max_new_tokens=options.max_new_tokens,
        temperatures=tuple(options.temperature),
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        turns=options.turns,
        raw=options.raw,
        repeats=options.repeats,
        forced_acceptance=options.forced_acceptance,
    )
    sets = [one.select(lambda prompt: fits(models, prompt, settings), options.limit) for one in sets]
    for one in sets:
        if one.too_long:
            print(f"{one.name}: {len(one.too_long)} prompts exceed the context and are left out", file=sys.stderr)
    about: dict[str, Any] = {
        "target": asdict(models.target.identity) | {"loaded_as": str(models.target.dtype).removeprefix("torch.")},
        "head": {
            "name": Path(options.head).name,
            "digest": weights_digest(models.head),
            "dtype": str(models.head.dtype).removeprefix("torch."),
            "stage_layers": list(models.head.config.stage_layers),
        },
        "settings": settings.fields(),
        "engine": {
            "ranks": ranks,
            "head_alone": ranks > models.head.staircase.num_stages,
            **_engine(options, ranks),
            **({"tree": asdict(models.decoder.tree)} if isinstance(models.decoder, TreeDecoder) else {}),
        },
        "prompt_sets": [_described(one) for one in sets],
    }
    journal = Rows(options.output.with_name(f".{options.output.name}.journal"), about)
    try:
        _measure(models, sets, settings, options.warmup, journal)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            print(f"\n{len(journal.rows)} rows are kept: the same command goes on from here.", file=sys.stderr)
        journal.close()
        raise
    n = models.head.staircase.num_stages
    metrics = figures(journal.rows, n, settings.seed, ranks)
    record = {"format": FORMAT, **_provenance(began), **about, "num_stages": n, "warmup": options.warmup}
    record |= {
        "machine": machine(),
        "wall_clock_speedup": metrics[-1]["wall_clock_speedup"] if len(metrics) == 1 else None,
        "clock": clock(ranks),
        "quality": settings.forced_acceptance is None,
        "metrics": metrics,
        "rows": [row_fields(row, n) for row in journal.rows],
    }
    name = about["head"]["name"] + _forced(options)
    table = markdown(metrics, name, n)
    write_whole(options.output, _as_json(record), "--output")
    write_whole(options.output.with_suffix(".md"), table, "--output")
    journal.close(remove=True)
    status = _report(options, metrics, n, ranks)
    if pipeline is not None:
        finish(pipeline, options)
    return status


def _forced(options: Namespace) -> str:
    """What stands behind a head's name wherever its figures are a coin's."""
    forced = options.forced_acceptance
    return "" if forced is None else f" (FORCED acceptance {forced:g}: p, A and S are a coin's)"


def _check(options: Namespace) -> None:
    """Refuse what cannot work, before anything is loaded."""
    for name, least in (("max_new_tokens", 2), ("warmup", 0), ("repeats", 1), ("limit", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {least}.")
    if len(set(options.temperature)) < len(options.temperature):
        raise InputError(f"--temperature {options.temperature}: expected distinct numbers.")
    forced = options.forced_acceptance
    if forced is not None and not 0 <= forced <= 1:
        raise InputError(f"--forced-acceptance {forced}: expected a number from 0 to 1.")
    if options.raw and options.turns == "all":
        raise InputError("--raw has no turns: leave out --turns all.")
    if options.output.suffix != ".json":
        raise InputError(f"--output {options.output}: expected a name that ends in .json.")
    if options.trace is not None and options.trace.resolve() == options.output.resolve():
        raise InputError(f"--trace {options.trace} is --output too: name another file, its picture lies beside it.")


def _check_output(options: Namespace) -> None:
    """Refuse to write where nothing can be written, or where something is."""
    if not options.output.parent.is_dir():
        raise InputError(f"--output {options.output}: the folder {options.output.parent} does not exist.")
    if options.output.exists():
        raise InputError(f"--output {options.output} exists already: name a new record, or remove this one.")


def _engine(options: Namespace, ranks: int) -> dict[str, Any]:
    """What else decides how long ranks take: a record is one of one engine."""
    import torch

    if ranks == 1:
        return {}
    return {
        "prefill_chunk": options.prefill_chunk,
        "threads": torch.get_num_threads(),
        "device": options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "traced": options.trace is not None,
    }


def _measure(models: Models, sets: Sequence[PromptSet], settings: Settings, warmup: int, journal: Rows) -> None:
    """Every prompt at every temperature that the journal does not hold."""
    from spd_lightning.bench.measure import measure
    from spd_lightning.data.progress import progress_bar

    work = [(one, prompt, t) for t in settings.temperatures for one in sets for prompt in one.prompts]
    done = journal.done()
    left = [(one, prompt, t) for one, prompt, t in work if (one.name, prompt.key, t) not in done]
    if done:
        print(f"{len(work) - len(left)} of {len(work)} prompts are in the journal already", file=sys.stderr)
    for one, prompt, t in left[:warmup]:
        list(measure(models, one.name, prompt, t, settings))
    with progress_bar("bench", "prompts") as progress:
        for number, (one, prompt, t) in enumerate(left, start=1):
            journal.add(list(measure(models, one.name, prompt, t, settings)))
            progress(len(work) - len(left) + number, len(work))


def _described(one: PromptSet) -> dict[str, Any]:
    return {
        "name": one.name,
        "format": one.format,
        "sha256": one.sha256,
        "available": one.available,
        "used": len(one.prompts),
        "too_long": len(one.too_long),
        "keys": [prompt.key for prompt in one.prompts],
    }


def _provenance(record: dict[str, Any]) -> dict[str, Any]:
    from spd_lightning.export.background import without_paths

    return record | {"argv": without_paths(record["argv"])}


def _as_json(record: Mapping[str, Any]) -> str:
    """JSON with one line per row: a record has a thousand of them."""
    rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in record["rows"])
    head = json.dumps({**record, "rows": []}, indent=1, ensure_ascii=False)
    return head[: head.rindex("[]")] + "[\n  " + rows + "\n ]\n}\n"


def _report(options: Namespace, metrics: Sequence[Mapping[str, Any]], num_stages: int, ranks: int) -> int:
    from rich.console import Console

    console = Console()
    console.print(_table(metrics, num_stages))
    if options.forced_acceptance is not None:
        console.print(
            f"FORCED acceptance {options.forced_acceptance:g}: p, A and S are a coin's; time alone is measured."
        )
    for line in _clock_lines(metrics, ranks):
        console.print(line, highlight=False)
    written = [options.output, options.output.with_suffix(".md")]
    if find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    else:
        from spd_lightning.bench.plot import plot_bench

        picture = options.output.with_suffix(".png")
        name = Path(options.head).name + _forced(options)
        plot_bench(metrics, picture, f"{name}, n = {num_stages}, {options.max_new_tokens} tokens")
        written.append(picture)
    print("written: " + ", ".join(map(str, written)))
    wrong = sum(row["mismatches"] or 0 for row in metrics if row["category"] is None and row["prompts"] != "all")
    if wrong:
        print(f"NOT LOSSLESS: {wrong} greedy outputs differ from plain decoding, and no tie excuses it")
        return 1
    if options.forced_acceptance is not None:
        return 0
    print("Try next: put the figures on a head's card with spd-lightning export --bench " + str(options.output))
    return 0


def _table(metrics: Sequence[Mapping[str, Any]], num_stages: int) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=f"Real decoding, n = {num_stages} stages", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("prompts", "#", "T", "p", "95 %", "A", "S", "cycles", "lossless"):
        table.add_column(name, justify="left" if name == "prompts" else "right", no_wrap=True)
    for row in metrics:
        whole, interval = row["category"] is None, row["acceptance_interval"]
        table.add_row(
            row["prompts"] if whole else f"  {row['category']}",
            str(row["count"]),
            f"{row['temperature']:g}",
            _number(row["acceptance"], 3),
            "-" if interval is None else f"{interval[0]:.3f} - {interval[1]:.3f}",
            _number(row["accepted_per_restart"], 2),
            _number(row["theoretical_speedup"], 2),
            str(row["cycles"]),
            "-" if row["identical"] is None else f"{row['identical']}/{row['turns']}",
            style="bold" if whole else None,
        )
    return table


def _clock_lines(metrics: Sequence[Mapping[str, Any]], ranks: int) -> list[str]:
    """What does not fit the table: the published measure, and time on the simulated clock."""
    from spd_lightning.bench.record import clock

    lines = []
    for row in metrics:
        if row["category"] is None:
            first = [f"{1000 * row[name]:.0f} ms" for name in _FIRST_TOKEN]
            lines.append(
                f"{row['prompts']}, T = {row['temperature']:g}: equivalent accept length "
                f"{_number(row['equivalent_accept_length'], 2)}; {_number(row['tokens_per_second'], 0)} tokens/s, "
                f"first token after {first[0]} (autoregressive: {_number(row['plain_tokens_per_second'], 0)} tokens/s, "
                f"{first[1]})"
            )
            if row["wall_clock_speedup"] is not None:
                lines[-1] += f"; wall-clock speedup {row['wall_clock_speedup']:.2f} over one rank's hardware"
    return [*lines, f"Clock: {clock(ranks)}."]


_FIRST_TOKEN = ("seconds_to_first_token", "plain_seconds_to_first_token")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
