"""quantization_config: what is written is read again, and what would change the output is
rejected, not ignored.
"""

from __future__ import annotations

import copy
import json

import pytest

from conftest import oracle
from refllm.formats.layouts import GPTQ_BITS, WeightLayout
from refllm.formats.quantization_config import UnsupportedQuantization, parse, quantization_config

WRITTEN = [
    *(WeightLayout("pack-quantized", bits, group) for bits in (2, 3, 4, 8) for group in (None, 32)),
    *(WeightLayout("naive-quantized", 8, group) for group in (None, 32)),
    WeightLayout("int-quantized", 8),
    *(
        WeightLayout(layout, bits, 32, symmetric=False)
        for layout in ("gptq", "gptq_v2")
        for bits in GPTQ_BITS
    ),
    WeightLayout("gptq_v2", 4, 128, symmetric=False, act_order=True),
    WeightLayout("awq", 4, None, symmetric=False),
]
LAYOUT = WeightLayout("pack-quantized", 4, 32)
COMPRESSED = quantization_config(LAYOUT)
W8A8 = quantization_config(WeightLayout("int-quantized", 8))
NAIVE = quantization_config(WeightLayout("naive-quantized", 8))
INPUTS = W8A8["config_groups"]["group_0"]["input_activations"]
GPTQ = quantization_config(WeightLayout("gptq_v2", 4, 32))
AWQ = quantization_config(WeightLayout("awq", 4, 32))


@pytest.mark.parametrize("stored", WRITTEN, ids=str)
def test_what_is_written_is_read_again(stored):
    entry = quantization_config(stored, ["lm_head", r"re:.*\.o_proj$"])
    read = parse(json.loads(json.dumps(entry)))
    names = {"model.layers.0.mlp.up_proj.qweight"}
    assert read.of("model.layers.0.mlp.up_proj", names) == stored
    if read.method == "compressed-tensors":
        assert read.of("lm_head", names) is None
        assert read.of("model.layers.3.self_attn.o_proj", names) is None
    else:  # theirs have no list of what is quantised: what has no qweight is not
        assert read.of("lm_head", names) is None


def test_own_names_come_before_patterns_and_patterns_before_classes():
    raw = copy.deepcopy(COMPRESSED)
    group = raw["config_groups"]["group_0"]
    for number, (target, bits) in enumerate((("re:.*up_proj", 3), ("a.up_proj", 2)), 1):
        raw["config_groups"][f"group_{number}"] = copy.deepcopy(group) | {"targets": [target]}
        raw["config_groups"][f"group_{number}"]["weights"]["num_bits"] = bits
    read = parse(raw)
    assert [read.of(name, ()).bits for name in ("a.q_proj", "b.up_proj", "a.up_proj")] == [4, 3, 2]


def changed(raw, path: str, value):
    """``raw`` with another value at a dotted path; group_0 is meant by a dot in front."""
    raw = copy.deepcopy(raw)
    at = raw["config_groups"]["group_0"] if path.startswith(".") else raw
    *before, last = path.strip(".").split(".")
    for key in before:
        at = at[key]
    at[last] = value
    return raw


