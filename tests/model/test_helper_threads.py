"""Helper threads run every call once, at the same time, and survive errors, Ctrl-C and forks."""

from __future__ import annotations

import itertools
import os
import threading
import time

import numpy as np
import pytest

from refllm.model import helper_threads, weight_layout
from refllm.model.helper_threads import HelperThreads
from refllm.model.weight_layout import COLUMNS, Blocks
from weight_layouts import on_processor


def live_helpers() -> int:
    return sum(thread.name == "refllm helper" for thread in threading.enumerate())


@pytest.fixture
def helpers():
    """Three helpers, which end with the test."""
    made = HelperThreads(3)
    yield made
    for helper in made._helpers:
        helper.start(None)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_call_runs_once_and_the_first_one_here(helpers, count):
    seen = []
    for _ in range(50):
        seen.clear()
        helpers.run(
            [lambda i=i: seen.append((i, threading.current_thread().name)) for i in range(count)]
        )
        assert sorted(i for i, _ in seen) == list(range(count))
        here = threading.current_thread().name
        assert all((name == here) == (i == 0) for i, name in seen)


def test_calls_run_at_the_same_time(helpers):
    meeting = threading.Barrier(4, timeout=20)
    helpers.run([meeting.wait] * 4)  # each waits for all others


def test_more_calls_than_threads_are_rejected(helpers):
    with pytest.raises(ValueError, match="5 calls for 3 helpers"):
        helpers.run([lambda: None] * 5)


@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_error_is_raised_here_and_the_next_product_is_whole(helpers, place):
    before = live_helpers()
    calls = [lambda: None] * 4
    calls[place] = lambda: 1 // 0
    with pytest.raises(ZeroDivisionError):
        helpers.run(calls)
    seen = []
    helpers.run([lambda i=i: seen.append(i) for i in range(4)])
    assert sorted(seen) == [0, 1, 2, 3]
    deadline = time.monotonic() + 20
    while live_helpers() > before + 3 and time.monotonic() < deadline:
        time.sleep(0.01)  # those of the failed product end
    assert live_helpers() <= before + 3


def test_after_an_interruption_nothing_waits_for_the_calls_that_were_cut_off(helpers, monkeypatch):
    """Ctrl-C arrives in this thread while a helper is at work."""
    monkeypatch.setattr(helper_threads, "PATIENCE", 0.01)
    release = threading.Event()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        helpers.run([interrupted, release.wait])
    seen = []
    helpers.run([lambda: seen.append("here"), lambda: (time.sleep(0.05), seen.append("helper"))])
    assert seen == ["here", "helper"]  # it has waited for its own helper
    release.set()


def test_a_second_thread_computes_alone_while_the_helpers_are_taken(helpers):
    names = []

    def outer() -> None:
        other = threading.Thread(target=helpers.run, args=([inner, inner],), name="second")
        other.start()
        other.join()

    def inner() -> None:
        names.append(threading.current_thread().name)

    helpers.run([outer, lambda: None])
    assert names == ["second", "second"]
    helpers.run([inner, inner])  # they are free again
    assert len(set(names[2:])) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_makes_its_own_helpers(helpers):
    helpers.run([lambda: None] * 2)
    child = os.fork()
    if child == 0:
        seen = []
        helpers.run([lambda: seen.append(0), lambda: seen.append(1)])  # would wait for ever
        os._exit(0 if sorted(seen) == [0, 1] else 1)
    deadline = time.monotonic() + 20
    status = None
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status == 0


@pytest.mark.theorem(
    "x Wᵀ has the same bits on any number of threads (AVX-512 kernels)",
    source="model/weight_layout.py: what rounds how",
)
@pytest.mark.parametrize("threads", [2, 3, 4, 9])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 33])
def test_threads_do_not_change_a_bit(threads, rows, monkeypatch):
    if not weight_layout.has_small_kernels():
        pytest.skip("these kernels pack: the processor, or OPENBLAS_CORETYPE, has no AVX-512")
    monkeypatch.setattr(Blocks, "DIVIDED_FROM", 0)
    rng = np.random.default_rng(0)
    w = rng.standard_normal((7 * COLUMNS, 53), dtype=np.float32)
    blocks = Blocks(np.empty((7, 53, COLUMNS), dtype=np.float32)).fill(w)
    x = rng.standard_normal((rows, 53), dtype=np.float32)
    on_processor(monkeypatch, "SkylakeX", 1)
    alone = blocks.matmul(x)
    on_processor(monkeypatch, "SkylakeX", threads)
    np.testing.assert_array_equal(blocks.matmul(x), alone)
    out = np.full((rows, 7 * COLUMNS), np.nan, dtype=np.float32)
    blocks.bind(x, out)()
    np.testing.assert_allclose(out, alone, rtol=0, atol=1e-4)  # rows that are not padded


@pytest.mark.parametrize(
    ("size", "rows", "threads", "expected"),
    [
        (2**19, 1, 2, 2),
        (2**19 - 64 * 64, 4, 2, 1),
        (2**18, 8, 2, 2),
        (2**18, 7, 2, 1),
        (2**19, 1, 1, 1),
        (2**19, 1, 999, 128),  # no more shares than blocks
    ],
)
def test_only_products_that_take_long_are_divided(size, rows, threads, expected, monkeypatch):
    on_processor(monkeypatch, "SkylakeX", threads)
    blocks = Blocks(np.empty((size // 4096, 64, 64), dtype=np.float32))
    shares = blocks.shares(rows)
    assert len(shares) == expected
    assert shares[0][0] == 0
    assert shares[-1][1] == blocks.data.shape[0]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))
    assert all(first < last for first, last in shares)
