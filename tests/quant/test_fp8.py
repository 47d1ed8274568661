"""FP8 products, the narrow accumulator, FP8 as a method, delayed scales, and training in 8
bits.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from networks import NETWORKS
from refllm.formats.block_float import FloatScheme, quantize
from refllm.formats.fp8_linear import Accumulator, Fp8Linear, scaled_matmul, truncate
from refllm.formats.uniform import Scheme
from refllm.quant.fp8 import DelayedScale, fp8, integers_or_floats
from refllm.train.backward import PLAIN, loss_and_gradients
from refllm.train.fp8 import Fp8
from refllm.train.loop import initialize
from strategies import build, seeds

EPS = 2.0**-23
PAIRS = [
    (("block", (1, 16)), ("block", 16)),
    (("block", (1, 16)), ("group", 8)),
    (("token", None), ("channel", None)),
    (("tensor", None), ("tensor", None)),
    (("token", None), ("block", (16, 16))),
]


# --- products -----------------------------------------------------------------------------


@pytest.mark.theorem(
    "the block-scaled product is the product of the dequantised matrices, within (N + "
    "N/slice + 8) · eps · Σ|x̂||ŵ|",
    source="DeepSeek-V3, §3.3.2; Higham 2002, §3.1",
)
@given(
    st.sampled_from(PAIRS),
    st.integers(1, 4),
    st.sampled_from([1, 5, 16, 33]),
    st.sampled_from([16, 40, 48]),
    st.sampled_from(["normal", "outlier_column", "zero"]),
    st.sampled_from(["float32", "ue8m0"]),
    seeds,
)
def test_block_scaled_is_dequantised(xp, pair, rows, outputs, n, kind, scale, seed):
    x = build(kind, (rows, n), seed)
    w = build("normal", (outputs, n), seed + 1)
    qx = quantize(xp.asarray(x), FloatScheme("e4m3", *pair[0], scale))
    qw = quantize(xp.asarray(w), FloatScheme("e4m3", *pair[1], scale))
    got = to_host(scaled_matmul(qx, qw))
    a, b = (to_host(q.dequantize()).astype(np.float64) for q in (qx, qw))
    # N products and N/slice partial sums are added; two scales, and the two roundings of x̂
    # and ŵ, of each term
    bound = (n + n / 8 + 8) * EPS * (np.abs(a) @ np.abs(b).T)
    assert (np.abs(got - a @ b.T) <= bound).all()


def test_tiles_of_the_weight_join(xp, monkeypatch):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 40), (50, 40)))
    scheme = FloatScheme("e4m3", "block", 16)
    qx = quantize(xp.asarray(x), FloatScheme("e4m3", "block", (1, 16)))
    qw = quantize(xp.asarray(w), scheme)
    whole = to_host(scaled_matmul(qx, qw))
    monkeypatch.setattr("refllm.formats.fp8_linear.MATMUL_TILE", (16 * 40, 16 * 40))
    np.testing.assert_allclose(to_host(scaled_matmul(qx, qw)), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.theorem(
    "truncation keeps b significant bits, towards zero: 0 ≤ |x| − |x'| < 2^(1−b) |x|, and "
    "no bit more",
    source="IEEE 754",
)
@given(st.integers(1, 24), seeds)
def test_truncate(xp, bits, seed):
    x = build("normal", (50,), seed)
    got = to_host(truncate(xp.asarray(x), bits))
    off = np.abs(x).astype(np.float64) - np.abs(got)
    assert (off >= 0).all()
    assert (off < 2.0 ** (1 - bits) * np.abs(x)).all() if bits < 24 else (off == 0).all()
    fraction, _ = np.frexp(got.astype(np.float64))
    assert (fraction * 2.0**bits == np.round(fraction * 2.0**bits)).all()


@pytest.mark.theorem(
    "K products added e at a time, truncated to b bits each time, lose at most "
    "⌈K/e⌉ · 2^(1−b) · Σ|x||w|; promoted every P products only ⌈P/e⌉ such truncations",
    source="DeepSeek-V3, §3.3.2",
)
@given(st.sampled_from([8, 14]), st.sampled_from([16, 32]), st.sampled_from([None, 64, 128]), seeds)
def test_loss_of_a_narrow_accumulator(xp, bits, every, promote, seed):
    rng = np.random.default_rng(seed)
    x, w = (rng.uniform(0, 1, (2, 512)).astype(np.float32) for _ in range(2))
    got = to_host(Accumulator(bits, every, promote).product(xp.asarray(x), xp.asarray(w)))
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    cuts = -(-(promote or 512) // every)
    assert (np.abs(got - exact) <= (cuts * 2.0 ** (1 - bits) + 600 * EPS) * exact).all()
    assert (got <= exact * (1 + 600 * EPS)).all()  # always towards zero


def test_why_partial_sums_are_promoted():
    """K = 4096: without promotion the cuts, all towards zero, add up to tens of times the
    error.
    """
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((16, 4096)).astype(np.float32) for _ in range(2))
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    size = np.sqrt(np.mean(exact**2))
    never, often, wide = (
        np.sqrt(np.mean((a.product(x, w) - exact) ** 2)) / size
        for a in (Accumulator(14, 16, None), Accumulator(14, 16), Accumulator(24, 16, None))
    )
    assert never > 0.004
    assert never > 20 * often
    assert often < 3e-4
    assert wide < 1e-6


def test_the_accumulator_of_a_weight(xp):
    rng = np.random.default_rng(0)
    x, w = (
        xp.asarray(rng.standard_normal(shape).astype(np.float32)) for shape in ((3, 256), (8, 256))
    )
    weight = quantize(w, FloatScheme("e4m3", "block", 128))
    exact, narrow = (
        to_host(Fp8Linear(weight, accumulator=a).matmul(x)) for a in (None, Accumulator(8, 16))
    )
    assert np.abs(exact - narrow).max() > 1e-3
    wide = to_host(Fp8Linear(weight, accumulator=Accumulator(24, 32)).matmul(x))
    np.testing.assert_allclose(wide, exact, rtol=1e-4, atol=1e-4)


def test_slices_that_do_not_nest_are_rejected(xp):
    x = xp.asarray(np.ones((2, 24), dtype=np.float32))
    a, b = (quantize(x, FloatScheme("e4m3", "block", (1, size))) for size in (6, 4))
    with pytest.raises(ValueError, match="do not nest"):
        scaled_matmul(a, b)
    with pytest.raises(ValueError, match="rows of 24 and of 12"):
        scaled_matmul(a, quantize(x[:, :12], FloatScheme("e4m3", "tensor")))
    for wrong in ({"bits": 0}, {"bits": 25}, {"every": 0}, {"promote": 0}):
        with pytest.raises(ValueError, match="Accumulator"):
            Accumulator(**wrong)


# --- a weight -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "size"), [("block", 128), ("channel", None), ("tensor", None), ("group", 128)]
)
@pytest.mark.parametrize("activations", [True, False])
def test_linear(xp, granularity, size, activations):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 256), (130, 256)))
    made = fp8(xp.asarray(w), Scheme(8, "restricted", granularity, size), activations=activations)
    got = to_host(made.matmul(xp.asarray(x)))
    exact = x @ w.T
    assert made.shape == (130, 256)
    assert made.bits_per_weight == 8 * made.nbytes / w.size
    assert made.bits_per_weight < 8.3
    # two operands with an error of 2.6 % each, independent of each other
    assert np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)) < (
        0.045 if activations else 0.032
    )
    back = to_host(made.dequantize())
    if activations:
        seen = to_host(made.quantize_activations(xp.asarray(x)).dequantize())
        np.testing.assert_allclose(got, seen @ back.T, rtol=1e-4, atol=1e-3)
    else:
        np.testing.assert_allclose(got, x @ back.T, rtol=1e-4, atol=1e-3)
    assert to_host(made.matmul(xp.asarray(x[:0]))).shape == (0, 130)
    assert made.matmul(xp.asarray(x.astype(np.float64))).dtype == np.float64


@pytest.mark.theorem(
    "with a scale a token, or a tile of a token, no row depends on the others of its batch",
    source="refllm.formats.fp8_linear",
)
@given(st.sampled_from(["block", "channel"]), seeds)
def test_tokens_are_independent(xp, granularity, seed):
    x = build("outlier_column", (4, 128), seed)
    w = build("normal", (8, 128), seed)
    made = fp8(
        xp.asarray(w), Scheme(8, "restricted", granularity, 128 if granularity == "block" else None)
    )
    whole = to_host(made.quantize_activations(xp.asarray(x)).dequantize())
    for i in range(4):
        alone = to_host(made.quantize_activations(xp.asarray(x[i : i + 1])).dequantize())
        np.testing.assert_array_equal(alone[0], whole[i])


def test_bad_options_are_rejected():
    w = np.ones((4, 8), dtype=np.float32)
    with pytest.raises(
        ValueError, match="fp8 takes 8 bits by tensor, channel, block, group, got 4 bits"
    ):
        fp8(w, Scheme(4, "restricted", "channel"))
    with pytest.raises(ValueError, match="'e4m3' or 'e5m2'"):
        fp8(w, Scheme(8, "restricted", "channel"), format="e2m1")
    with pytest.raises(ValueError, match="do not nest with tiles of 128"):
        fp8(w, Scheme(8, "restricted", "group", 96))
    with pytest.raises(ValueError, match="activation is None or one of tensor, token, tile"):
        Fp8Linear(quantize(w, FloatScheme("e4m3", "tensor")), "row")
    linear = fp8(w, Scheme(8, "restricted", "channel"), name="model.layers.0.q")
    with pytest.raises(ValueError, match="the input of model.layers.0.q"):
        linear.matmul(np.full((2, 8), np.nan, dtype=np.float32))


# --- scales from the past -----------------------------------------------------------------


@pytest.mark.theorem(
    "a delayed scale saturates nothing while the range does not grow, and all beyond it "
    "when it does",
    source="Micikevicius et al. 2022, §4",
)
@given(st.integers(1, 6), seeds)
def test_delayed_scale(xp, history, seed):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (4, 32)).astype(np.float32)
    scale = DelayedScale(history)
    for factor in (4.0, 2.0, 1.0):
        scale.quantize(xp.asarray(x * np.float32(factor)))
    assert scale.saturated == 0
    before = max([4.0, 2.0, 1.0][-history:]) * np.abs(x).max()
    grown = x * np.float32(16)
    made = scale.quantize(xp.asarray(grown))
    beyond = np.abs(grown) > before * (1 + 1e-5)
    assert scale.saturated == beyond.sum() > 0
    assert scale.seen == 4 * x.size
    np.testing.assert_allclose(np.abs(to_host(made.dequantize())[beyond]), before, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 1 step"):
        DelayedScale(0)


def test_where_integers_and_floats_win(xp):
    """Even ranges: INT8. Few large values among many small ones: E4M3, by far."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((32, 1024)).astype(np.float32)
    outlier = normal.copy()
    outlier[:, 5] *= 100
    heavy = rng.standard_t(2, (32, 1024)).astype(np.float32)
    found = {
        name: integers_or_floats(xp.asarray(x))
        for name, x in (("n", normal), ("o", outlier), ("h", heavy))
    }
    assert found["n"]["int8"] < 0.2 * found["n"]["e4m3"]
    assert found["o"]["e4m3"] < 0.05 * found["o"]["int8"]
    assert found["h"]["e4m3"] < found["h"]["int8"]
    for errors in found.values():
        # one bit of mantissa is a factor of four in the square
        assert 3 < errors["e5m2"] / errors["e4m3"] < 5