@pytest.mark.parametrize(
    ("raw", "path", "value", "sentence"),
    [
        (
            COMPRESSED,
            "quant_method",
            "bitsandbytes",
            "'bitsandbytes' is not supported; supported are compressed-ten",
        ),
        (
            COMPRESSED,
            ".format",
            "float-quantized",
            "format 'float-quantized' .* pack-quantized, int-quantized",
        ),
        (COMPRESSED, "quantization_status", "frozen", "supported: compressed"),
        (COMPRESSED, "quantization_status", None, "supported: compressed"),
        (COMPRESSED, "kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
        (COMPRESSED, "config_groups", {}, "config_groups"),
        (COMPRESSED, "config_groups", {"a": 3}, "groups with 'targets' and 'weights'"),
        (COMPRESSED, "sparsity_config", {"format": "sparse-24"}, "dense weights"),
        (COMPRESSED, "ignore", "lm_head", "lists of names"),
        (COMPRESSED, "ignore", ["re:("], "is not a pattern"),
        (COMPRESSED, ".targets", None, "lists of names"),
        (COMPRESSED, ".weights.type", "float", "integers by channel or group"),
        (COMPRESSED, ".weights.strategy", "block", "integers by channel or group"),
        (COMPRESSED, ".weights.dynamic", True, "integers by channel or group"),
        (COMPRESSED, ".weights.num_bits", 16, "num_bits of pack-quantized 16"),
        (COMPRESSED, ".weights.num_bits", True, "num_bits"),
        (COMPRESSED, ".weights.symmetric", "false", "symmetric 'false' .* true and false"),
        (COMPRESSED, ".weights.actorder", "group", "actorder"),
        (COMPRESSED, ".weights.actorder", "dynamic", "actorder"),
        (COMPRESSED, ".weights.num_bits", 0, "num_bits of pack-quantized 0 .* 1 to 8"),
        (COMPRESSED, ".weights.num_bits", 9, "num_bits of pack-quantized 9"),
        (COMPRESSED, ".weights.num_bits", 4.0, "num_bits of pack-quantized 4.0"),
        (COMPRESSED, ".weights.group_size", True, "group_size True"),
        (COMPRESSED, ".weights.group_size", 32.0, "group_size 32.0"),
        (COMPRESSED, ".weights", None, "groups with 'targets' and 'weights'"),
        (COMPRESSED, "config_groups", None, "an object of at least one group"),
        (COMPRESSED, "transform_config", {"a": 1}, "transform_config"),
        (COMPRESSED, "moe_sparsity_config", {"a": 1}, "moe_sparsity_config"),
        (COMPRESSED, "ignore", ["lm_head", 3], "lists of names"),
        (COMPRESSED, ".weights.group_size", 0, "group_size 0"),
        (COMPRESSED, ".output_activations", {"num_bits": 8}, "output_activations"),
        (
            COMPRESSED,
            ".input_activations",
            INPUTS,
            "of pack-quantized",
        ),
        (W8A8, ".input_activations.dynamic", False, "dynamic symmetric 8-bit integers per token"),
        (W8A8, ".input_activations.num_bits", 4, "dynamic symmetric 8-bit integers per token"),
        (W8A8, ".input_activations.strategy", "tensor", "dynamic symmetric 8-bit integers"),
        (W8A8, ".input_activations.symmetric", False, "dynamic symmetric 8-bit integers"),
        (W8A8, ".input_activations", "dynamic", "dynamic symmetric 8-bit integers per token"),
        (NAIVE, ".input_activations", INPUTS, "input_activations of naive-quantized"),
        (NAIVE, ".weights.num_bits", 7, "num_bits of naive-quantized 7"),
        (W8A8, ".weights.strategy", "group", "symmetric ones by channel"),
        (W8A8, ".weights.symmetric", False, "symmetric ones by channel"),
        (W8A8, ".weights.num_bits", 4, "num_bits of int-quantized"),
        (GPTQ, "checkpoint_format", "marlin", "gptq and gptq_v2"),
        (GPTQ, "is_marlin_format", True, "gptq and gptq_v2"),
        (GPTQ, "bits", 5, "2, 3, 4 and 8"),
        (GPTQ, "dynamic", {"-:.*": {}}, "one scheme for all modules"),
        (GPTQ, "bits", True, "2, 3, 4 and 8"),
        (GPTQ, "bits", 4.5, "2, 3, 4 and 8"),
        (GPTQ, "group_size", 0, "-1 for one scale per row"),
        (GPTQ, "group_size", -2, "-1 for one scale per row"),
        (GPTQ, "group_size", None, "-1 for one scale per row"),
        (AWQ, "version", "gemv", "supported: gemm"),
        (AWQ, "bits", 8, "supported: 4"),
        (AWQ, "zero_point", False, "supported: true"),
    ],
)
def test_what_would_change_the_output_is_rejected(raw, path, value, sentence):
    with pytest.raises(UnsupportedQuantization, match=sentence):
        parse(changed(raw, path, value)).of("lm_head", ())


@pytest.mark.parametrize(
    ("raw", "path", "value"),
    [
        (COMPRESSED, "ignore", None),
        (COMPRESSED, "sparsity_config", {"format": "dense"}),
        (COMPRESSED, "sparsity_config", {}),
        (COMPRESSED, "transform_config", {}),
        (COMPRESSED, ".format", None),  # the one above the groups holds
        (COMPRESSED, ".output_activations", {}),
        (COMPRESSED, ".weights.actorder", None),
        (COMPRESSED, ".weights.actorder", "weight"),
        (COMPRESSED, ".weights.actorder", "static"),
    ],
)
def test_what_changes_nothing_is_read(raw, path, value):
    assert parse(changed(raw, path, value)).groups == ((("Linear",), LAYOUT),)


def test_the_format_of_a_group_comes_before_that_above_the_groups():
    raw = changed(NAIVE, "format", "mixed-precision")
    assert parse(raw).groups == ((("Linear",), WeightLayout("naive-quantized", 8)),)


def test_older_names_of_gptq_and_awq():
    awq = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}
    assert parse(awq).groups[0][1] == WeightLayout("awq", 4, 64, symmetric=False)
    assert parse(awq | {"q_group_size": -1}).groups[0][1].group_size is None
    gptq = {"quant_method": "gptq", "bits": 3, "group_size": 128}
    layout = WeightLayout("gptq", 3, 128, symmetric=False)
    assert parse(gptq).groups[0][1] == layout  # version 1 by default
    assert parse(gptq | {"format": "gptq_v2"}).groups[0][1].name == "gptq_v2"
    assert parse(gptq | {"desc_act": True}).groups[0][1].act_order
    both = gptq | {"format": "marlin", "checkpoint_format": "gptq"}
    assert parse(both).groups[0][1].name == "gptq"
    with pytest.raises(UnsupportedQuantization, match="checkpoint_format 'marlin'"):
        parse(gptq | {"format": "marlin"})


