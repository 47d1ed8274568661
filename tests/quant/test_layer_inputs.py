"""The walk shows each projection the input that it has in the network made of the weights
chosen so far; calibration windows are drawn with a seed from training documents.
"""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from networks import EPS, NETWORKS, random_tensors, tolerance
from refllm.corpus import Document, held_out_documents, training_documents
from refllm.model.attention import CausalAttend
from refllm.model.llama import PROJECTIONS, build, build_layer, forward
from refllm.model.weights import Dense
from refllm.quant import layer_inputs
from refllm.quant.layer_inputs import STAGES, calibration_windows, sequences, walk
from refllm.quant.taps import Tap, tapped
from strategies import model_configs, seeds
from tiny_models import byte_tokenizer


class Layers:
    """A source of tensors in memory."""

    def __init__(self, xp, config, seed, dtype="float64"):
        self.config = config
        self.tensors = {
            name: xp.asarray(t) for name, t in random_tensors(config, seed, dtype).items()
        }
        self.embedding = Dense(self.tensors["model.embed_tokens.weight"])
        self.xp = xp

    def rows(self, tokens):
        return self.embedding.rows(self.xp.asarray(tokens))

    def layer(self, index):
        return build_layer(self.config, self.tensors, index)


def observed(source, ids, change=lambda run, name: None):
    """(layer, projection) → its inputs in the walk, the batches under each other;
    ``change`` may replace a weight.
    """
    seen = {}
    for run in walk(source, ids):
        for names in run.stages():
            inputs = np.concatenate([to_host(x) for x in run.inputs()])
            for name in names:
                seen[run.index, name] = inputs
                change(run, name)
    return seen


def expected(xp, config, weights, ids):
    """The same from the whole network, with a tap on every projection."""
    seen = {}
    taps = tapped(weights, lambda index, name, x: seen.setdefault((index, name), to_host(x).copy()))
    tokens = xp.asarray([t for sequence in ids for t in sequence])
    positions = xp.asarray([i for sequence in ids for i in range(len(sequence))])
    forward(
        taps, config, tokens, positions, CausalAttend([len(s) for s in ids], config.sliding_window)
    )
    return seen


@st.composite
def texts(draw, config):
    token = st.integers(0, config.vocab_size - 1)
    return draw(st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=4))


def test_the_stages_are_all_projections_in_the_order_in_which_they_compute():
    assert [name for stage in STAGES for name in stage] == list(PROJECTIONS)


@pytest.mark.theorem(
    "the walk shows a projection the input that it has in the network of the weights chosen "
    "before it",
    source="GPTQ's true-sequential order, Frantar et al. 2022, section 4",
)
@given(st.data())
def test_inputs_are_those_of_the_network_made_of_what_was_chosen(xp, data):
    config = data.draw(model_configs())
    seed = data.draw(seeds)
    ids = data.draw(texts(config))
    source = Layers(xp, config, seed)
    other = Layers(xp, config, seed ^ 1)  # stands for the quantised weights
    replaced = data.draw(st.sets(st.sampled_from(sorted(PROJECTIONS))))

    def change(run, name):
        if name in replaced:  # its bias stays
            run.layer[name] = other.layer(run.index)[name]

    chosen = {
        k: v
        for k, v in other.tensors.items()
        if k.endswith(tuple(f"{name}.weight" for name in replaced))
    }
    seen = observed(source, ids, change)
    wanted = expected(xp, config, build(config, source.tensors | chosen), ids)
    assert seen.keys() == wanted.keys()
    # not bit for bit: NumPy's loops round by where an array happens to lie
    for key, x in wanted.items():
        np.testing.assert_allclose(
            seen[key], x, rtol=0, atol=tolerance(config, 9, x), err_msg=str(key)
        )


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_every_family_is_walked_in_batches_of_any_size(xp, config, monkeypatch):
    rng = np.random.default_rng(3)
    ids = [rng.integers(0, config.vocab_size, n).tolist() for n in (5, 1, 9, 17, 3)]
    source = Layers(xp, config, 4)
    weights = build(config, source.tensors)
    wanted = expected(xp, config, weights, ids)
    for size in (1, 6, 2048):  # 1: each sequence goes alone, however long it is
        monkeypatch.setattr(layer_inputs, "BATCH", size)
        assert len(layer_inputs.embed(source, ids)) == {1: 5, 6: 4, 2048: 1}[size]
        for key, x in observed(source, ids).items():
            np.testing.assert_allclose(
                x, wanted[key], rtol=0, atol=tolerance(config, 17, wanted[key])
            )


