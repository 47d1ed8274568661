"""Words by llama.cpp's names: the same token ids as llama.cpp, recorded by
``golden/make_gguf_tokenizers.py`` and, where it is installed, asked again.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from conftest import oracle
from gguf_vocabularies import (
    SMOLLM2_CONTROL,
    byte_level,
    case_metadata,
    cases,
    llama_cpp_tokenizer,
    sentencepiece,
)
from nasty_texts import CONTROL_TOKENS, nasty_texts
from refllm.checkpoints.gguf import GGUFTensors, open_file
from refllm.checkpoints.gguf_pre_tokenizers import NAMES, RULES, split
from refllm.checkpoints.gguf_tokenizer import tokenizer_from_metadata
from refllm.checkpoints.sources import locate
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.model.config import ModelConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf_tokenizers.npz"
SMOLLM2 = GOLDEN.with_name("gguf_smollm2.npz")
NO_NAME = ""
PIECES = ("sentencepiece True", "sentencepiece False")
# one name for each meaning: the record says which names llama.cpp treats alike
REPRESENTATIVES = [*{meaning: name for name, meaning in reversed(NAMES.items())}.values()]


@cache
def recorded(path: Path = GOLDEN) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(arrays["about"].tobytes()), arrays


def recorded_ids(group: str) -> list[list[int]]:
    """The ids of each case, one list after the other."""
    _, arrays = recorded()
    return parts(arrays[f"{group}/ids"], arrays[f"{group}/lengths"])


def parts(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    ends = np.cumsum(lengths.astype(np.int64))
    return [part.tolist() for part in np.split(ids, ends[:-1])]


def rebuilt(name: str) -> Tokenizer:
    """The tokenizer of the recorded vocabulary with the words of ``name``."""
    about, _ = recorded()
    if name in PIECES:
        metadata = case_metadata(about["pieces"])
        metadata["tokenizer.ggml.add_space_prefix"] = name.endswith("True")
    else:
        metadata = case_metadata(about["bytes"]) | {"tokenizer.ggml.pre": name}
    return tokenizer_from_metadata(metadata, "x.gguf")


def differences(name: str, expected: list[list[int]]) -> list[tuple[str, bool]]:
    about, _ = recorded()
    tokenizer = rebuilt(name)
    asked = cases(about["texts"], about["special"])
    assert len(asked) == len(expected) > 700
    return [
        (text, parse)
        for (text, parse), ids in zip(asked, expected, strict=True)
        if tokenizer.encode(text, special=True, parse_special=parse) != ids
    ]


@pytest.mark.theorem(
    "A GGUF tokenizer gives llama.cpp's token ids, under every name of a pre-tokenizer",
    source="llama.cpp, src/llama-vocab.cpp and src/unicode.cpp",
)
@pytest.mark.parametrize("name", [*REPRESENTATIVES, *PIECES])
def test_ids_are_those_that_llama_cpp_gave(name):
    about, _ = recorded()
    assert differences(name, recorded_ids(about["names"][name])) == []


def test_names_with_one_meaning_have_one_record_and_others_differ():
    """Else the recorded texts could not tell two rules apart."""
    about, _ = recorded()
    meanings = {name: NAMES[name or "default"] for name in (NO_NAME, *NAMES)}
    for a, b in combinations(meanings, 2):
        same = about["names"][a] == about["names"][b]
        assert same is (meanings[a] == meanings[b]), (a, b)
    assert {p.rule for p in NAMES.values()} == RULES.keys()


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", [*REPRESENTATIVES, *PIECES])
def test_llama_cpp_gives_these_ids_for_other_texts(name, tmp_path):
    llama_cpp = oracle("llama_cpp", "pip install llama-cpp-python")
    metadata = sentencepiece() if name in PIECES else byte_level()
    if name in PIECES:
        metadata = metadata | {"tokenizer.ggml.add_space_prefix": name.endswith("True")}
    else:
        metadata = metadata | {"tokenizer.ggml.pre": name}
    tokenizer = tokenizer_from_metadata(metadata, "x.gguf")
    texts = nasty_texts(500, seed=23)
    with llama_cpp_tokenizer(llama_cpp, metadata, tmp_path / "x.gguf") as model:
        for text, parse in cases(texts, CONTROL_TOKENS):
            ids = model.tokenize(text.encode(), add_bos=True, special=parse)
            assert tokenizer.encode(text, special=True, parse_special=parse) == ids, text


# --- SmolLM2 -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> tuple[ModelConfig, Tokenizer]:
    path = locate("smollm2")
    with open_file(path) as file:
        config = GGUFTensors(file, None, None).config
        return config, tokenizer_from_metadata(file.metadata, str(path))


@pytest.mark.real
def test_smollm2_reads_texts_and_ends_as_llama_cpp_does(smollm2):
    about, arrays = recorded(SMOLLM2)
    config, tokenizer = smollm2
    assert sorted(config.eos_token_ids) == about["ends"] == [0, 2, 4]
    assert (config.bos_token_id, config.eos_token_ids[0]) == (1, 2)
    asked = cases(about["texts"], SMOLLM2_CONTROL)
    expected = parts(arrays["ids"], arrays["lengths"])
    assert len(asked) > 700
    for (text, parse), ids in zip(asked, expected, strict=True):
        assert tokenizer.encode(text, special=True, parse_special=parse) == ids, text


@pytest.mark.real
@pytest.mark.llamacpp
def test_smollm2_reads_other_texts_as_llama_cpp_does(smollm2):
    llama_cpp = oracle("llama_cpp", "pip install llama-cpp-python")
    _, tokenizer = smollm2
    model = llama_cpp.Llama(str(locate("smollm2")), vocab_only=True, verbose=False)
    texts = [*nasty_texts(500, seed=31, more=SMOLLM2_CONTROL), *topics.topics.values()]
    for text, parse in cases(texts, SMOLLM2_CONTROL):
        ids = model.tokenize(text.encode(), add_bos=True, special=parse)
        assert tokenizer.encode(text, special=True, parse_special=parse) == ids, text[:80]
    model.close()


# --- single points ------------------------------------------------------------------------


def metadata(**entries: Any) -> dict[str, Any]:
    """The bytes, ``he``, ``ll``, ``hell``; then two words that no merge makes."""
    about, _ = recorded()
    letters = [token for token in about["bytes"]["tokens"] if len(token) == 1]
    tokens = ["<bos>", *letters, "he", "ll", "hell", "Ġworld", "hello"]
    known = {"model": "gpt2", "tokens": tokens, "merges": ["h e", "l l", "he ll"]}
    return case_metadata(known | {"bos_token_id": 0} | entries)


def spelled(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.inner.id_to_token(i) for i in tokenizer.encode(text, special=True)]


def test_a_word_that_is_a_token_is_taken_before_any_merge_where_the_name_says_so():
    merged = ["hell", "o", "Ġ", "w", "o", "r", "l", "d"]
    for name in ("llama-bpe", "tekken"):
        tokenizer = tokenizer_from_metadata(metadata(pre=name), "x")
        assert spelled(tokenizer, "hello world") == ["<bos>", "hello", "Ġworld"]
    for name in ("smaug-bpe", "qwen2", "smollm"):
        assert spelled(tokenizer_from_metadata(metadata(pre=name), "x"), "hello world") == merged


def test_no_name_is_the_default():
    for entries in ({}, {"pre": ""}, {"pre": "default"}):
        tokenizer = tokenizer_from_metadata(metadata(**entries), "x")
        assert spelled(tokenizer, "hello") == ["hell", "o"]
        words = [word for word, _ in tokenizer.inner.pre_tokenizer.pre_tokenize_str("a+1234567")]
        assert words == ["a", "+", "123", "456", "7"]


@pytest.mark.parametrize("name", ["kimi-k2", "bert", "SmolLM", 7])
def test_an_unknown_name_is_rejected_with_its_name_and_the_way_out(name):
    entries = metadata() | {"tokenizer.ggml.pre": name}
    why = rf"x.gguf: tokenizer.ggml.pre is {name!r}, .* \(--tokenizer DIR\)"
    with pytest.raises(CheckpointError, match=why):
        tokenizer_from_metadata(entries, "x.gguf")


def test_a_byte_without_a_token_is_lost_and_still_parts_its_neighbours():
    """ "!" and "!" do not become "!!" over the byte between them, as in llama.cpp."""
    entries = metadata()
    tokens = [t for t in entries["tokenizer.ggml.tokens"] if t != "Ć"] + ["!!"]
    entries |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [*entries["tokenizer.ggml.merges"], "! !"],
    }
    tokenizer = tokenizer_from_metadata(entries, "x")
    assert spelled(tokenizer, "!!") == ["!!"]
    assert spelled(tokenizer, "!\x06!") == ["!", "!"]


@pytest.mark.parametrize(
    ("merges", "why"),
    [
        (["h e", "he x"], "has 'he x', but the vocabulary has no token 'hex'"),
        (["h e", "hx e"], "has 'hx e', but the vocabulary has no token 'hx'"),
        (["he"], "has 'he', but the vocabulary has no token ''"),
        ("h e", "is missing, or no list of strings"),
        ([1], "is missing, or no list of strings"),
        (None, "is missing, or no list of strings"),
    ],
)
def test_merges_that_the_vocabulary_cannot_hold_are_rejected(merges, why):
    entries = metadata() | {"tokenizer.ggml.merges": merges}
    with pytest.raises(CheckpointError, match=f"x.gguf: tokenizer.ggml.merges {why}"):
        tokenizer_from_metadata(entries, "x.gguf")


def test_of_a_merge_that_stands_twice_the_first_has_the_rank():
    merges = ["l l", "e l", "l l"]
    entries = metadata()
    entries["tokenizer.ggml.tokens"].append("el")
    for order in (merges, merges[:-1]):
        entries["tokenizer.ggml.merges"] = order
        assert spelled(tokenizer_from_metadata(entries, "x"), "hello") == ["h", "e", "ll", "o"]
    entries["tokenizer.ggml.merges"] = merges[1:]
    assert spelled(tokenizer_from_metadata(entries, "x"), "hello") == ["h", "el", "l", "o"]


@pytest.mark.parametrize("later", ["\U00013460", "\ua7cb", "\U000116d0", "\U0001e5f1"])
@pytest.mark.parametrize("rule", ["gpt-2", "llama-bpe", "qwen2", "tekken", "smollm", "default"])
def test_letters_and_digits_of_unicode_16_are_none(rule, later):
    """The library's tables are newer than llama.cpp's."""
    words = pre_tokenizers.Sequence(split(RULES[rule]))
    found = [word for word, _ in words.pre_tokenize_str(f"a{later}.")]
    assert found == ["a", f"{later}."] or (rule == "default" and found == ["a", later, "."])
