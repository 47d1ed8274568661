"""Tokenizers as GGUF metadata: what is written, and what is rebuilt from it alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refllm.checkpoints.gguf_tokenizer import TOKENIZER_JSON, tokenizer_from_metadata
from refllm.checkpoints.gguf_tokenizer_writer import tokenizer_metadata
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.tokenizer import Tokenizer
from tiny_models import byte_tokenizer, tiny_config

BYTES = [f"<0x{i:02X}>" for i in range(256)]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's llama_token_type


def sentencepiece(scores: dict[str, float], **entries: Any) -> dict[str, Any]:
    """The entries of a tokenizer of single characters and these pieces, without a prefix."""
    singles = dict.fromkeys(sorted(set("".join(scores))), -1e6)
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *(singles | scores)]
    values = [0.0] * (len(tokens) - len(singles | scores)) + list((singles | scores).values())
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    types += [NORMAL] * (len(tokens) - len(types))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(values, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
        "tokenizer.ggml.add_space_prefix": False,
    } | entries


def spelled(tokenizer: Tokenizer, text: str, **how: bool) -> list[str]:
    """The tokens of a text by their spelling."""
    return [tokenizer.inner.id_to_token(i) for i in tokenizer.encode(text, **how)]


# --- SentencePiece's scores ---------------------------------------------------------------


@pytest.mark.theorem(
    "SentencePiece merges the pair whose union has the highest score first",
    source="Kudo & Richardson 2018; llama.cpp's llm_tokenizer_spm",
)
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"ab": 0.0, "bc": -1.0}, ["ab", "c"]),
        ({"ab": -1.0, "bc": 0.0}, ["a", "bc"]),
        ({"bc": 0.0, "ab": -1.0}, ["a", "bc"]),  # the order of ids does not matter
        ({"bc": 0.0, "ab": 0.0}, ["a", "bc"]),  # equal scores: the smaller id (not llama.cpp's)
        ({"ab": 0.0, "bc": 0.0}, ["ab", "c"]),
        ({"ab": 0.0, "abc": -1.0}, ["abc"]),
        ({"bc": -1.0, "ab": -2.0, "abc": 5.0}, ["abc"]),
        ({"abc": 0.0}, ["a", "b", "c"]),  # no two tokens whose union it is
    ],
)
def test_the_highest_score_is_merged_first(scores, expected):
    tokenizer = tokenizer_from_metadata(sentencepiece(scores), "x")
    assert spelled(tokenizer, "abc") == expected
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"


def without_json(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key != TOKENIZER_JSON}


def test_a_space_before_the_first_word_is_added_and_taken_away_again():
    scores = {"▁a": 0.0, "a": -9.0, "▁": -9.0}
    for entries, expected in (
        ({"tokenizer.ggml.add_space_prefix": True}, ["▁a", "▁a"]),
        ({"tokenizer.ggml.add_space_prefix": False}, ["a", "▁a"]),
    ):
        tokenizer = tokenizer_from_metadata(sentencepiece(scores, **entries), "x")
        assert spelled(tokenizer, "a a") == expected
        assert tokenizer.decode(tokenizer.encode("a a")) == "a a"
    missing = sentencepiece(scores)
    del missing["tokenizer.ggml.add_space_prefix"]  # SentencePiece's own default is to add it
    assert spelled(tokenizer_from_metadata(missing, "x"), "a") == ["▁a"]


def test_what_no_token_spells_falls_back_to_bytes():
    tokenizer = tokenizer_from_metadata(sentencepiece({"ab": 0.0}), "x")
    assert spelled(tokenizer, "é") == ["<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abé😀")) == "abé😀"


def test_the_unknown_token_is_the_one_that_is_named():
    entries = sentencepiece({"ab": 0.0})
    tokens = [token for token in entries["tokenizer.ggml.tokens"] if token not in BYTES]
    keep = len(tokens)
    short = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": entries["tokenizer.ggml.scores"][-keep:],
        "tokenizer.ggml.token_type": np.ones(keep, dtype=np.int32),
    }
    assert spelled(tokenizer_from_metadata(entries | short, "x"), "éa") == ["<unk>", "a"]
    other = {"tokenizer.ggml.unknown_token_id": np.uint32(2)}
    assert spelled(tokenizer_from_metadata(entries | short | other, "x"), "éa") == ["</s>", "a"]


@pytest.mark.parametrize("scores", [None, [0.0], np.zeros(3, "float32"), np.zeros((262, 1))])
def test_scores_of_another_length_are_rejected(scores):
    entries = sentencepiece({"ab": 0.0}) | {"tokenizer.ggml.scores": scores}
    with pytest.raises(CheckpointError, match="has not one score for each token"):
        tokenizer_from_metadata(entries, "x")


# --- types of tokens ----------------------------------------------------------------------


def test_no_merge_makes_a_control_token():
    """ "<" and "s>" are tokens, but a user's "<s>" does not begin a text."""
    entries = sentencepiece({"s>": 0.0, "<s": -1.0, "<u>": 0.0, "u>": 0.0})
    tokenizer = tokenizer_from_metadata(entries, "x")
    assert spelled(tokenizer, "<s>") == ["<", "s>"]
    assert spelled(tokenizer, "<u>") == ["<u>"]
    assert spelled(tokenizer, "<s>", parse_special=True) == ["<s>"]


