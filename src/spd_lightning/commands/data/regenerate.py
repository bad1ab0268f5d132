"""The step regenerate: the target writes the responses of a corpus."""

from __future__ import annotations

import os
from argparse import Namespace
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.data import common
from spd_lightning.commands.parsing import CommandParser
from spd_lightning.errors import InputError

if TYPE_CHECKING:
    from spd_lightning.data.dialogue import Sampling, Writer
    from spd_lightning.data.regenerate import Survey

_ABOUT = """\
Let the target write every response of a corpus anew: a head learns to draft what its target says. System, user and tool
turns stay; each response answers the new ones before it. The target runs in this process (--target), on several GPUs by
torchrun, or behind an OpenAI-compatible server (--base-url), which is much faster. Stop it as you like and run the same
command again: it goes on where it was. DIR receives train.jsonl, manifest.json and the journal of the work."""

_EXAMPLES = f"""\
{common.SOURCES}

examples
  spd-lightning data regenerate documentation:train --target tiny --max-new-tokens 64 --out build/docs/regenerated
  spd-lightning data regenerate build/mix/train.jsonl --target Qwen/Qwen3-8B --out build/mix/qwen3-8b \\
      --temperature 0.7 --chat-arguments '{{"enable_thinking": false}}'
  torchrun --nproc-per-node 8 -m spd_lightning data regenerate build/mix/train.jsonl --target Qwen/Qwen3-8B --out DIR
  vllm serve Qwen/Qwen3-8B          (elsewhere; its API is at http://localhost:8000/v1)
  spd-lightning data regenerate build/mix/train.jsonl --base-url http://localhost:8000/v1 --concurrency 128 --out DIR"""


def parser() -> CommandParser:
    """The arguments of regenerate."""
    made = CommandParser("spd-lightning data regenerate", _ABOUT, _EXAMPLES)
    common.add_sources(made)
    output = made.add_argument_group("output")
    output.add_argument("--out", required=True, metavar="DIR", help="receives the files; a folder of its own")
    output.add_argument("--name", default="train", metavar="STEM", help="of the final file STEM.jsonl (train)")
    output.add_argument("--overwrite", action="store_true", help="start anew, whatever DIR holds of this command")
    output.add_argument("--drop-unfinished", action="store_true", help="leave out conversations with a cut response")
    output.add_argument(
        "--max-failed-share", type=float, default=0.05, metavar="X", help="conversations that may fail (0.05)"
    )
    _add_choice(made)
    _add_target(made)
    _add_server(made)
    common.add_cleaning(made)
    made.set_defaults(turns="all", offload_folder=None)
    return made


def _add_choice(made: CommandParser) -> None:
    group = made.add_argument_group("choice of tokens (default: as the model's generation_config or the server has it)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 = greedy")
    group.add_argument("--top-p", type=float, metavar="P", help="the likeliest tokens of mass P")
    group.add_argument("--top-k", type=int, metavar="K", help="the K likeliest tokens")
    group.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="a response is cut here (1024)")
    group.add_argument("--seed", type=int, default=0, help="of the random numbers (0)")
    group.add_argument("--chat-arguments", metavar="JSON", help='for the template: {"enable_thinking": false}')


def _add_target(made: CommandParser) -> None:
    group = made.add_argument_group("target in this process")
    group.add_argument("--target", help="folder or hub id of the target; 'tiny' is built in")
    group.add_argument("--batch-size", type=int, default=32, metavar="B", help="conversations at a time (32)")
    group.add_argument("--chat-template", metavar="FILE", help="another chat template than the tokenizer's own")
    group.add_argument("--date", default="2025-01-01", help="today, for templates that ask (2025-01-01)")
    group.add_argument("--dtype", default="auto", help="auto (bfloat16 on a GPU, else float32) or a torch name")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: GPU LOCAL_RANK where there is one")
    group.add_argument("--device-map", metavar="MAP", help="auto: spread a large target over all GPUs")
    group.add_argument("--attention", default="auto", help="the target's kernel: auto, eager, sdpa, ...")
    group.add_argument("--quantization", default="none", help="8bit or 4bit (bitsandbytes, GPU); default: none")
    group.add_argument("--revision", help="hub revision of the target: branch, tag or commit")
    group.add_argument("--offline", action="store_true", help="use only what is on this machine already")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the target")
    group.add_argument("--rank", type=int, metavar="R", help="this process, from 0 (RANK, which torchrun sets)")
    group.add_argument("--ranks", type=int, metavar="N", help="processes that share the work (WORLD_SIZE)")


