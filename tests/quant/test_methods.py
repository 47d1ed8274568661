"""Each method does with a layer what its own module does, for the inputs that it should see,
and notes what is unusual; the report adds up what its rows contain.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_recipe import GROUPS_OF_8, IDS, network, output, same_layers, scheme_of

from conftest import to_host
from networks import NETWORKS
from refllm.formats.quantized_linear import quantize
from refllm.formats.uniform import Scheme
from refllm.model.attention import CausalAttend
from refllm.model.layers import rope_table
from refllm.model.llama import PROJECTIONS
from refllm.model.weights import Dense
from refllm.quant import layer_inputs
from refllm.quant.awq_model import awq_layer
from refllm.quant.llm_int8 import Int8Linear
from refllm.quant.methods import (
    QuantizedProjection,
    Report,
    TensorReport,
    relative_error,
    tensor_report,
)
from refllm.quant.recipe import METHODS, default_scheme, quantize_model
from refllm.quant.rtn import rtn
from refllm.quant.smoothquant import smooth_layer
from refllm.quant.taps import tapped


def test_round_to_nearest_is_that_of_each_tensor():
    model = network(NETWORKS["llama"])
    quantised, report = quantize_model(model, "rtn", GROUPS_OF_8, scale_dtype=None)
    for i, layer in enumerate(quantised.weights["layers"]):
        for name in PROJECTIONS:
            expected = rtn(model.weights["layers"][i][name].dequantize(), GROUPS_OF_8)
            np.testing.assert_array_equal(layer[name].codes, expected.codes)
            np.testing.assert_array_equal(layer[name].scale, expected.scale)
    # unknown without calibration tokens
    assert all(t.output_error is None and t.loss is None for t in report.tensors)
    assert report.bits_per_weight == 4 + 64 / 8


def test_int8_is_that_of_each_tensor():
    model = network(NETWORKS["llama"])
    quantised, _ = quantize_model(model, "int8", threshold=3.0, rule="paper")
    for old, new in zip(model.weights["layers"], quantised.weights["layers"], strict=True):
        for name in PROJECTIONS:
            assert (new[name].threshold, new[name].rule) == (3.0, "paper")
            expected = Int8Linear(old[name].dequantize())
            np.testing.assert_array_equal(new[name].dequantize(), expected.dequantize())


def test_each_method_has_a_scheme_of_its_own():
    for method, made in METHODS.items():
        made().check(default_scheme(method))
        assert default_scheme(method).bits == (8 if method in ("smoothquant", "int8", "fp8") else 4)
    assert default_scheme("awq").rule == "awq"


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama-tied-mha"])
def test_awq_and_smoothquant_look_at_the_network_as_it_was(family):
    """Their scales, read off the gains that they were folded into, are those of the
    original's inputs.
    """
    model = network(NETWORKS[family])
    seen = {}
    output(
        replace(
            model, weights=tapped(model.weights, lambda i, name, x: seen.setdefault((i, name), x))
        )
    )
    attend = CausalAttend([IDS.shape[1]] * len(IDS), model.config.sliding_window)
    positions = np.tile(np.arange(IDS.shape[1]), len(IDS))
    rotation = rope_table(model.weights["rope_frequencies"], positions, "float64")
    awq = quantize_model(model, "awq", GROUPS_OF_8, IDS)[0].weights["layers"]
    smooth = quantize_model(model, "smoothquant", None, IDS, alpha=0.7)[0].weights["layers"]
    for i, layer in enumerate(model.weights["layers"]):
        inputs = {name: seen[i, name] for name in PROJECTIONS}
        folded, _ = awq_layer(
            layer, model.config, inputs, GROUPS_OF_8, rotation=rotation, attend=attend, index=i
        )
        absmax = {name: np.abs(x).max(axis=0) for name, x in inputs.items()}
        migrated, _ = smooth_layer(layer, absmax, 0.7)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            np.testing.assert_allclose(awq[i][norm], folded[norm], rtol=1e-9)
            np.testing.assert_allclose(smooth[i][norm], migrated[norm], rtol=1e-9)
        for name in PROJECTIONS:
            expected = rtn(folded[name].dequantize(), GROUPS_OF_8, scale_dtype="float16")
            np.testing.assert_array_equal(awq[i][name].codes, expected.codes)


def test_awq_searches_on_the_first_batches_only(monkeypatch):
    monkeypatch.setattr(layer_inputs, "BATCH", 40)  # two sequences, then one
    model = network(NETWORKS["llama"])
    wanted = quantize_model(model, "awq", GROUPS_OF_8, IDS[:2])[0].weights["layers"]
    for most in (1, 40, 59):  # one batch is the least
        same_layers(
            quantize_model(model, "awq", GROUPS_OF_8, IDS, max_tokens=most)[0].weights["layers"],
            wanted,
        )
    more = quantize_model(model, "awq", GROUPS_OF_8, IDS, max_tokens=60)[0].weights["layers"]
    assert any(
        (x["input_layernorm"] != y["input_layernorm"]).any()
        for x, y in zip(wanted, more, strict=True)
    )


def test_few_tokens_dead_channels_and_raised_damping_are_noted():
    model = network(NETWORKS["llama"])
    model.weights["layers"][1]["input_layernorm"][[3, 5]] = 0.0
    quantised, report = quantize_model(model, "gptq", GROUPS_OF_8, IDS[:1, :12], damp=0.0)
    rows = {(t.layer, t.name): t.note for t in report.tensors}
    assert "12 tokens for 40 columns" in rows[0, "q_proj"]
    assert "damping raised from 0 to" in rows[0, "q_proj"]
    assert "always zero" not in rows[0, "q_proj"]
    assert rows[1, "v_proj"].startswith("2 of 40 inputs are always zero; 12 tokens")
    assert not quantised.weights["layers"][1]["v_proj"].dequantize()[:, [3, 5]].any()
    assert [n for n in report.notes if n.startswith("model.layers.1.self_attn.v_proj: 2 of 40")]
    assert not quantize_model(model, "gptq", GROUPS_OF_8, IDS)[1].tensors[0].note


@pytest.mark.parametrize("method", METHODS)
def test_dead_channels_leave_the_network_finite_and_right(method):
    """What the network computes with a dead channel is what it computes without it, and the
    live channels are quantised as well as in a network where all are alive.
    """
    model = network(NETWORKS["llama"])
    model.weights["layers"][1]["input_layernorm"][:] = 0.0  # no input of the attention at all
    model.weights["layers"][2]["post_attention_layernorm"][7] = 0.0
    quantised, report = quantize_model(model, method, scheme_of(method), IDS)
    before = output(model)
    after = output(quantised)
    assert np.isfinite(after).all()
    assert all(np.isfinite([t.weight_error, t.output_error]).all() for t in report.tensors)
    eight_bits = default_scheme(method).bits == 8
    most = 2.5e-4 if eight_bits and method != "fp8" else 0.02  # relative, of one projection
    assert relative_error(before, after) <= 10 * most
    norms = {
        "input_layernorm": ("q_proj", "k_proj", "v_proj"),
        "post_attention_layernorm": ("gate_proj", "up_proj"),
    }
    for old, new in zip(model.weights["layers"], quantised.weights["layers"], strict=True):
        for norm, names in norms.items():
            np.testing.assert_array_equal(old[norm] == 0, new[norm] == 0)
            for name in names:  # with their gains, since a method may have moved them
                whole = old[name].dequantize() * old[norm]
                # weights of small activations may be rounded coarsely, by AWQ above all
                assert relative_error(whole, new[name].dequantize() * new[norm]) <= 2 * most
    errors = {(t.layer, t.name): t.output_error for t in report.tensors}
    assert {errors[1, name] for name in norms["input_layernorm"]} == {0.0}
    assert all(0 < error <= most for (layer, _), error in errors.items() if layer != 1)
    if method == "gptq":
        assert not quantised.weights["layers"][1]["q_proj"].dequantize().any()
        assert not quantised.weights["layers"][2]["up_proj"].dequantize()[:, 7].any()


def test_unknown_methods_and_options_are_rejected_with_those_that_are_known():
    model = network(NETWORKS["llama"])
    with pytest.raises(
        ValueError, match="unknown method 'fp4'; choose one of rtn, gptq, awq, smoothquant, int8"
    ):
        quantize_model(model, "fp4", GROUPS_OF_8)
    with pytest.raises(
        ValueError, match="gptq has no option 'dump'; its options are block_size, damp, act_order"
    ):
        quantize_model(model, "gptq", GROUPS_OF_8, IDS, dump=0.1)
    with pytest.raises(ValueError, match="no projection is called head; they are q_proj"):
        quantize_model(model, "smoothquant", None, IDS, keep=("head",))
    with pytest.raises(ValueError, match="unknown level 'O4'; choose one of O1, O2, O3"):
        quantize_model(model, "smoothquant", None, IDS, level="O4")


def test_projections_that_are_kept_stay_what_they_were():
    model = network(NETWORKS["llama"])
    keep = ("o_proj", "down_proj")
    quantised, report = quantize_model(model, "smoothquant", None, IDS, keep=keep, level="O3")
    for t in report.tensors:
        made = quantised.weights["layers"][t.layer][t.name]
        assert isinstance(made, Dense) == (t.name in keep)
        assert (t.note == "kept in floating point") == (t.name in keep)
        assert (t.weight_error == 0 == t.output_error) == (t.name in keep)
    for old, new in zip(model.weights["layers"], quantised.weights["layers"], strict=True):
        np.testing.assert_array_equal(old["o_proj"].dequantize(), new["o_proj"].dequantize())


SCHEME = Scheme(4, "half_integer", "group", 8)


def made(layer: int, name: str, nbytes: int, **more) -> TensorReport:
    options = {"weight_error": 0.25, "output_error": None, "loss": None, "seconds": 0.5} | more
    return TensorReport(layer, name, "rtn", (6, 16), nbytes, **options)


def test_totals_are_the_sums_of_the_rows():
    report = Report(
        "rtn", SCHEME, (made(0, "q_proj", 60), made(1, "down_proj", 84, note="odd")), 2.0
    )
    assert (report.nbytes, report.weights, report.bits_per_weight) == (144, 192, 6.0)
    assert [t.bits for t in report.tensors] == [5.0, 7.0]
    assert report.notes == ["model.layers.1.mlp.down_proj: odd"]
    assert Report("rtn", SCHEME, (), 0.0).bits_per_weight == 0.0


def test_the_table_has_a_line_a_tensor_and_one_for_all():
    rows = (made(0, "q_proj", 60), made(10, "down_proj", 84, output_error=0.001234, loss=12.5))
    lines = Report("rtn", SCHEME, rows, 2.0).table().splitlines()
    assert len(lines) == 4
    assert lines[0].split() == [
        "tensor",
        "shape",
        "bits",
        "weight",
        "error",
        "output",
        "error",
        "loss",
        "s",
    ]
    assert lines[1].split() == [
        "model.layers.0.self_attn.q_proj",
        "6",
        "×",
        "16",
        "5.000",
        "0.25",
        "-",
        "-",
        "0.50",
    ]
    assert lines[2].split()[4:] == ["7.000", "0.25", "0.00123", "12.5", "0.50"]
    assert lines[3].split() == ["all", "192", "6.000", "2.00"]
    assert len({len(line) for line in lines}) == 1  # figures are aligned


def test_errors_are_relative_sums_of_squares(xp):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 16))
    x = rng.standard_normal((5, 16))
    q = quantize(xp.asarray(weight), SCHEME)
    found = tensor_report(
        3, "v_proj", "rtn", xp.asarray(weight), q, xp.asarray(x), 1.5, 7.0, "note"
    )
    off = to_host(q.dequantize()) - weight
    assert found.weight_error == pytest.approx((off**2).sum() / (weight**2).sum(), rel=1e-12)
    assert found.output_error == pytest.approx(
        ((x @ off.T) ** 2).sum() / ((x @ weight.T) ** 2).sum(), rel=1e-9
    )
    assert (found.layer, found.name, found.method, found.loss, found.note) == (
        3,
        "v_proj",
        "rtn",
        7.0,
        "note",
    )
    assert (found.shape, found.nbytes, found.seconds) == ((6, 16), q.nbytes, 1.5)
    assert found.tensor == "model.layers.3.self_attn.v_proj"
    assert (
        tensor_report(
            0, "v_proj", "rtn", xp.asarray(weight), Dense(xp.asarray(weight)), None, 0.0
        ).output_error
        is None
    )


def test_an_error_relative_to_nothing():
    zero = np.zeros((2, 2))
    one = np.ones((2, 2))
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero, one) == np.inf
    assert relative_error(one, zero) == 1.0


def test_errors_are_taken_against_the_exact_layer_where_one_is_given(xp):
    """AWQ clips a layer before it rounds it: the error is that of both, not of rounding."""
    rng = np.random.default_rng(1)
    exact = rng.standard_normal((6, 16))
    clipped = np.clip(exact, -1, 1)
    for layer, given, expected in [
        (clipped, None, 0.0),
        (clipped, exact, ((clipped - exact) ** 2).sum() / (exact**2).sum()),
    ]:
        found = []
        METHODS["rtn"]().quantize_projections(
            SimpleNamespace(index=0),
            {"v_proj": Dense(xp.asarray(layer))},
            {"v_proj": None},
            lambda name, weight: QuantizedProjection(Dense(weight)),
            found.append,
            exact=None if given is None else {"v_proj": Dense(xp.asarray(given))},
        )
        assert found[0].weight_error == pytest.approx(expected, rel=1e-12)
