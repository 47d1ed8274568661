"""The times of many requests satisfy the identities that define them."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.simulate.metrics import (
    Limits,
    Recorder,
    Timeline,
    attainment,
    capacity,
    spread,
    summarise,
)

whole = st.integers(0, 1000)  # whole seconds: their sums are exact


@st.composite
def timelines(draw):
    """A completed or an incomplete answer; chunks of one token and of several."""
    sent = draw(whole)
    line = Timeline(float(sent), draw(st.integers(1, 50)))
    time = sent
    for gap, tokens in draw(st.lists(st.tuples(whole, st.integers(1, 4)), max_size=8)):
        time += gap
        line.chunk(float(time), tokens)
    line.completed = draw(st.booleans())
    return line


@pytest.mark.theorem(
    "E2EL = TTFT + Σ ITL; TPOT · (O − 1) = E2EL − TTFT", source="definitions of vLLM's bench serve"
)
@given(timelines())
def test_times_of_an_answer_add_up(line):
    if not line.times:
        with pytest.raises(ValueError, match="no chunk has arrived yet"):
            _ = line.ttft
        return
    assert line.ttft <= line.e2el == line.ttft + sum(line.gaps)
    assert len(line.times) == 1 + len(line.gaps)
    if line.tokens == 1:
        assert line.tpot is None
    else:
        assert line.tpot == (line.e2el - line.ttft) / (line.tokens - 1)
    if line.tokens == len(line.times) > 1:  # a token a chunk: then the two agree
        assert line.tpot == pytest.approx(sum(line.gaps) / len(line.gaps), rel=1e-15)


@given(st.lists(timelines(), max_size=6), st.integers(1, 10_000))
def test_a_report_is_that_of_the_completed_ones(lines, duration):
    report = summarise(lines, duration)
    done = [x for x in lines if x.completed]
    assert (report.requests, report.completed) == (len(lines), len(done))
    assert report == summarise(done, duration).__class__(
        **{**vars(summarise(done, duration)), "requests": len(lines)}
    )
    # no limit: every request meets it
    assert report.request_throughput == report.goodput == len(done) / duration
    assert report.total_throughput - report.output_throughput == pytest.approx(
        sum(x.prompt for x in done) / duration, abs=1e-12 * (1 + report.total_throughput)
    )
    gaps = [g for x in done for g in x.gaps]
    assert (report.itl is None) == (not gaps)
    if gaps:
        assert report.itl.mean == pytest.approx(sum(gaps) / len(gaps))
        assert (
            min(gaps)
            <= report.itl.p50
            <= report.itl.p90
            <= report.itl.p99
            <= report.itl.max
            == max(gaps)
        )


@pytest.mark.theorem(
    "Goodput falls as limits tighten, and is at most the request throughput",
    source="its definition",
)
@given(st.lists(timelines(), min_size=1, max_size=6), *[st.floats(0, 3000)] * 3, st.floats(0, 1))
def test_goodput_is_monotone_in_its_limits(lines, ttft, tpot, e2el, tighter):
    loose = Limits(ttft, tpot, e2el)
    tight = Limits(*(tighter * x for x in loose))
    good, better = (summarise(lines, 10.0, limits).goodput for limits in (tight, loose))
    assert good <= better <= summarise(lines, 10.0).request_throughput
    assert attainment(lines, tight) <= attainment(lines, loose) <= 1
    # each limit counts: one of them alone can fail every request with tokens
    for name in Limits._fields:
        none_meets = summarise(lines, 10.0, Limits(**{name: -1.0})).goodput
        assert none_meets == sum(x.completed and not x.times for x in lines) / 10


def test_a_chunk_of_several_tokens_is_one_gap_and_several_tokens():
    line = Timeline(0.0)
    for time in (1.0, 4.0):
        line.chunk(time, 3)
    assert line.gaps == [3.0]  # ITL counts chunks
    assert line.tpot == 3 / 5  # TPOT counts tokens


def test_one_token_has_no_tpot_and_meets_every_limit_on_it():
    line = Timeline(0.0, completed=True)
    line.chunk(2.0)
    assert line.tpot is None
    assert line.meets(Limits(tpot=0.0))
    assert not line.meets(Limits(ttft=1.0))


def test_long_answers_dominate_pooled_gaps():
    short = Timeline(0.0, completed=True)
    long = Timeline(0.0, completed=True)
    for time in (0.0, 9.0):
        short.chunk(time)
    for time in range(100):
        long.chunk(float(time))
    report = summarise([short, long], 100)
    assert report.itl.p50 == 1
    assert report.tpot.p50 == 5  # the mean of requests is not


def test_spread_is_numpys_percentiles():
    values = np.random.default_rng(0).standard_normal(101)
    percentiles = tuple(np.percentile(values, (50, 90, 99)))
    assert spread(values) == (values.mean(), *percentiles, values.max())
    assert spread([]) is None


def test_capacity_is_where_the_share_crosses():
    assert capacity({1: 1.0, 2: 1.0, 4: 0.8}) == 3.0
    assert capacity({1: 0.5, 2: 1.0}) == 0.0  # too high from the beginning
    assert capacity({1: 1.0, 2: 0.95}) == 2
    # what recovers later does not count
    assert capacity({1: 1.0, 2: 0.8, 3: 1.0}) == pytest.approx(1.5)
    assert capacity({1: 1.0, 2: 0.0}, share=1.0) == 1.0
    for wrong in ({}, {1: 1.0}):
        with pytest.raises(ValueError, match="capacity|rates with their shares"):
            capacity(wrong, share=0.9 if not wrong else 0.0)


@pytest.mark.parametrize("duration", [0.0, -1.0, inf, float("nan")])
def test_a_duration_must_be_finite_and_above_0(duration):
    with pytest.raises(ValueError, match="finite time above 0"):
        summarise([], duration)


def test_attainment_needs_a_request():
    with pytest.raises(ValueError, match="no request"):
        attainment([], Limits())


def test_an_incomplete_answer_meets_no_limit():
    whole = Timeline(0.0, 1, [1.0], 1, True)
    cut = Timeline(0.0, 1, [1.0], 1, False)
    assert (whole.meets(Limits()), cut.meets(Limits())) == (True, False)
    assert attainment([whole, cut], Limits()) == 0.5


def test_a_recorder_keeps_every_arrival():
    recorder = Recorder()
    recorder.sent("a", 7, 1.0)
    recorder.sent("b", 3, 1.5)
    recorder.arrived("a", 1, 2.0)
    assert not recorder.timelines["a"].completed
    recorder.arrived("a", 2, 3.0, ended=True)
    recorder.arrived("b", 0, 4.0, ended=True)  # max_tokens 0
    assert recorder.timelines["a"] == Timeline(1.0, 7, [2.0, 3.0], 3, True)
    report = recorder.summarise(10.0)
    assert (report.completed, report.output_throughput, report.total_throughput) == (2, 0.3, 1.3)
    assert report.normalised_latency == 2 / 3
    recorder.arrived("a", 0, 5.0)
    assert recorder.timelines["a"].completed  # once is for good
