"""Training: resumed runs equal uninterrupted ones bit for bit, workers and array libraries
agree, and it learns.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT, to_host
from refllm.backend import namespace
from refllm.errors import InputError
from refllm.model.config import ModelConfig
from refllm.train import loop
from refllm.train.loop import initialize, train
from refllm.train.optimizer import AdamW
from refllm.train.schedule import Phase, Plan
from refllm.train.state import State, load_state, save_state
from strategies import model_configs, seeds

V = 19
CONFIG = ModelConfig("llama", V, 16, 24, 2, 4, 2, 4, tie_word_embeddings=True)
PLAN = Plan(
    (Phase(6, 4, 8, (2, 1)), Phase(5, 2, 16, (1, 0))),
    warmup=3,
    weight_decay=0.05,
    seed=5,
    evaluate_every=4,
    save_every=2,
)


def streams(seed: int = 0) -> list[np.ndarray]:
    """Two streams of a second-order pattern with noise: there is something to learn."""
    rng = np.random.default_rng(seed)
    out = []
    for count in (400, 300):
        tokens = [1, 2]
        while len(tokens) < count:
            tokens.append(
                int(rng.integers(V)) if rng.random() < 0.1 else (tokens[-1] * 3 + tokens[-2]) % V
            )
        out.append(np.array(tokens, dtype=np.int32))
    return out


def bits(state: State) -> tuple[object, ...]:
    """Everything of a run except for its times."""
    groups = (state.params, state.optimizer.m, state.optimizer.v)
    curve = [
        {key: value for key, value in record.items() if key != "seconds"} for record in state.curve
    ]
    return (
        [{name: to_host(t).tobytes() for name, t in group.items()} for group in groups],
        state.optimizer.step,
        curve,
    )


# --- Muon, and weights to go on from ------------------------------------------------------


def test_a_resumed_run_with_muon_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    plan = replace(PLAN, optimizer="muon")
    whole = train(CONFIG, streams(), plan, tmp_path / "whole")

    def die(step: int, _: float) -> None:
        if step == 7:
            raise Killed

    with pytest.raises(Killed):
        train(CONFIG, streams(), plan, tmp_path / "part", on_step=die)
    state = load_state(tmp_path / "part" / "state.safetensors")[0]
    assert state.optimizer.step == 6
    # a matrix has one moment
    assert state.optimizer.m.keys() == state.params.keys() > state.optimizer.v.keys()
    assert bits(train(CONFIG, streams(), plan, tmp_path / "part")) == bits(whole)


def test_a_run_starts_from_given_weights(tmp_path):
    start = initialize(CONFIG, np.random.default_rng(77))
    still = replace(PLAN, peak_rate=0.0)
    state = train(
        CONFIG, streams(), still, tmp_path, start={name: w.copy() for name, w in start.items()}
    )
    assert all(np.array_equal(to_host(state.params[name]), w) for name, w in start.items())


# --- first weights ------------------------------------------------------------------------


@given(config=model_configs(families=["llama"]), seed=seeds)
def test_initial_weights_have_the_configs_shapes_and_depend_on_the_seed_only(config, seed):
    params = initialize(config, np.random.default_rng(seed))
    assert sum(w.size for w in params.values()) == config.num_parameters
    assert all(w.dtype == np.float32 for w in params.values())
    assert all(np.array_equal(w, np.ones(w.shape)) for w in params.values() if w.ndim == 1)
    again = initialize(config, np.random.default_rng(seed))
    assert all(np.array_equal(w, again[name]) for name, w in params.items())


def test_initial_weights_have_deviation_002_and_less_where_they_write_to_the_residual_stream():
    config = ModelConfig("llama", 300, 64, 128, 8, 4, 2, 16, tie_word_embeddings=False)
    params = initialize(config, np.random.default_rng(0))
    for name, w in params.items():
        if w.ndim == 2:
            expected = (
                0.02 / math.sqrt(2 * 8)
                if name.endswith(("o_proj.weight", "down_proj.weight"))
                else 0.02
            )
            # the deviation of n normal draws is itself off by 1/√(2n), five of those
            assert float(w.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * w.size))
            assert abs(float(w.mean())) < 5 * expected / math.sqrt(w.size)


# --- resume -------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of the process, between two steps."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> State:
    return train(
        CONFIG, streams(), PLAN, tmp_path_factory.mktemp("unbroken"), held_out=streams(1)[0]
    )


@pytest.mark.theorem(
    "a run that was killed and resumed ends with the same weights as an uninterrupted one, bit "
    "for bit",
    source="plan.batches",
)
@pytest.mark.parametrize("at", range(1, PLAN.steps + 1))
def test_exact_resume_after_a_kill_at_every_step(unbroken, tmp_path, at):
    def kill(step: int, loss: float) -> None:
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        train(CONFIG, streams(), PLAN, tmp_path, held_out=streams(1)[0], on_step=kill)
    resumed = []
    state = train(
        CONFIG,
        streams(),
        PLAN,
        tmp_path,
        held_out=streams(1)[0],
        on_step=lambda s, _: resumed.append(s),
    )
    # from the last checkpoint, not from 1
    assert resumed[0] == 1 + (at - 1) // PLAN.save_every * PLAN.save_every
    assert bits(state) == bits(unbroken)
    assert bits(load_state(tmp_path / "state.safetensors")[0]) == bits(unbroken)


def test_exact_resume_after_the_process_was_really_killed(unbroken, tmp_path):
    """SIGKILL: no handler, no finally, no atexit runs."""
    program = f"""
