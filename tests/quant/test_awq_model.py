"""AWQ on a layer: folding changes nothing, the loss is taken on whole modules, and
llm-compressor finds the same.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from networks import NETWORKS, VOCAB, random_tensors, tolerance
from refllm.formats.quantized_linear import fake_quantize
from refllm.formats.uniform import Scheme
from refllm.model.attention import CausalAttend
from refllm.model.layers import rope_table, swiglu
from refllm.model.llama import PROJECTIONS, build, decoder_layer, mixed_heads
from refllm.model.weights import Dense
from refllm.quant.awq import search_clip, search_scale
from refllm.quant.awq_model import (
    ATTENTION_INPUT,
    HEADS,
    MLP_HIDDEN,
    MLP_INPUT,
    awq_layer,
    fold,
    scale_groups,
)
from refllm.quant.taps import tapped
from strategies import seeds

GOLDEN = Path(__file__).parents[1] / "golden" / "awq.json"
# every family, with as many key/value heads as query heads (o_proj can be scaled) and with
# fewer
CASES = {
    name: replace(config, num_hidden_layers=1)
    for name, config in {
        **NETWORKS,
        "qwen2-mha": replace(NETWORKS["qwen2"], num_key_value_heads=4),
        "qwen3-mha": replace(NETWORKS["qwen3"], num_key_value_heads=4, head_dim=10),
    }.items()
}
W3 = Scheme(3, "asymmetric", "group", 4)
LENGTHS = [9, 1, 20]


class Case:
    """The first layer of a random network and the inputs of its projections."""

    def __init__(self, xp, config, seed, dtype="float64", lengths=LENGTHS, tokens=None):
        self.config = config
        self.dtype = dtype
        self.weights = build(
            config, {k: xp.asarray(t) for k, t in random_tensors(config, seed, dtype).items()}
        )
        self.layer = self.weights["layers"][0]
        if tokens is None:
            tokens = np.random.default_rng(seed).integers(0, VOCAB, sum(lengths))
        positions = xp.asarray([i for n in lengths for i in range(n)])
        self.x = self.weights["embed_tokens"].rows(xp.asarray(tokens))
        self.attend = CausalAttend(lengths, config.sliding_window)
        self.rotation = rope_table(self.weights["rope_frequencies"], positions, self.x.dtype)
        self.inputs = {}
        tap = tapped(self.weights, lambda i, name, x: self.inputs.setdefault(name, x.copy()))[
            "layers"
        ][0]
        decoder_layer(tap, config, self.x, self.rotation, self.attend, 0)

    def run(self, layer):
        return to_host(decoder_layer(layer, self.config, self.x, self.rotation, self.attend, 0))

    def awq(self, scheme=W3, **options):
        options = {"rotation": self.rotation, "attend": self.attend} | options
        return awq_layer(self.layer, self.config, self.inputs, scheme, **options)

    def bound(self, out):
        return tolerance(replace(self.config, num_hidden_layers=1), sum(self.attend.lengths), out)


def snapshot(layer):
    """The bits of every array of a layer."""
    leaves = {
        name: to_host(leaf.dequantize() if hasattr(leaf, "matmul") else leaf)
        for name, leaf in layer.items()
    }
    return {name: (leaf.dtype, leaf.tobytes()) for name, leaf in leaves.items()}


# --- folding ------------------------------------------------------------------------------


@pytest.mark.theorem(
    "folding a scale (columns times s, the source of their input divided by s) does not "
    "change a layer's output, in float64",
    source="Lin et al. 2023, section 3.2: Q(w·s)(x/s)",
)
@pytest.mark.parametrize("name", CASES)
@given(seed=seeds)
def test_invariance_folding_changes_nothing(xp, name, seed):
    case = Case(xp, CASES[name], seed)
    exact = case.run(case.layer)
    rng = np.random.default_rng(seed)
    folded = case.layer
    for group in scale_groups(case.layer)[0]:
        columns = case.layer[group.targets[0]].shape[1]
        folded = fold(folded, group, xp.asarray(2.0 ** rng.uniform(-8, 8, columns)))
        out = case.run(folded)
        assert np.abs(out - exact).max() <= case.bound(exact)


@pytest.mark.parametrize("name", CASES)
def test_the_groups_of_a_layer_and_why_one_is_missing(xp, name):
    config = CASES[name]
    groups, skipped = scale_groups(Case(xp, config, 0).layer)
    if config.num_key_value_heads == config.num_attention_heads:
        assert (groups, skipped) == ([ATTENTION_INPUT, HEADS, MLP_INPUT, MLP_HIDDEN], [])
    else:
        assert groups == [ATTENTION_INPUT, MLP_INPUT, MLP_HIDDEN]
        assert len(skipped) == 1
        assert "query heads share values" in skipped[0]


def test_heads_of_an_unusual_size_are_skipped_as_upstream_does(xp):
    config = replace(CASES["llama-tied-mha"], head_dim=16)  # v_proj is 64 × 40, o_proj 40 × 64
    groups, skipped = scale_groups(Case(xp, config, 0).layer)
    assert HEADS not in groups
    assert "(64, 40)" in skipped[0]
    assert "share" not in skipped[0]


@pytest.mark.parametrize(
    "group", [ATTENTION_INPUT, HEADS, MLP_INPUT, MLP_HIDDEN], ids=lambda g: g.name
)
def test_folding_multiplies_and_divides_what_the_table_says(xp, group):
    case = Case(xp, CASES["qwen2-mha"], 1)
    before = {
        k: to_host(v.dequantize() if hasattr(v, "matmul") else v) for k, v in case.layer.items()
    }
    s = np.linspace(0.5, 2.0, before[group.targets[0]].shape[1])
    after = fold(case.layer, group, xp.asarray(s))
    divided = {group.source} | ({"v_bias"} if group is HEADS else set())
    assert after.keys() == before.keys()
    for name, leaf in after.items():
        expected = before[name]
        if name in group.targets:
            expected = expected * s
        elif name in divided:
            expected = expected / (s[:, None] if expected.ndim == 2 else s)
        assert np.array_equal(
            to_host(leaf.dequantize() if hasattr(leaf, "matmul") else leaf), expected
        ), name


# --- a whole layer ------------------------------------------------------------------------


@pytest.mark.theorem(
    "AWQ without clipping and rounding computes the same function as the layer that it was "
    "given, in float64",
    source="Lin et al. 2023, section 3.2",
)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("duo", [False, True])
def test_invariance_the_searched_layer_is_the_same_function(xp, name, duo):
    case = Case(xp, CASES[name], 2)
    exact = case.run(case.layer)
    result, found = case.awq(duo=duo, clipping=False)
    assert np.abs(case.run(result) - exact).max() <= case.bound(exact)
    assert any(found.scales[g].best > 0 for g in found.scales), (
        "nothing was scaled: this proves nothing"
    )
    assert (found.limits, found.clipped) == ({}, {})


class Failing:
    """An ``attend`` that gives up at the n-th call."""

    def __init__(self, inner, calls):
        self.inner = inner
        self.calls = calls

    def __call__(self, *args):
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("attend failed")
        return self.inner(*args)


@given(calls=st.integers(0, 23), seed=seeds)
def test_the_layer_is_bit_identical_after_the_search_and_after_one_that_failed(xp, calls, seed):
    case = Case(xp, CASES["llama-tied-mha"], seed, "float32", [6])
    before = snapshot(case.layer)
    leaves = dict(case.layer)
    if calls < 21:  # the reference and twenty candidates
        with pytest.raises(RuntimeError, match="attend failed"):
            case.awq(attend=Failing(case.attend, calls))
    else:
        case.awq(attend=Failing(case.attend, calls))
    assert snapshot(case.layer) == before
    assert all(case.layer[name] is leaf for name, leaf in leaves.items())


@pytest.mark.parametrize("name", ["llama", "qwen2-mha", "qwen3"])
def test_losses_are_taken_on_the_whole_attention_and_the_whole_mlp(xp, name):
    case = Case(xp, CASES[name], 3)
    _, found = case.awq()
    layer = case.layer
    inputs = case.inputs

    def attention(trial):
        h = mixed_heads(trial, case.config, inputs["k_proj"], case.rotation, case.attend, 0)
        return to_host(layer["o_proj"].matmul(h))

    def mlp(trial):
        x = inputs["up_proj"]
        return to_host(
            layer["down_proj"].matmul(
                swiglu(trial["gate_proj"].matmul(x), trial["up_proj"].matmul(x))
            )
        )

    def product(trial):
        return to_host(trial["down_proj"].matmul(inputs["down_proj"]))

    for group, run in ((ATTENTION_INPUT, attention), (MLP_INPUT, mlp), (MLP_HIDDEN, product)):
        scale = found.scales[group.name]
        for s, loss in (
            (xp.ones_like(scale.scale), scale.losses[0]),
            (scale.scale, min(scale.losses)),
        ):
            rounded = {
                n: Dense(fake_quantize(layer[n].dequantize() * s, W3) / s) for n in group.targets
            }
            expected = np.mean((run(layer) - run(layer | rounded)) ** 2)
            # the same products in blocks and as one matrix
            assert loss == pytest.approx(expected, rel=1e-9)


def test_every_group_is_searched_on_the_layer_as_it_was(xp):
    case = Case(xp, CASES["qwen2-mha"], 4)
    _, found = case.awq()
    for group, name in ((HEADS, "o_proj"), (MLP_HIDDEN, "down_proj")):
        alone = search_scale(case.inputs[name], [case.layer[name].dequantize()], W3)
        assert found.scales[group.name].losses == alone.losses
        assert np.array_equal(to_host(found.scales[group.name].scale), to_host(alone.scale))


@pytest.mark.parametrize("name", ["llama", "llama-tied-mha"])
def test_clipping_sees_folded_weights_and_divided_inputs_and_spares_queries_and_keys(xp, name):
    case = Case(xp, CASES[name], 5)
    scaled, found = case.awq(clipping=False)
    result, clipped = case.awq()
    assert set(clipped.limits) == set(PROJECTIONS) - {"q_proj", "k_proj"}
    for key in PROJECTIONS:
        before, after = (to_host(layer[key].dequantize()) for layer in (scaled, result))
        if key in ("q_proj", "k_proj"):
            assert np.array_equal(before, after)
            continue
        group = next(g for g in (ATTENTION_INPUT, HEADS, MLP_INPUT, MLP_HIDDEN) if key in g.targets)
        x = case.inputs[key]
        if group.name in found.scales:
            x = x / found.scales[group.name].scale
        limits = to_host(search_clip(x, scaled[key].dequantize(), W3))
        assert np.array_equal(to_host(clipped.limits[key]), limits)
        grouped = before.reshape(*limits.shape, -1)
        assert np.array_equal(
            after.reshape(grouped.shape), np.clip(grouped, -limits[..., None], limits[..., None])
        )
        assert clipped.clipped[key] == np.mean(np.abs(grouped).max(axis=-1) > limits)
    assert 0 < sum(clipped.clipped.values())


def test_losses_by_projection_are_those_of_the_group_that_scales_its_columns(xp):
    _, found = Case(xp, CASES["llama"], 6).awq()
    # grouped queries: o_proj is not scaled
    assert set(found.losses) == set(PROJECTIONS) - {"o_proj"}
    assert (
        found.losses["q_proj"]
        == found.losses["v_proj"]
        == min(found.scales["attention input"].losses)
    )
    assert found.losses["gate_proj"] == min(found.scales["MLP input"].losses)
    assert found.losses["down_proj"] == min(found.scales["MLP hidden"].losses)
    assert len(found.skipped) == 1


def test_one_input_of_each_group_is_enough_and_none_is_rejected(xp):
    case = Case(xp, CASES["llama"], 7)
    whole = case.awq()[1]
    case.inputs = {
        name: case.inputs[name] for name in ("v_proj", "o_proj", "gate_proj", "down_proj")
    }
    assert case.awq()[1].losses == whole.losses
    del case.inputs["gate_proj"]
    with pytest.raises(
        ValueError, match="one of gate_proj, up_proj; captured: v_proj, o_proj, down_proj"
    ):
        case.awq()


# --- the reference implementation ---------------------------------------------------------


@pytest.mark.parametrize("number", range(4))
def test_oracle_losses_and_scales_are_those_of_llm_compressor(xp, number):
    """Recorded by golden/make_awq.py. Asymmetric, because a symmetric grid decides ties by
    the scale's last bit.
    """
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    wanted = golden["cases"][number]
    rng = np.random.default_rng(golden["seed"])
    case = Case(
        xp,
        NETWORKS[wanted["network"]],
        golden["seed"],
        "float32",
        [40] * 4,
        rng.integers(0, VOCAB, 160),
    )
    width = wanted["group_size"]
    scheme = Scheme(
        wanted["bits"], "asymmetric_signed", *(("group", width) if width else ("channel",))
    )
    # without duo its grid ends at 1
    ratios = None if wanted["duo"] else [i / 19 for i in range(20)]
    _, found = case.awq(scheme, duo=wanted["duo"], ratios=ratios, clipping=False)
    by_source = {g.source: found.scales[g.name] for g in scale_groups(case.layer)[0]}
    assert by_source.keys() == wanted["groups"].keys()
    for source, ours in by_source.items():
        theirs = wanted["groups"][source]
        # float32 throughout: sums of 72 products and of 6,400 squares in another order; no
        # code falls otherwise
        np.testing.assert_allclose(ours.losses, theirs["losses"], rtol=1e-5)
        assert ours.best == int(np.argmin(theirs["losses"]))
        np.testing.assert_allclose(to_host(ours.scale), theirs["scale"], rtol=1e-6)
