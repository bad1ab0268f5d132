"""Chunks of an endless iterator through several processes, in order, with a bounded number of them in memory."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from spd_lightning.errors import InputError

In = TypeVar("In")
Out = TypeVar("Out")

#: Rows that travel together.
CHUNK = 256

_work: Callable[[Any], Any] | None = None  # in a worker process: what it does


def chunks(items: Iterable[In], size: int = CHUNK) -> Iterator[list[In]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def ordered_map(work: Callable[[In], Out], items: Iterable[In], workers: int) -> Iterator[Out]:
    """`map` with `workers` processes (0: in this one).

    Unlike an executor's own map it reads no further ahead than the workers need, so memory does not grow with the
    input. `work` is sent to every process once.
    """
    if workers < 1:
        yield from map(work, items)
        return
    # spawned, since a fork of a process with threads (tokenizers, torch, CUDA) may never wake up again
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[Any]] = deque()
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work,))
    try:
        for item in items:
            waiting.append(pool.submit(_do, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            f"one of {workers} worker processes was killed, perhaps for want of memory: lower data.num_workers "
            "(--workers)."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work


def _do(item: Any) -> Any:
    assert _work is not None
    return _work(item)
