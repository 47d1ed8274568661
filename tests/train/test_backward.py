"""Every gradient of the network: against central differences, torch's autograd, and the
network that serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import oracle, to_host
from refllm.model import llama
from refllm.model.attention import CausalAttend
from refllm.model.config import ModelConfig, UnsupportedModel
from refllm.model.rope import Llama3Scaling
from refllm.train import backward as module
from refllm.train.backward import hidden_states, loss_and_gradients, mean_loss, output_name
from refllm.train.loop import initialize
from strategies import model_configs, seeds

EPS64 = float(np.finfo("float64").eps)
llamas = model_configs(families=["llama"])


def parameters(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """float64 weights large enough that attention is far from uniform and SwiGLU far from
    linear; gains are not 1.
    """
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.uniform(0.5, 1.5, w.shape)
            if w.ndim == 1
            else rng.standard_normal(w.shape) / w.shape[1] ** 0.5
        )
        for name, w in initialize(config, rng).items()
    }


def batch(config: ModelConfig, seed: int, size: int = 2, length: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (size, length + 1))


def distribution(seed: int, rows: int, vocabulary: int) -> np.ndarray:
    t = np.random.default_rng(seed).random((rows, vocabulary)) ** 3
    return t / t.sum(axis=-1, keepdims=True)


def slope(params, config, tokens, name, direction, h, teacher=None) -> float:
    """(L(w + h·d) − L(w − h·d)) / 2h for one tensor."""
    values = []
    for sign in (1, -1):
        moved = params | {name: params[name] + sign * h * direction}
        if teacher is None:
            values.append(mean_loss(moved, config, tokens))
        else:
            values.append(loss_and_gradients(moved, config, tokens, teacher)[0])
    return (values[0] - values[1]) / (2 * h)


def check_by_differences(params, config, tokens, name, grad, direction, teacher=None) -> None:
    h = 1e-5
    wide, narrow = (
        slope(params, config, tokens, name, direction, step, teacher) for step in (2 * h, h)
    )
    # A central difference errs by c·h²: |D(2h) − D(h)| = 3·c·h² measures it. The loss
    # itself, a number near log V ≤ 4, is rounded some hundred times on the way: that error
    # is divided by h.
    tolerance = abs(wide - narrow) + 256 * EPS64 * 4 / h
    assert abs(float(np.sum(grad * direction)) - narrow) <= tolerance, name


@pytest.mark.theorem(
    "the hand-written backward pass is the derivative of the loss", source="chain rule"
)
@given(config=llamas, seed=seeds, taught=st.booleans())
def test_oracle_each_gradient_is_the_central_difference_along_a_random_direction(
    config, seed, taught
):
    params = parameters(config, seed)
    tokens = batch(config, seed)
    t = distribution(seed, 10, config.vocab_size)
    teacher = (lambda rows: t[rows]) if taught else None
    _, grads = loss_and_gradients(params, config, tokens, teacher)
    assert set(grads) == set(params)
    rng = np.random.default_rng(seed + 1)
    for name, grad in grads.items():
        assert grad.shape == params[name].shape
        check_by_differences(
            params, config, tokens, name, grad, rng.standard_normal(grad.shape), teacher
        )


@pytest.mark.parametrize("tied", [True, False])
def test_oracle_each_single_element_of_a_tiny_network(tied):
    """Exhaustive: 1 layer, 2 query heads on 1 key head; every element of every tensor by
    itself.
    """
    config = ModelConfig("llama", 5, 4, 3, 1, 2, 1, 2, tie_word_embeddings=tied)
    params = parameters(config, 3)
    tokens = batch(config, 4, length=4)
    _, grads = loss_and_gradients(params, config, tokens)
    for name, grad in grads.items():
        for index in np.ndindex(grad.shape):
            direction = np.zeros(grad.shape)
            direction[index] = 1.0
            check_by_differences(params, config, tokens, name, grad, direction)


@given(config=llamas, seed=seeds)
def test_invariance_every_array_library_gives_the_same_gradients(xp, config, seed):
    params = parameters(config, seed)
    tokens = batch(config, seed)
    loss, grads = loss_and_gradients(params, config, tokens)
    on_device = {name: xp.asarray(w) for name, w in params.items()}
    there, device_grads = loss_and_gradients(on_device, config, xp.asarray(tokens))
    assert isinstance(there, float)
    assert there == pytest.approx(loss, rel=64 * EPS64)
    for name, grad in grads.items():
        np.testing.assert_allclose(
            to_host(device_grads[name]), grad, rtol=0, atol=1e-12 * (1 + np.abs(grad).max())
        )


@given(config=llamas, seed=seeds)
def test_invariance_the_gradient_of_a_batch_is_the_mean_over_its_sequences(config, seed):
    """Data-parallel training relies on it."""
    params = parameters(config, seed)
    tokens = batch(config, seed, size=3)
    loss, grads = loss_and_gradients(params, config, tokens)
    parts = [loss_and_gradients(params, config, tokens[i : i + 1]) for i in range(3)]
    assert loss == pytest.approx(sum(part[0] for part in parts) / 3, rel=64 * EPS64)
    for name, grad in grads.items():
        mean = sum(part[1][name] for part in parts) / 3
        np.testing.assert_allclose(mean, grad, rtol=0, atol=1e-13 * (1 + np.abs(grad).max()))


@given(config=llamas, seed=seeds, tile=st.integers(1, 8))
def test_invariance_the_tile_of_queries_changes_nothing(xp, config, seed, tile):
    """Later tiles have their own rows, their own mask and a share in the gradients of
    earlier keys and values.
    """
    params = {name: xp.asarray(w) for name, w in parameters(config, seed).items()}
    tokens = xp.asarray(batch(config, seed, length=7))
    loss, grads = loss_and_gradients(params, config, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE", tile)
        in_tiles, others = loss_and_gradients(params, config, tokens)
    assert in_tiles == pytest.approx(loss, rel=64 * EPS64)
    for name, grad in grads.items():
        expected = to_host(grad)
        np.testing.assert_allclose(
            to_host(others[name]), expected, rtol=0, atol=1e-12 * (1 + np.abs(expected).max())
        )


@pytest.mark.parametrize("beyond", [0, 1, 5])
def test_oracle_gradients_of_a_sequence_that_is_longer_than_a_tile(beyond):
    """Exactly one tile, one query beyond it, some more: central differences."""
    config = ModelConfig("llama", 7, 8, 6, 1, 4, 2, 4)
    params = parameters(config, 1)
    tokens = batch(config, 2, size=1, length=module._TILE + beyond)
    _, grads = loss_and_gradients(params, config, tokens)
    rng = np.random.default_rng(3)
    for name, grad in grads.items():
        direction = rng.standard_normal(grad.shape)
        check_by_differences(params, config, tokens, name, grad, direction)


@given(config=llamas, seed=seeds, size=st.integers(1, 3), length=st.integers(1, 9))
def test_oracle_training_and_serving_run_the_same_network(config, seed, size, length):
    params = parameters(config, seed)
    tokens = batch(config, seed, size, length)
    weights = llama.build(config, params)
    inputs = tokens[:, :-1]
    served = [
        llama.forward(weights, config, row, np.arange(length), CausalAttend([length]))
        for row in inputs
    ]
    hidden = hidden_states(params, config, inputs)
    np.testing.assert_allclose(
        hidden, np.concatenate(served), rtol=0, atol=1e-12 * (1 + np.abs(hidden).max())
    )
    z = llama.logits(weights, np.concatenate(served))
    log_q = z - z.max(axis=-1, keepdims=True)
    log_q -= np.log(np.exp(log_q).sum(axis=-1, keepdims=True))
    expected = -log_q[np.arange(size * length), tokens[:, 1:].reshape(-1)].mean()
    assert mean_loss(params, config, tokens) == pytest.approx(expected, rel=1e-12)
    assert loss_and_gradients(params, config, tokens)[0] == mean_loss(params, config, tokens)


@given(config=llamas, seed=seeds)
def test_a_token_that_does_not_occur_gets_no_gradient_in_an_untied_embedding(config, seed):
    untied = replace(config, tie_word_embeddings=False)
    params = parameters(untied, seed)
    tokens = batch(untied, seed)
    _, grads = loss_and_gradients(params, untied, tokens)
    unread = np.setdiff1d(np.arange(untied.vocab_size), tokens[:, :-1])
    assert not grads["model.embed_tokens.weight"][unread].any()


def test_parameters_are_not_changed():
    config = ModelConfig("llama", 11, 8, 12, 2, 4, 2, 4, tie_word_embeddings=True)
    params = parameters(config, 0)
    tokens = batch(config, 0)
    before = {name: w.copy() for name, w in params.items()}
    loss_and_gradients(params, config, tokens)
    assert all(np.array_equal(before[name], w) for name, w in params.items())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_what_the_backward_pass_leaves_out_is_rejected(family):
    config = ModelConfig(
        family,
        11,
        8,
        12,
        1,
        2,
        1,
        4,
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=3 if family == "mistral" else None,
    )
    params = parameters(ModelConfig("llama", 11, 8, 12, 1, 2, 1, 4), 0)
    with pytest.raises(UnsupportedModel, match="no biases, query/key norms or window"):
        loss_and_gradients(params, config, batch(config, 0))


def test_a_sequence_of_one_token_predicts_nothing_and_is_rejected():
    config = ModelConfig("llama", 11, 8, 12, 1, 2, 1, 4)
    with pytest.raises(ValueError, match="there are no positions to predict"):
        loss_and_gradients(parameters(config, 0), config, np.zeros((2, 1), dtype=int))


# --- torch --------------------------------------------------------------------------------


@pytest.fixture
def double_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers takes norms, softmax and angles in float32 whatever the model's dtype.
    Within this fixture ``torch.float32`` reads as float64, so that its autograd is an
    oracle to float64's precision.
    """
    torch = oracle("torch")
    oracle("transformers").LlamaForCausalLM  # noqa: B018 (its modules are imported before the names change)
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return