def _add_server(made: CommandParser) -> None:
    group = made.add_argument_group("target behind a server")
    group.add_argument("--base-url", metavar="URL", help="of an OpenAI-compatible API, such as http://host:8000/v1")
    group.add_argument("--model", metavar="NAME", help="as the server names it (--target, or the only one it serves)")
    group.add_argument("--api-key-env", metavar="NAME", help="variable that holds the key (OPENAI_API_KEY)")
    group.add_argument("--concurrency", type=int, default=32, metavar="N", help="conversations at a time (32)")
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds per request (600)")
    group.add_argument("--retries", type=int, default=8, metavar="N", help="of a request, with growing pauses (8)")


def run(argv: list[str]) -> int:
    """`spd-lightning data regenerate`."""
    options = parser().parse_args(argv)
    rank, ranks = _ranks(options)
    _check(options, ranks)
    from spd_lightning.data.cleaning import Cleaner
    from spd_lightning.data.dialogue import Sampling
    from spd_lightning.data.journal import Workplace
    from spd_lightning.data.regenerate import Job, report, survey

    sampling = Sampling(
        options.temperature, options.top_p, options.top_k, options.max_new_tokens, options.seed
    )  # fmt: skip
    cleaner = Cleaner(common.sources(options), common.cleaning(options))
    make_writer = _server(options, sampling) if options.base_url else _model(options, sampling)
    place = Workplace(common.output_folder(options.out), options.name)
    surveyed = survey(cleaner, "SOURCE", "--max-bad-share")
    print("\n".join(surveyed.tally.lines()))

    settings = _settings(options, sampling, surveyed)
    if options.overwrite:
        place.clear()
    place.refuse_others(settings)
    job = Job(
        cleaner,
        surveyed,
        place,
        settings,
        unit_size=1 if options.base_url else options.batch_size,
        rank=rank,
        ranks=ranks,
        drop_unfinished=options.drop_unfinished,
        max_failed_share=options.max_failed_share,
        argv=("spd-lightning", "data", "regenerate", *argv),
    )
    if place.finished(job.output) is not None:
        print(f"{place.output} is finished, made before with the same arguments: nothing to do")
        return 0
    writer = make_writer()
    settings.update({"model": writer.facts["model"]} if options.base_url else {})
    place.claim(settings)
    manifest = job.run(writer)
    if manifest is None:
        print(f"rank {rank} of {ranks} is done; the last one writes {place.output}")
        return 0
    print("\n".join(report(manifest, place, options.target or str(writer.facts["model"]))))
    return 0


def _check(options: Namespace, ranks: int) -> None:
    """Refuse what contradicts itself, before anything is imported or loaded."""
    if not options.target and not options.base_url:
        raise InputError("give --target, a model to load here, or --base-url, a server that has one.")
    server = {"--model": options.model, "--api-key-env": options.api_key_env}
    local = {
        "--chat-template": options.chat_template,
        "--device": options.device,
        "--device-map": options.device_map,
        "--revision": options.revision,
    }
    for flag, value in (local if options.base_url else server).items():
        if value is not None:
            raise InputError(
                f"{flag} {value}: a server has its own; leave it out, or start the server with it."
                if options.base_url
                else f"{flag} {value} is for a server: give --base-url too."
            )
    if options.batch_size < 1:
        raise InputError(f"--batch-size {options.batch_size}: expected at least 1.")
    if not 0 <= options.max_failed_share <= 1:
        raise InputError(f"--max-failed-share {options.max_failed_share}: expected a number from 0 to 1.")
    if Path(options.name).name != options.name or options.name in ("", ".", ".."):
        raise InputError(f"--name {options.name!r}: expected the stem of a file, such as train.")
    if options.overwrite and ranks > 1:
        raise InputError("--overwrite: one rank would remove the work of another; remove --out beforehand instead.")


