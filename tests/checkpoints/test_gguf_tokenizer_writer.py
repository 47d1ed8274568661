"""A tokenizer written as GGUF metadata: llama.cpp reads texts as the tokenizer does, or the
conversion is rejected, or a sentence says what is lost.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Inner
from tokenizers import pre_tokenizers as pt

from conftest import oracle
from gguf_vocabularies import byte_level, llama_cpp_tokenizer
from nasty_texts import FRAGMENTS, nasty_texts
from refllm.checkpoints.gguf_pre_tokenizers import NAMES, PUBLISHED, RULES, split
from refllm.checkpoints.gguf_tokenizer import TOKENIZER_JSON, tokenizer_from_metadata
from refllm.checkpoints.gguf_tokenizer_writer import tokenizer_metadata
from refllm.checkpoints.gguf_words import name_of_words
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.tokenizer import MissingTokenizer, Tokenizer
from tiny_models import byte_tokenizer, tiny_config

BYTES = [f"<0x{i:02X}>" for i in range(256)]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's llama_token_type
LEVEL = pt.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = RULES["llama-bpe"][0]
QWEN2 = RULES["qwen2"][0]


@cache
def merging(ignore_merges: bool = False) -> str:
    """A byte-level tokenizer without words, as JSON: its merges cross every boundary."""
    metadata = byte_level()
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    inner = Inner(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(tokens[:6])
    return inner.to_str()


def source(*steps: pt.PreTokenizer, ignore_merges: bool = False) -> Tokenizer:
    """That tokenizer with these steps before it merges."""
    inner = Inner.from_str(merging(ignore_merges))
    inner.pre_tokenizer = pt.Sequence(list(steps))
    return Tokenizer(inner)


def config_of(tokenizer: Tokenizer, **changes: Any) -> Any:
    ends = {"bos_token_id": None, "eos_token_ids": (1,)}
    return tiny_config(**({"vocab_size": tokenizer.vocab_size} | ends | changes))


def written(tokenizer: Tokenizer, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    """The entries, and the notes."""
    notes: list[str] = []
    return tokenizer_metadata(tokenizer, config_of(tokenizer, **changes), notes.append), notes


def without_json(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key != TOKENIZER_JSON}


def words(inner: Inner, text: str) -> list[str]:
    return [word for word, _ in inner.pre_tokenizer.pre_tokenize_str(text)]


def isolated(pattern: str) -> pt.PreTokenizer:
    return pt.Split(Regex(pattern), "isolated")


# --- words --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_words_of_every_rule_come_back_under_its_name(rule):
    names = {meaning.ignore_merges: name for name, meaning in reversed(NAMES.items())
             if meaning.rule == rule}  # fmt: skip
    for whole, name in names.items():
        tokenizer = source(*split(RULES[rule]), LEVEL, ignore_merges=whole)
        entries, notes = written(tokenizer)
        assert entries["tokenizer.ggml.pre"] == name
        assert not any("sample texts" in sentence for sentence in notes)
        rebuilt = tokenizer_from_metadata(without_json(entries), "x")
        for text in nasty_texts(100, seed=3):
            assert rebuilt.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("gpt-2", [pt.ByteLevel(add_prefix_space=False, use_regex=True)]),
        ("smollm", [pt.Digits(individual_digits=True),
                    pt.ByteLevel(add_prefix_space=False, use_regex=True)]),
        ("smaug-bpe", [isolated(PUBLISHED["llama-bpe"][0][0]), LEVEL]),
        ("qwen2", [isolated(PUBLISHED["qwen2"][0][0]), LEVEL]),
        ("qwen2", [pt.Split(Regex(QWEN2), "merged_with_previous"), LEVEL]),
        ("deepseek-coder", [isolated(r"[\r\n]"), isolated(r"\s?\p{L}+"), isolated(r"\s?\p{P}+"),
                            isolated("[一-龥ࠀ-一가-퟿]+"),
                            pt.Digits(individual_digits=True), LEVEL]),
    ],
)  # fmt: skip
def test_a_published_tokenizer_gets_its_name_however_it_is_described(name, steps):
    entries, _ = written(source(*steps))
    assert entries["tokenizer.ggml.pre"] == name


WRONG = {
    "digits before llama-bpe": [pt.Digits(individual_digits=True), isolated(LLAMA3), LEVEL],
    "punctuation before qwen2": [pt.Punctuation(), isolated(QWEN2), LEVEL],
    "a split that removes": [pt.Split(Regex(LLAMA3), "removed"), LEVEL],
    "a split that removes more": [pt.Split(" ", "removed"), isolated(LLAMA3), LEVEL],
    "an inverted split": [pt.Split(Regex(LLAMA3), "isolated", invert=True), pt.Whitespace(), LEVEL],
    "a split that joins": [pt.Split(Regex(QWEN2), "contiguous"), LEVEL],
    "digits before qwen2": [pt.Digits(individual_digits=True), isolated(QWEN2), LEVEL],
    "words split twice": [isolated(LLAMA3), pt.ByteLevel(add_prefix_space=False, use_regex=True)],
    "another use of the regex": [isolated(r"\p{N}{1,2}"), isolated(QWEN2), LEVEL],
    "a space before the text": [isolated(LLAMA3), pt.ByteLevel(True, use_regex=False)],
    "no words": [LEVEL],
    "no bytes": [pt.Whitespace()],
    "four digits": [isolated(LLAMA3.replace("{1,3}", "{1,4}")), LEVEL],
    "no contractions": [isolated(QWEN2.partition("|[^")[2].join(["[^", ""])), LEVEL],
}


@pytest.mark.theorem(
    "A tokenizer is converted to GGUF only where llama.cpp has a name for its words",
    source="llama.cpp, src/llama-vocab.cpp",
)
@pytest.mark.parametrize("name", WRONG)
def test_words_that_llama_cpp_has_no_name_for_are_rejected(name):
    """Each contains a known expression, or is close to one."""
    with pytest.raises(CheckpointError, match=r"llama\.cpp has no name for the way in which .* un"):
        written(source(*WRONG[name]))


def test_the_rejection_shows_a_text_its_words_and_the_nearest_name():
    """Llama 3's words but for one run of digits in a longer number."""
    tokenizer = source(isolated(LLAMA3.replace("{1,3}", "{1,4}")), LEVEL)
    why = "'2024' becomes '2024', and '202' '4' under the nearest name, 'llama-bpe'"
    with pytest.raises(CheckpointError, match=re.escape(why)):
        written(tokenizer)