def test_inputs_may_be_looked_at_again_and_layers_left_half_way(xp):
    config = NETWORKS["llama"]
    source = Layers(xp, config, 0)
    ids = [[1, 2, 3], [4, 5]]
    seen = []
    for run in walk(source, ids):
        for stage, names in enumerate(run.stages()):
            once = list(run.inputs())
            again = list(run.inputs())
            for a, b in zip(once, again, strict=True):
                np.testing.assert_array_equal(to_host(a), to_host(b))
            seen.append((run.index, names))
            if run.index == 1 and stage == 1:
                break  # the walk goes through the rest by itself
    assert [s for s in seen if s[0] == 1] == [(1, STAGES[0]), (1, STAGES[1])]
    whole = observed(source, ids)
    last = next(run for run in walk(source, ids) if run.index == config.num_hidden_layers - 1)
    np.testing.assert_array_equal(to_host(next(last.inputs())), whole[last.index, "q_proj"])


def test_without_text_the_walk_shows_layers_alone(xp):
    source = Layers(xp, NETWORKS["llama"], 0)
    runs = [(run.index, [list(run.inputs()) for _ in run.stages()]) for run in walk(source, None)]
    assert runs == [(i, [[]] * 4) for i in range(3)]


def test_one_layer_is_held_at_a_time():
    config = NETWORKS["llama"]
    alive = weakref.WeakSet()
    most = []

    class Counted(Layers):
        def layer(self, index):
            gc.collect()
            most.append(len(alive))
            layer = {
                k: Dense(v.dequantize()) if k in PROJECTIONS else v
                for k, v in super().layer(index).items()
            }
            alive.update(layer[name] for name in PROJECTIONS)
            return layer

    for run in walk(Counted(np, config, 0), [[1, 2, 3]]):
        for _ in run.stages():
            pass
    assert most == [0, 0, 0]


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("model.embed_tokens.weight", "layers.0.self_attn.q_proj"),
        ("model.layers.1.self_attn.v_proj.weight", "layers.1.self_attn.o_proj"),
        ("model.layers.1.self_attn.o_proj.weight", "layers.1.mlp.gate_proj"),
        ("model.layers.1.mlp.up_proj.weight", "layers.1.mlp.down_proj"),
        ("model.layers.1.mlp.down_proj.weight", "layers.2.self_attn.q_proj"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_input_that_is_not_finite_is_rejected_by_name(broken, named, value):
    source = Layers(np, NETWORKS["llama"], 0)
    source.tensors[broken][2] = value  # token 2, or an output column that every token has
    source.embedding = Dense(source.tensors["model.embed_tokens.weight"])
    with (
        np.errstate(all="ignore"),
        pytest.raises(ValueError, match=rf"input of model\.{named} is not finite"),
    ):
        observed(source, [[1, 2, 3]])


def test_a_tap_is_the_weight_that_it_wraps(xp):
    weight = xp.asarray(np.arange(12.0).reshape(3, 4))
    x = xp.asarray(np.ones((2, 4)))
    inner = Dense(weight)
    seen = []
    tap = Tap(inner, seen.append)
    assert (tap.shape, tap.nbytes, tap.bits_per_weight) == (inner.shape, inner.nbytes, 64.0)
    np.testing.assert_array_equal(to_host(tap.matmul(x)), to_host(inner.matmul(x)))
    np.testing.assert_array_equal(to_host(tap.dequantize()), to_host(weight))
    assert [s is x for s in seen] == [True]


def test_the_definition_of_the_tolerance_is_not_empty():
    """Two different layers differ by far more than the tests above allow."""
    a = observed(Layers(np, NETWORKS["llama"], 0), [[1, 2, 3]])
    b = observed(Layers(np, NETWORKS["llama"], 1), [[1, 2, 3]])
    assert min(np.abs(a[k] - b[k]).max() for k in a) > 1e9 * EPS


# --- which tokens -------------------------------------------------------------------------


def test_windows_are_whole_and_depend_on_the_seed_alone():
    tokenizer = byte_tokenizer()
    windows = calibration_windows(tokenizer, 5, 32, 7)
    assert windows.shape == (5, 32)
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(
        windows, calibration_windows(tokenizer, 5, 32, np.random.default_rng(7))
    )
    assert not np.array_equal(windows, calibration_windows(tokenizer, 5, 32, 8))


def test_windows_are_training_text_and_never_held_out():
    tokenizer = byte_tokenizer()
    rng = 11
    training = "\0".join(d.text for d in training_documents())
    held_out = "\0".join(d.text for d in held_out_documents())
    inside = [tokenizer.decode(w.tolist()) for w in calibration_windows(tokenizer, 20, 200, rng)]
    assert all(
        text in training
        for text in inside
        if "\ufffd" not in text and _one_document(text, training)
    )
    assert not any(text in held_out for text in inside)
    assert sum(text in training for text in inside) >= 15  # the others span two documents


def _one_document(text: str, training: str) -> bool:
    return text[:100] in training and text[100:] in training and text in training


def test_a_window_begins_with_a_line_and_goes_on_into_the_next_document():
    tokenizer = byte_tokenizer()
    documents = [Document("a", "x = 1\ny = 2\n"), Document("empty", ""), Document("b", "z\n")]
    for begin, between in ((None, ""), (0, "<|endoftext|>")):
        parts = [
            between.join(["x = 1\ny = 2\n", *["z\n", "x = 1\ny = 2\n"] * 9])[i:] for i in (0, 6)
        ]
        parts.append(between.join(["z\n", "x = 1\ny = 2\n"] * 9))
        seen = set()
        for w in calibration_windows(tokenizer, 60, 30, 0, documents=documents, begin=begin):
            text = tokenizer.decode(w.tolist())
            (start,) = [i for i, part in enumerate(parts) if part.startswith(text)]
            seen.add(start)
        assert seen == {0, 1, 2}


def test_every_character_is_drawn_equally_often():
    documents = [Document("a", "a" * 30), Document("b", "b" * 10)]
    windows = calibration_windows(byte_tokenizer(), 4000, 1, 0, documents=documents)
    share = float(np.mean(windows[:, 0] == windows[:, 0].max()))  # begins in the document of b
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)


