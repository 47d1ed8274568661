"""The bytes of tokens, for tokenizers of every kind, against the tokenizer's own decoding."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as RustTokenizer

from refllm import load
from refllm.checkpoints.tokenizer import END_OF_TEXT, MissingTokenizer, Tokenizer
from refllm.decode.grammar.vocabulary import (
    byte_alphabet,
    drops_first_space,
    end_tokens_of,
    token_bytes,
)
from refllm.errors import InputError

TEXT = "naïve café 你好 🙂 def f(x):\n    return 1\t\x00"
BYTE_LEVEL = Tokenizer.train([TEXT] * 3, vocab_size=300)
SENTENCEPIECE = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)


def of(vocabulary: list[str], decoder: object) -> Tokenizer:
    """A tokenizer that only decodes: token i is ``vocabulary[i]``."""
    places = {token: i for i, token in enumerate(vocabulary)}
    inner = RustTokenizer(models.BPE(vocab=places, merges=[]))
    inner.decoder = decoder
    return Tokenizer(inner)


@pytest.mark.theorem(
    "The bytes of the tokens of a text, joined, are the text's UTF-8 bytes",
    source="byte-level BPE (GPT-2)",
)
@given(st.text(max_size=20))
def test_token_bytes_join_to_the_text(text: str) -> None:
    for tokenizer in (BYTE_LEVEL, load("stdlib").tokenizer):
        bytes_of = token_bytes(tokenizer)
        found = [bytes_of[i] for i in tokenizer.encode(text)]
        assert b"".join(part for part in found if part is not None) == text.encode()


def test_the_byte_alphabet_is_the_librarys() -> None:
    from tokenizers import pre_tokenizers

    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))
    decoder = decoders.ByteLevel()
    for character, byte in byte_alphabet().items():
        assert decoder.decode([character]) == bytes([byte]).decode("utf-8", "replace")


@given(st.lists(st.integers(0, 260), min_size=1, max_size=6))
def test_byte_fallback_and_spaces_are_decoded_as_the_library_does(ids: list[int]) -> None:
    words = ["▁the", "▁", "cat", "é", "<0x4>"]
    tokenizer = of([f"<0x{byte:02X}>" for byte in range(256)] + words, SENTENCEPIECE)
    bytes_of = token_bytes(tokenizer)
    joined = b"".join(bytes_of[i] or b"" for i in ids)
    try:
        text = joined.decode()
    except UnicodeDecodeError:
        return  # the library replaces a whole run of bytes then
    assert tokenizer.decode(ids) == text.removeprefix(" ")
    assert drops_first_space(tokenizer)


def test_special_tokens_have_no_bytes_and_added_text_has_its_own() -> None:
    tokenizer = Tokenizer.train(["ab"], vocab_size=257)
    tokenizer.inner.add_tokens([AddedToken("  two é", special=False)])
    tokenizer.inner.add_special_tokens([AddedToken("<pad>", special=True)])
    bytes_of = token_bytes(tokenizer)
    assert bytes_of[0] is None
    assert bytes_of[257] == "  two é".encode() == tokenizer.decode([257]).encode()
    assert bytes_of[258] is None
    assert len(bytes_of) == 259


def test_the_vocabulary_is_that_of_the_models_embedding() -> None:
    tokenizer = Tokenizer.train(["ab"], vocab_size=257)
    tokenizer.limit = 300  # a padded vocabulary
    assert token_bytes(tokenizer)[257:] == [None] * 43
    assert None not in token_bytes(tokenizer)[1:257]
    tokenizer.limit = 10
    assert len(token_bytes(tokenizer)) == 10


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Replace("a", "b"), decoders.Fuse()]),
    ],
)
def test_decoders_that_join_tokens_are_rejected(decoder: object) -> None:
    with pytest.raises(InputError, match="bytes of each token"):
        token_bytes(of(["a"], decoder))


def test_without_a_tokenizer_there_are_no_bytes() -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        token_bytes(MissingTokenizer("somewhere"))


def test_metaspace_and_no_decoder() -> None:
    assert token_bytes(of(["▁a", "é"], decoders.Metaspace())) == [b" a", "é".encode()]
    assert token_bytes(of(["▁a", "é"], None)) == ["▁a".encode(), "é".encode()]
    assert drops_first_space(of(["a"], decoders.Metaspace()))
    assert not drops_first_space(of(["a"], decoders.Metaspace(prepend_scheme="never")))
    assert not drops_first_space(BYTE_LEVEL)


def test_end_tokens_are_the_models_or_those_with_a_usual_name() -> None:
    assert END_OF_TEXT == "<|endoftext|>"
    assert end_tokens_of(BYTE_LEVEL) == {0}
    model = load("stdlib")
    assert end_tokens_of(model.tokenizer) == set(model.config.eos_token_ids)
    tokenizer = Tokenizer.train(["ab"], vocab_size=257)
    tokenizer.end_tokens = frozenset([5])
    assert end_tokens_of(tokenizer) == {5}
