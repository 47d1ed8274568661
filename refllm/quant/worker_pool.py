"""Independent pieces of work run concurrently and yield their results in order, on any executor
of ``concurrent.futures``.

``in_order`` keeps a few pieces in flight and yields results in the order of the work, so
memory holds only what is in flight. If a worker dies, its executor loses all of its futures
(``BrokenExecutor``); then another executor is created, and the unfinished pieces are
submitted to it. So pieces must be pure: computing one twice gives the same result.

| executor       | how                                                                       |
|----------------|---------------------------------------------------------------------------|
| processes      | ``processes(n)``, the default of the callers                              |
| one's own      | any ``Executor``; it is neither shut down nor replaced                    |
| a Dask cluster | ``client.get_executor()``; Dask itself reassigns the work of lost workers |

Left out: results larger than memory, priorities.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

__all__ = ["in_order", "processes"]

Work = TypeVar("Work")
Result = TypeVar("Result")
PATIENCE = 3  # pools that may break in a row without a single result


def processes(count: int) -> Callable[[], Executor]:
    """A function that creates a pool of ``count`` processes. They are spawned, not forked, so
    they inherit no threads and no locks.
    """
    return lambda: ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def in_order(
    function: Callable[[Work], Result],
    work: Iterable[Work],
    executor: Executor | Callable[[], Executor],
    flight: int,
) -> Iterator[Result]:
    """``map(function, work)``, with at most ``flight`` pieces submitted and not yet yielded.

    ``executor`` may be a function that creates one: it is then called again when workers die,
    and the executor is shut down in the end. When the iterator ends or is closed, no piece of it
    is running or waiting in any executor.

    Raises
    ------
    RuntimeError
        if pools break repeatedly, for example because a piece needs too much memory.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> list(in_order(abs, [-1, 2, -3], lambda: ThreadPoolExecutor(2), flight=2))
    [1, 2, 3]
    """
    make = executor if not isinstance(executor, Executor) else None
    pool = make() if make is not None else executor
    assert isinstance(pool, Executor)
    waiting: deque[tuple[Work, Future[Result]]] = deque()
    broken = 0
    source = iter(work)
    try:
        while True:
            while len(waiting) < flight and (piece := next(source, _END)) is not _END:
                waiting.append((piece, _submit(pool, function, piece)))
            if not waiting:
                return
            try:
                result = waiting[0][1].result()
            except BrokenExecutor as error:
                broken += 1
                if make is None or broken > PATIENCE:
                    raise RuntimeError(
                        f"workers died {broken} times without a result ({error}): is there too "
                        "little memory? use fewer workers"
                    ) from error
                pool.shutdown(wait=False, cancel_futures=True)
                pool = make()
                waiting = deque(
                    (piece, _resubmit(pool, function, piece, future)) for piece, future in waiting
                )
                continue
            broken = 0
            waiting.popleft()
            yield result
    finally:
        if make is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        else:  # the caller's executor lives on, and nothing reads the results of these pieces
            wait([future for _, future in waiting if not future.cancel()])


_END: Any = object()


def _submit(pool: Executor, function: Callable[[Work], Result], piece: Work) -> Future[Result]:
    """The future of a piece; it holds ``BrokenExecutor`` if the pool has just broken."""
    try:
        return pool.submit(function, piece)
    except BrokenExecutor as error:
        failed: Future[Result] = Future()
        failed.set_exception(error)
        return failed


def _resubmit(
    pool: Executor, function: Callable[[Work], Result], piece: Work, future: Future[Result]
) -> Future[Result]:
    """The future itself if the piece has a result, or raised an error of its own; otherwise the
    piece is submitted again.
    """
    done = future.done() and not future.cancelled()
    if done and not isinstance(future.exception(), BrokenExecutor):
        return future
    return _submit(pool, function, piece)
