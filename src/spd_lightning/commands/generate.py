"""The command generate: decode with a speculation head and see which tokens were drafts.

The text goes to stdout, everything about it (statistics, legend, notes) to stderr, so that a pipe or a file gets the
text alone.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_lightning.cli import INPUT_ERROR, INTERRUPTED
from spd_lightning.commands.models import add_model_flags, load_models
from spd_lightning.commands.parsing import CommandParser
from spd_lightning.commands.ranks import add_rank_flags, finish, follow, on_ranks
from spd_lightning.commands.streaming import TextStream, legend
from spd_lightning.errors import InputError
from spd_lightning.files import write_whole

if TYPE_CHECKING:
    from spd_lightning.decoding.decoder import CycleEvent
    from spd_lightning.decoding.generation import Generation
    from spd_lightning.decoding.launch import Member
    from spd_lightning.decoding.sampling import Sampling

_ABOUT = """\
Decode a prompt with a speculation head through the target's pipeline stages, and show which tokens were drafts.
Without --head: plain autoregressive decoding, the baseline. Without --prompt: ask as often as you like. On a terminal
that is one conversation (/reset begins another, /quit or Ctrl-D ends); of a pipe every line stands for itself. Ctrl-C
ends an answer, not the session. The text goes to stdout, statistics to stderr."""

_EXAMPLES = """\
examples
  spd-lightning generate --target tiny --head runs/tiny
  spd-lightning generate --target tiny --head runs/tiny --prompt "What does os.path.join do?" --baseline
  spd-lightning generate --target tiny --prompt "What does os.path.join do?" --temperature 0.7 --seed 1
  echo "What does os.path.join do?" | spd-lightning generate --target tiny --head runs/tiny > answer.txt

