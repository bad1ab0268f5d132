"""SpdDecoder: zero-bubble pipeline decoding in one process, and the autoregressive baseline on the same stage code.

The stages run one after another here, so the clock of this engine is simulated time: cycles and S are exact, its
seconds are no speedup. Losslessness and acceptance do not depend on the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from spd_lightning.decoding.drafters import Draft, Drafter, HeadDrafter
from spd_lightning.decoding.generation import Generation
from spd_lightning.decoding.sampling import CoupledSampling, Sampling
from spd_lightning.decoding.schedule import Cycle, PipelineSchedule
from spd_lightning.decoding.verdict import Verdicts
from spd_lightning.errors import InputError
from spd_lightning.head.module import SpeculationHead
from spd_lightning.randomness import Purpose, uniform
from spd_lightning.target.target import Target, check_head_fits


@dataclass(frozen=True)
class CycleEvent:
    """What happened in one cycle, for streaming, traces and plots.

    Attributes:
        cycle: the plan that was executed; None for the first token, which prefill emits, and where another rank ended
            the sequence.
        drafted: the token drafted in this cycle for position cycle.newest + 1.
        emitted: the token that became final, if a position left the pipeline; the first token for prefill.
        accepted: whether it was the draft (True) or the target's correction (False); None if nothing was verified.
    """

    cycle: Cycle | None
    drafted: int | None
    emitted: int | None
    accepted: bool | None


Observer = Callable[[CycleEvent], None]
Stop = Callable[[Sequence[int]], bool]


class SpdDecoder:
    """Speculative pipeline decoding of one sequence (B = 1).

    Args:
        target: frozen target; takes the head's stages if it has none yet.
        head: a `SpeculationHead`, or any `Drafter` with a staircase.

    Raises:
        InputError: if the head was made for other stages or another target, showing both values.
    """

    #: Processes that run stages at the same time.
    ranks = 1

    def __init__(self, target: Target, head: SpeculationHead | Drafter) -> None:
        if isinstance(head, SpeculationHead):
            check_head_fits(target, head.staircase, head.config.hidden_size, head.config.vocab_size)
            self.drafter: Drafter = HeadDrafter(head)
        else:
            check_head_fits(target, head.staircase, target.hidden_size, target.vocab_size)
            self.drafter = head
        if target.stage_layers is None:
            target.partition(stage_layers=self.drafter.staircase.stage_layers)
        self.target = target

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor | Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        observer: Observer | None = None,
        stop: Stop | None = None,
        forced_acceptance: float | None = None,
    ) -> Generation:
        """Decode one prompt; the output has exactly the target's distribution (greedy: is exactly the target's).

        Args:
            input_ids: the prompt, a sequence of ids or a tensor [P] or [1, P], P >= 1.
            max_new_tokens: exact upper bound on new tokens.
            temperature: 0 is greedy. top_k, top_p: as in `Sampling`.
            seed: of the counter-based draws; default 0.
            eos_token_id: None: generation_config, else the config, else never; []: never; an id or several.
            observer: called once per cycle.
            stop: asked with the new tokens after each of them; the sequence ends where it says so.
            forced_acceptance: for timing alone: a seeded coin keeps each verified draft at this rate, whatever the
                target says of it. The text then means nothing.

        Raises:
            InputError: for an empty prompt, ids outside the vocabulary or more tokens than the context holds.
        """
        prompt = checked_prompt(self.target, input_ids, max_new_tokens)
        sampling = _sampling(temperature, top_k, top_p, seed)
        ends = self.target.end_of_sequence_ids(eos_token_id)
        verdicts = Verdicts(self.drafter.draft_ids, sampling, forced_acceptance)
        began = time.perf_counter()
        run = self._run(prompt, max_new_tokens, verdicts, ends, observer is not None)
        first = run.prefill()
        prefilled = time.perf_counter()
        if observer:
            observer(CycleEvent(None, None, first, None))
        tokens, accepted = [first], 0
        ended = _ended(tokens, ends, stop)
        while len(tokens) < max_new_tokens and not ended:
            event = run.cycle()
            if event.cycle is None:
                break
            if event.emitted is not None:
                tokens.append(event.emitted)
                accepted += bool(event.accepted)
            if observer:
                observer(event)
            ended = event.emitted is not None and _ended(tokens, ends, stop)
        found = Generation(
            token_ids=tokens,
            prompt_length=len(prompt),
            num_stages=self.drafter.staircase.num_stages,
            cycles=run.schedule.cycle if len(tokens) > 1 else 0,
            drafts_verified=len(tokens) - 1,
            drafts_accepted=accepted,
            restart_positions=list(run.schedule.restart_positions),
            prefill_seconds=prefilled - began,
            decode_seconds=time.perf_counter() - prefilled,
            widths=run.widths,
            ranks=self.ranks,
        )
        run.end(stopped=len(tokens) < max_new_tokens and tokens[-1] not in ends)
        return found

    def _run(
        self, prompt: list[int], max_new_tokens: int, verdicts: Verdicts, ends: frozenset[int], observed: bool
    ) -> Run:
        """What executes the cycles of one generation; other engines have their own."""
        return _Run(self.target, self.drafter, prompt, max_new_tokens, verdicts)


class Clock(Protocol):
    """What a generation has to tell of its schedule."""

    cycle: int
    restart_positions: list[int]


class Run(Protocol):
    """One generation on one engine: `generate` decides when it is over."""

    @property
    def schedule(self) -> Clock:
        """Known after prefill."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Cycles so far whose widest stage pass had 1, 2, ... rows; empty: all passes have one."""

    def prefill(self) -> int:
        """Prompt through target and head; returns the first token, which is the target's own."""

    def cycle(self) -> CycleEvent:
        """Execute what the schedule plans, and advance it."""

    def end(self, stopped: bool) -> None:
        """No cycle follows; `stopped`: because the caller wants no more, not for a reason that every rank knows."""