def test_a_tokenizer_without_words_is_rejected():
    inner = Inner.from_str(merging())
    with pytest.raises(CheckpointError, match=r"llama\.cpp has no name"):
        written(Tokenizer(inner))


# characters that llama.cpp's Unicode knows: Python's is older
KNOWN = st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="ſ")
BEHAVIORS = ("isolated", "removed", "merged_with_previous", "contiguous")
steps = st.one_of(
    st.builds(pt.Digits, individual_digits=st.booleans()),
    st.builds(pt.Punctuation, behavior=st.sampled_from(("isolated", "contiguous"))),
    st.builds(
        lambda pattern, behavior: pt.Split(Regex(pattern), behavior),
        st.sampled_from([LLAMA3, QWEN2, RULES["gpt-2"][0], RULES["tekken"][0], r"\p{N}", r"\s+"]),
        st.sampled_from(BEHAVIORS),
    ),
    st.builds(pt.ByteLevel, add_prefix_space=st.just(False), use_regex=st.booleans()),
)
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(KNOWN, max_size=4))).map("".join)


@pytest.mark.theorem(
    "The rule of the name that is written gives the words of the source, for any text",
    source="comparison by what both do",
)
@settings(max_examples=40)
@given(drawn=st.lists(steps, min_size=1, max_size=3), level=st.booleans(), text=texts)
def test_a_written_name_gives_the_words_of_the_source(drawn, level, text):
    tokenizer = source(*drawn, *([LEVEL] if level else []))
    try:
        name = name_of_words(tokenizer.inner, json.loads(tokenizer.inner.to_str())["model"])
    except CheckpointError:
        return
    rebuilt = pt.Sequence([*split(RULES[NAMES[name].rule]), LEVEL])
    theirs = [word for word, _ in rebuilt.pre_tokenize_str(text)]
    assert theirs == words(tokenizer.inner, text)


def test_a_published_rule_that_llama_cpp_simplifies_is_converted_and_said():
    """llama.cpp knows the case of ASCII letters only."""
    tokenizer = source(isolated(PUBLISHED["tekken"][0][0]), LEVEL, ignore_merges=True)
    entries, notes = written(tokenizer)
    assert entries["tokenizer.ggml.pre"] == "tekken"
    (sentence,) = [note for note in notes if "sample texts" in note]
    assert re.fullmatch(
        r"llama.cpp reads \d+ of 600 sample texts in another way, such as '.*'", sentence
    )


# --- merges -------------------------------------------------------------------------------