colours: green = accepted draft, bold yellow = the target's correction of a wrong draft, plain = the first token (it
comes from the target), dim = drafts in flight, replaced when the target decides; none in a pipe or with NO_COLOR"""

_COMMANDS = "One conversation. /reset begins another, /quit or Ctrl-D ends, Ctrl-C ends an answer, /help says this."
_CLOCK = "simulated clock: one process runs the stages one after another"


def parser() -> CommandParser:
    """The arguments of generate."""
    made = CommandParser("spd-lightning generate", _ABOUT, _EXAMPLES)
    add_model_flags(made)
    text = made.add_argument_group("text")
    text.add_argument("--prompt", help="decode this and end; otherwise prompts are read one per line")
    text.add_argument("--system", metavar="TEXT", help="system message that every conversation begins with")
    text.add_argument(
        "--turns",
        choices=("auto", "single", "multi"),
        default="auto",
        help="multi: questions see what was said before; auto: multi on a terminal, single in a pipe",
    )
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
    add_rank_flags(made)
    output.add_argument("--no-color", action="store_true", help="plain text without drafts in flight")
    return made


@dataclass
class Turn:
    """One decoded prompt; `interrupted`: by Ctrl-C, the text ends where it was."""

    prompt: str
    prompt_ids: list[int]
    text: str
    generation: Generation
    baseline: Generation | None
    events: list[CycleEvent] = field(default_factory=list)
    interrupted: bool = False


def run(argv: list[str]) -> int:
    """`spd-lightning generate`."""
    options = parser().parse_args(argv)
    _check(options)
    return on_ranks("generate", argv, options, lambda me: _run(options, me))


def _run(options: Namespace, me: Member | None) -> int:
    session = Session(options, me)
    if me is None:
        return _talk(session, options)
    from spd_lightning.decoding.pipeline import PipelineDecoder

    decoder = session.models.decoder
    assert isinstance(decoder, PipelineDecoder)
    if not decoder.leads:
        return follow(decoder)
    status = _talk(session, options)
    finish(decoder, options)
    return status


def _talk(session: Session, options: Namespace) -> int:
    if options.prompt is None:
        _legend(options)
        return _converse(session, options)
    turn = session.answer(options.prompt)
    _tell(turn, session)
    if options.json is not None:
        write_json(options.json, options, turn)
    _legend(options)
    return INTERRUPTED if turn.interrupted else 0


def _converse(session: Session, options: Namespace) -> int:
    """Questions until there are no more; what is wrong with one of them does not end the others."""
    typed = sys.stdin.isatty()
    session.remembers = options.turns == "multi" or (options.turns == "auto" and typed and not options.raw)
    if typed:
        _note(_COMMANDS if session.remembers else "One question per line; Ctrl-D ends.")
    generations, failed = [], 0
    for prompt in _prompts(typed):
        if prompt == "/quit":
            break
        if prompt == "/reset":
            session.reset()
            _note("A new conversation.")
        elif prompt == "/help":
            _note(_COMMANDS)
        else:
            try:
                turn = session.answer(prompt)
            except InputError as error:  # a prompt that is too long, say
                if session.broken:
                    raise
                _note(f"error: {error}")
                failed += 1
                continue
            _tell(turn, session)
            generations.append(turn.generation)
    if len(generations) > 1:
        _note(total(generations))
    return INPUT_ERROR if failed and not typed else 0


def _tell(turn: Turn, session: Session) -> None:
    sys.stdout.flush()
    _note(("interrupted | " if turn.interrupted else "") + statistics(turn.generation))
    if turn.baseline is not None:
        same_draws = session.sampling.greedy or session.options.tree is not None
        _note(comparison(turn.generation, turn.baseline, same_draws))


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
        if options.trace is not None and options.trace.resolve() == options.json.resolve():
            raise InputError(f"--trace {options.trace} is --json too: name another file.")
        if not options.json.parent.is_dir():
            raise InputError(f"--json {options.json}: the folder {options.json.parent} does not exist.")
    if options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {options.max_new_tokens}: expected at least 1.")


class Session:
    """Target, head and tokenizer, loaded once; and what was said so far, if it is remembered."""

    def __init__(self, options: Namespace, me: Member | None = None) -> None:
        from spd_lightning.decoding.sampling import Sampling

        self.options, self.remembers = options, False
        self.sampling: Sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
        self.models = load_models(options, me, whole=options.baseline)
        self.chats = self.models.chats and not options.raw
        if options.system is not None and not self.chats:
            raise InputError("--system needs a chat template: the tokenizer has none, or --raw leaves it out.")
        if not self.models.chats and not options.raw:
            _note("The tokenizer has no chat template: prompts are taken as they are, as with --raw.")
        self.reset()

    @property
    def broken(self) -> bool:
        """Whether other ranks are left in the middle of a generation."""
        return bool(getattr(self.models.decoder, "broken", False))

    def reset(self) -> None:
        """Forget what was said."""
        system = self.options.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, prompt: str) -> Turn:
        """Decode one prompt while its text streams to stdout; Ctrl-C ends it and keeps what there is.

        Raises:
            InputError: the prompt cannot be decoded, such as one that exceeds the context; nothing is remembered of it.
        """
        from spd_lightning.decoding.decoder import autoregressive_generate

        asked = [*self.messages, {"role": "user", "content": prompt}]
        ids = self.models.encode(asked) if self.chats else self.models.encode_raw(prompt)
        stream = TextStream(self.models.decode, sys.stdout, colour=False if self.options.no_color else None)
        events: list[CycleEvent] = []

        def observe(event: CycleEvent) -> None:
            events.append(event)
            stream(event)

        arguments: dict[str, Any] = {"max_new_tokens": self.options.max_new_tokens} | asdict(self.sampling)
        baseline = None
        with _Interruption() as interruption:
            try:
                decode = (
                    partial(autoregressive_generate, self.models.target)
                    if self.models.decoder is None
                    else self.models.decoder.generate
                )
                generation = decode(ids, **arguments, observer=observe, stop=interruption)
            finally:  # an interrupted line must not keep drafts or colours
                if events:
                    stream.finish()
        if self.options.baseline:
            coupled = self.options.tree is not None  # the draws of a tree, so that the texts are the same
            baseline = autoregressive_generate(self.models.target, ids, **arguments, coupled=coupled)
        text = self.models.decode(generation.token_ids)
        if self.remembers and self.chats:
            self.messages = [*asked, {"role": "assistant", "content": text}]
        return Turn(prompt, ids, text, generation, baseline, events, interruption.came)


class _Interruption:
    """The first Ctrl-C asks the decoder to stop after its next token; the second one is an interrupt as always."""

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> _Interruption:
        self._before = None
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # by nohup, say
        if threading.current_thread() is threading.main_thread() and not ignored:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def __call__(self, tokens: Any) -> bool:
        return self.came

    def _note(self, number: int, frame: Any) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True


def _prompts(typed: bool) -> Iterator[str]:
    """The lines of stdin: typed after a sign on a terminal, until Ctrl-D or Ctrl-C."""
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
    clock = _CLOCK if g.ranks == 1 else f"{g.ranks} ranks, stages at the same time"
    if g.num_stages == 1:
        return f"{tokens} | autoregressive: {g.cycles} full passes | {seconds}"
    if g.acceptance is None or g.theoretical_speedup is None:
        return f"{tokens} | nothing was drafted | {seconds}"
    return (
        f"{tokens} | acceptance p = {g.acceptance:.3f} ({g.drafts_accepted} of {g.drafts_verified} drafts)"
        f" | S = {g.theoretical_speedup:.2f} (n = {g.num_stages})"
        f" | {g.cycles} cycles, {g.drafts_verified - g.drafts_accepted} restarts | {seconds} ({clock})"
    )


def total(generations: Sequence[Generation]) -> str:
    """One line about all answers of a session."""
    from spd_lightning.decoding.generation import Pooled

    pooled = Pooled.of(generations, max(g.num_stages for g in generations))
    line = f"in all: {len(generations)} answers, {pooled.new_tokens} tokens"
    if pooled.acceptance is None or pooled.theoretical_speedup is None:
        return line
    return f"{line} | acceptance p = {pooled.acceptance:.3f} | S = {pooled.theoretical_speedup:.2f}"


def comparison(found: Generation, baseline: Generation, same_draws: bool) -> str:
    """One line about the baseline; with the same draws (or none) whether outputs are the same, as they must be."""
    line = f"baseline: {statistics(baseline)}"
    if not same_draws:
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