import sys, numpy as np
sys.path.insert(0, {str(ROOT / "tests" / "train")!r})
sys.path.insert(0, {str(ROOT / "tests")!r})
import test_loop as t
from pathlib import Path
t.train(t.CONFIG, t.streams(), t.PLAN, Path({str(tmp_path)!r}), held_out=t.streams(1)[0],
        on_step=lambda step, loss: (print(step, flush=True), step == 7 and sys.stdin.read()))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        while child.stdout.readline().strip() not in ("7", ""):
            pass
        os.kill(child.pid, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert load_state(tmp_path / "state.safetensors")[0].optimizer.step == 6
    assert bits(train(CONFIG, streams(), PLAN, tmp_path, held_out=streams(1)[0])) == bits(unbroken)


def test_a_finished_run_is_read_and_not_repeated(unbroken, tmp_path):
    train(CONFIG, streams(), PLAN, tmp_path, held_out=streams(1)[0])
    before = (tmp_path / "state.safetensors").stat().st_mtime_ns
    state = train(
        CONFIG,
        streams(),
        PLAN,
        tmp_path,
        held_out=streams(1)[0],
        on_step=lambda *_: pytest.fail("a step"),
    )
    assert bits(state) == bits(unbroken)
    assert (tmp_path / "state.safetensors").stat().st_mtime_ns == before


def test_a_half_written_checkpoint_is_never_trusted(unbroken, tmp_path):
    """An interrupted write under the temporary name is ignored; under the real name it is
    rejected.
    """
    (tmp_path / "state.partial").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    assert bits(train(CONFIG, streams(), PLAN, tmp_path, held_out=streams(1)[0])) == bits(unbroken)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="delete it to start again"):
        train(CONFIG, streams(), PLAN, tmp_path)


def test_time_continues_where_the_killed_run_stopped(tmp_path):
    plan = Plan((Phase(2, 4, 8, (1, 1)),), evaluate_every=1, save_every=1)
    state = train(CONFIG, streams(), plan, tmp_path)
    state.curve[-1]["seconds"] = 1000.0
    save_state(state, tmp_path / "state.safetensors", CONFIG, plan)
    longer = Plan((Phase(3, 4, 8, (1, 1)),), evaluate_every=1, save_every=1)
    assert train(CONFIG, streams(), longer, tmp_path).curve[-1]["seconds"] > 1000.0


# --- agreement ----------------------------------------------------------------------------


def double(folder: Path) -> Path:
    """A first checkpoint in float64: training continues in the precision of the checkpoint."""
    folder.mkdir()
    params = {
        name: w.astype("float64")
        for name, w in initialize(CONFIG, np.random.default_rng(0)).items()
    }
    save_state(State(params, AdamW()), folder / "state.safetensors", CONFIG, PLAN)
    return folder


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_invariance_the_number_of_workers_changes_nothing(tmp_path, workers):
    """Each worker's mean gradient, averaged, is the batch's. 3 workers do not divide 4
    windows: one does the work.
    """
    whole = train(CONFIG, streams(), Plan(PLAN.phases, seed=5, workers=1), double(tmp_path / "one"))
    parts = train(
        CONFIG, streams(), Plan(PLAN.phases, seed=5, workers=workers), double(tmp_path / "many")
    )
    for name, w in whole.params.items():
        assert w.dtype == np.float64
        # Gradients differ by their rounding, 1e-16; AdamW divides by √v̂ + 1e-8, which may
        # enlarge it 10^8 times.
        np.testing.assert_allclose(parts.params[name], w, rtol=0, atol=PLAN.steps * 1e-8)
    assert parts.curve[-1]["loss"] == pytest.approx(whole.curve[-1]["loss"], rel=1e-8)