class _Run:
    """The state of one generation: caches, tokens in flight, and how one planned cycle is executed."""

    schedule: PipelineSchedule
    widths = ()

    def __init__(
        self, target: Target, drafter: Drafter, prompt: list[int], max_new_tokens: int, verdicts: Verdicts
    ) -> None:
        self.target, self.drafter, self.verdicts = target, drafter, verdicts
        self.sampling = verdicts.sampling
        self.tokens = list(prompt)  # prompt, emitted and in flight
        self.capacity = len(prompt) + max_new_tokens + drafter.staircase.num_stages + 1
        self.cache = target.new_cache(self.capacity, drafter.staircase.stage_layers)
        self.rotary = target.rotary_table(self.capacity)
        self.anchors = drafter.staircase.anchors
        self.keep = {anchor: index for index, anchor in enumerate(self.anchors)}
        self.kept: dict[int, Tensor] = {}  # position -> anchor states [A, H] of tokens in flight
        self.hidden: dict[int, Tensor] = {}  # position -> hidden state [1, 1, H] it is at
        self.drafts: dict[int, Draft] = {}  # position -> the draft that entered there, until it is verified
        bounds = drafter.staircase.boundaries
        self.stage_layers = [range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]

    def prefill(self) -> int:
        """Prompt through target and head; returns the first token, which is the target's own."""
        ids = torch.tensor([self.tokens], device=self.target.device)
        states, last = self.target(ids, self.anchors, cache=self.cache)
        self.drafter.start(self.tokens, states, self.capacity)
        first = self.verdicts.own(self.target.logits(last[0, -1]), len(self.tokens))
        self.schedule = PipelineSchedule(self.drafter.staircase, len(self.tokens))
        self._enter(len(self.tokens), first)
        return first

    def cycle(self) -> CycleEvent:
        """Execute one cycle. The head reads what existed at its start, so it goes before the stages."""
        plan = self.schedule.plan()
        position = plan.newest + 1
        u = 0.0 if self.sampling.greedy else uniform(self.sampling.seed, Purpose.DRAFT, position, plan.attempt)
        draft = self.drafter.draft(plan, self.kept, self.tokens, self.sampling, u)
        for stage, at in reversed(plan.stages):  # in the order of layers: weights that pass by (ZeRO-3) pass by once
            self.hidden[at] = self.target.run_layers(
                self.hidden[at], self.stage_layers[stage], at, self.rotary, self.cache, self.keep, self.kept[at]
            )
        emitted, accepted = None, None
        if plan.leaving is not None:
            emitted = self._verdict(plan.leaving)
            accepted = emitted == self.drafts[plan.leaving + 1].token
            self._forget(plan.leaving)
        self.schedule.advance(accepted)
        if accepted is False:
            assert plan.leaving is not None and emitted is not None
            self._flush(plan.leaving + 1)
            self._enter(plan.leaving + 1, emitted)
        else:
            self.drafts[position] = draft
            self._enter(position, draft.token)
        return CycleEvent(plan, draft.token, emitted, accepted)

    def _enter(self, position: int, token: int) -> None:
        self.tokens.append(token)
        self.hidden[position] = self.target.embed(token)
        states = self.hidden[position].new_empty(len(self.anchors), self.target.hidden_size)
        states[0] = self.hidden[position][0, 0]
        self.kept[position] = states

    def _verdict(self, leaving: int) -> int:
        """The token at leaving + 1: the draft in flight there, or the target's correction."""
        position, logits = leaving + 1, self.target.logits(self.hidden.pop(leaving))[0, 0]
        attempt = self.schedule.attempt_of(position)
        return self.verdicts.of(logits, self.drafts[position], position, attempt)

    def end(self, stopped: bool) -> None:
        """Nothing outlives a generation here."""

    def _forget(self, leaving: int) -> None:
        # the position that left one cycle ago had its deepest row in this cycle
        self.kept.pop(leaving - 1, None)
        self.drafts.pop(leaving, None)

    def _flush(self, restart: int) -> None:
        """Roll back to the state after position restart - 1."""
        for position in range(restart, len(self.tokens)):
            for table in (self.hidden, self.kept, self.drafts):
                table.pop(position, None)
        del self.tokens[restart:]
        self.cache.truncate(restart)