def test_words_that_are_tokens_need_a_name_that_takes_them_whole():
    """The vocabulary has words that no merge makes."""
    entries, _ = written(source(isolated(LLAMA3), LEVEL, ignore_merges=True))
    assert entries["tokenizer.ggml.pre"] == "llama-bpe"
    entries, _ = written(source(isolated(LLAMA3), LEVEL))
    assert entries["tokenizer.ggml.pre"] == "smaug-bpe"
    with pytest.raises(CheckpointError, match=r"the word ' ?\w+' is a token that no merges make"):
        written(source(isolated(QWEN2), LEVEL, ignore_merges=True))


def test_where_merges_make_every_word_either_name_is_right():
    inner = Inner.from_str(byte_tokenizer(300).inner.to_str())
    data = json.loads(inner.to_str())
    data["model"]["ignore_merges"] = True
    inner = Inner.from_str(json.dumps(data))
    inner.pre_tokenizer = pt.Sequence([isolated(QWEN2), LEVEL])
    assert written(Tokenizer(inner))[0]["tokenizer.ggml.pre"] == "qwen2"


@pytest.mark.parametrize("part", ["dropout", "continuing_subword_prefix", "end_of_word_suffix"])
def test_merges_that_depend_on_more_are_rejected(part):
    data = json.loads(byte_tokenizer().inner.to_str())
    data["model"][part] = 0.5 if part == "dropout" else "##"
    with pytest.raises(CheckpointError, match=f"GGUF has no place for the tokenizer's {part}"):
        written(Tokenizer(Inner.from_str(json.dumps(data))))


