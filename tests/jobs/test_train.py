"""A run is prepared or rejected before anything is trained, and its shape follows from few
numbers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.corpus import Document
from refllm.jobs.train import prepare
from refllm.jobs.train_options import TrainingOptions
from refllm.train.data import Data
from refllm.train.schedule import Phase, Plan

SMALL = {
    "vocab_size": 257,
    "width": 8,
    "heads": 1,
    "layers": 1,
    "steps": 2,
    "batch": 1,
    "long_steps": 0,
}


def data_of(train: int, held: int) -> Data:
    """Streams of exactly so many tokens: one for each byte, and the beginning token."""
    part = Document("a", "x" * (train - 1))
    other = Document("b", "y" * (held - 1))
    return Data("letters", {"files": [part]}, [other], (1,), (1,))


@pytest.mark.parametrize(
    ("train", "held", "fits"), [(17, 17, True), (16, 17, False), (17, 16, False)]
)
def test_a_window_and_its_last_answer_must_fit_into_every_stream(train, held, fits, tmp_path: Path):
    """A window of 16 holds 17 tokens: 16 predictions."""
    output = tmp_path / "out"
    work = tmp_path / "work"
    options = TrainingOptions(length=16, **SMALL)
    if fits:
        made = prepare(output, work, data_of(train, held), options, Plan((), workers=1))
        assert [len(s) for s in (*made.streams, made.held_out)] == [train, held]
        assert made.bits_per_byte(0.0) == 0.0
    else:
        with pytest.raises(ValueError, match="too few for windows of 16"):
            prepare(output, work, data_of(train, held), options, Plan((), workers=1))
        assert not work.exists()


@given(st.integers(1, 20_000), st.integers(1, 16), st.sampled_from([64, 128, 256]))
def test_the_two_phases_share_the_steps_and_read_about_as_many_tokens_in_each(steps, batch, length):
    phases = TrainingOptions(steps=steps, batch=batch, length=length).phases(data_of(9, 9))
    assert sum(p.steps for p in phases) == steps
    assert phases[0] == Phase(phases[0].steps, batch, length, (1,))
    for p in phases[1:]:
        assert p.steps == int(0.15 * steps)
        assert p.batch * p.length == max(1024, batch * length // 1024 * 1024)


@given(st.integers(1, 20).map(lambda n: 64 * n))
def test_derived_sizes_make_a_network_of_heads_of_64(width):
    config = TrainingOptions(width=width).config(300, 0)
    assert config.head_dim == 64
    assert config.num_attention_heads * 64 == config.hidden_size == width
    assert config.intermediate_size == 3 * width
    heads = config.num_attention_heads
    groups = config.num_key_value_heads
    assert groups == max([g for g in range(1, heads // 2 + 1) if heads % g == 0], default=1)