def test_invariance_every_array_library_trains_the_same_network(xp, xp_kind, tmp_path):
    plan = Plan(
        (Phase(4, 4, 8, (2, 1)), Phase(3, 2, 16, (1, 0))), warmup=3, workers=1, evaluate_every=3
    )
    expected = train(CONFIG, streams(), plan, tmp_path / "numpy", held_out=streams(1)[0])
    state = train(
        CONFIG, streams(), plan, tmp_path / xp_kind, held_out=streams(1)[0], like=xp.zeros(1)
    )
    for group in (state.params, state.optimizer.m, state.optimizer.v):
        assert namespace(*group.values()).__name__ == xp.__name__
    if xp_kind != "cupy":  # the stand-in computes with NumPy: every bit
        assert bits(state) == bits(expected)
    for ours, theirs in zip(state.curve, expected.curve, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["held_out"] == pytest.approx(theirs["held_out"], rel=1e-4)


def test_exact_resume_onto_a_device(xp, tmp_path):
    """Parameters and both moments go back to where the run was; also from a checkpoint of
    another library.
    """
    plan = Plan(PLAN.phases, workers=1, save_every=2)
    whole = train(CONFIG, streams(), plan, tmp_path / "whole", like=xp.zeros(1))

    def kill(step: int, _: float) -> None:
        if step == 5:
            raise Killed

    for begun_on in dict.fromkeys((xp, np)):
        folder = tmp_path / f"begun on {begun_on.__name__}"
        with pytest.raises(Killed):
            train(CONFIG, streams(), plan, folder, like=begun_on.zeros(1), on_step=kill)
        state = train(CONFIG, streams(), plan, folder, like=xp.zeros(1))
        for group in (state.params, state.optimizer.m, state.optimizer.v):
            assert namespace(*group.values()).__name__ == xp.__name__
        if begun_on is xp:
            assert bits(state) == bits(whole)


# --- learning -----------------------------------------------------------------------------


def test_training_learns_a_pattern(tmp_path):
    """A sequence of period 19 is fully predictable: from log 19 to nearly nothing."""
    cycle = np.tile(np.random.default_rng(0).permutation(V), 40).astype(np.int32)
    plan = Plan((Phase(120, 4, 16),), peak_rate=1e-2, warmup=10)
    losses = []
    state = train(
        CONFIG, [cycle], plan, tmp_path, held_out=cycle, on_step=lambda _, loss: losses.append(loss)
    )
    assert losses[0] == pytest.approx(math.log(V), rel=0.02)  # a new network knows nothing
    assert losses[-1] < 0.1
    assert state.curve[-1]["held_out"] < 0.1


def test_the_records_hold_what_happened(tmp_path):
    seen = []
    state = train(CONFIG, streams(), PLAN, tmp_path, held_out=streams(1)[0], report=seen.append)
    assert seen == state.curve
    assert [record["step"] for record in seen] == [4, 8, 11]  # every fourth, and the last
    for record in seen:
        assert set(record) == {"step", "loss", "norm", "rate", "seconds", "held_out"}
        assert 0 < record["rate"] <= PLAN.peak_rate
        assert record["norm"] > 0
    assert [record["seconds"] for record in seen] == sorted(record["seconds"] for record in seen)
    assert json.loads(load_state(tmp_path / "state.safetensors")[1]["curve"]) == seen


@pytest.mark.parametrize(
    ("count", "length", "starts"),
    [
        (10, 3, [0, 3, 6]),  # three windows of 3 + 1 tokens fit without overlap of their inputs
        (9, 3, [0, 2, 5]),
        (7, 3, [0, 3]),
        (4, 3, [0]),  # the shortest stream
        (20_001, 10_000, [0]),  # longer than the 8,192 tokens of an estimate: one window
        (40_000, 4096, [0, 35_903]),
    ],
)
def test_the_estimate_is_the_mean_over_windows_that_are_spread_evenly(
    monkeypatch, count, length, starts
):
    seen = []

    def mean_loss(params, config, tokens):
        assert tokens.shape == (1, length + 1)
        seen.append(int(tokens[0, 0]))
        assert np.array_equal(tokens[0], np.arange(seen[-1], seen[-1] + length + 1))
        return float(len(seen))

    monkeypatch.setattr(loop, "mean_loss", mean_loss)
    estimate = loop._evaluate({"w": np.zeros(1)}, CONFIG, np.arange(count), length)
    assert seen == starts
    assert estimate == (1 + len(starts)) / 2


def test_the_estimate_reads_8192_tokens_of_a_long_stream(monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "mean_loss", lambda p, c, tokens: seen.append(tokens) or 0.0)
    loop._evaluate({"w": np.zeros(1)}, CONFIG, np.arange(100_000), 256)
    assert len(seen) == 32
    assert (seen[0][0, 0], seen[-1][0, -1]) == (0, 99_999)


# --- rejections -----------------------------------------------------------------------------

GOOD = streams()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"streams": [GOOD[0], np.full(300, V, np.int32)]},
            "token ids 19..19 are not within the vocabulary of 19",
        ),
        ({"streams": [GOOD[0], np.full(300, -1, np.int32)]}, "token ids -1..-1 are not within"),
        (
            {"streams": [GOOD[0], GOOD[1].astype("float32")]},
            r"1-D array of integers, got float32\[300\]",
        ),
        ({"streams": [GOOD[0], GOOD[1][None]]}, r"1-D array of integers, got int32\[1, 300\]"),
        ({"streams": GOOD[:1]}, "mixes 2 streams, but 1 are given"),
        ({"streams": [GOOD[0], GOOD[1][:8]]}, "stream 1 has 8 tokens"),
        (
            {"held_out": GOOD[0][:16]},
            "the held-out stream has 16 tokens: too few for windows of 16",
        ),
        ({"held_out": GOOD[0] + V}, "are not within the vocabulary"),
    ],
)
def test_streams_that_do_not_fit_are_rejected_before_the_first_step(tmp_path, arguments, message):
    arguments = {"streams": GOOD} | arguments
    with pytest.raises(ValueError, match=message):
        train(
            CONFIG,
            arguments.pop("streams"),
            PLAN,
            tmp_path,
            on_step=lambda *_: pytest.fail("a step"),
            **arguments,
        )


