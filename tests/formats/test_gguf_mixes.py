"""Which type each tensor gets: llama.cpp's own choices, the table by hand, fallbacks,
published sizes.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle
from refllm.checkpoints.gguf_names import gguf_name
from refllm.checkpoints.tensor_files import tensor_shapes
from refllm.experiments.gguf_mixes import LLAMA_2_7B, LLAMA_31_8B, LU_2025, table
from refllm.formats.gguf.mixes import FILE_TYPES, MIXES, Heads, bits_per_weight, mix, more_bits
from refllm.formats.gguf.reader import _FOREIGN, GGUFFile
from refllm.formats.gguf.types import TYPES, gguf_type
from refllm.model.config import ModelConfig
from refllm.quant.to_gguf import convert

QUANTISED = [name for name, (base, _) in MIXES.items() if gguf_type(base).quantized]


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {gguf_name(name): shape for name, shape in tensor_shapes(config)}


def network(
    layers=16, heads=4, kv=2, width=256, inner=512, tied=False
) -> tuple[dict[str, Any], Heads]:
    config = ModelConfig(
        "llama", 300, width, inner, layers, heads, kv, width // heads, tie_word_embeddings=tied
    )
    return shapes_of(config), Heads("llama", layers, heads, kv)


def test_more_bits_by_hand():
    assert [i for i in range(32) if more_bits(i, 32)] == [
        *range(4),
        6,
        9,
        12,
        15,
        18,
        21,
        24,
        27,
        *range(28, 32),
    ]
    assert [i for i in range(5) if more_bits(i, 5)] == [2, 4]


def test_the_most_used_mix_by_hand():
    shapes, heads = network(layers=32)
    types = mix(shapes, "Q4_K_M", heads)
    high = {i for i in range(32) if more_bits(i, 32)}
    for i in range(32):
        assert types[f"blk.{i}.attn_v.weight"] == ("Q6_K" if i in high else "Q4_K")
        assert types[f"blk.{i}.ffn_down.weight"] == ("Q6_K" if i in high else "Q4_K")
        assert types[f"blk.{i}.attn_q.weight"] == types[f"blk.{i}.ffn_up.weight"] == "Q4_K"
        assert types[f"blk.{i}.attn_norm.weight"] == "F32"
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q6_K", "Q4_K")


@pytest.mark.parametrize(
    ("name", "kv", "tensor", "expected"),
    [
        ("Q2_K", 1, "blk.9.attn_v", "Q4_K"),
        ("Q2_K", 2, "blk.9.attn_v", "Q3_K"),
        ("Q2_K", 2, "blk.9.ffn_down", "Q3_K"),
        ("Q2_K", 2, "blk.9.attn_output", "Q3_K"),
        ("Q2_K", 2, "blk.9.attn_k", "Q2_K"),
        ("Q3_K_M", 2, "blk.1.attn_v", "Q5_K"),
        ("Q3_K_M", 2, "blk.2.attn_v", "Q4_K"),
        ("Q3_K_M", 2, "blk.0.ffn_down", "Q5_K"),
        ("Q3_K_M", 2, "blk.1.ffn_down", "Q4_K"),
        ("Q3_K_M", 2, "blk.9.attn_output", "Q4_K"),
        ("Q3_K_L", 2, "blk.9.attn_output", "Q5_K"),
        ("Q3_K_S", 2, "blk.0.ffn_down", "Q3_K"),
        ("Q4_K_S", 2, "blk.3.attn_v", "Q5_K"),
        ("Q4_K_S", 2, "blk.4.attn_v", "Q4_K"),
        ("Q4_K_S", 2, "blk.1.ffn_down", "Q5_K"),
        ("Q4_K_S", 2, "blk.2.ffn_down", "Q4_K"),
        ("Q5_K_S", 2, "blk.0.attn_v", "Q5_K"),
        ("Q8_0", 2, "output", "Q8_0"),
        ("Q4_0", 2, "output", "Q6_K"),
        ("Q4_0", 2, "token_embd", "Q4_0"),
        ("IQ4_NL", 1, "blk.0.attn_v", "Q5_K"),
        ("IQ4_NL", 2, "blk.0.attn_v", "IQ4_NL"),
        ("IQ4_NL", 2, "blk.1.ffn_down", "Q5_K"),
        ("IQ4_NL", 2, "blk.2.ffn_down", "IQ4_NL"),
        ("IQ4_NL", 2, "output", "Q6_K"),
    ],
)
def test_the_table_by_hand(name, kv, tensor, expected):
    shapes, heads = network(kv=kv)
    assert mix(shapes, name, heads)[tensor + ".weight"] == expected


def test_file_types_are_llama_cpps_numbers():
    """``general.file_type`` as in llama.h's ``llama_ftype``."""
    numbers = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
    numbers |= {"Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15}
    numbers |= {"Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32}
    assert {name: number for name, (_, number) in MIXES.items()} == numbers
    assert {name: number for number, name in FILE_TYPES.items()} == numbers


@pytest.mark.oracle
def test_numbers_and_sizes_are_those_of_the_gguf_package():
    """File types, and the id and block of every storage type; foreign types by their ids."""
    gguf = oracle("gguf")
    for name, (_, number) in MIXES.items():
        known = gguf.LlamaFileType(number).name
        assert known in (f"ALL_{name}", f"MOSTLY_{name}")
    for name, found in TYPES.items():
        type = gguf.GGMLQuantizationType[name]
        assert (found.id, found.block, found.size) == (type, *gguf.GGML_QUANT_SIZES[type])
    known = {type.value: type.name for type in gguf.GGMLQuantizationType}
    others = {n: name for n, name in known.items() if name not in TYPES and n <= max(_FOREIGN)}
    assert {n: name for n, name in _FOREIGN.items() if n in known} == others


@pytest.mark.parametrize(
    ("name", "inner", "expected"),
    [
        ("Q2_K", 288, ("Q4_0", "Q4_0")),
        ("Q3_K_S", 288, ("Q4_0", "Q4_0")),
        ("Q4_K_S", 288, ("Q5_1", "Q5_0")),
        ("Q4_K_M", 288, ("Q8_0", "Q5_0")),
        ("Q5_K_S", 288, ("Q5_1", "Q5_1")),
        ("Q6_K", 288, ("Q8_0", "Q8_0")),
        ("Q4_0", 288, ("Q4_0", "Q4_0")),
        ("Q4_K_M", 104, ("F16", "F16")),
        ("Q4_0", 104, ("F16", "F16")),
        ("Q8_0", 104, ("F16", "F16")),
    ],
)
def test_rows_that_256_or_32_do_not_divide_by_hand(name, inner, expected):
    """ffn_down of the first layer, and of one in the middle, with rows of ``inner``."""
    shapes, heads = network(inner=inner)
    types = mix(shapes, name, heads)
    assert (types["blk.0.ffn_down.weight"], types["blk.5.ffn_down.weight"]) == expected
    assert types["blk.0.ffn_up.weight"] == MIXES[name][0]  # its rows are whole blocks


def test_an_output_that_256_does_not_divide_is_q8_0():
    for width, expected in ((288, "Q8_0"), (104, "F16")):
        shapes, heads = network(width=width)
        for name in ("Q4_K_M", "Q8_0"):
            assert mix(shapes, name, heads)["output.weight"] == expected
    # the blocks of the base type count: 32 divides 288, and Q6_K then falls back
    shapes, heads = network(width=288)
    assert mix(shapes, "Q4_0", heads)["output.weight"] == "Q8_0"


def test_other_tensors_have_the_base_type_or_f32():
    shapes = {
        "blk.0.attn_q.weight": (256, 256),
        "blk.0.attn_q.bias": (256,),
        "rope_freqs.weight": (64,),
        "blk.0.ffn_norm.weight": (2, 256),
        "blk.0.other": (256, 256),
        "blk.0.other.weight": (256, 256),
        "cls.weight": (256, 256),
    }
    found = mix(shapes, "Q4_K_M", Heads("llama", 1, 4, 4))
    assert list(found.values()) == ["Q4_K", "F32", "F32", "F32", "F32", "Q4_K", "Q4_K"]


def test_tied_embeddings_are_the_output():
    shapes, heads = network(tied=True)
    assert mix(shapes, "Q4_K_M", heads)["token_embd.weight"] == "Q6_K"
    assert mix(shapes, "Q8_0", heads)["token_embd.weight"] == "Q8_0"


def test_seventy_billions():
    shapes, heads = network(layers=80, heads=8, kv=1)
    assert mix(shapes, "Q3_K_M", heads)["blk.40.attn_v.weight"] == "Q5_K"
    assert mix(shapes, "Q2_K", heads)["blk.40.attn_v.weight"] == "Q5_K"
    shapes, heads = network(layers=80, heads=4, kv=4)  # as 65B was
    assert mix(shapes, "Q3_K_M", heads)["blk.40.attn_v.weight"] == "Q4_K"


def test_an_importance_lifts_the_first_ffn_down():
    shapes, heads = network()
    plain = mix(shapes, "IQ4_NL", heads, importance=True)
    assert plain["blk.0.ffn_down.weight"] == "IQ4_NL"  # which needs Q5_K without
    for name, better in (("Q4_0", "Q4_1"), ("Q5_0", "Q5_1")):
        assert mix(shapes, name, heads, importance=True)["blk.1.ffn_down.weight"] == better
        assert mix(shapes, name, heads, importance=True)["blk.2.ffn_down.weight"] == name
        assert mix(shapes, name, heads)["blk.1.ffn_down.weight"] == name


@pytest.mark.theorem(
    "Every tensor gets a type whose blocks divide its rows", source="llama-quant.cpp"
)
@given(
    st.sampled_from(list(MIXES)),
    st.integers(1, 40),
    st.sampled_from([64, 96, 104, 256, 320]),
    st.sampled_from([32, 48, 160, 512]),
    st.booleans(),
    st.booleans(),
)
def test_rows_are_whole_blocks(name, layers, width, inner, tied, importance):
    shapes, heads = network(layers, 4, 2, width, inner, tied)
    for tensor, type in mix(shapes, name, heads, importance=importance).items():
        assert shapes[tensor][-1] % gguf_type(type).block == 0, (tensor, type)
        assert (type == "F32") == (len(shapes[tensor]) == 1) or name == "F32"


def test_an_unknown_mix_is_rejected():
    with pytest.raises(ValueError, match="unknown GGUF type 'Q4_K'; choose one of F32"):
        mix({}, "Q4_K", Heads("llama", 1, 1, 1))


# --- llama.cpp ----------------------------------------------------------------------------


@cache
def silence() -> Any:
    """A callback that logs nothing. The library keeps it, and so must we."""
    llama_cpp = oracle("llama_cpp", "pip install llama-cpp-python")
    return llama_cpp.llama_log_callback(lambda *_: None)


def theirs(source, target, name) -> None:
    """llama.cpp's own quantiser."""
    llama_cpp = oracle("llama_cpp", "pip install llama-cpp-python")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = MIXES[name][1]
    params.nthread = 1
    llama_cpp.llama_log_set(silence(), None)
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0


@pytest.mark.llamacpp
@pytest.mark.parametrize(
    ("layers", "kv", "width", "inner", "tied", "encoded"),
    [
        (16, 1, 256, 256, False, ("Q4_K_M", "Q2_K")),
        (32, 2, 256, 256, True, ()),
        (5, 4, 256, 256, True, ("Q3_K_M", "Q5_0", "IQ4_NL")),
        (9, 2, 256, 288, True, ("Q5_K_M",)),
        (8, 2, 320, 256, False, ("Q3_K_L", "Q6_K")),
    ],
)
def test_files_equal_llama_cpps_tensor_by_tensor(
    layers, kv, width, inner, tied, encoded, tmp_path, make_checkpoint
):
    """The type of every tensor in every mix, and the bytes in some; shared heads, tied
    embeddings, rows of 288, 320.
    """
    config = ModelConfig(
        "llama",
        300,
        width,
        inner,
        layers,
        4,
        kv,
        width // 4,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_ids=(0,),
    )
    source = make_checkpoint(config, tmp_path / "source")
    convert(source, tmp_path / "f32.gguf", "F32", workers=1)
    shapes = shapes_of(config)
    for name in QUANTISED if layers < 32 else ("Q3_K_M", "Q4_K_M"):
        theirs(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", name)
        with GGUFFile(tmp_path / "theirs.gguf") as other:
            types = {tensor: record.type.name for tensor, record in other.tensors.items()}
            assert mix(shapes, name, Heads("llama", layers, 4, kv)) == types, name
            if name in encoded:
                convert(
                    tmp_path / "f32.gguf", tmp_path / "ours.gguf", name, workers=1, overwrite=True
                )
                with GGUFFile(tmp_path / "ours.gguf") as ours:
                    for tensor in other:
                        np.testing.assert_array_equal(
                            ours[tensor], other[tensor], err_msg=f"{name} {tensor}"
                        )


# --- sizes --------------------------------------------------------------------------------

PUBLISHED = {
    "Q2_K": 3.1593,
    "Q3_K_M": 3.9960,
    "Q4_K_S": 4.6672,
    "Q4_K_M": 4.8944,
    "Q5_K_M": 5.7036,
    "Q6_K": 6.5633,
    "Q8_0": 8.5008,
}


@pytest.mark.theorem(
    "Llama-3.1-8B's mixes have the bits per weight that llama.cpp publishes", source="its README"
)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_bits_per_weight(name):
    shapes = shapes_of(LLAMA_31_8B)
    found = bits_per_weight(shapes, mix(shapes, name, Heads("llama", 32, 32, 8)))
    assert found == pytest.approx(PUBLISHED[name], abs=0.00006)  # they print four digits


def test_the_study_counts_what_a_file_has():
    rows = {row["mix"]: row for row in table()}
    assert set(rows) == set(QUANTISED) - {"Q4_1", "Q5_1", "IQ4_NL"}
    shapes = shapes_of(LLAMA_2_7B)
    types = mix(shapes, "Q2_K", Heads("llama", 32, 32, 32))
    counted = sum(
        math.prod(s) * gguf_type(types[n]).size // gguf_type(types[n]).block
        for n, s in shapes.items()
    )
    assert rows["Q2_K"]["Llama-2-7B"] == pytest.approx(8 * counted / LLAMA_2_7B.num_parameters)
    for name, stated in LU_2025.items():  # two of the survey's that today's files do not have
        for model in ("Llama-2-7B", "Llama-3.1-8B"):
            assert abs(rows[name][model] - stated) > 0.04
