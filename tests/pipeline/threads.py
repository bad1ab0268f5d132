"""All ranks of a pipeline as threads of one process, over a stand-in for torch.distributed that waits as gloo does.

A send is over when the receive for it was posted, and not before: data is read from the sender's buffer at that moment,
so a buffer that is used again too early shows. Sixteen stages cost no more than the same work in one process.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_lightning.decoding import links, pipeline, topology
from spd_lightning.decoding.pipeline import PipelineDecoder
from spd_lightning.target.target import Target

#: Seconds after which a wait counts as a deadlock.
LIMIT = 20.0
here = threading.local()


class Work:
    """One send or receive under way."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def wait(self, timeout: Any = None) -> None:
        if not self.over.is_set():
            here.waits = getattr(here, "waits", 0) + 1
        if not self.over.wait(LIMIT):
            raise RuntimeError("deadlock: nobody came")


class World:
    """Everything that is under way between the ranks; also the one process group there is."""

    def __init__(self, size: int) -> None:
        self.size, self._lock = size, threading.Lock()
        self._open: dict[tuple[int, int, int], tuple[deque[Any], deque[Any]]] = defaultdict(lambda: (deque(), deque()))
        self._inboxes = [SimpleQueue[Any]() for _ in range(size)]
        self._said: dict[int, dict[int, Any]] = defaultdict(dict)
        self._barrier = threading.Barrier(size, timeout=LIMIT)

    # as a process group

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        return self._meet((here.rank, peer, tag), 0, tensors[0])

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Work:
        return self._meet((peer, here.rank, tag), 1, tensors[0])

    def _meet(self, channel: tuple[int, int, int], side: int, tensor: Tensor) -> Work:
        work = Work()
        with self._lock:
            sides = self._open[channel]
            sides[side].append((tensor, work))
            if sides[0] and sides[1]:
                (sent, sending), (into, receiving) = sides[0].popleft(), sides[1].popleft()
                assert sent.shape == into.shape and sent.dtype == into.dtype, channel
                into.copy_(sent)
                sending.over.set()
                receiving.over.set()
        return work

    def unread(self) -> dict[tuple[int, int, int], int]:
        """Messages by (source, destination, tag) that were sent and never received."""
        return {channel: len(sends) for channel, (sends, _) in self._open.items() if sends}

    # as the module torch.distributed

    def get_rank(self) -> int:
        return int(here.rank)

    def get_world_size(self) -> int:
        return self.size

    def get_group_rank(self, group: Any, rank: int) -> int:
        return rank

    def new_group(self, *unused: Any, **settings: Any) -> World:
        return self

    def broadcast_object_list(self, box: list[Any], src: int, group: Any) -> None:
        if here.rank == src:
            for rank in set(range(self.size)) - {src}:
                self._inboxes[rank].put(box[0])
        else:
            box[0] = self._inboxes[here.rank].get(timeout=3 * LIMIT)

    def all_gather_object(self, everyone: list[Any], mine: Any, group: Any) -> None:
        here.turn = getattr(here, "turn", -1) + 1
        self._said[here.turn][here.rank] = mine
        self._barrier.wait()
        everyone[:] = [self._said[here.turn][rank] for rank in range(self.size)]


@dataclass
class Outcome:
    """What came of a pipeline of threads.

    Attributes:
        found: what the leader's script returned.
        errors: by rank.
        waits: by rank, how often it waited for a message.
        unread: messages that nobody received.
    """

    found: Any = None
    errors: dict[int, BaseException] = field(default_factory=dict)
    waits: dict[int, int] = field(default_factory=dict)
    unread: dict[tuple[int, int, int], int] = field(default_factory=dict)


def run(
    monkeypatch: pytest.MonkeyPatch,
    world: int,
    target: Target,
    drafter: Callable[[], Any],
    script: Callable[[PipelineDecoder], Any],
    **options: Any,
) -> Outcome:
    """Run `script` on the leader's decoder while the other threads follow."""
    made, outcome = World(world), Outcome()
    for module in (links, topology, pipeline):
        monkeypatch.setattr(module, "dist", made)
    _let_mailboxes_know_their_rank(monkeypatch)

    def main(rank: int) -> None:
        here.rank = rank
        torch.set_num_threads(1)
        try:
            decoder = PipelineDecoder(target, drafter(), range(world), **options)
            if decoder.leads:
                outcome.found = script(decoder)
                decoder.close()
            else:
                decoder.follow()
        except BaseException as error:
            outcome.errors[rank] = error
            made._barrier.abort()
        outcome.waits[rank] = getattr(here, "waits", 0)

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * LIMIT)
    outcome.unread = made.unread()
    return outcome


def _let_mailboxes_know_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of a mailbox belongs to the rank that made it."""
    plain = links.Mailbox.__init__

    def init(self: links.Mailbox, link: links.Link) -> None:
        rank, listen = here.rank, self._listen

        def as_rank() -> None:
            here.rank = rank
            listen()

        self._listen = as_rank  # type: ignore[method-assign]
        plain(self, link)

    monkeypatch.setattr(links.Mailbox, "__init__", init)