def torch_gradients(config: ModelConfig, params, tokens, t=None):
    """Loss and gradients of ``LlamaForCausalLM`` with our parameters, by autograd."""
    torch = oracle("torch")
    transformers = oracle("transformers")
    theirs = transformers.LlamaConfig(**config.to_hf(), attn_implementation="eager")
    network = transformers.LlamaForCausalLM(theirs).double()
    state = {name: torch.from_numpy(w.copy()) for name, w in params.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # where it is tied
    z = network(torch.from_numpy(tokens[:, :-1].copy()), use_cache=False).logits.reshape(
        -1, config.vocab_size
    )
    assert z.dtype == torch.float64
    target = torch.from_numpy((tokens[:, 1:].reshape(-1) if t is None else t).copy())
    loss = torch.nn.functional.cross_entropy(z, target)
    loss.backward()
    return loss.item(), {name: w.grad.numpy() for name, w in network.named_parameters()}


@pytest.mark.oracle
@settings(max_examples=10)
@given(config=llamas, seed=seeds, taught=st.booleans())
@pytest.mark.usefixtures("double_precision")
def test_oracle_loss_and_gradients_are_those_of_torch_in_float64(config, seed, taught):
    # transformers wants a multiple
    config = replace(config, hidden_size=4 * config.num_attention_heads)
    params = parameters(config, seed)
    tokens = batch(config, seed, size=2, length=7)
    t = distribution(seed, 14, config.vocab_size) if taught else None
    expected, expected_grads = torch_gradients(config, params, tokens, t)
    loss, grads = loss_and_gradients(
        params, config, tokens, (lambda rows: t[rows]) if taught else None
    )
    assert loss == pytest.approx(expected, rel=1e-13)
    assert set(grads) == set(expected_grads)
    for name, grad in grads.items():
        scale = np.abs(expected_grads[name]).max()
        # about 10³ roundings lie between a weight and the loss, forth and back
        np.testing.assert_allclose(
            grad, expected_grads[name], rtol=0, atol=1e3 * EPS64 * (scale + 1e-3), err_msg=name
        )


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.usefixtures("double_precision")
def test_oracle_grouped_heads_two_layers_and_stretched_rope(tied):
    """One larger case by name: 6 query heads on 2 key heads, llama3 frequencies in all
    three bands.
    """
    bands = Llama3Scaling(8.0, 1.0, 4.0, 64)
    config = ModelConfig(
        "llama", 61, 48, 40, 2, 6, 2, 16, 1e-5, 500.0, bands, tie_word_embeddings=tied
    )
    params = parameters(config, 5)  # 270 rows: two chunks of the loss
    tokens = batch(config, 6, size=3, length=90)
    expected, expected_grads = torch_gradients(config, params, tokens)
    loss, grads = loss_and_gradients(params, config, tokens)
    assert loss == pytest.approx(expected, rel=1e-13)
    for name, grad in grads.items():
        scale = np.abs(expected_grads[name]).max()
        np.testing.assert_allclose(
            grad, expected_grads[name], rtol=0, atol=1e3 * EPS64 * scale, err_msg=name
        )
    assert (output_name(config) == "lm_head.weight") is not tied