def test_streams_at_the_boundaries_are_accepted(tmp_path):
    """The last token of the vocabulary, unsigned tokens, a held-out stream of one window, a
    stream that no phase uses.
    """
    state = train(
        CONFIG,
        [np.full(40, V - 1, np.uint16), np.zeros(0, np.int64)],
        Plan((Phase(1, 2, 16, (1, 0)),), workers=1),
        tmp_path,
        held_out=np.full(17, V - 1),
    )
    assert state.curve[-1]["held_out"] > 0


def test_a_checkpoint_of_another_network_is_rejected(tmp_path):
    train(CONFIG, streams(), PLAN, tmp_path)
    other = ModelConfig("llama", V, 16, 24, 1, 4, 2, 4, tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match="is a checkpoint of another network; choose another output folder"
    ):
        train(other, streams(), PLAN, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path):
    steps = []

    def teacher(tokens):
        value = math.nan if len(steps) >= 5 else 1 / V
        return lambda rows: np.full((rows.stop - rows.start, V), value, dtype="float32")

    plan = Plan(PLAN.phases, workers=1, save_every=2)
    with pytest.raises(InputError, match="step 5: loss .*lower the rate"):
        train(
            CONFIG,
            streams(),
            plan,
            tmp_path,
            teacher=teacher,
            on_step=lambda step, _: steps.append(step),
        )
    state, _ = load_state(tmp_path / "state.safetensors")
    assert state.optimizer.step == 4
    assert all(np.isfinite(w).all() for w in state.params.values())


@given(data=st.data())
def test_a_teacher_sees_the_batch_of_its_worker(tmp_path_factory, data):
    """Every share of the batch, inputs and labels, is given to the teacher once."""
    workers = data.draw(st.sampled_from([1, 2, 4]))
    shapes = []

    def teacher(tokens):
        shapes.append(tokens.shape)
        labels = tokens[:, 1:].reshape(-1)
        return lambda rows: np.eye(V, dtype="float32")[labels[rows]]

    plan = Plan((Phase(2, 4, 8, (1, 1)),), workers=workers)
    taught = train(CONFIG, streams(), plan, tmp_path_factory.mktemp("taught"), teacher=teacher)
    assert shapes == [(4 // workers, 9)] * (2 * workers)
    plain = train(CONFIG, streams(), plan, tmp_path_factory.mktemp("plain"))
    for (
        name,
        w,
    ) in plain.params.items():  # a teacher that is certain of the label gives the loss of the label
        np.testing.assert_allclose(taught.params[name], w, rtol=0, atol=1e-4)


def test_a_teacher_is_not_called_before_its_first_step_also_in_a_resumed_run(tmp_path):
    """Steps before ``teacher_from`` are those of a run without a teacher; a kill in between
    changes nothing.
    """
    asked: list[int] = []

    def run(folder: str, kill_at: int = 0) -> State:
        done = [0]

        def on_step(step: int, _: float) -> None:
            done[0] = step
            if step == kill_at:
                raise Killed

        def teacher(tokens):
            asked.append(done[0])
            return lambda rows: np.full((rows.stop - rows.start, V), 1 / V, dtype="float32")

        return train(
            CONFIG,
            streams(),
            plan,
            tmp_path / folder,
            teacher=teacher,
            teacher_from=5,
            on_step=on_step,
        )

    plan = Plan(PLAN.phases, workers=1, save_every=2)
    whole = run("whole")
    assert asked == list(range(5, PLAN.steps))
    for kill_at in (3, 7):
        with pytest.raises(Killed):
            run(f"killed at {kill_at}", kill_at)
        assert bits(run(f"killed at {kill_at}")) == bits(whole)
