"""The command generate: decode with a speculation head and see which tokens were drafts.

The text goes to stdout, everything about it (statistics, legend, notes) to stderr, so that a pipe or a file gets the
text alone.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning.commands.parsing import CommandParser
from spd_lightning.commands.streaming import TextStream, legend
from spd_lightning.errors import InputError
from spd_lightning.files import write_whole

if TYPE_CHECKING:
    from spd_lightning.decoding.decoder import CycleEvent
    from spd_lightning.decoding.generation import Generation
    from spd_lightning.decoding.sampling import Sampling

_ABOUT = """\
Decode a prompt with a speculation head through the target's pipeline stages, and show which tokens were drafts.
Without --head: plain autoregressive decoding, the baseline. Without --prompt: ask as often as you like (Ctrl-D ends);
every question stands for itself. The text goes to stdout, statistics to stderr."""

_EXAMPLES = """\
examples
  spd-lightning generate --target tiny --head runs/tiny
  spd-lightning generate --target tiny --head runs/tiny --prompt "What does os.path.join do?" --baseline
  spd-lightning generate --target tiny --prompt "What does os.path.join do?" --temperature 0.7 --seed 1
  echo "What does os.path.join do?" | spd-lightning generate --target tiny --head runs/tiny > answer.txt

colours: green = accepted draft, bold yellow = the target's correction of a wrong draft, plain = the first token (it
comes from the target), dim = drafts in flight, replaced when the target decides; none in a pipe or with NO_COLOR"""

_CLOCK = "simulated clock: one process runs the stages one after another"


def parser() -> CommandParser:
    """The arguments of generate."""
    made = CommandParser("spd-lightning generate", _ABOUT, _EXAMPLES)
    models = made.add_argument_group("models")
    models.add_argument("--target", required=True, help="folder or hub id of the target; 'tiny' is built in")
    models.add_argument("--head", help="run directory, exported folder, hub id, .ckpt or version-11 .pt")
    models.add_argument("--num-stages", type=int, metavar="N", help="refuse a head with other than N stages")
    models.add_argument("--dtype", default="auto", help="auto (bfloat16 on a GPU, else float32) or a torch name")
    models.add_argument("--revision", help="hub revision of the target: branch, tag or commit")
    models.add_argument("--attention", default="auto", help="the target's kernel: auto, eager, sdpa, ...")
    models.add_argument(
        "--device-map", metavar="MAP", type=_device_map, help="auto: spread a large target; or JSON {module: device}"
    )
    models.add_argument("--offload-folder", metavar="DIR", help="where weights lie that --device-map puts on disk")
    models.add_argument("--quantization", default="none", help="8bit or 4bit (bitsandbytes, GPU); default: none")
    models.add_argument("--offline", action="store_true", help="use only what is on this machine already")
    models.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the target")
    models.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    text = made.add_argument_group("text")
    text.add_argument("--prompt", help="decode this and end; otherwise prompts are read one per line")
    text.add_argument("--raw", action="store_true", help="take the prompt as it is, without the chat template")
    text.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="upper bound (default: 128)")
    choice = made.add_argument_group("choice of tokens")
    choice.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 = greedy (default)")
    choice.add_argument("--top-k", type=int, default=0, metavar="K", help="the K likeliest tokens; 0 = all (default)")
    choice.add_argument("--top-p", type=float, default=1.0, metavar="P", help="the likeliest of mass P (default: 1)")
    choice.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    output = made.add_argument_group("output")
    output.add_argument("--baseline", action="store_true", help="decode autoregressively too, and compare")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the generation and every cycle to FILE")
    output.add_argument("--no-color", action="store_true", help="plain text without drafts in flight")
    return made


@dataclass
class Turn:
    """One decoded prompt."""

    prompt: str
    prompt_ids: list[int]
    text: str
    generation: Generation
    baseline: Generation | None
    events: list[CycleEvent] = field(default_factory=list)


def run(argv: list[str]) -> int:
    """`spd-lightning generate`."""
    options = parser().parse_args(argv)
    _check(options)
    session = Session(options)
    if options.prompt is None:
        _legend(options)
    for prompt in _prompts(options):
        turn = session.answer(prompt)
        sys.stdout.flush()
        _note(statistics(turn.generation))
        if turn.baseline is not None:
            _note(comparison(turn.generation, turn.baseline, session.sampling.greedy))
        if options.json is not None:
            write_json(options.json, options, turn)
    if options.prompt is not None:
        _legend(options)
    return 0


def _check(options: Namespace) -> None:
    """Refuse what contradicts itself, before anything is imported or loaded."""
    if options.head is None and options.num_stages is not None:
        raise InputError(
            f"--num-stages {options.num_stages} says what head to expect: give --head too, or leave it out."
        )
    if options.head is None and options.baseline:
        raise InputError("--baseline compares with a head: give --head. Without --head the baseline is all that runs.")
    if options.json is not None:
        if options.prompt is None:
            raise InputError("--json FILE holds one generation: give --prompt.")
        if not options.json.parent.is_dir():
            raise InputError(f"--json {options.json}: the folder {options.json.parent} does not exist.")
    if options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {options.max_new_tokens}: expected at least 1.")


class Session:
    """Target, head and tokenizer, loaded once for all prompts."""

    def __init__(self, options: Namespace) -> None:
        from spd_lightning.decoding.sampling import Sampling

        self.options = options
        self.sampling: Sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
        import torch
        from transformers.utils.logging import disable_progress_bar

        from spd_lightning.decoding.decoder import SpdDecoder
        from spd_lightning.head.loading import load_head
        from spd_lightning.target.loading import Loading, check_target, load_target, load_tokenizer

        disable_progress_bar()
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        loading = Loading(**{field.name: getattr(options, field.name) for field in fields(Loading)})
        check_target(options.target, loading=loading, named=lambda name: "--" + name.replace("_", "-"))
        self.tokenizer = load_tokenizer(options.target, loading)
        self.target = load_target(
            options.target, num_stages=options.num_stages, device=_device(device), loading=loading
        )
        self.decoder = None
        if options.head is not None:
            self.decoder = SpdDecoder(self.target, load_head(options.head, self.target))
        self._warned = False

    def answer(self, prompt: str) -> Turn:
        """Decode one prompt while its text streams to stdout."""
        from spd_lightning.decoding.decoder import autoregressive_generate

        ids = self.encode(prompt)
        stream = TextStream(self.decode, sys.stdout, colour=False if self.options.no_color else None)
        events: list[CycleEvent] = []

        def observe(event: CycleEvent) -> None:
            events.append(event)
            stream(event)

        arguments: dict[str, Any] = {"max_new_tokens": self.options.max_new_tokens} | asdict(self.sampling)
        baseline = None
        try:
            if self.decoder is None:
                generation = autoregressive_generate(self.target, ids, **arguments, observer=observe)
            else:
                generation = self.decoder.generate(ids, **arguments, observer=observe)
        finally:  # an interrupted line must not keep drafts or colours
            if events:
                stream.finish()
        if self.options.baseline:
            baseline = autoregressive_generate(self.target, ids, **arguments)
        return Turn(prompt, ids, self.decode(generation.token_ids), generation, baseline, events)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt: as the user's turn of a chat, or as it is."""
        if self.options.raw or not getattr(self.tokenizer, "chat_template", None):
            if not self.options.raw and not self._warned:
                _note("The tokenizer has no chat template: prompts are taken as they are, as with --raw.")
                self._warned = True
            return list(self.tokenizer(prompt)["input_ids"])
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote them

    def decode(self, ids: Any) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _device_map(text: str) -> Any:
    """`auto`, a device, or a JSON mapping of modules to devices."""
    try:
        return json.loads(text) if text.startswith("{") else text
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is no JSON ({error}): expected auto or {{module: device}}") from error


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: expected cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch finds no GPU here. Use --device cpu.")
    return device


