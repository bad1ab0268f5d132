"""One rank's part of a generation: what it computes, takes from others and hands over, cycle by cycle.

See `pipeline` for the protocol.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spd_lightning.decoding.decoder import CycleEvent
from spd_lightning.decoding.drafters import Draft
from spd_lightning.decoding.schedule import Cycle, PipelineSchedule
from spd_lightning.decoding.trace import Work
from spd_lightning.decoding.verdict import Verdicts
from spd_lightning.randomness import Purpose, uniform

if TYPE_CHECKING:
    from spd_lightning.decoding.pipeline import PipelineDecoder

#: In the place of a verdict's token: the caller wants no more.
STOP = -2


@dataclass(frozen=True)
class Verdict:
    """What the rank of the last stage tells the others: a token, whether it is the draft, whether it is the last."""

    token: int
    accepted: bool
    over: bool

    @classmethod
    def of(cls, message: Sequence[int]) -> Verdict:
        return cls(message[0], bool(message[1]), bool(message[2]))

    @property
    def flushes(self) -> bool:
        """Whether everything in flight is dropped."""
        return self.over or not self.accepted


class Paced:
    """Asks `useless` before every layer, when a GPU has come near it.

    The host launches layers faster than a GPU computes them: it would have asked for the last time, and launched
    everything, long before the verdict can come.
    """

    #: Layers that may be launched ahead of the device.
    AHEAD = 2

    def __init__(self, useless: Callable[[], bool]) -> None:
        self._useless = useless
        self._layers: deque[torch.cuda.Event] = deque()

    def __call__(self) -> bool:
        reached = torch.cuda.Event()
        reached.record()
        self._layers.append(reached)
        if len(self._layers) > self.AHEAD:
            self._layers.popleft().synchronize()
        return self._useless()


class RankRun:
    """One generation on one rank."""

    widths = ()

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
        self.heard: deque[Verdict] = (
            deque()
        )  # verdicts that came while work was being done, of this cycle and later ones
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
        P, links, size = len(self.tokens), self.links, self.decoder.prefill_chunk
        self._begin(Work.PREFILL, -1)
        if links.mailbox is not None:
            links.mailbox.open()
        pieces = [(start, min(start + size, P)) for start in range(0, P, size)]
        own: list[Tensor] = []
        hidden = None
        for start, stop in pieces if self.stage is not None else []:
            self.decoder.tell_state(f"cycle -1, prefill of {start}")
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
            first = self._tell(self.verdicts.own(self.target.logits(hidden[0, -1]), P), False).token
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
        drafted = None if self.drafted is None else self.drafted.token
        emitted, accepted = None, None
        if plan.leaving is not None:
            message = self._verify(plan) if self.decoder.leads else self._go_on_until_told()
            if message.token == STOP:
                return CycleEvent(None, None, None, None)
            emitted, accepted = message.token, message.accepted
        if self.observed and self.decoder.leads:  # after the verdict, which need not wait for it
            drafted = self._draft_at(plan.newest + 1).token
        self.schedule.advance(accepted)
        if plan.leaving is not None:
            self.kept.pop(plan.leaving - 1, None)  # it had its deepest row in this cycle
            self.in_flight.pop(plan.leaving + 1, None)
        if accepted is False:
            assert plan.leaving is not None and emitted is not None
            self._restart(plan.leaving + 1, emitted)
        return CycleEvent(plan, drafted, emitted, accepted)

    def _work(self, plan: Cycle, tentative: bool) -> None:
        """Compute what `plan` gives to this rank, as far as it is of use.

        Args:
            tentative: the verdict of the cycle before is not known yet. If it drops this one, nothing is handed over.
        """
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
            states = hidden.new_zeros(len(self.own), self.target.hidden_size)
            hidden = self.target.run_layers(
                hidden, self.layers, position, self.rotary, self.cache, self.keep, states, self._abandoned(tentative)
            )
            if tentative and self._dropped():
                return
            self._put_out(plan, position, hidden, states)
            if not tentative or self.heard:  # expected by the others: nobody need wait for the head
                self._hand_over(plan.index)
        if self.decoder.drafts:
            self._take_anchors(plan.index)
            if tentative and self._dropped():
                return
            self._begin(Work.HEAD, plan.index)
            self._draft(plan, token)
            if states is not None and position is not None:
                self._keep(position, self.own, states)
        self.worked = plan.index

    def _abandoned(self, tentative: bool) -> Callable[[], bool] | None:
        """What a stage asks between its layers; where it stops, it hands over what it has, and nobody looks at it.

        A draft that is shown in flight must be what it would have been, so where somebody looks at every cycle, only
        work that is handed to nobody is abandoned.
        """
        if self.decoder.leads:
            return None
        asked = self._pointless if not self.observed else self._dropped if tentative else None
        return Paced(asked) if asked is not None and self.target.device.type == "cuda" else asked

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
        if position not in self.in_flight:
            self._wait(self.at)
        while position not in self.in_flight:
            at, token = self.announced.popleft(), int(self.links.verified.receive())
            self.in_flight[at] = Draft(token, None if self.sampling.greedy else self.links.law.receive())
        return self.in_flight[position]

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
        draft = self._draft_at(position)
        self._begin(Work.VERIFY, plan.index)
        attempt = self.schedule.attempt_of(position)
        token = self.verdicts.of(self.target.logits(self.last_hidden)[0, 0], draft, position, attempt)
        return self._tell(STOP if self.stopping else token, token == draft.token)

    def _go_on_until_told(self) -> Verdict:
        """Work on the next cycle until the verdict of this one is here."""
        if not self._dropped():
            self._work(self.schedule.plan(ahead=True), tentative=True)
        return self.heard.popleft() if self.heard else self._told()

    def _listen(self) -> None:
        """Take the verdicts that have come."""
        assert self.links.mailbox is not None
        while (message := self.links.mailbox.look()) is not None:
            self.heard.append(Verdict.of(message))

    def _dropped(self) -> bool:
        """Whether the verdict of this cycle has come and drops the next one."""
        self._listen()
        return bool(self.heard) and self.heard[0].flushes

    def _pointless(self) -> bool:
        """Whether a verdict has come that drops what a stage works on, be it of this cycle or of a later one.

        The position that it judged has left every stage before the last. So whatever they work on came later, and is
        dropped. Its messages are expected all the same, up to those of the verdict's own cycle.
        """
        self._listen()
        return any(verdict.flushes for verdict in self.heard)

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
        self.decoder.ended(self.trace.stop(), self.schedule.cycle)
