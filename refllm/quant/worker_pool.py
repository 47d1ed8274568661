"""Independent pieces of work side by side, in order, through any executor of
``concurrent.futures``.

``in_order`` keeps a few pieces in flight and yields results in the order of the work, so
memory holds what is in flight and no more. An executor whose workers die takes all its
futures with it (``BrokenExecutor``); then another one is made, and what was not finished is
given to it. Pieces must therefore be pure: done twice, they give the same.

| executor          | how                                                                     |
|-------------------|-------------------------------------------------------------------------|
| processes         | ``processes(n)``, the default of those who call this                    |
| one's own         | any ``Executor``; it is neither shut down nor replaced                  |
| a Dask cluster    | ``client.get_executor()``; Dask itself gives lost work to other workers |

Left out: results larger than memory, priorities.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

__all__ = ["in_order", "processes"]

Work = TypeVar("Work")
Result = TypeVar("Result")
PATIENCE = 3  # pools that may break in a row without a single result


def processes(count: int) -> Callable[[], Executor]:
    """What makes a pool of ``count`` processes. They start afresh and share nothing,
    threads and locks included.
    """
    return lambda: ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def in_order(
    function: Callable[[Work], Result],
    work: Iterable[Work],
    executor: Executor | Callable[[], Executor],
    flight: int,
) -> Iterator[Result]:
    """``map(function, work)``, with at most ``flight`` pieces begun and not yet yielded.

    ``executor`` may be what makes one: then it is made anew when its workers die, and shut
    down in the end.

    Raises
    ------
    RuntimeError
        if pools break time after time, as where a piece needs more memory than there is.
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
                        f"workers died {broken} times without a result ({error}): is there too little "
                        "memory? use fewer workers"
                    ) from error
                pool.shutdown(wait=False, cancel_futures=True)
                pool = make()
                waiting = deque(
                    (piece, _again(pool, function, piece, future)) for piece, future in waiting
                )
                continue
            broken = 0
            waiting.popleft()
            yield result
    finally:
        if make is not None:
            pool.shutdown(wait=True, cancel_futures=True)


_END: Any = object()


def _submit(pool: Executor, function: Callable[[Work], Result], piece: Work) -> Future[Result]:
    """A future; of a pool that broke a moment ago, one that says so."""
    try:
        return pool.submit(function, piece)
    except BrokenExecutor as error:
        failed: Future[Result] = Future()
        failed.set_exception(error)
        return failed


def _again(
    pool: Executor, function: Callable[[Work], Result], piece: Work, future: Future[Result]
) -> Future[Result]:
    """The future itself if it has a result, or an error of its own; else the piece anew."""
    done = future.done() and not future.cancelled()
    if done and not isinstance(future.exception(), BrokenExecutor):
        return future
    return _submit(pool, function, piece)