def test_only_bpe_is_written():
    inner = Inner(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(CheckpointError, match="a WordLevel tokenizer cannot be written to GGUF"):
        written(Tokenizer(inner))


@pytest.mark.parametrize(
    "normalizer", [normalizers.Lowercase(), normalizers.NFKC(), normalizers.Strip()]
)
def test_a_tokenizer_that_changes_the_text_is_rejected(normalizer):
    inner = Inner.from_str(byte_tokenizer().inner.to_str())
    inner.normalizer = normalizer
    with pytest.raises(CheckpointError, match="changes a text before it splits it"):
        written(Tokenizer(inner))


def test_composed_characters_are_said():
    """Qwen's tokenizers compose characters, llama.cpp does not."""
    inner = Inner.from_str(byte_tokenizer().inner.to_str())
    inner.normalizer = normalizers.NFC()
    _, notes = written(Tokenizer(inner), eos_token_ids=(0,), bos_token_id=0)
    assert notes == ["llama.cpp does not compose characters (NFC) as the tokenizer does"]


# --- scores -------------------------------------------------------------------------------


def with_fallback(vocab: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """BPE with fallback bytes, as Llama 2 has it."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *vocab]
    inner = Inner(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(inner)


def test_of_two_merges_that_make_one_token_the_first_rank_is_its_score():
    merges = [("b", "c"), ("a", "bc"), ("a", "b"), ("ab", "c")]
    tokenizer = with_fallback(["a", "b", "c", "ab", "bc", "abc"], merges)
    entries, _ = written(tokenizer)
    tokens = entries["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, entries["tokenizer.ggml.scores"].tolist(), strict=True))
    assert [scores[token] for token in ("bc", "abc", "ab")] == [0.0, -1.0, -2.0]
    assert {scores[token] for token in ("a", "b", "c", "<unk>", "<0x41>")} == {-4.0}  # last
    rebuilt = tokenizer_from_metadata(without_json(entries), "x")
    for text in ("abc", "ab", "bc", "cab", "abbc", "aabc c"):
        assert rebuilt.encode(text) == tokenizer.encode(text)


def test_merges_that_no_scores_express_are_rejected():
    """A score belongs to a token, however it is made; here "abc" has one way in two."""
    merges = [("a", "b"), ("b", "c"), ("a", "bc")]
    tokenizer = with_fallback(["a", "b", "c", "ab", "bc", "abc"], merges)
    why = "GGUF has no merges for a tokenizer with byte fallback, only scores, and under them "
    inner = tokenizer.inner
    inner.add_tokens(["x"])
    spaced = with_fallback(["▁", "a", "▁▁", "▁a"], [("▁", "▁"), ("▁", "a")])
    spaced.inner.normalizer = None
    spaced.inner.pre_tokenizer = pt.Metaspace(prepend_scheme="never", split=True)
    with pytest.raises(CheckpointError, match=why):
        written(spaced)


def test_the_unknown_token_is_written():
    entries, _ = written(with_fallback(["a"], []), eos_token_ids=(2,), bos_token_id=1)
    assert entries["tokenizer.ggml.unknown_token_id"] == 0


# --- types --------------------------------------------------------------------------------


def test_the_type_of_every_token_is_written():
    tokenizer = with_fallback(["a", "b", "ab", "<0xZ>", "<user>"], [("a", "b")])
    tokenizer.inner.add_tokens([AddedToken("<user>", special=False)])
    entries, _ = written(tokenizer, vocab_size=267)
    types = entries["tokenizer.ggml.token_type"]
    assert types.dtype == np.int32
    found = dict(zip(entries["tokenizer.ggml.tokens"], types.tolist(), strict=True))
    assert {found[token] for token in BYTES} == {BYTE}
    assert [found[token] for token in ("<unk>", "<s>", "</s>")] == [UNKNOWN, CONTROL, CONTROL]
    # "<0xZ>" has one character less than a byte
    assert [found[token] for token in ("a", "ab", "<0xZ>")] == [NORMAL] * 3
    assert found["<user>"] == USER_DEFINED
    assert entries["tokenizer.ggml.tokens"][264:] == ["[PAD264]", "[PAD265]", "[PAD266]"]
    assert types[264:].tolist() == [UNUSED] * 3


def test_a_byte_level_vocabulary_has_no_bytes_of_the_other_kind():
    """ "<0x41>" is six plain characters there, and the unknown token a normal one."""
    inner = Inner(models.BPE(vocab={"<0x41>": 0, "a": 1}, merges=[], unk_token="a"))
    inner.pre_tokenizer = pt.ByteLevel(add_prefix_space=False)
    entries, _ = written(Tokenizer(inner), vocab_size=3)
    assert entries["tokenizer.ggml.token_type"].tolist() == [NORMAL, NORMAL, UNUSED]


def test_padding_has_a_spelling_of_its_own():
    inner = Inner.from_str(byte_tokenizer().inner.to_str())
    inner.add_special_tokens(["[PAD259]"])
    entries, _ = written(Tokenizer(inner), vocab_size=261)
    tokens = entries["tokenizer.ggml.tokens"]
    assert tokens[257:] == ["[PAD259]", "[PAD258]", "[[PAD259]]", "[PAD260]"]
    assert len(set(tokens)) == len(tokens)


def test_tokens_without_a_row_are_left_out_and_said():
    inner = Inner.from_str(byte_tokenizer().inner.to_str())
    inner.add_special_tokens(["<|pad|>"])
    entries, notes = written(Tokenizer(inner), vocab_size=257, eos_token_ids=(0,), bos_token_id=0)
    assert len(entries["tokenizer.ggml.tokens"]) == 257
    assert "tokens without a row in the embedding are left out: 257 ('<|pad|>')" in notes


def test_a_token_that_strips_spaces_is_said():
    inner = Inner.from_str(byte_tokenizer().inner.to_str())
    inner.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    _, notes = written(Tokenizer(inner), eos_token_ids=(0,), bos_token_id=0)
    assert notes == ["llama.cpp does not strip the spaces around '<mask>'"]


def test_no_tokenizer_is_no_vocabulary():
    assert tokenizer_metadata(MissingTokenizer("x"), tiny_config()) == {
        "tokenizer.ggml.model": "no_vocab"
    }


# --- the ends -----------------------------------------------------------------------------


def with_ends(*tokens: str, before: str = "", after: str = "") -> Tokenizer:
    """The bytes, then these control tokens, from id 257 on."""
    inner = Inner.from_str(byte_tokenizer().inner.to_str())
    inner.add_special_tokens(list(tokens))
    inner.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(),
        special_tokens=[(t, inner.token_to_id(t)) for t in {before, after} if t],
    )
    return Tokenizer(inner)


def named_ids(entries: dict[str, Any]) -> dict[str, int]:
    found = {}
    for key in ("bos", "eos", "eot", "eom"):
        if (value := entries.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            assert type(value) is np.uint32
            found[key] = int(value)
    return found


def ends_of(entries: dict[str, Any]) -> tuple[int, ...]:
    from refllm.checkpoints.gguf_special_tokens import special_tokens

    return special_tokens(entries, "x").ends


def test_several_end_tokens_are_spelled_or_have_keys():
    """Llama 3's three are recognised by their spelling; others need the keys."""
    llama3 = with_ends("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    entries, notes = written(llama3, eos_token_ids=(257, 258, 259, 0))
    assert named_ids(entries) == {"eos": 257}
    assert set(ends_of(entries)) == {257, 258, 259, 0}
    other = with_ends("<A>", "<B>", "<C>", "<D>")
    entries, notes = written(other, eos_token_ids=(259, 258, 260, 0))
    assert named_ids(entries) == {"eos": 259, "eot": 258, "eom": 260}
    assert set(ends_of(entries)) == {259, 258, 260, 0}
    assert notes == []


def test_end_tokens_beyond_the_keys_are_said():
    other = with_ends("<A>", "<B>", "<C>", "<D>", "<E>")
    entries, notes = written(other, eos_token_ids=(257, 258, 259, 260, 261, 0))
    assert named_ids(entries) == {"eos": 257, "eot": 258, "eom": 259}
    assert notes == ["GGUF has no place for the end tokens 260 ('<D>'), 261 ('<E>')"]


def test_end_tokens_that_llama_cpp_adds_are_said():
    _, notes = written(with_ends("<|im_end|>"), eos_token_ids=(257,))
    assert notes == ["llama.cpp will also end a generation at 0 ('<|endoftext|>')"]
    plain = json.loads(byte_tokenizer().inner.to_str().replace("<|endoftext|>", "<start>"))
    plain["post_processor"] = None
    _, notes = written(Tokenizer(Inner.from_str(json.dumps(plain))), eos_token_ids=())
    assert notes == ["the model has no end token; llama.cpp takes 11 ('+') for one"]


@pytest.mark.parametrize(
    ("before", "after", "bos", "eos", "expected", "flags"),
    [
        ("", "", 257, (258,), {"bos": 257, "eos": 258}, (False, False)),
        ("<A>", "", 257, (258,), {"bos": 257, "eos": 258}, (True, False)),
        ("<A>", "", None, (258,), {"bos": 257, "eos": 258}, (True, False)),
        ("<A>", "<B>", 257, (258,), {"bos": 257, "eos": 258}, (True, True)),
        ("", "<B>", 257, (257, 258), {"bos": 257, "eos": 258, "eot": 257}, (False, True)),
        ("<A>", "", 900, (901,), {"bos": 257}, (True, False)),  # beyond the vocabulary
    ],
)
def test_what_the_tokenizer_puts_around_a_text_is_written(before, after, bos, eos, expected, flags):
    tokenizer = with_ends("<A>", "<B>", before=before, after=after)
    entries, _ = written(tokenizer, bos_token_id=bos, eos_token_ids=eos)
    assert named_ids(entries) == expected
    keys = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
    assert tuple(entries[key] for key in keys) == flags
    rebuilt = tokenizer_from_metadata(without_json(entries), "x")
    for text in ("", "a b", "<A>"):
        assert rebuilt.encode(text, special=True) == tokenizer.encode(text, special=True)


def test_what_cannot_be_put_around_a_text_is_said():
    tokenizer = with_ends("<A>", "<B>", before="<A>", after="<A>")
    _, notes = written(tokenizer, bos_token_id=258, eos_token_ids=(258, 0))
    assert notes == [
        "the tokenizer begins a text with 257 ('<A>'), config.json names 258 ('<B>'): the file "
        "has the first alone",
        "llama.cpp will not end a text with 257 ('<A>')",
    ]
    inner = tokenizer.inner
    inner.post_processor = processors.TemplateProcessing(
        single="<A> <B> $A", special_tokens=[("<A>", 257), ("<B>", 258)]
    )
    entries, notes = written(Tokenizer(inner), bos_token_id=257, eos_token_ids=(258, 0))
    assert entries["tokenizer.ggml.add_bos_token"] is False
    assert notes == ["llama.cpp will not begin a text with 257 ('<A>'), 258 ('<B>')"]


# --- llama.cpp itself ---------------------------------------------------------------------

SOURCES = {
    "gpt-2": [pt.ByteLevel(add_prefix_space=False, use_regex=True)],
    "llama-bpe": [isolated(PUBLISHED["llama-bpe"][0][0]), LEVEL],
    "qwen2": [isolated(PUBLISHED["qwen2"][0][0]), LEVEL],
    "smollm": [pt.Digits(individual_digits=True), pt.ByteLevel(add_prefix_space=False)],
}


def fragments_only(count: int, seed: int) -> list[str]:
    """Without the random characters, some of which are newer than llama.cpp's tables."""
    return [text for i, text in enumerate(nasty_texts(count, seed)) if i % 5 != 4]


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", SOURCES)
def test_llama_cpp_reads_a_converted_tokenizer_as_the_source(name, tmp_path):
    llama_cpp = oracle("llama_cpp", "pip install llama-cpp-python")
    tokenizer = source(*SOURCES[name], ignore_merges=name == "llama-bpe")
    entries, _ = written(tokenizer)
    assert entries["tokenizer.ggml.pre"] == name
    with llama_cpp_tokenizer(llama_cpp, entries, tmp_path / "x.gguf") as model:
        for text in fragments_only(400, seed=13):
            assert model.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text), text