def test_a_long_token_stream_is_encoded_as_far_as_it_is_needed():
    """Tokens longer than the eight characters that are tried first."""
    tokenizer = byte_tokenizer(300)
    text = "        continue" * 40
    documents = [Document("a", text), Document("b", "other\n")]
    whole = tokenizer.encode(text)
    for length in (1, 5, len(whole)):
        window = calibration_windows(tokenizer, 1, length, 3, documents=documents)[0]
        assert window.tolist() == whole[:length]


@pytest.mark.parametrize(
    ("count", "length", "texts"), [(0, 4, ["a"]), (4, 0, ["a"]), (1, 1, []), (1, 1, [""])]
)
def test_windows_of_nothing_are_rejected(count, length, texts):
    with pytest.raises(ValueError, match="calibration_windows: no"):
        calibration_windows(
            byte_tokenizer(), count, length, 0, documents=[Document("x", t) for t in texts]
        )


def test_token_ids_of_every_kind_become_lists():
    expected = [[1, 2, 3], [4, 5, 6]]
    for calibration in (
        expected,
        np.array(expected),
        [np.array(r, np.uint16) for r in expected],
        map(tuple, expected),
    ):
        assert sequences(calibration, 7) == expected
    assert all(type(t) is int for row in sequences(np.array(expected), 7) for t in row)


@pytest.mark.parametrize(
    ("calibration", "why"),
    [
        ([], "there is no sequence"),
        ([[1], []], "sequence 1 must be a non-empty"),
        ([[1.0, 2.0]], "sequence 0 must be"),
        (np.ones((2, 3)), "sequence 0 must be"),
        ([[True]], "sequence 0 must be"),
        (["text"], "sequence 0 must be"),
        ("text", "sequence 0 must be"),
        (np.array([1, 2]), "sequence 0 must be"),
        (np.ones((1, 2, 3), int), "sequence 0 must be"),
        ([[1], [7]], "sequence 1 holds a token outside the vocabulary of 7"),
        ([[-1]], "sequence 0 holds a token outside"),
    ],
)
def test_what_is_no_text_is_rejected(calibration, why):
    with pytest.raises(ValueError, match=why):
        sequences(calibration, 7)