def _ranks(options: Namespace) -> tuple[int, int]:
    """Which of how many processes this one is: by the flags, else by the environment that torchrun makes."""
    given = (options.rank, options.ranks)
    if (options.rank is None) != (options.ranks is None):
        raise InputError("--rank and --ranks belong together: give both, or neither.")
    if options.rank is None:
        texts = (os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1"))
        if not all(text.isdecimal() for text in texts):
            raise InputError(f"RANK={texts[0]} WORLD_SIZE={texts[1]}: expected numbers; set --rank and --ranks.")
        given = (int(texts[0]), int(texts[1]))
    rank, ranks = given
    if not 0 <= rank < ranks:
        raise InputError(f"--rank {rank} --ranks {ranks}: expected 0 <= rank < ranks.")
    return rank, ranks


def _settings(options: Namespace, sampling: Sampling, surveyed: Survey) -> dict[str, Any]:
    """What decides the text: a folder that was begun with other values is not continued."""
    from spd_lightning.data.sources import digest

    settings: dict[str, Any] = {
        "input": f"{surveyed.conversations} conversations, digest {surveyed.content}",
        "sampling": asdict(sampling),
        "chat_arguments": common.json_object("--chat-arguments", options.chat_arguments),
    }
    if options.base_url:
        named = options.model or options.target
        return settings | {"writer": "server"} | ({"model": named} if named else {})
    template = options.chat_template and digest(Path(options.chat_template).read_text(encoding="utf-8"))
    names = ("target", "revision", "dtype", "attention", "quantization", "batch_size", "date")
    return settings | {"writer": "model", "chat_template": template} | {n: getattr(options, n) for n in names}


def _server(options: Namespace, sampling: Sampling) -> Any:
    """What makes the writer, checked as far as it can be without asking the server."""
    from spd_lightning.data.server_writer import Server, ServerWriter

    variable = options.api_key_env or "OPENAI_API_KEY"
    if options.api_key_env and not os.environ.get(variable):
        raise InputError(f"--api-key-env {variable}: this variable is not set: expected it to hold the key.")
    server = Server(
        options.base_url,
        options.model or options.target,
        os.environ.get(variable) or "none",
        options.concurrency,
        options.timeout,
        options.retries,
        common.json_object("--chat-arguments", options.chat_arguments),
    )
    return lambda: ServerWriter(server, sampling)


def _model(options: Namespace, sampling: Sampling) -> Any:
    """What makes the writer, checked as far as it can be without reading weights."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from spd_lightning.target.loading import Loading, check_target, load_target, load_tokenizer

    disable_progress_bar()
    loading = Loading(**{field.name: getattr(options, field.name) for field in fields(Loading)})
    check_target(options.target, loading=loading, named=lambda name: "--" + name.replace("_", "-"))
    chat = common.chat(options)
    device = _device(torch, options.device)

    def make() -> Writer:
        from spd_lightning.data.model_writer import ModelWriter

        tokenizer = load_tokenizer(options.target, loading)
        writer = ModelWriter(load_target(options.target, device=device, loading=loading), tokenizer, chat, sampling)
        writer.facts["model"] = options.target
        return writer

    return make


def _device(torch: Any, name: str | None) -> Any:
    if name is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: expected cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs here.")
    return device