def _prompts(options: Namespace) -> Iterator[str]:
    """--prompt, or the lines of stdin: typed after a sign on a terminal, until Ctrl-D or Ctrl-C."""
    if options.prompt is not None:
        yield options.prompt
        return
    typed = sys.stdin.isatty()
    if typed:
        _note("One question per line; Ctrl-D ends.")
    while True:
        try:
            line = _typed_line() if typed else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            _note("")
            return
        if not line:
            return
        if line.strip():
            yield line.strip()


def _typed_line() -> str:
    if sys.stdout.isatty():
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        return input("> ") + "\n"
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _legend(options: Namespace) -> None:
    """What the colours mean, where there are colours and drafts."""
    if options.head is not None and not options.no_color and (meaning := legend(sys.stderr)):
        _note(meaning)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def statistics(generation: Generation) -> str:
    """One line: what was decoded, how well drafting went, how long it took on which clock."""
    g = generation
    tokens = f"{len(g.token_ids)} tokens"
    seconds = f"prefill {g.prefill_seconds:.2f} s, decode {g.decode_seconds:.2f} s"
    if g.num_stages == 1:
        return f"{tokens} | autoregressive: {g.cycles} full passes | {seconds}"
    if g.acceptance is None or g.theoretical_speedup is None:
        return f"{tokens} | nothing was drafted | {seconds}"
    return (
        f"{tokens} | acceptance p = {g.acceptance:.3f} ({g.drafts_accepted} of {g.drafts_verified} drafts)"
        f" | S = {g.theoretical_speedup:.2f} (n = {g.num_stages})"
        f" | {g.cycles} cycles, {g.drafts_verified - g.drafts_accepted} restarts | {seconds} ({_CLOCK})"
    )


def comparison(found: Generation, baseline: Generation, greedy: bool) -> str:
    """One line about the baseline; under greedy decoding whether the outputs are the same, as they must be."""
    line = f"baseline: {statistics(baseline)}"
    if not greedy:
        return f"{line} | sampled with other random numbers: the same law, not the same text"
    if found.token_ids == baseline.token_ids:
        return f"{line} | identical output"
    pairs = zip(found.token_ids, baseline.token_ids, strict=False)
    differs = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found.token_ids), len(baseline.token_ids)))
    return f"{line} | output differs from new token {differs} on: a tie of two logits in low precision, or a bug"


def write_json(path: Path, options: Namespace, turn: Turn) -> None:
    """The generation, its statistics and every cycle; under a temporary name first."""
    generation = turn.generation
    content = {
        "target": str(options.target),
        "head": options.head,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
        "prompt": turn.prompt,
        "prompt_ids": turn.prompt_ids,
        "text": turn.text,
        "generation": _figures(generation),
        "baseline": None if turn.baseline is None else _figures(turn.baseline),
        "events": [asdict(event) for event in turn.events],
    }
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", "--json")


def _figures(generation: Generation) -> dict[str, Any]:
    derived = {"acceptance": generation.acceptance, "theoretical_speedup": generation.theoretical_speedup}
    return asdict(generation) | derived
