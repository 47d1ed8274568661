"""Windows and batches: what each step of a plan sees."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.train.schedule import Phase, Plan, batches, window_starts
from strategies import seeds

phases = st.builds(
    Phase,
    steps=st.integers(0, 6),
    batch=st.integers(1, 5),
    length=st.integers(1, 8),
    repeats=st.sampled_from([(1, 1), (3, 1), (1, 0), (0, 2)]),
)
plans = st.builds(
    Plan, phases=st.lists(phases, min_size=1, max_size=3).map(tuple), seed=st.integers(0, 5)
)
stream_lengths = st.tuples(st.integers(9, 60), st.integers(9, 60))  # longer than any window: 8 + 1


def one_pass(lengths, phase: Phase, seed: int):
    """The windows of exactly one pass of the mixture."""
    count, _ = pass_size(lengths, phase, seed)
    return window_starts(
        lengths, Phase(count, 1, phase.length, phase.repeats), np.random.default_rng(seed)
    )


def pass_size(lengths, phase: Phase, seed: int):
    """The number of windows of the first pass: its random draws, repeated."""
    rng = np.random.default_rng(seed)
    count = 0
    firsts = []
    for length, repeats in zip(lengths, phase.repeats, strict=True):
        for _ in range(repeats):
            first = int(rng.integers(0, min(phase.length, length - phase.length)))
            firsts.append(first)
            count += (length - 1 - first) // phase.length
    return count, firsts


@pytest.mark.theorem(
    "in one pass a target is seen at most once per repeat, and fewer than 2·S targets of a "
    "stream are left out",
    source="plan.window_starts",
)
@given(lengths=stream_lengths, phase=phases, seed=seeds)
def test_conservation_each_target_is_seen_at_most_once_per_pass(lengths, phase, seed):
    seen = [Counter(), Counter()]
    for stream, at in one_pass(lengths, phase, seed):
        # the window's last target lies inside the stream
        assert 0 <= at <= lengths[stream] - 1 - phase.length
        seen[stream].update(range(at + 1, at + 1 + phase.length))
    for count, repeats, targets in zip(lengths, phase.repeats, seen, strict=True):
        assert max(targets.values(), default=0) <= repeats
        # every token but the first is a target, each repeat
        missed = repeats * (count - 1) - targets.total()
        assert 0 <= missed <= repeats * (2 * phase.length - 2)


@given(lengths=stream_lengths, phase=phases, seed=seeds)
def test_a_stream_left_out_is_never_seen_and_a_phase_has_its_number_of_windows(
    lengths, phase, seed
):
    starts = window_starts(lengths, phase, np.random.default_rng(seed))
    assert len(starts) == phase.steps * phase.batch
    assert all(phase.repeats[stream] > 0 for stream, _ in starts)
    # plain ints: a plan is plain data
    assert all(type(n) is int for start in starts for n in start)


def test_passes_are_shuffled_and_cut_at_new_offsets():
    phase = Phase(steps=200, batch=1, length=4)
    starts = [at for _, at in window_starts([101], phase, np.random.default_rng(0))]
    assert starts[:24] != sorted(starts[:24])
    assert {at % 4 for at in starts} == {0, 1, 2, 3}  # in 8 passes every offset comes up


@given(plan=plans, lengths=stream_lengths)
def test_a_batch_depends_on_the_plan_and_the_step_only(plan, lengths):
    """Resuming at any step gives the batches of an uninterrupted run."""
    whole = list(batches(plan, lengths))
    assert [step for step, _, _ in whole] == list(range(plan.steps))
    for first in range(plan.steps + 2):
        assert list(batches(plan, lengths, first)) == whole[first:]
    position = 0
    for phase in plan.phases:
        for _, its_phase, windows in whole[position : position + phase.steps]:
            assert its_phase is phase
            assert len(windows) == phase.batch
        position += phase.steps


def test_seeds_and_phases_draw_different_windows():
    phase = Phase(steps=10, batch=4, length=4)
    plan = Plan((phase, phase))
    first = [windows for _, _, windows in batches(plan, [200])]
    assert first[:10] != first[10:]
    assert first != [windows for _, _, windows in batches(Plan((phase, phase), seed=1), [200])]


def test_a_longer_last_phase_leaves_the_earlier_batches_unchanged():
    """Training can be prolonged: the batches already seen do not change."""
    phase = Phase(steps=10, batch=4, length=4)
    short = list(batches(Plan((phase, Phase(5, 2, 8))), [200]))
    long = list(batches(Plan((phase, Phase(9, 2, 8))), [200]))
    assert long[:15] == [
        (step, p if p is phase else Phase(9, 2, 8), windows) for step, p, windows in short
    ]


@pytest.mark.parametrize(
    ("lengths", "phase", "message"),
    [
        ([8], Phase(1, 1, 8), "stream 0 has 8 tokens: too few for windows of 8"),
        ([50, 50], Phase(1, 1, 8), "mixes 1 streams, but 2 are given"),
        ([50, 50], Phase(1, 1, 8, (0, 0)), "every stream is left out"),
    ],
)
def test_a_phase_that_does_not_fit_its_streams_is_rejected(lengths, phase, message):
    with pytest.raises(ValueError, match=message):
        window_starts(lengths, phase, np.random.default_rng(0))


def test_the_shortest_stream_holds_one_window():
    assert window_starts([9], Phase(2, 1, 8), np.random.default_rng(0)) == [(0, 0), (0, 0)]


@pytest.mark.parametrize("values", [(-1, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1, (-1,))])
def test_a_phase_of_nothing_is_rejected(values):
    with pytest.raises(ValueError, match="a phase needs"):
        Phase(*values)


@pytest.mark.parametrize("name", ["workers", "evaluate_every", "save_every"])
def test_a_plan_that_never_works_evaluates_or_saves_is_rejected(name):
    with pytest.raises(ValueError, match="at least 1"):
        Plan((Phase(1, 1, 1),), **{name: 0})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("peak_rate", [-1e-3, math.nan, math.inf]),
        ("weight_decay", [-0.1, math.nan, math.inf]),
        ("clip", [0.0, -1.0, math.nan]),
        ("warmup", [-1]),
        ("seed", [-1]),
    ],
)
def test_numbers_that_would_climb_the_loss_are_rejected(name, values):
    for value in values:
        with pytest.raises(ValueError, match="a plan needs"):
            Plan((), **{name: value})
    assert Plan((), clip=math.inf).clip == math.inf  # no clipping at all


def test_zeros_that_are_accepted():
    """A run that stands still, without decay or warm-up; a phase of no steps."""
    plan = Plan((Phase(0, 1, 1, (0,)),), peak_rate=0.0, weight_decay=0.0, warmup=0, seed=0)
    assert plan.steps == 0
    assert list(batches(plan, [2])) == []
    once = Plan((), workers=1, evaluate_every=1, save_every=1)
    assert once.steps == 0
