"""The tokenizer: round trips, the end token, and what the library does with its literal
text.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle
from refllm.checkpoints.tokenizer import END_OF_TEXT, Tokenizer

TEXTS = [
    "def heappush(heap, item):\n    return heap\n" * 3,
    "for i in range(10):\n\tprint(i, 'é', '→')\r\n" * 3,
]
tokenizer = Tokenizer.train(TEXTS, 300)
# Text of every kind: any Unicode, what the tokenizer has merges for, and special tokens'
# literal text.
texts = st.lists(
    st.one_of(
        st.text(), st.sampled_from([*TEXTS, END_OF_TEXT, "<|", "|>", "\x00", "e\u0301", " \t\n"])
    )
)
texts = texts.map("".join)


@given(text=texts)
def test_round_trip_of_any_text(text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 < i < tokenizer.vocab_size for i in ids)
    assert len(ids) <= len(text.encode())  # a token holds one byte or more


@given(text=texts)
def test_round_trip_also_where_special_tokens_are_read(text):
    ids = tokenizer.encode(text, parse_special=True)
    assert tokenizer.decode(ids) == text
    assert ids.count(0) == text.count(END_OF_TEXT)


@given(batch=st.lists(texts, max_size=5))
def test_a_batch_is_encoded_as_its_texts_one_by_one(batch):
    assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]


@given(text=texts)
def test_the_template_of_a_trained_tokenizer_puts_the_end_token_first_and_nothing_else(text):
    assert tokenizer.encode(text, special=True) == [0, *tokenizer.encode(text)]


def test_literal_text_of_the_end_token_never_becomes_the_end_token():
    for text in (END_OF_TEXT, f"a{END_OF_TEXT}b", f"{END_OF_TEXT} " * 3):
        assert 0 not in tokenizer.encode(text)
        assert 0 not in tokenizer.encode_batch([text])[0]
        assert tokenizer.encode(text, special=True).count(0) == 1  # the template's own
    assert tokenizer.encode(END_OF_TEXT, parse_special=True) == [0]
    assert 0 not in tokenizer.encode(END_OF_TEXT)  # using one has not changed the other


def test_the_library_by_default_turns_literal_text_into_the_end_token():
    """Why the wrapper sets a flag. If this fails, the library has changed its default."""
    plain = type(tokenizer.inner).from_str(tokenizer.inner.to_str())
    assert plain.encode(END_OF_TEXT, add_special_tokens=False).ids == [0]


def test_the_vocabulary_has_the_size_asked_for_and_begins_with_the_end_token():
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode([0]) == END_OF_TEXT
    singles = {tokenizer.inner.id_to_token(i) for i in range(1, 257)}
    assert len(singles) == 256  # every byte has a token of its own
    assert all(len(token) == 1 for token in singles)


def test_added_tokens_beyond_the_vocabulary_count():
    """A model needs a row of its embedding for each of them."""
    inner = type(tokenizer.inner).from_str(tokenizer.inner.to_str())
    inner.add_tokens(["<|user|>", "→→"])
    more = Tokenizer(inner)
    assert more.vocab_size == 302
    assert more.decode([301]) == "→→"
    assert more.encode("→→") == [301]  # an added token of several bytes


def test_too_little_text_gives_a_smaller_vocabulary():
    assert Tokenizer.train(["ab"], 300).vocab_size < 300


def test_a_vocabulary_too_small_for_the_bytes_is_rejected():
    with pytest.raises(ValueError, match="at least 257 tokens, got 256"):
        Tokenizer.train(TEXTS, 256)


def test_a_vocabulary_beyond_all_memory_is_rejected():
    """The library would end the process."""
    with pytest.raises(ValueError, match="at most 2"):
        Tokenizer.train(TEXTS, 10**12)


def test_the_same_texts_train_the_same_tokenizer():
    assert Tokenizer.train(TEXTS, 300).inner.to_str() == tokenizer.inner.to_str()


def test_merges_shorten_the_text_they_were_learned_from():
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2


def test_bytes_that_form_no_character_are_shown_as_replacement():
    ids = tokenizer.encode("→")
    assert tokenizer.decode(ids) == "→"
    assert "\ufffd" in tokenizer.decode(ids[:-1])


@pytest.mark.parametrize("text", ["ab\ud800", "ab\udcff", b"ab", None, 5])  # noqa: PT014 (two surrogates)
def test_text_that_is_not_unicode_is_rejected(text):
    """Bytes that are not UTF-8 come from a command line as halves of characters."""
    message = (
        "character 2 of the text is no Unicode"
        if isinstance(text, str)
        else "only a str can be encoded"
    )
    for parse_special in (False, True):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(text, parse_special=parse_special)
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_batch(["fine", text])


def test_an_unknown_id_gives_no_text():
    assert tokenizer.decode([*tokenizer.encode("ab"), 10**6]) == "ab"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("ids", [[-1], [2**32], [2**70], (2**32 - 1, 2**32)])
def test_an_id_that_no_vocabulary_can_hold_is_rejected(ids):
    with pytest.raises(ValueError, match="a token id lies within"):
        tokenizer.decode(ids)


@pytest.mark.parametrize("ids", [[65.7], ["65"], [None]])
def test_an_id_is_an_integer(ids):
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        tokenizer.decode(ids)


def test_round_trip_through_the_file(tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.inner.to_str() == tokenizer.inner.to_str()
    assert 0 not in again.encode(END_OF_TEXT)  # the flag is not in the file: loading sets it again


def test_a_file_that_truncates_and_pads_does_neither(tmp_path):
    """Published files carry such settings from training; a text must not lose its end
    silently.
    """
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    raw["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END_OF_TEXT,
    }
    path.write_text(json.dumps(raw), encoding="utf-8")
    assert Tokenizer.from_file(path).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert Tokenizer.from_file(path).encode(TEXTS[0], parse_special=True) == tokenizer.encode(
        TEXTS[0]
    )


def test_a_missing_file_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"', "not json", "[]"])
def test_a_broken_file_is_rejected(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"is not a valid tokenizer\.json"):
        Tokenizer.from_file(path)


@pytest.mark.oracle
@given(text=texts)
def test_oracle_transformers_reads_the_file_as_we_do(text, theirs):
    """Its default is our ``parse_special``; its ``split_special_tokens`` is our default."""
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(
        text, parse_special=True
    )
    plain = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert plain == tokenizer.encode(text)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    path = tmp_path_factory.mktemp("theirs") / "tokenizer.json"
    tokenizer.save(path)
    return oracle("transformers").PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token=END_OF_TEXT
    )
