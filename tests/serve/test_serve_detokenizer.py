"""The text of a sequence in parts: whole characters, up to a stop string, also after a step
that failed.
"""

from __future__ import annotations

import pytest

from refllm.decode.output_params import OutputParams
from refllm.serve.detokenizer import Detokenizer
from serving import served_model

TOKENIZER = served_model().tokenizer  # one token per byte


def pushed(text: str, *stop: str) -> Detokenizer:
    detokenizer = Detokenizer(TOKENIZER, OutputParams(stop=stop))
    for token in TOKENIZER.encode(text):
        detokenizer.push(token)
    return detokenizer


def test_parts_are_taken_once_and_add_up():
    detokenizer = pushed("ab")
    assert (detokenizer.text, detokenizer.take(), detokenizer.take()) == ("", "ab", "")
    for token in TOKENIZER.encode("cd"):
        detokenizer.push(token)
    assert (detokenizer.take(), detokenizer.text) == ("cd", "abcd")


def test_a_character_is_held_back_until_it_is_whole():
    first, second = TOKENIZER.encode("é")
    detokenizer = pushed("a")
    detokenizer.push(first)
    assert detokenizer.take() == "a"
    detokenizer.push(second)
    assert detokenizer.take() == "é"
    detokenizer.push(first)
    detokenizer.flush()
    assert detokenizer.take() == "\N{REPLACEMENT CHARACTER}"


def test_what_may_begin_a_stop_string_is_held_back_until_the_end():
    detokenizer = pushed("xab", "abc")
    assert detokenizer.take() == "x"
    detokenizer.flush()
    assert (detokenizer.take(), detokenizer.stopped) == ("ab", False)


@pytest.mark.parametrize("after", ["", "more", "é"[:1]])
def test_nothing_follows_a_stop_string(after):
    detokenizer = pushed("xabc" + after, "abc")
    assert detokenizer.stopped
    detokenizer.flush()
    assert (detokenizer.take(), detokenizer.text) == ("x", "x")


def test_after_a_failed_step_only_the_text_of_the_published_tokens_is_left():
    published = TOKENIZER.encode("xa")
    for lost in ("b", "bc", "bcd", "zz"):  # in a stop string, at its end, after it, without it
        detokenizer = pushed("xa" + lost, "abc")
        detokenizer.restart(published)
        assert not detokenizer.stopped
        assert (detokenizer.text, detokenizer.take()) == ("x", "")
        for token in TOKENIZER.encode("y"):
            detokenizer.push(token)
        assert (detokenizer.take(), detokenizer.text) == ("ay", "xay")


def test_after_a_failed_step_a_half_character_is_the_published_one():
    first, second = TOKENIZER.encode("é")
    detokenizer = pushed("a")
    detokenizer.push(first)
    detokenizer.restart(TOKENIZER.encode("a"))
    detokenizer.push(first)
    detokenizer.push(second)
    assert detokenizer.take() == "é"
