"""Links between the ranks of a pipeline: one-way, in order, with buffers allocated once and receives posted ahead.

What travels is decided by the schedule, which every rank follows on its own, so a message needs no header and nobody
asks for one. Hidden states go by the backend of their device (NCCL on GPUs, gloo on CPUs); tokens and verdicts are a
few bytes that the host acts upon, and go by gloo everywhere.

The two backends wait differently. gloo sends once the receive is posted, and its waits hold up the host: receives are
posted ahead, as many as messages can be under way. NCCL waits on the device, where a receive that is posted ahead is a
kernel that spins, holds up whoever waits for the device, and is ended by a watchdog: there a receive is posted when it
is asked for, which costs the host nothing, and none outlives a generation.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: The library's own limit of a wait; who waits too long for whom is told much earlier, by those who watch.
FOREVER = timedelta(days=3650)


class LinkError(RuntimeError):
    """A message could not be sent or received: the other rank is gone.

    Attributes:
        rank: the other one.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(f"the connection to rank {rank} broke")
        self.rank = rank


class Link:
    """One direction between two ranks, for messages of one shape and dtype.

    Args:
        source, destination: global ranks; this process is one of them.
        shape, dtype, device: of a message.
        group: that both belong to.
        tag: tells links of one pair apart (gloo).
        slots: messages that may be under way before the sender waits. A pipeline of n stages needs n + 2: the last
            stage's rank takes a draft n - 1 cycles after it was made, and may be n - 1 cycles ahead of the first's.
    """

    def __init__(
        self,
        source: int,
        destination: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        group: Any,
        tag: int,
        slots: int,
    ) -> None:
        self.source, self.destination = source, destination
        self.sends = dist.get_rank() == source
        self._group, self._tag = group, tag if device.type != "cuda" else 0
        self._peer = dist.get_group_rank(group, destination if self.sends else source)
        with torch.inference_mode(False):  # they are written in and out of inference mode
            self._buffers = [torch.zeros(*shape, dtype=dtype, device=device) for _ in range(slots)]
        self._pending: deque[tuple[Tensor, Any]] = deque()
        self._next = 0
        if not self.sends and device.type != "cuda":
            for _ in range(slots):
                self._post()

    def send(self, message: Tensor) -> None:
        """Hand a message over; returns at once unless `slots` messages are under way."""
        if len(self._pending) == len(self._buffers):
            self._finished()
        buffer = self._buffer()
        buffer.copy_(message.view_as(buffer))
        self._pending.append((buffer, _called(self._group.send, buffer, self._peer, self._tag, self._other)))

    def receive(self) -> Tensor:
        """The next message, once it is here."""
        if not self._pending:
            self._post()
        message = self._finished().clone()
        if not message.is_cuda:
            self._post()
        return message

    @property
    def _other(self) -> int:
        return self.destination if self.sends else self.source

    def _buffer(self) -> Tensor:
        buffer, self._next = self._buffers[self._next], (self._next + 1) % len(self._buffers)
        return buffer

    def _post(self) -> None:
        buffer = self._buffer()
        self._pending.append((buffer, _called(self._group.recv, buffer, self._peer, self._tag, self._other)))

    def _finished(self) -> Tensor:
        """Wait for the oldest message under way; its buffer."""
        buffer, work = self._pending.popleft()
        _wait(work, buffer, self._other)
        return buffer


class Rows:
    """Like a link, for the pieces of a prompt: as many rows as a piece has, received when they are asked for."""

    def __init__(
        self, source: int, destination: int, width: tuple[int, ...], like: Tensor, group: Any, tag: int
    ) -> None:
        self._other = destination if dist.get_rank() == source else source
        self._group, self._tag = group, 0 if like.is_cuda else tag
        self._peer = dist.get_group_rank(group, self._other)
        self._width, self._like = width, like
        self._pending: list[tuple[Tensor, Any]] = []

    def send(self, rows: Tensor) -> None:
        """[C, *width]; it must not change before `finish`."""
        rows = rows.contiguous()
        self._pending.append((rows, _called(self._group.send, rows, self._peer, self._tag, self._other)))

    def receive(self, count: int) -> Tensor:
        rows = self._like.new_empty(count, *self._width)
        _wait(_called(self._group.recv, rows, self._peer, self._tag, self._other), rows, self._other)
        return rows

    def finish(self) -> None:
        """Wait until everything that was sent has arrived."""
        for rows, work in self._pending:
            _wait(work, rows, self._other)
        self._pending.clear()


def _called(operation: Any, message: Tensor, peer: int, tag: int, other: int) -> Any:
    """Start a send or a receive; `other`: global rank, for who reads the error."""
    try:
        return operation([message], peer, tag)
    except RuntimeError as error:
        raise LinkError(other) from error


def _wait(work: Any, message: Tensor, other: int) -> None:
    """On a GPU the stream waits, elsewhere the host."""
    try:
        work.wait() if message.is_cuda else work.wait(FOREVER)
    except RuntimeError as error:
        raise LinkError(other) from error


class Mailbox:
    """Receives verdicts on a thread, so that a busy rank can look whether one has come.

    gloo tells of a message to who waits for it only. The thread waits for messages during generations alone: a process
    that ends while a thread waits in gloo may be aborted.

    Args:
        link: of messages [token, accepted, over].
    """

    def __init__(self, link: Link) -> None:
        self._generations: SimpleQueue[bool] = SimpleQueue()
        self._messages: SimpleQueue[list[int] | LinkError] = SimpleQueue()
        self._link = link
        threading.Thread(target=self._listen, daemon=True, name="verdicts").start()

    def _listen(self) -> None:
        try:
            while self._generations.get():
                over = False
                while not over:
                    message = self._link.receive().tolist()
                    over = bool(message[2])
                    self._messages.put(message)
        except LinkError as error:
            self._messages.put(error)

    def open(self) -> None:
        """A generation begins: listen to its verdicts, up to the one that says that it is over."""
        self._generations.put(True)

    def close(self) -> None:
        """No generation follows."""
        self._generations.put(False)

    def look(self) -> list[int] | None:
        """The next message if it is here."""
        try:
            return self._checked(self._messages.get_nowait())
        except Empty:
            return None

    def wait(self) -> list[int]:
        """The next message."""
        return self._checked(self._messages.get())

    def _checked(self, message: list[int] | LinkError) -> list[int]:
        if isinstance(message, LinkError):
            raise message
        return message
