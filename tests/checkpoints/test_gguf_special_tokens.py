"""Special tokens of a GGUF file: what llama.cpp finds by key, by spelling and by default,
recorded by ``golden/make_gguf_tokenizers.py``; and every entry that makes no sense.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import oracle
from gguf_vocabularies import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    case_metadata,
    llama_cpp_tokenizer,
    special_token_cases,
)
from refllm.checkpoints.gguf_special_tokens import begin_and_ends, special_tokens
from refllm.checkpoints.tensor_files import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf_special_tokens.json"
FALCON = 11  # what llama.cpp takes for BOS and EOS of a "gpt2" file without the keys


@cache
def recorded() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
    return found


@pytest.mark.theorem(
    "The tokens that end a generation are those of llama.cpp, by key and by spelling; of a file "
    "without an EOS key, token 11 alone is not",
    source="llama.cpp, src/llama-vocab.cpp",
)
def test_ends_are_those_that_llama_cpp_found():
    for one in recorded():
        ours = special_tokens(case_metadata(one["case"]), "x")
        theirs = set(one["ends"])
        if one["case"]["model"] == "gpt2" and "eos_token_id" not in one["case"]:
            theirs -= {FALCON} - set(ours.ends)
        assert set(ours.ends) == theirs, one["case"]
        assert len(set(ours.ends)) == len(ours.ends)


def test_what_begins_and_ends_a_text_is_what_llama_cpp_adds():
    kinds = set()
    for one in recorded():
        ours = special_tokens(case_metadata(one["case"]), "x")
        assert (ours.add_bos, ours.add_eos) == (one["add_bos"], one["add_eos"])
        if ours.add_bos or one["case"]["model"] == "llama":
            assert ours.bos == one["bos"]
        if ours.add_eos or one["case"]["model"] == "llama":
            assert ours.eos == one["eos"]
        kinds.add((one["case"]["model"], ours.add_bos, "bos_token_id" in one["case"]))
    assert len(kinds) == 8  # every kind of file was among them


def test_a_token_that_is_recognised_is_a_control_token():
    for one in recorded():
        ours = special_tokens(case_metadata(one["case"]), "x")
        control = {i for i, kind in enumerate(ours.types) if kind == CONTROL}
        assert control == set(one["control"]), one["case"]
        # llama.cpp adds the attribute of a control token to that of a user-defined one
        user = {i for i, kind in enumerate(ours.types) if kind == USER_DEFINED}
        assert user == set(one["user defined"]) - control


@pytest.mark.llamacpp
def test_llama_cpp_finds_the_same_in_other_vocabularies(tmp_path):
    llama_cpp = oracle("llama_cpp", "pip install llama-cpp-python")
    for case in special_token_cases(60, seed=4):
        metadata = case_metadata(case)
        with llama_cpp_tokenizer(llama_cpp, metadata, tmp_path / "x.gguf") as model:
            vocab = model._model.vocab
            size = len(case["tokens"])
            ends = {i for i in range(size) if llama_cpp.llama_vocab_is_eog(vocab, i)}
            begins = llama_cpp.llama_vocab_get_add_bos(vocab)
        ours = special_tokens(metadata, "x")
        assert ours.add_bos == begins
        if case["model"] == "llama" or "eos_token_id" in case:
            assert set(ours.ends) == ends


# --- single points ------------------------------------------------------------------------

TOKENS = [*"abcdefghijklm", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>"]
IDS = {token: i for i, token in enumerate(TOKENS)}


def entries(**more: Any) -> dict[str, Any]:
    known = {"model": "gpt2", "tokens": TOKENS, "merges": []}
    return case_metadata(known | more)


def test_the_id_of_a_key_comes_first_and_the_others_in_order():
    """A writer that has room for one end token writes that one."""
    spelled = (IDS["<|im_end|>"], IDS["<|endoftext|>"], IDS["<|eot_id|>"])
    assert special_tokens(entries(), "x").ends == spelled
    assert special_tokens(entries(eos_token_id=16), "x").ends == (16, 14, 15)
    assert special_tokens(entries(eos_token_id=3), "x").ends == (3, *spelled)
    assert special_tokens(entries(eot_token_id=3), "x").ends == (3, *spelled)
    keys = {"eos_token_id": 5, "eot_token_id": 4, "eom_token_id": 3}
    assert special_tokens(entries(**keys), "x").ends == (5, 3, 4, *spelled)


def test_smollm2s_end_tokens_are_three_where_its_key_names_one():
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "a"]
    found = special_tokens(entries(tokens=tokens, eos_token_id=2, pre="smollm"), "x")
    assert sorted(found.ends) == [0, 2, 4]
    assert found.ends[0] == 2


def test_defaults_of_falcon_are_used_only_where_a_text_needs_them():
    plain = special_tokens(entries(), "x")
    assert (plain.bos, plain.eos) == (None, None)
    added = special_tokens(entries(pre="llama-bpe", add_eos_token=True), "x")
    assert (added.bos, added.eos) == (FALCON, FALCON)
    assert FALCON not in added.ends


def test_without_a_vocabulary_the_keys_alone_count():
    keys = {
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eot_token_id": np.uint32(9),
    }
    assert begin_and_ends(keys, "x") == (1, (9,))
    assert begin_and_ends({}, "x") == (None, ())


def test_sentencepiece_without_keys_begins_with_1_and_ends_with_2():
    tokens = ["<unk>", "<s>", "</s>", "a"]
    found = entries(model="llama", tokens=tokens, scores=[0.0] * 4)
    assert begin_and_ends(found, "x") == (1, (2,))


def test_a_finer_end_takes_the_place_of_end():
    harmony = ["<|return|>", "<|call|>", "<|end|>", "a"]
    found = special_tokens(entries(tokens=harmony), "x")
    assert found.ends == (0, 1)
    assert found.types == [CONTROL, CONTROL, USER_DEFINED, NORMAL]
    assert special_tokens(entries(tokens=harmony[1:]), "x").ends == (0, 1)


def test_two_empty_tokens_are_two_tokens():
    found = special_tokens(entries(tokens=["a", "", "", "<|im_end|>"]), "x")
    assert found.ends == (3,)


@pytest.mark.parametrize("key", ["bos", "eos", "eot", "eom", "unknown", "fim_pad", "fim_rep"])
def test_an_id_beyond_the_vocabulary_is_rejected(key):
    assert special_tokens(entries(**{f"{key}_token_id": 16}), "x")
    why = f"x.gguf: tokenizer.ggml.{key}_token_id is 17, beyond the vocabulary of 17 tokens"
    with pytest.raises(CheckpointError, match=re.escape(why)):
        special_tokens(entries(**{f"{key}_token_id": 17}), "x.gguf")


@pytest.mark.parametrize("value", [True, False, -1, 1.0, "1", [1], None])
def test_an_id_that_is_none_is_rejected(value):
    wrong = entries() | {"tokenizer.ggml.eos_token_id": value}
    why = f"x.gguf: the entry tokenizer.ggml.eos_token_id is {value!r}, not a token id"
    with pytest.raises(CheckpointError, match=re.escape(why)):
        special_tokens(wrong, "x.gguf")


@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("value", [1, "true", np.uint8(1), None])
def test_a_flag_that_is_neither_true_nor_false_is_rejected(key, value):
    wrong = entries() | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(
        CheckpointError, match=f"tokenizer.ggml.{key} is .*, neither true nor false"
    ):
        special_tokens(wrong, "x.gguf")


@pytest.mark.parametrize("types", [[1, 1], [1] * 18, [1] * 16])
def test_types_that_are_not_one_for_each_token_are_rejected(types):
    why = f"token_type has {len(types)} entries for 17 tokens"
    with pytest.raises(CheckpointError, match=why):
        special_tokens(entries(token_type=types), "x.gguf")


def test_types_of_another_kind_are_rejected():
    for types in ("x", np.zeros(17, dtype=np.float32), np.ones((17, 1), dtype=np.int32)):
        wrong = entries() | {"tokenizer.ggml.token_type": types}
        with pytest.raises(CheckpointError, match="token_type is no list of integers"):
            special_tokens(wrong, "x.gguf")


def test_a_token_that_is_added_and_does_not_exist_is_rejected():
    """llama.cpp ends the process there."""
    with pytest.raises(CheckpointError, match="texts get the BOS token, but there is none"):
        special_tokens(entries(tokens=["a"], pre="llama-bpe"), "x.gguf")
    with pytest.raises(CheckpointError, match="texts get the EOS token, but there is none"):
        special_tokens(entries(tokens=["a"], add_eos_token=True), "x.gguf")
