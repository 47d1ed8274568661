"""Work side by side: in order, few pieces in flight, and nothing lost when a worker is
killed.
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest

from refllm.quant.worker_pool import in_order, processes


def square(x: int) -> int:
    return x * x


def dies_once(work: tuple[int, str]) -> int:
    """The square of a number; kills its own process when it first computes 5²."""
    x, mark = work
    if x == 5 and not os.path.exists(mark):
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x * x


def always_dies(x: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return x


def fails(x: int) -> int:
    if x == 3:
        raise ValueError("three is no number")
    return x


def test_results_come_in_order_and_few_are_in_flight():
    begun = []
    taken = 0
    with ThreadPoolExecutor(3) as pool:
        for taken, result in enumerate(
            in_order(square, (begun.append(i) or i for i in range(20)), pool, flight=4)
        ):
            assert result == taken * taken
            assert len(begun) <= taken + 5
    assert taken == 19
    assert list(in_order(square, [], processes(1), flight=2)) == []


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_worker_loses_nothing(tmp_path):
    mark = str(tmp_path / "mark")
    made: list[Executor] = []

    def pool() -> Executor:
        made.append(processes(2)())
        return made[-1]

    assert list(in_order(dies_once, [(i, mark) for i in range(12)], pool, flight=4)) == [
        i * i for i in range(12)
    ]
    assert len(made) == 2  # the pool broke, and another one went on


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_piece_that_always_kills_ends_in_one_sentence():
    made: list[Executor] = []

    def pool() -> Executor:
        made.append(processes(1)())
        return made[-1]

    with pytest.raises(RuntimeError, match="workers died 4 times without a result"):
        list(in_order(always_dies, range(2), pool, flight=2))
    assert len(made) == 4


def test_nothing_runs_on_in_a_caller_s_executor_after_the_iterator_is_closed():
    begun: list[int] = []
    ended: list[int] = []

    def slow(x: int) -> int:
        begun.append(x)
        time.sleep(0.05)
        ended.append(x)
        return x

    with ThreadPoolExecutor(2) as pool:
        results = in_order(slow, range(100), pool, flight=20)
        assert next(results) == 0
        results.close()
        assert begun  # 0, and what the two threads had begun
        assert sorted(ended) == sorted(begun)
        assert len(begun) < 10
        assert pool.submit(len, begun).result() == len(ended)


def test_an_error_of_the_work_is_raised():
    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="three is no number"):
        list(in_order(fails, range(6), pool, flight=3))
