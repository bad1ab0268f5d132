"""PipelineDecoder: the same decoder on several ranks, one per stage, which work at the same time.

Every rank runs the schedule of `schedule.py` on its own; the verdicts are all it has to be told. In cycle c a rank
1. takes what others handed over at the end of their cycle c - 1 (hidden state, anchor states, draft),
2. computes, WITHOUT waiting for the verdict of cycle c - 1: if that is a rejection, which is looked for between layers,
   the work is dropped, and so it is if the verdict comes later;
3. hands its own results over, once the verdict of cycle c - 1 is known to be acceptance.
So a verdict has a whole cycle to travel, verification and head are on nobody's path but their own rank's, and what is
sent follows from the schedule alone: no message says what it is, none is in vain, no rank ever waits for all others.

The head sits on a rank of its own, after those of the stages, or on that of stage 0, whose layers should then be fewer.
The last stage's rank verifies; it is the one that hands tokens to its caller first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spd_lightning.decoding.decoder import CycleEvent, SpdDecoder
from spd_lightning.decoding.drafters import Draft, Drafter
from spd_lightning.decoding.links import FOREVER, GOODBYE, Link, LinkError, Mailbox, Rows
from spd_lightning.decoding.sampling import Sampling
from spd_lightning.decoding.schedule import Cycle, PipelineSchedule
from spd_lightning.decoding.trace import NoTracer, Span, Tracer, Work, as_rows, from_rows
from spd_lightning.decoding.verdict import Verdicts
from spd_lightning.errors import InputError
from spd_lightning.head.module import SpeculationHead
from spd_lightning.randomness import Purpose, uniform
from spd_lightning.target.target import Target

#: Positions of a prompt that go through a stage at once.
PREFILL_CHUNK = 256
#: In the place of a verdict's token: the caller wants no more.
STOP = -2


@dataclass(frozen=True)
class Roles:
    """Who does what.

    Attributes:
        num_stages: n.
        ranks: global ranks: n of them, stage s on ranks[s] and the head on ranks[0]; or n + 1, the head on the last.
    """

    num_stages: int
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ranks) not in (self.num_stages, self.num_stages + 1):
            raise InputError(
                f"{len(self.ranks)} ranks cannot run a pipeline of {self.num_stages} stages: expected "
                f"{self.num_stages} (the head beside stage 0) or {self.num_stages + 1} (the head on its own). Set the "
                "number of workers, or use a head of another number of stages."
            )

    @property
    def head(self) -> int:
        """The rank that drafts."""
        return self.ranks[self.num_stages if len(self.ranks) > self.num_stages else 0]

    @property
    def first(self) -> int:
        return self.ranks[0]

    @property
    def last(self) -> int:
        """The rank that verifies."""
        return self.ranks[self.num_stages - 1]

    def stage_of(self, rank: int) -> int | None:
        """The stage of a rank; None for a rank that only drafts."""
        place = self.ranks.index(rank)
        return place if place < self.num_stages else None

    def name(self, rank: int) -> str:
        """Such as `rank 0: stage 0 + head`."""
        stage = self.stage_of(rank)
        parts = [] if stage is None else [f"stage {stage}"]
        return f"rank {rank}: " + " + ".join([*parts, *(["head"] if rank == self.head else [])])

    @property
    def names(self) -> dict[int, str]:
        return {rank: self.name(rank) for rank in self.ranks}


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
        head_name: what the ranks compare to see that they have the same head, such as its digest.
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
        head_name: str = "",
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
        self.tracer: Tracer | NoTracer = Tracer(self.rank) if traced else NoTracer()
        self.groups = groups or Groups.of([self.roles], target.device)
        #: Hidden-state indices that each stage produces for the head; the head's rank embeds tokens itself.
        self.anchors_of = [
            [anchor for anchor in staircase.anchors if start < anchor <= stop]
            for start, stop in pairwise(staircase.boundaries)
        ]
        self.tell_state = on_state
        self.spans: list[Span] = []
        self.cycles = 0  # of the last generation
        self._agree(head_name)
        self.links = _Links(self)

    @property
    def drafts(self) -> bool:
        return self.rank == self.roles.head

    @property
    def leads(self) -> bool:
        """Whether this rank verifies, and so has every token first."""
        return self.rank == self.roles.last

    def _run(
        self, prompt: list[int], max_new_tokens: int, verdicts: Verdicts, ends: frozenset[int], observed: bool
    ) -> _RankRun:
        if self.leads:
            self._broadcast(_Call(prompt, max_new_tokens, verdicts.sampling, verdicts.forced_acceptance, ends))
        self.tell_state("cycle -1")
        return _RankRun(self, prompt, max_new_tokens, verdicts, ends, observed)

    @torch.inference_mode()
    def follow(self, generations: int | None = None) -> None:
        """Take part in what the leader decodes: so many generations; None: until it closes."""
        while generations != 0:
            call = self._broadcast(None)
            if call is None:
                break
            generations = None if generations is None else generations - 1
            verdicts = Verdicts(self.target, self.drafter.draft_ids, call.sampling, call.forced_acceptance)
            run = self._run(call.prompt, call.max_new_tokens, verdicts, call.ends, observed=False)
            token, left = run.prefill(), call.max_new_tokens - 1
            while left and token not in call.ends:
                event = run.cycle()
                if event.cycle is None:
                    break
                if event.emitted is not None:
                    token, left = event.emitted, left - 1
            run.end(stopped=False)
            self.tell_state("waits for a prompt")
        else:
            return
        if self.links.mailbox is not None:
            self.links.mailbox.close()
        self.spans_of_all()

    def close(self) -> list[Span]:
        """The leader wants no more: every rank is free. Returns the spans of all ranks in the last generation."""
        self._broadcast(None)
        for link in self.links.verdicts_out:
            link.send(torch.tensor([GOODBYE, 0, 0]))
        return self.spans_of_all()

    def gather(self, mine: Any) -> list[Any]:
        """What every rank gives, in the order of ranks; called by all alike, between generations."""
        everyone: list[Any] = [None] * len(self.roles.ranks)
        dist.all_gather_object(everyone, mine, group=self.groups.control)
        return everyone

    def spans_of_all(self) -> list[Span]:
        """What every rank did when in the last generation, if it is traced; called by all ranks alike."""
        return [span for rows in self.gather(as_rows(self.spans)) for span in from_rows(rows)]

    def _broadcast(self, call: _Call | None) -> _Call | None:
        box: list[Any] = [call]
        try:
            dist.broadcast_object_list(box, src=self.roles.last, group=self.groups.control)
        except RuntimeError as error:
            raise LinkError("the connection to the leading rank broke") from error
        return box[0]

    # -- agreement ----------------------------------------------------------------------------------------------------

    def _agree(self, head_name: str) -> None:
        """Compare what must be the same on all ranks, before anything depends on it."""
        import transformers

        config = self.target.config
        mine = {
            "torch version": torch.__version__,
            "transformers version": transformers.__version__,
            "target": f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}",
            "target's dtype": str(self.target.dtype),
            "split (stage_layers)": list(self.drafter.staircase.stage_layers),
            "head's anchors": list(self.drafter.staircase.anchors),
            "head": head_name,
            "prefill_chunk": self.prefill_chunk,
            "ranks of the pipeline": list(self.roles.ranks),
        }
        everyone: list[Any] = [None] * len(self.roles.ranks)
        dist.all_gather_object(everyone, mine, group=self.groups.control)
        for rank, theirs in zip(self.roles.ranks, everyone, strict=True):
            for what, value in everyone[0].items():
                if theirs[what] != value:
                    raise InputError(
                        f"The ranks do not agree: {what} is {value} on rank {self.roles.ranks[0]} and {theirs[what]} "
                        f"on rank {rank}. Start every rank with the same command, files and packages."
                    )


@dataclass(frozen=True)
class _Call:
    """What the leader tells the others before a generation."""

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    forced_acceptance: float | None
    ends: frozenset[int]


class Groups:
    """Process groups of some pipelines; made by every process of the job, in the same order.

    Attributes:
        control: gloo, of the pipeline that this rank belongs to; None if it belongs to none.
    """

    def __init__(self, control: Any, data: dict[tuple[int, int, str], Any]) -> None:
        self.control, self._data = control, data

    @classmethod
    def of(cls, pipelines: Sequence[Roles], device: torch.device) -> Groups:
        """Groups of all `pipelines`, which share no rank."""
        control, data = None, {}
        for roles in pipelines:
            group = dist.new_group(list(roles.ranks), backend="gloo", timeout=FOREVER)
            if dist.get_rank() in roles.ranks:
                control = group
            if device.type == "cuda":
                for edge in sorted(_edges(roles)):
                    data[edge] = dist.new_group(sorted(edge[:2]), backend="nccl")
        return cls(control, data)

    def data(self, source: int, destination: int, kind: str) -> Any:
        """What hidden states travel over."""
        return self._data.get((source, destination, kind), self.control)


def _edges(roles: Roles) -> set[tuple[int, int, str]]:
    edges: set[tuple[int, int, str]] = set()
    stages = roles.ranks[: roles.num_stages]
    for kind in ("", "prompt "):
        edges |= {(a, b, f"{kind}hidden") for a, b in pairwise(stages)}
        edges |= {(a, roles.head, f"{kind}anchors") for a in stages if a != roles.head}
    return edges


class _Links:
    """The links of one rank: to its neighbours and to the head's rank."""

    def __init__(self, decoder: PipelineDecoder) -> None:
        roles, rank, target = decoder.roles, decoder.rank, decoder.target
        n, stage = roles.num_stages, decoder.stage
        H, device, host = target.hidden_size, target.device, torch.device("cpu")
        like = torch.empty(0, dtype=target.dtype, device=device)
        control = decoder.groups.control
        ids = decoder.drafter.draft_ids
        draft_vocabulary = target.vocab_size if ids is None else len(ids)

        def link(a: int, b: int, tag: int, kind: str, *shape: int) -> Link:
            return Link(a, b, shape, target.dtype, device, decoder.groups.data(a, b, kind), tag)

        def rows(a: int, b: int, tag: int, kind: str, *width: int) -> Rows:
            return Rows(a, b, width, like, decoder.groups.data(a, b, f"prompt {kind}"), tag)

        def small(a: int, b: int, tag: int, size: int, dtype: torch.dtype = torch.int64) -> Link:
            return Link(a, b, (size,), dtype, host, control, tag)

        self.hidden_in = self.hidden_out = self.rows_in = self.rows_out = None
        if stage is not None and stage > 0:
            edge = roles.ranks[stage - 1], rank
            self.hidden_in, self.rows_in = link(*edge, 1, "hidden", H), rows(*edge, 2, "hidden", H)
        if stage is not None and stage < n - 1:
            edge = rank, roles.ranks[stage + 1]
            self.hidden_out, self.rows_out = link(*edge, 1, "hidden", H), rows(*edge, 2, "hidden", H)
        #: stage -> its anchor states, on the head's rank; and out of this rank
        self.anchors_in: dict[int, Link] = {}
        self.anchor_rows_in: dict[int, Rows] = {}
        self.anchors_out = self.anchor_rows_out = None
        for s, anchors in enumerate(decoder.anchors_of):
            edge = roles.ranks[s], roles.head
            if not anchors or edge[0] == edge[1] or rank not in edge:
                continue
            states, prompt = link(*edge, 3, "anchors", len(anchors), H), rows(*edge, 4, "anchors", len(anchors), H)
            if rank == roles.head:
                self.anchors_in[s], self.anchor_rows_in[s] = states, prompt
            else:
                self.anchors_out, self.anchor_rows_out = states, prompt
        #: drafts: to stage 0 unless it is here, and to the verifying rank, with their law under sampling
        self.entering = self.verified = self.law = None
        if roles.head != roles.first and rank in (roles.head, roles.first):
            self.entering = small(roles.head, roles.first, 5, 1)
        if rank in (roles.head, roles.last):
            self.verified = small(roles.head, roles.last, 6, 1)
            self.law = small(roles.head, roles.last, 7, draft_vocabulary, torch.float64)
        self.verdicts_out = [small(rank, other, 8, 3) for other in roles.ranks if rank == roles.last and other != rank]
        self.mailbox = None if rank == roles.last else Mailbox(small(roles.last, rank, 8, 3))


