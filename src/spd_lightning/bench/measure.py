"""Measure one prompt: the pipeline with its head, the autoregressive baseline beside it, and whether they agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from spd_lightning.bench.prompts import Prompt
from spd_lightning.commands.models import Models
from spd_lightning.decoding.checks import lossless_divergence
from spd_lightning.decoding.decoder import autoregressive_generate
from spd_lightning.decoding.generation import Generation
from spd_lightning.errors import BrokenInvariantError


@dataclass(frozen=True)
class Row:
    """What one turn of one prompt gave at one temperature; the unit that a journal keeps.

    Attributes:
        prompts, key, category, turn, temperature: which it is.
        prompt_tokens, new_tokens, cycles, drafts_verified, drafts_accepted: see `Generation`.
        prefill_seconds, decode_seconds: medians over repeats; on a simulated clock where one process runs all stages.
        plain_tokens, plain_prefill_seconds, plain_decode_seconds: of the autoregressive baseline, likewise.
        lossless: `identical`, `tie` or `mismatch` of greedy output and baseline; None under sampling.
    """

    prompts: str
    key: str
    category: str | None
    turn: int
    temperature: float
    prompt_tokens: int
    new_tokens: int
    cycles: int
    drafts_verified: int
    drafts_accepted: int
    prefill_seconds: float
    decode_seconds: float
    plain_tokens: int
    plain_prefill_seconds: float
    plain_decode_seconds: float
    lossless: str | None


@dataclass(frozen=True)
class Settings:
    """What decides p, S and cycles, and how often time is taken."""

    max_new_tokens: int = 64
    temperatures: tuple[float, ...] = (0.0,)
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    turns: str = "first"
    raw: bool = False
    repeats: int = 1
    forced_acceptance: float | None = None

    def fields(self) -> dict[str, Any]:
        return asdict(self) | {"temperatures": list(self.temperatures)}


def measure(models: Models, name: str, prompt: Prompt, temperature: float, settings: Settings) -> Iterator[Row]:
    """The rows of one prompt: one per turn; later turns see the head's own answers."""
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in prompt.before]
    turns = prompt.turns if settings.turns == "all" else prompt.turns[:1]
    for number, text in enumerate(turns, start=1):
        messages.append({"role": "user", "content": text})
        ids = models.encode_raw(text) if settings.raw else models.encode(messages)
        if len(ids) + settings.max_new_tokens > models.target.context_length:
            return  # of a conversation that has grown too long
        found, row = _measure_turn(models, ids, prompt.seed(settings.seed) + number, temperature, settings)
        yield Row(name, prompt.key, prompt.category, number, temperature, len(ids), **row)
        messages.append({"role": "assistant", "content": models.decode(found.token_ids)})


def fits(models: Models, prompt: Prompt, settings: Settings) -> bool:
    """Whether the first turn and its answer fit the target's context."""
    messages = [{"role": role, "content": text} for role, text in (*prompt.before, ("user", prompt.turns[0]))]
    ids = models.encode_raw(prompt.turns[0]) if settings.raw else models.encode(messages)
    return len(ids) + settings.max_new_tokens <= models.target.context_length


def _measure_turn(
    models: Models, ids: Sequence[int], seed: int, temperature: float, settings: Settings
) -> tuple[Generation, dict[str, Any]]:
    assert models.decoder is not None
    options: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "seed": seed,
    }
    forced: dict[str, Any] = {}
    if settings.forced_acceptance is not None:  # the text means nothing: neither its end nor its equality
        options["eos_token_id"] = []
        forced["forced_acceptance"] = settings.forced_acceptance
    decoder = models.decoder
    found = _repeated(lambda: decoder.generate(ids, **options, **forced), settings.repeats)
    plain = _repeated(lambda: autoregressive_generate(models.target, ids, **options), settings.repeats)
    lossless = None
    if temperature == 0 and not forced:
        parting = lossless_divergence(models.target, ids, found[0], plain[0])
        lossless = "identical" if parting is None else "tie" if parting.tie else "mismatch"
    return found[0], {
        "new_tokens": len(found[0].token_ids),
        "cycles": found[0].cycles,
        "drafts_verified": found[0].drafts_verified,
        "drafts_accepted": found[0].drafts_accepted,
        **_seconds("", found),
        "plain_tokens": len(plain[0].token_ids),
        **_seconds("plain_", plain),
        "lossless": lossless,
    }


def _repeated(generate: Callable[[], Generation], repeats: int) -> list[Generation]:
    """The same generation several times; what differs between them can only be time."""
    made = [generate() for _ in range(repeats)]
    if any(one.token_ids != made[0].token_ids or one.cycles != made[0].cycles for one in made):
        raise BrokenInvariantError("the same prompt with the same seed gave another text when it was repeated")
    return made


def _seconds(prefix: str, generations: Sequence[Generation]) -> dict[str, float]:
    return {
        f"{prefix}{name}": round(median(getattr(one, name) for one in generations), 6)
        for name in ("prefill_seconds", "decode_seconds")
    }
