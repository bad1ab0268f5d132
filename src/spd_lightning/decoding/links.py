"""Links between the ranks of a pipeline: one-way, in order, with buffers allocated once and receives posted ahead.

What travels is decided by the schedule, which every rank follows on its own, so a message needs no header and nobody
asks for one. Hidden states go by the backend of their device (NCCL on GPUs, gloo on CPUs); tokens and verdicts are a
few bytes that the host acts upon, and go by gloo everywhere.

NCCL orders what one communicator does and knows no tags: there every link has a communicator of its own, or a receive
that was posted ahead would hold up a send behind it.
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

#: Messages that may be under way on a link before its sender waits.
DEPTH = 4
#: The library's own limit of a wait; who waits too long for whom is told much earlier, by `Watch`.
FOREVER = timedelta(days=1)


class LinkError(RuntimeError):
    """A message could not be sent or received: the other rank is gone."""


class Link:
    """One direction between two ranks, for messages of one shape and dtype.

    Args:
        source, destination: global ranks; this process is one of them.
        shape, dtype, device: of a message.
        group: that both belong to.
        tag: tells links of one pair apart (gloo).
        ahead: receives that are posted before they are asked for.
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
        ahead: int = 2,
    ) -> None:
        self.source, self.destination, self.group, self.tag = source, destination, group, tag
        self.sends = dist.get_rank() == source
        slots = DEPTH if self.sends else ahead
        self._buffers = [torch.zeros(*shape, dtype=dtype, device=device) for _ in range(slots)]
        self._pending: deque[tuple[int, Any]] = deque()
        self._next = 0
        if not self.sends:
            for _ in range(ahead):
                self._post()

    def send(self, message: Tensor) -> None:
        """Hand a message over; returns at once unless `DEPTH` messages are under way."""
        if len(self._pending) == len(self._buffers):
            self._finished()
        slot, self._next = self._next, (self._next + 1) % len(self._buffers)
        self._buffers[slot].copy_(message.view_as(self._buffers[slot]))
        self._pending.append((slot, self._call(dist.isend, self._buffers[slot], self.destination)))

    def receive(self) -> Tensor:
        """The next message, once it is here; valid until the one after the next is received."""
        message = self._buffers[self._finished()].clone()
        self._post()
        return message

    def _post(self) -> None:
        slot, self._next = self._next, (self._next + 1) % len(self._buffers)
        self._pending.append((slot, self._call(dist.irecv, self._buffers[slot], self.source)))

    def _finished(self) -> int:
        """Wait for the oldest message under way; its buffer."""
        slot, work = self._pending.popleft()
        try:
            work.wait() if self._buffers[slot].is_cuda else work.wait(FOREVER)
        except RuntimeError as error:
            raise self._lost() from error
        return slot

    def _call(self, operation: Any, buffer: Tensor, peer: int) -> Any:
        try:
            return operation(buffer, peer, group=self.group, tag=0 if buffer.is_cuda else self.tag)
        except RuntimeError as error:
            raise self._lost() from error

    def _lost(self) -> LinkError:
        other = self.destination if self.sends else self.source
        return LinkError(f"the connection to rank {other} broke")


class Rows:
    """Like a link, for the pieces of a prompt: as many rows as a piece has, received when they are asked for."""

    def __init__(
        self, source: int, destination: int, width: tuple[int, ...], like: Tensor, group: Any, tag: int
    ) -> None:
        self.source, self.destination, self.group, self.tag = source, destination, group, tag
        self._width, self._like = width, like
        self._pending: list[tuple[Tensor, Any]] = []

    def send(self, rows: Tensor) -> None:
        """[C, *width]; it must not change before `finish`."""
        rows = rows.contiguous()
        self._pending.append((rows, self._call(dist.isend, rows, self.destination)))

    def receive(self, count: int) -> Tensor:
        rows = self._like.new_empty(count, *self._width)
        self._wait(self._call(dist.irecv, rows, self.source))
        return rows

    def finish(self) -> None:
        """Wait until everything that was sent has arrived."""
        for _, work in self._pending:
            self._wait(work)
        self._pending.clear()

    def _wait(self, work: Any) -> None:
        try:
            work.wait() if self._like.is_cuda else work.wait(FOREVER)
        except RuntimeError as error:
            raise LinkError(f"the connection between ranks {self.source} and {self.destination} broke") from error

    def _call(self, operation: Any, rows: Tensor, peer: int) -> Any:
        try:
            return operation(rows, peer, group=self.group, tag=0 if rows.is_cuda else self.tag)
        except RuntimeError as error:
            raise LinkError(f"the connection to rank {peer} broke") from error


class Mailbox:
    """Receives a link's messages on a thread, so that a busy rank can look whether one has come.

    gloo tells of a message to who waits for it only.
    """

    def __init__(self, link: Link) -> None:
        self._messages: SimpleQueue[list[int] | LinkError] = SimpleQueue()
        self._link = link
        self._thread = threading.Thread(target=self._listen, daemon=True, name="verdicts")
        self._thread.start()

    def _listen(self) -> None:
        try:
            while True:
                message = self._link.receive().tolist()
                self._messages.put(message)
                if message[0] == GOODBYE:
                    return
        except LinkError as error:
            self._messages.put(error)

    def close(self) -> None:
        """Wait for the sender's good-bye."""
        self._thread.join()

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


#: In the place of a token: no message follows on this link.
GOODBYE = -1