@dataclass(frozen=True)
class Verdict:
    """What the rank of the last stage tells the others: a token, whether it is the draft, whether it is the last."""

    token: int
    accepted: bool
    over: bool

    @classmethod
    def of(cls, message: Sequence[int]) -> Verdict:
        return cls(message[0], bool(message[1]), bool(message[2]))


class _RankRun:
    """One generation on one rank."""

    def __init__(
        self,
        decoder: PipelineDecoder,
        prompt: list[int],
        max_new_tokens: int,
        verdicts: Verdicts,
        ends: frozenset[int],
        observed: bool,
    ) -> None:
        self.decoder, self.target, self.drafter = decoder, decoder.target, decoder.drafter
        self.links, self.trace, self.stage = decoder.links, decoder.tracer, decoder.stage
        self.verdicts, self.sampling, self.observed = verdicts, verdicts.sampling, observed
        staircase = self.drafter.staircase
        self.tokens = list(prompt)
        self.capacity = len(prompt) + max_new_tokens + staircase.num_stages + 2
        self.cache = self.target.new_cache(self.capacity, staircase.stage_layers, tentative=1)
        self.rotary = self.target.rotary_table(self.capacity)
        self.anchors = staircase.anchors
        self.row_of = {anchor: row for row, anchor in enumerate(self.anchors)}
        self.kept: dict[int, Tensor] = {}  # position -> anchor states [A, H], where the head is
        self.outbox: list[Callable[[], None]] = []  # results of tentative work
        self.owed: list[tuple[int, int]] = []  # (stage, position) that worked in the last cycle
        self.taken: set[str] = set()
        self.drafted: Draft | None = None  # of the last cycle, where the head is
        self.token: int | None = None  # that enters next, if it is known here
        self.in_flight: dict[int, Draft] = {}  # position -> its draft, where it is verified
        self.announced: deque[int] = deque()  # positions whose drafts are on their way to be verified
        self.verdict: Verdict | None = None  # that has come while work was being done
        self.at, self.worked = -1, -1  # the cycle this rank is in (-1: prefill), the last one it has worked for
        self.ends, self.left = ends, max_new_tokens  # new tokens that may still come
        self.stopping = False
        if self.stage is not None:
            bounds = staircase.boundaries
            self.layers = range(bounds[self.stage], bounds[self.stage + 1])
            self.own = decoder.anchors_of[self.stage]
            self.keep = {anchor: row for row, anchor in enumerate(self.own)}

    # -- prefill ------------------------------------------------------------------------------------------------------

    def prefill(self) -> int:
        """The prompt, in pieces that follow each other through the stages."""
        self.trace.switch(Work.PREFILL, -1)
        P, links, size = len(self.tokens), self.links, self.decoder.prefill_chunk
        pieces = [(start, min(start + size, P)) for start in range(0, P, size)]
        own: list[Tensor] = []
        hidden = None
        for start, stop in pieces if self.stage is not None else []:
            if self.stage == 0:
                hidden = self.target.embed_tokens(self.tokens[start:stop])
            else:
                assert links.rows_in is not None
                hidden = links.rows_in.receive(stop - start)[None]
            kept, hidden = self.target.prefill_layers(hidden, self.layers, start, self.cache, self.own)
            if links.rows_out is not None:
                links.rows_out.send(hidden[0])
            states = [kept[anchor][0] for anchor in self.own]
            if states and links.anchor_rows_out is not None:
                links.anchor_rows_out.send(torch.stack(states, dim=1))
            elif states and self.decoder.drafts:
                own.append(torch.stack(states, dim=1))
        if self.decoder.drafts:
            self._start_head(pieces, own)
        if self.decoder.leads:
            assert hidden is not None
            first = self._tell(self.verdicts.own(hidden[0, -1], P), False).token
        else:
            first = self._told().token
        for sent in (links.rows_out, links.anchor_rows_out):
            if sent is not None:
                sent.finish()
        self.schedule = PipelineSchedule(self.drafter.staircase, P)
        self.token = first
        self.trace.switch(Work.IDLE, 0)
        return first

    def _start_head(self, pieces: Sequence[tuple[int, int]], own: Sequence[Tensor]) -> None:
        H = self.target.hidden_size
        states: list[Tensor | None] = [None] * len(self.anchors)
        if self.anchors[0] == 0:
            states[0] = self.target.embed_tokens(self.tokens)
        for stage, anchors in enumerate(self.decoder.anchors_of):
            if not anchors:
                continue
            source = self.links.anchor_rows_in.get(stage)
            parts = own if source is None else [source.receive(stop - start) for start, stop in pieces]
            whole = torch.cat(list(parts))
            for index, anchor in enumerate(anchors):
                states[self.row_of[anchor]] = whole[:, index].reshape(1, -1, H)
        self.drafter.start(self.tokens, [state for state in states if state is not None], self.capacity)

    # -- one cycle ----------------------------------------------------------------------------------------------------

    def cycle(self) -> CycleEvent:
        """This rank's part of the current cycle, and of the next one as far as it goes without the verdict."""
        plan = self.schedule.plan()
        self.at = plan.index
        if self.worked != plan.index:
            self._work(plan, tentative=False)
        self._hand_over(plan.index)
        self.owed, self.taken = list(plan.stages), set()
        if self.decoder.leads:
            self.announced.append(plan.newest + 1)
        drafted = self._draft_of_this_cycle(plan)
        emitted, accepted = None, None
        if plan.leaving is not None:
            message = self._verify(plan) if self.decoder.leads else self._go_on_until_told()
            if message.token == STOP:
                return CycleEvent(None, None, None, None)
            emitted, accepted = message.token, message.accepted
        self.schedule.advance(accepted)
        if plan.leaving is not None:
            self.kept.pop(plan.leaving - 1, None)  # it had its deepest row in this cycle
            self.in_flight.pop(plan.leaving + 1, None)
        if accepted is False:
            assert plan.leaving is not None and emitted is not None
            self._restart(plan.leaving + 1, emitted)
        return CycleEvent(plan, drafted, emitted, accepted)

    def _work(self, plan: Cycle, tentative: bool) -> None:
        """Compute what `plan` gives to this rank, unless a rejection makes it useless on the way."""
        useless = self._useless if tentative else None
        position = next((at for stage, at in plan.stages if stage == self.stage), None)
        token = self._entering_token(plan)
        states = None
        if position is not None:
            if self.stage == 0:
                assert token is not None
                hidden = self.target.embed(token)
            else:
                hidden = self._hidden(plan.index)
            self._begin(Work.STAGE, plan.index)
            states = hidden.new_empty(len(self.own), self.target.hidden_size)
            hidden = self.target.run_layers(
                hidden, self.layers, position, self.rotary, self.cache, self.keep, states, useless
            )
            if useless is not None and useless():
                return
            self._put_out(plan, position, hidden, states)
            if not tentative or self.verdict is not None:  # known to be of use: nobody need wait for the head
                self._hand_over(plan.index)
        if self.decoder.drafts:
            self._take_anchors(plan.index)
            if useless is not None and useless():
                return
            self._begin(Work.HEAD, plan.index)
            self._draft(plan, token)
            if states is not None and position is not None:
                self._keep(position, self.own, states)
        self.worked = plan.index

    def _put_out(self, plan: Cycle, position: int, hidden: Tensor, states: Tensor) -> None:
        """Results of a stage, to be sent when they are known to be of use."""
        links = self.links
        if links.hidden_out is not None:
            send = links.hidden_out.send
            self.outbox.append(lambda: send(hidden))
        if self.own and links.anchors_out is not None:
            send_states = links.anchors_out.send
            self.outbox.append(lambda: send_states(states))
        if self.decoder.leads:
            self.last_hidden = hidden

    def _draft(self, plan: Cycle, token: int | None) -> None:
        """The rows that are due, and the draft of position newest + 1."""
        assert token is not None
        del self.tokens[plan.newest :]
        self.tokens.append(token)
        embedded = self.target.embed(token)[0, 0]
        states = embedded.new_empty(len(self.anchors), self.target.hidden_size)
        states[0] = embedded
        self.kept[plan.newest] = states
        u = 0.0
        if not self.sampling.greedy:
            u = uniform(self.sampling.seed, Purpose.DRAFT, plan.newest + 1, plan.attempt)
        draft = self.drafter.draft(plan, self.kept, self.tokens, self.sampling, u)
        self.drafted = draft
        links = self.links

        def send() -> None:
            message = torch.tensor([draft.token])
            if links.entering is not None:
                links.entering.send(message)
            assert links.verified is not None and links.law is not None
            links.verified.send(message)
            if draft.law is not None:
                links.law.send(draft.law)

        self.outbox.append(send)

    def _keep(self, position: int, anchors: Sequence[int], states: Tensor) -> None:
        if position in self.kept:
            for row, anchor in enumerate(anchors):
                self.kept[position][self.row_of[anchor]] = states[row]

    def _hand_over(self, cycle: int) -> None:
        if self.outbox:
            self.trace.switch(Work.HAND_OVER, cycle)
            for send in self.outbox:
                send()
            self.outbox.clear()

    # -- what others hand over at the end of a cycle ------------------------------------------------------------------

    def _entering_token(self, plan: Cycle) -> int | None:
        """The token that enters in this cycle, where it is needed: on the ranks of stage 0 and of the head."""
        token, self.token = self.token, None
        if self.decoder.drafts:
            return self.drafted.token if token is None and self.drafted is not None else token
        if self.links.entering is None:
            return None
        return self._entering(plan.index) if token is None else token

    def _entering(self, cycle: int) -> int:
        self._wait(cycle)
        assert self.links.entering is not None
        self.taken.add("entering")
        return int(self.links.entering.receive())

    def _hidden(self, cycle: int) -> Tensor:
        self._wait(cycle)
        assert self.links.hidden_in is not None
        self.taken.add("hidden")
        return self.links.hidden_in.receive()[None, None]

    def _take_anchors(self, cycle: int) -> None:
        if "anchors" in self.taken:
            return
        self._wait(cycle)
        self.taken.add("anchors")
        for stage, position in self.owed:
            if stage in self.links.anchors_in:
                self._keep(position, self.decoder.anchors_of[stage], self.links.anchors_in[stage].receive())

    def _draft_at(self, position: int) -> Draft:
        """The draft at a position, on the rank that verifies."""
        assert self.links.verified is not None and self.links.law is not None
        while position not in self.in_flight:
            at, token = self.announced.popleft(), int(self.links.verified.receive())
            self.in_flight[at] = Draft(token, None if self.sampling.greedy else self.links.law.receive())
        return self.in_flight[position]

    def _draft_of_this_cycle(self, plan: Cycle) -> int | None:
        if self.decoder.drafts:
            assert self.drafted is not None
            return self.drafted.token
        return self._draft_at(plan.newest + 1).token if self.observed and self.decoder.leads else None

    def _wait(self, cycle: int) -> None:
        """Until another rank hands something over."""
        self.trace.switch(Work.IDLE, cycle)
        self.decoder.tell_state(f"cycle {cycle}, waits")

    def _begin(self, work: Work, cycle: int) -> None:
        self.trace.switch(work, cycle)
        self.decoder.tell_state(f"cycle {cycle}, {work}")

    def _take_what_is_owed(self, cycle: int) -> None:
        """Messages of a cycle that no work will ask for."""
        before = any(stage + 1 == self.stage for stage, _ in self.owed)
        if before and self.links.hidden_in is not None and "hidden" not in self.taken:
            self._hidden(cycle)
        elif self.owed and self.stage == 0 and self.links.entering is not None and "entering" not in self.taken:
            self._entering(cycle)
        if self.decoder.drafts:
            self._take_anchors(cycle)
        if self.announced:
            self._draft_at(self.announced[-1])

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def _verify(self, plan: Cycle) -> Verdict:
        """The verdict on the draft behind the position that leaves; everyone is told."""
        assert plan.leaving is not None
        position = plan.leaving + 1
        self._wait(plan.index)
        draft = self._draft_at(position)
        self._begin(Work.VERIFY, plan.index)
        attempt = self.schedule.attempt_of(position)
        token = self.verdicts.of(self.last_hidden[0, 0], draft, position, attempt)
        return self._tell(STOP if self.stopping else token, token == draft.token)

    def _go_on_until_told(self) -> Verdict:
        """Work on the next cycle until the verdict of this one is here."""
        assert self.links.mailbox is not None
        if not self._useless():
            self._work(self.schedule.plan(ahead=True), tentative=True)
        message, self.verdict = self.verdict or self._told(), None
        return message

    def _useless(self) -> bool:
        """Whether the verdict has come that makes work on the next cycle useless."""
        if self.verdict is None and (message := self.links.mailbox.look()) is not None:  # type: ignore[union-attr]
            self.verdict = Verdict.of(message)
        return self.verdict is not None and (self.verdict.over or not self.verdict.accepted)

    def _told(self) -> Verdict:
        """Wait for the verdict."""
        assert self.links.mailbox is not None
        self._wait(self.at)
        return Verdict.of(self.links.mailbox.wait())

    def _tell(self, token: int, accepted: bool) -> Verdict:
        """Send a verdict to all others."""
        self.left -= 1
        verdict = Verdict(token, accepted, over=token == STOP or token in self.ends or self.left == 0)
        message = torch.tensor([token, accepted, verdict.over])
        for link in self.links.verdicts_out:
            link.send(message)
        return verdict

    def _restart(self, position: int, token: int) -> None:
        """Drop everything from `position` on; the target's own token enters there."""
        self._take_what_is_owed(self.schedule.cycle)
        self.outbox.clear()
        self.owed, self.worked, self.drafted = [], -1, None
        for table in (self.kept, self.in_flight):
            for at in [at for at in table if at >= position]:
                del table[at]
        self.cache.truncate(position)
        del self.tokens[position:]
        self.token = token

    def end(self, stopped: bool) -> None:
        """Leave no message behind; if the caller `stopped`, the others learn it with the next verdict."""
        self.stopping = stopped
        if self.decoder.leads and stopped:
            while self.cycle().cycle is not None:
                pass
        self._take_what_is_owed(self.schedule.cycle)
        self.outbox.clear()
        self.decoder.spans, self.decoder.cycles = self.trace.stop(), self.schedule.cycle
