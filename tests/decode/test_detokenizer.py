"""Streaming text: whole characters, nothing past a stop string, and the same text however
it is cut.

The stream is compared with ``decode`` of all ids, for tokenizers of every kind of decoder;
the stop strings with ``str.find`` on the whole text, for every way to cut it.
"""

from __future__ import annotations

import itertools
import os.path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from refllm.checkpoints.tokenizer import END_OF_TEXT, Tokenizer
from refllm.decode.detokenizer import StopStrings, Utf8Stream

MULTI_BYTE = (
    "naïve café déjà 你好世界 日本語テキスト 🙂🙃 👩‍👩‍👧 🇫🇷 "
    "e\u0301 o\u0302\u0323 שלום \ufffd € ½ \x00"
)
FFFD = "\ufffd"


def wrapped(vocabulary: list[str], decoder: object) -> Tokenizer:
    """A tokenizer that only decodes: token i is ``vocabulary[i]``."""
    inner = RustTokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])
    )
    inner.decoder = decoder
    return Tokenizer(inner)


def sentencepiece_vocabulary() -> list[str]:
    words = ["▁", "▁▁", "▁▁▁", "▁the", "▁cat", "s", "é", "你", FFFD, "\n", "▁.", ","]
    return [f"<0x{b:02X}>" for b in range(256)] + words


LLAMA2 = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)
BYTE_LEVEL = Tokenizer.train([MULTI_BYTE, "def f(x):\n    return x\n"] * 3, vocab_size=340)
TOKENIZERS = {
    "byte_level": BYTE_LEVEL,
    "byte_fallback": wrapped(sentencepiece_vocabulary(), LLAMA2),
    "metaspace": wrapped(["▁", "▁▁", "▁a", "b", "▁你好", FFFD, "🙂", "a▁"], decoders.Metaspace()),
    "word_piece": wrapped(
        ["the", "##n", "do", "n't", ".", ",", "##", "é", FFFD], decoders.WordPiece()
    ),
    "word_end": wrapped(
        ["a</w>", "b", "é</w>", "</w>", FFFD, FFFD + "</w>"], decoders.BPEDecoder()
    ),
    "no_decoder": wrapped(["a", "é", FFFD, ""], None),
}