def test_control_and_user_defined_tokens_are_parsed_as_their_types_say():
    entries = sentencepiece({"ab": 0.0, "<u>": -1.0, "<c>": -1.0, "<x>": -1.0})
    types = entries["tokenizer.ggml.token_type"]
    types[-3:] = (USER_DEFINED, CONTROL, UNUSED)
    tokenizer = tokenizer_from_metadata(entries, "x")
    text = "a<u>b<c>a<x>"
    # a user's text never becomes a control token; a user-defined one is always found
    assert spelled(tokenizer, text)[:3] == ["a", "<u>", "b"]
    assert "<c>" not in spelled(tokenizer, text)
    parsed = spelled(tokenizer, text, parse_special=True)
    assert parsed[:5] == ["a", "<u>", "b", "<c>", "a"]
    assert "<x>" not in parsed
    special = {token.content for token in tokenizer.inner.get_added_tokens_decoder().values()
               if token.special}  # fmt: skip
    assert special == {"<unk>", "<s>", "</s>", "<c>"}


@pytest.mark.parametrize("more", [-3, -1, 1, 5])
def test_types_for_fewer_or_more_tokens_than_there_are_are_rejected(more):
    entries = sentencepiece({"ab": 0.0})
    types = entries["tokenizer.ggml.token_type"]
    count = len(types) + more
    with pytest.raises(CheckpointError, match=f"has {count} entries for {len(types)} tokens"):
        tokenizer_from_metadata(
            entries | {"tokenizer.ggml.token_type": np.resize(types, count)}, "x"
        )


def test_tokens_without_types_are_normal():
    entries = sentencepiece({"ab": 0.0})
    del entries["tokenizer.ggml.token_type"]
    tokenizer = tokenizer_from_metadata(entries, "x")
    assert spelled(tokenizer, "ab") == ["ab"]


# --- the beginning of a text --------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "first"),
    [
        ({}, [1]),  # SentencePiece's default
        ({"tokenizer.ggml.bos_token_id": np.uint32(1)}, [1]),  # Llama's files need not say it
        ({"tokenizer.ggml.bos_token_id": np.uint32(0)}, [0]),
        (
            {"tokenizer.ggml.bos_token_id": np.uint32(1), "tokenizer.ggml.add_bos_token": False},
            [],
        ),
        ({"tokenizer.ggml.add_bos_token": True}, [1]),
    ],
)
def test_the_beginning_token_of_a_llama(entries, first):
    tokenizer = tokenizer_from_metadata(sentencepiece({"ab": 0.0}, **entries), "x")
    assert tokenizer.encode("ab", special=True) == [*first, *tokenizer.encode("ab")]
    assert tokenizer.encode("ab") == [tokenizer.inner.token_to_id("ab")]


@pytest.mark.parametrize(("added", "first"), [(None, []), (False, []), (True, [0])])
def test_the_beginning_token_of_a_byte_level_vocabulary(added, first):
    entries = without_json(tokenizer_metadata(byte_tokenizer(), tiny_config()))
    assert entries["tokenizer.ggml.add_bos_token"] is True  # our template adds it
    entries["tokenizer.ggml.add_bos_token"] = added
    known = {key: value for key, value in entries.items() if value is not None}
    tokenizer = tokenizer_from_metadata(known, "x")
    assert tokenizer.encode("a", special=True) == [*first, *byte_tokenizer().encode("a")]


def test_the_files_own_json_wins_over_its_other_entries():
    written = tokenizer_metadata(byte_tokenizer(), tiny_config())
    spoiled = written | {"tokenizer.ggml.tokens": ["a", "a"]}
    assert tokenizer_from_metadata(spoiled, "x").inner.to_str() == byte_tokenizer().inner.to_str()
    with pytest.raises(CheckpointError, match="holds the token 'a' twice, as ids 0 and 1"):
        tokenizer_from_metadata(spoiled | {TOKENIZER_JSON: np.uint32(1)}, "x")
