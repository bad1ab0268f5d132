"""Which rank does what in a pipeline, and the links between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from spd_lightning.decoding.links import FOREVER, Link, Mailbox, Rows
from spd_lightning.errors import InputError
from spd_lightning.staircase import Staircase

if TYPE_CHECKING:
    from spd_lightning.decoding.pipeline import PipelineDecoder

#: (source, destination), global ranks.
Edge = tuple[int, int]


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


class Groups:
    """Process groups of some pipelines; made by every process of the job, in the same order.

    Attributes:
        control: gloo, of the pipeline that this rank belongs to; None if it belongs to none.
    """

    def __init__(self, control: Any, data: dict[Edge, Any]) -> None:
        self.control, self._data = control, data

    @classmethod
    def of(cls, pipelines: Sequence[Roles], staircase: Staircase, device: torch.device) -> Groups:
        """Groups of all `pipelines`, which share no rank. On GPUs every edge has a communicator of its own.

        One communicator does one thing after another: two directions in one could wait for each other.
        """
        control, data = None, {}
        for roles in pipelines:
            group = dist.new_group(list(roles.ranks), backend="gloo", timeout=FOREVER)
            if dist.get_rank() in roles.ranks:
                control = group
            if device.type == "cuda":
                for edge in edges(roles, staircase):
                    made = dist.new_group(sorted(edge), backend="nccl", timeout=FOREVER)
                    if dist.get_rank() in edge:
                        data[edge] = made
        for edge, made in data.items():  # a communicator's first message makes it, and the host waits: all in one order
            _greet(made, *edge, device)
        return cls(control, data)

    def data(self, source: int, destination: int) -> Any:
        """What hidden states travel over."""
        return self._data.get((source, destination), self.control)


def edges(roles: Roles, staircase: Staircase) -> list[Edge]:
    """Who sends hidden states to whom: every stage to the next, those with anchors to the head."""
    stages = roles.ranks[: roles.num_stages]
    owners = [rank for rank, anchors in zip(stages, staircase.anchors_of_stages, strict=True) if anchors]
    return sorted({*pairwise(stages), *((rank, roles.head) for rank in owners if rank != roles.head)})


def _greet(group: Any, source: int, destination: int, device: torch.device) -> None:
    message = torch.zeros(1, device=device)
    if dist.get_rank() == source:
        dist.send(message, destination, group=group)
    else:
        dist.recv(message, source, group=group)


class RankLinks:
    """The links of one rank: to its neighbours and to the head's rank."""

    def __init__(self, decoder: PipelineDecoder) -> None:
        roles, rank, target = decoder.roles, decoder.rank, decoder.target
        n, stage = roles.num_stages, decoder.stage
        H, device, host = target.hidden_size, target.device, torch.device("cpu")
        like = torch.empty(0, dtype=target.dtype, device=device)
        control, slots = decoder.groups.control, n + 2
        ids = decoder.drafter.draft_ids
        draft_vocabulary = target.vocab_size if ids is None else len(ids)

        def link(a: int, b: int, tag: int, *shape: int) -> Link:
            return Link(a, b, shape, target.dtype, device, decoder.groups.data(a, b), tag, slots)

        def rows(a: int, b: int, tag: int, *width: int) -> Rows:
            return Rows(a, b, width, like, decoder.groups.data(a, b), tag)

        def small(a: int, b: int, tag: int, size: int, dtype: torch.dtype = torch.int64) -> Link:
            return Link(a, b, (size,), dtype, host, control, tag, slots)

        self.hidden_in = self.hidden_out = self.rows_in = self.rows_out = None
        if stage is not None and stage > 0:
            edge = roles.ranks[stage - 1], rank
            self.hidden_in, self.rows_in = link(*edge, 1, H), rows(*edge, 2, H)
        if stage is not None and stage < n - 1:
            edge = rank, roles.ranks[stage + 1]
            self.hidden_out, self.rows_out = link(*edge, 1, H), rows(*edge, 2, H)
        #: stage -> its anchor states, on the head's rank; and out of this rank
        self.anchors_in: dict[int, Link] = {}
        self.anchor_rows_in: dict[int, Rows] = {}
        self.anchors_out = self.anchor_rows_out = None
        for s, anchors in enumerate(decoder.anchors_of):
            edge = roles.ranks[s], roles.head
            if not anchors or edge[0] == edge[1] or rank not in edge:
                continue
            states, prompt = link(*edge, 3, len(anchors), H), rows(*edge, 4, len(anchors), H)
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
