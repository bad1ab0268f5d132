"""PipelineDecoder: the same decoder on several ranks, one per stage, which work at the same time.

Every rank runs the schedule of `schedule.py` on its own; the verdicts are all it has to be told. In cycle c a rank
1. takes what others handed over at the end of their cycle c - 1 (hidden state, anchor states, draft),
2. computes, WITHOUT waiting for the verdict of cycle c - 1: if that is a rejection, which is looked for between layers,
   the work is dropped, and so it is if the verdict comes later. A stage also stops between layers when the verdict of
   cycle c itself, or of a later one, drops what it works on: the last rank may be ahead;
3. hands its own results over, once the verdict of cycle c - 1 is known to be acceptance.
So a verdict has a whole cycle to travel, verification and head are on nobody's path but their own rank's, and what is
sent follows from the schedule alone: no message says what it is, none is in vain, no rank ever waits for all others.

The head sits on a rank of its own, after those of the stages, or on that of stage 0, whose layers should then be fewer.
The last stage's rank verifies; it is the one that hands tokens to its caller first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter, time
from typing import Any

import torch
import torch.distributed as dist

from spd_lightning.decoding.decoder import SpdDecoder
from spd_lightning.decoding.drafters import Drafter
from spd_lightning.decoding.links import LinkError
from spd_lightning.decoding.rank_run import RankRun
from spd_lightning.decoding.sampling import Sampling
from spd_lightning.decoding.topology import Groups, RankLinks, Roles
from spd_lightning.decoding.trace import NoTracer, Span, Tracer, as_rows, from_rows
from spd_lightning.decoding.verdict import Verdicts
from spd_lightning.errors import InputError
from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.target import Target

#: Positions of a prompt that go through a stage at once.
PREFILL_CHUNK = 256
#: What a rank is at when it is at nothing that could stand still.
BETWEEN = "between generations"
#: Seconds by which two ranks may read one machine's clock apart.
_ONE_CLOCK = 0.5


class PipelineDecoder(SpdDecoder):
    """Speculative pipeline decoding over the ranks of a process group.

    The rank of the last stage leads: it calls `generate`, as of any decoder. Every other rank calls `follow`, and takes
    part in whatever the leader decodes until the leader calls `close`.

    Args:
        target: with the weights of this rank's stage; others may lie on the meta device (`load_stage`).
        head: used by the head's rank; the others need its sizes.
        ranks: global ranks of the pipeline (see `Roles`); default: all.
        prefill_chunk: positions of a prompt that go through a stage at once; recurrent states and rounding depend on
            it, the law of the tokens does not.
        traced: keep what every rank does when (`spans_of_all`).
        groups: made by all processes of the job together, where this pipeline has only some of them.
        names: what the ranks compare besides, to see that they have the same files: such as digests of target and head.
        on_state: told what this rank is at, for those who watch it.

    Raises:
        InputError: for another number of ranks than stages (or one more), or if the ranks do not agree on versions,
            target, head or settings; naming what differs.
    """

    def __init__(
        self,
        target: Target,
        head: SpeculationHead | Drafter,
        ranks: Sequence[int] | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        traced: bool = False,
        groups: Groups | None = None,
        names: Mapping[str, str] | None = None,
        on_state: Callable[[str], None] = lambda state: None,
    ) -> None:
        super().__init__(target, head)
        staircase = self.drafter.staircase
        if prefill_chunk < 1:
            raise InputError(f"prefill_chunk={prefill_chunk}: expected at least 1.")
        self.roles = Roles(staircase.num_stages, tuple(range(dist.get_world_size()) if ranks is None else ranks))
        self.ranks = len(self.roles.ranks)
        self.rank, self.prefill_chunk = dist.get_rank(), prefill_chunk
        self.stage = self.roles.stage_of(self.rank)
        self.tracer: Tracer | NoTracer = Tracer(self.rank, _settle(target.device)) if traced else NoTracer()
        self.groups = groups or Groups.of([self.roles], staircase, target.device)
        #: Hidden-state indices that each stage produces for the head; the head's rank embeds tokens itself.
        self.anchors_of = staircase.anchors_of_stages
        self.tell_state = on_state
        #: Whether a generation began that did not end: the other ranks are still in it.
        self.broken = False
        self.spans: list[Span] = []
        self.cycles = 0  # of the last generation
        self._agree(names or {})
        self.links = RankLinks(self)

    @property
    def drafts(self) -> bool:
        return self.rank == self.roles.head

    @property
    def leads(self) -> bool:
        """Whether this rank verifies, and so has every token first."""
        return self.rank == self.roles.last

    def _run(
        self, prompt: list[int], max_new_tokens: int, verdicts: Verdicts, ends: frozenset[int], observed: bool
    ) -> RankRun:
        if self.broken:
            raise RuntimeError("an earlier generation failed on this rank while the others were in it: start anew")
        if self.leads:
            forced = verdicts.forced_acceptance
            self._broadcast(_Call(prompt, max_new_tokens, verdicts.sampling, forced, ends, observed))
        self.broken = True  # until it ends
        return RankRun(self, prompt, max_new_tokens, verdicts, ends, observed)

    def ended(self, spans: list[Span], cycles: int) -> None:
        """A generation is over, on this rank too."""
        self.spans, self.cycles, self.broken = spans, cycles, False
        self.tell_state(BETWEEN)

    @torch.inference_mode()
    def follow(self, generations: int | None = None) -> None:
        """Take part in what the leader decodes: so many generations; None: until it closes."""
        while generations != 0:
            call = self._broadcast(None)
            if call is None:
                break
            generations = None if generations is None else generations - 1
            verdicts = Verdicts(self.drafter.draft_ids, call.sampling, call.forced_acceptance)
            run = self._run(call.prompt, call.max_new_tokens, verdicts, call.ends, call.observed)
            token, left = run.prefill(), call.max_new_tokens - 1
            while left and token not in call.ends:
                event = run.cycle()
                if event.cycle is None:
                    break
                if event.emitted is not None:
                    token, left = event.emitted, left - 1
            run.end(stopped=False)
        else:
            return
        self.release()
        self.spans_of_all()

    def close(self) -> list[Span]:
        """The leader wants no more: every rank is free. Returns the spans of all ranks in the last generation."""
        self._broadcast(None)
        return self.spans_of_all()

    def release(self) -> None:
        """Let go of what outlives generations, without a word to the other ranks."""
        if self.links.mailbox is not None:
            self.links.mailbox.close()

    def gather(self, mine: Any) -> list[Any]:
        """What every rank gives, in the order of ranks; called by all alike, between generations."""
        everyone: list[Any] = [None] * len(self.roles.ranks)
        try:
            dist.all_gather_object(everyone, mine, group=self.groups.control)
        except RuntimeError as error:  # of all the others, the library does not say whose connection it was
            raise LinkError(next(rank for rank in self.roles.ranks if rank != self.rank)) from error
        return everyone

    def spans_of_all(self) -> list[Span]:
        """What every rank did when in the last generation, if it is traced; called by all ranks alike.

        In the time of this rank: clocks of other machines are set to it by their time of day.
        """
        offset, found = time() - perf_counter(), list[Span]()
        for other, rows in self.gather((offset, as_rows(self.spans))):
            shift = other - offset
            found += from_rows(rows, shift if abs(shift) > _ONE_CLOCK else 0.0)
        return found

    def _broadcast(self, call: _Call | None) -> _Call | None:
        box: list[Any] = [call]
        try:
            dist.broadcast_object_list(box, src=self.roles.last, group=self.groups.control)
        except RuntimeError as error:
            raise LinkError(self.roles.last) from error
        return box[0]

    # -- agreement ----------------------------------------------------------------------------------------------------

    def _agree(self, names: Mapping[str, str]) -> None:
        """Compare what must be the same on all ranks, before anything depends on it."""
        import transformers

        config, identity = self.target.config, self.target.identity
        mine = {
            "spd_lightning version": _version(),
            "torch version": torch.__version__,
            "transformers version": transformers.__version__,
            "target": f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}",
            "target's config.json": identity.config_digest,
            "target's tokenizer": identity.tokenizer_digest,
            "target's commit": identity.commit,
            "target's dtype": str(self.target.dtype),
            "attention kernel": config._attn_implementation,
            "split (stage_layers)": list(self.drafter.staircase.stage_layers),
            "head's anchors": list(self.drafter.staircase.anchors),
            **names,
            "prefill_chunk": self.prefill_chunk,
            "tracing": isinstance(self.tracer, Tracer),
            "ranks of the pipeline": list(self.roles.ranks),
        }
        everyone = self.gather(mine)
        for rank, theirs in zip(self.roles.ranks, everyone, strict=True):
            for what, value in everyone[0].items():
                if theirs[what] != value:
                    raise InputError(
                        f"The ranks do not agree: {what} is {value} on rank {self.roles.ranks[0]} and {theirs[what]} "
                        f"on rank {rank}. Start every rank with the same command, files and packages."
                    )


def _version() -> str:
    try:
        return version("spd_lightning")
    except PackageNotFoundError:  # run from a checkout by its path
        return "(not installed)"


def _settle(device: torch.device) -> Callable[[], None] | None:
    """What makes the host's clock tell of the device: waiting for it."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else None


@dataclass(frozen=True)
class _Call:
    """What the leader tells the others before a generation."""

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    forced_acceptance: float | None
    ends: frozenset[int]
    observed: bool
