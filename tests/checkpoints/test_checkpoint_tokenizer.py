"""Which tokenizer a checkpoint has: its own, a named one, one with more ids than the embedding
has rows, or none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Inner

from networks import random_tensors
from refllm.api import Model, load
from refllm.checkpoints.gguf_names import config_metadata, gguf_name, permutation
from refllm.checkpoints.gguf_tokenizer_writer import tokenizer_metadata
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.tokenizer import MissingTokenizer, Tokenizer
from refllm.checkpoints.writer import save
from refllm.decode.speculative.interface import check_vocabulary
from refllm.errors import InputError
from refllm.formats.gguf.codec import quantize
from refllm.formats.gguf.writer import write
from refllm.serve import Engine, Request
from tiny_models import byte_tokenizer, tiny_config

PAD = "<|pad|>"
NO_TEXT = r"has no tokenizer that refllm reads, so the model takes and gives token ids alone"


def padded() -> Tokenizer:
    """The bytes and one padding token beyond them, id 257."""
    inner = Inner.from_str(byte_tokenizer().inner.to_str())
    inner.add_special_tokens([PAD])
    return Tokenizer(inner)


def directory(path: Path, tokenizer: Tokenizer) -> Path:
    config = tiny_config()
    save(path, config, random_tensors(config, 0, "float32"), tokenizer, dtype="float32")
    return path


def gguf_file(path: Path, **entries: object) -> Path:
    """A GGUF file of the same network; ``entries`` of the tokenizer."""
    config = tiny_config()
    data = {}
    plan = {}
    for name, tensor in random_tensors(config, 0, "float32").items():
        rows = permutation(config, name)
        matrix = np.atleast_2d(tensor if rows is None else tensor[rows])
        data[gguf_name(name)] = quantize(matrix, "F32").reshape(-1)
        plan[gguf_name(name)] = ("F32", tensor.shape)
    metadata = config_metadata(config, "x")
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
    write(path, metadata, plan, data.__getitem__)
    return path


@pytest.fixture
def without(tmp_path) -> Model:
    return load(directory(tmp_path / "without", MissingTokenizer("x")), "numpy")


# --- more ids than rows -------------------------------------------------------------------


def test_a_tokenizer_with_more_ids_than_rows_loads_and_rejects_those_ids_where_they_are_used(
    tmp_path,
):
    model = load(directory(tmp_path / "m", padded()), "numpy")
    tokenizer = model.tokenizer
    assert tokenizer.vocab_size == model.config.vocab_size + 1
    assert tokenizer.encode("ab") == byte_tokenizer().encode("ab")
    assert 257 not in tokenizer.encode(PAD)  # as text it is nothing special
    why = r"the token '<\|pad\|>': its id 257 has no row in the model's embedding of 257"
    with pytest.raises(InputError, match=why):
        tokenizer.encode(f"a{PAD}", parse_special=True)
    tokenizer.limit = 258
    assert tokenizer.encode(PAD, parse_special=True) == [257]


def test_a_batch_is_limited_too():
    tokenizer = Tokenizer(Inner.from_str(byte_tokenizer().inner.to_str()), limit=100)
    low = tokenizer.encode_batch(["!", "a"])
    assert max(max(ids) for ids in low) < 100
    with pytest.raises(InputError, match="has no row in the model's embedding of 100"):
        tokenizer.encode_batch(["!", "é"])


# --- a named tokenizer --------------------------------------------------------------------


def test_a_named_tokenizer_is_read_in_place_of_the_checkpoints_own(tmp_path):
    own = directory(tmp_path / "own", byte_tokenizer())
    (tmp_path / "other").mkdir()
    padded().save(tmp_path / "other" / "tokenizer.json")
    strange = gguf_file(tmp_path / "x.gguf", model="gpt2", pre="kimi-k2", tokens=["a"], merges=[])
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.pre is 'kimi-k2'.*--tokenizer DIR"):
        load(strange, "numpy")
    for path in (own, strange):
        for named in (tmp_path / "other", str(tmp_path / "other" / "tokenizer.json")):
            model = load(path, "numpy", tokenizer=named)
            assert model.tokenizer.inner.to_str() == padded().inner.to_str()
            assert model.tokenizer.limit == 257
            assert model.generate("ab", 3) is not None


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_folder_without_a_tokenizer_is_rejected(tmp_path, kind):
    path = tmp_path / "x.gguf"
    if kind == "directory":
        path = directory(tmp_path / "m", byte_tokenizer())
    else:
        gguf_file(path, **named_entries())
    (tmp_path / "empty").mkdir()
    for named in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="is no folder with a tokenizer.json, nor such"):
            load(path, "numpy", tokenizer=named)


def named_entries() -> dict[str, object]:
    written = tokenizer_metadata(byte_tokenizer(), tiny_config())
    head = "tokenizer.ggml."
    return {key.removeprefix(head): value for key, value in written.items() if head in key}


# --- none ---------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [{}, {"model": "none"}, {"model": "no_vocab"}])
def test_a_checkpoint_without_a_tokenizer_computes_with_ids(tmp_path, without, entries):
    stated = load(directory(tmp_path / "with", byte_tokenizer()), "numpy")
    file = load(gguf_file(tmp_path / "x.gguf", **entries), "numpy")
    for model in (without, file):
        np.testing.assert_array_equal(model.logits([1, 2, 3]), stated.logits([1, 2, 3]))
        ids = stated.generate([1, 2, 3], 5, ignore_eos=True)
        assert model.generate([1, 2, 3], 5, ignore_eos=True) == ids
        assert model.generate([1, 2, 3], 5, ignore_eos=True, drafter=model) == ids


def test_whatever_needs_text_says_that_there_is_no_tokenizer(without):
    for use in (
        lambda: without.generate("ab", 3),
        lambda: next(without.stream("ab", 3)),
        lambda: without.tokenizer.encode_batch(["a"]),
        lambda: without.tokenizer.decode([1]),
        lambda: without.tokenizer.vocab_size,
    ):
        with pytest.raises(InputError, match=NO_TEXT):
            use()


def test_the_engine_serves_ids_without_text(without):
    streamed = []
    engine = Engine(without, num_blocks=16, block_size=4)
    engine.submit(Request([1, 2, 3], 5, ignore_eos=True), streamed.append)
    (output,) = engine.run().values()
    assert output.tokens == without.generate([1, 2, 3], 5, ignore_eos=True)
    assert (output.text, streamed[-1].text) == ("", "")


def test_models_without_tokenizers_are_compared_by_their_size(without):
    check_vocabulary(without, without)
    other = Model(tiny_config(vocab_size=258), without.weights, without.tokenizer)
    with pytest.raises(InputError, match="a vocabulary of 258 tokens"):
        check_vocabulary(without, other)