# --- training -----------------------------------------------------------------------------


class Counting:
    """A product that is the plain one, and counts."""

    def __init__(self):
        self.forwards = []
        self.backwards = []

    def forward(self, x, weight):
        self.forwards.append(weight.shape)
        return PLAIN.forward(x, weight)

    def backward(self, x, weight, d_out):
        self.backwards.append(weight.shape)
        return PLAIN.backward(x, weight, d_out)


def example():
    config = NETWORKS["llama"]
    params = {
        n: t.astype(np.float32) for n, t in initialize(config, np.random.default_rng(0)).items()
    }
    return (config, params), np.random.default_rng(1).integers(0, config.vocab_size, (2, 33))


def test_every_projection_goes_through_the_product():
    (config, params), tokens = example()
    counting = Counting()
    loss, grads = loss_and_gradients(params, config, tokens, product=counting)
    expected, plain = loss_and_gradients(params, config, tokens)
    assert loss == expected
    for name, gradient in plain.items():
        np.testing.assert_array_equal(grads[name], gradient)
    shapes = sorted(t.shape for name, t in params.items() if name.endswith("_proj.weight"))
    assert sorted(counting.forwards) == sorted(counting.backwards) == shapes


@pytest.mark.theorem(
    "each of the three products is that of its rounded operands, scales in the direction of "
    "its own sum",
    source="DeepSeek-V3, §3.3.1",
)
@pytest.mark.parametrize("gradients", ["e4m3", "e5m2"])
def test_the_three_products(gradients):
    rng = np.random.default_rng(0)
    x, w, dy = (
        rng.standard_normal(s).astype(np.float32) for s in ((300, 256), (130, 256), (300, 130))
    )
    x[7] *= 1000  # a token that must not cost the others their precision
    product = Fp8(gradients=gradients)
    y = product.forward(x, w)
    dx, dw = product.backward(x, w, dy)

    def through(t, block, fmt="e4m3"):
        return quantize(t, FloatScheme(fmt, "block", block)).dequantize()

    weight = through(w, 128)
    np.testing.assert_array_equal(y, through(x, (1, 128)) @ weight.T)
    np.testing.assert_array_equal(dx, through(dy, (1, 128), gradients) @ weight)
    np.testing.assert_array_equal(dw, through(dy, (128, 1), gradients).T @ through(x, (128, 1)))


def test_one_scale_a_tensor_loses_where_tokens_differ():
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((256, 256), (128, 256)))
    x[3] *= 1e5
    exact = x @ w.T
    others = np.arange(256) != 3
    off = {
        scaling: np.linalg.norm((Fp8(scaling).forward(x, w) - exact)[others])
        / np.linalg.norm(exact[others])
        for scaling in ("tile", "tensor")
    }
    assert off["tile"] < 0.05
    assert off["tensor"] > 0.3


def test_gradients_in_8_bits_are_near_and_e5m2_is_farther():
    (config, params), tokens = example()
    _, exact = loss_and_gradients(params, config, tokens)
    off = {}
    for name, product in {"e4m3": Fp8(), "e5m2": Fp8(gradients="e5m2")}.items():
        _, grads = loss_and_gradients(params, config, tokens, product=product)
        off[name] = sum(np.sum((grads[k] - g) ** 2) for k, g in exact.items()) / sum(
            np.sum(g**2) for g in exact.values()
        )
    assert 0 < off["e4m3"] < 0.15**2
    assert off["e5m2"] > off["e4m3"]
    with pytest.raises(ValueError, match="'tile' or 'tensor'"):
        Fp8("row")