@st.composite
def id_lists(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Any ids, with a few that name no token; repetitions of one kind of byte are common,
    as in broken output.
    """
    size = tokenizer.vocab_size
    anything = st.lists(st.integers(0, size + 3), max_size=12)
    bytes_ = [
        i for i in range(min(size, 300)) if len(tokenizer.inner.id_to_token(i) or "") in (1, 6)
    ]
    runs = st.tuples(st.sampled_from(bytes_), st.integers(1, 6)).map(lambda r: [r[0]] * r[1])
    pieces = draw(st.lists(anything | runs, max_size=6))
    return [i for piece in pieces for i in piece]


def stream_all(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, Utf8Stream]:
    stream = Utf8Stream(tokenizer)
    text = "".join([stream.push(i) for i in ids])
    return text + stream.flush(), stream


@pytest.mark.theorem(
    "streamed pieces, joined, are decode(all ids): for any decoder and any ids, invalid bytes "
    "and unknown ids included",
    source="prefix-offset decoding, TGI and vLLM",
)
@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_the_stream_is_decode_for_any_ids_and_any_decoder(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(id_lists(tokenizer))
    assert stream_all(tokenizer, ids)[0] == tokenizer.decode(ids)


@given(text=st.text(max_size=40) | st.just(MULTI_BYTE), vocabulary=st.sampled_from([258, 300, 340]))
def test_the_stream_of_encoded_text_is_the_text(text, vocabulary):
    tokenizer = Tokenizer.train([MULTI_BYTE], vocab_size=vocabulary)
    assert stream_all(tokenizer, tokenizer.encode(text))[0] == text


@pytest.mark.theorem(
    "with byte-level BPE at most one character is held back after any token, only where it may "
    "still be unfinished, and no emitted piece is ever taken back",
    source="Unicode 15, §3.9, maximal subparts: U+FFFD for each",
)
@given(data=st.data())
def test_after_every_token_all_but_an_unfinished_character_is_out(data):
    ids = data.draw(id_lists(BYTE_LEVEL))
    stream = Utf8Stream(BYTE_LEVEL)
    shown = ""
    for n, i in enumerate(ids, 1):
        shown += stream.push(i)
        sofar = BYTE_LEVEL.decode(ids[:n])
        assert shown == (sofar[:-1] if sofar.endswith(FFFD) else sofar)
    assert shown + stream.flush() == BYTE_LEVEL.decode(ids)


def test_every_cut_of_a_character_into_tokens_is_joined():
    # one token per byte, so every character of two to four bytes is cut everywhere
    tokenizer = Tokenizer.train([], vocab_size=257)
    for character in set(MULTI_BYTE):
        ids = tokenizer.encode(character)
        assert len(ids) == len(character.encode())
        stream = Utf8Stream(tokenizer)
        assert [stream.push(i) for i in ids][:-1] == [""] * (len(ids) - 1)


@pytest.mark.theorem(
    "streaming n ids decodes at most 6 n + 6 of them, whatever the bytes: O(1) per token",
    source="a UTF-8 character has at most 4 bytes, so at most 4 tokens are unfinished",
)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "word_piece"])
@given(data=st.data())
def test_the_work_per_token_is_bounded(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(id_lists(tokenizer)) * data.draw(st.integers(1, 5))
    _, stream = stream_all(tokenizer, ids)
    assert stream.decoded <= 6 * len(ids) + 6


@pytest.mark.parametrize(
    "bytes_", [b"\x80", b"\xf0", b"\xf0\x9f", b"\xe2\x82\xac", b"\xac\xe2\x82"]
)
def test_endless_broken_bytes_are_streamed_at_once_at_constant_cost(bytes_):
    tokenizer = Tokenizer.train([], vocab_size=257)
    token = {b: i for c in "\x80🙂€" for b, i in zip(c.encode(), tokenizer.encode(c), strict=True)}
    ids = [token[b] for b in bytes_] * 500
    stream = Utf8Stream(tokenizer)
    shown = 0
    for n, i in enumerate(ids, 1):
        shown += len(stream.push(i))
        assert len((bytes_ * 500)[:n].decode(errors="replace")) - shown <= 1
    assert stream.decoded <= 6 * len(ids)


def test_byte_fallback_shows_nothing_that_a_bad_byte_may_change():
    tokenizer = TOKENIZERS["byte_fallback"]
    # é is complete after two, but consecutive bytes are valid as a whole or not at all
    ids = [0xC3, 0xA9, 0xF0, 257]
    assert tokenizer.decode(ids[:2]) == "é"
    assert tokenizer.decode(ids) == FFFD * 3 + "  "
    stream = Utf8Stream(tokenizer)
    assert [stream.push(i) for i in ids] == ["", "", "", FFFD * 3 + "  "]


def test_special_tokens_and_a_second_text_after_flush():
    stream = Utf8Stream(BYTE_LEVEL)
    smile = BYTE_LEVEL.encode("🙂")
    assert stream.push(0) == END_OF_TEXT
    pieces = [stream.push(i) for i in smile[:-1]]
    assert "".join(pieces) + stream.flush() == BYTE_LEVEL.decode(smile[:-1])
    assert "".join(map(stream.push, smile)) == "🙂"
    assert stream.flush() == ""


def test_a_decoder_that_rewrites_shown_text_is_rejected():
    rewrites = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")])
    stream = Utf8Stream(wrapped(["a", "b"], rewrites))
    assert stream.push(0) == "a"
    with pytest.raises(ValueError, match=r"turned 'a' into 'X'"):
        stream.push(1)


# --- stop strings -------------------------------------------------------------------------

stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def find_stop(text: str, stops: list[str], ignored: int = 0) -> tuple[str, str | None]:
    """The definition, by brute force: (the text before the stop string, the stop string) that
    is complete first, of several that end together the longest. None may end within the
    first ``ignored`` characters.
    """
    for end in range(ignored + 1, len(text) + 1):
        if complete := [s for s in stops if text[:end].endswith(s)]:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def before_stop(text: str, stops: list[str]) -> str:
    return find_stop(text, stops)[0]


@pytest.mark.theorem(
    "the text ends where the first stop string is complete, of several that end together before "
    "the longest, for every cut of the text into pieces",
    source="definition: str.endswith on every prefix of the text",
)
@given(text=st.text("ab", max_size=8), stops=stop_lists, data=st.data())
@example(text="aabb", stops=["ab", "aabb"], data=None)  # the longer begins first and ends last
@example(text="aaba", stops=["ab", "aabb"], data=None)  # as before, but it does not occur
@example(text="aab", stops=["b", "ab"], data=None)  # they end together
def test_stop_strings_are_found_for_every_cut_of_the_text(text, stops, data):
    ignored = data.draw(st.integers(0, 3)) if data else 0
    before, matched = find_stop(text, stops, min(ignored, len(text)))
    for cuts in itertools.product([False, True], repeat=max(0, len(text) - 1)):
        edges = [0, *(i for i, cut in enumerate(cuts, 1) if cut), len(text)]
        if 0 < ignored < len(text) and ignored not in edges:
            continue  # min_tokens ends between two tokens
        pieces = list(itertools.pairwise(edges))
        for include in (False, True):
            filter_ = StopStrings(stops, include=include)
            out = "".join([filter_.push(text[a:b], stopping=b > ignored) for a, b in pieces])
            assert out + filter_.flush() == before + (matched or "") * include
            assert filter_.stopped == (matched is not None)
            assert filter_.matched == matched


@pytest.mark.theorem(
    "after each piece exactly the text common to all continuations is out, and stopped is set "
    "exactly when no continuation can change the result: nothing is held back needlessly",
    source="enumeration of all continuations up to the longest stop string",
)
@given(text=st.text("abc", max_size=7), stops=stop_lists)
@example(text="aabb", stops=["ab", "aabb"])
@example(text="aaba", stops=["ab", "aabb"])
def test_no_more_is_held_back_than_may_still_be_stopped(text, stops):
    longest = max(map(len, stops), default=0)
    continuations = [
        "".join(c) for n in range(longest + 1) for c in itertools.product("abc", repeat=n)
    ]
    filter_ = StopStrings(stops)
    out = ""
    for n, character in enumerate(text, 1):
        out += filter_.push(character)
        results = [
            before_stop(text[:n] + more, stops) for more in (*continuations, "c" * (longest + 1))
        ]
        assert out == os.path.commonprefix(results)  # noqa: RUF071 - characters are what is meant
        assert filter_.stopped == (len(set(results)) == 1)


def test_a_stop_string_may_straddle_tokens_and_characters():
    text = "x = 1\n🙂🙂 end 你好 more"
    for stop, rest in (
        ("🙂 end", "x = 1\n🙂"),
        ("\n🙂", "x = 1"),
        ("d 你好", "x = 1\n🙂🙂 en"),
        ("absent", text),
    ):
        stream = Utf8Stream(BYTE_LEVEL)
        filter_ = StopStrings(stop)
        out = "".join([filter_.push(stream.push(i)) for i in BYTE_LEVEL.encode(text)])
        assert out + filter_.push(stream.flush()) + filter_.flush() == rest
        assert filter_.matched == (stop if stop in text else None)


def test_after_the_stop_nothing_passes():
    filter_ = StopStrings(["stop"])
    assert filter_.push("go stop go") == "go "
    assert (filter_.push("more"), filter_.flush(), filter_.stopped) == ("", "", True)


@given(pieces=st.lists(st.text(max_size=5)))
def test_without_stop_strings_every_piece_passes_at_once(pieces):
    filter_ = StopStrings()
    assert [filter_.push(piece) for piece in pieces] == pieces
    assert not filter_.stopped


@pytest.mark.parametrize("stops", ["", [""], ["ok", ""], ["ok", None], [b"ok"], b"ok", [1]])
def test_a_stop_string_that_is_empty_or_no_text_is_rejected(stops):
    with pytest.raises(ValueError, match="must not be empty"):
        StopStrings(stops)


@given(stop=st.text(min_size=1, max_size=6))
def test_one_string_is_one_stop_string_and_not_its_letters(stop):
    assume(len(stop) > 1)
    assert StopStrings(stop).stops == (stop,)