@torch.inference_mode()
def autoregressive_generate(
    target: Target,
    input_ids: Tensor | Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    observer: Observer | None = None,
    stop: Stop | None = None,
    coupled: bool = False,
) -> Generation:
    """The baseline: one token per full target pass, through the same layers, cache and sampling as `SpdDecoder`.

    `coupled`: the same draws as of a draft tree, see `Sampling`.
    """
    prompt = checked_prompt(target, input_ids, max_new_tokens)
    sampling = _sampling(temperature, top_k, top_p, seed)
    verdicts = Verdicts(None, CoupledSampling(**asdict(sampling)) if coupled else sampling)
    ends = target.end_of_sequence_ids(eos_token_id)
    began = time.perf_counter()
    capacity = len(prompt) + max_new_tokens
    cache, rotary = target.new_cache(capacity), target.rotary_table(capacity)
    _, last = target(torch.tensor([prompt], device=target.device), (), cache=cache)
    tokens = [verdicts.own(target.logits(last[0, -1]), len(prompt))]
    prefilled = time.perf_counter()
    nothing = last.new_empty(0, target.hidden_size)
    if observer:
        observer(CycleEvent(None, None, tokens[0], None))
    while len(tokens) < max_new_tokens and not _ended(tokens, ends, stop):
        position = len(prompt) + len(tokens) - 1
        hidden = target.run_layers(
            target.embed(tokens[-1]), range(target.num_layers), position, rotary, cache, {}, nothing
        )
        tokens.append(verdicts.own(target.logits(hidden)[0, 0], position + 1))
        if observer:
            observer(CycleEvent(None, None, tokens[-1], None))
    return Generation(
        token_ids=tokens,
        prompt_length=len(prompt),
        num_stages=1,
        cycles=len(tokens) - 1,
        drafts_verified=0,
        drafts_accepted=0,
        restart_positions=list(range(len(prompt), len(prompt) + len(tokens))),
        prefill_seconds=prefilled - began,
        decode_seconds=time.perf_counter() - prefilled,
    )


def _ended(tokens: Sequence[int], ends: Container[int], stop: Stop | None) -> bool:
    return tokens[-1] in ends or (stop is not None and stop(tokens))


def _sampling(temperature: float, top_k: int, top_p: float, seed: int | None) -> Sampling:
    return Sampling(temperature, top_k, top_p, 0 if seed is None else seed)


def checked_prompt(target: Target, input_ids: Tensor | Sequence[int], max_new_tokens: int) -> list[int]:
    """The prompt as a list of ids, refused where it cannot be decoded."""
    ids = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
    if ids and isinstance(ids[0], list):
        if len(ids) != 1:
            raise InputError(f"input_ids holds {len(ids)} sequences: speculative pipeline decoding takes one.")
        ids = ids[0]
    if not ids:
        raise InputError("input_ids is empty: a prompt needs at least one token.")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: expected at least 1.")
    if min(ids) < 0 or max(ids) >= target.vocab_size:
        raise InputError(
            f"input_ids lie in {min(ids)}..{max(ids)}: the target's vocabulary is 0..{target.vocab_size - 1}."
        )
    if len(ids) + max_new_tokens > target.context_length:
        raise InputError(
            f"A prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} exceed the target's context of "
            f"{target.context_length} tokens: shorten the prompt or lower max_new_tokens."
        )
    return ids
