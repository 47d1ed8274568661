"""Any value of the metadata may be anything: a file loads, or ends in one sentence that names
it once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config_values import outcome
from test_gguf import make

from networks import SIZES
from refllm.checkpoints.gguf_names import config_metadata
from refllm.checkpoints.gguf_tokenizer import TOKENIZER_JSON
from refllm.checkpoints.gguf_tokenizer_writer import tokenizer_metadata
from refllm.checkpoints.loading import load
from refllm.formats.gguf.reader import GGUFFile
from refllm.formats.gguf.writer import write
from refllm.model.config import ModelConfig
from refllm.model.rope import LinearScaling, YarnScaling
from refllm.quant.to_gguf import open_source
from tiny_models import byte_tokenizer

CONFIG = ModelConfig("llama", **SIZES, head_dim=10, bos_token_id=0, eos_token_ids=(0,))
SCALED = [
    ModelConfig("llama", 300, 8, 8, 1, 1, 1, 8, rope_scaling=scaling)
    for scaling in (LinearScaling(2.0, 0.5), YarnScaling(4.0, 64, 1.0, 16.0))
]
# Keys that a valid file may have beside those of CONFIG, and some that must be rejected
MORE = {
    *(key for config in SCALED for key in config_metadata(config, "x")),
    *(f"llama.rope.scaling.yarn_{key}" for key in ("beta_fast", "attn_factor", "ext_factor")),
    *(f"llama.rope.{key}" for key in ("scale_linear", "scaling.finetuned", "scaling.x")),
    *(f"llama.attention.{key}" for key in ("sliding_window", "causal", "sliding_window_pattern")),
    *(f"tokenizer.ggml.{key}" for key in ("eot_token_id", "eom_token_id", "unknown_token_id")),
    *(f"tokenizer.ggml.{key}" for key in ("scores", "add_eos_token", "padding_token_id")),
    *("tokenizer.chat_template", "tokenizer.chat_templates", "llama.expert_count"),
    *("split.count", "split.no", "general.file_type", "general.alignment", "refllm.rope_scaling"),
}
KEYS = sorted({*config_metadata(CONFIG, "x"), *tokenizer_metadata(byte_tokenizer(), CONFIG), *MORE})
INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
EXTREMES = (0, 1, -1, 2, 3, 7, 127, 255, 300, 65_535, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
WORDS = ("", "two", "llama", "yarn", "linear", "gpt2", "{}", "[", "{% for %}", "\0", "é", "0")


def scalars() -> st.SearchStrategy[object]:
    """A number of any type, with the values that bounds are drawn at."""
    floats = st.sampled_from([0.0, -1.0, 0.5, 1.0, 1e-45, 1e30, np.nan, np.inf, -np.inf])

    def integer(pair: tuple[str, int]) -> object:
        kind, value = pair
        bounds = np.iinfo(kind)
        return np.dtype(kind).type(min(max(value, int(bounds.min)), int(bounds.max)))

    integers = st.tuples(st.sampled_from(INTEGERS), st.sampled_from(EXTREMES)).map(integer)
    return integers | floats.map(np.float32) | floats.map(np.float64) | st.booleans().map(np.bool_)


def values() -> st.SearchStrategy[object]:
    """A value of any type that GGUF has."""
    words = st.sampled_from(WORDS)
    arrays = st.tuples(scalars(), st.integers(0, 3)).map(lambda p: np.array([p[0]] * p[1]))
    # NumPy has no type for an empty list of anything; the file needs one
    typed = arrays.filter(lambda a: a.dtype != object).map(
        lambda a: a if a.size else a.astype("int32")
    )
    return scalars() | words | st.lists(words, max_size=3) | typed


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("valid") / "x.gguf", CONFIG, "F16")


def changed(valid: Path, target: Path, changes: dict[str, object]) -> Path:
    """A copy with other entries; None leaves one out."""
    with GGUFFile(valid) as file:
        entries = {k: v for k, v in (file.metadata | changes).items() if v is not None}
        plan = {name: (r.type.name, r.shape) for name, r in file.tensors.items()}
        write(target, entries, plan, lambda name: np.array(file[name]).reshape(-1))
    return target


@pytest.mark.theorem(
    "Whatever the values of a file's metadata are, it loads or ends in an InputError of one line "
    "that names the file once",
    source="malformed metadata of published files",
)
@settings(max_examples=100)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), st.none() | values(), max_size=3),
    rebuilt=st.booleans(),
)
def test_any_value_loads_or_ends_in_one_sentence(valid, tmp_path_factory, changes, rebuilt):
    """``rebuilt`` leaves out our own copy of the tokenizer, so that llama.cpp's keys are read."""
    if rebuilt:
        changes = {TOKENIZER_JSON: None} | changes
    path = changed(valid, tmp_path_factory.mktemp("m") / "changed.gguf", changes)
    for use in (load, open_source):
        sentence = outcome(use, path)
        assert sentence.count(str(path)) <= 1
        assert "\n" not in sentence
        assert len(sentence) < 1000


def test_the_file_that_is_changed_is_valid(valid, tmp_path):
    """Otherwise every change would be rejected, and nothing tested."""
    assert load(changed(valid, tmp_path / "x.gguf", {})).config == CONFIG
    assert open_source(valid)[0] == CONFIG