@pytest.mark.parametrize(
    ("layout", "mark", "other"),
    [
        (WeightLayout("fp8", 8, 128), "weight_scale_inv", "qweight"),
        (WeightLayout("gptq_v2", 4, 32), "qweight", "weight_scale_inv"),
        (WeightLayout("awq", 4, 32), "qweight", "weight_scale_inv"),
    ],
)
def test_which_tensor_marks_a_quantised_weight(layout, mark, other):
    read = parse(quantization_config(layout))
    assert read.of("up_proj", {f"up_proj.{mark}"}) == read.groups[0][1]
    for names in (set(), {f"up_proj.{other}"}, {f"down_proj.{mark}"}, {mark}):
        assert read.of("up_proj", names) is None
    assert str(read) == f"{read.method}: {read.groups[0][1]}"


def test_the_first_of_equal_matches_counts_and_others_do_not_match():
    raw = copy.deepcopy(COMPRESSED)
    group = raw["config_groups"]["group_0"]
    raw["config_groups"] = {}
    for bits, targets in ((2, ["re:.*up"]), (3, ["b", "re:a.*"]), (5, ["re:.*up", "b"])):
        weights = group["weights"] | {"num_bits": bits}
        raw["config_groups"][str(bits)] = group | {"targets": targets, "weights": weights}
    raw["ignore"] = ["re:.*skip", "Linear_1"]
    read = parse(raw)
    found = {name: read.of(name, ()) for name in ("a.up", "b", "ab", "c", "up_skip", "xb")}
    assert [layout and layout.bits for layout in found.values()] == [2, 3, 3, None, None, None]


def test_what_is_no_object_is_rejected():
    with pytest.raises(UnsupportedQuantization, match="must be an object"):
        parse([])


def test_an_int_quantized_file_without_activations_is_a_naive_one():
    read = parse(changed(W8A8, ".input_activations", None))
    assert read.groups[0][1] == WeightLayout("naive-quantized", 8)


@pytest.mark.oracle
@pytest.mark.parametrize("stored", [s for s in WRITTEN if "quantized" in s.name], ids=str)
def test_compressed_tensors_takes_what_is_written(stored):
    """It rejects entries that it does not know."""
    module = oracle("compressed_tensors.quantization")
    entry = quantization_config(stored, ["lm_head", r"re:.*\.o_proj$"])
    scheme = module.QuantizationConfig.model_validate(entry).config_groups["group_0"]
    assert (scheme.weights.num_bits, scheme.weights.group_size) == (stored.bits, stored.group_size)
    assert (scheme.input_activations is not None) == stored.activations
